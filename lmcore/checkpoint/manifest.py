"""A checkpoint folder and its manifest, which lists the files, the size and SHA-256 of each, and the tensors in them.

Version 2 lists the pieces of every tensor: ``tensors[kind][key]`` has ``dtype``, ``shape`` and ``pieces``. A piece is
``[i, start, length]`` (a range of the flattened tensor) or ``[i, offsets, lengths]`` (a box: offset and length in each
dimension). It is stored under ``key`` in the file ``piece_files[i]``, whose safetensors header gives its byte offsets.
Version 1 has only whole tensors, and no such list.

:func:`verify` compares a folder with its manifest and raises :class:`Damaged` at the first difference: a file (including
the manifest itself) that is missing, extra, shorter, longer, changed, or not a regular file. Nothing here writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from lmcore import __version__
from lmcore.checkpoint import pieces
from lmcore.checkpoint.pieces import Part
from lmcore.checkpoint.tensors import DTYPES
from lmcore.disk import CHUNK_BYTES
from lmcore.errors import RequestError

MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
FORMAT: Final = "lmcore-checkpoint"
VERSION: Final = 2
READ_VERSIONS: Final = (1, 2)
_STEP: Final = re.compile(r"step-(\d{8,15})")
_FILE: Final = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json)")
_KIND: Final = re.compile(r"[a-z][a-z0-9_]*")
_MAX_JSON_BYTES: Final = 1 << 30
_MAX_DIMENSIONS: Final = 64
_NOT_FINITE: Final = "__float__"
"""``{"__float__": "inf"}`` stands for a number that JSON cannot represent."""


class Damaged(Exception):
    """Says in one line what is wrong with a checkpoint. Callers outside this package get a ``RequestError``."""


def step_name(step: int) -> str:
    """``step-00001000``: eight digits, so that names sort like numbers."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder, including one that is being written or was set aside."""
    match = _STEP.search(path.name)
    if match is None:
        raise ValueError(f"{path.name} names no step")
    return int(match[1])


def committed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, selected by name only, oldest first.

    A symbolic link counts as a checkpoint (people move some to another disk and link them back). A dangling link is
    listed too, so that opening it reports the problem.
    """
    return sorted((folder / name for name in inodes(folder)), key=step_of)


def inodes(folder: Path) -> dict[str, int]:
    """Name -> inode of each checkpoint in a folder (for a link: of the link itself). Scans only the folder itself, not the
    checkpoints."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {
            entry.name: entry.inode()
            for entry in entries
            if _STEP.fullmatch(entry.name) and (entry.is_symlink() or entry.is_dir())
        }


Hashes = Callable[[Path, list[str]], dict[str, str]]
"""Computes the SHA-256 of the named files in a folder, by name."""


def hashes_here(path: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder by name, computed in this process by several threads."""
    workers = max(1, min(8, len(os.sched_getaffinity(0)), len(names)))
    with ThreadPoolExecutor(workers) as pool:  # hashing releases the interpreter lock
        return dict(zip(names, pool.map(lambda name: digest(path / name), names), strict=True))


def verify(path: Path, *, content: bool, hashes: Hashes = hashes_here) -> dict[str, Any]:
    """Compare a folder with its manifest: names and sizes, and with ``content`` every byte.

    Args:
        hashes: computes the hashes of files; in a run the ranks share this work.

    Returns:
        The manifest.

    Raises:
        Damaged: the first difference.
        RequestError: the checkpoint has a format version that this lmcore does not read.
    """
    if not path.is_dir():
        raise Damaged(
            f"a link to {os.readlink(path)}, which is not a folder" if path.is_symlink() else "no folder"
        )
    manifest = read_manifest(path)
    listed = manifest["files"]
    # NFS renames a file that is deleted while it is open.
    present = {entry.name for entry in os.scandir(path) if not entry.name.startswith(".nfs")} - {MANIFEST}
    if missing := sorted(set(listed) - present):
        raise Damaged(f"{missing[0]} is missing")
    if extra := sorted(present - set(listed)):
        raise Damaged(f"{extra[0]!r} is not in the manifest")
    for name, entry in listed.items():
        info = os.lstat(path / name)
        if not stat.S_ISREG(info.st_mode):
            raise Damaged(f"{name} is not a regular file")
        if info.st_size != entry["bytes"]:
            raise Damaged(f"{name} has {info.st_size:,} bytes instead of {entry['bytes']:,}")
    if content:
        found = hashes(path, list(listed))
        for name in listed:
            if found.get(name) != listed[name]["sha256"]:
                raise Damaged(f"the content of {name} has changed")
    return manifest


@final
@dataclass(frozen=True, kw_only=True)
class Described:
    """One tensor of a checkpoint. ``pieces`` are (file name, part) and cover the whole tensor exactly once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, Part], ...]


