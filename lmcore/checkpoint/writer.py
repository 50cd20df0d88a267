"""Writing checkpoints: complete and verified, or not there at all.

A save writes into a temporary folder, hashes what it writes, syncs it, reads it back, writes the manifest last, renames
once and syncs the parent. After a kill or a power cut at any instant there is the old checkpoint, the new one, or both.
An old checkpoint is removed only after the new one is committed and verified. Files are safetensors and JSON: nothing
is ever unpickled.

Folder: ``checkpoints/step-00001000/{model*.safetensors, optim*.safetensors, state.json, manifest.json}``; beside it the
link ``best``, ``step-….damaged-<n>`` and ``step-….abandoned-<n>`` (set aside), and ``.step-….tmp`` (being written, or
left by a kill).

Example::

    saves = Checkpoints(run_dir / "checkpoints", keep=3)
    saves.save(100, layout=engine.state_layout(), tensors=engine.state(), state={"cursor": ...})
    saves.wait()
    with find(run_dir / "checkpoints") as checkpoint:
        engine.load_state(checkpoint.read)
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from lmcore import __version__
from lmcore.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    VERSION,
    Damaged,
    committed,
    digest,
    manifest_bytes,
    read_manifest,
    state_bytes,
    step_name,
    step_of,
)
from lmcore.checkpoint.reader import (
    Checkpoint,
    abandon_after,
    best_last,
    find,
    listing,
    open_checkpoint,
    set_aside,
)
from lmcore.checkpoint.tensors import Layout, Plan, in_order, plan, raw, write_planned
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.process import available_bytes

__all__ = ["Checkpoint", "Checkpoints", "abandon_after", "find", "listing", "open_checkpoint", "step_name"]

SHARD_BYTES: Final = 2 << 30
"""Files above this size are split; the files of a checkpoint are verified in parallel."""
BACKGROUND_NICE: Final = 10
"""Niceness of the writing thread, so that the training threads come first."""
PREEMPTION_REASONS: Final = frozenset({"signal", "deadline", "stop file", "exception", "preemption"})
"""A checkpoint saved for one of these is removed as soon as a newer one is committed."""


_LEFTOVER: Final = re.compile(r"\.step-.*\.tmp|\.old-step-.*")


@final
@dataclass(kw_only=True)
class _Save:
    """A save in progress; ``messages`` and ``problem`` go from the background thread to the caller's."""

    step: int
    plan: Plan
    manifest: dict[str, Any]
    state: bytes
    begin: float
    tensors: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    seconds: float = 0.0
    problem: Exception | None = None
    messages: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


class _Known(NamedTuple):
    """What retention needs of a manifest; ``stamp`` is (inode, size, time of change) of the file."""

    stamp: tuple[int, int, int]
    reason: str
    metrics: dict[str, Any]


