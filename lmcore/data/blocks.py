"""Token stores -> blocks by position: ``block_size`` tokens and, shifted by one, their next-token labels.

    N tokens, T = block_size: block b has inputs ids[bT : bT + T] and labels ids[bT + 1 : bT + T + 1];
    there are floor((N - 1) / T) blocks, and the rest is the tail.

Blocks are contiguous and nothing between them is lost. A label is ignored because of its place, never because of its
id: a padding id that equals the end-of-document id does not hide real end-of-document labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np

from lmcore.data.cursor import Cursor
from lmcore.data.order import Order, Phase, rank_slice
from lmcore.data.store.store import TokenStore
from lmcore.errors import RequestError

_LOCATED_AHEAD = 1024


@final
@dataclass(frozen=True, kw_only=True)
class Blocks:
    """B blocks of T tokens as numpy arrays, before they become tensors.

    Attributes:
        ids: (B, T + 1) in the narrow integer dtype of the store.
        n_labels: (B,) int64: how many labels of a row are real, counted from its start.
        position_ids: (B, T) int32, counted from 0 in each document; ``None`` without a document mask.
        state: the state from which a stream continues after these blocks.
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
class StoreBlocks:
    """The blocks of token stores, by position (training) or in the order of the stores (evaluation).

    Args:
        stores: one for each source.
        block_size: T.
        seed, shuffle, phases: arguments of :class:`lmcore.data.order.Order`.
        tails: also include the last, partial block of each store, with missing labels ignored; for evaluation. Training
            positions never include tails.
        document_mask: return ``position_ids`` that begin at 0 in each document.
        pad_id: the id that pads partial blocks; its labels are ignored.

    Raises:
        RequestError: the stores do not fill a single block, or with ``tails`` have no label at all.

    Example:
        >>> blocks = StoreBlocks([TokenStore.open("token_stores/books-0123")], block_size=1024, seed=1)
        >>> blocks.read(np.arange(8)).ids.shape
        (8, 1025)
    """

    can_pad = True

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        block_size: int,
        seed: int = 0,
        shuffle: str = "full",
        phases: tuple[Phase, ...] = (Phase(),),
        tails: bool = False,
        document_mask: bool = False,
        pad_id: int = 0,
    ) -> None:
        if block_size < 1:
            raise RequestError(f"data.block_size {block_size} must be at least 1")
        self.stores = tuple(stores)
        self.block_size = block_size
        self.document_mask = document_mask
        self.pad_id = pad_id
        lengths = tuple(store.n_blocks(block_size) for store in self.stores)
        tokens = sum(store.n_tokens for store in self.stores)
        names = ", ".join(store.name for store in self.stores)
        if tails and not any(store.n_tokens > 1 for store in self.stores):
            raise RequestError(
                f"{names} has {tokens} token{'s' * (tokens != 1)}, which gives nothing to predict: a set needs at "
                f"least 2 tokens in one source (with --data.eos true every document ends with one)"
            )
        if not tails and not sum(lengths):
            raise RequestError(
                f"the corpus has {tokens} tokens, not one block of data.block_size {block_size} with its "
                f"labels: give more text or a smaller data.block_size"
            )
        self._order: Order | None = None
        if sum(lengths):
            self._order = Order(lengths=lengths, seed=seed, shuffle=shuffle, phases=phases)
        self._ahead = _Located(0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @property
    def order(self) -> Order:
        """The order of the full blocks.

        Raises:
            RequestError: there are no full blocks, only tails.
        """
        if self._order is None:
            raise RequestError(f"no source fills one block of {self.block_size} tokens: there are only tails")
        return self._order

    @property
    def fingerprint(self) -> str:
        """A readable string of everything, except the seed, that determines which block a position refers to."""
        sources = ",".join(f"{store.name}:{store.fingerprint[:16]}" for store in self.stores)
        if len(sources) > 400:  # so that the cursor in a checkpoint stays small
            sources = f"{len(self.stores)} sources:{hashlib.sha256(sources.encode()).hexdigest()[:32]}"
        # Without full blocks there is no order.
        shuffle = "none" if self._order is None else self._order.shuffle
        return f"store block_size={self.block_size} shuffle={shuffle} {sources}"

    @property
    def epoch_blocks(self) -> int:
        """Positions of an epoch."""
        return self.order.epoch_blocks

    def resumed(self, cursor: Cursor) -> StoreBlocks:
        """These blocks with the mixtures and the order version of the cursor."""
        if (cursor.phases, cursor.version) == (self.order.phases, self.order.version):
            return self
        new = StoreBlocks(
            self.stores, block_size=self.block_size, document_mask=self.document_mask, pad_id=self.pad_id
        )
        new._order = replace(self.order, phases=cursor.phases, version=cursor.version)
        return new

    def count_labels(self, positions: np.ndarray) -> int:
        """The number of labels in the blocks at ``positions``, without reading them."""
        return len(positions) * self.block_size

    def epoch_of(self, cursor: Cursor) -> float:
        """The number of epochs before the cursor."""
        return self.order.epoch_at(cursor.position)

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The positions of one rank."""
        return rank_slice(positions, rank, world_size)

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        """The indices of a rank's rows that one worker reads."""
        return np.arange(worker, len(positions), workers)

    def read(self, positions: np.ndarray) -> Blocks:
        """The blocks at (B,) positions; a negative position gives a block without labels."""
        real = positions >= 0
        source, block = self._locate(positions[real])
        rows = np.flatnonzero(real)
        return self._read(rows, source, block * self.block_size, len(positions))

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and the block at each position.

        A rank goes through its positions in order, and locating a thousand of them costs little more than locating a
        few, so they are located ahead.
        """
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
        """Number of blocks of all stores, including the last, partial block of each store."""
        return sum(self._counts_with_tails())

    def _counts_with_tails(self) -> list[int]:
        return [-(-max(store.n_tokens - 1, 0) // self.block_size) for store in self.stores]

    def read_in_order(self, numbers: np.ndarray) -> Blocks:
        """Blocks by their number in the order of the stores, the tail of each store after its full blocks.

        Args:
            numbers: (B,), each below :attr:`n_in_order`; a negative number gives a block without labels.
        """
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
        position_ids = None
        if self.document_mask:
            position_ids = np.tile(np.arange(self.block_size, dtype=np.int32), (n_blocks, 1))
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


def position_ids_of(ends: np.ndarray, size: int) -> np.ndarray:
    """(T,) int32: the position of each token in its document.

    Args:
        ends: where documents end, counted from the start of the block. A document that began before the block counts
            from the start of the block.
        size: T.
    """
    starts = np.zeros(size, dtype=np.int32)
    inside = ends[(ends > 0) & (ends < size)]
    starts[inside] = inside
    return np.arange(size, dtype=np.int32) - np.maximum.accumulate(starts)
