"""Positions -> blocks: ``block_size`` tokens and, shifted by one, their next-token labels.

Comes in: token stores and an order, or (as in the tutorials) a tokenizer and a callable that yields texts.
Goes out: blocks, as numpy rows for the training path (:meth:`BlockDataset.read`) or one by one as tensors
for a plain ``DataLoader`` (:meth:`BlockDataset.__iter__`). What always holds: blocks are contiguous and
nothing between them is lost; labels are shifted already; a label is ignored by its position
(:data:`IGNORED_LABEL`), never by the value of its id, so that a pad id equal to the end-of-document id
hides no real one.

    N tokens, T = block_size: block b has inputs ids[bT : bT + T] and labels ids[bT + 1 : bT + T + 1];
    floor((N - 1) / T) blocks, and a tail of what is left.

    dataset = BlockDataset.from_file(tokenizer, "corpus.txt", block_size=256)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.order import ORDER_VERSION, Cursor, Order, Phase, rank_slice
from lmcore.data.store.store import TokenStore
from lmcore.errors import RequestError

_TEXTS_AT_ONCE = 64
_LOCATED_AHEAD = 1024


@final
@dataclass(frozen=True, kw_only=True)
class Blocks:
    """B blocks as they lie in memory, before they are tensors.

    ``ids`` (B, T + 1) in the narrow integers of the store; ``n_labels`` (B,) int64: only so many labels of a
    row are real, from its start; ``position_ids`` (B, T) int32, counted from 0 in every document, or
    ``None``; ``state``: what a stream needs in order to go on after them.
    """

    ids: np.ndarray
    n_labels: np.ndarray
    position_ids: np.ndarray | None = None
    state: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class _Located(NamedTuple):
    first: int
    source: np.ndarray
    block: np.ndarray


@final
class BlockDataset(IterableDataset):
    """Blocks of ``block_size`` tokens, from texts or from token stores.

    Args:
        tokenizer: anything that encodes: :class:`lmcore.data.tokenizer.tokenizer.Tokenizer`, a transformers or SentencePiece
            tokenizer. No special token is inserted.
        generator: a callable that returns an iterable of texts; it is called anew for each epoch.
        block_size: T.
        drop_last: ``False`` also yields the tail, padded, with its missing labels ignored.
        eos: end each text with the tokenizer's end-of-sequence token.
        document_mask: add ``position_ids`` that begin at 0 in each text; transformers models (with
            ``use_cache=False`` and no attention mask) then keep the documents of a block apart.
        rank, world_size: which blocks are this process's own; default: what the launcher says. Give 0 and 1
            where something else (``accelerator.prepare``, Trainer) shares the blocks out.
    """

    def __init__(
        self,
        tokenizer: Any,
        generator: Callable[[], Iterable[str]] | None,
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
        self.block_size = block_size
        self.drop_last = drop_last
        self.document_mask = document_mask
        self.stores: tuple[TokenStore, ...] = ()
        self.pad_id = _pad_id(tokenizer)
        self._tokenizer = tokenizer
        self._generator = generator
        self._eos = [int(_attribute(tokenizer, "eos_id", "eos_token_id"))] if eos else []
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        self._order: Order | None = None
        self._ahead = _Located(0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @classmethod
    def from_texts(
        cls, tokenizer: Any, texts: Iterable[str], block_size: int, **options: Any
    ) -> BlockDataset:
        """Blocks of the texts of a list (or of any iterable that can be iterated again)."""
        return cls(tokenizer, lambda: texts, block_size, **options)

    @classmethod
    def from_file(cls, tokenizer: Any, filepath: str, block_size: int, **options: Any) -> BlockDataset:
        """Blocks of the lines of a UTF-8 text file, without their newlines; the file is read anew each
        epoch."""
        return cls(tokenizer, lambda: _lines(filepath), block_size, **options)

    @classmethod
    def from_stores(
        cls,
        stores: Sequence[TokenStore],
        *,
        block_size: int,
        seed: int = 0,
        shuffle: str = "full",
        phases: tuple[Phase, ...] = (Phase(),),
        drop_last: bool = True,
        document_mask: bool = False,
        pad_id: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> BlockDataset:
        """The same blocks over token stores, in the order of :class:`lmcore.data.order.Order`.

        Raises:
            RequestError: the stores do not hold a single block.
        """
        dataset = cls(
            None, None, block_size, drop_last, document_mask=document_mask, rank=rank, world_size=world_size
        )
        dataset.stores = tuple(stores)
        dataset.pad_id = pad_id
        lengths = tuple(store.n_blocks(block_size) for store in stores)
        if not sum(lengths) and drop_last:
            tokens = sum(store.n_tokens for store in stores)
            raise RequestError(
                f"the corpus has {tokens} tokens, not one block of data.block_size {block_size} with its "
                f"labels: give more text or a smaller data.block_size"
            )
        if sum(lengths):
            dataset._order = Order(lengths=lengths, seed=seed, shuffle=shuffle, phases=phases)
        return dataset

    # ---- by position: the training path ----

    @property
    def order(self) -> Order:
        """The order of the blocks of the stores."""
        if self._order is None:
            raise RequestError(
                "blocks of generated texts have no order by position: build token stores of them"
            )
        return self._order

    @property
    def fingerprint(self) -> str:
        """All that decides what a position means, beside the seed: readable, and compared by the cursor."""
        sources = ",".join(f"{store.name}:{store.fingerprint[:16]}" for store in self.stores)
        if len(sources) > 400:  # a checkpoint's cursor stays small
            sources = f"{len(self.stores)} sources:{hashlib.sha256(sources.encode()).hexdigest()[:32]}"
        return (
            f"store order={ORDER_VERSION} block_size={self.block_size} shuffle={self.order.shuffle} {sources}"
        )

    @property
    def epoch_blocks(self) -> int:
        return self.order.epoch_blocks

    def with_phases(self, phases: tuple[Phase, ...]) -> BlockDataset:
        """The same blocks under another list of mixtures (:meth:`lmcore.data.order.Cursor.with_weights`)."""
        return BlockDataset.from_stores(
            self.stores,
            block_size=self.block_size,
            seed=self.order.seed,
            shuffle=self.order.shuffle,
            phases=phases,
            drop_last=self.drop_last,
            document_mask=self.document_mask,
            pad_id=self.pad_id,
            rank=self._rank,
            world_size=self._world_size,
        )

    can_pad = True

    def count_labels(self, positions: np.ndarray) -> int:
        """Labels in the blocks at ``positions``, without reading them."""
        return len(positions) * self.block_size

    def epoch_of(self, cursor: Cursor) -> float:
        """Epochs before the cursor."""
        return self.order.epoch_at(cursor.position)

    def resumed(self, cursor: Cursor) -> BlockDataset:
        """These blocks under the cursor's mixtures."""
        return self if cursor.phases == self.order.phases else self.with_phases(cursor.phases)

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The positions of one rank."""
        return rank_slice(positions, rank, world_size)

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        """Which of a rank's rows one worker reads."""
        return np.arange(worker, len(positions), workers)

    def read(self, positions: np.ndarray) -> Blocks:
        """The blocks at ``positions`` (B,); a negative position gives a block without labels."""
        real = positions >= 0
        source, block = self._located(positions[real])
        rows = np.flatnonzero(real)
        return self._read(rows, source, block * self.block_size, len(positions))

    def _located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and the block at each position. A thousand positions cost little more than a few, and a
        rank goes through its own in order: they are located ahead."""
        if not len(positions):
            return positions, positions
        first, last = int(positions.min()), int(positions.max())
        ahead = self._ahead
        if not ahead.first <= first <= last < ahead.first + len(ahead.block):
            if last - first >= _LOCATED_AHEAD:
                source, _, block = self.order.locate(positions)
                return source, block
            source, _, block = self.order.locate(np.arange(first, first + _LOCATED_AHEAD))
            ahead = self._ahead = _Located(first, source, block)
        return ahead.source[positions - ahead.first], ahead.block[positions - ahead.first]

    @property
    def n_in_order(self) -> int:
        """Blocks of all stores, the last, partial one of each store included."""
        return sum(self._counts_with_tails())

    def _counts_with_tails(self) -> list[int]:
        return [-(-max(store.n_tokens - 1, 0) // self.block_size) for store in self.stores]

    def read_in_order(self, numbers: np.ndarray) -> Blocks:
        """Blocks by their number as they lie in the stores, each store's tail after its blocks, for
        evaluation; there are :attr:`n_in_order`. A negative number gives a
        block without labels."""
        counts = np.array(self._counts_with_tails())
        ends = np.cumsum(counts)
        real = numbers >= 0
        source = np.searchsorted(ends, numbers[real], side="right")
        block = numbers[real] - (ends - counts)[source]
        return self._read(np.flatnonzero(real), source, block * self.block_size, len(numbers))

    def _read(self, rows: np.ndarray, source: np.ndarray, starts: np.ndarray, n_blocks: int) -> Blocks:
        width = self.block_size + 1
        dtype = np.result_type(*[store.dtype for store in self.stores])
        ids = np.empty((n_blocks, width), dtype=dtype)
        n_labels = np.zeros(n_blocks, dtype=np.int64)
        position_ids = np.zeros((n_blocks, self.block_size), dtype=np.int32) if self.document_mask else None
        if len(rows) < n_blocks:
            ids[:] = self.pad_id
        for number in np.unique(source).tolist():
            store = self.stores[number]
            here = source == number
            first, row = starts[here], rows[here]
            left = store.n_tokens - first
            n_labels[row] = np.minimum(left - 1, self.block_size)
            if len(row) == n_blocks and int(left.min()) >= width:
                store.gather(first, ids)
            else:
                whole = left >= width
                part = np.empty((int(whole.sum()), width), dtype=store.dtype)
                store.gather(first[whole], part)
                ids[row[whole]] = part
                for at, start, count in zip(row[~whole], first[~whole].tolist(), left[~whole].tolist()):
                    ids[at, :count] = store.read(start, count)
                    ids[at, count:] = self.pad_id
            if position_ids is not None:
                for at, start in zip(row.tolist(), first.tolist()):
                    ends = store.document_ends(start, min(start + self.block_size, store.n_tokens))
                    position_ids[at] = position_ids_of(ends - start, self.block_size)
        return Blocks(ids=ids, n_labels=n_labels, position_ids=position_ids)

    def of_one_rank(self) -> BlockDataset:
        """The same blocks, not shared out: for who does that himself."""
        new = copy(self)
        new._rank, new._world_size = 0, 1
        return new

    # ---- one by one: a plain DataLoader ----

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """One epoch of this rank's and this worker's blocks: over all of them nothing comes twice.

        Every rank gets the same number of blocks: what is left over of a multiple of the world size is
        dropped with ``drop_last``, and filled up with blocks without labels otherwise.
        """
        worker = get_worker_info()
        n_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        blocks = self._blocks_of_stores() if self._generator is None else self._blocks_of_texts()
        group: list[dict[str, Tensor]] = []
        for index, group in enumerate(_groups(blocks, self._world_size)):
            if len(group) < self._world_size:
                if self.drop_last:
                    return
                empty = {key: value.clone() for key, value in group[0].items()}
                empty["labels"].fill_(IGNORED_LABEL)
                group += [empty] * (self._world_size - len(group))
            if index % n_workers == number:
                yield group[self._rank]

    def _blocks_of_stores(self) -> Iterator[dict[str, Tensor]]:
        for position in range(self.epoch_blocks if self._order else 0):
            yield _tensors(self.read(np.array([position])))
        for number, store in enumerate([] if self.drop_last else self.stores):
            if max(store.n_tokens - 1, 0) % self.block_size > 0:
                start = store.n_blocks(self.block_size) * self.block_size
                yield _tensors(
                    self._read(np.zeros(1, dtype=np.int64), np.array([number]), np.array([start]), 1)
                )

    def _blocks_of_texts(self) -> Iterator[dict[str, Tensor]]:
        assert self._generator is not None
        size = self.block_size
        ids = np.zeros(0, dtype=np.int64)
        ends = np.zeros(0, dtype=np.int64)
        for texts in _groups(self._generator(), _TEXTS_AT_ONCE):
            runs = [
                np.concatenate((run, self._eos)).astype(np.int64) for run in _encode(self._tokenizer, texts)
            ]
            ends = np.concatenate((ends, len(ids) + np.cumsum([len(run) for run in runs])))
            ids = np.concatenate((ids, *runs))
            start = 0
            while len(ids) - start >= size + 1:
                yield self._block(ids[start : start + size + 1], ends - start)
                start += size
            ids, ends = ids[start:], ends[ends > start] - start
        if not self.drop_last and len(ids) > 1:
            yield self._block(ids, ends)

    def _block(self, ids: np.ndarray, ends: np.ndarray) -> dict[str, Tensor]:
        padded = np.full((1, self.block_size + 1), self.pad_id, dtype=np.int64)
        padded[0, : len(ids)] = ids
        position_ids = position_ids_of(ends, self.block_size)[None] if self.document_mask else None
        return _tensors(Blocks(ids=padded, n_labels=np.array([len(ids) - 1]), position_ids=position_ids))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """B items with ids of length T -> int64 tensors (B, T), one for each key."""
    return {
        key: torch.stack([torch.as_tensor(item[key], dtype=torch.int64) for item in items])
        for key in items[0]
    }


def _tensors(blocks: Blocks) -> dict[str, Tensor]:
    """The first of ``blocks`` as int64 tensors (T,)."""
    ids = torch.from_numpy(blocks.ids[0].astype(np.int64))
    labels = ids[1:].clone()
    labels[int(blocks.n_labels[0]) :] = IGNORED_LABEL
    out = {"input_ids": ids[:-1].clone(), "labels": labels}
    if blocks.position_ids is not None:
        out["position_ids"] = torch.from_numpy(blocks.position_ids[0].astype(np.int64))
    return out


def position_ids_of(ends: np.ndarray, size: int) -> np.ndarray:
    """(T,) places in their documents; ``ends`` are document ends, counted from the start of the block. A
    document that began before the block counts from the start of the block."""
    starts = np.zeros(size, dtype=np.int32)
    inside = ends[(ends > 0) & (ends < size)]
    starts[inside] = inside
    return np.arange(size, dtype=np.int32) - np.maximum.accumulate(starts)


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\n")


def _encode(tokenizer: Any, texts: list[str]) -> list[Sequence[int]]:
    """The ids of each text, without special tokens, by whatever tokenizer it is."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # transformers
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if hasattr(tokenizer, "get_vocab_size"):  # tokenizers
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]


def _attribute(tokenizer: Any, *names: str) -> int:
    for name in names:
        value = getattr(tokenizer, name, None)
        if callable(value):  # SentencePiece
            value = value()
        if value is not None and value >= 0:
            return value
    raise RequestError(f"the tokenizer has none of {', '.join(names)}")


def _pad_id(tokenizer: Any) -> int:
    try:
        return _attribute(tokenizer, "pad_id", "pad_token_id", "eos_id", "eos_token_id")
    except RequestError:
        return 0  # its labels are ignored, any id will do
