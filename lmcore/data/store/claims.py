"""How processes and ranks share work through a folder, and never wait for the dead.

Comes in: the path of a claim. Goes out: the claim, if nobody who lives has it. What always holds: a claim
has a heartbeat; one whose process is gone, or whose heartbeat stopped, can be taken; a failure is written
down where all others see it. A claim only saves double work: the work itself must be such that two may do
it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.process import is_alive

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 120.0
"""A claim without a heartbeat for so long is dead; far above what a network file system delays a time
stamp."""


def now_of(folder: Path) -> float:
    """The time as the file system tells it, which may not be the time of this machine."""
    path = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


class Claim:
    """The file that says who works on a part, and how far it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "bytes": 0,
            "documents": 0,
            "tokens": 0,
        }
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS / 4):
            with contextlib.suppress(OSError):
                if self.path.exists():  # not after somebody took it over
                    os.replace(_written(self.path, self.state), self.path)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Claim | None]:
    """The claim at ``path``, or ``None`` if somebody who lives has it. Two owners at once would do no harm:
    they write the same bytes."""
    for _ in range(2):
        try:
            aside = _written(path, {"host": socket.gethostname(), "pid": os.getpid()})
            try:
                os.link(aside, path)  # a claim is never seen half written
            finally:
                os.unlink(aside)
        except FileExistsError:
            if not _is_stale(path):
                break
            path.unlink(missing_ok=True)
        else:
            with Claim(path) as claim:
                yield claim
            return
    yield None


def _written(path: Path, state: dict[str, Any]) -> Path:
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(state))
    return aside


def _is_stale(path: Path) -> bool:
    try:
        age = now_of(path.parent) - path.stat().st_mtime
        owner = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return False  # just being made or removed
    if owner.get("host") == socket.gethostname() and not is_alive(owner.get("pid", 0)):
        return True
    return age > STALE_SECONDS


def write_failure(folder: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):  # the disk may be the very failure
        DISK.write_json(folder / "failure.json", {"kind": type(error).__name__, "message": str(error)})


def raise_failure(folder: Path, started: float) -> None:
    """Raise what another process wrote down since this one started."""
    path = folder / "failure.json"
    try:
        if path.stat().st_mtime <= started:
            return  # of an earlier attempt; whoever misses one of this very instant meets its cause himself
        failure = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return
    kind = FaultError if failure["kind"] == "FaultError" else RequestError
    raise kind(failure["message"])
