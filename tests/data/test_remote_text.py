"""Text in a bucket gives the documents, parts and order of the same files on a disk; a changed object is found."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lmcore.data.store.samples import samples_of
from lmcore.data.text import documents, remote
from lmcore.errors import FaultError, RequestError
from lmcore.storage import Store, StoreError
from tests.support.s3_server import serving


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL of a copy of it."""
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)  # many blocks in small files
    folder, draw = tmp_path / "corpus", random.Random(0)
    (folder / "deep").mkdir(parents=True)
    lines = [f"line {number} " + "日本語 " * draw.randrange(20) for number in range(400)]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    (folder / "deep" / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with gzip.open(folder / "d.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "e.parquet", row_group_size=50)
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", f"/{tmp_path.name}/corpus/", recursive=True)
    yield folder, f"memory://{tmp_path.name}/corpus"
    memory.rm(f"/{tmp_path.name}", recursive=True)


def read(entry: str, part_bytes: int, unit: str = "line") -> list[list[str]]:
    """The texts of every part."""
    [source] = documents.resolve_sources([entry], unit=unit)
    bad: list[documents.BadRecord] = []
    found = [
        [document.text for document in documents.read(source, part, bad=bad.append)]
        for part in documents.parts(source, part_bytes=part_bytes)
    ]
    assert bad == []
    return found


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**/*.jsonl", "/a.txt", "/d.txt.gz", "/e.parquet"])
def test_documents_of_a_bucket_are_those_of_the_disk(
    corpus: tuple[Path, str], pattern: str, unit: str
) -> None:
    folder, url = corpus
    for part_bytes in (700, 2**26):
        assert read(f"{url}{pattern}", part_bytes, unit) == read(f"{folder}{pattern}", part_bytes, unit)


def test_unit_and_names_are_decided_as_on_the_disk(corpus: tuple[Path, str]) -> None:
    folder, url = corpus
    for pattern in ("", "/*.txt", "/**/*.jsonl"):
        [here], [there] = (documents.resolve_sources([f"{place}{pattern}"]) for place in (folder, url))
        assert (here.name, here.relative_paths, here.unit) == (there.name, there.relative_paths, there.unit)


def test_files_and_objects_may_be_named_together(corpus: tuple[Path, str]) -> None:
    folder, url = corpus
    sources = documents.resolve_sources([f"{folder}/a.txt", f"{url}/a.txt", f"{url}/b.txt"], join_files=True)
    assert [source.paths for source in sources] == [
        (f"{folder}/a.txt",),
        (f"{url}/a.txt",),
        (f"{url}/b.txt",),
    ]
    with pytest.raises(RequestError, match="in the corpus twice"):
        documents.resolve_sources([f"{url}/a.txt", f"{url}/*.txt"])


def test_fingerprint_follows_the_version_of_an_object(corpus: tuple[Path, str]) -> None:
    _, url = corpus
    before = samples_of([f"{url}/a.txt", f"{url}/b.txt"])
    assert samples_of([f"{url}/a.txt", f"{url}/b.txt"]) == before
    store = Store(url)
    data = store.read("a.txt")
    store.write("a.txt", data[:-1] + b"x")  # of the same size
    after = samples_of([f"{url}/a.txt", f"{url}/b.txt"])
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_object_that_changes_while_it_is_read_is_a_bad_record(corpus: tuple[Path, str]) -> None:
    _, url = corpus
    [source] = documents.resolve_sources([f"{url}/a.txt"], unit="line")
    [part] = documents.parts(source)
    bad: list[documents.BadRecord] = []
    reading = documents.read(source, part, bad=bad.append)
    next(reading)
    Store(url).write("a.txt", b"another text\n" * 2000)
    list(reading)
    assert "changed after it was listed" in bad[-1].reason


@pytest.mark.parametrize("request_of_the_store", ["info", "read_range"])
def test_store_that_fails_ends_the_reading_and_costs_no_documents(
    corpus: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, request_of_the_store: str
) -> None:
    """It is no wrong request either, which would end with another exit code."""
    _, url = corpus
    [source] = documents.resolve_sources([f"{url}/a.txt"], unit="line")
    [part] = documents.parts(source)
    shutil.rmtree(remote.cache_dir() / "ranges", ignore_errors=True)

    def refuse(*_: object) -> None:
        raise StoreError("memory://x: a.txt: SlowDown")

    monkeypatch.setattr(Store, request_of_the_store, refuse)
    with pytest.raises(FaultError, match="SlowDown"):
        list(documents.read(source, part, bad=lambda record: pytest.fail(str(record))))


def test_second_reading_comes_from_the_cache(
    corpus: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = corpus
    first = read(f"{url}/*.txt", 700)
    monkeypatch.setattr(Store, "read_range", lambda *_: pytest.fail("read again"))
    assert read(f"{url}/*.txt", 700) == first


def test_cache_keeps_to_its_size(corpus: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = corpus
    monkeypatch.setattr(remote, "CACHE_BYTES", 5000)
    assert read(f"{url}/*.txt", 700) == read(f"{folder}/*.txt", 700)
    sizes = [path.stat().st_size for path in (remote.cache_dir() / "ranges").glob("*/*")]
    assert 0 < sum(sizes) <= 5000


def test_cache_removes_what_was_read_longest_ago(
    corpus: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = corpus
    blocks = remote.cache_dir() / "ranges"
    with remote.open_file(f"{url}/a.txt") as file:
        file.read(3000)
    for age, number in ((300, "0"), (200, "1"), (100, "2")):
        [place] = blocks.glob(f"*/{number}")
        os.utime(place, (time.time() - age,) * 2)
    with remote.open_file(f"{url}/a.txt") as file:
        file.read(10)  # of the block that was written first
    monkeypatch.setattr(remote, "CACHE_BYTES", 3000)
    with remote.open_file(f"{url}/b.txt") as file:
        file.read(10)
    kept = {
        path.name for path in blocks.glob("*/*") if path.parent in {one.parent for one in blocks.glob("*/2")}
    }
    assert kept == {"0", "2"}


def test_object_that_changed_and_changed_back_is_not_read_from_a_mixed_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its etag is the old one again, under which blocks of the new content were put while it was read."""
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**18)
    before, other = (b"".join(b"%s %06d\n" % (word, n) for n in range(400_000)) for word in (b"old", b"new"))
    with serving():
        store = Store("s3://bucket/text")
        store.write("a.txt", before)
        [source] = documents.resolve_sources(["s3://bucket/text/a.txt"], unit="line")
        [part] = documents.parts(source)
        reading = documents.read(source, part, bad=lambda record: None)
        next(reading)
        store.write("a.txt", other)
        assert any(document.text.startswith("new") for document in reading)
        store.write("a.txt", before)
        texts = [
            document.text
            for document in documents.read(source, part, bad=lambda record: pytest.fail(str(record)))
        ]
        assert "".join(f"{text}\n" for text in texts).encode() == before


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("/none.txt", "no object matches"),
        ("/*.csv", "no object matches"),
        ("/tokens.bin", "holds tokens"),
    ],
)
def test_what_is_not_there_is_refused(corpus: tuple[Path, str], pattern: str, words: str) -> None:
    _, url = corpus
    Store(url).write("tokens.bin", b"1")
    with pytest.raises(RequestError, match=words):
        documents.resolve_sources([f"{url}{pattern}"])


def test_http_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown scheme https"):
        documents.resolve_sources(["https://example.org/a.txt"])


def test_range_file_seeks_like_a_file(corpus: tuple[Path, str]) -> None:
    folder, url = corpus
    draw = random.Random(1)
    with open(folder / "a.txt", "rb") as here, remote.open_file(f"{url}/a.txt") as there:
        for _ in range(300):
            whence = draw.choice([0, 1, 2])
            offset = draw.randrange(0, 9000) * (-1 if whence == 2 else 1)
            assert here.seek(offset, whence) == there.seek(offset, whence)
            n_bytes = draw.choice([1, 10, 999, 1000, 1001, 5000])
            assert here.read(n_bytes) == there.read(n_bytes)
            assert here.readline() == there.readline()
