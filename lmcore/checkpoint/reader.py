"""Finding the checkpoint to resume from, and reading tensors from an open one.

:func:`find` returns the newest (or best) checkpoint after it has compared every byte with the manifest; damaged ones are
set aside with a message. If checkpoints exist but none of them is good, it raises an error instead of returning ``None``,
because a run must not silently start from scratch.

Example::

    with open_checkpoint("runs/demo/checkpoints/step-00001000") as checkpoint:
        checkpoint.step, checkpoint.state["tokens"], checkpoint.read("model", "transformer.wte.weight")
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lmcore.checkpoint import pieces
from lmcore.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Damaged,
    Described,
    Hashes,
    committed,
    described,
    hashes_here,
    read_json,
    read_manifest,
    step_name,
    step_of,
    verify,
)
from lmcore.checkpoint.pieces import Part
from lmcore.checkpoint.tensors import TensorFile, key_of
from lmcore.disk import DISK, Disk
from lmcore.errors import RequestError


@final
class Stored:
    """One tensor of an open checkpoint. Nothing is read from the disk before :meth:`read`.

    Attributes:
        shape: of the whole tensor.
        dtype: of the tensor.
    """

    def __init__(self, file_of: Callable[[str], TensorFile], key: str, described: Described) -> None:
        self._file_of, self._key, self._pieces = file_of, key, described.pieces
        self.shape, self.dtype = described.shape, described.dtype

    @property
    def whole(self) -> bool:
        """Whether the tensor is stored in one file, so that reading all of it returns a view of that file."""
        return len(self._pieces) == 1

    def read(self, part: Part | None = None) -> Tensor:
        """Read a part of the tensor, with shape (length,) for a range or ``lengths`` for a box, or all of it.

        Only pieces that overlap with the part are read. If one piece contains all of it, the result is a view of the file:
        copy it to keep it.

        Raises:
            ValueError: the part is not within the tensor.
            RequestError: a file does not contain what the manifest says.
        """
        want = pieces.whole(self.shape) if part is None else part
        if not pieces.inside(want, self.shape):
            raise ValueError(f"{self._key} has shape {self.shape}, {part} is not within it")
        wanted, size = pieces.as_range(want, self.shape), pieces.count(want)
        target, copied = None, 0
        for name, have in self._pieces:
            got = pieces.as_range(have, self.shape)
            if wanted is not None and got is not None:
                if got.start <= wanted.start and wanted.start + size <= got.start + got.length:
                    flat = self._piece(name)
                    return flat.narrow(0, wanted.start - got.start, size).view(pieces.shape_of(want))
                if got.start >= wanted.start + size or wanted.start >= got.start + got.length:
                    continue
            if target is None:
                target = torch.empty(size, dtype=self.dtype)
            copied += pieces.copy_overlap(target, want, self._piece(name), have, self.shape)
        if copied != size:
            # Cannot happen: the manifest's pieces were checked to cover the tensor.
            raise AssertionError(f"{self._key}: {copied} of {size} numbers were found")
        found = torch.empty(0, dtype=self.dtype) if target is None else target
        return found.view(pieces.shape_of(want))

    def _piece(self, name: str) -> Tensor:
        return self._file_of(name).get(self._key).view(-1)


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
        self._files: dict[str, TensorFile] = {}
        self._tensors: dict[tuple[str, str], Described] = {}
        if manifest["version"] == 1:
            self._describe_whole_tensors()
        else:
            self._tensors = described(manifest)
        self._expected: dict[str, dict[str, Described]] = {}
        for (_, key), of in self._tensors.items():
            for name, _ in of.pieces:
                self._expected.setdefault(name, {})[key] = of

    def _describe_whole_tensors(self) -> None:
        """Version 1: every tensor is whole in one file, and only the file headers say which tensors there are."""
        for name in sorted(name for name in self.manifest["files"] if name.endswith(".safetensors")):
            file, kind = self._open_file(name), _kind_of(name)
            self._files[name] = file
            for key in file.names():
                if (kind, key) not in self._tensors:
                    shape = file.shape(key)
                    piece = (name, pieces.whole(shape))
                    self._tensors[kind, key] = Described(dtype=file.dtype(key), shape=shape, pieces=(piece,))

    def _open_file(self, name: str) -> TensorFile:
        try:
            return TensorFile(self.path / name)
        except ValueError as error:
            raise Damaged(f"{name}: {error}") from None

    def check_file(self, name: str) -> TensorFile:
        """Open a file and compare its header with the manifest, once per file. Raises ``Damaged``."""
        if name not in self._files:
            file, expected = self._open_file(name), self._expected.get(name, {})
            if sorted(file.names()) != sorted(expected):
                raise Damaged(f"{name} holds other tensors than {MANIFEST} says")
            for key, of in expected.items():
                count = next(pieces.count(part) for holder, part in of.pieces if holder == name)
                if file.dtype(key) != of.dtype or math.prod(file.shape(key)) != count:
                    raise Damaged(f"{name}: {key} is of another type or size than {MANIFEST} says")
            self._files[name] = file
        return self._files[name]

    def check_files(self) -> None:
        """Compare the headers of all files with the manifest. Raises ``Damaged``."""
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                self.check_file(name)

    def _file_of(self, name: str) -> TensorFile:
        try:
            return self.check_file(name)
        except Damaged as damage:
            raise _refusal(self.path, damage) from None

    def stored(self, kind: str, name: str, slot: str | None = None) -> Stored | None:
        """One tensor, from which any part can be read; ``None`` if there is no such tensor.

        Args:
            kind: ``model``, ``optim`` or ``ema``.
            name: of the parameter.
            slot: of the optimizer, such as ``exp_avg``.

        Example::

            rows = checkpoint.stored("model", "transformer.wte.weight").read(Range(start=0, length=4096))
        """
        key = key_of(name, slot)
        found = self._tensors.get((kind, key))
        return None if found is None else Stored(self._file_of, key, found)

    def read(self, kind: str, name: str, slot: str | None = None) -> Tensor | None:
        """Read one whole tensor; ``None`` if there is no such tensor. It may be a view of the file: copy it to keep it."""
        found = self.stored(kind, name, slot)
        return None if found is None else found.read()

    def keys(self, kind: str) -> list[str]:
        """The names of all tensors of one kind (``name`` or ``name/slot``)."""
        return [key for of, key in self._tensors if of == kind]

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Name and shape of all tensors of one kind, without reading them."""
        return {key: tensor.shape for (of, key), tensor in self._tensors.items() if of == kind}

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kind_of(name: str) -> str:
    return name.removesuffix(".safetensors").split("-")[0]


