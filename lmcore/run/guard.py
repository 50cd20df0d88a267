"""What to do at a step boundary about signals, deadlines, stop files and numerical faults; and about stuck or dead ranks.

A signal only sets a flag. The ranks combine their flags at the step boundary (a run uses :mod:`lmcore.run.agreement`, your own
loop can use ``engine.agree``), so that all of them compute the same :class:`Verdict` from the same bits.

Example::

    guard = Guard(config.guard, run_dir=folder.path, rank=engine.rank, world_size=engine.world_size)
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
| a spot notice of the cloud (``guard.spot_notice``) | save and stop | 75 |
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
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, final

from lmcore.disk import DISK
from lmcore.errors import EXIT_FAULT, EXIT_SAVED, EXIT_STUCK, FaultError, RequestError
from lmcore.humanize import printable
from lmcore.run.anomalies import (
    Action,
    History,
    Policy,
    Report,
    decide,
    norm_limit,
)
from lmcore.run.peers import Peers, connect
from lmcore.run.spot_notice import SpotWatch
from lmcore.run.watchdog import Watchdog

if TYPE_CHECKING:
    from lmcore.config.schema import GuardConfig

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
    "SPOT",
    "STOP_FILE",
    "Action",
    "Guard",
    "Verdict",
    "die_with_parent",
    "leaving",
    "left_on_request",
    "report_dead_rank",
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
SPOT: Final = 1024

_WORDS: Final = {
    SIGTERM: "SIGTERM",
    SIGUSR1: "SIGUSR1",
    SIGINT: "SIGINT",
    SIGHUP: "SIGHUP",
    SPOT: "a spot notice",
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
"""A single Ctrl-C reaches a rank twice within this time: from the terminal, and from the launcher, which forwards it."""
_FILE_SECONDS: Final = 1.0
"""How often the run folder is checked for STOP and SAVE."""


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks do at this boundary. ``checkpoint_reason`` is the ``reason`` for ``Checkpoints.save``."""

    save: bool = False
    stop: bool = False
    rewind: bool = False
    exit_code: int = 0
    reason: str = ""
    checkpoint_reason: str = ""


