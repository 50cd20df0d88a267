"""Memory of this process and of this machine, and whether a process is alive (by psutil).

Example::

    free = available_bytes()        # what this process may still take, in bytes; None if unknown
    if free is not None and needed > 0.8 * free: ...
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import psutil


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process; with ``peak``, its maximum since :func:`forget_peak` (or since the start)."""
    if not peak:
        return int(psutil.Process().memory_info().rss)
    if sys.platform.startswith("linux"):  # psutil has no peak there, and getrusage's cannot be reset
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def forget_peak() -> bool:
    """Reset the peak of :func:`resident_bytes`. Returns ``False`` if the kernel does not allow that."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def pid_namespace() -> str:
    """The pid namespace of this process (``pid:[4026531836]``); each container has its own. Empty if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def available_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that this process can still allocate without swapping, or ``None`` if the system does not say.

    The minimum of the free memory of the machine, the address space left by ``ulimit -v``, and what is left in each
    control group (cgroup v1 or v2; a Slurm job, a container) that contains this process. Never below zero.
    """
    found = []
    # Fails in a sandbox without /proc; the limits below may still be known
    with contextlib.suppress(OSError, RuntimeError):
        found.append(int(psutil.virtual_memory().available))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - int(psutil.Process().memory_info().vms))
    found += [left for folder in _memory_groups(proc) if (left := _left_in_group(folder)) is not None]
    return max(0, min(found)) if found else None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running. A zombie, which has ended but was not waited for, is not."""
    if pid <= 0:
        return False
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def command_line_above(script: str) -> list[str]:
    """The command line of the nearest ancestor process that has ``script`` as an argument, up to that argument.

    Empty if there is none, or if the system does not show it.
    """
    with contextlib.suppress(psutil.Error, OSError):
        for parent in psutil.Process().parents():
            words: list[str] = []
            with contextlib.suppress(psutil.Error):  # the process belongs to another user
                words = parent.cmdline()
            if script in words[1:]:
                return words[: words.index(script, 1)]
    return []


def _memory_groups(proc: Path) -> list[Path]:
    """Folders of the control groups that limit the memory of this process: its own group and all parents."""
    try:
        mounts = (proc / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        lines = (proc / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # not Linux
    own = {}  # controllers -> path of the group; version 2 has one line with no controllers
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own["memory" if "memory" in controllers.split(",") else controllers] = path
    folders: list[Path] = []
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mountpoint = left.split()[3:5]
        kind, _, options = right.split()[:3]
        name = {"cgroup2": "", "cgroup": "memory"}.get(kind)
        if name is None or name not in own or (name == "memory" and "memory" not in options.split(",")):
            continue
        inside = own[name].removeprefix(root.rstrip("/")).strip("/")  # a container sees a part of the tree
        folder, top = Path(mountpoint) / inside, Path(mountpoint)
        folders += [group for group in (folder, *folder.parents) if group.is_relative_to(top)]
    return folders


def _left_in_group(folder: Path) -> int | None:
    """Bytes that a control group has left; reclaimable page cache counts as free. ``None`` if there is no limit."""
    for limit, usage, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed = (folder / limit).read_text().strip()
            if not allowed.isdigit() or int(allowed) >= 1 << 60:  # "max", or version 1's largest number
                continue
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):
            continue
        return int(allowed) - used + int(statistics.get(reclaimable, 0))
    return None
