"""Bytes and lines of plain and compressed files (gzip, zstandard, bzip2, xz).

Several concatenated compressed frames are one stream. If the data are broken, everything before that place is
yielded, then one :class:`Damage`, and nothing more of this file. Memory does not grow with the file.

    for offset, line in lines(chunks(file, "gzip")):
        ...
"""

from __future__ import annotations

import bz2
import codecs
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""File suffix -> compression."""
MAX_DOCUMENT_BYTES = 256 * 2**20
"""A document above this size is a bad record: most likely a file without line ends."""
SURROGATE = "lmcore.surrogate"
"""Error handler for decoders: undecodable bytes become one lone surrogate, so that only the document that contains it
is bad."""
codecs.register_error(SURROGATE, lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]  # a UnicodeError
UNDECODABLE = "\udc80".encode("utf-8", "surrogatepass")
"""The bytes that replace undecodable bytes in converted text (:func:`as_lines_of_bytes`)."""

_READ_BYTES = 2**20
# Small, because a decompressor discards what it has decoded in a call that fails; 512 bytes can become 16 MB (zstandard).
_FEED_BYTES = 512
_GIVEN_BYTES = 2**16
_JUDGED_BYTES = 1000
_FEWEST_BYTES = 32
"""Fewer ASCII bytes than this may be a few Chinese characters in UTF-16."""


@dataclass(frozen=True)
class Damage:
    """A place where text is lost.

    Attributes:
        reason: what is wrong, and what to do about it.
        rest: the beginning of the line that the damage interrupts.
        documents: number of documents that are lost; the minimum if ``at_least``.
        n_bytes: bytes of text that are lost (for compressed files estimated from the compression ratio so far).
        at_least: the number of lost documents is not known.
    """

    reason: str
    rest: bytes = b""
    documents: int = 1
    n_bytes: int = 0
    at_least: bool = False


def compression_of(path: str) -> str | None:
    """The compression by the ending of a file name, a value of :data:`CODECS`, or ``None``."""
    return CODECS.get("." + path.rpartition(".")[2].lower())


def _decompressor(name: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """(constructor, the errors that it raises for broken data)."""
    if name == "gzip":
        return (lambda: zlib.decompressobj(wbits=31)), (zlib.error, MemoryError)
    if name == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError, EOFError, MemoryError)
    if name == "xz":
        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)), (lzma.LZMAError, EOFError, MemoryError)
    import zstandard  # imported only if a .zst file is read

    # Frames written with `zstd --long=31` need the large window, which is allocated only for them.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return decompressor.decompressobj, (zstandard.ZstdError, MemoryError)


def chunks(file: IO[bytes], compression: str | None) -> Iterator[bytes | Damage]:
    """The content of ``file`` from its current position on; ``compression`` is a value of :data:`CODECS`."""
    if compression is not None:
        yield from _decompressed(file, compression)
        return
    while data := file.read(_READ_BYTES):
        yield data


def _decompressed(file: IO[bytes], name: str) -> Iterator[bytes | Damage]:
    new, errors = _decompressor(name)
    decoder: Any = None  # None between two frames
    begin = offset = frames = n_bytes = held_bytes = 0
    held: list[bytes] = []
    raw, reason = b"", ""
    while raw := raw or file.read(_FEED_BYTES):
        if decoder is None:
            # Zero bytes may follow a frame (gzip on tape, padding of xz).
            content = raw.lstrip(b"\0") if frames else raw
            offset += len(raw) - len(content)
            raw = content
            if not raw:
                continue
            decoder, begin = new(), offset
        try:
            content = decoder.decompress(raw)
        except errors as error:
            what = "is damaged near" if offset > begin else "was expected, but not found, at"
            reason = f"{name} data {what} compressed byte {offset} ({error})"
            break
        held.append(content)
        held_bytes += len(content)
        n_bytes += len(content)
        rest = decoder.unused_data if decoder.eof else b""
        offset += len(raw) - len(rest)
        raw = rest
        if decoder.eof:
            decoder, frames = None, frames + 1
        if held_bytes >= _GIVEN_BYTES:
            yield b"".join(held)
            held, held_bytes = [], 0
    if held_bytes:
        yield b"".join(held)
    # A file without any frame is also damaged: even an empty text has a frame.
    if decoder is not None or not frames:
        left = file.seek(0, 2) - offset
        ratio = max(n_bytes / max(offset, 1), 1.0)
        yield Damage(
            reason or f"{name} data is cut off at compressed byte {offset}",
            n_bytes=int(left * ratio),
            at_least=True,
        )


def is_blank(line: bytes) -> bool:
    """Whether a line has only white space, and perhaps a byte order mark."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def encoding_is_wide(encoding: str) -> bool:
    """Whether files in this encoding cannot be cut into parts.

    Either a line end is not the byte 0x0A (UTF-16, UTF-32, EBCDIC), or a line cannot be decoded without the beginning of
    the file (ISO-2022-KR, which declares its character set only there)."""
    return "\n".encode(encoding) != b"\n" or codecs.lookup(encoding).name == "iso2022_kr"


