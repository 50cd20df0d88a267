"""On a CPU: let the process keep the memory that it frees, for the next step.

glibc takes a block above 32 MB straight from the kernel and hands it back when it is freed. A training step frees and
asks for the same few hundred large blocks again and again, so each step pays a page fault for every 4 KiB of them;
on a virtual machine that costs more than some of the arithmetic (docs/log.md). ``mallopt`` turns it off from inside:
no package, no LD_PRELOAD. What always holds: whoever chose an allocator or its settings themselves is left alone.

    said = keep_freed_memory()      # before the first large tensor

And how much of it is in use: :func:`resident_bytes`.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_TOP_PAD_BYTES = 64 * 2**20
_LARGEST_INT = 2**31 - 1
_CHOSEN_BY_HAND = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_CONF",
)


def keep_freed_memory() -> str | None:
    """Tell glibc to keep what is freed. One line that says so, or ``None`` where nothing was done."""
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _CHOSEN_BY_HAND):
        return None
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return None
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD_BYTES))
    done = [mallopt(name, value) for name, value in settings]
    return "freed memory is kept for the next step (glibc mallopt)" if all(done) else None


def resident_bytes(*, peak: bool = False) -> int:
    """Memory of this process that is in RAM now, or the most since :func:`forget_peak` (or its start)."""
    if sys.platform.startswith("linux"):
        wanted = "VmHWM:" if peak else "VmRSS:"
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(wanted)) * 1024
    import resource  # not on Windows, where lmcore does not run

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes; it tells nothing but the peak


def available_bytes() -> int | None:
    """What this machine could give to programs without swapping; ``None`` where the kernel does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return None


def forget_peak() -> bool:
    """Let the peak count from now on; ``False`` where the kernel does not let a process do that."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True
