"""How processes and ranks share work through a folder, and never wait for one that has died.

A claim is a file with a heartbeat. One whose process is gone, or whose heartbeat stopped, can be taken over; a failure
is written down where all others see it. A claim only saves double work: what it protects must be such that two may do it
at once. File systems without hard links work too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.process import is_alive

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 120.0
"""A claim without a heartbeat for so long is dead; far above what a network file system delays a time stamp."""
UNREADABLE_SECONDS = 10.0
"""A claim that has no content for so long is of a process that died while writing it."""


def now_of(folder: Path) -> float:
    """The time as the file system tells it, which may not be the time of this machine."""
    path = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


class Claim:
    """The file that says which process works on a part, and how far it is."""

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
                    aside(self.path).write_text(json.dumps(self.state))
                    os.replace(aside(self.path), self.path)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Claim | None]:
    """The claim at ``path``, or ``None`` if a living process has it. Two owners at once would do no harm: they write the
    same bytes."""
    for _ in range(2):
        try:
            create_once(path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        except FileExistsError:
            if not _is_stale(path):
                break
            path.unlink(missing_ok=True)
        else:
            with Claim(path) as claim:
                yield claim
            return
    yield None


def aside(path: Path) -> Path:
    """Where a file is written before it gets its name: another place for each process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def create_once(path: Path, data: bytes) -> None:
    """A new file with this content, whole at once where the file system has hard links.

    Without them (exFAT, SMB, gcsfuse) another process may see the file before its content.

    Raises:
        FileExistsError: there is one already.
    """
    DISK.write_file(aside(path), data)
    try:
        os.link(aside(path), path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here; whatever else is wrong, the next call says so again
        file = DISK.create(path, exclusive=True)
        try:
            DISK.write(file, data)
            DISK.fsync(file)
        finally:
            DISK.close(file)
    finally:
        DISK.unlink(aside(path))


def _is_stale(path: Path) -> bool:
    try:
        age = now_of(path.parent) - path.stat().st_mtime
        owner = json.loads(path.read_text())
        host, pid = str(owner.get("host")), int(owner.get("pid", 0))
    except FileNotFoundError:
        return False  # just removed
    except (ValueError, TypeError, AttributeError):
        return age > UNREADABLE_SECONDS  # being written, or its owner died in between
    return age > STALE_SECONDS or (host == socket.gethostname() and not is_alive(pid))


def write_failure(folder: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):  # the disk may be the very failure
        DISK.write_json(folder / "failure.json", {"kind": type(error).__name__, "message": str(error)})


def raise_failure(folder: Path, started: float) -> None:
    """Raise what another process wrote down since this one started."""
    path = folder / "failure.json"
    try:
        if path.stat().st_mtime <= started:
            return  # of an earlier attempt; one of this very instant has a cause that is met again
        failure = json.loads(path.read_text())
        kind, message = failure["kind"], failure["message"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return
    raise (FaultError if kind == "FaultError" else RequestError)(message)
