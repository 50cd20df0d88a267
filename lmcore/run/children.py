"""Programs started one after another, with their libraries imported once: the short runs of ``lmcore size``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcore.run.folder import RunFolder

PRELOADED = ["lmcore.run.trainer", "lmcore.engine.engine", "transformers", "accelerate"]
"""What every child needs: imported once, in the process that they are forks of."""


class Stopped(BaseException):
    """A signal asked to stop; the run that was going on has saved. No ``Exception``: it comes wherever the signal finds this
    process, and what handles the errors of a text or a library must let it through."""


def _child(program: str, words: list[str], log: str) -> None:
    """In a process of its own: a script or a module with its words, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [program, *words]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")


class Children:
    """Starts programs one after another, each in a fork of a process that has imported the libraries and done nothing else.

    SIGTERM, SIGINT and SIGHUP go to the child, which saves; then :class:`Stopped` is raised. Within :meth:`stopping_at_once`
    it is raised at once where there is no child.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._child: Any = None
        self._stopped = False
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Children:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Inside, a signal raises :class:`Stopped` wherever this process is, unless a child runs: tokenizing takes hours."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # inherited by a process that tokenizes, which ends with this one
        again, self._stopped = self._stopped, True
        if self._child is None and self._at_once and not again:
            raise Stopped
        self._tell_child(number)

    def _tell_child(self, number: int) -> None:
        if self._child is not None and self._child.pid is not None:
            # Ctrl-C reaches the child by itself, ``kill -INT`` of this process alone does not; another signal than SIGINT,
            # whose second one would end the child unsaved.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM if number == signal.SIGINT else number)

    def run(self, program: str, words: list[str], log: Path) -> tuple[int, float]:
        """Run to the end. Returns (exit code, seconds).

        Raises:
            Stopped: a signal came; the child has ended.
        """
        self.check()
        started = time.monotonic()
        self._child = self._context.Process(target=_child, args=(program, words, str(log)))
        self._child.start()
        if self._stopped:  # by a signal that came before the child could be told
            self._tell_child(signal.SIGTERM)
        while self._child.is_alive():
            self._child.join(0.2)
            if (self._folder.path / "STOP").exists() and not self._stopped:
                self._stopped = True
                self._tell_child(signal.SIGTERM)
        code, self._child = self._child.exitcode, None
        self.check()
        return code, time.monotonic() - started

    def check(self) -> None:
        """Raises :class:`Stopped` if a signal came."""
        if self._stopped:
            (self._folder.path / "STOP").unlink(missing_ok=True)
            raise Stopped
