"""One checkpoint folder against its manifest: what must be in it, byte for byte; part of ``checkpoint.py``.

Comes in: a folder. Goes out: its manifest, or :class:`Damaged` with the first thing that is wrong. What
always
holds: a file that is missing, extra, shorter, longer, changed, or no regular file is found, the manifest
    itself
included; nothing is believed because of its name; nothing here writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from lmcore import __version__
from lmcore.disk import CHUNK_BYTES
from lmcore.errors import RequestError

MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
FORMAT: Final = "lmcore-checkpoint"
VERSION: Final = 1
_STEP: Final = re.compile(r"step-(\d{8,15})")
_FILE: Final = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json)")
_MAX_JSON_BYTES: Final = 1 << 30


class Damaged(Exception):
    """What is wrong with a checkpoint, in one line. Never leaves the checkpoint rooms."""


def step_name(step: int) -> str:
    """``step-00001000``: eight digits, so that names sort as numbers do."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a folder (also of one that is being written or was set aside)."""
    match = _STEP.search(path.name)
    if match is None:
        raise ValueError(f"{path.name} names no step")
    return int(match[1])


def committed(folder: Path) -> list[Path]:
    """The folders whose name says committed checkpoint, oldest first. Links are none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def verify(path: Path, *, content: bool) -> dict[str, Any]:
    """Compare a folder with its manifest: names and sizes, and with ``content`` every byte. The manifest."""
    manifest = read_manifest(path)
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
            digests = pool.map(lambda name: digest(path / name), listed)
            for name, found in zip(listed, digests, strict=True):
                if found != listed[name]["sha256"]:
                    raise Damaged(f"the content of {name} has changed")
    return manifest


def digest(path: Path, *, from_disk: bool = False) -> str:
    """sha256 of a file, or a word on why it cannot be read.

    ``from_disk`` asks the kernel to forget its copy first, so that what is hashed is what the disk holds.
    """
    state = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(4096, path.stat().st_size))))
    try:
        with open(path, "rb", buffering=0) as file:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                state.update(buffer[:count])
    except OSError as error:
        return f"unreadable: {error}"
    return state.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a sane size. Raises ``Damaged``."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise Damaged(f"{path.name} is larger than any that is written here")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} is no JSON object")
    return value


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one way in which this content is written; it carries a hash over all the rest of itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises ``Damaged``, or ``RequestError`` for one of another version."""
    manifest_path = path / MANIFEST
    if manifest_path.is_symlink():
        raise Damaged(f"{MANIFEST} is no regular file")
    manifest = read_json(manifest_path)
    # Written anew it must give the same bytes: so a flip in a space is found like any other.
    if manifest_path.read_bytes() != manifest_bytes(manifest):
        raise Damaged(f"{MANIFEST} does not match its own hash")
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} is not of the format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise RequestError(
            f"{path} has checkpoint version {manifest.get('version')!r}, this lmcore ({__version__}) reads "
            f"{VERSION}: resume it with the lmcore that wrote it"
        )
    files, step = manifest.get("files"), manifest.get("step")
    if not (isinstance(files, dict) and STATE in files and type(step) is int):
        raise Damaged(f"{MANIFEST} lists no sound files")
    if not all(_is_sound(name, entry) for name, entry in files.items()):
        raise Damaged(f"{MANIFEST} lists no sound files")
    if not isinstance(manifest.get("metrics"), dict) or not isinstance(manifest.get("reason"), str):
        raise Damaged(f"{MANIFEST} has no metrics or reason")
    if _STEP.fullmatch(path.name) and step != step_of(path):
        raise Damaged(f"{MANIFEST} is of step {step}")
    return manifest


def _is_sound(name: str, entry: Any) -> bool:
    return (
        _FILE.fullmatch(name) is not None
        and name != MANIFEST
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    )
