"""Dataset + cursor -> the micro-batches of each step, on the device, ahead of time.

Comes in: anything that reads blocks by position (:class:`Readable`: token stores, a stream, the user's own
data) and a cursor. Goes out: one :class:`StepBatch` for each step, with the cursor *after* it, so that what
a checkpoint keeps is what was trained on, never what was read ahead. What always holds: a step is the next
``global_batch_blocks`` positions; rank r has a contiguous share of them, cut into micro-batches; nothing
else depends on the topology. Every rank makes the same number of steps. Positions from ``end_position`` on
are blocks without labels.

Reading runs in one thread of this process, which for a memory-mapped store is several times as fast as worker
processes (docs/log.md); ``workers`` are there for streams and for data that is slow to make. They change no
order.

    batches = Batches(dataset, cursor=cursor, global_batch_blocks=64, micro_batch_blocks=8, device="cuda")
    for step in batches:
        for batch, key in zip(step.micro_batches, step.keys):
            ...
        cursor = step.cursor
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, final

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lmcore.data.blocks import BlockDataset, Blocks
from lmcore.data.custom import IterableData, MapData, can_ignore, ignored
from lmcore.data.device import Collate, ToDevice
from lmcore.data.order import Cursor, count_positions, next_positions, permute
from lmcore.errors import FaultError, RequestError


class Readable(Protocol):
    """Data that can be read by position."""

    @property
    def fingerprint(self) -> str:
        """All that decides what a position means, beside the seed."""

    @property
    def can_pad(self) -> bool:
        """Can a block have no labels (position -1)?"""

    def read(self, positions: np.ndarray) -> Blocks | list[Any]:
        """The blocks, or the items, at these positions; -1 stands for one without labels."""

    def count_labels(self, positions: np.ndarray) -> int | None:
        """The labels in them, if it is known without reading."""

    def epoch_of(self, cursor: Cursor) -> float:
        """Epochs before the cursor."""

    def resumed(self, cursor: Cursor) -> Readable:
        """This data, ready to be read from a cursor on."""

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The positions of a step that one rank reads, rising."""

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        """Which of a rank's rows of a step one worker reads."""


@final
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank needs for one step.

    Attributes:
        micro_batches: on the device; keys ``input_ids`` (B, T) and ``labels`` (B, T) int64 (-100 is
            ignored), with a document mask also ``position_ids`` (B, T).
        keys: the first position of each micro-batch: its own in the whole run, whatever the topology at equal
            ``micro_batch_blocks``; the seed of its dropout.
        label_count: labels of the whole step over all ranks, an int or a 0-d tensor; ``None`` from the loader if only
            the labels themselves can tell.
        positions: the first and the last position of the whole step.
        epoch: epochs after this step.
        cursor: where the next step begins. In mode stream it holds the lanes of this rank only: see
            :func:`merge_cursors`.
        wait_seconds: how long the step had to be waited for.
    """

    micro_batches: list[dict[str, Any]]
    keys: list[int]
    label_count: Any
    positions: tuple[int, int]
    epoch: float
    cursor: Cursor
    wait_seconds: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One step, before anything is read: ``wanted`` are this rank's positions, -1 where there is no label;
    ``rows_of_workers`` which of them each worker reads."""

    wanted: np.ndarray
    rows_of_workers: list[np.ndarray]
    keys: list[int]
    label_count: Any
    positions: tuple[int, int]
    cursor: Cursor


