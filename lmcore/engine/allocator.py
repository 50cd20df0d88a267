"""Training on a CPU: let the process keep the memory that it frees, for the next step.

glibc takes a block above 32 MB straight from the kernel and returns it when it is freed. A training step frees and asks
for the same few hundred large blocks again and again, so that each step pays a page fault for every 4 KiB of them; on
a virtual machine that costs more than some of the arithmetic (docs/log.md). ``mallopt`` turns it off from inside the
process, without a package or LD_PRELOAD.
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
"""Environment variables that choose an allocator or its settings; where one is set nothing is changed."""


def keep_freed_memory() -> str | None:
    """Tell glibc to keep what is freed; call it before the first large tensor.

    Returns:
        One line for the start table, or ``None`` where nothing was changed (not glibc, or the user chose).
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
