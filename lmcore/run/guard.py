"""What to do at this step boundary: signals, deadlines, stop files, numerical faults, stuck ranks.

Comes in: signals, clocks, files in the run folder, and one report per step. Goes out: a few bits that the
ranks combine with "or", and a :class:`Verdict` of them; an ``Action`` for each report. What always holds: a
signal only sets a flag; all ranks act on the same bits at the same boundary; whatever the launcher does, a
trainer whose launcher died is told.

Example::

    guard = Guard(run_dir=folder.path, rank=engine.rank, world_size=engine.world_size)
    guard.install()
    while step < total:
        ...                                              # one step
        guard.beat("step", step)
        verdict = guard.verdict(engine.agree(guard.flags()))
        if verdict.save: ...
        if verdict.stop: sys.exit(verdict.exit_code)

| what happens | flag | exit code |
|---|---|---|
| SIGTERM, SIGUSR1, SIGHUP, first SIGINT | save and stop | 75 |
| second SIGINT, more than 2 s later | none: ends at once | 130 (by signal) |
| ``SLURM_JOB_END_TIME`` or ``max_minutes`` near | save and stop | 75 |
| file ``STOP`` in the run folder | save and stop | 75 |
| file ``SAVE`` in the run folder | save | - |
| a failed save under policy stop, ``Action`` stop | stop | 70 |
| a dead or stuck rank | ends at once | 71 |
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, final

from lmcore.disk import DISK
from lmcore.errors import EXIT_FAULT, EXIT_SAVED, RequestError
from lmcore.run.anomalies import (
    SPIKE_POLICIES,
    Action,
    History,
    Policy,
    Report,
    decide,
    norm_limit,
)
from lmcore.run.watchdog import EXIT_STUCK, Watchdog

__all__ = [
    "DEADLINE",
    "EXIT_STUCK",
    "FAULT",
    "MAX_MINUTES",
    "REWIND",
    "SAVE_FILE",
    "SIGHUP",
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
    "STOP_FILE",
    "Action",
    "Guard",
    "Verdict",
    "die_with_parent",
    "left_on_request",
    "verdict",
]

SIGTERM: Final = 1
SIGUSR1: Final = 2
SIGINT: Final = 4
SIGHUP: Final = 8
DEADLINE: Final = 16
MAX_MINUTES: Final = 32
STOP_FILE: Final = 64
SAVE_FILE: Final = 128
FAULT: Final = 256
REWIND: Final = 512

_WORDS: Final = {
    SIGTERM: "SIGTERM",
    SIGUSR1: "SIGUSR1",
    SIGINT: "SIGINT",
    SIGHUP: "SIGHUP",
    DEADLINE: "the job's end time is near",
    MAX_MINUTES: "train.max_minutes is reached",
    STOP_FILE: "the file STOP",
    SAVE_FILE: "the file SAVE",
    FAULT: "a fault",
    REWIND: "a rewind",
}
_SIGNALS: Final = {
    signal.SIGTERM: SIGTERM,
    signal.SIGUSR1: SIGUSR1,
    signal.SIGINT: SIGINT,
    signal.SIGHUP: SIGHUP,
}
_SECOND_SIGINT_SECONDS: Final = 2.0
"""Ctrl-C reaches a rank twice within moments: from the terminal, and once more from the launcher that
forwards it.
"""
_FILE_SECONDS: Final = 1.0
"""How often the run folder is asked for STOP and SAVE."""


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks do at this boundary. ``checkpoint_reason`` is the ``reason`` for
    ``Checkpoints.save``.
    """

    save: bool = False
    stop: bool = False
    rewind: bool = False
    exit_code: int = 0
    reason: str = ""
    checkpoint_reason: str = ""


def verdict(flags: int) -> Verdict:
    """The verdict of flags that were combined over all ranks. Pure."""
    if not flags:
        return Verdict()
    reason = ", ".join(word for bit, word in _WORDS.items() if flags & bit)
    if flags & FAULT:  # nothing is saved on top of a fault: the last good checkpoint stands
        return Verdict(stop=True, exit_code=EXIT_FAULT, reason=reason)
    if flags & (SIGTERM | SIGUSR1 | SIGINT | SIGHUP):
        kind = "signal"
    elif flags & (DEADLINE | MAX_MINUTES):
        kind = "deadline"
    elif flags & STOP_FILE:
        kind = "stop file"
    else:
        kind = "save file" if flags & SAVE_FILE else ""
    stop = kind not in ("save file", "")
    return Verdict(
        save=bool(kind),
        stop=stop,
        rewind=bool(flags & REWIND),
        exit_code=EXIT_SAVED if stop else 0,
        reason=reason,
        checkpoint_reason=kind,
    )