def described(manifest: Mapping[str, Any]) -> dict[tuple[str, str], Described]:
    """The tensors of a version 2 manifest by (kind, key), each covered exactly once by its pieces.

    Allocates no tensor and opens no file.

    Raises:
        Damaged: invalid names, numbers or pieces: pieces that overlap, are missing, reach beyond their tensor, or are
            in a file that is not listed.
    """
    tensors, names = manifest.get("tensors"), manifest.get("piece_files")
    if not (isinstance(tensors, dict) and isinstance(names, list)):
        raise Damaged(f"{MANIFEST} has no valid list of tensors")
    in_folder = [name for name in manifest["files"] if name.endswith(".safetensors")]
    if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(in_folder):
        raise Damaged(f"{MANIFEST} lists other files for its tensors than it has")
    most = sum(manifest["files"][name]["bytes"] for name in names)
    found: dict[tuple[str, str], Described] = {}
    for kind, of_kind in tensors.items():
        if not (isinstance(of_kind, dict) and _KIND.fullmatch(kind)):
            raise Damaged(f"{MANIFEST} has no valid list of tensors")
        for key, entry in of_kind.items():
            try:
                found[kind, key] = _described(kind, entry, names, most)
            except ValueError as problem:
                raise Damaged(f"{MANIFEST}: {kind} {key}: {problem}") from None
    return found


def _described(kind: str, entry: Any, names: list[str], most_bytes: int) -> Described:
    """Parse one entry of ``tensors``. Raises ``ValueError`` if it is invalid."""
    if not (isinstance(entry, dict) and isinstance(entry.get("pieces"), list)):
        raise ValueError("not described")
    if not (isinstance(entry.get("dtype"), str) and entry["dtype"] in DTYPES):
        raise ValueError(f"unknown dtype {entry.get('dtype')!r}")
    dtype, shape = DTYPES[entry["dtype"]], entry.get("shape")
    if not (isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS):
        raise ValueError("no valid shape")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise ValueError("no valid shape")
    if math.prod(shape) * dtype.itemsize > most_bytes:
        raise ValueError(f"shape {shape} is larger than all files")
    parts, files = [], []
    for value in entry["pieces"]:
        file, part = pieces.from_json(value)
        if not 0 <= file < len(names):
            raise ValueError("a piece lies in no file of this checkpoint")
        if names[file].removesuffix(".safetensors").split("-")[0] != kind:
            raise ValueError(f"a piece lies in {names[file]}, a file of another kind")
        files.append(names[file])
        parts.append(part)
    if len(set(files)) != len(files):
        raise ValueError("two pieces lie in the same bytes")
    if problem := pieces.problem_of(parts, shape):
        raise ValueError(problem)
    return Described(dtype=dtype, shape=tuple(shape), pieces=tuple(zip(files, parts)))


def digest(path: Path, *, from_disk: bool = False) -> str:
    """SHA-256 of a file in hexadecimal, or ``unreadable: ...``, which equals no hash.

    Args:
        from_disk: ask the kernel to drop its cached copy first, so that the hash is of what the disk holds.
    """
    state = hashlib.sha256()
    try:
        for chunk in _chunks(path, from_disk=from_disk):
            state.update(chunk)
    except OSError as error:
        return f"unreadable: {error}"
    return state.hexdigest()


def difference(path: Path, parts: Iterable[memoryview]) -> str:
    """Where a file on the disk differs from the concatenation of ``parts``; empty if it does not.

    To be used while the written bytes are still in memory: comparing takes a fifth of the time of hashing (measured: 5.3
    and 1.1 GB/s per core).
    """
    expected = [np.frombuffer(part, dtype=np.uint8) for part in parts]
    at = 0
    try:
        for chunk in _chunks(path, from_disk=True):
            found = np.frombuffer(chunk, dtype=np.uint8)
            while len(found) and expected:
                size = min(len(found), len(expected[0]))
                if not np.array_equal(found[:size], expected[0][:size]):
                    return f"another byte in {at:,} to {at + size:,}"
                at, found = at + size, found[size:]
                expected[0] = expected[0][size:]
                if not len(expected[0]):
                    del expected[0]
            if len(found):
                return f"longer than {at:,} bytes"
    except OSError as error:
        return f"unreadable: {error}"
    missing = sum(map(len, expected))
    return f"{at:,} bytes instead of {at + missing:,}" if missing else ""


