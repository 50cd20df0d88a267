"""Text files -> documents.

    [source] = resolve_sources(["corpus/*.jsonl.zst"])
    for part in parts(source):
        for document in read(source, part, bad=print):
            document.text

========================  ====================================================================================
``.jsonl .ndjson .json``  one record; the text is its ``text_field`` (``.json``: lines, an array, or objects)
``.parquet .csv .tsv``    one row; the text is its column ``text_field``
anything else             plain text, by ``unit``: ``line``, ``paragraph`` (between blank lines) or ``file``
========================  ====================================================================================

All except parquet may be compressed (``.gz .zst .bz2 .xz``).

``unit: auto`` is decided once per source by this rule, and shown: mostly source code or markup -> file; several files
of at most 1 MiB (median) -> file; a blank line between two others in the first MiB of the first file -> paragraph;
else line. Validation text has the unit of the training text.

The documents and their order depend only on the files and the options, not on ``part_bytes``, the number of processes,
or the order in which a folder is listed. A byte order mark is removed and CRLF becomes LF; the text is not changed
otherwise. A document without any visible character is dropped and counted as empty. A bad record (bytes that are invalid
in the encoding, ISO-2022-JP that is read as ASCII, NUL, a lone surrogate, a missing field, more than 256 MiB, broken
compression, a file that vanished or changed, an archive or a picture) is reported with its place and the number of
documents that are lost with it; other documents are kept.
"""

from __future__ import annotations

import codecs
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

from lmcore.data.text import formats, listing
from lmcore.data.text.compression import (
    Damage,
    as_lines_of_bytes,
    chunks,
    compression_of,
    encoding_is_wide,
    is_blank,
    lines,
)
from lmcore.data.text.remote import open_file, state_of
from lmcore.data.text.signatures import HEAD_BYTES, signature
from lmcore.data.text.sources import (
    FOREIGN_SUFFIXES,
    HUB,
    Source,
    file_identity,
    file_kind,
    is_plain_text,
    resolve_sources,
)
from lmcore.errors import RequestError
from lmcore.humanize import one_line, size

__all__ = [
    "BadRecord",
    "Document",
    "Part",
    "Piece",
    "Source",
    "file_identity",
    "is_plain_text",
    "parts",
    "read",
    "resolve_sources",
]


_CHANGED = "the file was changed after it was listed"
_VANISHED = "the file vanished after it was listed"
_STRETCH_BYTES = 2**16
"""A line is read this far at once, to see whether it is blank."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one file: bytes ``[start, stop)``, or row groups of a parquet file.

    A document belongs to the piece in which it begins. ``n_bytes`` is the number of bytes to read, for progress bars;
    ``size_bytes`` and ``mtime_ns`` are those of the file when it was listed, to detect changes.
    """

    path: str
    relative_path: str
    kind: str
    start: int
    stop: int
    n_bytes: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """The unit of work of one process: a piece of a large file, or several small files."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self.pieces)

    @property
    def path(self) -> str:
        """The first file."""
        return self.pieces[0].path

    @property
    def start(self) -> int:
        return self.pieces[0].start


class Document(NamedTuple):
    """One text, and where it begins: ``path@byte`` of the uncompressed file or ``path#row``."""

    text: str
    where: str


@dataclass(frozen=True)
class BadRecord:
    """A place in a file from which no document could be read.

    Attributes:
        where: ``byte 123`` (of the uncompressed file) or ``row 5``.
        documents: number of documents that are lost; the minimum if ``at_least``.
        n_bytes: bytes of text that are lost; an estimate for compressed files.
    """

    path: str
    where: str
    reason: str
    documents: int = 1
    n_bytes: int = 0
    at_least: bool = False

    @property
    def is_of_the_moment(self) -> bool:
        """Whether the cause is temporary: another program wrote or removed the file while it was read."""
        return self.reason in (_CHANGED, _VANISHED)

    def __str__(self) -> str:
        lost = ""
        if self.at_least:
            lost = f" (lost: about {size(self.n_bytes)} of text, an unknown number of documents)"
        elif self.documents > 1:
            lost = f" (lost: {self.documents:,} documents)"
        return one_line(f"{self.path}, {self.where}: {self.reason}{lost}")


