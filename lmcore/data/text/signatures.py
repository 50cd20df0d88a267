"""Recognizes files that are not text by their first bytes: archives, databases, pictures, git-lfs pointers."""

from __future__ import annotations

HEAD_BYTES = 512
"""The number of bytes of a file that :func:`signature` needs."""

_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (also .docx, .npz, .pt): unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (b"\x04\x22\x4d\x18", "lz4 data: decompress it"),
    (b"\x1f\x9d", "compress data (.Z): decompress it"),
    (b"]\x00\x00", "lzma data: decompress it"),
    (b"LZIP\x01", "lzip data: decompress it"),
    (b"SQLite format 3\x00", "an SQLite database: export its text as JSON lines"),
    (b"PAR1", "a parquet file: give it a name that ends in .parquet"),
    (b"ARROW1\x00\x00", "an Arrow file: write it as parquet"),
    (b"Obj\x01", "an Avro file: write its text as JSON lines"),
    (b"\x80\x04\x95", "a Python pickle: write its text as JSON lines"),
    (b"%PDF-", "a PDF: extract its text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document: save it as text"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array: give it a name that ends in .npy if it holds tokens"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF87a", "a GIF picture"),
    (b"GIF89a", "a GIF picture"),
    (b"\x7fELF", "a program (ELF)"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a git-lfs pointer, not the file itself: run `git lfs pull`",
    ),
)
_COMPRESSED = (
    (b"\x1f\x8b\x08", "gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", ".zst"),
    (b"\xfd7zXZ\x00", "xz", ".xz"),
)
_TAR_SUFFIXES = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


def signature(head: bytes, name: str = "") -> str | None:
    """What the file is and what to do with it, or ``None`` if it may be text.

    Args:
        head: the first :data:`HEAD_BYTES` bytes of the (decompressed) file.
        name: name of the file, so that the advice does not suggest an ending that it already has.

    Example:
        >>> signature(b"%PDF-1.7 ...")
        'a PDF: extract its text'
    """
    for magic, words in _SIGNATURES:
        if head.startswith(magic):
            return words
    for magic, compression, suffix in _COMPRESSED:
        if head.startswith(magic):
            return _compressed(compression, suffix, name.lower())
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return _compressed("bzip2", ".bz2", name.lower())
    # These first bytes may also be text; binary data contain zero bytes.
    if head.startswith(b"\xff\xff\xff\xff") and b"\0" in head:
        return "an Arrow file, as datasets.save_to_disk writes it: write it as parquet"
    if head.startswith(b"ORC") and b"\0" in head:
        return "an ORC file: write it as parquet"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    return None


def _compressed(compression: str, suffix: str, name: str) -> str:
    if name.endswith(_TAR_SUFFIXES):
        return "a compressed tar archive: unpack it"
    if name.endswith(suffix):
        return f"{compression} data: decompress it (text is decompressed once, a parquet file not at all)"
    return f"{compression} data: give it a name that ends in {suffix}, or decompress it"
