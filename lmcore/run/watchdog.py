"""Ends a run that makes no more progress, and writes the stacks of all threads.

The training loop calls :meth:`Watchdog.beat` at every step. A rank without a beat and without large writes to the disk for
``stuck_seconds`` raises an alarm. The run ends with code 71 if no other rank makes progress either: a rank that waits for a
long save or evaluation of another one is not stuck. :mod:`lmcore.run.peers` detects dead ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, final

from lmcore.disk import DISK, Disk
from lmcore.errors import EXIT_STUCK
from lmcore.run.peers import Peers, Standing

FIRST_STEP_FACTOR = 2
"""The first step may take this many times ``stuck_seconds``, because it may include compilation."""


def collective_seconds(stuck_seconds: float) -> int:
    """The shortest timeout of a collective operation with which the watchdog still acts first, at any step.

    NCCL aborts the process at its timeout, and the stacks of all threads are lost. One minute is added for the alarm itself,
    in which each rank writes its stacks and answers.

    >>> collective_seconds(1800)
    3660
    """
    return math.ceil(FIRST_STEP_FACTOR * stuck_seconds) + 60


@final
class Watchdog:
    """The watchdog of one rank.

    Args:
        logs: folder for ``stacks-rank-*.txt``.
        stuck_seconds: how long a run may make no progress; :data:`FIRST_STEP_FACTOR` times that until the first beat.
        note: called with the line that says which rank is stuck.
        on_end: called once, on one rank, with that line and code 71; writes ``status.json``, for example.
        peers: the connections to the other ranks, or ``None`` for a single process.
        leave: ends the process.
    """

    def __init__(
        self,
        *,
        logs: Path,
        rank: int = 0,
        stuck_seconds: float,
        note: Callable[[str], None],
        on_end: Callable[[str, int], None] | None = None,
        peers: Peers | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._path = logs / f"stacks-rank-{rank:05d}.txt"
        self._stuck_seconds, self._note, self._on_end = stuck_seconds, note, on_end
        self._peers, self._leave = peers, leave
        self._tick = min(1.0, max(0.1, stuck_seconds / 10))
        self._count, self._what, self._step = 0, "start", 0
        self._moved = time.monotonic() + (FIRST_STEP_FACTOR - 1) * stuck_seconds
        self._deadline = self._moved + stuck_seconds
        self._writes = Disk.large_writes
        self._closed = threading.Event()
        self._stacks: TextIO | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start watching."""
        DISK.makedirs(self._path.parent)
        self._stacks = open(self._path, "w")  # noqa: SIM115 - open as long as the process lives
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        if self._peers is not None:
            self._peers.standing, self._peers.stacks = self.standing, self._write_stacks
            self._peers.stuck_seconds, self._peers.on_wait = self._stuck_seconds, self._wait_on
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, what: str, step: int) -> None:
        """Record that this rank has reached ``what`` in ``step``."""
        self._what, self._step = what, step
        self._progress()

    def standing(self) -> Standing:
        """The progress of this rank, and how long ago it was made."""
        self._look_at_disk()
        seconds = max(0.0, time.monotonic() - self._moved)
        return Standing(count=self._count, what=self._what, step=self._step, seconds=seconds)

    def close(self) -> None:
        """Stop watching. A second call is a no-op."""
        if self._thread is None:
            return
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self._stacks is not None:
            self._stacks.close()
            with contextlib.suppress(OSError):
                if self._path.stat().st_size == 0:
                    self._path.unlink()

    def _progress(self) -> None:
        self._count += 1
        self._moved = time.monotonic()
        self._deadline = self._moved + self._stuck_seconds

    def _wait_on(self, seconds: float) -> None:
        """Extend the deadline, because another rank makes progress and this one waits for it."""
        self._deadline = max(self._deadline, time.monotonic() + seconds)

    def _look_at_disk(self) -> None:
        """Count large writes to the disk as progress: a checkpoint may take long to write."""
        if self._writes != Disk.large_writes:
            self._writes = Disk.large_writes
            self._progress()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            self._look_at_disk()
            # If C code holds the GIL, this thread is blocked as well. faulthandler's timer does not need the GIL: it then
            # writes the stacks and ends the process.
            remaining = max(self._deadline - time.monotonic(), 0.0) + 2 * self._stuck_seconds + 10
            faulthandler.dump_traceback_later(remaining, exit=True, file=self._stacks or sys.stderr)
            if time.monotonic() <= self._deadline or self._closed.is_set():
                continue
            if self._peers is not None:
                self._deadline = time.monotonic() + max(10.0, self._stuck_seconds)
                self._peers.raise_alarm()
            else:
                self._end()

    def _end(self) -> None:
        """End the only process of a run."""
        line = (
            f"rank 0 (pid {os.getpid()}) is stuck at {self._what}, step {self._step}: no progress for "
            f"{self._stuck_seconds:g} s"
        )
        self._write_stacks(line)
        self._note(line)
        if self._on_end is not None:
            self._on_end(line, EXIT_STUCK)
        self._leave(EXIT_STUCK)

    def _write_stacks(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full, or the file closed
            print(line, file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks or sys.stderr, all_threads=True)
