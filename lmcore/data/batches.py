"""Dataset + cursor -> the micro-batches of each step, on the device, prefetched.

A step is the next ``global_batch_blocks`` positions, a number that may change from step to step. Each rank gets a share of
them, cut into micro-batches. Nothing else depends on the number of ranks, workers or accumulation steps, and every rank
makes the same number of steps.
Each :class:`StepBatch` carries the cursor *after* it, so that a checkpoint records what was trained on, not what was
prefetched.

    batches = Batches(blocks, cursor=cursor, global_batch_blocks=64, micro_batch_blocks=8, device="cuda")
    for step in batches:
        for batch, key in zip(step.micro_batches, step.keys):
            ...
        cursor = step.cursor

Data are read in one thread of this process, which for a memory-mapped store is several times as fast as worker
processes (docs/log.md). ``workers`` are meant for streams and for data that is slow to produce. They do not change the
order.
"""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.blocks import Blocks, StoreBlocks
from lmcore.data.context import Context
from lmcore.data.cursor import Cursor, count_positions, next_positions
from lmcore.data.custom import Items, IterableData, MapData, can_ignore, ignored
from lmcore.data.order import permute
from lmcore.data.steps import StepPlan, largest_divisor, share_of
from lmcore.errors import FaultError, RequestError

WHOLE_BLOCKS = Context()

Collate = Callable[[list[Any]], dict[str, Tensor]]
"""A list of items -> a dict of tensors, as in torch's ``DataLoader``."""


class Readable(Protocol):
    """Data that can be read by position: token stores, a stream, a custom dataset."""

    @property
    def fingerprint(self) -> str:
        """A string of everything, except the seed, that determines which data a position refers to."""

    @property
    def can_pad(self) -> bool:
        """Whether position -1 gives a block without labels."""

    def read(self, positions: np.ndarray) -> Blocks | list[Any]:
        """The blocks, or items, at these positions; -1 gives one without labels."""

    def count_labels(self, positions: np.ndarray) -> int | None:
        """The number of labels at these positions, or ``None`` if it is not known without reading."""

    def epoch_of(self, cursor: Cursor) -> float:
        """The number of epochs before the cursor."""

    def resumed(self, cursor: Cursor) -> Readable:
        """This data, ready to be read from a cursor on."""

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The positions of a step that one rank reads, ascending."""

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        """The indices of a rank's rows of a step that one worker reads."""


@final
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank needs for one step.

    Attributes:
        micro_batches: on the device; keys ``input_ids`` (B, T) and ``labels`` (B, T) int64 (-100 is
            ignored), with a document mask also ``position_ids`` (B, T).
        keys: the first position of each micro-batch, which seeds its dropout. It is unique in the run, and the same on any
            number of ranks for equal ``micro_batch_blocks``.
        label_count: number of labels of the whole step over all ranks, an int or a 0-dim tensor; ``None`` from the loader
            if it can only be counted from the labels.
        n_blocks: blocks of the whole step over all ranks, without padding blocks.
        positions: the first and the last position of the whole step.
        epoch: the number of epochs after this step.
        cursor: where the next step begins. In mode stream it contains the lanes of this rank only: see
            :func:`merge_cursors`.
        wait_seconds: how long the caller had to wait for this step.
    """

    micro_batches: list[dict[str, Any]]
    keys: list[int]
    label_count: Any
    n_blocks: int
    positions: tuple[int, int]
    epoch: float
    cursor: Cursor
    wait_seconds: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One step, before anything is read. ``wanted`` are this rank's positions, -1 for blocks without labels;
    ``rows_of_workers`` are the indices into it that each worker reads."""

    wanted: np.ndarray
    micro_batch_blocks: int
    rows_of_workers: list[np.ndarray]
    keys: list[int]
    label_count: int | None
    n_blocks: int
    positions: tuple[int, int]
    cursor: Cursor


