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
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from lmcore import __version__
from lmcore._tensor_files import Layout, Plan, TensorFile, key_of, plan, raw, write_planned
from lmcore.errors import FaultError, RequestError
from lmcore.files import CHUNK_BYTES, DISK, Disk

MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
FORMAT: Final = "lmcore-checkpoint"
VERSION: Final = 1
SHARD_BYTES: Final = 2 << 30
"""Files above this are split; they are also what is verified side by side."""
BACKGROUND_NICE: Final = 10
"""How far the writing thread steps back behind the training threads (Linux knows niceness per thread)."""
PREEMPTION_REASONS: Final = frozenset(
    {"signal", "deadline", "stop file", "save file", "exception", "preemption"}
)
"""A checkpoint saved for one of these is rolling: it goes as soon as a newer one is committed."""
_STEP: Final = re.compile(r"step-(\d{8,})")
_FILE: Final = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json)")
_MAX_JSON_BYTES: Final = 1 << 30


def step_name(step: int) -> str:
    """``step-00001000``: eight digits, so that names sort as numbers do."""
    return f"step-{step:08d}"


# ---- reading -----------------------------------------------------------------------------------------------


class Damaged(Exception):
    """What is wrong with a checkpoint, in one line. Never leaves this room."""


@final
class Checkpoint:
    """An open checkpoint: ``path``, ``step``, ``manifest`` (dict), ``state`` (dict) and the tensors by
    name.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        self.path = path
        self.step: int = manifest["step"]
        self.manifest = manifest
        self.state = state
        names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
        self._files: list[tuple[str, TensorFile]] = []
        for name in names:
            try:
                self._files.append((name.split("-")[0].removesuffix(".safetensors"), TensorFile(path / name)))
            except (ValueError, OSError) as error:
                raise Damaged(f"{name}: {error}") from None

    def read(self, kind: str, name: str, slot: str | None = None) -> Tensor | None:
        """One tensor, or ``None`` if there is none of this name. A view of the file: copy what is to live
        on.
        """
        key = key_of(name, slot)
        for file_kind, file in self._files:
            if file_kind == kind and key in file:
                return file.get(key)
        return None

    def keys(self, kind: str) -> list[str]:
        """The names of all tensors of one kind (``name`` or ``name/slot``)."""
        return [key for file_kind, file in self._files if file_kind == kind for key in file.keys()]

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path | str, *, verify: bool = False) -> Checkpoint:
    """Open one checkpoint folder; ``verify`` compares every byte first.

    Ranks other than the one that called :func:`find` open without verifying again. Raises ``RequestError``.
    """
    try:
        return _open(Path(path), verify=verify)
    except Damaged as damage:
        raise RequestError(
            f"checkpoint {path} is damaged ({damage}): take another one, or --resume auto"
        ) from None


def find(
    folder: Path | str,
    which: str | Path = "auto",
    *,
    before_step: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    repair: bool = True,
    say: Callable[[str], None] = print,
    disk: Disk = DISK,
) -> Checkpoint | None:
    """The checkpoint to go on from, verified to the last byte; ``None`` if the folder has none.

    Call it on one rank only; the others open the path it found with :func:`open_checkpoint`.

    Args:
        folder: the run's ``checkpoints``.
        which: ``auto`` (the newest good one), ``best`` (by ``metric`` and ``mode``; without them by what the
            run itself kept), or the path of one checkpoint.
        before_step: only checkpoints of an earlier step than this: what a rewind needs.
        repair: set damaged ones aside and finish a commit that a kill interrupted. Only for whoever holds
            the lock of the run folder; without it nothing on disk changes.
        say: gets one line for everything that was set aside, finished or passed over.

    Raises:
        RequestError: a path was asked for and is not a good checkpoint; or there are checkpoints, but no
        good one
            (a run must not start afresh in silence over a wreck).
    """
    folder = Path(folder)
    if str(which) not in ("auto", "best"):
        path = Path(which)
        if not path.is_dir() and (folder / path).is_dir():
            path = folder / path
        if not path.is_dir():
            raise RequestError(f"checkpoint {which}: there is no such folder; --resume auto takes the newest")
        return open_checkpoint(path.resolve(), verify=True)
    if not folder.is_dir():
        return None
    if repair:
        _finish_commits(folder, say=say, disk=disk)
    paths = _committed(folder)
    if before_step is not None:
        paths = [path for path in paths if _step_of(path) < before_step]
    if which == "best":
        paths = _best_first(folder, paths, metric=metric, mode=mode)
    for path in reversed(paths):
        try:
            return _open(path, verify=True)
        except Damaged as damage:
            if repair:
                say(f"checkpoint {path.name} is damaged ({damage}); {_set_aside(path, 'damaged', disk)}")
            else:
                say(f"checkpoint {path.name} is damaged ({damage}); passed over")
    wrecks = sorted(path.name for path in folder.glob("step-*.damaged-*"))
    if (paths or wrecks) and before_step is None:
        raise RequestError(
            f"{folder}: no good checkpoint is left (damaged: {', '.join(wrecks or [p.name for p in paths])}); "
            "restore one from a copy, or start over with --resume never"
        )
    return None


def abandon_after(
    folder: Path | str, step: int, *, say: Callable[[str], None] = print, disk: Disk = DISK
) -> None:
    """Set the checkpoints of later steps aside: whoever goes on from ``step`` begins another past.

    Without this an automatic restart would take the newest number, which belongs to the abandoned one.
    """
    for path in _committed(Path(folder)):
        if _step_of(path) > step:
            say(
                f"checkpoint {path.name} is of an abandoned past; {_set_aside(path, 'abandoned', disk)}"
            )


def listing(folder: Path | str, *, verify: bool = False) -> list[dict[str, Any]]:
    """One row per checkpoint, oldest first: name, step, epoch, tokens, reason, time, bytes, metrics, best,
    problem.

    ``problem`` is empty for a good one; without ``verify`` only names, sizes and the manifest are looked at.
    """
    folder = Path(folder)
    best = _best_first(folder, _committed(folder))
    rows = []
    for path in _committed(folder):
        row: dict[str, Any] = {
            "name": path.name,
            "step": _step_of(path),
            "problem": "",
            "best": path in best[-1:],
        }
        try:
            manifest = _verify(path, content=verify)
            row |= {key: manifest.get(key) for key in ("epoch", "tokens", "reason", "time", "metrics")}
            row["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
        except Damaged as damage:
            row["problem"] = str(damage)
        rows.append(row)
    return rows


def _committed(folder: Path) -> list[Path]:
    """Folders whose name says committed checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and not path.is_symlink()]
    return sorted((path for path in found if path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    match = _STEP.search(path.name)
    assert match is not None
    return int(match[1])


def _open(path: Path, *, verify: bool) -> Checkpoint:
    manifest = _verify(path, content=verify)
    state = _read_json(path / STATE)
    if state.get("step") != manifest["step"]:
        raise Damaged(f"{STATE} is of step {state.get('step')}, {MANIFEST} of step {manifest['step']}")
    return Checkpoint(path, manifest, state)


def _verify(path: Path, *, content: bool) -> dict[str, Any]:
    """Compare a folder with its manifest: names and sizes, and with ``content`` every byte. The manifest."""
    manifest = _read_manifest(path)
    listed = manifest["files"]
    # NFS renames a file that is deleted while open; such a name is the file system's, not ours.
    present = {entry.name for entry in os.scandir(path) if not entry.name.startswith(".nfs")} - {MANIFEST}
    if missing := sorted(set(listed) - present):
        raise Damaged(f"{missing[0]} is missing")
    if extra := sorted(present - set(listed)):
        raise Damaged(f"{extra[0]!r} is not in the manifest")
    for name, entry in listed.items():
        info = os.lstat(path / name)
        if not stat.S_ISREG(info.st_mode):
            raise Damaged(f"{name} is no regular file")
        if info.st_size != entry["bytes"]:
            raise Damaged(f"{name} has {info.st_size:,} bytes instead of {entry['bytes']:,}")
    if content:
        workers = max(1, min(8, len(os.sched_getaffinity(0)), len(listed)))
        with ThreadPoolExecutor(workers) as pool:  # hashing releases the interpreter
            for name, digest in zip(listed, pool.map(lambda name: _digest(path / name), listed), strict=True):
                if digest != listed[name]["sha256"]:
                    raise Damaged(f"the content of {name} has changed")
    return manifest


def _digest(path: Path, *, from_disk: bool = False) -> str:
    """sha256 of a file, or a word on why it cannot be read; ``from_disk`` asks for the disk's bytes, not the
    cache's.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            if from_disk:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        return f"unreadable: {error}"
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise Damaged(f"{path.name} is larger than any that is written here")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} is no JSON object")
    return value


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one way in which this content is written; ends with a hash over all the rest."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST
    if manifest_path.is_symlink():
        raise Damaged(f"{MANIFEST} is no regular file")
    manifest = _read_json(manifest_path)
    # Written anew it must give the same bytes: so a flip in a space is found like any other.
    if manifest_path.read_bytes() != _manifest_bytes(manifest):
        raise Damaged(f"{MANIFEST} does not match its own hash")
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} is not of the format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise RequestError(
            f"{path} has checkpoint version {manifest.get('version')}, this lmcore ({__version__}) reads {VERSION}: "
            "resume it with the lmcore that wrote it"
        )
    files = manifest.get("files")
    sound = isinstance(files, dict) and STATE in files and type(manifest.get("step")) is int
    if not sound or not all(_sound_entry(name, entry) for name, entry in files.items()):
        raise Damaged(f"{MANIFEST} lists no sound files")
    if _STEP.fullmatch(path.name) and manifest["step"] != _step_of(path):
        raise Damaged(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _sound_entry(name: str, entry: Any) -> bool:
    return (
        _FILE.fullmatch(name) is not None
        and name != MANIFEST
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    )


def _best_first(
    folder: Path, paths: list[Path], *, metric: str | None = None, mode: str | None = None
) -> list[Path]:
    """The checkpoints that have the metric, worst first (so the best is the last one, and of equals the
    newest).
    """
    scored: list[tuple[float, int, Path]] = []
    manifests: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            manifests[path] = _read_manifest(path)
        except (Damaged, RequestError):
            continue  # whoever opens it finds and says the same
    for path in reversed(paths):
        kept = manifests.get(path, {}).get("keep_best") or {}
        metric, mode = metric or kept.get("metric"), mode or kept.get("mode")
    for path, manifest in manifests.items():
        value = manifest.get("metrics", {}).get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            scored.append((value if mode == "max" else -value, _step_of(path), path))
    return [path for _, _, path in sorted(scored)]


def _set_aside(path: Path, word: str, disk: Disk) -> str:
    """Rename a checkpoint so that nobody takes it; says what became of it."""
    for number in range(1, 1000):
        target = path.with_name(f"{path.name.strip('.').removesuffix('.tmp')}.{word}-{number}")
        if target.exists():
            continue
        try:
            disk.rename(path, target)
            disk.fsync_dir(path.parent)
        except OSError as error:
            return f"it could not be set aside ({error.strerror}) and is passed over"
        return f"set aside as {target.name}"
    return "passed over"


def _finish_commits(folder: Path, *, say: Callable[[str], None], disk: Disk) -> None:
    """A save that was killed after its manifest was written is whole: give it its name."""
    for aside in sorted(folder.glob(".step-*.tmp")):
        if not _STEP.search(aside.name) or not (aside / MANIFEST).exists():
            continue
        target = folder / step_name(_step_of(aside))
        try:
            _verify(aside, content=True)
        except (Damaged, RequestError):
            continue  # half a save; the next one clears it away
        if not target.exists():
            disk.fsync_dir(aside)
            disk.rename(aside, target)
            disk.fsync_dir(folder)
            say(f"checkpoint {target.name} had been written in full before the run was killed; taken")


# ---- writing -----------------------------------------------------------------------------------------------


@final
@dataclass(kw_only=True)
class _Save:
    """One save on its way, from the moment in which its tensors are in our hands."""

    step: int
    plan: Plan
    manifest: dict[str, Any]
    state: bytes
    tensors: Iterator[Tensor]
    seconds: float = 0.0
    problem: OSError | None = None
    done: threading.Event = field(default_factory=threading.Event)


@final
class Checkpoints:
    """The checkpoints of one run. Made on every rank; only the one with ``is_main`` touches the disk.

    Args:
        folder: ``<run folder>/checkpoints``; made by the first save.
        keep: how many of the newest stay (at least 1).
        keep_best: ``{"k": int, "metric": str, "mode": "min"|"max"}``: the k best by a metric stay as well.
        keep_every: checkpoints whose step is a multiple of this stay for ever; ``None`` or 0 for none.
        background: write and hash in a thread of low priority; ``save`` returns as soon as the tensors are
            copied.
        on_full_disk: ``stop`` raises a failure at the next ``poll``/``wait``/``save``; ``continue`` says so
            and goes on training. A failure of the last save (``wait(final=True)``) is always raised.
        say: gets one line for everything worth knowing.
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
        """The step of the newest checkpoint that this object has committed."""
        self.save_seconds = 0.0
        """How long the last save took from beginning to commit: what a deadline must leave room for."""
        self._stop_on_failure = on_full_disk == "stop"
        self._disk, self._say, self._shard_bytes = disk, say, shard_bytes
        self._running: _Save | None = None
        self._failure: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._late_metrics: dict[int, dict[str, Any]] = {}

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
        """Save this step. Collective: every rank consumes ``tensors``, which may gather over ranks as it
        goes.

        Tensors are copied before the next one is asked for; they may be live parameters, on any device. A
        step that this object has committed already is not written again. With ``background`` a failure to
        write shows at the next ``poll``; otherwise here.

        Args:
            layout: (kind, name, slot, shape, dtype) of all tensors, in the order in which ``tensors`` yields
                them.
            tensors: (kind, name, slot, tensor); the tensor may be ``None`` on ranks that are not main.
            state: JSON content of ``state.json``; ``step`` is added.
            metrics: what is known about this step; more can come later by :meth:`record`.
            reason: ``interval``, ``end``, or one of :data:`PREEMPTION_REASONS`.
        """
        if not self.is_main:
            for _ in tensors:
                pass
            return
        self.wait()
        begin = time.monotonic()
        try:
            save = self._begin(step, layout, state, metrics or {}, reason, epoch, tokens)
        except OSError as error:
            for _ in tensors:  # the other ranks are inside the same gathering: keep step with them
                pass
            self._fail(step, error)
            self.poll()
            return
        if save is None:
            for _ in tensors:
                pass
            return
        stream = _in_order(save.plan, layout, tensors)
        if self.background and self._copy(save, stream):
            self._running = save
            threading.Thread(target=self._write, args=(save, begin), name="checkpoint").start()
        else:
            save.tensors = stream
            self._write(save, begin, priority=0)
            for _ in tensors:
                pass
            self._running = save
            self.poll()

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics that became known after the save (the evaluation of its step), for ``keep_best``."""
        if self.is_main:
            self._late_metrics.setdefault(step, {}).update(_plain(metrics))
            self.poll()

    def poll(self) -> None:
        """Look after the background, without waiting. Raises ``FaultError`` if a save has failed and policy
        is stop.
        """
        if self._running is not None and self._running.done.is_set():
            save, self._running = self._running, None
            self.save_seconds = save.seconds
            if save.problem is not None:
                self._fail(save.step, save.problem)
            else:
                self.last_step = save.step
                self._say(f"checkpoint {step_name(save.step)} committed in {save.seconds:.1f} s")
        if self._running is None and self._late_metrics:
            late, self._late_metrics = self._late_metrics, {}
            for step, metrics in late.items():
                try:
                    self._add_metrics(step, metrics)
                except OSError as error:
                    self._say(f"metrics of step {step} could not be added to its checkpoint: {error}")
        if self._failure is not None and self._stop_on_failure:
            raise FaultError(self._failure)

    def wait(self, *, final: bool = False) -> None:
        """Until nothing is being written any more. ``final``: raise a failure whatever the policy says."""
        if self._running is not None:
            self._running.done.wait()
        self.poll()
        if final and self._failure is not None:
            raise FaultError(self._failure)

    @property
    def failed(self) -> bool:
        """Whether a save has failed and policy is to stop: a flag to be agreed on with the other ranks."""
        running = self._running
        failing = running is not None and running.done.is_set() and running.problem is not None
        return self._stop_on_failure and (failing or self._failure is not None)

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
        """Everything that can be known or refused before the first tensor is gathered; ``None``: nothing to
        do.
        """
        if self.last_step == step and (self.folder / step_name(step)).is_dir():
            return None
        state_bytes = json.dumps({"version": VERSION, **state, "step": step}, ensure_ascii=False).encode()
        planned = plan(layout, shard_bytes=self._shard_bytes)
        self._disk.makedirs(self.folder)
        for left in self.folder.glob(".step-*.tmp"):
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
        return _Save(step=step, plan=planned, manifest=manifest, state=state_bytes, tensors=iter(()))

    def _copy(self, save: _Save, stream: Iterator[Tensor]) -> bool:
        """Copy all tensors to memory of our own; False, with a word, if there is not enough of it."""
        sizes = save.plan.data_bytes
        if {name: len(buffer) for name, buffer in self._buffers.items()} != dict(sizes):
            self._buffers.clear()
            available = _available_memory_bytes()
            if available is not None and sum(sizes.values()) > 0.8 * available:
                self._say(
                    f"checkpoint of {sum(sizes.values()) / 1e9:.3g} GB is written in the foreground: only "
                    f"{available / 1e9:.3g} GB of memory are free to copy it to"
                )
                return False
            # Kept from save to save: fresh pages cost more than the copy.
            self._buffers.update({name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()})
        for entry, tensor in zip(save.plan.entries, stream, strict=True):
            self._buffers[entry.file][entry.start : entry.stop].copy_(raw(tensor))
        save.tensors = (self._buffers[entry.file][entry.start : entry.stop] for entry in save.plan.entries)
        return True

    def _write(self, save: _Save, begin: float, priority: int = BACKGROUND_NICE) -> None:
        """Write and commit; runs in the background thread, or in the foreground. Never raises an
        ``OSError``.
        """
        try:
            if priority:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), priority)
            self._commit(save)
        except OSError as error:
            save.problem = error
            self._disk.remove_quietly(self.folder / f".{step_name(save.step)}.tmp")
        finally:
            save.seconds = time.monotonic() - begin
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
            if (found := _digest(aside / file, from_disk=True)) != entry["sha256"]:
                raise OSError(errno.EIO, f"{file} reads back differently than it was written ({found[:16]}…)")
        disk.write_file(aside / MANIFEST, _manifest_bytes(save.manifest | {"files": files}))
        disk.fsync_dir(aside)
        if (
            target.exists()
        ):  # of an abandoned past; the new one is whole already and would be found if we died here
            _set_aside(target, "abandoned", disk)
        disk.rename(aside, target)
        disk.fsync_dir(self.folder)
        self._retain()

    def _retain(self) -> None:
        """Link the best, and let the old ones go. Called only when the newest is committed and verified."""
        paths = _committed(self.folder)
        best = _best_first(self.folder, paths) if self.keep_best else []
        regular, rolling = [], []
        for path in paths:
            try:
                reason = _read_manifest(path)["reason"]
            except (Damaged, RequestError):
                continue  # not ours to judge here: whoever resumes sets it aside
            (rolling if reason in PREEMPTION_REASONS else regular).append(path)
        stay = {*regular[-self.keep :], *paths[-1:]}
        if self.keep_best:
            stay |= set(best[-int(self.keep_best["k"]) :])
        if self.keep_every:
            stay |= {path for path in paths if _step_of(path) % self.keep_every == 0}
        if best:
            self._link_best(best[-1].name)
        for path in [*regular, *rolling]:
            if path not in stay:
                # Renamed first: a kill in the middle must not leave half a folder under a good name.
                going = path.with_name(f".{path.name}.old.tmp")
                self._disk.rename(path, going)
                self._disk.remove_tree(going)

    def _link_best(self, name: str) -> None:
        link, aside = self.folder / "best", self.folder / ".best.tmp"
        if link.is_symlink() and os.readlink(link) == name:
            return
        try:
            aside.unlink(missing_ok=True)
            self._disk.link(aside, name)
            self._disk.rename(aside, link)
        except (
            OSError
        ) as error:  # not every file system has links; --resume best reads the manifests, not the link
            self._say(f"the link checkpoints/best could not be set: {error.strerror}")

    def _add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        path = self.folder / step_name(step)
        try:
            manifest = _read_manifest(path)
        except Damaged:
            return  # this step was not saved, or is gone again
        manifest["metrics"] |= metrics
        self._disk.write_bytes(path / MANIFEST, _manifest_bytes(manifest))
        self._retain()

    def _fail(self, step: int, error: OSError) -> None:
        last = step_name(self.last_step) if self.last_step is not None else "the one before"
        self._failure = (
            f"checkpoint of step {step} could not be written: {error.strerror or error}; {last} is untouched; "
            f"free space under {self.folder}, or --checkpoint.on_full_disk continue to train on without"
        )
        if not self._stop_on_failure:
            self._say(self._failure)


def _in_order(
    planned: Plan, layout: Layout, tensors: Iterable[tuple[str, str, str | None, Tensor | None]]
) -> Iterator[Tensor]:
    """The tensors alone, each compared with what was announced."""
    expected = iter(zip(planned.entries, layout, strict=True))
    for kind, name, slot, tensor in tensors:
        entry, _ = next(expected, (None, None))
        if entry is None or (entry.kind, entry.key) != (kind, key_of(name, slot)):
            raise ValueError(f"{kind} {key_of(name, slot)} came where the layout has {entry and entry.key}")
        if tensor is None or tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(f"{entry.key}: the layout says {entry.dtype} {entry.shape}, another tensor came")
        yield tensor
    if (rest := next(expected, None)) is not None:
        raise ValueError(f"{rest[0].key} did not come")


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them: not-a-number and infinity become null (they are never the best of
    anything).
    """
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }


def _available_memory_bytes() -> int | None:
    """What can be allocated without swapping, as Linux and the control group see it; ``None`` if they do not
    say.
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass  # no Linux, or no control group of version 2: what was found so far stands
    return min(found, default=None)