def _chunks(path: Path, *, from_disk: bool) -> Iterator[memoryview]:
    """The bytes of a file in chunks. All chunks share one buffer, so each is valid only until the next."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(4096, path.stat().st_size))))
    with open(path, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            yield buffer[:count]


# ---- JSON --------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file. Raises ``Damaged``."""
    return _parsed(path.name, _content(path))


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """The content of ``state.json``: strict JSON that preserves infinities and NaN (:data:`_NOT_FINITE`)."""
    strict = _strict(state)
    try:
        return json.dumps(strict, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has an escape for it
        return json.dumps(strict, allow_nan=False).encode()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The canonical serialization of a manifest, including a hash of all its other content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    content = content | {"sha256": own}
    if content.get("version") == 1:
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    return ("\n".join(_lines(content)) + "\n").encode()


def _lines(value: Mapping[str, Any], depth: int = 0) -> list[str]:
    """JSON with one line for each file and tensor. A manifest may have millions of pieces, which json indents slowly."""
    found = ["{"]
    for number, key in enumerate(sorted(value), 1):
        item = value[key]
        nested = isinstance(item, dict) and any(isinstance(inner, dict) for inner in item.values())
        lines = _lines(item, depth + 1) if nested and depth < 2 else [json.dumps(item, sort_keys=True)]
        found += [f"{' ' * (depth + 1)}{json.dumps(key)}: {lines[0]}", *lines[1:]]
        found[-1] += "," if number < len(value) else ""
    return [*found, " " * depth + "}"]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint folder.

    Raises:
        Damaged: it is missing, was changed, or does not describe a checkpoint.
        RequestError: it has a format version that this lmcore does not read.
    """
    manifest = read_hashed(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} is not of the format {FORMAT}")
    if manifest.get("version") not in READ_VERSIONS:
        raise RequestError(
            f"{path} has checkpoint version {manifest.get('version')!r}, this lmcore ({__version__}) reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: resume it with the lmcore that wrote it"
        )
    files, step = manifest.get("files"), manifest.get("step")
    if not (isinstance(files, dict) and STATE in files and type(step) is int):
        raise Damaged(f"{MANIFEST} has no valid list of files")
    if not all(_is_valid_entry(name, entry) for name, entry in files.items()):
        raise Damaged(f"{MANIFEST} has no valid list of files")
    if not isinstance(manifest.get("metrics"), dict) or not isinstance(manifest.get("reason"), str):
        raise Damaged(f"{MANIFEST} has no metrics or reason")
    if _STEP.fullmatch(path.name) and step != step_of(path):
        raise Damaged(f"{MANIFEST} is of step {step}")
    return manifest


def read_hashed(path: Path) -> dict[str, Any]:
    """Read a JSON object that :func:`manifest_bytes` wrote, and check its hash. Raises ``Damaged``."""
    data = _content(path)
    found = _parsed(path.name, data)
    # Serializing it again must give the same bytes, so that a bit flip in white space is found as well.
    try:
        expected = manifest_bytes(found)
    except (RecursionError, ValueError) as error:
        raise Damaged(f"{path.name}: {error}") from None
    if data != expected:
        raise Damaged(f"{path.name} does not match its own hash")
    return found


def _content(path: Path) -> bytes:
    """All bytes of a file, which must be regular: a FIFO would block, and a link may lead out of the checkpoint."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise Damaged(f"{path.name} is not a regular file")
            if info.st_size > _MAX_JSON_BYTES:
                raise Damaged(
                    f"{path.name} has {info.st_size:,} bytes, more than the allowed {_MAX_JSON_BYTES:,}"
                )
            return file.read()
    except OSError as error:
        if path.is_symlink():
            raise Damaged(f"{path.name} is not a regular file") from None
        raise Damaged(f"{path.name}: {error.strerror}") from None


def _parsed(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data, object_hook=_restored)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{name} is no JSON object")
    return value


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: repr(value)}
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _restored(value: dict[str, Any]) -> Any:
    if value.keys() == {_NOT_FINITE} and value[_NOT_FINITE] in ("inf", "-inf", "nan"):
        return float(value[_NOT_FINITE])
    return value


def _is_valid_entry(name: str, entry: Any) -> bool:
    return (
        _FILE.fullmatch(name) is not None
        and name != MANIFEST
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
    )
