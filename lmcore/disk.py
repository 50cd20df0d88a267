"""Durable, atomic changes of the disk. Everything that keeps the state of a run is written through :class:`Disk`.

Each change (create, write, fsync, rename, unlink, link, mkdir, rmdir) is one method, which calls ``before`` first.
Tests pass a ``before`` that kills the process, raises an error, or records what a power cut would leave, at every
single call. A file is never created through a symbolic link.

Example::

    disk = Disk()
    disk.write_json(Path("runs/a/status.json"), {"state": "running"})    # the old content or the new one, never half
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from lmcore.errors import RequestError


def require_current_folder() -> None:
    """Refuse to start in a folder that has been removed: no relative path means anything there.

    Raises:
        RequestError: it is gone.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise RequestError(
            f"the current folder cannot be found ({error.strerror}): it was removed or renamed; change to another one"
        ) from error


def refuse_unwritable(folder: Path, option: str) -> None:
    """Refuse a folder before the work whose result is to lie in it.

    Args:
        option: that names the folder, for the message.

    Raises:
        RequestError: it cannot be made, or nothing can be written into it.
    """
    there = next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), folder)
    if not there.is_dir():
        raise RequestError(f"{option} {folder}: {there} is not a folder; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(
            f"{option} {folder}: this user may not write into {there}; choose another {option}"
        )


CHUNK_BYTES: Final = 4 << 20
"""The largest single write: long enough to be fast, short enough that other threads get their turn."""


@final
@dataclass(frozen=True, kw_only=True)
class Call:
    """One change of the disk that is about to happen.

    ``operation`` is one of create, write, fsync, fsync_dir, rename, unlink, link, mkdir, rmdir; ``target``
    is the new path of a rename or the value of a link; ``fd`` and ``data`` are there for a write.
    """

    operation: str
    path: str
    target: str = ""
    fd: int = -1
    data: memoryview | None = None


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of Linux, which Python does not have; ``None`` elsewhere."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform.startswith("linux") else None
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_SYNC_FILE_RANGE: Final = _sync_file_range()


class Opened(NamedTuple):
    """A file open for writing."""

    path: str
    fd: int


