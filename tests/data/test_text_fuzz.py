"""Any file under any name as data: documents, bad records or a RequestError, never another exception."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.inspect import inspect_sources, report_lines
from lmcore.data.text.documents import resolve_sources
from lmcore.errors import RequestError
from tests.support.texts import COMPRESS, read_all

SUFFIXES = [
    *(".txt", ".md", ".py", ".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".bin", ".npy", ".idx"),
    *(".ds", ".index", ".zip", ".db", ".PARQUET", ".Json", ".txt.gz", ".jsonl.zst", ".json.bz2", ".csv.xz"),
    *(".parquet.gz", ".tar.gz", ".gz", ".zst", "", ".", ".日本", ".txt\n", ".\x1b[2J"),
]
ENCODINGS = [
    "utf-8",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "cp932",
    "euc_jp",
    "latin-1",
    "iso2022_jp",
    "utf-7",
    "cp037",
]


def _parquet(column: object) -> bytes:
    out = io.BytesIO()
    arrow.parquet.write_table(arrow.table({"text": column}), out)
    return out.getvalue()


def _archives() -> list[bytes]:
    zipped, tarred, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    np.save(array, np.array([{}], dtype=object), allow_pickle=True)
    return [zipped.getvalue(), tarred.getvalue(), array.getvalue()]


ROWS = ["first document", "吾輩は猫である。\n\nどこで", '"quoted", and more']
LINES = "".join(json.dumps({"text": row, "id": 1}) + "\n" for row in ROWS).encode()
CONTENTS = [
    *(
        b"",
        b"\n",
        b"\0" * 3000,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b'"',
        b"[",
        b"{",
        b"[[[[",
        b"]",
        b"null",
        b"1e999",
        b"NaN",
    ),
    *(
        LINES,
        LINES[:-9],
        LINES.decode().encode("utf-16"),
        b"[" + LINES.replace(b"\n", b",") + b"]",
        b'{"text": []}',
    ),
    *(
        "\n\n".join(ROWS).encode(),
        "\n\n".join(ROWS).encode("cp932"),
        b"text\n" + b'"open\n' * 99,
        b"text,text\n1,2\n",
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"9" * 9000 + b"}",
        b"a\r\rb\r",
    ),
    *(
        _parquet(ROWS),
        _parquet(ROWS)[:-20],
        _parquet([1, 2]),
        _parquet([ROWS]),
        _parquet([None]),
        b"PAR1PAR1",
    ),
    *(
        gzip.compress(LINES, mtime=0),
        gzip.compress(gzip.compress(LINES, mtime=0), mtime=0),
        b"\x28\xb5\x2f\xfd",
        b"BZh91AY&SY",
        *_archives(),
    ),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
]


def check(path: Path, unit: str, encoding: str) -> None:
    """Whatever it is, it ends as documents, bad records or a refusal on one line."""
    try:
        [source] = resolve_sources([str(path)], unit=unit, encoding=encoding)
        for part_bytes in (7, 2**26):
            documents, bad, _ = read_all(source, part_bytes=part_bytes)
            for document in documents:
                document.text.encode()
            for record in bad:
                assert str(record).isprintable()
                assert record.documents >= 1
    except RequestError:
        return
    if path.stat().st_size < 10_000:
        "\n".join(report_lines(inspect_sources([str(path)], unit=unit, encoding=encoding))).encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fuzz_every_content_under_every_suffix(tmp_path: Path, suffix: str) -> None:
    for number, content in enumerate(CONTENTS):
        path = tmp_path / f"{number}{suffix}"
        for compress in [COMPRESS.get(path.suffix), lambda data: data]:
            if compress is not None:
                path.write_bytes(compress(content))
                check(path, ["auto", "line", "paragraph", "file"][number % 4], "utf-8")


@settings(max_examples=300, deadline=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.one_of(
        st.binary(max_size=200),
        st.builds(lambda one, other: one + other, st.sampled_from(CONTENTS), st.binary(max_size=9)),
        st.builds(lambda one, cut: one[:cut], st.sampled_from(CONTENTS), st.integers(0, 2000)),
    ),
    unit=st.sampled_from(["auto", "line", "paragraph", "file"]),
    encoding=st.sampled_from(ENCODINGS),
)
def test_fuzz_any_content_in_any_encoding(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, unit: str, encoding: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    check(path, unit, encoding)
