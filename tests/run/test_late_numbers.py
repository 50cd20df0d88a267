"""Values that are read from the device a step late."""

from __future__ import annotations

import torch

from lmcore.run.late_numbers import LateNumbers


def test_late_numbers_are_the_device_values() -> None:
    numbers = torch.tensor([1.5, float("nan"), 3.0], dtype=torch.float64)
    first, second, third = LateNumbers(numbers).tolist()
    assert (first, third) == (1.5, 3.0)
    assert second != second
