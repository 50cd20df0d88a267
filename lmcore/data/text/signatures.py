"""What a file is that is not text, by its first bytes: an archive, a database, a picture, a git-lfs pointer."""

from __future__ import annotations

HEAD_BYTES = 512
"""So many bytes of a file are enough for :func:`signature`."""

_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (also .docx, .npz, .pt): unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (b"\x1f\x8b\x08", "gzip data: give it a name that ends in .gz, or decompress it"),
    (b"\x28\xb5\x2f\xfd", "zstandard data: give it a name that ends in .zst, or decompress it"),
    (b"\xfd7zXZ\x00", "xz data: give it a name that ends in .xz, or decompress it"),
    (b"SQLite format 3\x00", "an SQLite database: export its text as JSON lines"),
    (b"PAR1", "a parquet file: give it a name that ends in .parquet"),
    (b"ARROW1\x00\x00", "an Arrow file: write it as parquet"),
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


def signature(head: bytes) -> str | None:
    """What the file is and what to do with it, or ``None`` where nothing speaks against text.

    Args:
        head: the first :data:`HEAD_BYTES` bytes of the (decompressed) file.

    Example:
        >>> signature(b"%PDF-1.7 ...")
        'a PDF: extract its text'
    """
    for magic, words in _SIGNATURES:
        if head.startswith(magic):
            return words
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "bzip2 data: give it a name that ends in .bz2, or decompress it"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    return None
