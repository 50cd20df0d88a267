"""Sources -> seekable parts -> documents.

Comes in: what the user wrote under ``data.train`` (paths, globs, folders, ``stdlib``, or mappings with a
weight). Goes out: :class:`Source` -> :func:`parts` -> :func:`read` -> :class:`Document`, always in the same
order. What always holds: the documents and their order depend only on the files, the options and nothing else
(not on ``part_bytes``, the number of processes, the order in which a folder is listed); a broken line,
record, file or encoding costs itself and no good document before or after it, and is reported with file and
offset.

What a document is:

========================  ====================================================================================
``.jsonl .ndjson .json``  one record; the text is its ``text_field`` (``.json``: lines, an array, or objects)
``.parquet .csv .tsv``    one row; the text is its column ``text_field``
anything else             plain text, by ``unit``: ``line``, ``paragraph`` (between blank lines) or ``file``
========================  ====================================================================================

``unit: auto`` is decided once per source, by this rule, and shown: mostly source code or markup -> file;
several files of at most 1 MiB (median) -> file; a blank line between two others in the first MiB of the first
file -> paragraph; else line. All of them may be compressed (``.gz .zst .bz2 .xz``).

What is done to the text, and nothing else: a byte order mark is removed, CRLF becomes LF, the line end of a
unit is not part of it. A document without any visible character is dropped and counted as empty. Bad records
are: bytes that the encoding does not know, NUL, lone surrogates, records without the field or with another
type in it, documents above 256 MiB, broken compression, files that vanish or change while they are read.

    [source] = resolve(["corpus/*.jsonl.zst"])
    for part in parts(source):
        for document in read(source, part, bad=print):
            document.text
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

from lmcore.data.text import formats
from lmcore.data.text.compression import CODECS, Damage, encoding_is_wide, is_blank, lines, stream
from lmcore.data.text.sources import FOREIGN_SUFFIXES, HUB, Source, file_kind, resolve
from lmcore.errors import RequestError

__all__ = ["BadRecord", "Document", "Part", "Piece", "Source", "parts", "read", "resolve", "side"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of documents in one file: bytes ``[start, stop)``, or row groups of a parquet file.

    A document belongs to the piece in which it begins. ``n_bytes`` is what reading it costs, for progress
    bars; ``size_bytes`` and ``mtime_ns`` are those of the file when it was listed, so that a change is
    noticed.
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
    """The unit of work of one process: a piece of a large file, or several small files together."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self.pieces)

    @property
    def path(self) -> str:
        return self.pieces[0].path

    @property
    def relative_path(self) -> str:
        return self.pieces[0].relative_path

    @property
    def kind(self) -> str:
        return self.pieces[0].kind

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop


class Document(NamedTuple):
    """One text, and where it begins: ``path@byte`` of the uncompressed file or ``path#row``."""

    text: str
    where: str


@dataclass(frozen=True)
class BadRecord:
    """What could not be read: ``where`` is ``byte 123`` (of the uncompressed file) or ``row 5``."""

    path: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, {self.where}: {self.reason}"


def parts(source: Source, *, part_bytes: int = 64 * 2**20) -> list[Part]:
    """Cut a source into parts of about ``part_bytes``: arithmetic over the file sizes, nothing is read but
    the footers of parquet files. Compressed files and whole-file units are not cut."""
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
        raise RequestError(f"{path} is no file: training and prepare read it, this does not")
    try:
        stat = os.stat(path)
    except OSError:
        stat = None  # vanished since it was resolved: read() reports it
    size, mtime = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)

    def piece(start: int, stop: int, n_bytes: int) -> Piece:
        return Piece(
            path=path,
            relative_path=relative_path,
            kind=kind,
            start=start,
            stop=stop,
            n_bytes=n_bytes,
            size_bytes=size,
            mtime_ns=mtime,
        )

    if kind == "parquet":
        for start, stop, n_bytes in formats.parquet_ranges(path, part_bytes) or [(0, -1, size)]:
            yield piece(start, stop, n_bytes)
    elif (
        kind in ("line", "paragraph", "jsonl")
        and _compression(path) is None
        and not encoding_is_wide(source.encoding)
    ):
        for start in range(0, size, part_bytes):
            stop = min(start + part_bytes, size)
            yield piece(start, stop, stop - start)
        if not stat:
            yield piece(0, sys.maxsize, 0)
    elif size or kind == "file" or not stat:  # an empty file is an empty document
        yield piece(0, sys.maxsize, size)


