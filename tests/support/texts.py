"""Text files for tests, and what is read from them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet
import zstandard

from lmcore.data.text.documents import BadRecord, Document, Source, parts, read

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def source_of(path: Path | str, **options: Any) -> Source:
    return Source(name="test", paths=(str(path),), relative_paths=(os.path.basename(path),), **options)


def read_all(source: Source, *, part_bytes: int = 2**26) -> tuple[list[Document], list[BadRecord], list[str]]:
    bad: list[BadRecord] = []
    empty: list[str] = []
    cut = parts(source, part_bytes=part_bytes)
    assert [part.index for part in cut] == list(range(len(cut)))
    documents = [d for part in cut for d in read(source, part, bad=bad.append, empty=empty.append)]
    return documents, bad, empty


def texts_of(source: Source, *, part_bytes: int = 2**26) -> list[str]:
    documents, bad, _ = read_all(source, part_bytes=part_bytes)
    assert bad == []
    return [document.text for document in documents]


def write_parquet(path: Path, documents: list[Any], **options: Any) -> None:
    table = arrow.table({"id": list(range(len(documents))), "text": documents})
    arrow.parquet.write_table(table, path, row_group_size=5, write_page_checksum=True, **options)
