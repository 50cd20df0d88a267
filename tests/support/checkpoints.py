"""Writing checkpoints in tests: the options by keyword, whole tensors, and several ranks as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lmcore.checkpoint.pieces import Held, held_whole
from lmcore.checkpoint.writer import Checkpoints
from lmcore.config.schema import CheckpointConfig, KeepBestConfig


def checkpoints(
    folder: Path | str,
    *,
    keep_best: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    **given: Any,
) -> Checkpoints:
    """``Checkpoints`` with these options of the section ``checkpoint``; all other keywords go to it as they are."""
    names = {field.name for field in fields(CheckpointConfig)}
    options = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    if keep_best:
        options["keep_best"] = KeepBestConfig(**keep_best)
    return Checkpoints(CheckpointConfig(**options), folder, note=note, **others)


def whole(tensors: Iterable[tuple[str, str, str | None, Tensor]]) -> list[Held]:
    """(kind, name, slot, tensor) of a process that holds all of it."""
    return [held_whole(*tensor) for tensor in tensors]


class Threads:
    """The ranks of a run as threads: ``member(r)`` is what rank r gives to ``Checkpoints``."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=120)
        self._values: list[Any] = [None] * world_size

    def together(self, work: Callable[[Any], Any]) -> list[Any]:
        """``work(member)`` on every rank; what each returned. Raises what a rank raised."""
        results: list[Any] = [None] * self.world_size
        problems: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                results[rank] = work(Member(self, rank))
            except BaseException as problem:
                problems.append(problem)
                self._barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            first = [p for p in problems if not isinstance(p, threading.BrokenBarrierError)]
            raise (first or problems)[0]
        return results

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class Member:
    """One rank of :class:`Threads`."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.world_size = rank, threads.world_size
        self.is_main = rank == 0
        self._threads = threads

    def gather_object(self, value: Any) -> list[Any]:
        return self._threads.gather(self.rank, value)

    def broadcast_object(self, value: Any) -> Any:
        return self._threads.gather(self.rank, value)[0]
