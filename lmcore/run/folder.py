"""The folder of one run: it has one writer at a time, and a ``status.json`` that is complete at any instant.

Example::

    folder = RunFolder("runs/demo")
    folder.lock(note=print)                     # RequestError, naming the holder, if another job has it
    folder.write_status("running", step=0)
    ...
    folder.check_owner()                        # before a write: FaultError if the folder was moved or taken
    folder.write_status("finished", step=1000, exit_code=0)
    folder.unlock()
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, final

from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError, of_disk
from lmcore.process import pid_namespace
from lmcore.report.redact import redact
from lmcore.storage import cache_dir, check_url, is_url, local_name

BEAT_SECONDS: Final = 5.0
"""How often a holder writes a new number into the lock. A process that watches for twice this time sees whether the holder is
alive."""
LOCK_WAIT_SECONDS: Final = 30.0
"""How long a start waits for the holder of the lock: an automatic restart overlaps the last seconds of the process that
it replaces, which may be writing its checkpoint."""
REASON_CHARACTERS: Final = 2000
"""Longest reason in ``status.json``: the output of a compiler can have 100,000 characters."""
NEVER_LINKS: Final = (
    ".lock",
    "config.yaml",
    "train.log",
    "metrics.jsonl",
    "logs",
    "tokenizer",
    "tensorboard",
    "export",
    "profile",
    "sample",
)
"""Names that a run writes to, and that must not be links out of the run folder. ``checkpoints`` may be one, to another disk."""
FILES: Final = (
    ".lock",
    "config.yaml",
    "train.log",
    "metrics.jsonl",
    "status.json",
    "report.html",
    "stores.json",
)
"""Names that must be regular files if they exist: a folder could not be replaced, and a FIFO would block until it is read."""
VISIBLE_SECONDS: Final = 10.0
"""How long it may take until the other machines see a file that one machine has created."""
SETTLE_SECONDS: Final = 1.0
"""On file systems without record locks: how long after writing the holder it is read back."""
STATES: Final = ("preparing", "running", "saved", "finished", "failed")
_JOB_VARIABLES: Final = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")

_held: dict[str, int] = {}
"""Folders that this process holds, because record locks do not distinguish two holders in the same process."""


def job_id() -> str | None:
    """The batch system's name of this job, or ``None`` outside a batch job."""
    for variable in _JOB_VARIABLES:
        if value := os.environ.get(variable):
            step = os.environ.get("SLURM_STEP_ID") if variable == "SLURM_JOB_ID" else None
            return f"{variable}={value}" + (f".{step}" if step else "")
    return None


def place() -> dict[str, Any]:
    """Where this process runs, as far as known: host, batch job, its nodes, and how often it was requeued."""
    found: dict[str, Any] = {"host": socket.gethostname()}
    if job_id() is None:
        return found
    name, _, number = (job_id() or "").partition("=")
    found["job_id"] = number.partition(".")[0]
    if name == "SLURM_JOB_ID":
        found["nodes"] = os.environ.get("SLURM_JOB_NODELIST", "")
        found["restart_count"] = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return found


def local_run_dir(run_dir: str | None, local_dir: str | None = None) -> Path:
    """The folder of a run's files on this machine: ``run_dir`` itself, or ``local_dir`` if ``run_dir`` is a URL.

    Without ``local_dir`` it is a folder in the user's cache whose name depends only on the URL.
    """
    if not is_url(run_dir):
        return Path(run_dir or "runs/demo")
    if local_dir:
        return Path(local_dir)
    url = check_url(str(run_dir), "run_dir")
    return cache_dir() / "runs" / local_name(url)


class _Ranks(Protocol):
    """The interface to the processes of a run that :func:`refuse_separate_disks` needs."""

    rank: int
    world_size: int

    def broadcast_object(self, value: Any) -> Any: ...

    def gather_object(self, value: Any) -> list[Any]: ...


