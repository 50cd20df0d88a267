"""Checkpoints: whole and verified, or not there at all.

Comes in: tensors one at a time by parameter name, and a JSON state. Goes out: a folder from which any
strategy on any number of ranks resumes. What always holds:

* A save writes aside, hashes what it writes, syncs it, reads it back, writes the manifest last, renames once
  and syncs the parent. Killed at any instant, or without power, there is the old checkpoint, the new one, or
  both.
* Nothing of a checkpoint is used before every byte of it has been compared with the manifest; a damaged one
  is set aside with a word and the next older one is taken.
* safetensors and JSON only. Nothing here can unpickle.
* An old checkpoint goes only after the new one is committed and verified.

Folder: ``checkpoints/step-00001000/{model*.safetensors, optim*.safetensors, state.json, manifest.json}``,
and beside it the link ``best``, ``step-….damaged-<n>`` (set aside) and ``.step-….tmp`` (being written, or
left by a kill).

Reading is in ``_checkpoint_find.py``, the comparison with the manifest in ``_checkpoint_folder.py``, the
tensor files in ``_tensor_files.py``; all that others use is here.

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
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

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
    step_name,
    step_of,
)
from lmcore.checkpoint.reader import (
    Checkpoint,
    abandon_after,
    find,
    listing,
    open_checkpoint,
    ranked,
    set_aside,
)
from lmcore.checkpoint.tensors import Layout, Plan, in_order, plan, raw, write_planned
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.process import available_bytes

__all__ = ["Checkpoint", "Checkpoints", "abandon_after", "find", "listing", "open_checkpoint", "step_name"]

SHARD_BYTES: Final = 2 << 30
"""Files above this are split; they are also what is verified side by side."""
BACKGROUND_NICE: Final = 10
"""How far the writing thread steps back behind the training threads."""
PREEMPTION_REASONS: Final = frozenset({"signal", "deadline", "stop file", "exception", "preemption"})
"""A checkpoint saved for one of these is rolling: it goes as soon as a newer one is committed."""


@final
@dataclass(kw_only=True)
class _Save:
    """One save on its way; ``words`` and ``problem`` are what the background has to tell the foreground."""

    step: int
    plan: Plan
    manifest: dict[str, Any]
    state: bytes
    begin: float
    tensors: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    seconds: float = 0.0
    problem: Exception | None = None
    words: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


@final
class Checkpoints:
    """The checkpoints of one run. Made on every rank; only the one with ``is_main`` touches the disk.

    Args:
        folder: ``<run folder>/checkpoints``; made by the first save.
        keep: how many of the newest stay (at least 1).
        keep_best: ``{"k": int, "metric": str, "mode": "min"|"max"}``: the k best by a metric stay as well.
        keep_every: checkpoints whose step is a multiple of this stay for ever; ``None`` or 0 for none.
        background: write and hash in a thread of low priority; ``save`` returns when the tensors are copied.
        on_full_disk: after a failed save ``stop`` raises ``FaultError`` at the next boundary; ``continue``
            says so and trains on. A failure of the last save is always raised (``wait(final=True)``).
        say: gets one line for everything worth knowing; always called on the caller's thread.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int = 3,
        keep_best: Mapping[str, Any] | None = None,
        keep_every: int | None = None,
        background: bool = True,
        on_full_disk: str = "stop",
        is_main: bool = True,
        disk: Disk = DISK,
        say: Callable[[str], None] = print,
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
        """How long the last save took from beginning to commit: what a deadline must leave room for."""
        self._stop_on_failure = on_full_disk == "stop"
        self._disk, self._say, self._shard_bytes = disk, say, shard_bytes
        self._running: _Save | None = None
        self._failure: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._late_metrics: dict[int, dict[str, Any]] = {}

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The run goes on from this checkpoint: the same step need not be saved again."""
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
        for _ in tensors:  # what is left of the gathering: this rank must not leave the others alone in it
            pass

    def _run(self, save: _Save, tensors: Iterator[Tensor]) -> None:
        if self.background and self._copy(save, tensors):
            threading.Thread(target=self._write, args=(save, BACKGROUND_NICE), name="checkpoint").start()
        else:
            save.tensors = tensors
            self._write(save, 0)
        self._running = save

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics that became known after the save (the evaluation of its step), for ``keep_best``."""
        if self.is_main:
            self._late_metrics.setdefault(step, {}).update(_plain(metrics))
            self._settle()

    def poll(self) -> int | None:
        """Look after the background without waiting; the step of a checkpoint that was committed meanwhile.

        Raises ``FaultError`` if a save has failed and policy is to stop.
        """
        return self._settled(wait=False, final=False)

    def wait(self, *, final: bool = False) -> int | None:
        """Until nothing is being written any more; otherwise as :meth:`poll`.

        ``final``: raise a failure whatever the policy says. Call it before a run says that it has finished.
        """
        return self._settled(wait=True, final=final)

    def _settled(self, *, wait: bool, final: bool) -> int | None:
        step = self._settle(wait=wait)
        if self._failure is not None and (final or self._stop_on_failure):
            raise FaultError(self._failure)
        return step

    @property
    def failed(self) -> bool:
        """Whether a save has failed and policy is to stop: a flag to be agreed on with the other ranks."""
        self._settle()
        return self._stop_on_failure and self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a save that is due by the clock waits: for the one before it. Rank 0's clock decides for all."""
        return not self.is_main or (self._running is not None and not self._running.done.is_set())

    def _settle(self, *, wait: bool = False) -> int | None:
        """Take over what the background has done; never raises."""
        step = None
        if self._running is not None and (wait or self._running.done.is_set()):
            self._running.done.wait()
            save, self._running = self._running, None
            self.save_seconds = save.seconds
            for word in save.words:
                self._say(word)
            if save.problem is not None:
                self._fail(save.step, save.problem)
            else:
                step = self.last_step = save.step
                self._failure = None
                self._say(f"checkpoint {step_name(step)} committed in {save.seconds:.1f} s")
        if self._running is None and self._late_metrics:
            late, self._late_metrics = self._late_metrics, {}
            for saved_step, metrics in late.items():
                try:
                    self._add_metrics(saved_step, metrics)
                except OSError as error:
                    self._say(f"metrics of step {saved_step} are not in its checkpoint: {error}")
        return step

    # ---- the parts of a save -------------------------------------------------------------------------------

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
        """All that can be known or refused before the first tensor is gathered; ``None``: nothing to do."""
        begin = time.monotonic()
        if self.last_step == step and (self.folder / step_name(step)).is_dir():
            return None
        state_bytes = json.dumps({"version": VERSION, **state, "step": step}, ensure_ascii=False).encode()
        planned = plan(layout, shard_bytes=self._shard_bytes)
        self._disk.makedirs(self.folder)
        for left in (*self.folder.glob(".step-*.tmp"), *self.folder.glob(".old-step-*")):
            self._disk.remove_tree(left)
        needed = planned.total_bytes + len(state_bytes) + (1 << 20)
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
        return _Save(step=step, plan=planned, manifest=manifest, state=state_bytes, begin=begin)

    def _copy(self, save: _Save, tensors: Iterator[Tensor]) -> bool:
        """Copy all tensors to memory of our own; False, with a word, if there is not enough of it."""
        sizes = dict(save.plan.data_bytes)
        if {name: len(buffer) for name, buffer in self._buffers.items()} != sizes:
            self._buffers.clear()
            needed, available = sum(sizes.values()), available_bytes()
            if available is not None and needed > 0.8 * available:
                self._say(
                    f"checkpoint of {needed / 1e9:.3g} GB is written in the foreground: only "
                    f"{available / 1e9:.3g} GB of memory are free to copy it to"
                )
                return False
            # Kept from save to save: fresh pages cost more than the copy.
            self._buffers.update({name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()})
        for entry, tensor in zip(save.plan.entries, tensors, strict=True):
            self._buffers[entry.file][entry.start : entry.stop].copy_(raw(tensor))
        save.tensors = (self._buffers[entry.file][entry.start : entry.stop] for entry in save.plan.entries)
        return True

    def _write(self, save: _Save, niceness: int) -> None:
        """Write, commit and let old ones go, in the background or not. What goes wrong is kept."""
        try:
            if niceness and sys.platform.startswith("linux"):  # where niceness belongs to the thread
                thread = threading.get_native_id()
                own = os.getpriority(os.PRIO_PROCESS, thread)  # never upwards: that needs a privilege
                os.setpriority(os.PRIO_PROCESS, thread, max(niceness, own))
            self._commit(save)
        except Exception as error:
            save.problem = error
            self._disk.remove_quietly(self.folder / f".{step_name(save.step)}.tmp")
        else:
            try:
                self._retain(save.step, save.words)
            except OSError as error:
                save.words.append(f"old checkpoints could not be removed: {error}")
        finally:
            save.seconds = time.monotonic() - save.begin
            save.done.set()

    def _commit(self, save: _Save) -> None:
        disk, name = self._disk, step_name(save.step)
        aside, target = self.folder / f".{name}.tmp", self.folder / name
        disk.mkdir(aside)
        disk.fsync_dir(self.folder)
        files = write_planned(disk, aside, save.plan, save.tensors)
        disk.write_file(aside / STATE, save.state)
        files[STATE] = {"bytes": len(save.state), "sha256": hashlib.sha256(save.state).hexdigest()}
        for file, entry in files.items():
            if (found := digest(aside / file, from_disk=True)) != entry["sha256"]:
                raise OSError(errno.EIO, f"{file} reads back differently than it was written ({found[:16]}…)")
        disk.write_file(aside / MANIFEST, manifest_bytes(save.manifest | {"files": files}))
        disk.fsync_dir(aside)
        if target.exists():
            # Of an abandoned past. Killed between these two renames, the new one is whole and will be found.
            set_aside(target, "abandoned", disk)
        disk.rename(aside, target)
        disk.fsync_dir(self.folder)

    def _retain(self, step: int, words: list[str]) -> None:
        """Link the best, and let old ones go, now that the one of ``step`` is committed and verified."""
        paths = committed(self.folder)
        regular: list[Path] = []
        rolling: list[Path] = []
        for path in paths:
            try:
                reason = read_manifest(path)["reason"]
            except (Damaged, RequestError):
                continue  # not to be judged here: whoever resumes sets it aside
            (rolling if reason in PREEMPTION_REASONS else regular).append(path)
        stay = {*regular[-self.keep :], *paths[-1:], self.folder / step_name(step)}
        if self.keep_best:
            best = ranked(paths, metric=self.keep_best["metric"], mode=self.keep_best.get("mode"))
            stay |= set(best[-int(self.keep_best["k"]) :])
            if best:
                self._link_best(best[-1].name, words)
        going = []
        for path in [*regular, *rolling]:
            if path not in stay and not (self.keep_every and step_of(path) % self.keep_every == 0):
                # Renamed first: a kill in the middle must not leave half a folder under a good name.
                going.append(path.with_name(f".old-{path.name}"))
                self._disk.rename(path, going[-1])
        if going:
            self._disk.fsync_dir(self.folder)
        for old in going:
            self._disk.remove_tree(old)

    def _link_best(self, name: str, words: list[str]) -> None:
        link, aside = self.folder / "best", self.folder / ".best.tmp"
        if link.is_symlink() and os.readlink(link) == name:
            return
        try:
            if aside.is_symlink():
                self._disk.unlink(aside)
            self._disk.link(aside, name)
            self._disk.rename(aside, link)
        except OSError as error:  # not every file system has links; --resume best reads the manifests
            words.append(f"the link checkpoints/best could not be set: {error.strerror}")

    def _add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        path = self.folder / step_name(step)
        try:
            manifest = read_manifest(path)
        except Damaged:
            return  # this step was not saved, or is gone again
        manifest["metrics"] |= metrics
        # Beside the folder, not in it: a file that a kill leaves inside would make the checkpoint a damaged
        # one.
        aside = self.folder / f".manifest-{step}.tmp"
        self._disk.write_file(aside, manifest_bytes(manifest))
        self._disk.rename(aside, path / MANIFEST)
        self._disk.fsync_dir(path)
        words: list[str] = []
        self._retain(step, words)
        for word in words:
            self._say(word)

    def _fail(self, step: int, error: Exception) -> None:
        last = "the last one" if self.last_step is None else step_name(self.last_step)
        cause = (error.strerror or str(error)) if isinstance(error, OSError) else repr(error)
        remedy = ", or train on: --checkpoint.on_full_disk continue" if self._stop_on_failure else ""
        self._failure = (
            f"checkpoint of step {step} could not be written: {cause}; {last} is untouched; free space under "
            f"{self.folder}{remedy}"
        )
        if not self._stop_on_failure:
            self._say(self._failure)


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them: not-a-number and infinity become null (never the best of anything)."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