def _refusal(path: Path | str, damage: Damaged) -> RequestError:
    return RequestError(f"checkpoint {path} is damaged ({damage}): use another one, or --resume auto")


def open_checkpoint(path: Path | str, *, verify_bytes: bool = True) -> Checkpoint:
    """Open one checkpoint folder.

    Args:
        path: such as ``runs/demo/checkpoints/step-00001000``.
        verify_bytes: first compare every byte with the hashes. Switch it off only if this process or rank 0 of this
            run has just done so.

    Raises:
        RequestError: the checkpoint is damaged, has an unsupported format version, or does not exist.

    Example::

        with open_checkpoint("runs/demo/checkpoints/step-00001000") as checkpoint:
            embedding = checkpoint.read("model", "transformer.wte.weight")
    """
    try:
        return _open(Path(path), content=verify_bytes)
    except Damaged as damage:
        raise _refusal(path, damage) from None


def _open(path: Path, *, content: bool, hashes: Hashes = hashes_here) -> Checkpoint:
    _refuse_forbidden(path)
    manifest = verify(path, content=content, hashes=hashes)
    state = read_json(path / STATE)
    if state.get("step") != manifest["step"]:
        raise Damaged(f"{STATE} is of step {state.get('step')}, {MANIFEST} of step {manifest['step']}")
    opened = Checkpoint(path, manifest, state)
    if content:  # otherwise a file is checked at its first read: a rank opens only the files that it needs
        opened.check_files()
    return opened


