"""Which checkpoints of a run are kept when a newer one is committed. The rule is the same for a disk and a bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lmcore.checkpoint.manifest import step_name, step_of
from lmcore.checkpoint.reader import best_last

PREEMPTION_REASONS: Final = frozenset({"signal", "deadline", "stop file", "exception", "preemption"})
"""A checkpoint saved for one of these reasons is removed as soon as a newer one is committed."""


def kept_steps(
    known: Mapping[int, tuple[str, Mapping[str, Any]]],
    *,
    keep: int,
    keep_best: Mapping[str, Any] | None = None,
    keeps: Callable[[int], bool] = lambda step: False,
    measured_after: int = -1,
) -> tuple[set[int], int | None]:
    """The steps whose checkpoints are kept, and the step of the best one (``None`` without ``keep_best``).

    Args:
        known: step -> (reason, metrics) of every readable checkpoint.
        keep: how many of the newest to keep, not counting those saved for :data:`PREEMPTION_REASONS`.
        keep_best: ``{"k": int, "metric": str, "mode": "min"|"max"}``: also keep the k best.
        keeps: whether the checkpoint of a step is kept permanently.
        measured_after: metrics up to this step were measured on other data than later ones.

    Example:
        >>> kept_steps({5: ("interval", {}), 10: ("interval", {}), 15: ("signal", {})}, keep=1)
        ({10, 15}, None)
    """
    steps = sorted(known)
    regular = [step for step in steps if known[step][0] not in PREEMPTION_REASONS]
    stay = {*regular[-keep:], *steps[-1:]}
    best: list[int] = []
    if keep_best:
        values = ((Path(step_name(step)), known[step][1].get(keep_best["metric"])) for step in steps)
        best = [step_of(path) for path in best_last(values, keep_best.get("mode"), after=measured_after)]
        stay |= set(best[-int(keep_best["k"]) :])
    stay |= {step for step in steps if keeps(step)}
    return stay, best[-1] if best else None
