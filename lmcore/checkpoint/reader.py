"""Finding the checkpoint to resume from, and reading tensors from an open one.

:func:`find` returns the newest (or best) checkpoint whose every byte has been compared with its manifest; damaged ones
are set aside with a message. It never returns ``None`` where checkpoints exist but none of them is good: a run must not
silently start from scratch.

Example::

    with open_checkpoint("runs/demo/checkpoints/step-00001000") as checkpoint:
        checkpoint.step, checkpoint.state["tokens"], checkpoint.read("model", "transformer.wte.weight")
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
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
    """An open checkpoint. Use it as a context manager, or call :meth:`close`.

    Attributes:
        path: its folder.
        step: the step after which it was saved.
        manifest: content of ``manifest.json``.
        state: content of ``state.json``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        self.path = path
        self.step: int = manifest["step"]
        self.manifest = manifest
        self.state = state
        self._files: list[tuple[str, TensorFile]] = []
        for name in sorted(name for name in manifest["files"] if name.endswith(".safetensors")):
            try:
                file = TensorFile(path / name)
            except ValueError as error:
                raise Damaged(f"{name}: {error}") from None
            self._files.append((name.removesuffix(".safetensors").split("-")[0], file))

    def read(self, kind: str, name: str, slot: str | None = None) -> Tensor | None:
        """One tensor, or ``None`` if there is no such tensor. A view of the file: copy it to keep it.

        Args:
            kind: ``model``, ``optim`` or ``ema``.
            name: of the parameter.
            slot: of the optimizer, such as ``exp_avg``.
        """
        key = key_of(name, slot)
        for file_kind, file in self._files:
            if file_kind == kind and key in file:
                return file.get(key)
        return None

    def keys(self, kind: str) -> list[str]:
        """The names of all tensors of one kind (``name`` or ``name/slot``)."""
        return [key for file_kind, file in self._files if file_kind == kind for key in file.names()]

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Name and shape of all tensors of one kind, without reading them."""
        return {key: file.shape(key) for of, file in self._files if of == kind for key in file.names()}

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path | str, *, verify_bytes: bool = True) -> Checkpoint:
    """Open one checkpoint folder.

    Args:
        path: such as ``runs/demo/checkpoints/step-00001000``.
        verify_bytes: compare every byte with the hashes first. Switch it off only where this process or rank 0 of
            this run has just done that.

    Raises:
        RequestError: it is damaged, of another format version, or not there.

    Example::

        with open_checkpoint("runs/demo/checkpoints/step-00001000") as checkpoint:
            embedding = checkpoint.read("model", "transformer.wte.weight")
    """
    try:
        return _open(Path(path), content=verify_bytes)
    except Damaged as damage:
        raise RequestError(
            f"checkpoint {path} is damaged ({damage}): use another one, or --resume auto"
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
    note: Callable[[str], None] = print,
    disk: Disk = DISK,
) -> Checkpoint | None:
    """The checkpoint to resume from, every byte verified; ``None`` if the folder has none.

    Call it on one rank; the others open the path it found with ``open_checkpoint(path, verify_bytes=False)``.

    Args:
        folder: the run's ``checkpoints``.
        which: ``auto`` (the newest good one), ``best`` (by ``metric`` and ``mode``; without them by the setting of
            ``checkpoint.keep_best`` that the run was saved with), or the path of one checkpoint.
        before_step: only checkpoints of an earlier step than this, for a rewind.
        repair: set damaged ones aside and finish a commit that a kill interrupted. Only for the holder of the run
            folder's lock; without it nothing on disk changes.
        note: gets one line for each checkpoint that was set aside, finished or skipped.

    Raises:
        RequestError: the given path is not a good checkpoint; ``best`` and none has the metric; there are
            checkpoints, but no good one; or one of them is a link to a folder that is not there.
    """
    folder = Path(folder)
    if str(which) not in ("auto", "best"):
        path = Path(which)
        if not path.is_dir() and (folder / path).is_dir():
            path = folder / path
        if not path.is_dir():
            raise RequestError(
                f"checkpoint {which}: no such folder; --resume auto uses the newest checkpoint"
            )
        return open_checkpoint(os.path.abspath(path))
    _refuse_broken_links([folder])
    if not folder.is_dir():
        return None
    if repair:
        _finish_commits(folder, note=note, disk=disk)
    paths = [path for path in committed(folder) if before_step is None or step_of(path) < before_step]
    _refuse_broken_links(paths)
    if which == "best" and paths:
        paths = ranked(paths, metric=metric, mode=mode)
        if not paths:
            raise RequestError(
                f"{folder}: no checkpoint has the metric {metric or 'of checkpoint.keep_best'}; "
                "--resume auto uses the newest checkpoint"
            )
    for path in reversed(paths):
        try:
            return _open(path, content=True)
        except Damaged as damage:
            outcome = set_aside(path, "damaged", disk) if repair else "skipped"
            note(f"checkpoint {path.name} is damaged ({damage}); {outcome}")
    damaged = sorted(path.name for path in folder.glob("step-*.damaged-*")) or [path.name for path in paths]
    if damaged and before_step is None:
        raise RequestError(
            f"{folder}: no good checkpoint is left (damaged: {', '.join(damaged)}); restore one from a copy, "
            "or start over with --resume never"
        )
    return None


def _refuse_broken_links(paths: Iterable[Path]) -> None:
    """A link to a disk that is not mounted must not look like a run without checkpoints."""
    for path in paths:
        if path.is_symlink() and not path.is_dir():
            raise RequestError(
                f"{path} is a link to {os.readlink(path)}, which is not there: mount or restore it, or remove the link"
            )


def ranked(paths: Iterable[Path], *, metric: str | None = None, mode: str | None = None) -> list[Path]:
    """The checkpoints that have the metric, the best last (of equal ones the newest).

    Without ``metric`` and ``mode``: by the setting of ``checkpoint.keep_best`` in the newest that has one.
    """
    manifests: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except (Damaged, RequestError):
            continue  # whoever opens it reports the same
    for path in reversed(manifests):
        kept = manifests[path].get("keep_best") or {}
        metric, mode = metric or kept.get("metric"), mode or kept.get("mode")
    return best_last(((path, m["metrics"].get(metric)) for path, m in manifests.items()), mode)


def best_last(values: Iterable[tuple[Path, Any]], mode: str | None) -> list[Path]:
    """The paths whose value is a finite number, sorted so that the best is the last (``mode``: ``min`` or ``max``)."""
    scored = [
        (value if mode == "max" else -value, step_of(path), path)
        for path, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    return [path for _, _, path in sorted(scored)]


def abandon_after(
    folder: Path | str, step: int, *, note: Callable[[str], None] = print, disk: Disk = DISK
) -> None:
    """Move the checkpoints of later steps aside, because training continues from ``step``.

    Otherwise an automatic restart would resume from the newest number, which belongs to the abandoned branch.
    ``step=-1`` moves all aside.
    """
    for path in committed(Path(folder)):
        if step_of(path) > step:
            outcome = set_aside(path, "abandoned", disk)
            note(f"checkpoint {path.name} is newer than the step to continue from; {outcome}")
    for aside in Path(folder).glob(".step-*.tmp"):
        disk.remove_tree(aside)  # a whole one would be taken for a commit that a kill interrupted


def listing(folder: Path | str, *, verify_bytes: bool = False) -> list[dict[str, Any]]:
    """One row per checkpoint, oldest first, as ``lmcore checkpoints`` shows them.

    Returns:
        Dicts with name, step, problem, best, and of readable ones epoch, tokens, reason, time, metrics, bytes.
        ``problem`` is empty for a good one; without ``verify_bytes`` only names, sizes and the manifest are checked.
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
        except (Damaged, RequestError) as problem:
            row["problem"] = str(problem)
        rows.append(row)
    return rows


def set_aside(path: Path, suffix: str, disk: Disk) -> str:
    """Rename a checkpoint (or the link to it) so that it is not resumed from; says what became of it."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.{suffix}-{number}")):
        number += 1
    try:
        disk.rename(path, target)
        disk.fsync_dir(path.parent)
    except OSError as error:
        return f"skipped: it could not be renamed ({error.strerror})"
    return f"set aside as {target.name}"


def _finish_commits(folder: Path, *, note: Callable[[str], None], disk: Disk) -> None:
    """A save that was killed after its manifest was written is complete: give it its name."""
    for aside in sorted(folder.glob(".step-*.tmp")):
        if not (aside / MANIFEST).is_file():
            continue
        try:
            target = folder / step_name(step_of(aside))
            verify(aside, content=True)
            if os.path.lexists(target):
                continue
            disk.fsync_dir(aside)
            disk.rename(aside, target)
            disk.fsync_dir(folder)
        except (Damaged, RequestError, ValueError, OSError):
            continue  # half a save, or a read-only disk: the next save removes it
        note(f"checkpoint {target.name} was complete when the run was killed; committed now")