@final
class Batches:
    """The training batches of one rank, from a cursor on; each iteration starts there again.

    Args:
        dataset: what is read.
        cursor: where to begin.
        global_batch_blocks: blocks of a step over all ranks.
        micro_batch_blocks: blocks of a forward pass of one rank.
        end_position: the data ends here; ``None``: never. The last step is filled up with blocks without
        labels.
        workers: reading processes; 0 reads in a thread of this process.
        prefetch: steps that are made ready ahead of time.
        pin_memory: copy from page-locked memory; default: where the device is a GPU.
        cu_seq_lens: with a document mask, also give ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32, over the
            flattened micro-batch) and ``max_length_q``, ``max_length_k``, which flash attention takes.
        collate: list of items -> dict of tensors, for data that gives items; default: torch's.

    Raises:
        RequestError: the batch does not divide.
    """

    def __init__(
        self,
        dataset: Readable,
        *,
        cursor: Cursor,
        global_batch_blocks: int,
        micro_batch_blocks: int,
        rank: int = 0,
        world_size: int = 1,
        end_position: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        device: torch.device | str = "cpu",
        cu_seq_lens: bool = False,
        collate: Collate | None = None,
    ) -> None:
        if global_batch_blocks % (world_size * micro_batch_blocks):
            raise RequestError(
                f"train.global_batch_blocks {global_batch_blocks} is not a multiple of {world_size} "
                f"processes x train.micro_batch_blocks {micro_batch_blocks} = "
                f"{world_size * micro_batch_blocks}"
            )
        self.cursor = cursor
        self.accumulation = global_batch_blocks // (world_size * micro_batch_blocks)
        self._dataset = dataset.resumed(cursor)
        self._global_batch_blocks = global_batch_blocks
        self._micro_batch_blocks = micro_batch_blocks
        self._rank, self._world_size = rank, world_size
        self._end = end_position
        self._workers, self._prefetch = workers, prefetch
        self._to_device = ToDevice(torch.device(device), pin_memory, cu_seq_lens, collate)

    @property
    def steps_left(self) -> int | None:
        """Steps from the cursor to the end; ``None`` without an end."""
        if self._end is None:
            return None
        return -(
            -count_positions(self.cursor.position, self._end, self.cursor.skips) // self._global_batch_blocks
        )

    def __iter__(self) -> Iterator[StepBatch]:
        ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=self._prefetch)
        stopped = threading.Event()

        def put(item: StepBatch | BaseException | None) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            try:
                for step in self._steps():
                    if not put(step):
                        return
                put(None)
            except BaseException as error:  # handed over and raised again where the step is wanted
                put(error)

        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                self._to_device.hand_over(item.micro_batches)
                yield replace(item, wait_seconds=time.perf_counter() - start)
        finally:
            stopped.set()
            thread.join()

    def _steps(self) -> Iterator[StepBatch]:
        read = self._read_here() if self._workers == 0 else self._read_by_workers()
        for plan in self._plans():
            rows = next(read)
            state = getattr(rows, "state", None)
            cursor = plan.cursor if state is None else replace(plan.cursor, stream=state)
            size = self._micro_batch_blocks
            yield StepBatch(
                micro_batches=[
                    self._to_device(rows, at, at + size) for at in range(0, len(plan.wanted), size)
                ],
                keys=plan.keys,
                label_count=plan.label_count,
                positions=plan.positions,
                epoch=self._dataset.epoch_of(cursor),
                cursor=cursor,
            )

    def _plans(self) -> Iterator[_Plan]:
        """All steps from the cursor on, by arithmetic."""
        cursor = self.cursor
        while self._end is None or count_positions(cursor.position, self._end, cursor.skips) > 0:
            positions, after = next_positions(cursor.position, self._global_batch_blocks, cursor.skips)
            mine = wanted = self._dataset.rank_slice(positions, self._rank, self._world_size)
            if self._end is not None and self._dataset.can_pad:
                # The cursor stops at the end itself: a later, longer run misses no block.
                wanted, after = np.where(mine < self._end, mine, -1), min(after, self._end)
                positions = positions[positions < self._end]
            cursor = replace(cursor, position=after)
            yield _Plan(
                wanted=wanted,
                keys=mine[:: self._micro_batch_blocks].tolist(),
                label_count=self._dataset.count_labels(positions),
                positions=(int(positions[0]), int(positions[-1])),
                cursor=cursor,
                rows_of_workers=self._rows_of_workers(mine),
            )

    def _rows_of_workers(self, mine: np.ndarray) -> list[np.ndarray]:
        return [self._dataset.rows_of_worker(mine, number, self._workers) for number in range(self._workers)]

    def _read_here(self) -> Iterator[Blocks | list[Any]]:
        for plan in self._plans():
            yield self._dataset.read(plan.wanted)

    def _read_by_workers(self) -> Iterator[Blocks | list[Any]]:
        """The same, each row read by the worker that owns it."""
        closing = multiprocessing.Event()
        atexit.register(closing.set)
        with warnings.catch_warnings():
            # The number of workers is the user's own; torch's opinion of it belongs to the plan, not here.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader = DataLoader(
                _WorkerShare(self),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                worker_init_fn=partial(_ignore_signals, closing),
            )
            items = iter(loader)
        try:
            for plan in self._plans():
                # torch takes the workers strictly in turn, so that each round is one step.
                parts = [next(items) for _ in range(self._workers)]
                for part in parts:
                    if isinstance(part, RequestError | FaultError):
                        raise part
                yield _joined(parts, plan.rows_of_workers, len(plan.wanted))
        finally:
            closing.set()
            atexit.unregister(closing.set)
            del items  # ends the workers now, even if a traceback keeps this frame