def refuse_separate_disks(
    path: Path, ranks: _Ranks, *, wait_seconds: float = VISIBLE_SECONDS, disk: Disk = DISK
) -> None:
    """Refuse a run folder that not every rank sees, because each rank writes its part of a checkpoint there. Collective.

    Rank 0 creates a file with a new name, and the others look for it: a network file system cannot have cached such a name.

    Raises:
        RequestError: on every rank; it names the ranks that do not see the folder, and their hosts.
    """
    if ranks.world_size == 1:
        return
    mark = path / f".seen-by-all-{uuid.uuid4().hex}"
    if ranks.rank == 0:
        for left in path.glob(".seen-by-all-*"):  # left by a start that was killed here
            disk.remove_quietly(left)
        disk.write_file(mark, b"", durable=False)
    mark = path / ranks.broadcast_object(mark.name)
    end = time.monotonic() + wait_seconds
    while not (seen := mark.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    answers = ranks.gather_object((seen, socket.gethostname()))
    if ranks.rank == 0:
        disk.remove_quietly(mark)
    blind = [f"{rank} ({host})" for rank, (seen, host) in enumerate(answers) if not seen]
    if blind:
        raise RequestError(
            f"run_dir {path} of rank 0 ({answers[0][1]}) is not seen by rank {', '.join(blind)}: every rank writes its part "
            "of a checkpoint there; choose a --run_dir (of a run in a bucket: a --local_dir) on a disk that all nodes share"
        )


@final
class RunFolder:
    """The folder of one run. Creating the object does not touch the disk; :meth:`lock` creates the folder.

    Args:
        path: the folder; any path that the user chooses.
        private: give the folder mode 0700 regardless of the umask.
    """

    def __init__(self, path: Path | str, *, private: bool = False, disk: Disk = DISK) -> None:
        self.path = Path(path)
        self.private = private
        self._disk = disk
        self._lock_fd: int | None = None
        self._stop_beating = threading.Event()
        self._beating: threading.Thread | None = None
        self._status: dict[str, Any] = {}
        self._locks_work = True
        self._identity: tuple[tuple[int, int], str] | None = None

    # ---- places -------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def create(self) -> None:
        """Create the folder and ``logs``. Raises ``RequestError`` if that is impossible."""
        try:
            self._disk.makedirs(self.path, mode=0o700 if self.private else 0o777)
            if self.private:
                os.chmod(self.path, 0o700)
            self._disk.makedirs(self.logs)
        except OSError as error:
            raise RequestError(
                f"run folder {self.path} cannot be written: {error.strerror}; choose another with --run_dir"
            ) from None

    # ---- lock ---------------------------------------------------------------------------------------------

    def lock(
        self,
        *,
        note: Callable[[str], None] = print,
        beat_seconds: float = BEAT_SECONDS,
        wait_seconds: float = 0.0,
    ) -> None:
        """Become the only writer of this folder, and create it if necessary. Only rank 0 calls this.

        The kernel's record lock decides between jobs on the same machine and, if the network file system supports it, between
        machines. It ends with its process, not with the process's children. For file systems without such locks the holder
        also increments a number in the file: a lock that another machine has left is watched for two beats and taken over only
        if the number does not change. A requeued job (with the same job id) takes over its own lock at once.

        Args:
            wait_seconds: how long to wait for a holder that is about to end (an automatic restart may overlap the last
                seconds of the process that it replaces).

        Raises:
            RequestError: another job holds the lock; the message has its host, pid and job id.
        """
        self.create()
        path = self.path / ".lock"
        self.refuse_odd_files()
        if self.checkpoints.is_dir() and not os.access(self.checkpoints, os.W_OK | os.X_OK):
            raise RequestError(
                f"{self.checkpoints} cannot be written, so that the training could not be saved: change its permissions, or "
                "choose another --run_dir"
            )
        key = os.path.realpath(path)
        if _held.get(key) == os.getpid():
            raise RequestError(f"run folder {self.path} is in use by this very process")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise RequestError(
                f"run folder {self.path} cannot be locked: {error.strerror}; choose another with --run_dir"
            ) from None
        try:
            self._take(fd, note=note, beat_seconds=beat_seconds, wait_seconds=wait_seconds)
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd, _held[key] = fd, os.getpid()
        self._stop_beating.clear()
        holder = new_holder()
        try:
            _write_holder(fd, holder)
        except OSError as error:  # a full disk, for example
            raise of_disk(OSError(error.errno, error.strerror, os.fspath(path))) from error
        self._identity = _identity(self.path), holder["token"]
        if not self._locks_work:
            # Without record locks two simultaneous starts can both get here: the later writer wins.
            time.sleep(SETTLE_SECONDS)
            if (_read_holder(fd) or {}).get("token") != holder["token"]:
                raced = self._refusal(_read_holder(fd))
                _held.pop(key)
                self._lock_fd = None
                os.close(fd)
                raise raced
        self._beating = threading.Thread(
            target=self._beat, args=(fd, holder, beat_seconds), name="run-folder-lock", daemon=True
        )
        self._beating.start()

    def _take(
        self, fd: int, *, note: Callable[[str], None], beat_seconds: float, wait_seconds: float
    ) -> None:
        give_up, waiting = time.monotonic() + wait_seconds, False
        while not (carried := _record_lock(fd)):
            if carried is None:
                note(f"{self.path}: file locking is not supported here; polling the lock file instead")
                self._locks_work = False
                break
            if time.monotonic() >= give_up:
                raise self._refusal(_read_holder(fd))
            if not waiting:
                waiting = True
                note(
                    f"{self.path} is in use by {describe_holder(_read_holder(fd))}; waiting up to {wait_seconds:.0f} s for it "
                    f"to end"
                )
            time.sleep(min(0.2, beat_seconds))
        holder = _read_holder(fd)
        if holder is None:
            return
        mine = new_holder()
        same_kernel = holder.get("host") == mine["host"] and holder.get("boot") == mine["boot"]
        same_job = mine["job_id"] is not None and holder.get("job_id") == mine["job_id"]
        if not (same_kernel and carried) and not same_job:
            note(
                f"{self.path}: locked by {describe_holder(holder)}; watching {2 * beat_seconds:.0f} s if it lives"
            )
            _record_unlock(fd)  # NFS reads fresh content only after locking again
            time.sleep(2 * beat_seconds)
            if _record_lock(fd) is False or _read_holder(fd) not in (holder, None):
                raise self._refusal(_read_holder(fd) or holder)
        note(f"{self.path}: took over the lock of {describe_holder(holder)}, which is gone")

    def refuse_odd_files(self) -> None:
        """Raise ``RequestError`` if a name that a run writes to is a link out of the folder, or a folder or FIFO instead of a
        file."""
        root = os.path.realpath(self.path)
        for path in (
            *(self.path / name for name in NEVER_LINKS),
            *self.logs.glob("*"),
            *self.logs.glob(".*"),
        ):
            if path.is_symlink() and os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise RequestError(
                    f"{path} is a link to {os.readlink(path)!r}, outside of the run folder, and the run would write "
                    f"through it; remove the link (checkpoints may be one) or choose another --run_dir"
                )
        for path in (self.path / name for name in FILES):
            if path.exists() and not path.is_file():
                raise RequestError(
                    f"{path} is not a file, and the run would write it; remove it or choose another --run_dir"
                )

    def check_owner(self) -> None:
        """Check before a write that the folder still belongs to this process.

        Raises:
            FaultError: the folder was renamed, removed or replaced, or another job has taken its lock, during this run.
        """
        if self._identity is None or self._lock_fd is None:
            return
        folder, token = self._identity
        if _identity(self.path) != folder:
            raise FaultError(
                f"run folder {self.path} was renamed, removed or replaced while this run was training; nothing more is "
                f"written. Its checkpoints are where the folder went: move it back and run the same command"
            )
        try:
            named, held = os.stat(self.path / ".lock"), os.fstat(self._lock_fd)
            same = (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
        except OSError:
            same = False
        holder = _read_holder(self._lock_fd) if same else None
        if not same or (holder or {}).get("token", token) != token:
            raise FaultError(
                f"run folder {self.path} was taken over by {describe_holder(holder)} while this run was training; nothing more "
                f"is written"
            )

    def _refusal(self, holder: Mapping[str, Any] | None) -> RequestError:
        return RequestError(
            f"run folder {self.path} is in use by {describe_holder(holder)}: wait for that job, stop it "
            f"(touch {self.path}/STOP), or choose another --run_dir"
        )

    def _beat(self, fd: int, holder: dict[str, Any], beat_seconds: float) -> None:
        while not self._stop_beating.wait(beat_seconds):
            holder["beat"] += 1
            # A full disk must not end the run here, because the beat only matters to other machines.
            with contextlib.suppress(OSError):
                _write_holder(fd, holder)

    def unlock(self) -> None:
        """Release the lock, so that the next job can start at once. A no-op if it is not held."""
        if self._lock_fd is None:
            return
        fd, self._lock_fd = self._lock_fd, None
        self._stop_beating.set()
        if self._beating is not None:
            self._beating.join()  # a late beat would write into whatever file gets this descriptor next
        _held.pop(os.path.realpath(self.path / ".lock"), None)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        os.close(fd)

    # ---- status -------------------------------------------------------------------------------------------

    def write_status(
        self,
        state: str,
        *,
        step: int | None = None,
        exit_code: int | None = None,
        reason: str = "",
        **more: Any,
    ) -> None:
        """Replace ``status.json`` atomically. Scripts read it, because launchers turn every failure into exit code 1.

        ``step`` and ``more`` keep their values of earlier calls if they are not given.
        """
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}; choose from {', '.join(STATES)}")
        self._status |= more
        if step is not None:
            self._status["step"] = step
        status = {
            "state": state,
            "exit_code": exit_code,
            "reason": redact(reason)[:REASON_CHARACTERS],
            "step": self._status.get("step"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "parent_pid": os.getppid(),
            "job_id": job_id(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        # "running" is written at every save, between two steps. It need not survive a power cut; how a run ended must.
        path, whole = self.path / "status.json", self._status | status
        try:
            self._disk.write_json(path, whole, durable=state != "running")
        except OSError:
            # On a full disk the existing file can still be overwritten in place. If even that fails, a run in progress
            # continues: its saves and metrics report the full disk, and its end is written again.
            if not _overwrite(path, json.dumps(whole, indent=2) + "\n") and state not in (
                "running",
                "preparing",
            ):
                raise

    def remember(self, **facts: Any) -> None:
        """Include these facts in every later ``status.json`` of this process."""
        self._status |= facts

    def read_status(self) -> dict[str, Any] | None:
        """The last status, or ``None``."""
        path = self.path / "status.json"
        try:
            value = json.loads(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def new_holder() -> dict[str, Any]:
    """What a lock file says about this process. ``token`` is unique, ``beat`` is incremented, and ``pids`` is the PID namespace
    of ``pid``: two containers on one machine may both have a process 1."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": job_id(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pids": pid_namespace(),
        "token": uuid.uuid4().hex,
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "beat": 0,
    }


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a folder; (0, 0) if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


def describe_holder(holder: Mapping[str, Any] | None) -> str:
    """The holder of a lock in words, for messages."""
    if not holder:
        return "an unknown process"
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    return f"pid {holder.get('pid')} on {holder.get('host')}{job} (since {holder.get('since')})"


def _record_lock(fd: int) -> bool | None:
    """Take the record lock. True: taken. False: another process holds it. None: the file system has no record locks."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return None
    return True


def _record_unlock(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_UN)


def _read_holder(fd: int) -> dict[str, Any] | None:
    """The content of the lock file, read through the descriptor that we hold: closing another one would release the lock."""
    text = os.pread(fd, 65536, 0)
    try:
        value = json.loads(text) if text.strip() else None
    except ValueError:
        # The holder was killed while writing. The lock still has an owner, and its content can be compared.
        return {"torn": text.decode(errors="replace")}
    return value if isinstance(value, dict) else None


def _write_holder(fd: int, holder: Mapping[str, Any]) -> None:
    text = json.dumps(holder).encode() + b"\n"
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))


def _overwrite(path: Path, text: str) -> bool:
    """Overwrite an existing file in place, which needs no new space. Returns whether that worked."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        data = text.encode()
        if os.pwrite(descriptor, data, 0) < len(data):
            return False
        os.ftruncate(descriptor, len(data))
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
