"""Bad records: counted as documents and bytes, limited, reported, and the reason of the first one reaches the user."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

from lmcore.data import corpus
from lmcore.data.store import build
from lmcore.data.store.store import TokenStore
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import FaultError, RequestError
from tests.support.data import Bytes, open_bytes_corpus


@pytest.fixture
def source(tmp_path: Path) -> documents.Source:
    lines = [json.dumps({"text": f"document {number} of this file"}) for number in range(200)]
    lines[50], lines[120] = "{broken", '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    [found] = documents.resolve_sources([str(tmp_path / "a.jsonl")])
    return found


def test_store_reports_bad_records_at_each_start(
    tmp_path: Path, source: documents.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"store_dir": tmp_path / "stores", "on_error": "skip", "max_bad_fraction": 0.5}
    for _ in range(2):
        notes: list[str] = []
        store = build.build_store(source, Bytes(), note=notes.append, **options)
        first, second = (record for part in store.manifest["parts"] for record in part["bad_records"])
        assert notes == [
            "a: 2 bad records are left out",
            f"  a.jsonl, {first['where']}: {first['reason']}",
            f"  a.jsonl, {second['where']}: {second['reason']}",
        ]
    assert "not JSON" in first["reason"]
    monkeypatch.setattr(build, "_LISTED_RECORDS", 1)
    notes = []
    build.build_store(source, Bytes(), note=notes.append, **options)
    assert notes[2:] == [f"  and 1 more, in {store.folder}/manifest.json"]


def test_stream_reports_each_bad_record_once(
    source: documents.Source, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = StreamDataset(
        [source], Bytes(), block_size=50, lanes=1, seed=1, on_error="skip", max_bad_fraction=0.5
    )
    for position in range(300):  # three times through the file
        dataset.read(np.array([position]))
    said = [record.getMessage() for record in caplog.records if record.name == "lmcore.data.stream"]
    assert len(said) == 2
    assert all(line.startswith(f"left out: {source.paths[0]}, byte ") for line in said)


def parquet(path: Path, column: str, texts: list[str]) -> None:
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    arrow.parquet.write_table(arrow.table({column: texts}), path, **options)


def skipping(folder: Path, path: Path, limit: float, **options: Any) -> TokenStore:
    [source] = documents.resolve_sources([str(path)], **options)
    return build.build_store(
        source, Bytes(), store_dir=folder / "stores", on_error="skip", max_bad_fraction=limit
    )


def test_lost_parquet_rows_count_as_documents(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [f"document number {number} with some words" for number in range(500)]
    parquet(folder / "a.parquet", "text", texts)
    parquet(folder / "b.parquet", "content", texts)
    parquet(folder / "c.parquet", "text", [text + " x" for text in texts])
    data = bytearray((folder / "c.parquet").read_bytes())
    data[200] ^= 255
    (folder / "c.parquet").write_bytes(data)
    with pytest.raises(FaultError, match=r"1,000 of 1,500 documents of text are bad or lost, about 6\d"):
        skipping(tmp_path, folder, 0.6)
    store = skipping(tmp_path, folder, 0.7)
    assert (store.n_documents, store.manifest["bad"], store.manifest["bad_places"]) == (500, 1000, 2)
    # A stream counts alike.
    [source] = documents.resolve_sources([str(folder)])
    stream = StreamDataset(
        [source], Bytes(), block_size=50, lanes=1, seed=1, on_error="skip", max_bad_fraction=0.1
    )
    with pytest.raises(
        FaultError, match=r"00 of [\d,]+ documents so far are bad or lost, \d+\.\d+% of the text"
    ):
        stream.read(np.arange(2000))


def test_rest_of_a_damaged_file_counts_by_its_bytes(tmp_path: Path) -> None:
    frames = [
        gzip.compress("".join(f"{number} {hash((number, frame))}\n" for number in range(2000)).encode())
        for frame in range(10)
    ]
    (tmp_path / "a.txt.gz").write_bytes(b"".join(frames)[:-5])  # cut off: nothing tells how much is missing
    with pytest.raises(
        FaultError, match=r"at least 1 of 20,001 documents of a are bad or lost, more than.*is cut off"
    ):
        skipping(tmp_path, tmp_path / "a.txt.gz", 1e-9, unit="line")
    frames[5] = b"\xff" + frames[5][1:]
    (tmp_path / "b.txt.gz").write_bytes(b"".join(frames))
    with pytest.raises(
        FaultError, match=r"at least 1 of 10,001 documents of b are bad or lost, about [45]\d\.\d+% of the"
    ):
        skipping(tmp_path, tmp_path / "b.txt.gz", 0.4, unit="line")
    store = skipping(tmp_path, tmp_path / "b.txt.gz", 0.6, unit="line")
    assert (store.n_documents, store.manifest["bad_unknown"]) == (10_000, 1)
    # One line that is most of the text is few documents and many bytes.
    (tmp_path / "c.txt").write_bytes(b"short\n" * 5000 + b"\xff" * 50_000)
    with pytest.raises(
        FaultError, match=r"1 of 5,001 documents of c are bad or lost, about 62\.\d+% of the text"
    ):
        skipping(tmp_path, tmp_path / "c.txt", 0.1, unit="line")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sjis.txt", "吾輩は猫である。\n".encode("cp932") * 9, "not utf-8.*set data.encoding"),
        ("u16.txt", "吾輩は猫である。\n".encode("utf-16") * 9, "looks like utf-16"),
        ("list.jsonl", b'{"text": ["a"]}\n' * 9, "must be a string, not an array"),
        ("a.json", b'["a", "b"]', "a record must be an object, not a string"),
        ("a.zip", b"PK\x03\x04rest", "a zip archive.*unpack it"),
        ("a.tar", b"\0" * 257 + b"ustar" + b"\0" * 600, "a tar archive: unpack it"),
        ("a.db", b"SQLite format 3\0rest", "an SQLite database"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_first_bad_record_is_named_when_there_is_no_text(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    # In a glob: a file that is named itself is refused at once if it is not text
    path = tmp_path / f"{name[:-1]}*"
    seen: list[documents.BadRecord] = []
    options: dict[str, Any] = {
        "reading": corpus.Reading(),
        "splits": {"broken": (("train", 0.01), ("valid", 0.01))},
        "max_bytes": 10**6,
        "seed": 1,
    }
    with pytest.raises(
        RequestError, match=rf"(?s)no text to train a tokenizer on.*first bad record: .*{reason}"
    ):
        list(corpus.training_texts([str(path)], bad=seen.append, **options))
    assert seen
    with pytest.raises(RequestError, match=rf"(?s)holds no text at all.*first bad record: .*{reason}"):
        skipping(tmp_path, path, 1.0)
    stream = StreamDataset(
        documents.resolve_sources([str(path)]),
        Bytes(),
        block_size=4,
        lanes=2,
        seed=1,
        on_error="skip",
        max_bad_fraction=1.0,
    )
    with pytest.raises(RequestError, match=rf"(?s)hold no text at all; the first bad record: .*{reason}"):
        stream.read(np.arange(2))


def opened(
    folder: Path, train: list[Any], valid: list[Any], **options: Any
) -> tuple[corpus.Corpus, list[str]]:
    return open_bytes_corpus(folder, train=train, valid=valid, reading=corpus.Reading(**options))


def test_validation_text_has_the_unit_of_the_training_text(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("first\n\nsecond\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.txt").write_text("a\n\nb\n\nc\n")
    train, valid = [f"{tmp_path}/*.txt"], [str(tmp_path / "held")]
    made, _ = opened(tmp_path, train, valid)
    assert made.train[0].n_documents == 3
    assert made.valid["held"].n_documents == 1  # by itself it would be three paragraphs
    made, _ = opened(tmp_path, train, [{"path": valid[0], "unit": "line"}])
    assert made.valid["held"].n_documents == 3
    made, _ = opened(tmp_path, train, valid, unit="paragraph")
    assert (made.train[0].n_documents, made.valid["held"].n_documents) == (6, 3)


@pytest.mark.parametrize("change", ["grow", "touch", "vanish"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_file_that_changes_while_it_is_tokenized_leaves_no_store_without_it(
    change: str, on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With skip the store was finished under the name of the whole text: the file was missing, or refused, for ever."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"line {n} of {name}\n" for n in range(500)))
    path, content = tmp_path / "b.txt", (tmp_path / "b.txt").read_text()
    found = documents.resolve_sources([f"{tmp_path}/*.txt"], unit="line")[0]
    read = documents.read

    def meddle(*words: Any, **options: Any) -> Any:
        if change == "vanish":
            path.unlink(missing_ok=True)
        else:
            os.utime(path, (1, 1))
            path.write_text(content + "more\n" * (change == "grow"))
        yield from read(*words, **options)

    options: dict[str, Any] = {
        "store_dir": tmp_path / "stores",
        "on_error": on_error,
        "max_bad_fraction": 1.0,
    }
    with monkeypatch.context() as patched:
        patched.setattr(documents, "read", meddle)
        with pytest.raises(FaultError, match=r"b.txt.* after it was listed.*: start again"):
            build.build_store(found, Bytes(), **options)
    path.write_text(content)
    store = build.build_store(found, Bytes(), **options)
    assert (store.n_documents, store.manifest["bad"]) == (1000, 0)


@pytest.mark.parametrize("option", ["valid", "test"])
def test_what_is_wrong_with_validation_text_is_said_before_the_training_text_is_tokenized(
    option: str, tmp_path: Path
) -> None:
    """That may take hours."""
    train, held = tmp_path / "a.txt", tmp_path / "held.txt"
    train.write_text("training text")
    given: dict[str, Any] = {"train": [str(train)], option: [str(held)], "reading": corpus.Reading()}
    held.write_text("\n\n")
    with pytest.raises(RequestError, match=f"data.{option}: source 'held' holds no text at all"):
        open_bytes_corpus(tmp_path, **given)
    held.write_bytes(b"\xff\n\n")
    with pytest.raises(FaultError, match=r"held.txt, byte 0"):
        open_bytes_corpus(tmp_path, **given)
    assert not list(tmp_path.glob("stores/a-*"))
    held.write_text("held out")
    assert open_bytes_corpus(tmp_path, **given)[0].train[0].n_documents == 1


def test_validation_file_inside_the_training_glob_is_said(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.txt").symlink_to(tmp_path / "b.txt")
    _, notes = opened(tmp_path, [f"{tmp_path}/*.txt"], [str(tmp_path / "elsewhere" / "link.txt")])
    [note] = [note for note in notes if "overlaps with the training text" in note]
    assert "data.valid 'link'" in note
    assert "data.valid_fraction" in note
    (tmp_path / "elsewhere" / "own.txt").write_text("other text")
    assert opened(tmp_path, [f"{tmp_path}/*.txt"], [str(tmp_path / "elsewhere" / "own.txt")])[1] == []


def test_one_bad_record_and_one_byte_are_said_in_the_singular(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\n")
    [source] = documents.resolve_sources([{"path": str(tmp_path / "a.txt"), "unit": "line"}])
    notes: list[str] = []
    options: dict[str, Any] = {"store_dir": tmp_path / "stores", "on_error": "skip", "max_bad_fraction": 0.5}
    build.build_store(source, Bytes(), note=notes.append, **options)
    assert notes[0] == "a: 1 bad record is left out"
    assert train_tokenizer(["a"], vocab_size=300).notes[0] == "trained on 1 document, 1 line, 1 byte"


def test_validation_files_that_a_shell_has_listed_are_said(tmp_path: Path) -> None:
    """Each is a set of its own, which takes long to evaluate, and no line was the loss of all of them."""
    (tmp_path / "train.txt").write_text("text to train on")
    held = [tmp_path / "held" / f"{number}.txt" for number in range(11)]
    held[0].parent.mkdir()
    for path in held:
        path.write_text(f"held out in {path.name}")
    made, notes = opened(tmp_path, [str(tmp_path / "train.txt")], list(map(str, held)))
    assert len(made.valid) == 11
    [note] = notes
    assert "data.valid gives 11 sets" in note
    assert "--data.valid 'FOLDER/*.txt'" in note
    made, notes = opened(tmp_path, [str(tmp_path / "train.txt")], [f"{tmp_path}/held/*.txt"])
    assert (len(made.valid), notes) == (1, [])
    assert opened(tmp_path, [str(tmp_path / "train.txt")], list(map(str, held[:3])))[1] == []


def test_validation_documents_inside_the_training_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"line number {n} of the text\n" for n in range(200)))
    (tmp_path / "held.txt").write_text(
        "a line of its own\nline number 17 of the text\nanother one\nline number 150 of the text\n"
    )
    train, held = [str(tmp_path / "train.txt")], [str(tmp_path / "held.txt")]
    _, notes = opened(tmp_path, train, held)
    [note] = [note for note in notes if "overlaps with the training text" in note]
    assert "data.valid 'held'" in note
    assert "2 of its 4 documents" in note
    assert "'line number 17 of the text'" in note
    assert "data.valid_fraction" in note
    assert opened(tmp_path, train, held)[1] == notes  # at the next start too
    (tmp_path / "copy.txt").write_bytes((tmp_path / "train.txt").read_bytes())
    _, notes = opened(tmp_path, train, [str(tmp_path / "copy.txt")])
    assert "200 of its 200 documents (100.0% of its tokens)" in notes[0]
    (tmp_path / "own.txt").write_text("nothing of this\nstands anywhere else\n")
    assert opened(tmp_path, train, [str(tmp_path / "own.txt")])[1] == []