def as_lines_of_bytes(
    pieces: Iterable[bytes | Damage], encoding: str
) -> tuple[Iterable[bytes | Damage], str]:
    """The content in an encoding with line ends 0x0A and independently decodable lines, and the name of that encoding."""
    if not encoding_is_wide(encoding):
        return pieces, encoding
    return _to_utf8(pieces, encoding), "utf-8"


def _to_utf8(pieces: Iterable[bytes | Damage], encoding: str) -> Iterator[bytes | Damage]:
    decoder = codecs.getincrementaldecoder(encoding)(SURROGATE)
    zeros = b"\0" in "\n".encode(encoding)
    rest = itertools.chain(pieces, [None])
    for number, piece in enumerate(rest):
        if isinstance(piece, Damage):
            yield piece
            return
        try:
            if number == 0 and zeros and _is_ascii(piece or b""):
                # UTF-16 would read two letters as one Chinese character.
                raise UnicodeError("this looks like utf-8")
            yield decoder.decode(piece or b"", piece is None).encode("utf-8", "surrogatepass")
        except UnicodeError as error:  # or no byte order mark
            reason = f"not {encoding} ({error}): set data.encoding (without a byte order mark: {encoding}-le, {encoding}-be)"
            lost = sum(len(one) for one in (piece, *rest) if isinstance(one, bytes))
            yield Damage(reason, n_bytes=lost, at_least=True)
            return


def _is_ascii(piece: bytes) -> bool:
    """Whether a file with this beginning is ASCII text."""
    head = piece[:_JUDGED_BYTES]
    return len(head) >= _FEWEST_BYTES and head.isascii() and b"\0" not in head


def lines(
    pieces: Iterable[bytes | Damage], offset: int = 0, separator: bytes = b"\n"
) -> Iterator[tuple[int, bytes | Damage]]:
    """Iterate over (offset of the first byte of a line, the line without its end).

    A line above :data:`MAX_DOCUMENT_BYTES` is replaced by a ``Damage``. A damage in the middle of a line has the offset of
    that line.
    """
    pending: list[bytes] = []  # the beginning of an incomplete line
    pending_bytes = 0
    start = offset
    for piece in pieces:
        if isinstance(piece, Damage):
            rest = b"".join(pending) if pending_bytes <= MAX_DOCUMENT_BYTES else b""
            yield start, replace(piece, rest=rest, n_bytes=piece.n_bytes + pending_bytes)
            start += pending_bytes
            pending, pending_bytes = [], 0
            continue
        found = piece.split(separator)
        for part in found[:-1]:
            if pending_bytes:
                length = pending_bytes + len(part)
                yield start, _whole(pending, part, length)
                pending, pending_bytes = [], 0
            else:
                length = len(part)
                yield start, part
            start += length + 1
        rest = found[-1]
        if rest:
            pending_bytes += len(rest)
            if pending_bytes <= MAX_DOCUMENT_BYTES:
                pending.append(rest)
    if pending_bytes:
        yield start, _whole(pending, b"", pending_bytes)


def _whole(pending: list[bytes], end: bytes, length: int) -> bytes | Damage:
    if length > MAX_DOCUMENT_BYTES:
        return Damage(f"a line of {length:,} bytes, more than {MAX_DOCUMENT_BYTES:,}", n_bytes=length)
    return b"".join([*pending, end])
