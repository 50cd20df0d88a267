"""The process keeps what it frees on a CPU; numbers are read late without being changed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmcore import process as _memory
from lmcore.run.late_values import LateNumbers

FAULTS = """
import resource, sys
import numpy as np
from lmcore.process import keep_freed_memory
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


@pytest.mark.parametrize("name", _memory._CHOSEN_BY_HAND)
def test_a_choice_made_by_hand_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert _memory.keep_freed_memory() is None


def test_late_numbers_are_the_numbers() -> None:
    numbers = torch.tensor([1.5, float("nan"), 3.0], dtype=torch.float64)
    late = LateNumbers(numbers)
    first, second, third = late.tolist()
    assert (first, third) == (1.5, 3.0)
    assert second != second