def parts(source: Source, *, part_bytes: int = 64 * 2**20) -> list[Part]:
    """Cut a source into parts of about ``part_bytes``, by the sizes of its files.

    Only the footers of parquet files are read. Compressed files, and files that are one document, are not cut.
    """
    result: list[Part] = []
    group: list[Piece] = []
    group_bytes = 0

    def close() -> None:
        if group:
            result.append(Part(index=len(result), pieces=tuple(group)))
            group.clear()

    for path, relative_path in zip(source.paths, source.relative_paths or source.paths):
        for piece in _pieces(source, path, relative_path, part_bytes):
            if group_bytes + piece.n_bytes > part_bytes:
                close()
                group_bytes = 0
            group.append(piece)
            group_bytes += piece.n_bytes
    close()
    return result


def _pieces(source: Source, path: str, relative_path: str, part_bytes: int) -> Iterator[Piece]:
    kind = file_kind(path) or source.unit
    if path.endswith(FOREIGN_SUFFIXES):
        raise RequestError(f"{path} holds tokens, not text: it can be trained on, but not read as text")
    if path.startswith(HUB):
        raise RequestError(f"{path} is not a file: only training and prepare read datasets of the Hub")
    stat = listing.stat(path)  # None: vanished since it was resolved; read() reports it
    n_bytes, mtime = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
    packed = compression_of(path) is not None

    def piece(start: int, stop: int, cost: int) -> Piece:
        return Piece(
            path=path,
            relative_path=relative_path,
            kind=kind,
            start=start,
            stop=stop,
            n_bytes=cost,
            size_bytes=n_bytes,
            mtime_ns=mtime,
        )

    if kind == "parquet":
        for start, stop, cost in formats.parquet_ranges(path, part_bytes) or [(0, -1, n_bytes)]:
            yield piece(start, stop, cost)
    elif kind in ("line", "paragraph", "jsonl") and not packed and not encoding_is_wide(source.encoding):
        for start in range(0, n_bytes, part_bytes):
            stop = min(start + part_bytes, n_bytes)
            yield piece(start, stop, stop - start)
        if not stat:
            yield piece(0, sys.maxsize, 0)
    # An empty file is an empty document. An empty compressed file is truncated, which is reported when it is read.
    elif n_bytes or kind == "file" or not stat or packed:
        yield piece(0, sys.maxsize, n_bytes)


def with_lf(text: str) -> str:
    """``text`` with LF instead of CRLF; used for texts of every format."""
    return text.replace("\r\n", "\n") if "\r\n" in text else text


