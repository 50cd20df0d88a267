"""When an interval of a run is due whose steps all have the same number of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from lmcore.config.durations import Duration, is_reached


def is_due(
    step: int,
    every: Iterable[Duration],
    *,
    tokens_per_step: int | None = None,
    steps_per_epoch: float | Fraction | None = None,
    total_steps: int | None = None,
) -> bool:
    """Whether something with the interval ``every`` is due after ``step`` updates (1 = after the first).

    :func:`is_reached` of a run whose steps all have the same number of tokens.
    """
    steps = (step - 1, step)
    spans: dict[str, Any] = {"steps": steps}
    if tokens_per_step:
        spans["tokens"] = tuple(one * tokens_per_step for one in steps)
    if steps_per_epoch:
        # repr of a float is the decimal that was meant; a Fraction is exact already.
        spans["epochs"] = tuple(one / Fraction(str(steps_per_epoch)) for one in steps)
    if total_steps:
        spans["percent"] = tuple(Fraction(100 * one, total_steps) for one in steps)
    return is_reached(every, spans)
