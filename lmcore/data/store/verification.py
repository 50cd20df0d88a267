"""The files of a token store are compared with the hashes of their building: once per machine, and again when one of
them changes in size, time or inode.

What was compared is remembered in a small file of this user's cache (``$LMCORE_CACHE``, else ``$XDG_CACHE_HOME/lmcore``,
else ``~/.cache/lmcore``), so that a later start costs one ``stat`` for each part. Where nothing can be written there,
each start compares again. Of several processes of a machine one compares, and the others wait for it. Above
:data:`BACKGROUND_BYTES` the comparison goes on in the background while training starts; damage that it finds ends the
next read of the store.
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
"""A store with more to compare than this does not keep training waiting (10 to 60 s, by the disk)."""
THREAD = "token store verification"
_NOTED_BYTES = 2**30
_CHUNK_BYTES = 2**22
_THREADS = 8
_new_hash = functools.partial(hashlib.blake2b, digest_size=16)

Part = Mapping[str, Any]


def find_damage(folder: Path, parts: Sequence[Part], dtype: str) -> dict[str, str]:
    """{file of a damaged part: what is wrong}; empty if every part is what was built.

    Args:
        parts: their descriptions, as the manifest has them.
        dtype: of the tokens.
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
        vocab_size: every id must be below it; ``None``: not checked.
        note: gets one line if it takes long.

    Returns:
        ``None`` when all is well; for a large store that is compared in the background the path of a file that appears,
        with the reason in it, if damage is found.

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
    """Bring ``memory`` up to date with the files; the damage that was found."""
    rest = [part for part in parts if not _is_known(folder, part, memory)]
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        found = dict(zip((part["file"] for part in rest), pool.map(lambda p: _read(folder, p, dtype), rest)))
    for name, outcome in found.items():
        memory.pop(name, None)
        if isinstance(outcome, dict):
            memory[name] = outcome
    return {name: outcome for name, outcome in found.items() if isinstance(outcome, str)}


def _read(folder: Path, part: Part, dtype: str) -> dict[str, Any] | str:
    """What is remembered of one part, or what is wrong with it."""
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
    except ValueError:  # not whole tokens: it changed while it was read
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
    """Size, time of writing and inode: with another one a file is compared again."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def file_hash(path: Path | str) -> str:
    """Hash of a file as the manifest of a store has it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _bytes_of(folder: Path, part: Part) -> int:
    with contextlib.suppress(OSError):
        return (folder / f"{part['file']}.bin").stat().st_size
    return 0


def _memory_file(folder: Path, suffix: str = ".json") -> Path | None:
    """Where the results for a store are remembered; ``None`` where nothing can be written."""
    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_dir() / "stores" / f"{name}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path.parent, os.W_OK) else None


@contextlib.contextmanager
def remembered(folder: Path, *, write: bool = True) -> Iterator[dict[str, Any]]:
    """What this machine knows of a store, by the file of a part; one process at a time; written back if it has changed."""
    path = _memory_file(folder)
    if path is None:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        if write:
            # No locks there: two processes then compare, which costs time only
            with contextlib.suppress(OSError):
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.lockf(lock, fcntl.LOCK_EX)
        memory = read_cached(path) or {}
        before = json.dumps(memory, sort_keys=True)
        yield memory
        if write and json.dumps(memory, sort_keys=True) != before:
            write_cached(path, memory)