@contextlib.contextmanager
def _naming(file: Opened) -> Iterator[None]:
    """The errors of calls by descriptor name no file; the line that a user reads must."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.path) from error


def temporary_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, or a refusal (``RequestError``) that says where one is looked for and how to name another place."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise RequestError(
            f"{error.strerror}: free space there, or set the environment variable TMPDIR to a folder that can be written to"
        ) from None
    return tempfile.TemporaryDirectory(prefix=prefix)


@final
class Disk:
    """Every change of the disk, one method each. ``before`` is called ahead of each and may raise."""

    large_writes = 0
    """Pieces of large files that were written so far, by all disks together: a sign that a long save is making progress."""

    def __init__(self, before: Callable[[Call], None] | None = None) -> None:
        self.before = before

    def _announce(self, call: Call) -> None:
        if self.before is not None:
            self.before(call)

    # ---- one system call each ------------------------------------------------------------------------------

    def create(self, path: Path | str, *, exclusive: bool = False) -> Opened:
        """A new, empty file. An existing file is truncated; with ``exclusive`` it is an error.

        Raises:
            OSError: among others ``ELOOP`` if ``path`` is a symbolic link.
        """
        self._announce(Call(operation="create", path=str(path)))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if exclusive else os.O_TRUNC)
        return Opened(str(path), os.open(path, flags | os.O_NOFOLLOW, 0o666))

    def write(self, file: Opened, data: bytes | memoryview) -> None:
        """All of ``data``, in pieces of at most :data:`CHUNK_BYTES`; a short write is continued."""
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[:CHUNK_BYTES]
            self._announce(Call(operation="write", path=file.path, fd=file.fd, data=piece))
            with _naming(file):
                view = view[os.write(file.fd, piece) :]
            if len(piece) >= 1 << 16:
                Disk.large_writes += 1

    def fsync(self, file: Opened) -> None:
        """Make the content of a file durable."""
        self._announce(Call(operation="fsync", path=file.path, fd=file.fd))
        with _naming(file):
            os.fsync(file.fd)

    def close(self, file: Opened) -> None:
        """Close it; on a network file system this is where a full disk may first be reported."""
        with _naming(file):
            os.close(file.fd)

    def start_writing(self, file: Opened, start: int, size: int) -> None:
        """Ask the kernel to begin now with these bytes, which it may otherwise keep until :meth:`fsync`. Nothing is waited
        for, nothing becomes durable; only Linux can."""
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(file.fd, start, size, 2)  # SYNC_FILE_RANGE_WRITE

    def fsync_dir(self, path: Path | str) -> None:
        """Make the names inside a folder durable."""
        self._announce(Call(operation="fsync_dir", path=str(path)))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and user-space file systems know no fsync of a folder; they order renames
            # themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(fd)

    def rename(self, path: Path | str, target: Path | str) -> None:
        """Atomic; a file at ``target`` is replaced."""
        self._announce(Call(operation="rename", path=str(path), target=str(target)))
        os.replace(path, target)

    def unlink(self, path: Path | str) -> None:
        self._announce(Call(operation="unlink", path=str(path)))
        os.unlink(path)

    def link(self, path: Path | str, value: str) -> None:
        """A symbolic link at ``path`` that says ``value``."""
        self._announce(Call(operation="link", path=str(path), target=value))
        os.symlink(value, path)

    def mkdir(self, path: Path | str, *, mode: int = 0o777) -> None:
        self._announce(Call(operation="mkdir", path=str(path)))
        os.mkdir(path, mode)

    def rmdir(self, path: Path | str) -> None:
        self._announce(Call(operation="rmdir", path=str(path)))
        os.rmdir(path)

    # ---- built from the calls above ------------------------------------------------------------------------

    def makedirs(self, path: Path, *, mode: int = 0o777) -> None:
        """``path`` and its missing parents, each durable in its parent; fine if it is there already."""
        if path.is_dir():
            return
        if path.parent != path:
            self.makedirs(path.parent)
        try:
            self.mkdir(path, mode=mode)
        except FileExistsError:
            if not path.is_dir():
                raise
        self.fsync_dir(path.parent)

    def write_file(self, path: Path | str, data: bytes | memoryview, *, durable: bool = True) -> None:
        """A new file with this content, in place (not atomic), and durable on request."""
        file = self.create(path)
        try:
            self.write(file, data)
            if durable:
                self.fsync(file)
        finally:
            self.close(file)

    def write_bytes(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Replace ``path`` as a whole: a reader sees the old content or the new one, never a mixture.

        Without ``durable`` a power cut may bring back the old content; a killed process never does.
        """
        aside = path.with_name(f".{path.name}.tmp")
        try:
            self.write_file(aside, data, durable=durable)
            self.rename(aside, path)
        except OSError:
            self.remove_quietly(aside)
            raise
        if durable:
            self.fsync_dir(path.parent)

    def write_text(self, path: Path, text: str, *, durable: bool = True) -> None:
        """:meth:`write_bytes` of UTF-8 text."""
        self.write_bytes(path, text.encode(), durable=durable)

    def write_json(self, path: Path, value: Any, *, durable: bool = True) -> None:
        """Indented JSON with a final newline, replaced as a whole."""
        try:
            data = json.dumps(value, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has an escape for it
            data = json.dumps(value, indent=2).encode()
        self.write_bytes(path, data + b"\n", durable=durable)

    def fsync_tree(self, path: Path) -> None:
        """Make all files and folders below ``path`` durable that a library has written there."""
        for entry in sorted(path.iterdir()):
            if entry.is_symlink():
                continue
            if entry.is_dir():
                self.fsync_tree(entry)
                continue
            fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.fsync(Opened(str(entry), fd))
            finally:
                os.close(fd)
        self.fsync_dir(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all below it, or a file. Links are removed, never followed."""
        if path.is_symlink() or not path.is_dir():
            self.unlink(path)
            return
        for entry in sorted(path.iterdir()):
            self.remove_tree(entry)
        self.rmdir(path)

    def remove_quietly(self, path: Path) -> bool:
        """Remove what a failed write left behind, without raising; whether it is gone.

        On a disk that has become read-only nothing can be removed: leftovers are recognized by their name and
        removed by the next save.
        """
        try:
            if path.is_symlink() or path.exists():
                self.remove_tree(path)
        except OSError:
            return False
        return True


DISK: Final = Disk()
"""The default of every ``disk`` argument."""
