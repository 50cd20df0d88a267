"""How processes and ranks share work through a folder, without ever waiting for a dead process.

A claim is a file with a heartbeat. If its process is gone or the heartbeat has stopped, it can be taken over. A failure
is written to a file that all others check. A claim only avoids duplicate work: the work must be such that two processes
may do it at the same time. File systems without hard links are supported.
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
"""A claim without a heartbeat for this long is dead; far longer than a network file system delays a time stamp."""
UNREADABLE_SECONDS = 10.0
"""If a claim has no content for this long, the process that was writing it has died."""


def now_of(folder: Path) -> float:
    """The current time of the file system, which may differ from the time of this machine."""
    path = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


class Claim:
    """A file that records which process works on a part, and its progress."""

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
                if self.path.exists():  # not after the claim was removed
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
    """Context manager with the claim at ``path``, or ``None`` if a living process has it.

    Two owners at the same time do no harm, because they write the same bytes."""
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
    """The temporary path at which a file is written before it is renamed; different in each process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def create_once(path: Path, data: bytes) -> None:
    """Create a file with this content, atomically if the file system has hard links.

    Without hard links (exFAT, SMB, gcsfuse) another process may see the file before its content.

    Raises:
        FileExistsError: the file exists already.
    """
    DISK.write_file(aside(path), data)
    try:
        os.link(aside(path), path)
    except FileExistsError:
        raise
    except OSError:  # no hard links; the next call raises again if something else is wrong
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
        return False  # it was just removed
    except (ValueError, TypeError, AttributeError):
        return age > UNREADABLE_SECONDS  # it is being written, or its owner died while writing it
    return age > STALE_SECONDS or (host == socket.gethostname() and not is_alive(pid))


def write_failure(folder: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):  # the disk itself may have failed
        DISK.write_json(folder / "failure.json", {"kind": type(error).__name__, "message": str(error)})


def raise_failure(folder: Path, started: float) -> None:
    """Raise the failure that another process has written since this one started, if any."""
    path = folder / "failure.json"
    try:
        if path.stat().st_mtime <= started:
            return  # of an earlier attempt; if it is of this very moment, its cause will be met again
        failure = json.loads(path.read_text())
        kind, message = failure["kind"], failure["message"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return
    raise (FaultError if kind == "FaultError" else RequestError)(message)
