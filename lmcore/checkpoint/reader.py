"""Which checkpoint to go on from, and the open checkpoint itself; the reading half of ``checkpoint.py``.

Comes in: a run's ``checkpoints`` folder. Goes out: the newest (or best) checkpoint whose every byte has been
compared with its manifest. What always holds: nothing of a checkpoint is used before that; a damaged one is
set aside with a word and the next older one is taken; a run never starts afresh in silence over a wreck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lmcore.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Damaged,
    committed,
    read_json,
    read_manifest,
    step_name,
    step_of,
    verify,
)
from lmcore.checkpoint.tensors import TensorFile, key_of
from lmcore.disk import DISK, Disk
from lmcore.errors import RequestError


@final
class Checkpoint:
    """An open checkpoint: ``path``, ``step``, ``manifest`` (dict), ``state`` (dict), and tensors by name."""

    def __init__(self, path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        self.path = path
        self.step: int = manifest["step"]
        self.manifest = manifest
        self.state = state
        self._files: list[tuple[str, TensorFile]] = []
        for name in sorted(name for name in manifest["files"] if name.endswith(".safetensors")):
            try:
                file = TensorFile(path / name)
            except (ValueError, OSError) as error:
                raise Damaged(f"{name}: {error}") from None
            self._files.append((name.removesuffix(".safetensors").split("-")[0], file))

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
        return [key for file_kind, file in self._files if file_kind == kind for key in file.names()]

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path | str, *, verify_bytes: bool = False) -> Checkpoint:
    """Open one checkpoint folder; ``verify_bytes`` compares every byte first.

    Ranks other than the one that called :func:`find` open without verifying again. Raises ``RequestError``.
    """
    try:
        return _open(Path(path), content=verify_bytes)
    except Damaged as damage:
        raise RequestError(
            f"checkpoint {path} is damaged ({damage}): take another one, or --resume auto"
        ) from None


def _open(path: Path, *, content: bool) -> Checkpoint:
    manifest = verify(path, content=content)
    state = read_json(path / STATE)
    if state.get("step") != manifest["step"]:
        raise Damaged(f"{STATE} is of step {state.get('step')}, {MANIFEST} of step {manifest['step']}")
    return Checkpoint(path, manifest, state)


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
        repair: set damaged ones aside and finish a commit that a kill interrupted. Only for whoever holds the
            lock of the run folder; without it nothing on disk changes.
        say: gets one line for everything that was set aside, finished or passed over.

    Raises:
        RequestError: a path was asked for and is not a good checkpoint; ``best`` and none has the metric; or
            there are checkpoints, but no good one (a run must not start afresh in silence over a wreck).
    """
    folder = Path(folder)
    if str(which) not in ("auto", "best"):
        path = Path(which)
        if not path.is_dir() and (folder / path).is_dir():
            path = folder / path
        if not path.is_dir():
            raise RequestError(f"checkpoint {which}: there is no such folder; --resume auto takes the newest")
        return open_checkpoint(path.resolve(), verify_bytes=True)
    if not folder.is_dir():
        return None
    if repair:
        _finish_commits(folder, say=say, disk=disk)
    paths = [path for path in committed(folder) if before_step is None or step_of(path) < before_step]
    if which == "best" and paths:
        paths = ranked(paths, metric=metric, mode=mode)
        if not paths:
            raise RequestError(
                f"{folder}: no checkpoint has the metric {metric or 'of checkpoint.keep_best'}; "
                "--resume auto takes the newest"
            )
    for path in reversed(paths):
        try:
            return _open(path, content=True)
        except Damaged as damage:
            outcome = set_aside(path, "damaged", disk) if repair else "passed over"
            say(f"checkpoint {path.name} is damaged ({damage}); {outcome}")
    wrecks = sorted(path.name for path in folder.glob("step-*.damaged-*")) or [path.name for path in paths]
    if wrecks and before_step is None:
        raise RequestError(
            f"{folder}: no good checkpoint is left (damaged: {', '.join(wrecks)}); restore one from a copy, "
            "or start over with --resume never"
        )
    return None


def ranked(paths: list[Path], *, metric: str | None = None, mode: str | None = None) -> list[Path]:
    """The checkpoints that have the metric, the best last (of equals the newest).

    Without ``metric`` and ``mode``: by what the newest of them that says so was told to keep.
    """
    manifests: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except (Damaged, RequestError):
            continue  # whoever opens it finds and says the same
    for path in reversed(manifests):
        kept = manifests[path].get("keep_best") or {}
        metric, mode = metric or kept.get("metric"), mode or kept.get("mode")
    scored: list[tuple[float, int, Path]] = []
    for path, manifest in manifests.items():
        value = manifest["metrics"].get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            scored.append((value if mode == "max" else -value, step_of(path), path))
    return [path for _, _, path in sorted(scored)]


def abandon_after(
    folder: Path | str, step: int, *, say: Callable[[str], None] = print, disk: Disk = DISK
) -> None:
    """Set the checkpoints of later steps aside: whoever goes on from ``step`` begins another past.

    Without this an automatic restart would take the newest number, which belongs to the abandoned one.
    ``step=-1`` sets all aside.
    """
    for path in committed(Path(folder)):
        if step_of(path) > step:
            say(f"checkpoint {path.name} is of an abandoned past; {set_aside(path, 'abandoned', disk)}")
    for aside in Path(folder).glob(".step-*.tmp"):
        disk.remove_tree(aside)  # or a whole one of them would be taken for a commit that a kill interrupted


def listing(folder: Path | str, *, verify_bytes: bool = False) -> list[dict[str, Any]]:
    """One row per checkpoint, oldest first: name, step, epoch, tokens, reason, time, bytes, metrics, best,
    problem.

    ``problem`` is empty for a good one; without ``verify_bytes`` only names, sizes and the manifest count.
    """
    paths = committed(Path(folder))
    best = ranked(paths)[-1:]
    rows = []
    for path in paths:
        row: dict[str, Any] = {"name": path.name, "step": step_of(path), "problem": "", "best": path in best}
        try:
            manifest = verify(path, content=verify_bytes)
            row |= {key: manifest.get(key) for key in ("epoch", "tokens", "reason", "time", "metrics")}
            row["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
        except Damaged as damage:
            row["problem"] = str(damage)
        rows.append(row)
    return rows


def set_aside(path: Path, word: str, disk: Disk) -> str:
    """Rename a checkpoint so that nobody takes it; says what became of it."""
    number = 1
    while (target := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    try:
        disk.rename(path, target)
        disk.fsync_dir(path.parent)
    except OSError as error:
        return f"it could not be set aside ({error.strerror}) and is passed over"
    return f"set aside as {target.name}"


def _finish_commits(folder: Path, *, say: Callable[[str], None], disk: Disk) -> None:
    """A save that was killed after its manifest was written is whole: give it its name."""
    for aside in sorted(folder.glob(".step-*.tmp")):
        if not (aside / MANIFEST).is_file():
            continue
        try:
            target = folder / step_name(step_of(aside))
            verify(aside, content=True)
            if target.exists():
                continue
            disk.fsync_dir(aside)
            disk.rename(aside, target)
            disk.fsync_dir(folder)
        except (Damaged, RequestError, ValueError, OSError):
            continue  # half a save, or a disk that takes no more: the next save clears it away
        say(f"checkpoint {target.name} had been written in full before the run was killed; taken")
