"""One writer at a time for a run folder in a bucket, even between machines that share nothing else.

Each holder creates the next of the objects ``lease/00000001.json``, ``lease/00000002.json``, ... by a conditional put that
fails if the object exists (``If-None-Match: *``), so that only one of several succeeds. It then keeps writing an increasing
number into its own object. A process that wants the lease watches that number by its own clock; clocks of different machines
are never compared. A holder that finds the next object has lost the lease and stops. The objects are tiny and are kept: their
order is the history of the run.

If a store has no conditional put (:attr:`lmcore.storage.Store.exclusive`), two starts at the same moment may both succeed.
Each reads its object again after some seconds and at every beat, and the one whose object was overwritten stops.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, final

from lmcore.errors import FaultError, RequestError
from lmcore.process import is_alive
from lmcore.run.folder import describe_holder, new_holder
from lmcore.storage import Store, StoreError, sealed

FOLDER: Final = "lease"
BEAT_SECONDS: Final = 15.0
"""One small put per beat: 5,760 a day."""
SILENT_BEATS: Final = 4
"""A holder whose number does not change for this many beats is considered dead."""
SETTLE_SECONDS: Final = 2.0
"""Without conditional puts: how long after writing the object it is read back."""
_NAME: Final = re.compile(rf"{FOLDER}/(\d{{8}})\.json")


@final
class Lease:
    """The lease of one run folder. :meth:`take` makes this process its holder.

    Args:
        store: the store of the run folder.
        note: called with a line when another holder is watched or replaced, and if the store has no conditional put.
    """

    def __init__(
        self,
        store: Store,
        *,
        note: Callable[[str], None] = print,
        beat_seconds: float = BEAT_SECONDS,
        silent_beats: int = SILENT_BEATS,
    ) -> None:
        self._store, self._note = store, note
        self._beat_seconds, self._silent_beats = beat_seconds, silent_beats
        self.holder = new_holder()
        self.number = 0
        """Number of this process's object; 0 before :meth:`take`."""
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> str:
        token: str = self.holder["token"]
        return token

    def last(self) -> tuple[int, dict[str, Any] | None]:
        """Number and content of the newest lease object; (0, ``None``) if there is none."""
        numbers = [int(match[1]) for name in self._store.names(FOLDER) if (match := _NAME.fullmatch(name))]
        number = max(numbers, default=0)
        holder = self._read(number) if number else None
        while (following := self._read(number + 1)) is not None:  # the listing may be out of date
            number, holder = number + 1, following
        return number, holder

    def take(self, number: int, holder: Mapping[str, Any] | None) -> None:
        """Become the next holder after the one that :meth:`last` has found.

        Raises:
            RequestError: that holder is alive, or another process was faster.
        """
        if holder is not None and not self._is_gone(number, holder):
            raise RequestError(
                f"run folder {self._store.url} is in use by {describe_holder(holder)}: wait for that job, stop it, or "
                "choose another --run_dir"
            )
        if not self._store.exclusive:
            self._note(
                f"{self._store.url}: this kind of store cannot decide between two runs that start in it at the same "
                "moment; the one that wrote last is recognized, and the other stops"
            )
        if not self._store.create(_name(number + 1), self._content()):
            raise RequestError(
                f"run folder {self._store.url} was taken by {describe_holder(self._read(number + 1))} at the same moment"
            )
        self.number = number + 1
        if not self._store.exclusive:
            time.sleep(SETTLE_SECONDS)
            self.check()

    def _is_gone(self, number: int, holder: Mapping[str, Any]) -> bool:
        if holder.get("released"):
            return True
        mine = self.holder
        if mine["job_id"] is not None and holder.get("job_id") == mine["job_id"]:
            return True  # the same job, requeued
        # A container may share the host name of its machine, but has its own pids.
        here = [holder.get(name) for name in ("host", "boot", "pids")] == [
            socket.gethostname(), mine["boot"], mine["pids"],
        ]  # fmt: skip
        if here and mine["boot"] and mine["pids"] and type(holder.get("pid")) is int:
            gone = holder["pid"] == os.getpid() or not is_alive(holder["pid"])
            if gone:
                return True
        seconds = self._silent_beats * self._beat_seconds
        self._note(
            f"{self._store.url}: leased by {describe_holder(holder)}; watching up to {seconds:.0f} s if it lives"
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(self._beat_seconds / 2, max(0.0, until - time.monotonic())))
            now = self._read(number) or {}
            if now.get("released"):
                return True
            # A damaged object says nothing about its holder; a living holder writes it again at its next beat.
            if (now and now.get("beat") != holder.get("beat")) or self._read(number + 1) is not None:
                return False
        self._note(f"{self._store.url}: took over the lease of {describe_holder(holder)}, which is gone")
        return True

    def start(self) -> None:
        """Start the thread that writes the beats."""
        self._thread = threading.Thread(target=self._beats, name="lease", daemon=True)
        self._thread.start()

    def _beats(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                self.check()
                self.holder["beat"] += 1
                self._store.write(_name(self.number), self._content())
            except FaultError:
                return  # recorded in _lost, so that the next check raises it
            except StoreError:
                continue  # the uploads report that the store fails

    def check(self) -> None:
        """Check before a manifest is uploaded that this process still holds the lease.

        Raises:
            FaultError: another process has taken it.
            StoreError: the store does not answer.
        """
        if self._lost is None and self.number:
            following = self._read(self.number + 1)
            own = self._read(self.number)
            if following is not None:
                self._lost = describe_holder(following)
            elif self._is_other(own) and self._is_other(own := self._read(self.number)):
                self._lost = describe_holder(own)
        if self._lost is not None:
            raise FaultError(
                f"run folder {self._store.url} was taken over by {self._lost} while this run was training; nothing more "
                "is written to it"
            )

    def _is_other(self, holder: Mapping[str, Any] | None) -> bool:
        """Whether another process has written this object. False if its content was damaged in transit."""
        token = (holder or {}).get("token")
        return isinstance(token, str) and token != self.token

    @property
    def lost(self) -> bool:
        """Whether a beat has found another holder."""
        return self._lost is not None

    def release(self) -> None:
        """Release the lease, so that the next start need not watch it. A no-op if it was never taken or is lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._beat_seconds)
        if self.number and self._lost is None:
            self.holder["released"] = True
            self._store.write(_name(self.number), self._content())
        self.number = 0

    def _content(self) -> bytes:
        return sealed(self.holder)

    def _read(self, number: int) -> dict[str, Any] | None:
        """The content of a lease object; empty if it is damaged, ``None`` if there is none."""
        try:
            return self._store.read_sealed(_name(number))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
