"""Learning-rate schedules are their closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lmcore.conventions import SCHEDULES
from lmcore.errors import RequestError
from lmcore.model.schedules import learning_rate, on_curve

PEAK, WARMUP, TOTAL, DECAY, RATIO = 1e-3, 10, 110, 40, 0.1
CLOSED_FORMS = {
    "constant": lambda s: PEAK,
    "linear": lambda s: PEAK * (1 - 0.9 * (s - 10) / 100),
    "linear_to_zero": lambda s: PEAK * (1 - (s - 10) / 100),
    "cosine": lambda s: PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 10) / 100))),
    "wsd": lambda s: PEAK if s <= 70 else PEAK * (1 - 0.9 * (s - 70) / 40),
    "inverse_sqrt": lambda s: PEAK * max(0.1, math.sqrt(10 / (s + 1))),
}


def rate(step: int, schedule: str, **changes: Any) -> float:
    options: Any = {"warmup_steps": WARMUP, "total_steps": TOTAL, "decay_steps": DECAY, "min_ratio": RATIO}
    return learning_rate(step, schedule=schedule, peak=PEAK, **(options | changes))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_their_closed_forms(schedule: str) -> None:
    assert set(CLOSED_FORMS) == set(SCHEDULES)
    for step in range(WARMUP):
        assert rate(step, schedule) == pytest.approx(PEAK * (step + 1) / WARMUP, rel=1e-12)
    for step in range(WARMUP, TOTAL):
        assert rate(step, schedule) == pytest.approx(CLOSED_FORMS[schedule](step), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_stay_between_floor_and_peak_and_never_jump(schedule: str) -> None:
    rates = [rate(step, schedule) for step in range(3 * TOTAL)]
    assert max(rates) == pytest.approx(PEAK)
    assert all(r <= PEAK * (1 + 1e-12) for r in rates)
    floor = 0.0 if schedule == "linear_to_zero" else RATIO * PEAK
    assert all(r >= floor * (1 - 1e-12) for r in rates[WARMUP:])
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= PEAK / WARMUP * (1 + 1e-9)
    if schedule in ("linear", "linear_to_zero", "cosine", "wsd"):
        assert rates[TOTAL:] == pytest.approx([floor] * (2 * TOTAL))


def test_no_warmup_and_invalid_schedules() -> None:
    assert rate(0, "cosine", warmup_steps=0) == PEAK
    assert rate(0, "inverse_sqrt", warmup_steps=0) == PEAK
    with pytest.raises(RequestError, match="did you mean 'cosine'"):
        rate(0, "cosin")
    with pytest.raises(RequestError, match="do not fit into a run of 20 steps"):
        rate(0, "wsd", total_steps=20)
    with pytest.raises(RequestError, match=r"warmup of 10 steps do not fit"):
        rate(0, "linear", total_steps=9)
    with pytest.raises(RequestError, match=r"warmup of 10 blocks do not fit into a run of 9 blocks"):
        rate(0, "linear", total_steps=9, unit="blocks")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_in_blocks_are_those_in_steps(schedule: str) -> None:
    """Eight blocks a step, counted in blocks: the same rates but for rounding."""
    options: Any = {"schedule": schedule, "peak": PEAK, "min_ratio": RATIO}
    for step in range(TOTAL):
        in_blocks = learning_rate(
            8 * step,
            warmup_steps=8 * WARMUP,
            total_steps=8 * TOTAL,
            decay_steps=8 * DECAY,
            step_length=8,
            **options,
        )
        assert in_blocks == pytest.approx(rate(step, schedule), rel=1e-12)


def test_curves_are_straight_or_half_a_cosine_between_their_points() -> None:
    places, values = [0, 50, 100], [0.0, 1.0, 0.0]
    assert [on_curve(at, places, values) for at in (-5, 0, 25, 50, 75, 100, 900)] == [0, 0, 0.5, 1, 0.5, 0, 0]
    for at in range(101):
        wave = (1 + math.cos(math.pi * at / 100)) / 2
        assert on_curve(at, [0, 100], [3.0, 1.0], shape="cosine") == pytest.approx(1 + 2 * wave)
