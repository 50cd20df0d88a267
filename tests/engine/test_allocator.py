"""A training process on a CPU keeps the memory that it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmcore.engine import allocator

FAULTS = """
import resource, sys
import numpy as np
from lmcore.engine.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(5):
        np.ones(8_000_000)      # 64 MB, freed at once; glibc keeps up to 32 MB by itself
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    made = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=clean, capture_output=True, text=True, check=True
    )
    return int(made.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, returned = faults("keep"), faults("return")
    assert kept < 100
    assert returned > 100 * max(kept, 1)  # 64 MB are 15,625 pages, five times


@pytest.mark.parametrize("name", allocator.CHOSEN_BY_USER)
def test_allocator_set_by_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert allocator.keep_freed_memory() is None
