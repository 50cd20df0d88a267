"""A run folder in a bucket: the run works in a local folder, and a thread of rank 0 keeps the bucket up to date.

At any instant another machine with an empty disk can continue the run from what is in the bucket: checkpoints with their
manifests (:mod:`lmcore.checkpoint.remote`), and the small files of the run, which are uploaded before the manifest of a
checkpoint that they must cover. The thread cannot stall a step or lose the local copy. A pass that fails is reported once
and repeated with growing waits.

``.bucket.json`` in the local folder records the lease under which the folder was last used. If that is still the last lease
of the bucket, no other machine has worked on the run since, and the disk has everything that the bucket has, or more.
Otherwise the bucket takes precedence: its files replace the local ones, and local checkpoints that it does not have are set
aside.

Example::

    bucket = Bucket("s3://bucket/runs/demo", Path("/local/demo"), keep=3)
    bucket.open()                       # take the lease; download the small files of the run
    bucket.fetch("auto")                # the checkpoint to resume from, if the bucket has the newer one
    bucket.start()
    ...
    bucket.poll()                       # at each step: messages; FaultError under on_upload_failure stop
    bucket.close(limit_seconds=60)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

from lmcore.checkpoint import reader
from lmcore.checkpoint.manifest import MANIFEST, Damaged, committed, read_manifest, step_name, step_of, verify
from lmcore.checkpoint.remote import FOLDER as CHECKPOINTS
from lmcore.checkpoint.remote import RemoteCheckpoints
from lmcore.checkpoint.retention import kept_steps
from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.run import lease as leases
from lmcore.run.lease import Lease
from lmcore.storage import Store, StoreError

RECORD: Final = ".bucket.json"
"""File in the local folder: the URL that the folder is a copy of, and the lease under which it was last written."""
SCRATCH: Final = ".bucket"
LOOK_SECONDS: Final = 1.0
"""How often the local folder is checked for a new checkpoint."""
FILES_SECONDS: Final = 60.0
"""How often changed files (metrics, log, status) are uploaded; they are also uploaded before every checkpoint."""
LONGEST_WAIT_SECONDS: Final = 60.0
FAILED_PASSES: Final = 5
"""After this many failed passes in a row (each with several tries of every request), ``on_upload_failure`` decides."""
END_SECONDS: Final = 600.0
"""How long the end of a training waits for a store that accepts no uploads."""
LATE_FOLDERS: Final = ("export", "profile")
"""Uploaded only at the end, because they are not needed to resume."""
_NEVER: Final = ("STOP", "SAVE", CHECKPOINTS, leases.FOLDER)


def bring_files(store: Store, local: Path) -> int:
    """Download the small files of a run, without checkpoints, export and profile. Returns their number."""
    count = 0
    for name in store.names():
        parts = name.split("/")
        if parts[0] in (*_NEVER, *LATE_FOLDERS) or any(
            part in ("", "..") or part.startswith(".") for part in parts
        ):
            continue
        target = local / name
        if parts[0] == "logs" and target.exists():
            continue  # a launcher may have it open, and would continue to write into the replaced file
        DISK.makedirs(target.parent)
        aside = target.with_name(f".{target.name}.tmp")
        try:
            store.download(name, aside)
        except FileNotFoundError:
            continue  # removed after it was listed
        DISK.rename(aside, target)
        count += 1
    return count


@final
class Bucket:
    """The bucket of one run; created on rank 0 only.

    Args:
        url: URL of the run folder.
        local: the folder that the run works in.
        keep, keep_best, keeps: retention, as for :class:`lmcore.checkpoint.writer.Checkpoints`; while ``keeps`` is ``None``
            (not known yet), nothing is removed.
        stop_on_failure: whether :meth:`poll` raises when nothing can be uploaded.
        note: called with one line per event, on the thread that calls a method.
        store, lease: for tests.
    """

    def __init__(
        self,
        url: str,
        local: Path,
        *,
        keep: int = 3,
        keep_best: Mapping[str, Any] | None = None,
        keeps: Callable[[int], bool] | None = lambda step: False,
        stop_on_failure: bool = False,
        note: Callable[[str], None] = print,
        store: Store | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._wake, self._closing = threading.Event(), threading.Event()
        self.store = store or Store(url)
        self.local, self.keep, self.keep_best, self.keeps = local, max(1, keep), keep_best, keeps
        self.note = note
        self._stop_on_failure = stop_on_failure
        self._messages: list[str] = []
        self._lease = lease or Lease(self.store, note=note)
        self._remote = RemoteCheckpoints(
            self.store, scratch=local / SCRATCH / "manifests", note=self._messages.append
        )
        self._there: dict[int, dict[str, Any]] = {}
        """Manifests of the checkpoints in the bucket."""
        self._here: dict[int, tuple[tuple[int, int, int], dict[str, Any]]] = {}
        """Manifests of the local checkpoints, each with inode, size and modification time of its file."""
        self._own_after = sys.maxsize
        """Local checkpoints of later steps than this were saved by this process and replace those of the bucket."""
        self._abandon: int | None = None
        self._put: dict[str, tuple[int, int]] = {}
        """File -> (size, modification time) at its last upload."""
        self._files_due = 0.0
        self._passes = self._failed_passes = 0
        self._fault: FaultError | None = None
        self._moved = time.monotonic()
        self._thread: threading.Thread | None = None
        self.upload_seconds = 0.0
        """Duration of the last upload of a checkpoint: the time to reserve before a deadline."""

    # ---- start

    def open(self) -> None:
        """Take the lease, and download the small files of the run if those of the bucket are newer.

        Raises:
            RequestError: another run has the lease; or the local folder belongs to another run.
            FaultError: the store does not answer.
        """
        try:
            self._open()
        except StoreError as error:
            raise FaultError(f"{error}; nothing was changed: run the same command again") from error
        finally:
            self._say()

    def _open(self) -> None:
        DISK.makedirs(self.local)
        record = self._read_record()
        number, holder = self._lease.last()
        used = (self.local / "checkpoints").is_dir() or (self.local / "metrics.jsonl").exists()
        if record is None and used and (number or self.store.names(CHECKPOINTS)):
            raise RequestError(
                f"local folder {self.local} holds a run, and {self.store.url} holds one too: choose another --local_dir, "
                "or another --run_dir"
            )
        if record is not None and record["url"] != self.store.url:
            raise RequestError(
                f"local folder {self.local} is the copy of {record['url']}, not of {self.store.url}: choose another "
                "--local_dir"
            )
        last = None if holder is None else holder.get("token")
        newest_here = (number == 0 and used) or (record is not None and last in record["tokens"])
        # Record both leases, so that a kill between these writes does not make the disk look older than it is.
        self._write_record([last, self._lease.token] if newest_here else [])
        self._lease.take(number, holder)
        DISK.remove_quietly(self.local / SCRATCH)
        self._there = self._remote.manifests()
        if not newest_here:
            bring_files(self.store, self.local)
            self._set_strangers_aside()
        self._write_record([self._lease.token])
        self._lease.start()

    def _set_strangers_aside(self) -> None:
        """Set aside the local checkpoints that the bucket does not have, because another machine continued without them."""
        for path in committed(self.local / "checkpoints"):
            try:
                files = read_manifest(path)["files"]
            except (Damaged, RequestError):
                continue  # the damage is reported when the checkpoint is opened
            if self._there.get(step_of(path), {}).get("files") != files:
                outcome = reader.set_aside(path, "abandoned", DISK)
                self._messages.append(
                    f"checkpoint {path.name} is not in {self.store.url}, where another machine went on; {outcome}"
                )

    def fetch(self, resume: str) -> None:
        """Download the checkpoint to resume from, if the local folder does not have it; of damaged ones, the next older one.

        Args:
            resume: ``auto``, ``best``, ``never``, the name of a checkpoint of this run, or a path; for ``never`` and a path
                nothing is downloaded.

        Raises:
            FaultError: the store does not answer.
        """
        try:
            if resume == "best":
                best = reader.best_last(
                    ((Path(step_name(step)), self._metric(one)) for step, one in self._there.items()),
                    self._mode(),
                    after=reader.measured_after(self._there.values()),
                )
                for path in reversed(best):
                    if self._bring(step_of(path)):
                        break
            named = re.fullmatch(r"step-([0-9]{8,})", resume)
            if named and not Path(resume).is_dir():  # reader.find interprets it in the same way
                self._bring(int(named[1]))
            if resume in ("auto", "best"):
                here = {step_of(path) for path in committed(self.local / "checkpoints")}
                for step in sorted(here | set(self._there), reverse=True):
                    if self._bring(step):
                        break
        except StoreError as error:
            raise FaultError(f"{error}; nothing was changed: run the same command again") from error
        finally:
            self._say()

    def _bring(self, step: int) -> bool:
        """Download the checkpoint of a step if it is not there. Returns whether the local folder has a good one now."""
        path = self.local / "checkpoints" / step_name(step)
        if path.exists():
            try:
                verify(path, content=True)
                return True
            except Damaged as damage:
                outcome = reader.set_aside(path, "damaged", DISK)
                self._messages.append(f"checkpoint {path.name} is damaged ({damage}); {outcome}")
        if step not in self._there:
            return False
        begin = time.monotonic()
        try:
            self._remote.fetch(step, path.parent)
        except (Damaged, FileNotFoundError) as damage:
            self._remote.set_aside(step, "damaged", f"damaged ({damage})")
            self._there.pop(step)
            return False
        self._messages.append(
            f"checkpoint {path.name} downloaded from {self.store.url} and verified in "
            f"{time.monotonic() - begin:.1f} s"
        )
        return True

    def _metric(self, manifest: Mapping[str, Any]) -> Any:
        kept = self.keep_best or manifest.get("keep_best") or {"metric": "loss"}
        return manifest["metrics"].get(kept["metric"])

    def _mode(self) -> str | None:
        kept = [self.keep_best, *(one.get("keep_best") for one in reversed(self._there.values()))]
        return next((str(one["mode"]) for one in kept if one and one.get("mode")), "min")

    def abandon_after(self, step: int) -> None:
        """Set later checkpoints of the bucket aside, because training continues from ``step`` (-1: from scratch)."""
        self._abandon = step
        self._own_after = step
        self._wake.set()

    def start(self) -> None:
        """Start the thread that uploads changes of the local folder to the bucket."""
        self._thread = threading.Thread(target=self._follow, name="bucket", daemon=True)
        self._thread.start()

    # ---- the thread

    def _follow(self) -> None:
        wait = LOOK_SECONDS
        while True:
            closing = self._closing.is_set()
            try:
                self._pass(closing)
            except FaultError as fault:  # the lease is lost: write nothing more
                self._fault = fault
                return
            except Exception as error:  # the store failed or a file vanished: the next pass tries again
                self._failed_passes += 1
                wait = min(LONGEST_WAIT_SECONDS, 2.0 ** min(self._failed_passes, 30))
                if self._failed_passes == 1:
                    words = (
                        str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
                    )
                    self._messages.append(
                        f"warning: {words}; uploads are tried again, the local copy in {self.local} stands"
                    )
                if self._failed_passes == FAILED_PASSES and self._stop_on_failure:
                    self._fault = FaultError(
                        f"{self.store.url} takes no uploads ({error}); the local copy in {self.local} stands: run the same "
                        "command again, or train on without uploads: --checkpoint.on_upload_failure warn"
                    )
            else:
                if self._failed_passes:
                    self._messages.append(f"{self.store.url} takes uploads again")
                self._failed_passes, wait = 0, LOOK_SECONDS
                self._passes += 1
                if closing:
                    return
            self._wake.wait(wait)
            self._wake.clear()

    def _pass(self, final: bool) -> None:
        """Bring the bucket up to date with the local folder. Idempotent, so that it can be interrupted anywhere."""
        if self._abandon is not None:
            step, self._abandon = self._abandon, None
            try:
                for later in [one for one in self._there if one > step]:
                    self._remote.set_aside(
                        later, "abandoned", f"newer than step {max(step, 0)}, which is resumed"
                    )
                    self._there.pop(later)
            except BaseException:
                self._abandon = step if self._abandon is None else self._abandon
                raise
        here = self._local_checkpoints()
        waiting = self._waiting(here)
        if waiting or final or time.monotonic() >= self._files_due:
            self._lease.check()
            self._put_files(final)
        for step in waiting:
            begin = time.monotonic()
            try:
                put = self._put_checkpoint(step)
                # Keep the same object, so that comparing the two in every pass costs nothing.
                self._there[step] = here[step] if here[step] == put else put
            except Damaged:
                continue  # retention has removed it, or it is damaged, which the next resume reports
            self.upload_seconds = time.monotonic() - begin
            self._messages.append(
                f"checkpoint {step_name(step)} uploaded to {self.store.url} in {self.upload_seconds:.1f} s"
            )
        if waiting or final or time.monotonic() >= self._files_due:
            self._put_status()
            self._files_due = time.monotonic() + FILES_SECONDS
        if waiting and self.keeps is not None:
            stay = self._kept(self._there)
            for step in [step for step in self._there if step not in stay]:
                self._remote.remove(step)
                self._there.pop(step)

    def _local_checkpoints(self) -> dict[int, dict[str, Any]]:
        """Step -> manifest. Each is read only once, because parsing a large one holds the GIL for a while."""
        known, self._here = self._here, {}
        for path in committed(self.local / "checkpoints"):
            step = step_of(path)
            try:
                info = (path / MANIFEST).stat()
                stamp = info.st_ino, info.st_size, info.st_mtime_ns
                before = known.get(step)
                if before is None or before[0] != stamp:
                    before = stamp, read_manifest(path)
                self._here[step] = before
            except (OSError, Damaged, RequestError):
                continue
        return {step: manifest for step, (_, manifest) in self._here.items()}

    def _waiting(self, here: Mapping[int, dict[str, Any]]) -> list[int]:
        """Steps to upload, the newest first."""
        stay = self._kept({**self._there, **here})
        waiting = []
        for step in sorted(stay & here.keys(), reverse=True):
            there = self._there.get(step)
            same_files = there is not None and there["files"] == here[step]["files"]
            if there is None or (there != here[step] and (same_files or step > self._own_after)):
                waiting.append(step)
        return waiting

    def _kept(self, known: Mapping[int, dict[str, Any]]) -> set[int]:
        values = {step: (one["reason"], one["metrics"]) for step, one in known.items()}
        keeps = self.keeps or (lambda step: False)
        after = reader.measured_after(known.values())
        return kept_steps(
            values, keep=self.keep, keep_best=self.keep_best, keeps=keeps, measured_after=after
        )[0]

    def _put_checkpoint(self, step: int) -> dict[str, Any]:
        """Upload a checkpoint from hard links of its files, so that retention on the disk cannot remove them meanwhile."""
        path = self.local / "checkpoints" / step_name(step)
        links = self.local / SCRATCH / step_name(step)
        DISK.remove_quietly(links)
        try:
            try:
                DISK.makedirs(links)
                for entry in os.scandir(path):
                    os.link(entry.path, links / entry.name)
            except FileNotFoundError:
                raise Damaged("removed while it was being read") from None
            except OSError:  # a file system without links, or a checkpoint on another disk
                links = path
            manifest = self._remote.put(links, before_commit=self._lease.check)
            self._moved = time.monotonic()
            return manifest
        finally:
            if links != path:
                DISK.remove_quietly(links)

    def _put_files(self, final: bool) -> None:
        """Upload the small files that have changed, except ``status.json``, which is uploaded after the checkpoints."""
        for folder, folders, files in os.walk(self.local):
            top = Path(folder) == self.local
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".")
                and not (top and name in (_NEVER if final else (*_NEVER, *LATE_FOLDERS)))
            )
            for name in sorted(files):
                if (
                    name.startswith(".")
                    or name.endswith(".tmp")
                    or (top and name in (*_NEVER, "status.json"))
                ):
                    continue
                self._put_file(Path(folder) / name)

    def _put_file(self, path: Path) -> None:
        name = path.relative_to(self.local).as_posix()
        try:
            info = path.lstat()
            stamp = info.st_size, info.st_mtime_ns
            if self._put.get(name) == stamp or path.is_symlink() or not path.is_file():
                return
            # Upload a copy: a log that grows during the upload would differ in size from the object.
            copy = self.local / SCRATCH / "file"
            DISK.makedirs(copy.parent)
            shutil.copyfile(path, copy)
        except FileNotFoundError:
            return  # removed after it was listed
        self.store.upload(copy, name)
        self._put[name] = stamp
        self._moved = time.monotonic()

    def _put_status(self) -> None:
        """Upload ``status.json`` with the newest step in the bucket, not on this disk, as its ``checkpoint_step``."""
        try:
            data = (self.local / "status.json").read_bytes()
            status = json.loads(data)
        except (OSError, ValueError):
            return
        status["checkpoint_step"] = max(self._there, default=None)
        self.store.write("status.json", json.dumps(status, indent=2).encode() + b"\n")

    # ---- the thread that trains

    def poll(self) -> None:
        """Report what has happened since the last call.

        Raises:
            FaultError: another run has taken the lease; or nothing can be uploaded, and the policy is to stop.
        """
        self._say()
        if self._fault is not None:
            raise self._fault

    @property
    def failed(self) -> bool:
        """Whether :meth:`poll` would raise. Rank 0 alone knows it, so the ranks must agree on it."""
        self._say()
        return self._fault is not None

    def _say(self) -> None:
        while self._messages:
            self.note(self._messages.pop(0))

    def wait(self, *, limit_seconds: float, progress: Callable[[], None] = lambda: None) -> bool:
        """Wait until everything that is in the local folder now is in the bucket. Returns whether it is.

        Args:
            limit_seconds: give up if nothing was uploaded for this long; use :meth:`close` for an absolute limit.
        """
        self._moved = time.monotonic()
        return self._wait(lambda: time.monotonic() - self._moved < limit_seconds, progress)

    def _wait(self, go_on: Callable[[], bool], progress: Callable[[], None] = lambda: None) -> bool:
        target = self._passes + 2  # the current pass may have started before this call
        while (
            self._thread is not None
            and self._thread.is_alive()
            and self._fault is None
            and self._passes < target
            and go_on()
        ):
            self._files_due = 0.0
            if not self._failed_passes:  # after a failed pass the thread waits before it tries again
                self._wake.set()
            time.sleep(0.05)
            progress()
            self._say()
        self._say()
        return self._passes >= target

    def wait_until(self, moment: float, progress: Callable[[], None] = lambda: None) -> bool:
        """Like :meth:`wait`, but until ``time.monotonic()`` reaches ``moment`` at the latest."""
        return self._wait(lambda: time.monotonic() < moment, progress)

    def close(self, *, limit_seconds: float) -> None:
        """Upload what is left, within the limit, and release the lease. Raises nothing, because the local copy is complete."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(limit_seconds)
        if self._thread is not None and self._thread.is_alive():
            self._messages.append(
                f"warning: not everything was uploaded to {self.store.url} within {limit_seconds:.0f} s; the local copy in "
                f"{self.local} stands: the same command on this machine uploads it"
            )
        else:
            try:
                self._lease.release()
            except (StoreError, FaultError) as error:
                self._messages.append(f"warning: the lease could not be let go: {error}")
        self._say()

    # ---- the record in the local folder

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.local / RECORD).read_bytes())
            return {"url": str(record["url"]), "tokens": list(record["tokens"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_record(self, tokens: list[Any]) -> None:
        DISK.write_json(self.local / RECORD, {"url": self.store.url, "tokens": tokens})
