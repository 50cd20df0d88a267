"""Blocks of token stores: no token lost, every label once, the same under any mixture or order version."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.locate import locate
from lmcore.data.order import Order, Phase
from lmcore.data.store.build import build_store
from lmcore.data.store.store import TokenStore
from lmcore.data.text.sources import resolve_sources
from lmcore.errors import RequestError
from tests.support.data import Bytes, counting_store


@given(total=st.integers(2, 200), size=st.integers(1, 60), pieces=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_label_once_per_epoch_except_the_tail(
    total: int, size: int, pieces: int, seed: int, tmp_path_factory
) -> None:
    store = counting_store(tmp_path_factory.mktemp("store"), total, pieces=pieces)
    if (total - 1) // size == 0:
        with pytest.raises(RequestError, match=rf"{total} tokens"):
            StoreBlocks([store], block_size=size)
        return
    dataset = StoreBlocks([store], block_size=size, seed=seed)
    blocks = dataset.read(np.arange(dataset.epoch_blocks))
    assert np.array_equal(blocks.ids[:, 1:], blocks.ids[:, :-1] + 1)
    n = (total - 1) // size
    assert sorted(blocks.ids[:, 1:].ravel().tolist()) == list(range(1, n * size + 1))
    assert dataset.count_labels(np.arange(n)) == blocks.n_labels.sum() == n * size


@given(
    totals=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda t: max(t) > 1),
    size=st.integers(1, 40),
)
@example(totals=[0, 2], size=2)  # an empty source has no tail
@settings(max_examples=40, deadline=None)
def test_evaluation_order_has_every_label_once(totals: list[int], size: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("stores")
    stores = [counting_store(folder, total, first=1000 * i, name=f"s{i}") for i, total in enumerate(totals)]
    dataset = StoreBlocks(stores, block_size=size, tails=True)
    numbers = np.concatenate([np.arange(dataset.n_in_order), [-1]])
    blocks = dataset.read_in_order(numbers)
    labels = [
        label for row, n in zip(blocks.ids.tolist(), blocks.n_labels.tolist()) for label in row[1 : n + 1]
    ]
    assert labels == [1000 * i + k for i, total in enumerate(totals) for k in range(1, total)]
    assert blocks.n_labels[-1] == 0


def test_sources_of_different_dtypes(tmp_path: Path) -> None:
    wide = counting_store(tmp_path, 1000, first=70_000, name="wide")
    np.arange(500, dtype="<u2").tofile(tmp_path / "narrow.bin")
    narrow = TokenStore(
        name="narrow",
        fingerprint="n",
        dtype="<u2",
        pieces=[type(wide._pieces[0])(path=str(tmp_path / "narrow.bin"), n_tokens=500)],
    )
    dataset = StoreBlocks([narrow, wide], block_size=10, seed=1)
    source, _, block = dataset.order.locate(np.arange(148))
    blocks = dataset.read(np.arange(148))
    assert blocks.ids.dtype == np.uint32
    assert blocks.ids[:, 0].tolist() == (block * 10 + 70_000 * source).tolist()


def test_negative_position_gives_padding(tmp_path: Path) -> None:
    dataset = StoreBlocks([counting_store(tmp_path, 100)], block_size=10, seed=1, pad_id=7)
    blocks = dataset.read(np.array([3, -1, 4]))
    assert blocks.n_labels.tolist() == [10, 0, 10]
    assert set(blocks.ids[1].tolist()) == {7}
    assert np.array_equal(blocks.ids[[0, 2]], dataset.read(np.array([3, 4])).ids)


def expected_position_ids(ids: list[int], eos: int) -> list[int]:
    out, count = [], 0
    for one in ids:
        out.append(count)
        count = 0 if one == eos else count + 1
    return out


def test_position_ids_begin_anew_in_each_document(tmp_path: Path) -> None:
    """From known document ends, and in a file of another program from its EOS tokens."""
    texts = ["a", "bcd", "", "efghijklmnop", "q" * 30, "r", "s"]
    ids = [one for text in texts for one in (*text.encode(), 256)]
    np.array(ids, dtype="<u2").tofile(tmp_path / "x.bin")
    ends = np.flatnonzero(np.array(ids) == 256) + 1
    ends.astype("<u4").tofile(tmp_path / "x.ends")
    piece = type(counting_store(tmp_path, 1)._pieces[0])
    path = str(tmp_path / "x.bin")
    known = piece(path=path, n_tokens=len(ids), ends=str(tmp_path / "x.ends"), n_ends=len(ends))
    pieces = (known, piece(path=path, n_tokens=len(ids)))
    for size in (1, 3, 7, 20):
        want = [
            expected_position_ids(ids[start : start + size], 256)
            for start in range(0, (len(ids) - 1) // size * size, size)
        ]
        for one in pieces:
            store = TokenStore(name="x", fingerprint="x", dtype="<u2", pieces=[one], eos_id=256)
            dataset = StoreBlocks([store], block_size=size, shuffle="none", document_mask=True)
            found = dataset.read(np.arange(len(want))).position_ids
            assert found is not None
            assert found.tolist() == want


def test_fingerprint_covers_everything_that_moves_a_block(tmp_path: Path) -> None:
    stores = [counting_store(tmp_path, 100, first=i, name=f"s{i}") for i in range(80)]

    def fingerprint(n: int, **options: object) -> str:
        return StoreBlocks(stores[:n], **{"block_size": 10, **options}).fingerprint

    several = {
        fingerprint(1),
        fingerprint(2),
        fingerprint(80),
        fingerprint(79),
        fingerprint(1, block_size=9),
        fingerprint(1, shuffle="none"),
    }
    assert len(several) == 6
    assert max(map(len, several)) < 600
    assert fingerprint(1, seed=3) == fingerprint(1)  # the cursor keeps the seed itself


def test_mixtures_follow_the_cursor(tmp_path: Path) -> None:
    stores = [counting_store(tmp_path, 101, first=1000 * i, name=f"s{i}") for i in range(2)]
    dataset = StoreBlocks(stores, block_size=10, phases=(Phase(weights=(1, 1)),))
    cursor = Cursor(fingerprint=dataset.fingerprint, seed=0, phases=dataset.order.phases, position=64)
    later = dataset.resumed(cursor.with_weights([3, 1]))
    assert dataset.resumed(cursor) is dataset
    source = later.read(np.arange(64, 64 + 1024)).ids[:, 0] // 1000
    assert np.bincount(source).tolist() == [768, 256]
    old = dataset.resumed(Cursor(fingerprint="", seed=0, phases=dataset.order.phases, version=1))
    assert old.order == Order(lengths=(10, 10), seed=0, phases=dataset.order.phases, version=1)
    assert not np.array_equal(old.read(np.arange(64)).ids, dataset.read(np.arange(64)).ids)
    assert np.array_equal(later.read(np.arange(64)).ids, dataset.read(np.arange(64)).ids)


def test_show_decodes_any_position(tmp_path: Path) -> None:
    """What the model sees at a position, and where it comes from."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"file {number} " * 40)
    [source] = resolve_sources([{"path": str(folder), "unit": "file", "name": "files"}])
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=800)
    dataset = StoreBlocks([store], block_size=40, seed=3)
    assert len(store.manifest["parts"]) > 1
    places = list(locate(dataset, [0, 5, 29, 30]))
    for position, (place, ids) in zip([0, 5, 29, 30], places, strict=True):
        assert ids == dataset.read(np.array([position])).ids[0, :-1].tolist()
        said = re.fullmatch(
            r"position (\d+): source files, epoch (\d+), block (\d+), tokens (\d+)-(\d+), (\d+) documents?, (.*)",
            place,
        )
        assert said, place
        epoch, block = position // dataset.epoch_blocks, int(said[3])
        assert [int(said[n]) for n in (1, 2, 4, 5)] == [position, epoch, 40 * block, 40 * block + 39]
        assert int(said[6]) == sum(token == 256 for token in ids[:-1]) + 1
        number = int(Bytes().decode(ids).split("file ")[1][0])
        first, _, last = said[7].partition(" to ")
        assert int(first[0]) <= number <= int((last or first)[0]) + 1
    foreign = StoreBlocks([counting_store(tmp_path, 100)], block_size=10)
    assert "files of tokens" in next(locate(foreign, [1]))[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.lists(st.integers(-1, 1500), max_size=5)), max_size=8))
