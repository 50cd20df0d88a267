"""The tutorial's dataset, exactly; and the same blocks over token stores: no token lost, every label once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.blocks import BlockDataset, collate
from lmcore.data.locate import show
from lmcore.data.order import Cursor, Phase
from lmcore.data.store.build import build_store
from lmcore.data.store.store import TokenStore
from lmcore.data.text import documents as text
from lmcore.errors import RequestError
from tests.support.data import Bytes, counting_store

TEXTS = ["abcdef", "", "gh", "ijklmnopqrstuvwxyz", "日本語"]
IDS = list("".join(TEXTS).encode())


def rows(dataset: BlockDataset) -> list[tuple[list[int], list[int]]]:
    return [(item["input_ids"].tolist(), item["labels"].tolist()) for item in dataset]


# ---- the tutorial ----


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 33, 34, 35, 36, 100])
def test_contiguous_blocks_with_shifted_labels(size: int) -> None:
    found = rows(BlockDataset.from_texts(Bytes(), TEXTS, size))
    n = (len(IDS) - 1) // size
    assert found == [
        (IDS[i * size : (i + 1) * size], IDS[i * size + 1 : (i + 1) * size + 1]) for i in range(n)
    ]


@pytest.mark.parametrize("size", [1, 4, 5, 34, 35, 36, 100])
def test_the_tail_is_one_padded_block_whose_missing_labels_are_ignored(size: int) -> None:
    whole = rows(BlockDataset.from_texts(Bytes(), TEXTS, size))
    found = rows(BlockDataset.from_texts(Bytes(), TEXTS, size, drop_last=False))
    assert found[: len(whole)] == whole
    start, left = len(whole) * size, (len(IDS) - 1) % size
    if not left:
        assert len(found) == len(whole)
        return
    [(inputs, labels)] = found[len(whole) :]
    assert inputs[: left + 1] == IDS[start : start + left + 1][:size]
    assert labels == IDS[start + 1 : start + 1 + left] + [IGNORED_LABEL] * (size - left)


def test_nothing_comes_of_texts_without_a_label() -> None:
    for texts in ([], [""], ["a"]):
        assert rows(BlockDataset.from_texts(Bytes(), texts, 4, drop_last=False)) == []


def test_the_generator_is_called_anew_for_each_epoch() -> None:
    calls = []

    def generator() -> Iterator[str]:
        calls.append(1)
        yield from TEXTS

    dataset = BlockDataset(Bytes(), generator, 5)
    assert rows(dataset) == rows(dataset)
    assert len(calls) == 2


def test_a_file_is_read_line_by_line_without_newlines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc\r\n\ndéf\nlast".encode())
    assert rows(BlockDataset.from_file(Bytes(), str(path), 3)) == rows(
        BlockDataset.from_texts(Bytes(), ["abc", "", "déf", "last"], 3)
    )


def test_an_end_of_text_is_inserted_only_on_request() -> None:
    plain = rows(BlockDataset.from_texts(Bytes(), ["abc", "de"], 1))
    ended = rows(BlockDataset.from_texts(Bytes(), ["abc", "de"], 1, eos=True))
    assert [256 in inputs for inputs, _ in plain] == [False] * 4
    assert [i for inputs, _ in ended for i in inputs] == [*b"abc", 256, *b"de"]


def test_ignored_labels_go_by_position_so_that_a_real_eos_counts() -> None:
    """pad = EOS here: the real EOS inside is scored, the padding is not. Where pad is only padding, the result is
    that of CrossEntropyLoss(ignore_index=pad)."""
    dataset = BlockDataset.from_texts(Bytes(), ["ab", "cd"], 8, eos=True, drop_last=False)
    assert dataset.pad_id == Bytes.eos_id
    [item] = list(dataset)
    assert item["labels"].tolist() == [ord("b"), 256, *b"cd", 256, -100, -100, -100]

    logits = torch.randn(8, 257, generator=torch.Generator().manual_seed(1))
    [plain] = list(BlockDataset.from_texts(Bytes(), ["abcdef"], 8, drop_last=False))
    padded = torch.where(plain["labels"] == -100, 256, plain["labels"])
    ours = torch.nn.functional.cross_entropy(logits, plain["labels"])
    assert torch.equal(ours, torch.nn.functional.cross_entropy(logits, padded, ignore_index=256))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_in_a_plain_loader_nothing_comes_twice(workers: int) -> None:
    dataset = BlockDataset.from_texts(Bytes(), TEXTS * 5, 4)
    expected = rows(dataset)
    for collate_fn in (None, collate):
        found: list[tuple[list[int], list[int]]] = []
        for batch in DataLoader(dataset, batch_size=3, num_workers=min(workers, 2), collate_fn=collate_fn):
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].shape[1] == 4
            found += list(zip(batch["input_ids"].tolist(), batch["labels"].tolist()))
        assert sorted(found) == sorted(expected)
        if workers == 0:
            assert found == expected


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_blocks_and_get_the_same_number(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(BlockDataset.from_texts(Bytes(), TEXTS, 3, drop_last=False))
    per_rank, dropped = [], []
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))  # as a launcher says it
        per_rank.append(rows(BlockDataset.from_texts(Bytes(), TEXTS, 3, drop_last=False)))
        dropped.append(rows(BlockDataset.from_texts(Bytes(), TEXTS, 3)))
    assert len({len(found) for found in per_rank}) == len({len(found) for found in dropped}) == 1
    merged = [found[i] for i in range(len(per_rank[0])) for found in per_rank]
    assert merged[: len(whole)] == whole
    assert all(set(labels) == {IGNORED_LABEL} for _, labels in merged[len(whole) :])
    alone = [rows(BlockDataset.from_texts(Bytes(), TEXTS, 3, rank=0, world_size=1)) for _ in range(1)]
    assert len(alone[0]) == (len(IDS) - 1) // 3


def test_other_tokenizers_encode_without_special_tokens() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    for tokenizer in (raw, wrapped):
        assert rows(BlockDataset.from_texts(tokenizer, ["a b", "c a"], 3)) == [([2, 3, 4], [3, 4, 2])]
    assert BlockDataset.from_texts(wrapped, [""], 3).pad_id == 1
    with pytest.raises(RequestError, match="eos"):
        BlockDataset.from_texts(raw, [""], 3, eos=True)


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="block_size 0"):
        BlockDataset.from_texts(Bytes(), TEXTS, 0)


# ---- over stores ----


@given(total=st.integers(2, 200), size=st.integers(1, 60), pieces=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_label_once_but_the_tail(
    total: int, size: int, pieces: int, seed: int, tmp_path_factory
) -> None:
    store = counting_store(tmp_path_factory.mktemp("store"), total, pieces=pieces)
    if (total - 1) // size == 0:
        with pytest.raises(RequestError, match=rf"{total} tokens"):
            BlockDataset.from_stores([store], block_size=size)
        return
    dataset = BlockDataset.from_stores([store], block_size=size, seed=seed)
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
def test_in_order_every_label_of_every_store_comes_once(
    totals: list[int], size: int, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    stores = [counting_store(folder, total, first=1000 * i, name=f"s{i}") for i, total in enumerate(totals)]
    dataset = BlockDataset.from_stores(stores, block_size=size, drop_last=False)
    numbers = np.concatenate([np.arange(dataset.n_in_order), [-1]])
    blocks = dataset.read_in_order(numbers)
    labels = [
        label for row, n in zip(blocks.ids.tolist(), blocks.n_labels.tolist()) for label in row[1 : n + 1]
    ]
    assert labels == [1000 * i + k for i, total in enumerate(totals) for k in range(1, total)]
    assert blocks.n_labels[-1] == 0
    once = rows(dataset)
    assert sorted(x for _, row in once for x in row if x != IGNORED_LABEL) == sorted(labels)


def test_several_sources_of_different_widths(tmp_path: Path) -> None:
    wide = counting_store(tmp_path, 1000, first=70_000, name="wide")
    np.arange(500, dtype="<u2").tofile(tmp_path / "narrow.bin")
    narrow = TokenStore(
        name="narrow",
        fingerprint="n",
        dtype="<u2",
        pieces=[type(wide._pieces[0])(path=str(tmp_path / "narrow.bin"), n_tokens=500)],
    )
    dataset = BlockDataset.from_stores([narrow, wide], block_size=10, seed=1)
    source, _, block = dataset.order.locate(np.arange(148))
    blocks = dataset.read(np.arange(148))
    assert blocks.ids.dtype == np.uint32
    assert blocks.ids[:, 0].tolist() == (block * 10 + 70_000 * source).tolist()


def test_a_negative_position_is_a_block_without_labels(tmp_path: Path) -> None:
    dataset = BlockDataset.from_stores([counting_store(tmp_path, 100)], block_size=10, seed=1, pad_id=7)
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
    """The store, a foreign file that knows only EOS, and texts all say the same."""
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
            dataset = BlockDataset.from_stores([store], block_size=size, shuffle="none", document_mask=True)
            found = dataset.read(np.arange(len(want))).position_ids
            assert found is not None
            assert found.tolist() == want
        items = list(BlockDataset.from_texts(Bytes(), texts, size, eos=True, document_mask=True))
        assert [item["position_ids"].tolist() for item in items] == want


def test_the_fingerprint_tells_all_that_moves_a_block(tmp_path: Path) -> None:
    stores = [counting_store(tmp_path, 100, first=i, name=f"s{i}") for i in range(80)]

    def fingerprint(n: int, **options: object) -> str:
        return BlockDataset.from_stores(stores[:n], **{"block_size": 10, **options}).fingerprint  # type: ignore[arg-type]  # options of the test

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
    dataset = BlockDataset.from_stores(stores, block_size=10, phases=(Phase(weights=(1, 1)),))
    cursor = Cursor(fingerprint=dataset.fingerprint, seed=0, phases=dataset.order.phases, position=64)
    later = dataset.resumed(cursor.with_weights([3, 1]))
    assert dataset.resumed(cursor) is dataset
    source = later.read(np.arange(64, 64 + 1024)).ids[:, 0] // 1000
    assert np.bincount(source).tolist() == [768, 256]
    assert np.array_equal(later.read(np.arange(64)).ids, dataset.read(np.arange(64)).ids)


def test_collate_takes_lists_and_tensors() -> None:
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3, 4], dtype=torch.int32)}])
    assert isinstance(batch["input_ids"], Tensor)
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [3, 4]]))


def test_any_position_can_be_shown(tmp_path: Path) -> None:
    """What the model sees at a position, and where it comes from."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"file {number} " * 40)
    [source] = text.resolve([{"path": str(folder), "unit": "file", "name": "files"}])
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=800)
    dataset = BlockDataset.from_stores([store], block_size=40, seed=3)
    assert len(store.manifest["parts"]) > 1
    for one in show(dataset, [0, 5, 29, 30], Bytes().decode):
        assert one.ids == tuple(dataset.read(np.array([one.position])).ids[0, :-1].tolist())
        assert one.text == Bytes().decode(list(one.ids))
        assert one.first_token == 40 * one.block
        assert one.documents == sum(token == 256 for token in one.ids[:-1]) + 1
        assert one.epoch == one.position // dataset.epoch_blocks
        number = int(one.text.split("file ")[1][0])
        first, _, last = one.files.partition(" to ")
        assert int(first[0]) <= number <= int((last or first)[0]) + 1
        assert f"position {one.position}: source files" in str(one)
    foreign = BlockDataset.from_stores([counting_store(tmp_path, 100)], block_size=10)
    assert "files of tokens" in str(show(foreign, [1], lambda ids: str(list(ids)))[0])
    with pytest.raises(RequestError, match="no order by position"):
        show(BlockDataset.from_texts(Bytes(), TEXTS, 3), [0], str)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.lists(st.integers(-1, 1500), max_size=5)), max_size=8))
def test_what_is_located_ahead_is_what_the_order_says(reads: list[tuple[int, list[int]]]) -> None:
    with TemporaryDirectory() as name:
        stores = [
            counting_store(Path(name), 999, name="a"),
            counting_store(Path(name), 500, first=999, name="b"),
        ]
        phases = (Phase(), Phase(position=1100, weights=(0.25, 0.75)))
        dataset = BlockDataset.from_stores(stores, block_size=4, seed=7, phases=phases)
        for start, places in reads:
            positions = np.array([start + place if place >= 0 else -1 for place in places], dtype=np.int64)
            source, _, block = dataset.order.locate(positions[positions >= 0])
            assert (dataset.read(positions).ids[positions >= 0, 0] == 999 * source + 4 * block).all()
