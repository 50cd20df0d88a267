"""Compares the files of a token store with the hashes from when they were built: once per machine, and again when a file
changes in size, time or inode.

The results are stored in a small file in the user's cache (``$LMCORE_CACHE``, else ``$XDG_CACHE_HOME/lmcore``,
else ``~/.cache/lmcore``), so that a later start costs one ``stat`` per file. If the cache is not writable,
each start compares again. Of several processes on a machine one compares, and the others wait for it. Above
:data:`BACKGROUND_BYTES` the comparison runs in the background while training starts; if it finds damage, the
next read of the store raises an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import size
from lmcore.storage import cache_dir, read_cached, write_cached

BACKGROUND_BYTES = 8 * 2**30
"""If more than this must be compared, training does not wait for it (10 to 60 s, depending on the disk)."""
THREAD = "token store verification"
_NOTED_BYTES = 2**30
_CHUNK_BYTES = 2**22
_THREADS = 8
_new_hash = functools.partial(hashlib.blake2b, digest_size=16)

Part = Mapping[str, Any]


def find_damage(folder: Path, parts: Sequence[Part], dtype: str) -> dict[str, str]:
    """{file of a damaged part: what is wrong}; empty if every part is as it was built.

    Args:
        parts: the descriptions of the parts, as in the manifest.
        dtype: dtype of the tokens.
    """
    with remembered(folder) as memory:
        return _compare(folder, parts, dtype, memory)


def verify(
    folder: Path,
    parts: Sequence[Part],
    dtype: str,
    *,
    vocab_size: int | None = None,
    note: Callable[[str], None] | None = None,
) -> Path | None:
    """Compare every part that was not compared on this machine since its files last changed.

    Args:
        vocab_size: every id must be below this; ``None``: not checked.
        note: called with one line if the comparison takes long.

    Returns:
        ``None`` if nothing is wrong. For a large store that is compared in the background, the path of a file that is
        created, with the reason in it, if damage is found.

    Raises:
        FaultError: a part is damaged, or has ids beyond the vocabulary.
        RequestError: this user may not read a file of it.
    """
    with remembered(folder, write=False) as memory:
        rest = [part for part in parts if not _is_known(folder, part, memory)]
    todo = sum(_bytes_of(folder, part) for part in rest)
    if rest and todo > BACKGROUND_BYTES and _memory_file(folder) is not None:
        alarm = _memory_file(folder, ".damage")
        assert alarm is not None
        alarm.unlink(missing_ok=True)
        if note is not None:
            note(f"token store {folder}: {size(todo)} are compared with their hashes in the background")
        work = (folder, parts, dtype, vocab_size, alarm)
        threading.Thread(target=_in_background, args=work, daemon=True, name=THREAD).start()
        return alarm
    if note is not None and todo > _NOTED_BYTES:
        note(f"token store {folder}: {size(todo)} are compared with their hashes, once on this machine")
    message = _verdict(folder, parts, dtype, vocab_size)
    if message is not None:
        raise FaultError(message)
    return None


def _in_background(
    folder: Path, parts: Sequence[Part], dtype: str, vocab_size: int | None, alarm: Path
) -> None:
    try:
        message = _verdict(folder, parts, dtype, vocab_size)
    except RequestError as error:
        message = str(error)
    if message is not None:
        DISK.write_text(alarm, message, durable=False)


def _verdict(folder: Path, parts: Sequence[Part], dtype: str, vocab_size: int | None) -> str | None:
    with remembered(folder) as memory:
        damage = _compare(folder, parts, dtype, memory)
        if damage:
            name, reason = next(iter(damage.items()))
            return (
                f"{folder / name}.bin or .ends is damaged ({reason}; {len(damage)} of {len(parts)} parts are): "
                f"remove {folder} to build it again"
            )
        for part in parts:
            largest = memory[part["file"]]["largest"]
            if vocab_size is not None and largest >= vocab_size:
                return (
                    f"{folder / part['file']}.bin holds the token {largest}, but the tokenizer has only {vocab_size} "
                    f"ids: the store was made with another tokenizer; remove {folder} to build it again"
                )
    return None


def _compare(folder: Path, parts: Sequence[Part], dtype: str, memory: dict[str, Any]) -> dict[str, str]:
    """Update ``memory`` from the files. Returns the damage that was found."""
    rest = [part for part in parts if not _is_known(folder, part, memory)]
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        found = dict(zip((part["file"] for part in rest), pool.map(lambda p: _read(folder, p, dtype), rest)))
    for name, outcome in found.items():
        memory.pop(name, None)
        if isinstance(outcome, dict):
            memory[name] = outcome
    return {name: outcome for name, outcome in found.items() if isinstance(outcome, str)}


def _read(folder: Path, part: Part, dtype: str) -> dict[str, Any] | str:
    """The result to store for one part, or a description of what is wrong with it."""
    bins, ends = folder / f"{part['file']}.bin", folder / f"{part['file']}.ends"
    largest = -1
    try:
        stats = [file_state(bins), file_state(ends)]
        sizes = [
            part["tokens"] * np.dtype(dtype).itemsize,
            part["documents"] * np.dtype(part["ends_dtype"]).itemsize,
        ]
        for path, stat, expected in zip((bins, ends), stats, sizes):
            if stat[0] != expected:
                return f"{path.name} has {stat[0]} bytes instead of {expected}"
        digest = _new_hash()
        with open(bins, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk, dtype=dtype).max()))
        digests = [digest.hexdigest(), file_hash(ends)]
    except PermissionError as error:  # the part may be good: nothing is to be removed or built again
        raise RequestError(
            f"{error.filename} cannot be read: {error.strerror}; give this user the right to read it, or set data.store_dir "
            "to another folder"
        ) from error
    except OSError as error:
        return str(error.strerror or error)
    except ValueError:  # a partial token: the file changed while it was read
        return "it is changing"
    if digests != [part["bin_hash"], part["ends_hash"]]:
        return f"the hash of {'.bin' if digests[0] != part['bin_hash'] else '.ends'} differs"
    return {"hashes": digests, "stats": stats, "largest": largest}


def _is_known(folder: Path, part: Part, memory: Mapping[str, Any]) -> bool:
    known = memory.get(part["file"])
    try:
        stats = [file_state(folder / f"{part['file']}.bin"), file_state(folder / f"{part['file']}.ends")]
        hashes = [part["bin_hash"], part["ends_hash"]]
        return (
            isinstance(known, dict)
            and (known.get("hashes"), known.get("stats")) == (hashes, stats)
            and isinstance(known.get("largest"), int)
        )
    except OSError:
        return False


def file_state(path: Path) -> list[int]:
    """[size, mtime, inode]; if one of them changes, the file is compared again."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def file_hash(path: Path | str) -> str:
    """Hash of a file, computed as for the manifest of a store."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _bytes_of(folder: Path, part: Part) -> int:
    with contextlib.suppress(OSError):
        return (folder / f"{part['file']}.bin").stat().st_size
    return 0


def _memory_file(folder: Path, suffix: str = ".json") -> Path | None:
    """The file in which the results for a store are saved; ``None`` if the cache is not writable."""
    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_dir() / "stores" / f"{name}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path.parent, os.W_OK) else None


@contextlib.contextmanager
def remembered(folder: Path, *, write: bool = True) -> Iterator[dict[str, Any]]:
    """Context manager with the saved results for a store, by part file. They are written back if they have changed.

    With ``write``, only one process at a time."""
    path = _memory_file(folder)
    if path is None:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        if write:
            # Without locks two processes may both compare, which only costs time
            with contextlib.suppress(OSError):
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.lockf(lock, fcntl.LOCK_EX)
        memory = read_cached(path) or {}
        before = json.dumps(memory, sort_keys=True)
        yield memory
        if write and json.dumps(memory, sort_keys=True) != before:
            write_cached(path, memory)