def read(
    source: Source,
    part: Part,
    *,
    bad: Callable[[BadRecord], None],
    empty: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of a part, in order. The content of files never raises an error.

    Args:
        bad: called for each bad record, in order with the documents; an exception from it ends the reading.
        empty: called with the place of each document without any visible character, which is dropped.
    """
    for piece in part.pieces:
        row = piece.kind == "parquet"
        for at, value in _watched(source, piece):
            if isinstance(value, Damage):
                where = f"{'row' if row else 'byte'} {at}"
                bad(
                    BadRecord(
                        path=piece.path,
                        where=where,
                        reason=value.reason,
                        documents=value.documents,
                        n_bytes=value.n_bytes,
                        at_least=value.at_least,
                    )
                )
                continue
            text = with_lf(value)
            where = f"{piece.path}{'#' if row else '@'}{at}"
            if text.strip():
                yield Document(text, where)
            elif empty is not None:
                empty(where)


def _watched(source: Source, piece: Piece) -> Iterator[tuple[int, str | Damage]]:
    """The texts of a piece, and a ``Damage`` if the file vanished, changed or cannot be read."""
    at = piece.start
    all_of_it = piece.kind == "file"  # then the number of lost documents is known

    def lost(reason: str) -> Damage:
        return Damage(reason, n_bytes=piece.n_bytes, at_least=not all_of_it)

    try:
        with open_file(piece.path) as file:
            for at, value in _texts(source, piece, file):
                yield at, value
            state = state_of(file, piece.path)
        if state != (piece.size_bytes, piece.mtime_ns):
            yield at, Damage(_CHANGED, at_least=True)
    except FileNotFoundError:
        yield at, lost(_VANISHED)
    except OSError as error:
        yield at, lost(f"cannot be read: {error.strerror or error}")


def _texts(source: Source, piece: Piece, file: IO[bytes]) -> Iterator[tuple[int, str | Damage]]:
    """(offset or row, text or damage), in order."""
    kind, field = piece.kind, source.text_field
    compression = compression_of(piece.path)
    if kind == "parquet":
        for at, value in formats.parquet(
            file, field, source.encoding, piece.start, piece.stop, piece.size_bytes
        ):
            if isinstance(value, Damage) and value.at_least:  # not a parquet file at all
                head = _head(piece.path)
                yield at, value if head.startswith(b"PAR1") else _not_text(head, piece.path, value) or value
            else:
                yield at, value
        return
    pieces = chunks(file, compression)
    if piece.start == 0:
        first = next(pieces, b"")
        head = first[:HEAD_BYTES] if isinstance(first, bytes) else b""
        pieces = itertools.chain([first], pieces)
    else:
        head = file.read(HEAD_BYTES)
        file.seek(piece.start - 1)
    if damage := _not_text(head, piece.path, Damage("", n_bytes=piece.n_bytes, at_least=kind != "file")):
        yield piece.start, damage
        return
    content, encoding = as_lines_of_bytes(pieces, source.encoding)
    if kind == "file":
        yield from formats.whole(content, encoding)
        return
    if kind == "json":
        yield from formats.fields(formats.json_file(content, encoding), field)
        return
    numbered = lines(content, max(piece.start - 1, 0))
    if piece.start:
        # Skip the line that began in the previous piece; if a line begins at start, this is the empty end of the previous one.
        next(numbered, None)
    if kind == "line":
        yield from formats.plain_lines(numbered, piece.stop, encoding)
    elif kind == "paragraph":
        inside = piece.start > 0 and not _blank_line_before(piece)
        yield from formats.paragraphs(numbered, piece.stop, encoding, inside)
    elif kind == "jsonl":
        yield from formats.fields(formats.json_lines(numbered, piece.stop, encoding), field)
    else:
        yield from formats.csv_rows(numbered, encoding, field, kind)


def _head(path: str) -> bytes:
    with open_file(path) as file:
        return file.read(HEAD_BYTES)


def _not_text(head: bytes, path: str, damage: Damage) -> Damage | None:
    """The damage with what the file really is, if it is an archive, a picture or similar; else ``None``."""
    what = signature(head, path)
    if what is None:
        return None
    return Damage(f"this is not text but {what}", n_bytes=damage.n_bytes, at_least=damage.at_least)


def _blank_line_before(piece: Piece) -> bool:
    """Whether the last line that begins before ``piece.start`` is blank."""
    with open_file(piece.path) as file:
        # Find the beginning of that line backwards, then read to its end, which may be after start.
        begin = piece.start - 1
        while begin > 0:
            step = max(begin - 2**12, 0)
            file.seek(step)
            before = file.read(begin - step)
            line_end = before.rfind(b"\n") + 1
            begin = step + line_end
            if line_end:
                break
            if len(before.strip()) > len(codecs.BOM_UTF8):
                return False
        file.seek(begin)
        # In stretches, because a line may be long; all but the first are without a byte order mark.
        stretch = file.readline(_STRETCH_BYTES)
        blank = is_blank(stretch)
        while blank and not stretch.endswith(b"\n"):
            stretch = file.readline(_STRETCH_BYTES)
            blank = bool(stretch) and not stretch.strip()
        return blank
