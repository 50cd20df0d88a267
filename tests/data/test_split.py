"""Validation text of small corpora: whole documents where that is possible, otherwise the ends of documents."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcore.config.schema import RunConfig
from lmcore.data import corpus
from lmcore.data.blocks import StoreBlocks
from lmcore.data.corpus import Reading, as_held_out, as_tests, splits_of, training_texts
from lmcore.data.store.inventory import record_use, stores_of
from lmcore.data.text.split import FEW_DOCUMENTS, LARGEST_SHARE, choose, cut_of, part_of, side
from lmcore.errors import RequestError
from lmcore.run import setup
from tests.support.data import Bytes, open_bytes_corpus


def book(on: str, fraction: float = 0.3) -> str:
    """One document that the split by documents puts on the given side."""
    sentences = "".join(f"This is sentence {number}. " for number in range(40))
    return next(text for number in range(1000) if side(text := f"Book {number}. {sentences}", fraction) == on)


def opened(
    folder: Path, train: list[str], fraction: float, splits: corpus.Splits | None = None
) -> tuple[corpus.Corpus, list[str]]:
    reading = Reading(unit="file")
    if splits is None:
        splits = splits_of(reading.sources(train), fraction, store_dir=str(folder / "stores"))
    return open_bytes_corpus(folder, train=train, valid_fraction=fraction, splits=splits, reading=reading)


def texts_of(store: corpus.TokenStore) -> list[str]:
    ids = store.read(0, store.n_tokens).tolist()
    return Bytes().decode([one if one < 256 else 0 for one in ids]).split("\0")[:-1]


@given(st.text(min_size=2), st.floats(0.001, 0.999))
def test_parts_of_a_document_are_the_document(text: str, fraction: float) -> None:
    head, tail = part_of(text, ("head", fraction)), part_of(text, ("tail", fraction))
    assert head
    assert tail
    assert head + tail == text
    assert len(tail) <= 2 * max(1, -(-len(text) * fraction // 1))


def test_document_is_cut_at_a_line_a_sentence_or_a_word() -> None:
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    assert text[cut_of(text, 0.5) :] == "どこで生れたかとんと見当がつかぬ。"
    assert cut_of("aaaa\nbbbb\ncc", 0.3) == len("aaaa\n")
    assert cut_of("aaa bbb ccc", 0.2) == len("aaa bbb ")
    assert cut_of("a" * 100, 0.01) == 99
    assert part_of("a", ("tail", 0.3)) is None  # a single character is training text
    assert part_of("a", ("head", 0.3)) == "a"


@given(st.lists(st.text(min_size=2), min_size=1, max_size=30), st.floats(0.001, 0.5))
def test_every_corpus_has_training_and_validation_text(texts: list[str], fraction: float) -> None:
    train, valid = choose(texts, fraction)
    kept = [[part for text in texts if (part := part_of(text, split))] for split in (train, valid)]
    assert kept[0]
    assert kept[1]
    assert sum(map(len, kept[0])) + sum(map(len, kept[1])) == sum(map(len, texts))
    assert choose(reversed(texts), fraction) == (train, valid)
    held = sum(len(text) for text in texts if side(text, fraction) == "valid")
    total = sum(map(len, texts))
    if 0 < held < total and held <= max(LARGEST_SHARE, 2 * fraction) * total:
        assert (train, valid) == (("train", fraction), ("valid", fraction)), (
            "the split of every larger corpus"
        )
    elif train[0] == "train":
        assert sum(map(len, kept[1])) <= LARGEST_SHARE * total
        assert len(set(kept[1])) == 1


def test_choosing_reads_no_further_than_it_must() -> None:
    def texts():
        yield from [book("train")] * FEW_DOCUMENTS
        yield book("valid")
        raise AssertionError("read on")

    assert choose(texts(), 0.3)[0] == ("train", 0.3)


@pytest.mark.parametrize("on", ["valid", "train"])
def test_one_document_is_training_text_and_its_end_validation_text(tmp_path: Path, on: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book(on))
    reading = Reading(unit="file")
    splits = splits_of(reading.sources([str(path)]), 0.3)
    for_tokenizer = list(
        training_texts(
            [str(path)], reading=reading, splits=splits, max_bytes=10**6, seed=1, bad=lambda record: None
        )
    )
    made, notes = opened(tmp_path, [str(path)], 0.3)
    assert made.valid.keys() == {"valid"}
    assert texts_of(made.train[0]) == for_tokenizer, "the tokenizer never sees validation text"
    assert texts_of(made.train[0])[0] + texts_of(made.valid["valid"])[0] == book(on)
    assert 0.25 < len(texts_of(made.valid["valid"])[0]) / len(book(on)) < 0.6
    assert any("the last 0.3 of each document is validation text" in note for note in notes)


def test_blocks_of_cut_documents_come_once_in_an_epoch(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(book("train", 0.01) * (number + 1))
    made, _ = opened(tmp_path, [f"{tmp_path}/*.txt"], 0.01)
    store, blocks = made.train[0], StoreBlocks(made.train, block_size=16, seed=3)
    read = blocks.read(np.arange(blocks.epoch_blocks)).ids[:, :16]
    whole = store.read(0, blocks.epoch_blocks * 16).reshape(-1, 16)
    assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, whole.tolist()))
    assert store.n_documents == made.valid["valid"].n_documents == 3


def test_fifty_documents_give_one_whole_one(tmp_path: Path) -> None:
    """One percent of them is less than one."""
    texts = [f"Document number {number} of fifty." for number in range(200)]
    texts = [text for text in texts if side(text, 0.01) == "train"][:50]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    made, notes = opened(tmp_path, [f"{tmp_path}/*.txt"], 0.01)
    train, valid = texts_of(made.train[0]), texts_of(made.valid["valid"])
    assert sorted(train + valid) == sorted(texts)
    assert len(valid) == 1
    assert any("one document is validation text" in note for note in notes)


def test_each_of_several_sources_has_a_set(tmp_path: Path) -> None:
    for name in ("train", "b"):
        (tmp_path / f"{name}.txt").write_text(book("train" if name == "train" else "valid"))
    reading = Reading(unit="file")
    train: list[corpus.Entries] = [{"path": f"{tmp_path}/{name}.txt"} for name in ("train", "b")]
    splits = splits_of(reading.sources(train), 0.3)
    made, _ = opened(tmp_path, train, 0.3, splits)
    assert made.valid.keys() == {"valid/train", "b"}, "train/loss is that of the training"


def test_choice_is_kept_beside_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book("train"))
    sources, place = Reading(unit="file").sources([str(path)]), str(tmp_path / "stores")
    first = splits_of(sources, 0.3, store_dir=place)
    monkeypatch.setattr(corpus, "choose", lambda texts, fraction: pytest.fail("the text is read again"))
    assert splits_of(sources, 0.3, store_dir=place) == first
    monkeypatch.undo()
    [kept] = (tmp_path / "stores").glob("split-*.json")
    kept.write_text('{"train": "all", "fraction": 7}')  # damaged: chosen again
    assert splits_of(sources, 0.3, store_dir=place) == first
    path.write_text(book("train") * 2)
    assert splits_of(Reading(unit="file").sources([str(path)]), 0.3, store_dir=place).keys() == first.keys()
    assert len(list((tmp_path / "stores").glob("split-*.json"))) == 2


@pytest.mark.parametrize(("on", "said"), [("valid", "training on all of it"), ("train", "selects no text")])
def test_run_that_goes_on_keeps_its_split(tmp_path: Path, on: str, said: str) -> None:
    """One that began without validation text has stores of the split by documents only."""
    path = tmp_path / "book.txt"
    path.write_text(book(on))
    sources = Reading(unit="file").sources([str(path)])
    old = splits_of(sources, 0.3, begun_with=())
    assert old == {"book": (("train", 0.3), ("valid", 0.3))}
    made, notes = opened(tmp_path, [str(path)], 0.3, old)
    assert [store.n_tokens for store in made.train] == [len(book(on)) + 1]
    assert made.valid == {}
    assert any(said in line for line in notes)
    record_use(tmp_path, [store.folder for store in made.train if store.folder])
    begun = {Path(one).name for one in stores_of(tmp_path)}
    assert splits_of(sources, 0.3, begun_with=begun) == old

    new, _ = opened(tmp_path, [str(path)], 0.3)
    record_use(tmp_path, [store.folder for store in (*new.train, *new.valid.values()) if store.folder])
    begun = {Path(one).name for one in stores_of(tmp_path)}
    assert splits_of(sources, 0.3, begun_with=begun) == splits_of(sources, 0.3) != old


@pytest.mark.parametrize("lost", [None, b"", b"\xff", b"{}"])
def test_run_whose_list_of_stores_is_lost_keeps_its_split(tmp_path: Path, lost: bytes | None) -> None:
    """The newest checkpoint knows its store by the fingerprint."""
    path = tmp_path / "book.txt"
    path.write_text(book("train"))
    config = RunConfig()
    config = replace(
        config,
        data=replace(
            config.data,
            train=[str(path)],
            unit="file",
            valid_fraction=0.3,
            store_dir=str(tmp_path / "stores"),
        ),
    )
    run = tmp_path / "run"
    new = setup.splits_of(config, run)
    made, _ = opened(tmp_path, [str(path)], 0.3)
    [store] = made.train
    assert store.folder is not None
    kept = tmp_path / "stores" / store.folder.name
    if not kept.exists():
        store.folder.rename(kept)
    for step, fingerprint in ((2, "a:" + "0" * 16), (10, f"store block_size=8 book:{kept.name[-16:]}")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"cursor": {"fingerprint": fingerprint}}))
    if lost is not None:
        (run / "stores.json").write_bytes(lost)
    assert setup.splits_of(config, run) == new
    shutil.rmtree(
        run / "checkpoints" / "step-00000010"
    )  # trained on another: of a version that split by documents
    assert setup.splits_of(config, run) == {"book": (("train", 0.3), ("valid", 0.3))} != new


def test_text_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for splits in ({}, splits_of(Reading().sources([str(tmp_path / "empty.txt")]), 0.3)):
        with pytest.raises(RequestError, match="no text to train a tokenizer on"):
            list(
                training_texts(
                    [str(tmp_path / "empty.txt")],
                    reading=Reading(),
                    splits=splits,
                    max_bytes=10**6,
                    seed=1,
                    bad=lambda record: None,
                )
            )


@given(st.integers(0, 10**6), st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.floats(0.01, 0.3))
def test_validation_share_of_few_documents_is_bounded(seed: int, sizes: list[int], fraction: float) -> None:
    """However long the document is that the hash selects, most of a small corpus stays for training."""
    texts = [f"{seed} {number} " + "word " * size for number, size in enumerate(sizes)]
    splits = choose(texts, fraction)
    shares = [sum(len(part_of(text, one) or "") for text in texts) for one in splits]
    assert sum(shares) == sum(map(len, texts))
    assert 0 < shares[1] <= max(LARGEST_SHARE, 2 * fraction) * sum(shares) + 2 * len(texts)
    assert choose(reversed(texts), fraction) == splits, "the order of the documents does not matter"


def test_test_sets_never_share_a_name_with_a_held_out_set() -> None:
    """A validation file may be called test.txt."""
    assert as_tests({"a": 1}, ["valid"]) == {"test": 1}
    assert as_tests({"a": 1}, ["test", "other"]) == {"test/a": 1}
    assert as_tests({"a": 1, "b": 2}, ["a"]) == {"test/a": 1, "test/b": 2}
    assert as_tests({}, ["test"]) == {}
    assert as_held_out({"train": 1, "a": 2}) == {"valid/train": 1, "a": 2}, (
        "train/loss is that of the training"
    )
