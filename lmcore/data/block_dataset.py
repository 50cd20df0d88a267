"""The block dataset of the tutorials: texts -> blocks, for a plain ``DataLoader``.

    dataset = BlockDataset.from_file(tokenizer, "corpus.txt", block_size=256)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate)

It tokenizes the texts again in every epoch and keeps their order. Training runs of ``train_lm.py`` read token stores
instead (:class:`lmcore.data.blocks.StoreBlocks`), which are shuffled as a whole and can resume at any position.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.blocks import position_ids_of
from lmcore.errors import RequestError

_TEXTS_AT_ONCE = 64

Item = dict[str, "TokenList"]


class TokenList(list[int]):
    """A list of ints that torch's own ``default_collate`` stacks into an int64 tensor."""


# By default torch collates B lists of T numbers into T tensors of B numbers.
default_collate_fn_map[TokenList] = lambda lists, *, collate_fn_map=None: torch.tensor(lists)


@final
class BlockDataset(IterableDataset[Item]):
    """Blocks of ``block_size`` tokens, from concatenated texts.

    Each item is a dict of lists of T ints: ``input_ids``; ``labels``, already shifted by one token; with
    ``document_mask`` also ``position_ids``. Over all ranks and loader workers no block occurs twice in an epoch, and
    every rank gets the same number of blocks.

    Args:
        tokenizer: anything that encodes: lmcore's, a transformers, tokenizers or SentencePiece tokenizer. No special
            token is inserted except with ``eos``.
        generator: a callable that returns an iterable of texts; called again for each epoch.
        block_size: T.
        drop_last: ``False`` also yields the partial block at the end, padded, with -100 for the missing labels.
        eos: end each text with the tokenizer's end-of-sequence token.
        document_mask: add ``position_ids`` that begin at 0 in each text; transformers models (with
            ``use_cache=False`` and no attention mask) then separate the documents of a block.
        rank, world_size: this process's share of the blocks; default: from the launcher's environment. Pass 0
            and 1 if something else (``accelerator.prepare``, Trainer) splits the dataset.

    Raises:
        RequestError: a block size below 1, ``eos`` for a tokenizer without such a token, or texts that can be
            iterated only once.

    Example:
        >>> dataset = BlockDataset.from_texts(tokenizer, ["吾輩は猫である。", "名前はまだ無い。"], block_size=3)
        >>> next(iter(dataset))
        {'input_ids': [296, 486, 267], 'labels': [486, 267, 383]}
    """

    def __init__(
        self,
        tokenizer: Any,
        generator: Callable[[], Iterable[str]],
        block_size: int,
        drop_last: bool = True,
        *,
        eos: bool = False,
        document_mask: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise RequestError(f"block_size {block_size} must be at least 1")
        if not callable(generator):
            raise RequestError(
                f"generator is of type {type(generator).__name__}, but must be a callable that returns the texts, so "
                f"that each epoch can start again: give the function itself, without calling it, or use from_texts"
            )
        self.block_size = block_size
        self.drop_last = drop_last
        self.document_mask = document_mask
        self.pad_id = _pad_id(tokenizer)
        self._tokenizer = tokenizer
        self._generator = generator
        self._last_texts: Iterable[str] | None = None
        self._eos = [_token_id(tokenizer, "eos_id", "eos_token_id")] if eos else []
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size

    @classmethod
    def from_texts(
        cls, tokenizer: Any, texts: Iterable[str], block_size: int, drop_last: bool = True, **options: Any
    ) -> BlockDataset:
        """Blocks of the texts in a list, or in any iterable that can be iterated repeatedly."""
        if isinstance(texts, str):
            raise RequestError("texts is a single string, whose items are characters: give a list of texts")
        if iter(texts) is texts:
            raise RequestError(
                f"texts is a {type(texts).__name__}, which can be iterated only once: every epoch but the first would "
                f"be empty. Give a list, or BlockDataset(tokenizer, generator, ...) with a function that returns it"
            )
        return cls(tokenizer, lambda: texts, block_size, drop_last, **options)

    @classmethod
    def from_file(
        cls,
        tokenizer: Any,
        filepath: str | os.PathLike[str],
        block_size: int,
        drop_last: bool = True,
        **options: Any,
    ) -> BlockDataset:
        """Blocks of the lines of a UTF-8 text file, without their newlines; the file is read again in each epoch."""
        return cls(tokenizer, lambda: _lines(filepath), block_size, drop_last, **options)

    def without_sharding(self) -> BlockDataset:
        """A copy of the dataset that yields all blocks on every rank, for callers that split them themselves."""
        new = copy(self)
        new._rank, new._world_size = 0, 1
        return new

    def __iter__(self) -> Iterator[Item]:
        """One epoch of the blocks of this rank and loader worker.

        If the number of blocks is not a multiple of the world size, the remaining blocks are dropped with
        ``drop_last``; otherwise blocks without labels are added.
        """
        worker = get_worker_info()
        n_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        for index, group in enumerate(_groups(self._blocks(), self._world_size)):
            if len(group) < self._world_size:
                if self.drop_last:
                    return
                empty = {**group[0], "labels": TokenList([IGNORED_LABEL] * self.block_size)}
                group += [empty] * (self._world_size - len(group))
            if index % n_workers == number:
                yield group[self._rank]

    def _blocks(self) -> Iterator[Item]:
        size = self.block_size
        ids = np.zeros(0, dtype=np.int64)
        ends = np.zeros(0, dtype=np.int64)
        for texts in _groups(self._texts(), _TEXTS_AT_ONCE):
            runs = [
                np.concatenate((run, self._eos)).astype(np.int64) for run in _encode(self._tokenizer, texts)
            ]
            ends = np.concatenate((ends, len(ids) + np.cumsum([len(run) for run in runs])))
            ids = np.concatenate((ids, *runs))
            start = 0
            while len(ids) - start >= size + 1:
                yield self._item(ids[start : start + size + 1], ends - start)
                start += size
            ids, ends = ids[start:], ends[ends > start] - start
        if not self.drop_last and len(ids) > 1:
            yield self._item(ids, ends)

    def _texts(self) -> Iterable[str]:
        texts = self._generator()
        if texts is self._last_texts and iter(texts) is texts:
            raise RequestError(
                f"the generator returned the same {type(texts).__name__} as in the epoch before, which is exhausted: "
                f"it must return fresh texts at each call"
            )
        self._last_texts = texts
        return texts

    def _item(self, ids: np.ndarray, ends: np.ndarray) -> Item:
        missing = self.block_size + 1 - len(ids)
        inputs, labels = ids[: self.block_size].tolist(), ids[1:].tolist()
        item = {
            "input_ids": TokenList(inputs + [self.pad_id] * (self.block_size - len(inputs))),
            "labels": TokenList(labels + [IGNORED_LABEL] * missing),
        }
        if self.document_mask:
            item["position_ids"] = TokenList(position_ids_of(ends, self.block_size).tolist())
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_texts": None}  # a generator cannot be pickled


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """B items with T numbers each (lists, arrays or tensors) -> int64 tensors (B, T), one for each key.

    Example:
        >>> collate([{"input_ids": [1, 2], "labels": [2, 3]}])["labels"]
        tensor([[2, 3]])
    """
    return {
        key: torch.from_numpy(np.array([item[key] for item in items], dtype=np.int64)) for key in items[0]
    }


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\n")


def _encode(tokenizer: Any, texts: list[str]) -> list[Sequence[int]]:
    """The ids of each text, without special tokens, by any of the usual tokenizers."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # transformers
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if hasattr(tokenizer, "get_vocab_size"):  # tokenizers
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]


def _token_id(tokenizer: Any, *names: str) -> int:
    for name in names:
        value = getattr(tokenizer, name, None)
        if callable(value):  # SentencePiece
            value = value()
        if value is not None and value >= 0:
            return int(value)
    raise RequestError(f"the tokenizer has none of {', '.join(names)}")


def _pad_id(tokenizer: Any) -> int:
    try:
        return _token_id(tokenizer, "pad_id", "pad_token_id", "eos_id", "eos_token_id")
    except RequestError:
        return 0  # its labels are ignored, any id will do
