"""Hooks for ``lmcore.disk.Disk``: a disk that is killed, full, or without power. For tests and the fault campaign."""

from __future__ import annotations

import errno
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcore.disk import Call


def forked(function: Callable[[], Any]) -> int:
    """Run ``function`` in a forked child; its exit code (0: returned, 1: raised), negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class KillAt:
    """SIGKILL before call number ``number`` (from 0); in a write, after half of its bytes if ``torn``.

    ``kill``: kills this process and others; default: this process alone.
    """

    def __init__(self, number: int, *, torn: bool = False, kill: Callable[[], None] | None = None) -> None:
        self.number, self.torn, self.count = number, torn, 0
        self._kill = kill or (lambda: os.kill(os.getpid(), signal.SIGKILL))

    def __call__(self, call: Call) -> None:
        if self.count == self.number:
            if self.torn and call.data is not None:
                os.write(call.fd, call.data[: len(call.data) // 2])
            self._kill()
        self.count += 1


class FailAt:
    """Every call from number ``number`` on fails with ``error`` (or only that one)."""

    def __init__(self, number: int, error: int, *, lasting: bool) -> None:
        self.number, self.error, self.lasting, self.count = number, error, lasting, 0

    def __call__(self, call: Call) -> None:
        here = self.count
        self.count += 1
        if here == self.number or (self.lasting and here > self.number):
            raise OSError(self.error, os.strerror(self.error), call.path)


class FullAt:
    """The disk takes ``capacity_bytes`` more and is then full: the write that crosses the line is cut
    short.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.left = capacity_bytes

    def __call__(self, call: Call) -> None:
        if call.data is None:
            return
        if len(call.data) > self.left:
            os.write(call.fd, call.data[: self.left])
            self.left = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.path)
        self.left -= len(call.data)


class Counter:
    """How many calls, and bytes, a piece of work makes; ``calls`` are their names."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bytes = 0

    def __call__(self, call: Call) -> None:
        self.calls.append(call.operation)
        self.bytes += len(call.data) if call.data is not None else 0


class _File:
    def __init__(self, durable: bytes = b"", link: str | None = None) -> None:
        self.durable, self.now, self.link = durable, durable, link


class _Folder:
    def __init__(self) -> None:
        self.durable: dict[str, Any] = {}
        self.now: dict[str, Any] = {}
        self.pending: list[list[tuple[str, Any]]] = []  # units of (name, inode or None), each atomic


class PowerCut(Exception):
    """The power went out at the chosen call."""


class PoweredDisk:
    """A model of what a power cut leaves of a folder.

    Content is sure to survive only from the last fsync of its file, names only from the last fsync of their
    folder; of the rest any part may survive, in any combination. That is harsher than any file system with a
    journal. Hang it into a ``Disk``, let the work run, then :meth:`after_power_cut` builds one possible
    outcome.
    """

    def __init__(self, root: Path, stop_at: int | None = None) -> None:
        self.root = root
        self.stop_at = stop_at
        self.count = 0
        self.tree = self._load(root)

    def _load(self, path: Path) -> _File | _Folder:
        if path.is_symlink():
            return _File(link=os.readlink(path))
        if path.is_file():
            return _File(path.read_bytes())
        folder = _Folder()
        for entry in path.iterdir():
            folder.durable[entry.name] = folder.now[entry.name] = self._load(entry)
        return folder

    def _at(self, path: str) -> Any:
        node = self.tree
        for part in Path(path).relative_to(self.root).parts:
            node = node.now[part]
        return node

    def _change(self, path: str, inode: Any) -> tuple[_Folder, str, Any]:
        parent = self._at(str(Path(path).parent))
        name = Path(path).name
        if inode is None:
            parent.now.pop(name)
        else:
            parent.now[name] = inode
        return parent, name, inode

    def __call__(self, call: Call) -> None:
        if self.count == self.stop_at:
            raise PowerCut
        self.count += 1
        match call.operation:
            case "create" | "mkdir" | "link":
                if call.operation == "create":
                    known = self._at(str(Path(call.path).parent)).now.get(Path(call.path).name)
                    node = known or _File()
                    if known:
                        known.now = b""
                else:
                    node = _Folder() if call.operation == "mkdir" else _File(link=call.target)
                parent, name, inode = self._change(call.path, node)
                parent.pending.append([(name, inode)])
            case "write":
                assert call.data is not None
                self._at(call.path).now += bytes(call.data)
            case "fsync":
                node = self._at(call.path)
                node.durable = node.now
            case "fsync_dir":
                node = self._at(call.path)
                node.durable, node.pending = dict(node.now), []
            case "rename":
                node = self._at(call.path)
                source, name, _ = self._change(call.path, None)
                target, target_name, _ = self._change(call.target, node)
                if source is target:
                    source.pending.append([(name, None), (target_name, node)])
                else:
                    source.pending.append([(name, None)])
                    target.pending.append([(target_name, node)])
            case "unlink" | "rmdir":
                parent, name, _ = self._change(call.path, None)
                parent.pending.append([(name, None)])

    def after_power_cut(self, target: Path, seed: int) -> None:
        """Write one possible outcome to ``target``. Seed 0: nothing unsynced survives; seed 1: all of it
        does.
        """
        self._write(self.tree, target, random.Random(seed), seed)

    def _write(self, node: _File | _Folder, path: Path, draw: random.Random, seed: int) -> None:
        if isinstance(node, _File):
            if node.link is not None:
                path.symlink_to(node.link)
                return
            kept = {0: node.durable, 1: node.now}.get(seed)
            if kept is None:
                cut = draw.randrange(len(node.now) + 1)
                # A file system may show lost pages as zeros, or cut them off
                zeros = bytes(len(node.now) - cut)
                kept = draw.choice([node.durable, node.now, node.now[:cut], node.now[:cut] + zeros])
                kept = node.now if node.now == node.durable else kept
            path.write_bytes(kept)
            return
        names = dict(node.durable)
        for unit in node.pending:
            if seed == 1 or (seed > 1 and draw.random() < 0.5):
                for name, inode in unit:
                    if inode is None:
                        names.pop(name, None)
                    else:
                        names[name] = inode
        path.mkdir(exist_ok=True)
        for name, inode in names.items():
            self._write(inode, path / name, draw, seed)


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint folder in a random way; returns which way and which file."""
    path = draw.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "flip", "truncate", "zero", "delete", "add", "append", "swap"])
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[draw.randrange(len(data)) :]
    elif kind == "zero":
        start = draw.randrange(len(data)) // 512 * 512
        if not any(data[start : start + 4096]):
            kind = "flip"  # a page of zeros stays the same page
            data[start] ^= 1
        data[start : start + 4096] = (
            bytes(len(data[start : start + 4096])) if kind == "zero" else data[start : start + 4096]
        )
    elif kind == "append":
        data += bytes(draw.randrange(1, 9))
    if kind == "delete":
        path.unlink()
    elif kind == "add":
        (folder / draw.choice(["extra.safetensors", "x.json", "pytorch_model.bin", ".hidden"])).write_bytes(
            b"x"
        )
    elif kind == "swap":
        other = draw.choice([p for p in sorted(folder.iterdir()) if p != path])
        content = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(content)
    else:
        path.write_bytes(bytes(data))
    return f"{kind} {path.name}"
