"""Durable, atomic changes on disk. Everything that keeps the state of a run is written through :class:`Disk`.

Each change (create, write, fsync, rename, unlink, link, mkdir, rmdir) is one method, which calls ``before`` first.
Tests pass a ``before`` that, at every single call, kills the process, raises an error, or records what a power cut
would leave. A file is never created through a symbolic link.

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
    """Refuse to start in a current folder that has been removed: relative paths cannot be resolved there.

    Raises:
        RequestError: the folder is gone.
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
"""The largest single write: large enough to be fast, small enough to let other threads run in between."""


@final
@dataclass(frozen=True, kw_only=True)
class Call:
    """One change on disk that is about to happen.

    ``operation`` is one of create, write, fsync, fsync_dir, rename, unlink, link, mkdir, rmdir; ``target``
    is the new path of a rename or the value of a link; ``fd`` and ``data`` are set for a write.
    """

    operation: str
    path: str
    target: str = ""
    fd: int = -1
    data: memoryview | None = None


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's ``sync_file_range``, which Python does not offer; ``None`` on other systems."""
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
    """Add the path to errors of calls that take a file descriptor: the user must see which file failed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.path) from error


def temporary_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder. If none can be made, a ``RequestError`` says where it was tried and how to choose another place."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise RequestError(
            f"{error.strerror}: free space there, or set the environment variable TMPDIR to a folder that can be written to"
        ) from None
    return tempfile.TemporaryDirectory(prefix=prefix)


@final
class Disk:
    """Every change on disk, one method each. ``before`` is called ahead of each change and may raise."""

    large_writes = 0
    """Pieces of large files written so far by all instances: it shows that a long save is making progress."""

    def __init__(self, before: Callable[[Call], None] | None = None) -> None:
        self.before = before

    def _announce(self, call: Call) -> None:
        if self.before is not None:
            self.before(call)

    # ---- one system call each ------------------------------------------------------------------------------

    def create(self, path: Path | str, *, exclusive: bool = False) -> Opened:
        """Create a new, empty file. An existing file is truncated; with ``exclusive`` it is an error.

        Raises:
            OSError: among others ``ELOOP`` if ``path`` is a symbolic link.
        """
        self._announce(Call(operation="create", path=str(path)))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if exclusive else os.O_TRUNC)
        return Opened(str(path), os.open(path, flags | os.O_NOFOLLOW, 0o666))

    def write(self, file: Opened, data: bytes | memoryview) -> None:
        """Write all of ``data`` in pieces of at most :data:`CHUNK_BYTES`; a short write is continued."""
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
        """Close a file. A network file system may report a full disk only here."""
        with _naming(file):
            os.close(file.fd)

    def start_writing(self, file: Opened, start: int, size: int) -> None:
        """Ask the kernel to start writing these bytes now instead of keeping them until :meth:`fsync`.

        Does not wait and makes nothing durable. A no-op except on Linux."""
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(file.fd, start, size, 2)  # SYNC_FILE_RANGE_WRITE

    def fsync_dir(self, path: Path | str) -> None:
        """Make the names inside a folder durable."""
        self._announce(Call(operation="fsync_dir", path=str(path)))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and user-space file systems have no fsync for folders; they order renames
            # themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(fd)

    def rename(self, path: Path | str, target: Path | str) -> None:
        """Rename atomically; a file at ``target`` is replaced."""
        self._announce(Call(operation="rename", path=str(path), target=str(target)))
        os.replace(path, target)

    def unlink(self, path: Path | str) -> None:
        self._announce(Call(operation="unlink", path=str(path)))
        os.unlink(path)

    def link(self, path: Path | str, value: str) -> None:
        """Create a symbolic link at ``path`` that points to ``value``."""
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
        """Create ``path`` and its missing parents, each durable in its parent. A no-op if it exists."""
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
        """Write a file with this content in place (not atomically); durable by default."""
        file = self.create(path)
        try:
            self.write(file, data)
            if durable:
                self.fsync(file)
        finally:
            self.close(file)

    def write_bytes(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Replace ``path`` as a whole: a reader sees the old content or the new one, never a mixture.

        Without ``durable`` a power cut may bring back the old content; killing the process never does.
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
        """Replace ``path`` by UTF-8 text, see :meth:`write_bytes`."""
        self.write_bytes(path, text.encode(), durable=durable)

    def write_json(self, path: Path, value: Any, *, durable: bool = True) -> None:
        """Replace ``path`` by indented JSON with a final newline, see :meth:`write_bytes`."""
        try:
            data = json.dumps(value, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has an escape for it
            data = json.dumps(value, indent=2).encode()
        self.write_bytes(path, data + b"\n", durable=durable)

    def fsync_tree(self, path: Path) -> None:
        """Make all files and folders below ``path`` durable, for files that a library has written."""
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
        """Remove a folder and everything below it, or a file. Links are removed, never followed."""
        if path.is_symlink() or not path.is_dir():
            self.unlink(path)
            return
        for entry in sorted(path.iterdir()):
            self.remove_tree(entry)
        self.rmdir(path)

    def remove_quietly(self, path: Path) -> bool:
        """Remove what a failed write left behind. Never raises; returns whether it is gone.

        On a disk that has become read-only nothing can be removed; the next save recognizes leftovers by their name
        and removes them.
        """
        try:
            if path.is_symlink() or path.exists():
                self.remove_tree(path)
        except OSError:
            return False
        return True


DISK: Final = Disk()
"""The default of every ``disk`` argument."""