@final
class Guard:
    """The guard of one rank. Made on every rank.

    Args:
        run_dir: where SAVE and STOP are looked for (rank 0) and ``logs`` lies.
        max_minutes: stop this long after the making of this object; ``None`` for no limit.
        stop_before_deadline_seconds: how long before the job's end (``SLURM_JOB_END_TIME``) to stop; at most half of
            the time that is left at the beginning, so that every piece of a run gets on.
        max_skips, max_rewinds, spike, spike_window, spike_sigma: see ``lmcore/run/anomalies.py``.
        stuck_seconds: no step boundary for this long means stuck; 0 for never.
        say: gets one line for everything worth knowing.
    """

    def __init__(
        self,
        *,
        run_dir: Path | str,
        rank: int = 0,
        world_size: int = 1,
        max_minutes: float | None = None,
        stop_before_deadline_seconds: float = 120.0,
        max_skips: int = 5,
        max_rewinds: int = 3,
        spike: str = "warn",
        spike_window: int = 128,
        spike_sigma: float = 6.0,
        stuck_seconds: float = 0.0,
        say: Callable[[str], None] = print,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        if spike not in SPIKE_POLICIES:
            raise RequestError(f"guard.spike {spike!r}: choose one of {', '.join(SPIKE_POLICIES)}")
        self.policy = Policy(
            max_skips=max_skips,
            max_rewinds=max_rewinds,
            spike=spike,
            window=max(8, spike_window),
            sigma=spike_sigma,
        )
        self.history = History()
        self._run_dir, self._rank, self._world_size = Path(run_dir), rank, world_size
        self._stuck_seconds, self._say = stuck_seconds, say
        self._margin = stop_before_deadline_seconds
        now = time.monotonic()
        self._stop_at = now + max_minutes * 60 if max_minutes else math.inf
        left = _seconds_to_job_end(os.environ if environ is None else environ)
        self._job_ends = now + left
        if self._margin > max(0.0, left / 2):
            self._margin = max(0.0, left / 2)
            if rank == 0:
                say(
                    f"guard.stop_before_deadline_seconds {stop_before_deadline_seconds:g} is more than half of the "
                    f"{max(0.0, left):.0f} s that this job has left: {self._margin:.0f} s are kept free instead"
                )
        self._signalled = 0
        self._raised = 0
        self._first_sigint = math.inf
        self._next_look = 0.0
        self._pid = os.getpid()
        self._training = True
        self._before: dict[int, Any] = {}
        self._watchdog: Watchdog | None = None
        self._excepthook = sys.excepthook

    # ---- signals ------------------------------------------------------------------------------------------

    def install(self, *, training: bool = True) -> None:
        """Take the signals, and ask to be told when the launcher dies. Main thread only.

        With ``training=False`` (before the loop, while the corpus is prepared and nothing can be saved) a
        signal leaves at once with code 75 instead of setting a flag; :meth:`begin` ends that.
        """
        self._training = training
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN and number in (signal.SIGHUP, signal.SIGINT):
                continue  # started under nohup, or in the background of a script: stay deaf as asked
            self._before[number] = signal.signal(number, self._on_signal)
        die_with_parent()

    def begin(self) -> None:
        """From now on signals only set flags: there is something to save."""
        self._training = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # inherited by a forked data worker, which must serve until its trainer lets it go
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._first_sigint > _SECOND_SIGINT_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(self._pid, signal.SIGINT)
                return
            self._first_sigint = min(self._first_sigint, now)
        self._signalled |= _SIGNALS[signal.Signals(number)]
        if not self._training:
            raise SystemExit(EXIT_SAVED)

    def close(self, *, give_signals_back: bool = False) -> None:
        """Leave in good order: before the last barrier, so that no rank takes this for a fault.

        The signals stay taken, so that a second SIGTERM in the last moments does not turn "saved" or
        "finished" into "killed"; ``give_signals_back`` is for a process that lives on.
        """
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
            sys.excepthook = self._excepthook
        if give_signals_back and threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    # ---- flags --------------------------------------------------------------------------------------------

    def raise_flag(self, flag: int) -> None:
        """Set a bit of one's own (``FAULT``, ``REWIND``) for the next :meth:`flags`."""
        self._raised |= flag

    def flags(self, *, reserve_seconds: float = 0.0) -> int:
        """The bits of this rank, to be combined over ranks. Cheap: asks the disk once a second at most.

        ``reserve_seconds``: what a save is known to take; added to the margin before a deadline.
        """
        now = time.monotonic()
        flags, self._raised = self._signalled | self._raised, 0
        if now + reserve_seconds >= self._stop_at:
            flags |= MAX_MINUTES
        if now + reserve_seconds + self._margin >= self._job_ends:
            flags |= DEADLINE
        if self._rank == 0 and now >= self._next_look:
            self._next_look = now + _FILE_SECONDS
            if (self._run_dir / "STOP").exists():
                flags |= STOP_FILE
            if (self._run_dir / "SAVE").exists():
                flags |= SAVE_FILE
        return flags

    @staticmethod
    def verdict(flags: int) -> Verdict:
        """See :func:`verdict`."""
        return verdict(flags)

    def done(self, flags: int) -> None:
        """The checkpoint that these flags asked for is committed: take the file that asked for it away (rank
        0).
        """
        names = [name for bit, name in ((STOP_FILE, "STOP"), (SAVE_FILE, "SAVE")) if flags & bit]
        for name in names if self._rank == 0 else []:
            with contextlib.suppress(
                OSError
            ):  # somebody else may have taken it away, or the disk is read-only now
                DISK.unlink(self._run_dir / name)

    # ---- numerical faults ---------------------------------------------------------------------------------

    def after_step(
        self, step: int, positions: tuple[int, int], loss: float, norm: float, applied: bool
    ) -> Action:
        """Judge one step; call it in the order of the steps, with numbers that are the same on all ranks.

        ``positions`` are [first, stop) of the step. The report may come a step late, but every step up to a
        checkpoint must have been reported before :meth:`state_dict` is taken for it.
        """
        report = Report(step=step, loss=loss, norm=norm, applied=applied, positions=positions)
        self.history, action = decide(self.history, self.policy, report)
        return action

    def norm_limit(self, step: int) -> float:
        """Gradient norm above which the update of ``step`` is not to be applied (policy skip); else
        infinity.
        """
        return norm_limit(self.history, self.policy, step)

    def state_dict(self) -> dict[str, Any]:
        """For ``state.json``."""
        return self.history.to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = History.from_json(state)

    def rewound(self, state: Mapping[str, Any]) -> None:
        """After a rewind: the history of the checkpoint, but the count of rewinds goes on."""
        self.history = replace(History.from_json(state), rewinds=self.history.rewinds)

    # ---- stuck and dead ranks -----------------------------------------------------------------------------

    def watch(self, *, session: str, on_end: Callable[[str], None] | None = None) -> None:
        """Begin to watch the other ranks (and this one). ``session``: one word for all ranks of this
        start.
        """
        self._watchdog = Watchdog(
            logs=self._run_dir / "logs",
            rank=self._rank,
            world_size=self._world_size,
            session=session,
            stuck_seconds=self._stuck_seconds,
            say=self._say,
            on_end=on_end,
        )
        self._watchdog.start()
        self._excepthook = sys.excepthook
        sys.excepthook = self._on_crash

    def _on_crash(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """A lost connection says that a peer is gone, but not which: look, before this process ends as
        well.
        """
        self._excepthook(kind, error, trace)
        if self._watchdog is not None:
            self._watchdog.name_the_dead()

    def beat(self, what: str, step: int, *, allow_seconds: float | None = None) -> None:
        """This rank has reached ``what``. Before something that takes longer than a step:
        ``allow_seconds``.
        """
        if self._watchdog is not None:
            self._watchdog.beat(what, step, allow_seconds)


def die_with_parent(number: int = signal.SIGTERM) -> bool:
    """Ask the kernel for a signal when the launcher dies; says whether that was done.

    ``accelerate launch`` of one process dies of SIGTERM without a word to its trainer, and ``torchrun`` of
    SIGUSR1; the orphan would go on and hold the device, or be killed unsaved. Only under a launcher: a
    trainer that was started from a shell with ``nohup`` must outlive the shell. Linux only.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    if not any(word in command for word in ("accelerate", "torchrun", "torch.distributed", "deepspeed")):
        return False
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    return ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(number), 0, 0, 0) == 0


def left_on_request(run_dir: Path | str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether torch's launcher starts this rank again (``--max_restarts``) although the run has saved and left as it
    was asked to, by a signal, a deadline or the file STOP. Such restarts are meant for crashes.
    """
    count = (os.environ if environ is None else environ).get("TORCHELASTIC_RESTART_COUNT", "0")
    if count in ("", "0"):
        return False
    try:
        status = json.loads((Path(run_dir) / "status.json").read_bytes())
        now = ("saved", socket.gethostname(), os.getppid())
        return (status["state"], status["host"], status["parent_pid"]) == now
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seconds_to_job_end(environ: Mapping[str, str]) -> float:
    """Seconds until Slurm ends the job, by the wall clock at this moment; infinity if it does not say."""
    try:
        return float(environ["SLURM_JOB_END_TIME"]) - time.time()
    except (KeyError, ValueError):
        return math.inf