@final
class Batches:
    """The training batches of one rank, from a cursor on; each iteration starts there again.

    Args:
        dataset: the data to read.
        cursor: where to begin.
        global_batch_blocks: blocks of a step over all ranks, or the plan of a run in which they change. With a plan the
            micro-batch is the largest divisor of a rank's share up to ``micro_batch_blocks``.
        micro_batch_blocks: blocks of one forward pass of one rank.
        step: number of steps done before the cursor; needed with a plan.
        end_position: where the data ends; ``None``: never. The last step is padded with blocks without labels.
        workers: number of worker processes; 0 reads in a thread of this process.
        prefetch: number of steps that are prepared ahead.
        pin_memory: copy from page-locked memory; default: if the device is a GPU.
        context: which tokens of each block this rank computes, and whether batches contain what attention needs to
            separate documents without a mask, under transformers' names: ``cu_seq_lens_q`` and ``cu_seq_lens_k``
            (:func:`lmcore.data.context.sequence_lengths`), ``max_length_q`` and ``max_length_k`` (T).
        collate: list of items -> dict of tensors, for datasets of items; default: torch's.

    Raises:
        RequestError: the global batch is not a multiple of ranks times micro-batch, or ``data.skip_positions`` leaves
            nothing to train on.
    """

    def __init__(
        self,
        dataset: Readable,
        *,
        cursor: Cursor,
        global_batch_blocks: int | StepPlan,
        micro_batch_blocks: int,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        end_position: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        device: torch.device | str = "cpu",
        context: Context = WHOLE_BLOCKS,
        collate: Collate | None = None,
    ) -> None:
        if isinstance(global_batch_blocks, int) and global_batch_blocks % (world_size * micro_batch_blocks):
            raise RequestError(
                f"train.global_batch_blocks {global_batch_blocks} is not a multiple of {world_size} "
                f"processes x train.micro_batch_blocks {micro_batch_blocks} = "
                f"{world_size * micro_batch_blocks}"
            )
        if end_position and not cursor.position and not count_positions(0, end_position, cursor.skips):
            raise RequestError(
                f"data.skip_positions skip all {end_position} positions of the run: leave some of them in"
            )
        self.cursor = cursor
        self._dataset = dataset.resumed(cursor)
        plan = global_batch_blocks
        self._plan, self._step = StepPlan.constant(plan) if isinstance(plan, int) else plan, step
        for stretch in self._plan.stretches:
            share_of(stretch.batch, world_size)
        self._micro_batch_blocks = micro_batch_blocks
        self._rank, self._world_size = rank, world_size
        self._end = end_position
        self._workers, self._prefetch = workers, prefetch
        self._to_device = _ToDevice(torch.device(device), pin_memory, context, collate)

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
            except BaseException as error:  # raised again in the thread that iterates
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
            state = rows.state if isinstance(rows, Blocks) else None
            if isinstance(rows, Items) and isinstance(self._dataset, IterableData):
                self._dataset.take_over(rows.passes)
            cursor = plan.cursor if state is None else replace(plan.cursor, stream=state)
            size = plan.micro_batch_blocks
            yield StepBatch(
                micro_batches=[
                    self._to_device(rows, at, at + size) for at in range(0, len(plan.wanted), size)
                ],
                keys=plan.keys,
                label_count=plan.label_count,
                n_blocks=plan.n_blocks,
                positions=plan.positions,
                epoch=self._dataset.epoch_of(cursor),
                cursor=cursor,
            )

    def _plans(self) -> Iterator[_Plan]:
        """All steps from the cursor on, by arithmetic."""
        cursor, step = self.cursor, self._step
        while self._end is None or count_positions(cursor.position, self._end, cursor.skips) > 0:
            batch = self._plan.batch_of(step)
            micro_batch = largest_divisor(batch // self._world_size, self._micro_batch_blocks)
            positions, after = next_positions(cursor.position, batch, cursor.skips)
            mine = wanted = self._dataset.rank_slice(positions, self._rank, self._world_size)
            if self._end is not None and self._dataset.can_pad:
                # The cursor stops exactly at the end, so that a later, longer run misses no block.
                wanted, after = np.where(mine < self._end, mine, -1), min(after, self._end)
                positions = positions[positions < self._end]
            cursor, step = replace(cursor, position=after), step + 1
            yield _Plan(
                wanted=wanted,
                micro_batch_blocks=micro_batch,
                keys=mine[::micro_batch].tolist(),
                label_count=self._dataset.count_labels(positions),
                n_blocks=len(positions),
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
        """The same rows as :meth:`_read_here`, each read by the worker to which it belongs."""
        # A byte in shared memory, not an Event. The lock of an Event is not re-entrant: a second signal inside a worker's
        # handler would deadlock, and a worker that is killed while it holds the lock would block all others.
        closing = multiprocessing.RawValue("b", 0)
        close = partial(setattr, closing, "value", 1)
        atexit.register(close)
        with warnings.catch_warnings():
            # The user chose the number of workers; torch would warn about it at every start.
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
                # torch reads from the workers strictly in turn, so that each round is one step.
                parts = [next(items) for _ in range(self._workers)]
                for part in parts:
                    if isinstance(part, RequestError | FaultError):
                        raise part
                yield _joined(parts, plan.rows_of_workers, len(plan.wanted))
        finally:
            close()
            atexit.unregister(close)
            del items  # ends the workers now, even if a traceback keeps this frame alive


class _WorkerShare(IterableDataset):
    """What one worker process reads: its rows of every step."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        # If workers are not forked, this is pickled: leave out the CUDA stream, and a collate that may be a local function.
        self._batches = copy.copy(batches)
        del self._batches._to_device

    def __iter__(self) -> Iterator[Blocks | list[Any] | RequestError | FaultError]:
        info = get_worker_info()
        assert info is not None
        dataset = self._batches._dataset
        for plan in self._batches._plans():
            try:
                yield dataset.read(plan.wanted[plan.rows_of_workers[info.id]])
            except (RequestError, FaultError) as error:
                yield error  # yielded, not raised, because torch would wrap its one line into a long traceback
                return


def _ignore_signals(closing: Any, worker: int) -> None:
    """Ignore signals in a worker until its loader is closed.

    The trainer decides what to do at a signal, and must be able to read on until it has saved."""

    def leave_if_closing(number: int, frame: object) -> None:
        if closing.value:
            os._exit(0)

    signal.signal(signal.SIGINT, leave_if_closing)
    signal.signal(signal.SIGTERM, leave_if_closing)
    torch.set_num_threads(1)


def _joined(parts: list[Any], owned: list[np.ndarray], n_rows: int) -> Blocks | list[Any]:
    if not isinstance(parts[0], Blocks):
        items = Items([None] * n_rows)
        items.passes = max((part.passes for part in parts if isinstance(part, Items)), key=len, default=())
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
    """Merge the cursors of all ranks after the same step into the one for the checkpoint.

    Only cursors of a stream differ: each rank knows its own lanes only.
    """
    lanes = {key: value for cursor in cursors for key, value in cursor.stream.items()}
    return replace(cursors[0], stream=lanes)


@final
class EvalBatches:
    """The micro-batches of a validation set: every block once, including tails, split over the ranks.

    Every rank gets the same number of micro-batches. They are padded with blocks without labels. For a custom
    dataset whose labels cannot be ignored (not signed integers) some micro-batches are smaller instead.

    Args:
        dataset: blocks of stores with ``tails=True``, or a custom dataset (:func:`lmcore.data.custom.wrap`).
        micro_batch_blocks: blocks of one forward pass of one rank.
        limit: use at most this many blocks, always the same ones, spread over the set (for an iterable dataset, the
            first ones).
        context: as in :class:`Batches`.

    Raises:
        RequestError: an empty set, or fewer items than processes if padding is not possible.

    Example:
        >>> for batch in EvalBatches(blocks, micro_batch_blocks=8):
        ...     batch["labels"].shape
        torch.Size([8, 1024])
    """

    def __init__(
        self,
        dataset: StoreBlocks | MapData | IterableData,
        *,
        micro_batch_blocks: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        pin_memory: bool | None = None,
        device: torch.device | str = "cpu",
        context: Context = WHOLE_BLOCKS,
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
        if not self.n_blocks:
            raise RequestError("a validation set is empty: give it at least one item, or leave it out")
        if self.n_blocks < world_size and not self._can_pad:
            raise RequestError(
                f"a validation set of {self.n_blocks} items cannot be split over {world_size} processes, and its labels "
                f"cannot be ignored to fill it up: give it at least {world_size} items"
            )
        self._to_device = _ToDevice(torch.device(device), pin_memory, context, collate)

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        micro_batches = -(-self.n_blocks // (self._micro_batch_blocks * self._world_size))
        # Without padding there cannot be more micro-batches than the rank with the fewest items has items.
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


_EVAL_KEYS = np.arange(1, 9, dtype=np.uint64)  # any fixed keys, so that every run uses the same blocks


# ------------------------------------------------------------------------------------------------------ the device

_COPIED = "_copied"


@final
class _ToDevice:
    """Rows of blocks or items -> one micro-batch on the device, its ids widened to int64.

    Data are copied to a GPU in a narrow dtype, from page-locked memory, on a separate CUDA stream. Call
    :meth:`hand_over` before use.
    """

    def __init__(
        self, device: torch.device, pin_memory: bool | None, context: Context, collate: Collate | None
    ) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._pin = self._cuda if pin_memory is None else pin_memory and torch.cuda.is_available()
        self._context = context
        self._collate = collate or default_collate
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None

    def __call__(self, rows: Blocks | list[Any], start: int, stop: int) -> dict[str, Any]:
        if not self._cuda:
            return self._make(rows, start, stop)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            batch = self._make(rows, start, stop)
            batch[_COPIED] = self._stream.record_event()
        return batch

    def hand_over(self, micro_batches: list[dict[str, Any]]) -> None:
        """Make the CUDA stream of the calling thread wait for the copies that the reading thread started."""
        for batch in micro_batches if self._cuda else []:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(batch.pop(_COPIED))
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(stream)

    def _make(self, rows: Blocks | list[Any], start: int, stop: int) -> dict[str, Any]:
        if not isinstance(rows, Blocks):
            made = self._collate(rows[start:stop])
            if not isinstance(made, dict):
                raise RequestError(
                    f"data.factory: a batch must be a dict, whose keys are arguments of the model's forward, "
                    f"not {type(made).__name__}"
                )
            if "labels" not in made:
                raise RequestError(
                    f"data.factory: a batch must have labels, -100 where one does not count (integers); its keys are "
                    f"{', '.join(map(str, made))}"
                )
            return {
                key: self._send(value) if isinstance(value, Tensor) else value for key, value in made.items()
            }
        ids, n_labels = rows.ids[start:stop], rows.n_labels[start:stop]
        context, block_size = self._context, ids.shape[1] - 1
        pieces = context.pieces(block_size)
        batch: dict[str, Any]
        # Inputs and labels must not share memory: setting a label to -100 would overwrite an input.
        if self._cuda and context.size == 1:
            sent = self._widened(ids)
            batch = {"input_ids": sent[:, :-1].clone(), "labels": sent[:, 1:].clone()}
        else:
            parts = (context.cut(ids[:, :-1]), context.cut(ids[:, 1:]))
            batch = {"input_ids": self._widened(parts[0]), "labels": self._widened(parts[1])}
        for row in np.flatnonzero(n_labels < block_size).tolist():
            labeled = sum(int(np.clip(n_labels[row] - first, 0, end - first)) for first, end in pieces)
            batch["labels"][row, labeled:] = IGNORED_LABEL
        position_ids = None if rows.position_ids is None else rows.position_ids[start:stop]
        # Without position_ids the model would count from the start of this rank's part
        if position_ids is None and context.size > 1:
            position_ids = np.tile(np.arange(block_size, dtype=np.int32), (len(ids), 1))
        if position_ids is not None:
            batch["position_ids"] = self._widened(context.cut(position_ids))
            for name, value in context.lengths(position_ids).items():
                batch[name] = value if isinstance(value, int) else self._send(torch.from_numpy(value))
        return batch

    def _widened(self, array: np.ndarray) -> Tensor:
        """The array as int64 on the device, copied in its narrow dtype."""
        if not self._cuda:
            # By numpy, because torch would start a second thread pool from this thread.
            return self._send(torch.from_numpy(array.astype(np.int64, order="C")))
        # torch has few operations for unsigned integers: copy them as signed, widen, and mask out the sign extension.
        bits = 8 * array.itemsize
        sent = self._send(torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}")))
        return sent.to(torch.int64).bitwise_and_((1 << bits) - 1)

    def _send(self, tensor: Tensor) -> Tensor:
        if self._pin:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
