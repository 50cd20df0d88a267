"""Sees that a rank is dead or stuck, names it, writes everybody's stacks, and ends the process; part of
``guard.py``.

Comes in: a beat at every step boundary of this rank. Goes out: nothing while all is well; otherwise one line
that names the rank, ``logs/stacks-rank-*.txt``, and a non-zero exit. What always holds: it costs a step
nothing but a counter; no message passing is needed, because the network may be what is stuck: ranks see one
another by small files in the run folder, and by process number where they share a machine.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO, final

from lmcore.disk import DISK

EXIT_STUCK: Final = 71
"""A rank was dead or stuck; the process ended itself so that the launcher can start all of them again."""
_STACKS_SECONDS: Final = 5.0
"""How long the other ranks of this machine get to write their stacks, at most: on busy cores it is not at once."""


def _process(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process on this machine; ``None`` if there is none, or it is a
    zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], fields[19])


@final
class Watchdog:
    """One per rank. :meth:`start` begins to watch; :meth:`beat` says that this rank has moved on.

    Args:
        logs: the run folder's ``logs``, seen by all ranks.
        session: the same word on all ranks of this start and on no other: files of earlier starts are
            ignored.
        stuck_seconds: a rank without a beat for this long is stuck; 0 switches that part off.
        say: gets the line that names the rank (on every rank that sees it).
        on_end: called once, on the lowest rank that is well (or of all, where none is), with the line: to write
            ``status.json``.
    """

    def __init__(
        self,
        *,
        logs: Path,
        rank: int,
        world_size: int,
        session: str,
        stuck_seconds: float,
        say: Callable[[str], None],
        on_end: Callable[[str], None] | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._folder, self._rank, self._world_size, self._session = logs, rank, world_size, session
        self._stuck_seconds, self._say, self._on_end, self._leave = stuck_seconds, say, on_end, leave
        self._tick = min(1.0, max(0.1, stuck_seconds / 10)) if stuck_seconds else 1.0
        self._count, self._what, self._step = 0, "start", 0
        self._deadline = time.monotonic() + stuck_seconds
        self._closed = threading.Event()
        self._peers: dict[int, dict[str, Any]] = {}
        self._written = -1
        self._failed = False
        self._roll_call = logs / ".roll-call.json"
        self._answered = 0
        self._stacks: TextIO | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write the first sign of life and begin to watch."""
        DISK.makedirs(self._folder)
        for earlier in self._folder.glob(".told-*") if self._rank == 0 else ():
            with contextlib.suppress(OSError):
                earlier.unlink()
        self._stacks = open(self._stacks_path(self._rank), "w")  # noqa: SIM115 - lives as long as the process
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        self._publish(done=False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, what: str, step: int, allow_seconds: float | None = None) -> None:
        """This rank has reached ``what``; the next beat is due within ``allow_seconds`` (default:
        stuck_seconds).
        """
        self._count += 1
        self._what, self._step = what, step
        self._deadline = time.monotonic() + (self._stuck_seconds if allow_seconds is None else allow_seconds)

    def close(self) -> None:
        """This rank leaves in good order; nobody takes its death for a fault."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        self._thread = None
        self._publish(done=True)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self._stacks is not None:
            self._stacks.close()
            path = self._stacks_path(self._rank)
            if path.stat().st_size == 0:
                path.unlink()

    def dead_peers(self) -> list[str]:
        """Ranks on this machine whose process is gone though they have not left in good order, in words."""
        self._read_peers()
        return [
            f"rank {rank} (pid {peer['pid']} on {peer['host']}) is dead; its last word was {_last_word(peer)}"
            for rank in self._dead()
            for peer in [self._peers[rank]]
        ]

    def name_the_dead(self, *, wait_seconds: float = 2.0, answer_seconds: float = 4.0) -> None:
        """Say which ranks are dead: on this machine by looking, on another one by asking for a sign of life.

        A process that is just dying is waited for; a rank that says in time that it fails itself is not accused.
        """
        self._failed = True
        self._publish(done=False)
        give_up = time.monotonic() + wait_seconds
        while not (dead := self.dead_peers()) and time.monotonic() < give_up:
            time.sleep(0.05)
        ranks = self._dead()
        if not dead:
            ranks = self._silent_elsewhere(answer_seconds)
            dead = [
                f"rank {rank} (pid {peer['pid']} on {peer['host']}) gives no sign of life; its last word was "
                f"{_last_word(peer)}"
                for rank, peer in self._peers.items()
                if rank in ranks
            ]
        if dead and not self._closed.is_set():
            self._closed.set()  # the thread need not say the same once more
            line = "; ".join(dead)
            self._tell(line)
            self._report_end(line, ranks)

    def _silent_elsewhere(self, seconds: float) -> list[int]:
        """A roll call: ranks of other machines whose watchdog does not answer within ``seconds``."""
        self._read_peers(again=True)
        asked = {
            rank: peer["beat_time"]
            for rank, peer in self._peers.items()
            if not self._here(peer) and not peer["done"] and not peer["failed"]
        }
        if not asked:
            return []
        with contextlib.suppress(OSError):
            DISK.write_json(self._roll_call, {"session": self._session, "time": time.time()}, durable=False)
        give_up = time.monotonic() + seconds
        while asked and time.monotonic() < give_up:
            time.sleep(0.1)
            self._read_peers(again=True)
            asked = {
                rank: before for rank, before in asked.items() if self._peers[rank]["beat_time"] == before
            }
        return sorted(asked)

    def _answer(self) -> None:
        """Give a sign of life if another machine has asked for one since the last look. One look at one file."""
        with contextlib.suppress(OSError):
            if (asked := self._roll_call.stat().st_mtime_ns) != self._answered:
                self._answered = asked
                self._publish(done=False)

    def _tell(self, line: str) -> None:
        """To the log of this rank, and to the console whatever the rank (rank 0's log goes there by
        itself).
        """
        if self._rank != 0:
            with contextlib.suppress(OSError, ValueError):  # the launcher may be gone, and the pipe with it
                print(line, file=sys.stderr, flush=True)
        self._say(line)

    def _report_end(self, line: str, ranks: list[int]) -> None:
        """The lowest rank that is well tells of the end, or where all are at fault the lowest that knows it: once.

        The others leave after it: a launcher ends them all when the first one leaves.
        """
        self._read_peers(again=True)
        ending = {self._rank, *(rank for rank, peer in self._peers.items() if peer["failed"])}
        speaker = min({*self._peers, self._rank}.difference(ranks) or ending)
        if speaker == self._rank:
            if self._on_end is not None and self._is_first_to_tell():
                self._on_end(line)
            return
        give_up, peer = time.monotonic() + _STACKS_SECONDS, self._peers[speaker]
        while peer["failed"] and self._here(peer) and _lives(peer) and time.monotonic() < give_up:
            time.sleep(0.05)

    def _is_first_to_tell(self) -> bool:
        """Of all ranks of this start: they do not see the same at the same moment."""
        try:
            os.close(os.open(self._folder / f".told-{self._session}", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        except FileExistsError:
            return False
        except OSError:
            return True  # the disk is full, or read-only now: told twice is better than never
        return True

    # ---- the thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            if self._stuck_seconds and self._stacks is not None:
                # If a C function keeps the interpreter to itself, this thread stands still as well; then this
                # clock, which needs no interpreter, writes the stacks and ends the process.
                remaining = max(self._deadline - time.monotonic(), 0.0) + 2 * self._stuck_seconds + 10
                faulthandler.dump_traceback_later(remaining, exit=True, file=self._stacks)
            if self._written != self._count:
                self._publish(done=False)
            if len(self._peers) < self._world_size - 1:
                self._read_peers()
            if any(not self._here(peer) for peer in self._peers.values()):
                self._answer()
            dead = self._dead()
            if dead and not self._closed.is_set():
                self._end(dead, "dead")
                return
            if self._stuck_seconds and time.monotonic() > self._deadline and not self._closed.is_set():
                self._end(self._culprits(), "stuck")
                return

    def _end(self, ranks: list[int], state: str) -> None:
        """Name them, write the stacks of all ranks of this machine, and end."""
        self._failed = True  # nobody is to take the end of this rank for the cause
        self._publish(done=False)
        words = "; ".join(
            f"rank {rank} (pid {self._peers[rank]['pid']} on {self._peers[rank]['host']}, "
            f"last word {_last_word(self._peers[rank])})"
            if rank in self._peers
            else f"rank {rank} (this one, at {self._what}, step {self._step})"
            for rank in ranks
        )
        line = f"{words} {'is' if len(ranks) == 1 else 'are'} {state}"
        if state == "stuck":
            line += f": no progress for {self._stuck_seconds:g} s"
        line += (
            f"; seen at step {self._step} by rank {self._rank}; stacks in {self._folder}/stacks-rank-*.txt"
        )
        self._tell(line)
        if self._stacks is not None:
            print(line, file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        neighbours = [
            rank for rank, peer in self._peers.items() if not self._is_dead(rank, peer) and self._here(peer)
        ]
        for rank in neighbours:
            # Its stacks, written by C code even if its interpreter stands still.
            _signal(self._peers[rank], signal.SIGUSR2)
            # A stopped process writes them as soon as it runs again.
            _signal(self._peers[rank], signal.SIGCONT)
        self._await_stacks(neighbours)
        self._report_end(line, ranks)
        for rank in ranks if self._rank not in ranks else []:
            if self._here(self._peers[rank]):
                _signal(self._peers[rank], signal.SIGKILL)  # the run is over; do not let it hold the device
        self._leave(EXIT_STUCK)

    def _await_stacks(self, ranks: list[int]) -> None:
        """Until the stacks of these ranks are there and grow no more, as far as the ranks are; not for ever."""
        give_up, before = time.monotonic() + _STACKS_SECONDS, None
        while time.monotonic() < give_up:
            time.sleep(0.25)
            sizes = []
            for rank in ranks:
                with contextlib.suppress(OSError):
                    if _process(self._peers[rank]["pid"]) is not None:
                        sizes.append(self._stacks_path(rank).stat().st_size)
            if all(sizes) and sizes == before:
                return
            before = sizes

    def _culprits(self) -> list[int]:
        """Who keeps the others waiting: whoever has made the fewest beats; of equals, whoever shows no
        life.
        """
        before = {rank: peer["beat_time"] for rank, peer in self._peers.items()}
        self._publish(done=False)
        time.sleep(2.5 * self._tick)
        self._read_peers(again=True)
        counts = {rank: peer["count"] for rank, peer in self._peers.items()} | {self._rank: self._count}
        silent = [
            rank
            for rank, peer in self._peers.items()
            if (process := _process(peer["pid"])) and self._here(peer) and process[0] in "Tt"
        ] or [
            rank
            for rank, time_ in before.items()
            if self._peers[rank]["beat_time"] == time_ and self._stale(rank)
        ]
        fewest = [rank for rank, count in counts.items() if count == min(counts.values())]
        return sorted(silent or fewest)  # all of them, if all stand at the same place

    def _stale(self, rank: int) -> bool:
        """Whether a peer that must by now have published its own alarm has not: its watchdog stands still."""
        return self._peers[rank]["count"] < self._count

    # ---- the files ----------------------------------------------------------------------------------------

    def _path(self, rank: int) -> Path:
        return self._folder / f".alive-rank-{rank:05d}.json"

    def _stacks_path(self, rank: int) -> Path:
        return self._folder / f"stacks-rank-{rank:05d}.txt"

    def _publish(self, *, done: bool) -> None:
        pid = os.getpid()
        process = _process(pid)
        self._written = self._count
        me = {
            "session": self._session,
            "host": socket.gethostname(),
            "pid": pid,
            "start": process[1] if process else "",
            "count": self._count,
            "what": self._what,
            "step": self._step,
            "done": done,
            "failed": self._failed,
            "beat_time": time.time(),
        }
        try:
            DISK.write_json(self._path(self._rank), me, durable=False)
        except OSError as error:  # a full disk must not end training here
            if not done and self._count < 2:
                self._say(f"the watchdog cannot write its sign of life: {error.strerror}")

    def _read_peers(self, *, again: bool = False) -> None:
        for rank in range(self._world_size):
            if rank == self._rank or (rank in self._peers and not again):
                continue
            peer = self._read(rank)
            if peer is not None:
                self._peers[rank] = peer

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            peer = json.loads(self._path(rank).read_bytes())
        except (OSError, ValueError):
            return None
        return peer if isinstance(peer, dict) and peer.get("session") == self._session else None

    @staticmethod
    def _here(peer: dict[str, Any]) -> bool:
        return peer["host"] == socket.gethostname()

    def _dead(self) -> list[int]:
        """Ranks of this machine that are gone without having left in good order. One that had said that it fails
        itself is a consequence of the others' death, and the cause only where it is the only one.
        """
        dead = [rank for rank, peer in self._peers.items() if self._is_dead(rank, peer)]
        return [rank for rank in dead if not self._peers[rank]["failed"]] or dead

    def _is_dead(self, rank: int, peer: dict[str, Any]) -> bool:
        if peer["done"] or not self._here(peer):
            return False
        if _lives(peer):
            return False
        now = self._read(rank)
        if now is not None:
            self._peers[rank] = now
        return not self._peers[rank]["done"]


def _last_word(peer: dict[str, Any]) -> str:
    return f"{peer['what']}, step {peer['step']}"


def _lives(peer: dict[str, Any]) -> bool:
    """Whether the process is there, on this machine; never a stranger that got the same number."""
    process = _process(peer["pid"])
    return process is not None and process[1] == peer["start"]


def _signal(peer: dict[str, Any], number: int) -> None:
    if _lives(peer):
        try:
            os.kill(peer["pid"], number)
        except ProcessLookupError:
            return  # it went by itself in between