def _compression(path: str) -> str | None:
    return CODECS.get(os.path.splitext(path)[1].lower())


def read(
    source: Source,
    part: Part,
    *,
    bad: Callable[[BadRecord], None],
    empty: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of a part, in order. Never raises for what the files contain.

    Args:
        bad: called for each broken record, in its place between the documents; what it raises ends the
        reading. empty: called with the place of each document without any visible character, which is
        dropped.
    """
    for piece in part.pieces:
        row = piece.kind == "parquet"
        for at, value in _watched(source, piece):
            if isinstance(value, Damage):
                bad(BadRecord(piece.path, f"{'row' if row else 'byte'} {at}", value.reason))
                continue
            text = value.replace("\r\n", "\n") if "\r\n" in value else value
            where = f"{piece.path}{'#' if row else '@'}{at}"
            if text.strip():
                yield Document(text, where)
            elif empty is not None:
                empty(where)


def _watched(source: Source, piece: Piece) -> Iterator[tuple[int, str | Damage]]:
    """The texts of a piece, and a ``Damage`` if the file vanished, changed or could not be read."""
    at = piece.start
    try:
        with open(piece.path, "rb") as file:
            for at, value in _texts(source, piece, file):
                yield at, value
            stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (piece.size_bytes, piece.mtime_ns):
            yield at, Damage("the file was changed after it was listed")
    except FileNotFoundError:
        yield at, Damage("the file vanished after it was listed")
    except OSError as error:
        yield at, Damage(f"cannot be read: {error.strerror or error}")


def _texts(source: Source, piece: Piece, file: IO[bytes]) -> Iterator[tuple[int, str | Damage]]:
    """(offset or row, text or damage), in order."""
    kind, field = piece.kind, source.text_field
    if kind == "parquet":
        yield from formats.parquet(file, field, piece.start, piece.stop)
        return
    offset = max(piece.start - 1, 0)
    if offset:
        file.seek(offset)
    content, encoding = stream(file, _compression(piece.path), source.encoding)
    if kind == "file":
        yield from formats.whole(content, encoding)
        return
    numbered = lines(content, offset)
    if piece.start:
        next(
            numbered, None
        )  # the line that began in the piece before; one that begins at start leaves an empty rest
    if kind == "line":
        yield from formats.plain_lines(numbered, piece.stop, encoding)
    elif kind == "paragraph":
        inside = piece.start > 0 and not _blank_line_before(piece)
        yield from formats.paragraphs(numbered, piece.stop, encoding, inside)
    elif kind == "jsonl":
        yield from formats.fields(formats.json_lines(numbered, piece.stop, encoding), field)
    elif kind == "json":
        yield from formats.fields(formats.json_file(numbered, encoding), field)
    else:
        yield from formats.csv_rows(numbered, encoding, field, kind)


def _blank_line_before(piece: Piece) -> bool:
    """Is the last line that begins before ``piece.start`` blank?"""
    with open(piece.path, "rb") as file:
        # From the beginning of that line, which is found backwards, to its end, which may lie behind start.
        begin = end = piece.start - 1
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
        # A line of white space that is longer than this counts as text.
        line = file.readline(end - begin + 2**16)
        return line.endswith(b"\n") and is_blank(line)


def side(text: str, fraction: float) -> Literal["train", "valid"]:
    """Where a document belongs when ``fraction`` of the corpus is held out: decided by its content alone, so
    that the same text is always on the same side, whatever stands around it."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") < fraction * 2**64 else "train"