def find(
    folder: Path | str,
    which: str | Path = "auto",
    *,
    before_step: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    repair: bool = True,
    note: Callable[[str], None] = print,
    hashes: Hashes = hashes_here,
    disk: Disk = DISK,
) -> Checkpoint | None:
    """The checkpoint to resume from, with every byte verified; ``None`` if the folder has none.

    Call it on one rank; the others open the path it found with ``open_checkpoint(path, verify_bytes=False)``.

    Args:
        folder: the run's ``checkpoints``.
        which: ``auto`` (the newest good one), ``best`` (by ``metric`` and ``mode``; by default those of the
            ``checkpoint.keep_best`` that the run was saved with), or the path of one checkpoint.
        before_step: consider only checkpoints of steps before this one, for a rewind.
        repair: set damaged ones aside and finish a commit that a kill interrupted. Only the holder of the run
            folder's lock may do so; without it nothing on the disk changes.
        note: called with one line for each checkpoint that was set aside, committed or skipped.
        hashes: computes the hashes of files; in a run the ranks share this work.

    Raises:
        RequestError: the given path is not a good checkpoint; no checkpoint has the metric of ``best``; there are
            checkpoints, but none of them is good; or one of them is a dangling link.
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
        path = Path(os.path.abspath(path))
        inside = committed(path / "checkpoints") or committed(path)
        if inside and not (path / MANIFEST).exists():
            raise RequestError(
                f"{which} is a folder of checkpoints, not one of them: give one, such as {inside[-1]}"
            )
        try:
            return _open(path, content=True, hashes=hashes)
        except Damaged as damage:
            raise _refusal(path, damage) from None
    _refuse_broken_links([folder])
    if not folder.is_dir():
        return None
    if repair:
        _finish_commits(folder, note=note, hashes=hashes, disk=disk)
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
            return _open(path, content=True, hashes=hashes)
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
    """Refuse dangling links: a link to a disk that is not mounted must not look like a run without checkpoints."""
    for path in paths:
        if path.is_symlink() and not path.is_dir():
            raise RequestError(
                f"{path} is a link to {os.readlink(path)}, which is not there: mount or restore it, or remove the link"
            )


def _refuse_forbidden(path: Path) -> None:
    """A checkpoint that this user may not read (a run that was started as root) must not be taken for a damaged one."""
    if not path.is_dir():
        return
    forbidden = [path]
    if os.access(path, os.R_OK | os.X_OK):
        forbidden = [file for file in path.iterdir() if file.exists() and not os.access(file, os.R_OK)]
    if forbidden:
        raise RequestError(
            f"checkpoint {path}: this user may not read {forbidden[0].name}: change its owner or permissions (chown, chmod), or run "
            "as the user who trained it"
        )


def ranked(paths: Iterable[Path], *, metric: str | None = None, mode: str | None = None) -> list[Path]:
    """The checkpoints that have the metric, sorted from the worst to the best (of equal ones, the newest comes last).

    ``metric`` and ``mode`` default to the ``checkpoint.keep_best`` of the newest checkpoint that has one.
    """
    manifests: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except (Damaged, RequestError):
            continue  # opening it reports the same problem
    for path in reversed(manifests):
        kept = manifests[path].get("keep_best") or {}
        metric, mode = metric or kept.get("metric"), mode or kept.get("mode")
    values = ((path, m["metrics"].get(metric)) for path, m in manifests.items())
    return best_last(values, mode, after=measured_after(manifests.values()))


def measured_after(manifests: Iterable[Mapping[str, Any]]) -> int:
    """The step up to which metrics were measured on other data than later ones; -1 if all can be compared."""
    known = [manifest.get("measured_after") for manifest in manifests]
    return max((step for step in known if type(step) is int), default=-1)


def best_last(values: Iterable[tuple[Path, Any]], mode: str | None, *, after: int = -1) -> list[Path]:
    """The paths whose value is a finite number, sorted from the worst to the best (``mode``: ``min`` or ``max``).

    If there are any of steps later than ``after``, only those: the other values were measured on other data.
    """
    scored = [
        (value if mode == "max" else -value, step_of(path), path)
        for path, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    comparable = [one for one in scored if one[1] > after]
    return [path for _, _, path in sorted(comparable or scored)]


def abandon_after(
    folder: Path | str, step: int, *, note: Callable[[str], None] = print, disk: Disk = DISK
) -> None:
    """Set the checkpoints of later steps aside, because training continues from ``step``.

    Otherwise an automatic restart would resume from the highest step, which belongs to the abandoned branch.
    ``step=-1`` sets all of them aside.
    """
    for path in committed(Path(folder)):
        if step_of(path) > step:
            outcome = set_aside(path, "abandoned", disk)
            note(f"checkpoint {path.name} is newer than the step to continue from; {outcome}")
    for aside in Path(folder).glob(".step-*.tmp"):
        disk.remove_tree(aside)  # a complete one would be taken for a commit that a kill interrupted


def listing(folder: Path | str, *, verify_bytes: bool = False) -> list[dict[str, Any]]:
    """One row per checkpoint, oldest first, as ``lmcore checkpoints`` shows them.

    Returns:
        Dicts with name, step, problem and best; for readable ones also epoch, tokens, reason, time, metrics and bytes.
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
    """Rename a checkpoint (or the link to it) so that no run resumes from it. Returns the outcome in words."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.{suffix}-{number}")):
        number += 1
    try:
        disk.rename(path, target)
        disk.fsync_dir(path.parent)
    except OSError as error:
        return f"skipped: it could not be renamed ({error.strerror})"
    return f"set aside as {target.name}"


def _finish_commits(folder: Path, *, note: Callable[[str], None], hashes: Hashes, disk: Disk) -> None:
    """Commit the saves that are complete because they were killed only after their manifest was written."""
    for aside in sorted(folder.glob(".step-*.tmp")):
        if not (aside / MANIFEST).is_file():
            continue
        try:
            target = folder / step_name(step_of(aside))
            verify(aside, content=True, hashes=hashes)
            if os.path.lexists(target):
                continue
            disk.fsync_dir(aside)
            disk.rename(aside, target)
            disk.fsync_dir(folder)
        except (Damaged, RequestError, ValueError, OSError):
            continue  # incomplete (the next save removes it), or the disk is read-only
        note(f"checkpoint {target.name} was complete when the run was killed; committed now")