class _WorkerShare(IterableDataset):
    """What one worker process reads: its rows of every step."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def __iter__(self) -> Iterator[Blocks | list[Any] | RequestError | FaultError]:
        info = get_worker_info()
        assert info is not None
        dataset = self._batches._dataset
        for plan in self._batches._plans():
            try:
                yield dataset.read(plan.wanted[plan.rows_of_workers[info.id]])
            except (RequestError, FaultError) as error:
                yield error  # as it is: torch would wrap its one line into a page
                return


def _ignore_signals(closing: Any, worker: int) -> None:
    """The trainer decides what a signal means, and must be able to read on until it has saved; a worker
    goes when its loader is closed."""

    def leave_if_closing(number: int, frame: object) -> None:
        if closing.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, leave_if_closing)
    signal.signal(signal.SIGTERM, leave_if_closing)
    torch.set_num_threads(1)


def _joined(parts: list[Any], owned: list[np.ndarray], n_rows: int) -> Blocks | list[Any]:
    if not isinstance(parts[0], Blocks):
        items: list[Any] = [None] * n_rows
        for part, rows in zip(parts, owned):
            for row, item in zip(rows.tolist(), part):
                items[row] = item
        return items

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        out = np.empty((n_rows, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
        for array, rows in zip(arrays, owned):
            out[rows] = array
        return out

    masked = parts[0].position_ids is not None
    states = [part.state for part in parts if part.state is not None]
    return Blocks(
        ids=join([part.ids for part in parts]),
        n_labels=join([part.n_labels for part in parts]),
        position_ids=join([part.position_ids for part in parts]) if masked else None,
        state={key: value for state in states for key, value in state.items()} if states else None,
    )


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
    """The cursors of all ranks after the same step -> the one for the checkpoint. Only a stream has
    something to merge: each rank knows where its own lanes are."""
    lanes = {key: value for cursor in cursors for key, value in cursor.stream.items()}
    return replace(cursors[0], stream=lanes)


@final
class EvalBatches:
    """A held-out set, every block once, tails included, split over the ranks; every rank gets the same
    number of micro-batches. Where labels can be ignored they are filled up with blocks without labels;
    elsewhere (own data with labels that are no integers) micro-batches are made smaller.

    Args:
        dataset: :class:`lmcore.data.blocks.BlockDataset` over stores, or own data (:func:`lmcore.data.custom.wrap`).
        limit: at most so many blocks, always the same ones, spread over the set (iterable data: the first
            ones).

    Raises:
        RequestError: fewer items than processes, where nothing can be filled up.
    """

    def __init__(
        self,
        dataset: BlockDataset | MapData | IterableData,
        *,
        micro_batch_blocks: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        pin_memory: bool | None = None,
        device: torch.device | str = "cpu",
        cu_seq_lens: bool = False,
        collate: Collate | None = None,
    ) -> None:
        self._dataset = dataset
        self._micro_batch_blocks = micro_batch_blocks
        self._rank, self._world_size = rank, world_size
        self._items: list[Any] | None = None
        if isinstance(dataset, IterableData):
            self._items = list(islice(dataset.one_pass(), limit))
            self._total = len(self._items)
            self._can_pad = bool(self._items) and can_ignore(self._items[0])
        else:
            self._total = dataset.n_in_order
            self._can_pad = dataset.can_pad
        self.n_blocks = self._total if limit is None else min(self._total, limit)
        if self.n_blocks < world_size and not self._can_pad:
            raise RequestError(
                f"a held-out set of {self.n_blocks} items cannot be split over {world_size} processes"
            )
        self._to_device = ToDevice(torch.device(device), pin_memory, cu_seq_lens, collate)

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        micro_batches = -(-self.n_blocks // (self._micro_batch_blocks * self._world_size))
        # Nothing can be filled up: no more micro-batches than the rank with the fewest items has items.
        return micro_batches if self._can_pad else min(micro_batches, self.n_blocks // self._world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for places in self._places():
            wanted = np.where(places < self.n_blocks, places, -1)
            if self.n_blocks < self._total:
                inside = wanted >= 0
                wanted[inside] = permute(wanted[inside], self._total, _EVAL_KEYS)
            batch = self._to_device(self._read(wanted), 0, len(wanted))
            self._to_device.hand_over([batch])
            yield batch

    def _places(self) -> Iterator[np.ndarray]:
        size, count = self._micro_batch_blocks, len(self)
        if self._can_pad:
            for number in range(count):
                first = (number * self._world_size + self._rank) * size
                yield np.arange(first, first + size)
        else:
            mine = np.array_split(np.arange(self.n_blocks), self._world_size)[self._rank]
            yield from np.array_split(mine, count)

    def _read(self, wanted: np.ndarray) -> Blocks | list[Any]:
        if not isinstance(self._dataset, IterableData):
            return self._dataset.read_in_order(wanted)
        assert self._items is not None
        return [self._items[one] if one >= 0 else ignored(self._items[0]) for one in wanted.tolist()]


_EVAL_KEYS = np.arange(1, 9, dtype=np.uint64)  # any fixed permutation: the same blocks in every run