@final
class Checkpoints:
    """Saves the checkpoints of one run. Create it on every rank; only the one with ``is_main`` touches the disk.

    Args:
        folder: ``<run folder>/checkpoints``; created by the first save. It may be a link, and so may checkpoints in it.
        keep: number of the newest checkpoints to keep (at least 1).
        keep_best: ``{"k": int, "metric": str, "mode": "min"|"max"}``: also keep the k best by a metric.
        keep_every: keep checkpoints whose step is a multiple of this for ever; ``None`` or 0 for none.
        background: write and hash in a thread of low priority; ``save`` returns when the tensors are copied.
        on_full_disk: after a failed save ``stop`` raises ``FaultError`` at the next step boundary, ``continue`` notes it
            and trains on. A failure of the last save is always raised (``wait(final=True)``).
        progress: called while :meth:`save` works, on every rank: at each tensor, and at each file that is read back. A
            watchdog takes it for a sign of life, so that a long save is not mistaken for a hang.
        note: gets one line per event; always called on the caller's thread.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int = 3,
        keep_best: Mapping[str, Any] | None = None,
        keep_every: int | None = None,
        background: bool = True,
        on_full_disk: str = "continue",
        is_main: bool = True,
        disk: Disk = DISK,
        progress: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = print,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)
        self.keep_best = dict(keep_best) if keep_best and keep_best.get("k") else None
        self.keep_every = keep_every or 0
        self.background = background
        self.is_main = is_main
        self.last_step: int | None = None
        """The step of the newest checkpoint that this object has committed or was resumed from."""
        self.save_seconds = 0.0
        """Duration of the last save from its beginning to its commit: the time to reserve before a deadline."""
        self._stop_on_failure = on_full_disk == "stop"
        self._disk, self._note, self._shard_bytes = disk, note, shard_bytes
        self._progress = progress
        self._known: dict[str, _Known] = {}
        self._running: _Save | None = None
        self._failure: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._late_metrics: dict[int, dict[str, Any]] = {}

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The run continues from this checkpoint: the same step need not be saved again."""
        self.last_step = checkpoint.step

    def save(
        self,
        step: int,
        *,
        layout: Layout,
        tensors: Iterable[tuple[str, str, str | None, Tensor | None]],
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        reason: str = "interval",
        epoch: float | None = None,
        tokens: int | None = None,
    ) -> None:
        """Save this step. Collective: every rank consumes ``tensors``, which may gather over ranks.

        Tensors are copied before the next one is asked for; they may be live parameters, on any device. A
        save that is still being written is waited for. The step that was saved last is not written again. A
        failure to write is never raised here, because the other ranks are inside the same gathering: it
        shows in :attr:`failed`, and is raised by :meth:`poll` and :meth:`wait`.

        Args:
            layout: (kind, name, slot, shape, dtype) of all tensors, in the order in which they come.
            tensors: (kind, name, slot, tensor); the tensor may be ``None`` on ranks that are not main.
            state: JSON content of ``state.json``; ``step`` is added.
            metrics: what is known about this step; more can come later by :meth:`record`.
            reason: ``interval``, ``end``, ``save file``, or one of :data:`PREEMPTION_REASONS`.
        """
        if self.is_main:
            self._settle(wait=True)
            try:
                save = self._begin(step, layout, state, metrics or {}, reason, epoch, tokens)
            except OSError as error:
                self._fail(step, error)
            else:
                if save is not None:
                    tensors = iter(tensors)
                    self._run(save, in_order(save.plan, tensors))
        for _ in tensors:  # the rest of the gathering: the other ranks are in it and wait for this one
            self._progress()

    def _run(self, save: _Save, tensors: Iterator[Tensor]) -> None:
        save.tensors = tensors
        if self.background and self._copy(save):
            try:
                threading.Thread(target=self._write, args=(save, BACKGROUND_NICE), name="checkpoint").start()
            except RuntimeError as error:  # the limit of threads or of memory
                self._note(f"checkpoint of step {save.step} is written in the foreground: {error}")
                self._write(save, 0)
        else:
            self._write(save, 0)
        self._running = save

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics that became known after the save (the evaluation of its step), for ``keep_best``."""
        if self.is_main:
            self._late_metrics.setdefault(step, {}).update(_plain(metrics))
            self._settle()

    def poll(self) -> int | None:
        """The step of a checkpoint that was committed since the last call, without waiting.

        Raises ``FaultError`` if a save has failed and policy is to stop.
        """
        return self._settled(wait=False, final=False)

    def wait(self, *, final: bool = False) -> int | None:
        """Wait until nothing is being written; otherwise like :meth:`poll`.

        Args:
            final: raise a failure whatever ``on_full_disk`` says. Call it before a run reports that it has finished.
        """
        return self._settled(wait=True, final=final)

    def _settled(self, *, wait: bool, final: bool) -> int | None:
        step = self._settle(wait=wait)
        if self._failure is not None and (final or self._stop_on_failure):
            raise FaultError(self._failure)
        return step

    @property
    def failed(self) -> bool:
        """Whether a save has failed and the run must stop: to be agreed on with the other ranks."""
        self._settle()
        return self._stop_on_failure and self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a save that is due by the clock has to wait for the one before it. Rank 0's clock decides for all."""
        return not self.is_main or (self._running is not None and not self._running.done.is_set())

    def _settle(self, *, wait: bool = False) -> int | None:
        """Take over the result of the background thread; never raises."""
        step = None
        if self._running is not None and (wait or self._running.done.is_set()):
            self._running.done.wait()
            save, self._running = self._running, None
            self.save_seconds = save.seconds
            for message in save.messages:
                self._note(message)
            if save.problem is not None:
                self._fail(save.step, save.problem)
            else:
                step = self.last_step = save.step
                self._failure = None
                self._note(f"checkpoint {step_name(step)} committed in {save.seconds:.1f} s")
        if self._running is None and self._late_metrics:
            late, self._late_metrics = self._late_metrics, {}
            for saved_step, metrics in late.items():
                try:
                    self._add_metrics(saved_step, metrics)
                except OSError as error:
                    self._note(
                        f"the metrics of step {saved_step} could not be added to its checkpoint: {error}"
                    )
        return step

    # ---- parts of a save -----------------------------------------------------------------------------------

    def _begin(
        self,
        step: int,
        layout: Layout,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        epoch: float | None,
        tokens: int | None,
    ) -> _Save | None:
        """Everything that can be checked before the first tensor is gathered; ``None``: nothing to do."""
        begin = time.monotonic()
        if self.last_step == step and (self.folder / step_name(step)).is_dir():
            return None
        content = state_bytes({"version": VERSION, **state, "step": step})
        planned = plan(layout, shard_bytes=self._shard_bytes)
        self._disk.makedirs(self.folder)
        with os.scandir(self.folder) as entries:
            left = [Path(entry.path) for entry in entries if _LEFTOVER.fullmatch(entry.name)]
        for path in left:
            self._disk.remove_tree(path)
        needed = planned.total_bytes + len(content) + (1 << 20)
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "lmcore": __version__,
            "torch": torch.__version__,
            "step": step,
            "epoch": epoch,
            "tokens": tokens,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": _plain(metrics),
            "keep_best": self.keep_best,
        }
        return _Save(step=step, plan=planned, manifest=manifest, state=content, begin=begin)

    def _copy(self, save: _Save) -> bool:
        """Copy all tensors to buffers on the host; False, with a note, if there is not enough memory for them."""
        sizes = dict(save.plan.data_bytes)
        if {name: len(buffer) for name, buffer in self._buffers.items()} != sizes:
            self._buffers.clear()
            needed, available = sum(sizes.values()), available_bytes()
            try:
                if available is not None and needed > 0.8 * available:
                    raise MemoryError(f"only {available / 1e9:.3g} GB of memory are free to copy it to")
                # Kept from save to save: fresh pages cost more than the copy.
                self._buffers.update(
                    {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
                )
            except (
                MemoryError,
                RuntimeError,
            ) as error:  # torch raises RuntimeError if the system gives no memory
                self._buffers.clear()
                cause = " ".join(str(error).split())
                self._note(f"checkpoint of {needed / 1e9:.3g} GB is written in the foreground: {cause}")
                return False
        for entry, tensor in zip(save.plan.entries, save.tensors, strict=True):
            self._buffers[entry.file][entry.start : entry.stop].copy_(raw(tensor))
        save.tensors = (self._buffers[entry.file][entry.start : entry.stop] for entry in save.plan.entries)
        return True

    def _write(self, save: _Save, niceness: int) -> None:
        """Write, commit and remove old ones, in the background or not. An exception is kept for the caller."""
        try:
            if niceness and sys.platform.startswith("linux"):  # where niceness belongs to the thread
                thread = threading.get_native_id()
                own = os.getpriority(os.PRIO_PROCESS, thread)  # lowering it needs a privilege
                os.setpriority(os.PRIO_PROCESS, thread, max(niceness, own))
            self._commit(save, self._progress if not niceness else lambda: None)
        except Exception as error:
            save.problem = error
            self._disk.remove_quietly(self.folder / f".{step_name(save.step)}.tmp")
        else:
            try:
                self._retain(save.step, save.messages)
            except OSError as error:
                save.messages.append(f"old checkpoints could not be removed: {error}")
        finally:
            save.seconds = time.monotonic() - save.begin
            save.done.set()

    def _commit(self, save: _Save, progress: Callable[[], None]) -> None:
        disk, name = self._disk, step_name(save.step)
        aside, target = self.folder / f".{name}.tmp", self.folder / name
        disk.mkdir(aside)
        disk.fsync_dir(self.folder)
        files = write_planned(disk, aside, save.plan, save.tensors, progress=progress)
        disk.write_file(aside / STATE, save.state)
        files[STATE] = {"bytes": len(save.state), "sha256": hashlib.sha256(save.state).hexdigest()}
        for file, entry in files.items():
            progress()
            if (found := digest(aside / file, from_disk=True)) != entry["sha256"]:
                raise OSError(errno.EIO, f"{file} reads back differently than it was written ({found[:16]}…)")
        disk.write_file(aside / MANIFEST, manifest_bytes(save.manifest | {"files": files}))
        disk.fsync_dir(aside)
        if os.path.lexists(target):
            # Of an abandoned branch. Killed between these two renames, the new one is complete and will be found.
            set_aside(target, "abandoned", disk)
        disk.rename(aside, target)
        disk.fsync_dir(self.folder)

    def _retain(self, step: int, messages: list[str]) -> None:
        """Link the best and remove old ones, now that the checkpoint of ``step`` is committed and verified."""
        paths = committed(self.folder)
        known = {path: found for path in paths if (found := self._read_once(path)) is not None}
        self._known = {path.name: found for path, found in known.items()}
        regular = [path for path, found in known.items() if found.reason not in PREEMPTION_REASONS]
        stay = {*regular[-self.keep :], *paths[-1:], self.folder / step_name(step)}
        if self.keep_best:
            metric, mode = self.keep_best["metric"], self.keep_best.get("mode")
            best = best_last(((path, found.metrics.get(metric)) for path, found in known.items()), mode)
            stay |= set(best[-int(self.keep_best["k"]) :])
            if best:
                self._link_best(best[-1].name, messages)
        going = []
        for path in known:
            if path not in stay and not (self.keep_every and step_of(path) % self.keep_every == 0):
                # Renamed first: a kill in the middle must not leave half a folder under a good name.
                going.append(path.with_name(f".old-{path.name}"))
                self._disk.rename(path, going[-1])
        if going:
            self._disk.fsync_dir(self.folder)
        for old in going:
            self._disk.remove_tree(old)

    def _read_once(self, path: Path) -> _Known | None:
        """Reason and metrics from a manifest, read again only if it has changed; ``None`` for a damaged one.

        With thousands of kept checkpoints, reading all manifests at every save takes longer than the save.
        """
        try:
            info = os.stat(path / MANIFEST)
            stamp = info.st_ino, info.st_size, info.st_mtime_ns
            known = self._known.get(path.name)
            if known is None or known.stamp != stamp:
                manifest = read_manifest(path)
                known = _Known(stamp, manifest["reason"], manifest["metrics"])
        except (Damaged, RequestError, OSError):
            return None  # left as it is: the next resume sets it aside
        return known

    def _link_best(self, name: str, messages: list[str]) -> None:
        link, aside = self.folder / "best", self.folder / ".best.tmp"
        if link.is_symlink() and os.readlink(link) == name:
            return
        try:
            if aside.is_symlink():
                self._disk.unlink(aside)
            self._disk.link(aside, name)
            self._disk.rename(aside, link)
        except OSError as error:  # not every file system has links; --resume best reads the manifests
            messages.append(f"the link checkpoints/best could not be set: {error.strerror}")

    def _add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        path = self.folder / step_name(step)
        try:
            manifest = read_manifest(path)
        except Damaged:
            return  # this step was not saved, or was removed meanwhile
        manifest["metrics"] |= metrics
        # Beside the folder, not in it: a file that a kill leaves inside would make the checkpoint a damaged one.
        aside = self.folder / f".manifest-{step}.tmp"
        self._disk.write_file(aside, manifest_bytes(manifest))
        self._disk.rename(aside, path / MANIFEST)
        self._disk.fsync_dir(path)
        messages: list[str] = []
        self._retain(step, messages)
        for message in messages:
            self._note(message)

    def _fail(self, step: int, error: Exception) -> None:
        last = "older ones are" if self.last_step is None else f"{step_name(self.last_step)} is"
        cause = (error.strerror or str(error)) if isinstance(error, OSError) else repr(error)
        remedy = (
            ", or keep training without it: --checkpoint.on_full_disk continue"
            if self._stop_on_failure
            else ""
        )
        self._failure = (
            f"checkpoint of step {step} could not be written: {cause}; {last} untouched; check space and permissions of "
            f"{self.folder}{remedy}"
        )
        if not self._stop_on_failure:
            self._note(self._failure)


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON has them: NaN and infinity become null (never the best of anything)."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
