"""A command in a real terminal: what its screen and its scrollback show, and keys typed into it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pyte

INTERRUPT = "\x03"
NOT_A_PERSON = {"CI", "SLURM_JOB_ID", "JPY_PARENT_PID"}
"""Variables by which a program takes a terminal for a log that nobody looks at: CI sets them around these tests."""


class Terminal:
    """A pseudo-terminal of ``columns`` x ``lines`` with one command in it, in a session of its own.

    >>> with Terminal(["python", "train_lm.py"], cwd=folder) as terminal:
    ...     terminal.wait_for(lambda text: "step" in text)
    ...     terminal.type(INTERRUPT)
    ...     terminal.wait()
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        columns: int = 100,
        lines: int = 30,
    ) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._main, side = os.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

        def take_terminal() -> None:
            fcntl.ioctl(side, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal to the group

        person = {name: value for name, value in env.items() if name not in NOT_A_PERSON}
        self._process = subprocess.Popen(
            command, cwd=cwd, env={**person, "TERM": "xterm-256color"}, stdin=side, stdout=side, stderr=side,
            start_new_session=True, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(side)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._main)

    def type(self, keys: str) -> None:
        """Keys, as from a keyboard; ``INTERRUPT`` is Ctrl-C."""
        os.write(self._main, keys.encode())

    def _take(self, seconds: float) -> bool:
        """Read what has been written; whether there may be more."""
        if not select.select([self._main], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._main, 2**16)
        except OSError:  # the last process that had it open is gone
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def text(self) -> str:
        """Scrollback and screen, without empty lines at the end."""
        columns = self._screen.columns
        above = [
            "".join(line[column].data for column in range(columns)).rstrip()
            for line in self._screen.history.top
        ]
        return "\n".join([*above, *(line.rstrip() for line in self._screen.display)]).rstrip()

    def wait_for(self, there: Callable[[str], bool], *, seconds: float = 120) -> str:
        """The text once ``there`` is true of it."""
        end = time.monotonic() + seconds
        while not there(self.text()):
            if not self._take(0.1) or time.monotonic() > end:
                assert there(self.text()), self.text()
        return self.text()

    def wait(self, *, seconds: float = 120) -> int:
        """The exit code of the command, when it and all that it started have closed the terminal."""
        end = time.monotonic() + seconds
        while self._take(0.1):
            assert time.monotonic() < end, self.text()
        return self._process.wait(timeout=max(1.0, end - time.monotonic()))
