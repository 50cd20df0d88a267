"""The size and a hash of samples of each file of a text, to detect whether the text has changed.

Fewer than :data:`REMEMBERED_FROM` files are read at each start. The hashes of more files are stored in the user's cache
(:func:`lmcore.storage.cache_dir`), and a file is read again if its size, device, inode, mtime or ctime differs (programs
cannot set the ctime). So a start costs one ``stat`` per file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcore.data.text import listing, remote
from lmcore.errors import RequestError
from lmcore.storage import cache_dir, read_cached, write_cached

REMEMBERED_FROM = 1000
WHOLE_BYTES = 2**20
"""Files up to this size are hashed completely."""
_SETTLED_NS = 2 * 10**9
"""A file that was changed this shortly before it was read is not stored: it may change again without a new time stamp."""


def sample_of(path: str) -> tuple[int, str]:
    """Size of a file, and a hash of its head, its tail and 14 places between; files up to 1 MiB are hashed completely.

    Raises:
        RequestError: the file cannot be read.
    """
    return _sample(path, *state_of(path))


def samples_of(paths: Sequence[str]) -> list[tuple[int, str]]:
    """:func:`sample_of` for each file.

    Raises:
        RequestError: a file cannot be read.
    """
    if len(paths) < REMEMBERED_FROM:
        return [sample_of(path) for path in paths]
    memory = _memory_file(paths)
    known = (read_cached(memory) if memory else None) or {}
    kept: dict[str, list[Any]] = {}
    found: list[tuple[int, str]] = []
    now = time.time_ns()
    for path in paths:
        state = state_of(path)
        name = path.encode("utf-8", "backslashreplace").decode()
        there = known.get(name)
        if isinstance(there, list) and len(there) == 6 and there[:5] == state and isinstance(there[5], str):
            sample = state[0], there[5]
        else:
            sample = _sample(path, *state)
        found.append(sample)
        if sample[0] == state[0] and max(state[1:3]) < now - _SETTLED_NS:
            kept[name] = [*state, sample[1]]
    if memory and kept != known:
        write_cached(memory, kept)
    return found


def state_of(path: str) -> list[int]:
    """[size, mtime, ctime, inode, device] of a file.

    Raises:
        RequestError: the file cannot be read.
    """
    stat = listing.stat(path)
    if stat is None:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


@functools.lru_cache(maxsize=2**18)
def _sample(path: str, *_: int) -> tuple[int, str]:
    """Cached, because the tokenizer, the training side and the validation side need the samples of the same files."""
    if remote.is_remote(path):
        return remote.version(path)  # changes with the content, so that nothing need be read
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                for number in range(16):
                    file.seek((size - 2**16) * number // 15)
                    digest.update(file.read(2**16))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    return size, digest.hexdigest()


def _memory_file(paths: Sequence[str]) -> Path | None:
    """The cache file, named by the first file and the common folder, so that a growing text replaces its own cache file.

    ``None`` if there is no cache folder or no common folder."""
    key = f"{paths[0]}\0{os.path.commonpath(paths)}".encode("utf-8", "surrogateescape")
    try:
        return cache_dir() / "files" / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
    except (RuntimeError, ValueError):  # a user without a home; files and URLs, which have no common folder
        return None
