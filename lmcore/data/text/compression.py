"""The bytes of a text file, and its lines, whatever happened to the file.

Comes in: an open file, plain or compressed (gzip, zstandard, bzip2, xz; several frames one after another are
one stream). Goes out: pieces of its content in order, and a :class:`Damage` where the stream is broken. What
always holds: every byte that the format lets one recover before a damage is given out before the ``Damage``,
and reading goes on at the next frame after it; memory does not grow with the file.

    for offset, line in lines(chunks(file, "gzip")): ...
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""Suffix -> compression."""
MAX_DOCUMENT_BYTES = 256 * 2**20
"""A document above this is a bad record: it is a file without line ends, not a text."""
SURROGATE = "lmcore.surrogate"
"""Error handler of decoders: what cannot be decoded becomes one lone surrogate, so that exactly the document
around it is found bad afterwards."""
codecs.register_error(SURROGATE, lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]  # a UnicodeError

_READ_BYTES = 2**20
# Small, because a highly compressed input can become a thousand times larger in one call.
_FEED_BYTES = 2**14
_MAGIC_BYTES = 12
"""The longest header of a frame."""
_OVERRUN_BYTES = 2**20
"""A damaged frame may be decoded beyond its end before the damage shows: the next one is looked for from
there."""


@dataclass(frozen=True)
class Damage:
    """The stream is broken here; what follows belongs to the next frame or to nothing.

    ``rest`` is what came of the broken line before the damage.
    """

    reason: str
    rest: bytes = b""


@dataclass(frozen=True)
class _Codec:
    new: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    magic: re.Pattern[bytes]


def _zstd() -> _Codec:
    import zstandard  # only where a .zst file is read

    # Frames written with --long=31 need the large window; it is allocated only for them.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return _Codec(decompressor.decompressobj, (zstandard.ZstdError,), re.compile(rb"\x28\xb5\x2f\xfd"))


def _codec(name: str) -> _Codec:
    if name == "gzip":
        return _Codec(
            lambda: zlib.decompressobj(wbits=31), (zlib.error,), re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")
        )
    if name == "bzip2":
        return _Codec(
            bz2.BZ2Decompressor,
            (OSError, ValueError, EOFError),
            re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38)"),
        )
    if name == "xz":
        return _Codec(
            lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
            (lzma.LZMAError, EOFError),
            re.compile(rb"\xfd7zXZ\x00\x00"),
        )
    return _zstd()


def chunks(file: IO[bytes], compression: str | None) -> Iterator[bytes | Damage]:
    """The content of ``file`` from where it stands; ``compression`` is a value of :data:`CODECS` or
    ``None``."""
    if compression is None:
        while data := file.read(_READ_BYTES):
            yield data
        return
    codec = _codec(compression)
    start: int | None = 0
    healthy = True  # a false frame start that is tried after a damage is not a second damage
    while start is not None:
        start = _skip_padding(file, start)
        if start is None:
            return
        frame = _frame(file, codec, compression, start)
        while True:
            try:
                piece = next(frame)
            except StopIteration as end:
                start = end.value
                break
            if isinstance(piece, bytes):
                healthy = True
                yield piece
            elif healthy:
                healthy = False
                yield piece


def _skip_padding(file: IO[bytes], start: int) -> int | None:
    """Frames may be followed by zero bytes (gzip on tape, xz stream padding). ``None``: nothing follows."""
    file.seek(start)
    while data := file.read(_FEED_BYTES):
        stripped = data.lstrip(b"\0")
        if stripped:
            return start + len(data) - len(stripped)
        start += len(data)
    return None


def _frame(
    file: IO[bytes], codec: _Codec, name: str, start: int
) -> Generator[bytes | Damage, None, int | None]:
    """One frame; returns the compressed offset at which the next one may begin, or ``None``."""
    decoder = codec.new()
    offset = start
    file.seek(start)
    while data := file.read(_FEED_BYTES):
        try:
            content = decoder.decompress(data)
        except codec.errors:
            content, good = _replay(file, codec, start, offset)
            if content:
                yield content
            what = (
                "data is damaged near" if good > start + _MAGIC_BYTES else "data expected, but not found at"
            )
            yield Damage(f"{name} {what} compressed byte {good}")
            return _find(file, codec.magic, max(start + 1, good - _OVERRUN_BYTES))
        if content:
            yield content
        offset += len(data)
        if decoder.eof:
            return offset - len(decoder.unused_data)
    yield Damage(f"{name} data is cut off at compressed byte {offset}")
    return _find(file, codec.magic, max(start + 1, offset - _OVERRUN_BYTES))


def _replay(file: IO[bytes], codec: _Codec, start: int, offset: int) -> tuple[bytes, int]:
    """The decoder threw away what it had decoded of the failing piece: decode again, the last piece byte by
    byte."""
    decoder = codec.new()
    file.seek(start)
    left = offset - start
    while left:
        data = file.read(min(left, _FEED_BYTES))
        decoder.decompress(data)
        left -= len(data)
    content = []
    for index, byte in enumerate(file.read(_FEED_BYTES)):
        try:
            content.append(decoder.decompress(bytes((byte,))))
        except codec.errors:
            return b"".join(content), offset + index
    return b"".join(content), offset + _FEED_BYTES


def _find(file: IO[bytes], magic: re.Pattern[bytes], start: int) -> int | None:
    file.seek(start)
    tail = b""
    while data := file.read(_READ_BYTES):
        window = tail + data
        if found := magic.search(window):
            return start - len(tail) + found.start()
        tail = window[-_MAGIC_BYTES:]
        start += len(data)
    return None


def is_blank(line: bytes) -> bool:
    """Nothing but white space, and perhaps a byte order mark."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def stream(file: IO[bytes], compression: str | None, encoding: str) -> tuple[Iterator[bytes | Damage], str]:
    """The content from where ``file`` stands, in an encoding whose line end is the byte 0x0A; and that
    encoding."""
    pieces = chunks(file, compression)
    if encoding_is_wide(encoding):
        return _to_utf8(pieces, codecs.getincrementaldecoder(encoding)(SURROGATE)), "utf-8"
    return pieces, encoding


def encoding_is_wide(encoding: str) -> bool:
    """Is a line end something else than the byte 0x0A (UTF-16, UTF-32, EBCDIC)? Then files are not cut into
    parts."""
    return "\n".encode(encoding) != b"\n"


def _to_utf8(
    pieces: Iterable[bytes | Damage], decoder: codecs.IncrementalDecoder
) -> Iterator[bytes | Damage]:
    for piece in pieces:
        if isinstance(piece, Damage):
            decoder.reset()
            yield piece
        else:
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
    if rest := decoder.decode(b"", final=True):
        yield rest.encode("utf-8", "surrogatepass")


def lines(
    stream: Iterable[bytes | Damage], offset: int = 0, separator: bytes = b"\n"
) -> Iterator[tuple[int, bytes | Damage]]:
    """(offset of its first byte, line without its end) one by one; a line above the limit is a ``Damage``.

    The rest of a line before a damage comes as the ``Damage`` itself (offset of the line), because nobody
    knows how it went on; after it the lines of the next frame follow.
    """
    pending: list[bytes] = []  # the beginning of a line that has not ended yet
    pending_bytes = 0
    start = offset
    for piece in stream:
        if isinstance(piece, Damage):
            whole = pending_bytes <= MAX_DOCUMENT_BYTES
            yield start, Damage(piece.reason, b"".join(pending) if whole else b"")
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
        return Damage(f"a line of {length:,} bytes, more than {MAX_DOCUMENT_BYTES:,}")
    return b"".join([*pending, end])
