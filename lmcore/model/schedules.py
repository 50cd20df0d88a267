"""Schedules: pure functions of the position in the run, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from lmcore.conventions import SCHEDULES
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int = 0,
    min_ratio: float = 0.1,
    step_length: int = 1,
    unit: str = "steps",
) -> float:
    """The learning rate of update ``step``, counted from 0.

    If the global batch changes during the run, all lengths are in blocks instead of steps: ``step`` is the number of
    blocks before the update, and ``step_length`` the number of blocks of the update itself. ``unit`` is used in error
    messages.

    The warm-up is linear, ``peak * (step + step_length) / warmup_steps``: the rate of the first update is not zero, and
    the last update of the warm-up is at the peak. Then, with ``t`` from 0 to 1 over the rest of the run and the floor
    ``f = min_ratio * peak``:

    - ``constant``: peak
    - ``linear``: ``peak - (peak - f) * t``; to zero with ``min_ratio=0``
    - ``linear_to_zero``: the same with f = 0, whatever ``min_ratio`` is
    - ``cosine``: ``f + (peak - f) * (1 + cos(pi t)) / 2`` (Loshchilov & Hutter 2017)
    - ``wsd``: peak, then linear to the floor over the last ``decay_steps`` (Hu et al. 2024, arXiv 2404.06395)
    - ``inverse_sqrt``: ``max(f, peak * sqrt(max(warmup_steps, step_length) / (step + step_length)))`` (Vaswani et al. 2017)

    After the last step the rate keeps its last value; ``inverse_sqrt`` goes on falling to its floor.

    Example::

        learning_rate(700, schedule="wsd", peak=6e-4, warmup_steps=20, total_steps=1_000, decay_steps=200)  # 6e-4

    Raises:
        RequestError: an unknown schedule, or a warm-up (and decay) longer than the run.
    """
    check_schedule(
        schedule, warmup_steps=warmup_steps, total_steps=total_steps, decay_steps=decay_steps, unit=unit
    )
    if step < warmup_steps:
        return peak * min(step + step_length, warmup_steps) / warmup_steps
    floor = 0.0 if schedule == "linear_to_zero" else min_ratio * peak
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule in ("linear", "linear_to_zero"):
        return peak - (peak - floor) * t
    if schedule == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
    if schedule == "wsd":
        done = (step - (total_steps - decay_steps)) / max(1, decay_steps)
        return peak - (peak - floor) * min(1.0, max(0.0, done))
    if schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup_steps, step_length) / (step + step_length)))
    return peak


MUON_MOMENTUM_START = 0.85
"""Where the warm-up of muon's momentum starts (from modded-nanogpt, where the warm-up gave 0.013 of loss at 124M)."""


def momentum(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """The momentum of update ``step``: linear from ``start`` to ``end`` over ``warmup_steps``, then ``end``."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps


def on_curve(
    place: float, places: Sequence[float], values: Sequence[float], *, shape: str = "linear"
) -> float:
    """The value at ``place`` of a curve through the points (``places[i]``, ``values[i]``); ``places`` is ascending.

    Between two points it interpolates linearly or, with ``shape="cosine"``, along half a cosine wave. Outside of all
    points it is the value of the nearest one.

    Example::

        on_curve(75, [0, 50, 100], [0.0, 1.0, 0.0])  # 0.5
    """
    after = bisect_right(places, place)
    if after in (0, len(places)):
        return values[max(0, after - 1)]
    start, stop = places[after - 1], places[after]
    t = (place - start) / (stop - start)
    if shape == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    return values[after - 1] + (values[after] - values[after - 1]) * t


def check_schedule(
    schedule: str, *, warmup_steps: int, total_steps: int, decay_steps: int = 0, unit: str = "steps"
) -> None:
    """Raise ``RequestError`` if the schedule is unknown, or its warm-up and decay are longer than the run."""
    if schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        raise RequestError(f"unknown optim.schedule {schedule!r}; choose from {', '.join(SCHEDULES)}{hint}")
    decay = decay_steps if schedule == "wsd" else 0
    if warmup_steps + decay > total_steps:
        parts = f"{warmup_steps} {unit}" + (f" and optim.decay of {decay}" if decay else "")
        raise RequestError(
            f"optim.warmup of {parts} do not fit into a run of {total_steps} {unit}: shorten them, or give a "
            "longer train.duration"
        )
