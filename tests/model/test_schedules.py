"""Learning-rate schedules are their closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lmcore.conventions import SCHEDULES
from lmcore.errors import RequestError
from lmcore.model.schedules import learning_rate

PEAK, WARMUP, TOTAL, DECAY, RATIO = 1e-3, 10, 110, 40, 0.1
CLOSED_FORMS = {
    "constant": lambda s: PEAK,
    "linear": lambda s: PEAK * (1 - 0.9 * (s - 10) / 100),
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
    assert all(r >= RATIO * PEAK * (1 - 1e-12) for r in rates[WARMUP:])
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= PEAK / WARMUP * (1 + 1e-9)
    if schedule in ("linear", "cosine", "wsd"):
        assert rates[TOTAL:] == pytest.approx([RATIO * PEAK] * (2 * TOTAL))


def test_no_warmup_and_wrong_requests() -> None:
    assert rate(0, "cosine", warmup_steps=0) == PEAK
    assert rate(0, "inverse_sqrt", warmup_steps=0) == PEAK
    with pytest.raises(RequestError, match="did you mean 'cosine'"):
        rate(0, "cosin")
    with pytest.raises(RequestError, match="do not fit into a run of 20 steps"):
        rate(0, "wsd", total_steps=20)
    with pytest.raises(RequestError, match=r"warmup of 10 steps do not fit"):
        rate(0, "linear", total_steps=9)
