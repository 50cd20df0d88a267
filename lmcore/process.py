"""Memory of this process and of this machine, and whether a process is alive (by psutil).

Example::

    free = available_bytes()        # what this process may still take, in bytes; None where nobody knows
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
    """Memory of this process that is in RAM now; with ``peak`` the most since :func:`forget_peak` (or its start)."""
    if not peak:
        return int(psutil.Process().memory_info().rss)
    if sys.platform.startswith("linux"):  # psutil has no peak there, and getrusage's cannot be reset
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def forget_peak() -> bool:
    """Reset the peak of :func:`resident_bytes`; ``False`` where the kernel does not allow that."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def pid_namespace() -> str:
    """Where the pids of this process count (``pid:[4026531836]``): each container has its own. Empty where nobody knows."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def available_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that this process can still take without swapping, or ``None`` where the system does not say.

    The least of: what the machine has free, what ``ulimit -v`` leaves of the address space, and what each control
    group around this process (Slurm's job, a container; version 1 and 2) has left. Never below zero.
    """
    found = []
    # A sandbox without /proc; the limits below may still be known
    with contextlib.suppress(OSError, RuntimeError):
        found.append(int(psutil.virtual_memory().available))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - int(psutil.Process().memory_info().vms))
    found += [left for folder in _memory_groups(proc) if (left := _left_in_group(folder)) is not None]
    return max(0, min(found)) if found else None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs. One that has ended and was not waited for yet (a zombie) does not."""
    if pid <= 0:
        return False
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def command_line_above(script: str) -> list[str]:
    """The command line of the nearest process above this one that was given ``script`` as a word, up to that word.

    Empty where there is none, or where the system does not show it.
    """
    with contextlib.suppress(psutil.Error, OSError):
        for parent in psutil.Process().parents():
            words: list[str] = []
            with contextlib.suppress(psutil.Error):  # another user's
                words = parent.cmdline()
            if script in words[1:]:
                return words[: words.index(script, 1)]
    return []


def _memory_groups(proc: Path) -> list[Path]:
    """Folders of the control groups that limit the memory of this process: its own and all above it."""
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
    """Bytes that a control group has left; the page cache that it can drop counts as free. ``None``: no limit."""
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
