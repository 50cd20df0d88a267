"""A custom dataset (``data.factory``) by position, for :class:`lmcore.data.batches.Batches`.

Its items are dicts whose keys are the arguments of the model's ``forward``, and ``labels``.

* Map-style (``__len__`` and ``__getitem__``): the order is that of :class:`lmcore.data.order.Order` over its length. It
  resumes immediately, and does not depend on the number of ranks or workers. The dataset must be the same on every rank.
* Iterable: every rank iterates over the whole dataset, which must yield the same items on every rank, and keeps its own
  share. The order is that of the dataset, epoch after epoch. A resume reads the items up to its position again. The
  dataset is read by one process: ``data.workers`` is 0 or 1.

Signed integer ``labels`` can be ignored (-100), so that the last step of a map-style dataset can be padded. With other
labels (also ``uint8``) the last step continues into the next epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.block_dataset import BlockDataset
from lmcore.data.cursor import Cursor
from lmcore.data.order import Order, rank_slice
from lmcore.errors import RequestError


def wrap(data: Any, *, seed: int, shuffle: str = "full") -> MapData | IterableData:
    """The dataset that ``data.factory`` returned, readable by position.

    Raises:
        RequestError: it is neither map-style nor iterable, or empty.
    """
    if isinstance(data, BlockDataset):
        return IterableData(data.without_sharding())
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapData(data, seed=seed, shuffle=shuffle)
    if isinstance(data, Iterable):
        return IterableData(data)
    raise RequestError(
        f"data.factory returned {type(data).__name__}: it must return a dataset with __len__ and "
        f"__getitem__, or an iterable one"
    )


def first_item(dataset: Any) -> Any:
    """The first item; ``None`` for an iterable dataset, which may be readable only once."""
    if not isinstance(dataset, MapData):
        return None
    [item] = dataset.read_in_order(np.zeros(1, dtype=np.int64))
    return item


def refuse_wrong_items(dataset: MapData | IterableData) -> None:
    """Check the first item, before a model is built. An iterable dataset, which may be readable only once, is not checked.

    Call this only if there is no ``collate``, which could turn any items into a batch.

    Raises:
        RequestError: the item is not a dict, or has no labels.
    """
    if (item := first_item(dataset)) is None and not isinstance(dataset, MapData):
        return
    if not isinstance(item, Mapping):
        raise RequestError(
            f"data.factory: an item must be a dict, whose keys are labels and the arguments of the model's forward, not "
            f"{type(item).__name__}: return {{'name': ..., 'labels': ...}}, or give collate beside train"
        )
    if "labels" not in item:
        raise RequestError(
            f"data.factory: an item must have labels, -100 where one does not count (integers); its keys are "
            f"{', '.join(map(str, item))}"
        )


def ignored(item: Any) -> Any:
    """A copy of the item with all labels ignored."""
    labels = torch.as_tensor(item["labels"])
    return {**item, "labels": torch.full_like(labels, IGNORED_LABEL)}


def can_ignore(item: Any) -> bool:
    """Whether the item has integer labels that can be -100."""
    if not isinstance(item, Mapping) or "labels" not in item:
        return False
    labels = item["labels"]
    if not isinstance(labels, Tensor | np.ndarray | int | list):
        return False
    dtype = torch.as_tensor(labels).dtype
    # In an unsigned dtype -100 would be a real label: 156 with 8 bits.
    return dtype.is_signed and not dtype.is_floating_point and not dtype.is_complex


class Items(list[Any]):
    """The items of some positions, and the positions at which the passes over an iterable dataset ended so far."""

    passes: tuple[int, ...] = ()


def _name(data: Any) -> str:
    return f"{type(data).__module__}.{type(data).__qualname__}"


@final
class MapData:
    """A map-style dataset in a keyed order."""

    def __init__(self, data: Any, *, seed: int, shuffle: str) -> None:
        if len(data) == 0:
            raise RequestError(f"data.factory returned an empty dataset ({_name(data)})")
        self._data = data
        self.order = Order(lengths=(len(data),), seed=seed, shuffle=shuffle)
        self.can_pad = can_ignore(data[0])

    @property
    def fingerprint(self) -> str:
        """A string of the class and the length; the content of the items is not part of it."""
        shuffle = self.order.shuffle
        return f"own shuffle={shuffle} {_name(self._data)} of {self.epoch_blocks} items"

    def hash_of_first_item(self) -> str | None:
        """A hash of the first item, to compare between ranks; ``None`` if the item is not a dict of numbers."""
        try:
            parts = {
                str(key): torch.as_tensor(value).numpy(force=True) for key, value in self._data[0].items()
            }
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None
        whole = hashlib.sha256()
        for key in sorted(parts):
            whole.update(f"{key} {parts[key].dtype} {parts[key].shape} ".encode() + parts[key].tobytes())
        return whole.hexdigest()

    @property
    def epoch_blocks(self) -> int:
        """Number of items of an epoch."""
        return self.order.epoch_blocks

    def epoch_of(self, cursor: Cursor) -> float:
        return self.order.epoch_at(cursor.position)

    def resumed(self, cursor: Cursor) -> MapData:
        return self

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        return rank_slice(positions, rank, world_size)

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        return np.arange(worker, len(positions), workers)

    def count_labels(self, positions: np.ndarray) -> int | None:
        return None  # labels may have any shape

    def read(self, positions: np.ndarray) -> list[Any]:
        """The items at these positions; -1 gives an item whose labels are ignored."""
        _, _, index = self.order.locate(np.maximum(positions, 0))
        return self._items(index, positions >= 0)

    n_in_order = epoch_blocks

    def read_in_order(self, numbers: np.ndarray) -> list[Any]:
        """The items with these indices, for evaluation; -1 gives an item whose labels are ignored."""
        return self._items(np.maximum(numbers, 0), numbers >= 0)

    def _items(self, index: np.ndarray, real: np.ndarray) -> list[Any]:
        many = getattr(self._data, "__getitems__", None)
        items = many(index.tolist()) if many else [self._data[one] for one in index.tolist()]
        return [item if one else ignored(item) for item, one in zip(items, real.tolist())]


_END = object()


@final
class IterableData:
    """An iterable dataset, read in its own order, epoch after epoch."""

    can_pad = False
    epoch_blocks = None

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._items: Iterator[Any] | None = None
        self._position = 0
        self._passes: list[int] = []

    @property
    def fingerprint(self) -> str:
        """A string of the class; what the dataset yields is not part of it."""
        return f"own iterable {_name(self._data)}"

    def epoch_of(self, cursor: Cursor) -> float:
        """The number of complete passes before the cursor, as far as the dataset has been read."""
        return float(sum(end <= cursor.position for end in self._passes))

    def resumed(self, cursor: Cursor) -> IterableData:
        new = copy(self)
        new._items, new._position, new._passes = None, 0, []
        return new

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        return rank_slice(positions, rank, world_size)

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        if workers > 1:
            raise RequestError(
                f"data.workers {workers}: an iterable data.factory is read in order by one process, give 0 or 1"
            )
        return np.arange(len(positions))

    def count_labels(self, positions: np.ndarray) -> int | None:
        return None

    def read(self, positions: np.ndarray) -> Items:
        """The items at these positions, which must ascend; items in between are read and dropped."""
        if self._items is None:
            self._items = self._endless()
        out = Items()
        for position in positions.tolist():
            while self._position < position:
                next(self._items)
                self._position += 1
            out.append(next(self._items))
            self._position += 1
        out.passes = tuple(self._passes)
        return out

    def take_over(self, passes: tuple[int, ...]) -> None:
        """Take over the ends of passes that another process has found."""
        self._passes = max(self._passes, list(passes), key=len)

    def one_pass(self) -> Iterator[Any]:
        """All items once, for evaluation."""
        return iter(self._data)

    def _endless(self) -> Iterator[Any]:
        count = 0
        for epoch in range(2**62):
            if hasattr(self._data, "set_epoch"):
                self._data.set_epoch(epoch)
            items = iter(self._data)
            item = next(items, _END)
            if item is _END:
                raise RequestError(f"data.factory: {_name(self._data)} yields nothing in epoch {epoch}")
            while item is not _END:
                # Read one item ahead, so that the end of a pass is known with its last item
                following = next(items, _END)
                count += 1
                if following is _END:
                    self._passes.append(count)
                yield item
                item = following