def test_blocks_located_ahead_equal_the_order(reads: list[tuple[int, list[int]]]) -> None:
    with TemporaryDirectory() as name:
        stores = [
            counting_store(Path(name), 999, name="a"),
            counting_store(Path(name), 500, first=999, name="b"),
        ]
        phases = (Phase(), Phase(position=1100, weights=(0.25, 0.75)))
        dataset = StoreBlocks(stores, block_size=4, seed=7, phases=phases)
        for start, places in reads:
            positions = np.array([start + place if place >= 0 else -1 for place in places], dtype=np.int64)
            source, _, block = dataset.order.locate(positions[positions >= 0])
            assert (dataset.read(positions).ids[positions >= 0, 0] == 999 * source + 4 * block).all()


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_set_without_a_label_is_refused(tmp_path: Path, n_tokens: int) -> None:
    """One token without an end-of-document token gives nothing to predict; its loss would be 0 / 0."""
    store = counting_store(tmp_path, n_tokens, name="tiny")
    with pytest.raises(RequestError, match=rf"tiny has {n_tokens} token.*at least 2 tokens"):
        StoreBlocks([store], block_size=8, tails=True)


def test_set_of_tails_only_has_no_order(tmp_path: Path) -> None:
    blocks = StoreBlocks([counting_store(tmp_path, 5)], block_size=8, tails=True)
    assert blocks.fingerprint.startswith("store block_size=8 ")  # ranks compare it
    assert blocks.n_in_order == 1
    with pytest.raises(RequestError, match="only tails"):
        assert blocks.order
