"""Runs programs one after another and imports their libraries only once, for the short runs of ``lmcore size``."""

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
"""What every child needs; imported once, in the process from which all children are forked."""


class Stopped(BaseException):
    """A signal asked to stop, and the running child, if any, has saved. Not an ``Exception``: a signal handler raises it
    anywhere, and code that handles the errors of a text or a library must not catch it."""


def _child(program: str, words: list[str], log: str) -> None:
    """Run a script or module with its arguments in this child process, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [program, *words]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")


class Children:
    """Runs programs one after another, each in a fork of a process that has only imported the libraries.

    SIGTERM, SIGINT and SIGHUP are passed on to the child, which saves; then :class:`Stopped` is raised. Within
    :meth:`stopping_at_once` it is raised immediately if there is no child.
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
        """In this context a signal raises :class:`Stopped` immediately unless a child runs: tokenizing may take hours."""
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
            # Ctrl-C also reaches the child directly, ``kill -INT`` of this process does not. So SIGINT is passed on as
            # SIGTERM: a second SIGINT would end the child without saving.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM if number == signal.SIGINT else number)

    def run(self, program: str, words: list[str], log: Path) -> tuple[int, float]:
        """Run a program to its end. Returns (exit code, seconds).

        Raises:
            Stopped: a signal arrived, or the file STOP exists; the child has ended.
        """
        self.check()
        started = time.monotonic()
        self._child = self._context.Process(target=_child, args=(program, words, str(log)))
        self._child.start()
        if self._stopped:  # by a signal that arrived before there was a child to pass it on to
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
        """Raise :class:`Stopped` if a signal has arrived or the file STOP was found."""
        if self._stopped:
            (self._folder.path / "STOP").unlink(missing_ok=True)
            raise Stopped
