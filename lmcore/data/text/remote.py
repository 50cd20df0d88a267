"""Text in a bucket: objects are read in ranges, through a cache of bounded size on the local disk.

An object must stay as it was when it was listed: its version (etag, else its time, else its size) takes the role of the
mtime of a local file, and is part of the fingerprint of a token store.

Example::

    paths = expand("s3://bucket/corpus/*.jsonl.zst")
    with open_file(paths[0]) as file:
        file.seek(10**9)
        file.read(100)
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any, Final

from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.storage import Store, StoreError, cache_dir, check_url, is_url

BLOCK_BYTES: Final = 4 * 2**20
"""Bytes read by one request. A compressed file is read from its beginning, so that all of it is needed anyway."""
CACHE_BYTES: Final = 10 * 2**30
"""The cache removes its oldest blocks above this size."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL that this module reads (``hf://`` names a dataset of the Hub, not files)."""
    return is_url(path) and not path.startswith("hf://")


@functools.lru_cache(maxsize=64)
def _store(url: str) -> Store:
    return Store(url)


def _split(url: str) -> tuple[Store, str]:
    folder, _, name = check_url(url).rpartition("/")
    if folder.endswith("/"):
        raise RequestError(f"{url} names a bucket: give a folder or files in it, such as {url}/*.txt")
    return _store(folder), name


def expand(pattern: str) -> list[tuple[str, str]]:
    """The objects that a URL of an object, a folder or a glob (``**`` for any depth) names: [(URL, name below the folder)].

    Sorted by name.

    Raises:
        RequestError: there are none, or the store does not answer.
    """
    # A question mark is a wildcard here, not the start of URL options, which check_url refuses if they have an equals sign.
    url = check_url(pattern)
    parts = url.split("/")
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    try:
        if fixed == len(parts):
            store, name = _split(url)
            if store.info(name) is not None:
                return [(url, name)]
            found = [(f"{url}/{name}", name) for name in _store(url).names()]
        elif fixed < 3:
            raise RequestError(f"{pattern}: the bucket must be named without wildcards")
        else:
            root, rest = _store("/".join(parts[:fixed])), parts[fixed:]
            found = [
                (root.url_of(name), name) for name in root.names() if matches_glob(name.split("/"), rest)
            ]
    except StoreError as error:
        raise RequestError(str(error)) from error
    if not found:
        raise RequestError(f"no object matches {pattern!r}")
    return sorted(found, key=lambda item: item[1])


def matches_glob(names: list[str], parts: list[str]) -> bool:
    """Whether a path matches a glob, both split at slashes; ``**`` matches folders of any depth."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(matches_glob(names[skip:], parts[1:] or ["*"]) for skip in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches_glob(names[1:], parts[1:])


def stat(url: str) -> os.stat_result | None:
    """The size of an object, with its version as mtime; ``None`` if there is no such object. Not cached.

    Raises:
        RequestError: the store does not answer.
    """
    store, name = _split(url)
    try:
        info = store.info(name)
    except StoreError as error:
        raise RequestError(str(error)) from error
    if info is None:
        return None
    identity = int.from_bytes(hashlib.sha256(url.encode()).digest()[:7], "big")
    version = int.from_bytes(hashlib.sha256(info.version.encode()).digest()[:7], "big")
    times = {"st_atime_ns": version, "st_mtime_ns": version, "st_ctime_ns": version}
    # No disk has st_dev 0, so that an object is never taken for a local file.
    return os.stat_result((0o100444, identity, 0, 1, 0, 0, info.n_bytes, 0, 0, 0), times)


def version(url: str) -> tuple[int, str]:
    """Size and version of an object, for fingerprints.

    Raises:
        RequestError: the object does not exist, or the store does not answer.
    """
    found = stat(url)
    if found is None:
        raise RequestError(f"{url} cannot be read: there is no such object")
    return found.st_size, f"version {found.st_mtime_ns:x}"


def open_file(path: str) -> IO[bytes]:
    """Open a local file or an object for reading.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(path), 2**16)


def state_of(file: IO[bytes], path: str) -> tuple[int, int]:
    """Size and mtime (for an object: its version) of an open file, looked up again.

    Raises:
        FaultError: the store does not answer.
    """
    found: Any = _stat_of_known(path) if is_remote(path) else os.fstat(file.fileno())
    return _state(found)


def _state(found: os.stat_result | None) -> tuple[int, int]:
    return (found.st_size, found.st_mtime_ns) if found is not None else (-1, -1)


def _stat_of_known(url: str) -> os.stat_result | None:
    """:func:`stat` of an object that existed before: if the store does not answer, that is a fault, not a wrong request."""
    try:
        return stat(url)
    except RequestError as error:
        if isinstance(error.__cause__, StoreError):
            raise FaultError(f"{error}; run the same command again") from error
        raise


class _Ranges(io.RawIOBase):
    """An object as a seekable file. Its blocks come from the cache, or are read by one request each."""

    def __init__(self, url: str) -> None:
        found = _stat_of_known(url)
        if found is None:
            raise FileNotFoundError(url)
        self._url, self._state = url, _state(found)
        self._store, self._name = _split(url)
        self._size, self._at = found.st_size, 0
        key = hashlib.sha256(f"{url}\0{found.st_size}\0{found.st_mtime_ns}".encode()).hexdigest()[:32]
        self._folder = cache_dir() / "ranges" / key
        self._block: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        number, inside = divmod(self._at, BLOCK_BYTES)
        if self._block[0] != number:
            self._block = number, self._read_block(number)
        piece = self._block[1][inside : inside + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _read_block(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self._size)
        place = self._folder / str(number)
        try:
            data = place.read_bytes()
        except OSError:
            data = b""
        if len(data) == stop - start:
            with contextlib.suppress(OSError):  # the cache removes the least recently used blocks
                os.utime(place)
            return data
        try:
            data = self._store.read_range(self._name, start, stop)
        except StoreError as error:  # not a bad record, which would be counted and skipped
            raise FaultError(f"{error}; run the same command again") from error
        if _state(_stat_of_known(self._url)) != self._state:
            return data  # perhaps another version: do not cache it; the reader detects the change at the end
        try:
            DISK.makedirs(self._folder)
            aside = place.with_name(f".{number}.{os.getpid()}.tmp")  # several processes may read one file
            DISK.write_file(aside, data, durable=False)
            DISK.rename(aside, place)
            _shrink(self._folder.parent)
        except OSError:
            return data  # the disk is full, or there is no cache: the next reader asks the store again
        return data


def _shrink(folder: Path, limit_bytes: int | None = None) -> None:
    """Remove the least recently used blocks until the cache is within its limit."""
    limit = CACHE_BYTES if limit_bytes is None else limit_bytes
    blocks = []
    for path in folder.glob("*/*"):
        try:
            info = path.stat()
        except OSError:
            continue  # removed by another process
        blocks.append((info.st_mtime_ns, info.st_size, path))
    total = sum(size for _, size, _ in blocks)
    for _, size, path in sorted(blocks):
        if total <= limit:
            return
        DISK.remove_quietly(path)
        total -= size