def verdict(flags: int) -> Verdict:
    """The verdict for flags that were combined over all ranks. A pure function."""
    if not flags:
        return Verdict()
    reason = ", ".join(word for bit, word in _WORDS.items() if flags & bit)
    if flags & FAULT:  # after a fault nothing is saved: the last good checkpoint stays the newest
        return Verdict(stop=True, exit_code=EXIT_FAULT, reason=reason)
    if flags & (SIGTERM | SIGUSR1 | SIGINT | SIGHUP | SPOT):
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
    """The guard of one rank. Create it on every rank.

    Args:
        options: ``guard.*``; :class:`lmcore.config.schema.GuardConfig`.
        run_dir: the folder that rank 0 checks for SAVE and STOP, and that contains ``logs``.
        max_minutes: stop this long after the construction of this object; ``None`` for no limit.
        note: called with one line per event.
        environ: the environment, for ``SLURM_JOB_END_TIME``, ``LOCAL_RANK`` and ``LMCORE_METADATA_URL``.
    """

    def __init__(
        self,
        options: GuardConfig,
        *,
        run_dir: Path | str,
        rank: int = 0,
        world_size: int = 1,
        max_minutes: float | None = None,
        note: Callable[[str], None] = print,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.policy = Policy(
            max_skips=options.max_skips,
            max_rewinds=options.max_rewinds,
            spike=options.spike,
            window=max(8, options.spike_window),
            sigma=options.spike_sigma,
        )
        self.history = History()
        self._run_dir, self._rank, self._world_size = Path(run_dir), rank, world_size
        self._stuck_seconds, self._note = options.stuck_seconds, note
        self._margin = options.stop_before_deadline_seconds
        now = time.monotonic()
        self._stop_at = now + max_minutes * 60 if max_minutes else math.inf
        environ = os.environ if environ is None else environ
        left = _seconds_to_job_end(environ)
        self._job_ends = now + left
        if self._margin > max(0.0, left / 2):
            self._margin = max(0.0, left / 2)
            if rank == 0:
                note(
                    f"guard.stop_before_deadline_seconds {options.stop_before_deadline_seconds:g} is more than half of "
                    f"the {max(0.0, left):.0f} s that this job has left: stopping {self._margin:.0f} s before its end"
                )
        self._signalled = 0
        self._taken_away = math.inf
        """When the cloud takes this machine away, according to its notice."""
        self._messages: list[str] = []
        self._spot: SpotWatch | None = None
        # Only one rank of each machine asks.
        if options.spot_notice is not None and environ.get("LOCAL_RANK", "") in ("", "-1", "0"):
            self._spot = SpotWatch(
                options.spot_notice,
                on_notice=self._on_spot_notice,
                note=self._messages.append,
                environ=environ,
            )
        self._first_sigint = math.inf
        self._next_look = 0.0
        self._pid = os.getpid()
        self._training = True
        self._before: dict[int, Any] = {}
        self._watchdog: Watchdog | None = None
        self._peers: Peers | None = None
        self._on_end: Callable[[str, int], None] | None = None

    # ---- signals ------------------------------------------------------------------------------------------

    def install(self, *, training: bool = True, on_end: Callable[[str, int], None] | None = None) -> None:
        """Install the signal handlers, and ask the kernel for a signal when the launcher dies. Main thread only.

        With ``training=False`` (before the loop, while the corpus is prepared and nothing can be saved) a signal ends the
        process at once with code 75 instead of setting a flag, until :meth:`begin` is called.

        Args:
            on_end: called on one rank before the process ends, with a line that names the rank that ends the run, and the
                exit code.
        """
        self._training = training
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN and number in (signal.SIGHUP, signal.SIGINT):
                continue  # started under nohup, or in the background of a script: the signal stays ignored
            self._before[number] = signal.signal(number, self._on_signal)
        if self._spot is not None:
            self._spot.start()
        die_with_parent()
        self._peers = connect(os.environ) if self._world_size > 1 else None
        self._on_end = on_end
        if self._peers is not None:
            self._peers.note, self._peers.on_end = self._note, on_end

    def begin(self) -> None:
        """From now on signals only set flags, because there is something to save."""
        self._training = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker inherits the handler, but must work until the trainer ends it
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

    def _on_spot_notice(self, seconds: float) -> None:
        """Called on the thread of :class:`SpotWatch`."""
        self._messages.append(f"spot notice: this machine will be taken away in {seconds:.0f} s")
        self._taken_away = time.monotonic() + seconds
        if not self._training:
            os.kill(self._pid, signal.SIGTERM)  # nothing can be saved: end at once, as for a signal

    @property
    def signalled(self) -> bool:
        """Whether this rank has received a signal or notice that asks it to save and stop."""
        return self._signalled != 0 or self._taken_away < math.inf

    @property
    def signals(self) -> str:
        """The names of the received signals; empty if there are none."""
        return verdict(self._signalled).reason

    def close(self, *, give_signals_back: bool = False) -> None:
        """Tell the others that this rank has finished, so that they do not take its end for a crash.

        The signal handlers stay installed, so that a second SIGTERM in the last moments does not turn "saved" or "finished"
        into "killed". ``give_signals_back`` restores the previous handlers, for a process that continues.
        """
        if self._spot is not None:
            self._spot.close()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if self._peers is not None:
            self._peers.done()
        if give_signals_back and threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    # ---- flags --------------------------------------------------------------------------------------------

    def flags(self, *, reserve_seconds: float = 0.0) -> int:
        """The bits of this rank, to be combined over ranks. Cheap: checks the disk at most once a second.

        ``reserve_seconds``: the known duration of a save, which is added to the margin before a deadline.
        """
        now = time.monotonic()
        while self._messages:
            self._note(self._messages.pop(0))
        flags = self._signalled | (SPOT if self._taken_away < math.inf else 0)
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

    def seconds_left(self) -> float:
        """Seconds until Slurm ends the job or the cloud takes the machine, minus 5 s to exit in; infinity without such an end."""
        return min(self._job_ends, self._taken_away) - time.monotonic() - 5.0

    @staticmethod
    def verdict(flags: int) -> Verdict:
        """See :func:`verdict`."""
        return verdict(flags)

    def done(self, flags: int) -> None:
        """Remove the file STOP or SAVE (rank 0), after the checkpoint that these flags asked for."""
        names = [name for bit, name in ((STOP_FILE, "STOP"), (SAVE_FILE, "SAVE")) if flags & bit]
        for name in names if self._rank == 0 else []:
            # Somebody else may have removed it, or the disk may be read-only now.
            with contextlib.suppress(OSError):
                DISK.unlink(self._run_dir / name)

    # ---- numerical faults ---------------------------------------------------------------------------------

    def after_step(
        self, step: int, positions: tuple[int, int], loss: float, norm: float, applied: bool
    ) -> Action:
        """Check one step; call it in the order of the steps, with numbers that are the same on all ranks.

        ``positions`` are [first, stop) of the step. The report may come one step late, but every step up to a checkpoint
        must have been reported before :meth:`state_dict` is called for it.
        """
        report = Report(step=step, loss=loss, norm=norm, applied=applied, positions=positions)
        self.history, action = decide(self.history, self.policy, report)
        return action

    def norm_limit(self, step: int) -> float:
        """Gradient norm above which the update of ``step`` is not applied (policy skip); infinity for other policies."""
        return norm_limit(self.history, self.policy, step)

    def state_dict(self) -> dict[str, Any]:
        """The history of the decisions, for ``state.json``."""
        return self.history.to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.history = History.from_json(state)

    def rewound(self, state: Mapping[str, Any]) -> None:
        """Load the history of the checkpoint after a rewind, but keep the rewinds so far."""
        self.history = replace(History.from_json(state), rewinds=self.history.rewinds)

    # ---- stuck and dead ranks -----------------------------------------------------------------------------

    def watch(self) -> None:
        """Start the watchdog: from now on a run without progress for ``guard.stuck_seconds`` is stuck."""
        self._watchdog = Watchdog(
            logs=self._run_dir / "logs",
            rank=self._rank,
            stuck_seconds=self._stuck_seconds,
            note=self._note,
            on_end=self._on_end,
            peers=self._peers,
        )
        self._watchdog.start()

    def beat(self, what: str, step: int) -> None:
        """Tell the watchdog that this rank has reached ``what``. Call it at least every ``guard.stuck_seconds``."""
        if self._watchdog is not None:
            self._watchdog.beat(what, step)


def wait_for_peers() -> None:
    """Wait until the ranks are connected, before their first collective, so that the death of any rank is noticed and named."""
    peers = connect(os.environ)
    if peers is not None:
        peers.wait_until_met()


def report_dead_rank(*, wait_seconds: float = 1.5) -> int | None:
    """After an error of a lost connection, which does not say whose it was: report which rank has died, if one has.

    Returns the exit code after it has reported the rank and called ``on_end`` of :meth:`Guard.install`; ``None`` if no rank
    has died.
    """
    peers = connect(os.environ)
    fault = None if peers is None else peers.wait_for_fault(wait_seconds)
    if peers is None or fault is None:
        return None
    peers.report(fault)
    return peers.fault_code


_LOST_CONNECTION: Final = re.compile(
    r"/gloo/|connection (closed|reset)|broken pipe|monitoredBarrier|a rank (is dead or stuck|was too slow)",
    re.IGNORECASE,
)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective only says that another rank is gone, but not why."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # without importing torch
    return of_torch or (isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None)


def report_reason_of_other_rank(error: BaseException, *, wait_seconds: float = 0.5) -> int | None:
    """If ``error`` is that of a lost connection and another rank has sent the reason why it ends, report both.

    A rank sends its reason before it closes its connections. Returns its exit code, or ``None``; in that case
    :func:`report_dead_rank` may know more.
    """
    peers = connect(os.environ)
    if peers is None or not _is_lost_connection(error):
        return None
    fault = peers.wait_for_reason(wait_seconds)
    if fault is None or peers.reason is None:
        return None
    peers.report(fault)
    return peers.fault_code


def let_rank_0_speak(*, wait_seconds: float = 2.0) -> None:
    """On other ranks than 0, after they have sent their reason and closed their connections: wait until rank 0 has ended.

    A launcher ends all ranks when the first one exits, perhaps before rank 0 has written the reason.
    """
    peers = connect(os.environ)
    if peers is not None and peers.rank != 0:
        peers.wait_for_fault(wait_seconds)


def leaving(error: BaseException | None) -> None:
    """Announce that this rank is ending with an error of its own, so that the end of another rank does not interrupt it.

    The others are told of a ``RequestError`` or ``FaultError``, and end with it as well, and of any other error that is not
    a lost connection. ``None``: the error is not known yet.
    """
    peers = connect(os.environ)
    if peers is None:
        return
    if isinstance(error, RequestError | FaultError):
        peers.leaving(str(error), error.exit_code)
    elif isinstance(error, Exception) and not _is_lost_connection(error):
        line = " ".join(printable(f"{type(error).__name__}: {error}").split())
        peers.leaving(error=line, code=EXIT_STUCK)
    else:
        peers.leaving()


@contextlib.contextmanager
def refusals_reach_other_ranks() -> Iterator[None]:
    """In this context a ``RequestError`` or ``FaultError`` of this rank ends the others, too; see :func:`leaving`."""
    try:
        yield
    except (RequestError, FaultError) as error:
        leaving(error)
        raise


_LAUNCHERS: Final = ("accelerate", "torchrun", "torch.distributed", "deepspeed")


def die_with_parent(number: int = signal.SIGTERM) -> bool:
    """Ask the kernel for a signal when the launcher dies. Returns whether that was done. Linux only.

    ``accelerate launch`` of one process dies of SIGTERM without telling its trainer, and ``torchrun`` of SIGUSR1. The
    orphaned trainer would continue and occupy the device, or be killed without saving. Only under a launcher: a trainer
    that was started from a shell with ``nohup`` must outlive the shell.

    Raises:
        SystemExit: the launcher is already dead (code 75: nothing was done yet).
    """
    if not sys.platform.startswith("linux"):
        return False
    parent, command = os.getppid(), ""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
    if not any(word in command for word in _LAUNCHERS):
        # If the launcher has died already, the parent is process 1, and only the environment tells of the launcher.
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        if launched and os.getppid() == 1:
            raise SystemExit(EXIT_SAVED)
        return False
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    done = ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(number), 0, 0, 0) == 0
    if os.getppid() != parent:  # it died before the request reached the kernel
        raise SystemExit(EXIT_SAVED)
    return done


def left_on_request(run_dir: Path | str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether torch's launcher has restarted this rank (``--max_restarts``) although the run had saved and exited because of
    a signal, a deadline or the file STOP. Such restarts are meant for crashes.
    """
    count = (os.environ if environ is None else environ).get("TORCHELASTIC_RESTART_COUNT", "0")
    if count in ("", "0"):
        return False
    try:
        path = Path(run_dir) / "status.json"
        status = json.loads(path.read_bytes()) if path.is_file() else {}  # reading a FIFO would block
        now = ("saved", socket.gethostname(), os.getppid())
        return (status["state"], status["host"], status["parent_pid"]) == now
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _seconds_to_job_end(environ: Mapping[str, str]) -> float:
    """Seconds until Slurm ends the job, by the current wall clock; infinity if Slurm gives no end time."""
    try:
        return float(environ["SLURM_JOB_END_TIME"]) - time.time()
    except (KeyError, ValueError):
        return math.inf
