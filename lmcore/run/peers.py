"""Connects every rank to rank 0 from the start of the process, so that the death of one rank ends the others within seconds.

A launcher ends the ranks on its own machine when one of them dies, but not those on other machines. A rank that waits in
a collective, or for other ranks that never start, does not notice by itself. So each rank keeps one idle TCP connection to
rank 0, from before torch is imported until it has finished. The kernel closes the connections of a process that dies for
any reason, and TCP keepalive detects a machine that is gone. Nothing is sent during normal operation, and a process that is
only busy or stopped is not taken for dead.

::

    peers = connect(os.environ)      # at the very start; None without other ranks
    ...
    peers.done()                     # this rank has finished: its end is not a crash

When a rank has died, rank 0 tells all others, and each ends with code 71 after a short grace period in which it may end by
itself, for example with the same error. If rank 0 has died, each rank notices that itself. A rank that ends with a refusal
(one line and its own exit code) sends both first: the others get more time to meet the same refusal, and otherwise end with
that line and code. A rank that ends with another error first sends its type and message, so that the others, which lose their
connection to it, can report them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from lmcore.errors import EXIT_STUCK
from lmcore.process import pid_namespace

GRACE_SECONDS: Final = 2.0
"""How long a rank may take to end by itself after another one has ended, because all may have met the same error."""
ANSWER_SECONDS: Final = 2.0
"""How long a rank may take to report its progress before it is considered stuck."""
MEETING_SECONDS: Final = 5.0
"""How long a rank waits for its connection before it continues without: rank 0 may start later, or a port may be closed."""
LEAVING_SECONDS: Final = 15.0
"""How long a rank may take that is known to be ending by itself, or that may still meet the refusal of another rank."""
_KEEPALIVE: Final = (
    ("TCP_KEEPIDLE", 2),
    ("TCP_KEEPINTVL", 2),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 8_000),
)
_PORTS: Final = 8
_LINE_CHARACTERS: Final = 4_000
"""How much of the reason why a rank ends is sent: as JSON it must fit into the 64 KiB limit of a message."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The progress of a rank: the ``count`` of its beats, ``what`` it reached last and in which ``step``, and how many
    ``seconds`` ago."""

    count: int = 0
    what: str = "start"
    step: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class _Peer:
    """The other end of a connection."""

    socket: socket.socket
    rank: int = -1  # not connected yet
    greeted_as: int = -1
    pid: int = 0
    host: str = ""
    pids: str = ""  # its PID namespace
    done: bool = False
    refusal: tuple[str, int] | None = None  # why it ends by itself, and its exit code
    error: tuple[str, int] | None = None  # the same for an error that the other ranks will not meet
    unread: bytes = b""
    standing: Standing | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        """Whether its pid belongs to this machine and container; otherwise the pid may be that of another process here."""
        return (self.host, self.pids) == (socket.gethostname(), pid_namespace())

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the peer is gone: the reading side notices that
            self.socket.sendall(json.dumps(message).encode() + b"\n")


@final
class Peers:
    """The connections of one rank. Created by :func:`connect`.

    Attributes:
        on_end: called once, on the one rank that reports for the run, with a line about the rank that ends the run, and the
            exit code; writes ``status.json``, for example.
        note: called with the same line on every rank.
        standing: returns the progress of this rank.
        stacks: called with the line before the process ends because a rank is stuck; writes this rank's stacks.
        stuck_seconds: how long the run may continue while no rank makes progress; see :meth:`raise_alarm`.
        on_wait: called with the seconds that this rank should continue to wait after an alarm.
        fault: the line, once a rank is known to be dead or stuck, or to have ended by itself.
        fault_code: the exit code with which this rank ends in that case.
        reason: the line and exit code of the first other rank that has sent why it is about to end by itself.
    """

    def __init__(
        self, rank: int, world_size: int, where: tuple[str, int], token: str, *, leave: Callable[[int], None]
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.on_end: Callable[[str, int], None] | None = None
        self.note: Callable[[str], None] | None = None
        self.standing: Callable[[], Standing] = Standing
        self.stacks: Callable[[str], None] | None = None
        self.stuck_seconds = 0.0
        self.on_wait: Callable[[float], None] | None = None
        self.fault: str | None = None
        self.fault_code = EXIT_STUCK
        self.reason: tuple[str, int] | None = None
        self._address, self._port, self._token, self._leave = *where, token, leave
        self._hello = {"lmcore": token, "rank": rank, "pid": os.getpid(), "host": socket.gethostname(),
                       "pids": pid_namespace()}  # fmt: skip
        self._peers: list[_Peer] = []
        self._done = False
        self._main_lost = False  # rank 0 is dead, or does not answer
        self._leaving_until = 0.0
        self._alarm = False
        self._inquiry: float | None = None  # when the answers are due
        self._answered = threading.Event()
        self._fault_known, self._reason_known = threading.Event(), threading.Event()
        self._met = threading.Event()
        self._waited = False
        self._ending = threading.Lock()
        self._reporting, self._reported = threading.Lock(), False
        self._sockets: list[socket.socket] = []
        os.register_at_fork(after_in_child=self._forget)
        run = self._serve if rank == 0 else self._follow
        threading.Thread(target=run, name="peers", daemon=True).start()

    # ---- for the run ---------------------------------------------------------------------------------------

    def wait_until_met(self, seconds: float = MEETING_SECONDS) -> bool:
        """Wait until this rank is connected: rank 0 to all others, another rank to rank 0. Returns whether it is. A second call
        does not wait again.

        Call it before a rank takes part in anything that makes the others wait. If a rank that was never connected dies in a
        collective, the others see a lost connection without knowing whose, or wait for a rank 0 that never starts.
        """
        wait, self._waited = not self._waited, True
        return self._met.wait(seconds if wait else 0.0)

    def done(self) -> None:
        """Announce that this rank has finished, so that its end does not count as a crash; from now on this rank ignores the
        end of the others as well."""
        self._done = True
        for peer in list(self._peers):
            peer.send({"done": True})

    def wait_for_fault(self, seconds: float) -> str | None:
        """The line about a dead rank, if it becomes known within ``seconds``, for example after a connection was lost."""
        self._fault_known.wait(seconds)
        return self.fault

    def wait_for_reason(self, seconds: float) -> str | None:
        """The line about a rank that is dead or has sent why it is about to end, if it becomes known within ``seconds``."""
        self._reason_known.wait(seconds)
        if self.fault is None and self.reason is not None:
            self.fault, self.fault_code = self.reason
        return self.fault

    def leaving(self, refusal: str = "", code: int = EXIT_STUCK, *, error: str = "") -> None:
        """Announce that this rank is about to end with an error of its own, so that it is not ended before it has printed it.

        Args:
            refusal: the line of the refusal that it ends with, if any. The others are told and end with it as well, unless
                they meet it by themselves. A slow rank, perhaps rank 0, would otherwise take this one for dead.
            code: the exit code for ``refusal`` or ``error``.
            error: instead of a refusal, the line of an error that only this rank has met.
        """
        self._leaving_until = time.monotonic() + LEAVING_SECONDS
        kind, line = ("refusal", refusal) if refusal else ("error", error)
        for peer in list(self._peers) if line else []:
            peer.send({kind: _shortened(line), "code": code})

    def report(self, line: str) -> None:
        """Print which rank is dead or stuck, and call ``on_end`` if this rank reports for the run. Later calls are no-ops."""
        with self._reporting:
            if self._reported:
                return
            self._reported = True
            self._say(line)
            if self.on_end is not None and (self.rank == 0 or (self.rank == 1 and self._main_lost)):
                self.on_end(line, self.fault_code)

    def raise_alarm(self) -> None:
        """This rank has made no progress for too long: make rank 0 ask all ranks for their progress.

        If no rank has made progress for ``stuck_seconds``, the run ends and the rank that is furthest behind is named. A
        rank that only waits for a busy one is told to continue waiting.
        """
        if self.rank == 0:
            self._alarm = True
            return
        self._answered.clear()
        for main in self._peers:
            main.send({"alarm": True})
        if not self._answered.wait(3 * ANSWER_SECONDS):
            self._main_lost = True
            culprit = self._peers[0].name if self._peers else "rank 0, which was never reached,"
            line = f"{culprit} is stuck: it does not answer, and there was no progress for {self.stuck_seconds:g} s"
            self._end(line, self._peers, stuck=True)

    # ---- rank 0 --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        listener = self._listen()
        if listener is None:
            self._say(
                f"no free port for the connections between ranks near {self._port}: a dead rank is noticed late"
            )
            return
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=0.5):
                    if key.fileobj is listener:
                        with contextlib.suppress(OSError):
                            accepted, _ = listener.accept()
                            self._keep(accepted)
                            accepted.setblocking(False)
                            selector.register(accepted, selectors.EVENT_READ, _Peer(socket=accepted))
                        continue
                    peer: _Peer = key.data
                    if not self._read(peer, self._hear):
                        selector.unregister(peer.socket)
                        peer.socket.close()
                        if peer.rank >= 0 and not peer.done and not self._done:
                            self._end(_ended(peer), [peer], refusal=peer.refusal)
                self._inquire()

    def _listen(self) -> socket.socket | None:
        for port in _ports(self._port):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self._address, port))
                listener.listen(self.world_size)
            except OSError:
                listener.close()
                continue
            self._sockets.append(listener)
            return listener
        return None

    def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
        """Handle a message of another rank to rank 0."""
        if peer.rank < 0:
            if "met" in message and peer.greeted_as > 0:
                peer.rank = peer.greeted_as
                self._peers.append(peer)
                if len(self._peers) == self.world_size - 1:
                    self._met.set()
                return
            rank = int(message["rank"])
            if message["lmcore"] != self._token or rank not in range(1, self.world_size):
                raise ValueError(f"a greeting that is not of this run: {message}")
            peer.greeted_as, peer.pid, peer.host = rank, int(message["pid"]), str(message["host"])
            peer.pids = str(message["pids"])
            # It may have given up this connection and opened another one: only "met" counts.
            peer.send(self._hello)
        elif "done" in message:
            peer.done = True
        elif "refusal" in message or "error" in message:
            self._hear_reason(peer, message)
            for other in self._peers:  # the ranks are connected to rank 0 only, which forwards the reason
                if other is not peer and self.reason is not None:
                    other.send({"reason": self.reason[0], "code": self.reason[1]})
        elif "alarm" in message:
            self._alarm = True
        elif "at" in message:
            peer.standing = Standing(**message["at"])

    def _inquire(self) -> None:
        """After an alarm, ask all ranks for their progress; decide when all have answered or the time is over."""
        if self._alarm and self._inquiry is None:
            self._inquiry = time.monotonic() + ANSWER_SECONDS
            for peer in self._peers:
                peer.standing = None
                peer.send({"where": True})
        if self._inquiry is None:
            return
        asked = [peer for peer in self._peers if not peer.done]
        if time.monotonic() < self._inquiry and any(peer.standing is None for peer in asked):
            return
        self._alarm, self._inquiry = False, None
        own = self.standing()
        known = [own, *(peer.standing for peer in asked if peer.standing is not None)]
        freshest = min(standing.seconds for standing in known)
        if freshest < self.stuck_seconds:  # a rank makes progress: the others wait for it
            for peer in asked:
                peer.send({"wait": self.stuck_seconds - freshest})
            if self.on_wait is not None:
                self.on_wait(self.stuck_seconds - freshest)
            return
        silent = [peer for peer in asked if peer.standing is None]
        least = min(standing.count for standing in known)
        culprits = silent or [p for p in asked if p.standing is not None and p.standing.count == least]
        words = [f"{peer.name} is stuck{_said(peer.standing)}" for peer in culprits]
        if not silent and own.count == least:
            words.insert(0, f"rank 0 (pid {os.getpid()} on {socket.gethostname()}) is stuck{_said(own)}")
        line = f"{'; '.join(words)}: no progress for {self.stuck_seconds:g} s"
        self._end(line, silent, stuck=True)

    # ---- the other ranks -----------------------------------------------------------------------------------

    def _follow(self) -> None:
        main = self._connect()
        self._peers.append(main)
        self._met.set()
        while self._read(main, self._obey):
            pass
        if not (main.done or self._done):
            self._main_lost = True
            self._end(_ended(main), [main], refusal=main.refusal)

    def _connect(self) -> _Peer:
        """Connect to rank 0, and wait as long as it takes."""
        while True:
            for port in _ports(self._port):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    found = socket.create_connection((self._address, port), timeout=5.0)
                    try:
                        found.sendall(json.dumps(self._hello).encode() + b"\n")
                        line = b""
                        while not line.endswith(b"\n") and (byte := found.recv(1)):
                            line += byte
                        answer = json.loads(line)
                        if answer["lmcore"] == self._token:
                            found.sendall(b'{"met": true}\n')
                            found.settimeout(None)
                            self._keep(found)
                            return _Peer(
                                socket=found, rank=0, pid=int(answer["pid"]), host=str(answer["host"]),
                                pids=str(answer["pids"]),
                            )  # fmt: skip
                        found.close()
                    except BaseException:
                        found.close()
                        raise
            time.sleep(0.05)

    def _obey(self, main: _Peer, message: dict[str, Any]) -> None:
        """Handle a message of rank 0."""
        if "done" in message:
            main.done = True
        elif "refusal" in message or "error" in message:
            self._hear_reason(main, message)
        elif "reason" in message:
            self._keep_reason(str(message["reason"]), int(message["code"]))
        elif "where" in message:
            now = self.standing()
            main.send(
                {"at": {"count": now.count, "what": now.what, "step": now.step, "seconds": now.seconds}}
            )
        elif "wait" in message:
            self._answered.set()
            if self.on_wait is not None:
                self.on_wait(float(message["wait"]))
        elif "end" in message:
            self._answered.set()
            refusal = (str(message["end"]), int(message["code"])) if "code" in message else None
            self._end(str(message["end"]), [], stuck=bool(message.get("stuck")), refusal=refusal)

    # ---- both ----------------------------------------------------------------------------------------------

    def _hear_reason(self, peer: _Peer, message: dict[str, Any]) -> None:
        """Handle the message of another rank about why it is about to end by itself."""
        kind = "refusal" if "refusal" in message else "error"
        setattr(peer, kind, (str(message[kind]), int(message["code"])))
        self._keep_reason(_ended(peer), int(message["code"]))

    def _keep_reason(self, line: str, code: int) -> None:
        if self.reason is None:  # keep the first one, because later ones may be its consequences
            self.reason = line, code
            self._reason_known.set()

    def _read(self, peer: _Peer, handle: Callable[[_Peer, dict[str, Any]], None]) -> bool:
        """Handle what has arrived; ``False`` when the connection is closed."""
        try:
            data = peer.socket.recv(65536)
        except BlockingIOError:
            return True
        except OSError:  # reset, or no answer to keepalive
            return False
        if not data or len(peer.unread) > 1 << 16:
            return False
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                if isinstance(message, dict):
                    handle(peer, message)
            except (ValueError, KeyError, TypeError):
                return False  # not a process of this run
        return True

    def _keep(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _forget(self) -> None:
        """In a forked child, close the connections: a copy would keep them open when this rank dies."""
        self._done = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.close()

    def _end(
        self,
        line: str,
        silent: list[_Peer],
        *,
        stuck: bool = False,
        refusal: tuple[str, int] | None = None,
    ) -> None:
        """End this rank, and on rank 0 also all others: report which rank is dead or stuck, then exit with code 71.

        Args:
            silent: ranks that do not answer. Those on this machine are made to write their stacks, and killed.
            refusal: why the other rank has ended by itself, and its exit code, which this rank uses as well.
        """
        if self._done or not self._ending.acquire(blocking=False):
            return
        # If another rank has sent a reason, the end of this peer may be its consequence: report the reason.
        if self.reason is not None and not stuck and refusal is None:
            line, self.fault_code = self.reason
        self.fault = line
        if refusal is not None:
            self.fault_code = refusal[1]
        self._fault_known.set()
        self._reason_known.set()
        if self.rank == 0:
            code = {} if refusal is None else {"code": refusal[1]}
            for peer in self._peers:
                peer.send({"end": line, "stuck": stuck, **code})
        if stuck and self.stacks is not None:
            self.stacks(line)
        here = [peer.pid for peer in silent if stuck and peer.is_here]
        # faulthandler writes the stacks in C; a stopped process must first be continued.
        for number in (signal.SIGUSR2, signal.SIGCONT):
            for pid in here:
                _signal(pid, number)
        if stuck:
            time.sleep(1.0)
        else:
            time.sleep(GRACE_SECONDS if refusal is None else LEAVING_SECONDS)
            while time.monotonic() < self._leaving_until:
                time.sleep(0.1)
        if self._done:
            return
        self.report(line)
        if self.rank != 0:
            time.sleep(1.0)  # a launcher ends all ranks when one exits: let rank 0 report the reason first
        for pid in here:
            _signal(pid, signal.SIGKILL)  # the run is over: it must not keep the device
        self._leave(self.fault_code)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the launcher may be gone, and the pipe with it
            if self.note is None or self.rank != 0:
                print(f"train_lm.py: {line}", file=sys.stderr, flush=True)
            if self.note is not None:
                self.note(line)


def _ended(peer: _Peer) -> str:
    said = peer.refusal or peer.error
    return f"{peer.name} is dead" if said is None else f"{peer.name} has ended: {said[0]}"


def _shortened(line: str) -> str:
    return line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]}..."


def _said(standing: Standing | None) -> str:
    return " and does not answer" if standing is None else f" at {standing.what}, step {standing.step}"


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _ports(first: int) -> list[int]:
    """The ports on which rank 0 may listen: below the kernels' ephemeral ports, and the same list on every rank."""
    return [15_000 + (first - 15_000 + 1_009 * index) % 17_000 for index in range(_PORTS)]


_PEERS: Peers | None = None


def connect(env: Mapping[str, str], *, leave: Callable[[int], None] = os._exit) -> Peers | None:
    """Connect this rank to the others, once per process. Returns at once; a thread makes the connection.

    Args:
        env: the variables that a launcher sets: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``.

    Returns:
        ``None`` for a single process, or if there is no address to connect to.
    """
    global _PEERS
    if _PEERS is not None:
        return _PEERS
    try:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    except (KeyError, ValueError):
        return None
    if world_size < 2:
        return None
    one_node = env.get("LOCAL_WORLD_SIZE") == str(world_size)
    # On several nodes each launcher counts its own restarts, so the numbers may differ.
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    token = f"{port}/{world_size}/{env.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"
    if one_node or address == "localhost" or address.startswith("127."):
        address = "127.0.0.1"
    elif rank == 0:
        address = ""  # the host name may resolve to the loopback address: listen on all interfaces
    where = (address, 15_000 + zlib.crc32(token.encode()) % 17_000)
    _PEERS = Peers(rank, world_size, where, token, leave=leave)
    return _PEERS
