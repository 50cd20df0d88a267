"""The block dataset of the tutorials: contiguous blocks, labels shifted once, nothing twice in a plain loader."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.block_dataset import BlockDataset, collate
from lmcore.errors import RequestError
from tests.support.data import Bytes

TEXTS = ["abcdef", "", "gh", "ijklmnopqrstuvwxyz", "日本語"]
IDS = list("".join(TEXTS).encode())


def rows(dataset: BlockDataset) -> list[tuple[list[int], list[int]]]:
    return [(item["input_ids"], item["labels"]) for item in dataset]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 33, 34, 35, 36, 100])
def test_contiguous_blocks_with_shifted_labels(size: int) -> None:
    found = rows(BlockDataset.from_texts(Bytes(), TEXTS, size))
    n = (len(IDS) - 1) // size
    assert found == [
        (IDS[i * size : (i + 1) * size], IDS[i * size + 1 : (i + 1) * size + 1]) for i in range(n)
    ]


@pytest.mark.parametrize("size", [1, 4, 5, 34, 35, 36, 100])
def test_tail_is_padded_and_its_missing_labels_ignored(size: int) -> None:
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


def test_empty_text_yields_no_blocks() -> None:
    for texts in ([], [""], ["a"]):
        assert rows(BlockDataset.from_texts(Bytes(), texts, 4, drop_last=False)) == []


def test_generator_is_called_for_each_epoch() -> None:
    calls = []

    def generator() -> Iterator[str]:
        calls.append(1)
        yield from TEXTS

    dataset = BlockDataset(Bytes(), generator, 5)
    assert rows(dataset) == rows(dataset)
    assert len(calls) == 2


def test_file_is_read_by_lines_without_newlines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc\r\n\ndéf\nlast".encode())
    assert rows(BlockDataset.from_file(Bytes(), str(path), 3)) == rows(
        BlockDataset.from_texts(Bytes(), ["abc", "", "déf", "last"], 3)
    )


def test_eos_is_inserted_only_on_request() -> None:
    plain = rows(BlockDataset.from_texts(Bytes(), ["abc", "de"], 1))
    ended = rows(BlockDataset.from_texts(Bytes(), ["abc", "de"], 1, eos=True))
    assert [256 in inputs for inputs, _ in plain] == [False] * 4
    assert [i for inputs, _ in ended for i in inputs] == [*b"abc", 256, *b"de"]


def test_labels_are_ignored_by_position_so_a_real_eos_counts() -> None:
    """pad = EOS here: the real EOS inside is scored, the padding is not. Where pad is only padding, the result is
    that of CrossEntropyLoss(ignore_index=pad)."""
    dataset = BlockDataset.from_texts(Bytes(), ["ab", "cd"], 8, eos=True, drop_last=False)
    assert dataset.pad_id == Bytes.eos_id
    [item] = list(dataset)
    assert item["labels"] == [ord("b"), 256, *b"cd", 256, -100, -100, -100]

    logits = torch.randn(8, 257, generator=torch.Generator().manual_seed(1))
    [plain] = list(BlockDataset.from_texts(Bytes(), ["abcdef"], 8, drop_last=False))
    labels = torch.tensor(plain["labels"])
    padded = torch.where(labels == -100, 256, labels)
    ours = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.equal(ours, torch.nn.functional.cross_entropy(logits, padded, ignore_index=256))


def tutorial_collate(item: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As the tutorials write it."""
    return {key: torch.tensor([x[key] for x in item]) for key in item[0]}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_dataloader_workers_yield_nothing_twice(workers: int) -> None:
    dataset = BlockDataset.from_texts(Bytes(), TEXTS * 5, 4)
    expected = rows(dataset)
    for collate_fn in (None, collate, tutorial_collate):
        found: list[tuple[list[int], list[int]]] = []
        for batch in DataLoader(dataset, batch_size=3, num_workers=min(workers, 2), collate_fn=collate_fn):
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].shape[1] == 4
            found += list(zip(batch["input_ids"].tolist(), batch["labels"].tolist()))
        assert sorted(found) == sorted(expected)
        if workers == 0:
            assert found == expected


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_shard_the_blocks_evenly(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_block_size_zero_raises() -> None:
    with pytest.raises(RequestError, match="block_size 0"):
        BlockDataset.from_texts(Bytes(), TEXTS, 0)


def test_generator_object_raises() -> None:
    """Every epoch but the first would be empty."""
    with pytest.raises(RequestError, match=r"generator, which can be iterated only once.*Give a list"):
        BlockDataset.from_texts(Bytes(), (text for text in TEXTS), 3)
    with pytest.raises(RequestError, match="must be a callable"):
        BlockDataset(Bytes(), (text for text in TEXTS), 3)  # the mistake
    with pytest.raises(RequestError, match="single string"):
        BlockDataset.from_texts(Bytes(), "abc", 3)
    once = (text for text in TEXTS)
    dataset = BlockDataset(Bytes(), lambda: once, 3)
    assert len(rows(dataset)) == (len(IDS) - 1) // 3
    with pytest.raises(RequestError, match="same generator as in the epoch before"):
        rows(dataset)
    for twice in (TEXTS, tuple(TEXTS), dict.fromkeys(TEXTS)):
        dataset = BlockDataset.from_texts(Bytes(), twice, 3)
        assert rows(dataset) == rows(dataset) != []


def test_dataset_can_be_pickled() -> None:
    dataset = BlockDataset(Bytes(), texts_of_the_module, 5)
    expected = rows(dataset)
    assert rows(pickle.loads(pickle.dumps(dataset))) == expected


def texts_of_the_module() -> Iterator[str]:
    yield from TEXTS


def test_position_ids_begin_anew_in_each_text() -> None:
    texts = ["a", "bcd", "", "efghijklmnop", "q" * 30, "r", "s"]
    for size in (1, 3, 7, 20):
        for item in BlockDataset.from_texts(Bytes(), texts, size, eos=True, document_mask=True):
            expected, count = [], 0
            for token in item["input_ids"]:
                expected.append(count)
                count = 0 if token == Bytes.eos_id else count + 1
            assert item["position_ids"] == expected


def test_collate_takes_lists_and_tensors() -> None:
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3, 4], dtype=torch.int32)}])
    assert isinstance(batch["input_ids"], Tensor)
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [3, 4]]))
