"""Training on a CPU: let the process keep the memory that it frees, for the next step.

glibc allocates a block above 32 MB directly from the kernel and returns it when it is freed. Every training step frees and
allocates the same few hundred large blocks, and so pays a page fault for every 4 KiB of them. On a virtual machine that
costs more than some of the arithmetic (docs/log.md). ``mallopt`` turns this off from inside the process, without a
package or LD_PRELOAD.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_TOP_PAD_BYTES = 64 * 2**20
_LARGEST_INT = 2**31 - 1
CHOSEN_BY_USER = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_CONF",
)
"""Environment variables that choose an allocator or its settings; if one is set, nothing is changed."""


def keep_freed_memory() -> str | None:
    """Tell glibc to keep freed memory. Call this before the first large tensor is allocated.

    Returns:
        One line for the table at the start, or ``None`` if nothing was changed (not glibc, or the user set an allocator).
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in CHOSEN_BY_USER):
        return None
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return None
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD_BYTES))
    done = [mallopt(name, value) for name, value in settings]
    return "freed memory is kept for the next step (glibc mallopt)" if all(done) else None
