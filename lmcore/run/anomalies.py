"""Losses and gradients that are not finite, or that jump: what to do about them.

:func:`decide` is a pure function: from the history so far and one report it computes the new history and an :class:`Action`.
Ranks that see the same reports make the same decisions. The history is JSON and is saved with the checkpoint, so that a
resumed run decides like an uninterrupted one.

Not finite: the device has not applied the update, and the action is ``skip``. After more than ``max_skips`` of them within
``window`` steps it is ``rewind``: go back to the last checkpoint before the first of them, and skip their positions. After
more than ``max_rewinds`` rewinds within ten windows it is ``stop``.

Spike: the loss is more than ``sigma`` robust standard deviations above the median of the window,

    limit = median + sigma * max(1.4826 * median(|x - median|), 0.001 * |median|)

1.4826 turns the median absolute deviation of a normal distribution into its standard deviation (Rousseeuw and Croux 1993,
section 1), and outliers in the window hardly move a median. The second term keeps noise from counting as a spike where the
losses are almost constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Policy:
    """The options of :func:`decide`.

    Attributes:
        max_skips: updates that may be skipped within ``window`` steps before a rewind.
        max_rewinds: rewinds within ten windows before the run stops.
        spike: off, warn, skip (updates above a limit of the gradient norm are not applied) or rewind.
        window: length of the window in steps.
        sigma: a loss more than this many robust standard deviations above the median is a spike.
    """

    max_skips: int = 10
    max_rewinds: int = 3
    spike: str = "warn"
    window: int = 200
    sigma: float = 6.0


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers of one step, which are the same on all ranks; ``positions`` are [first, stop)."""

    step: int
    loss: float
    norm: float
    applied: bool
    positions: tuple[int, int]


@final
@dataclass(frozen=True, kw_only=True)
class Action:
    """What to do.

    ``kind`` is go, warn, skip (an update was not applied; continue), rewind or stop. For a rewind: load the newest checkpoint
    with a step below ``before_step`` and skip the ``positions``, ranges [first, stop). If there is no checkpoint that old,
    and ``or_before`` is given because the updates were not applied, the newest below ``or_before`` is as good.
    """

    kind: str = "go"
    reason: str = ""
    positions: tuple[tuple[int, int], ...] = ()
    before_step: int | None = None
    or_before: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class History:
    """What the decisions depend on.

    ``losses`` and ``norms`` hold (step, value) of finite steps whose update was applied; ``skipped`` holds
    (step, first, stop) of updates that were not applied; ``rewinds`` holds the steps at which a rewind was decided.
    """

    losses: tuple[tuple[int, float], ...] = ()
    norms: tuple[tuple[int, float], ...] = ()
    skipped: tuple[tuple[int, int, int], ...] = ()
    rewinds: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": [list(item) for item in self.losses],
            "norms": [list(item) for item in self.norms],
            "skipped": [list(item) for item in self.skipped],
            "rewinds": list(self.rewinds),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> History:
        return History(
            losses=tuple((int(step), float(x)) for step, x in value.get("losses", ())),
            norms=tuple((int(step), float(x)) for step, x in value.get("norms", ())),
            skipped=tuple((int(a), int(b), int(c)) for a, b, c in value.get("skipped", ())),
            rewinds=tuple(int(step) for step in value.get("rewinds", ())),
        )


def limit(values: Sequence[float], sigma: float, *, window: int) -> float:
    """The threshold of a spike; infinity while the window is less than half full, because few values have no usable spread."""
    if len(values) < max(8, window // 2):
        return math.inf
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return middle + sigma * max(spread, 1e-3 * abs(middle))


def norm_limit(history: History, policy: Policy, step: int) -> float:
    """The gradient norm above which the update of ``step`` is not applied (policy ``skip``); infinity otherwise.

    Uses steps up to ``step - 2`` only: a report may arrive one step late, and whether it did must not matter.
    """
    if policy.spike != "skip":
        return math.inf
    known = [x for at, x in history.norms if at <= step - 2][-policy.window :]
    return limit(known, policy.sigma, window=policy.window)


def decide(history: History, policy: Policy, report: Report) -> tuple[History, Action]:
    """The history after one more report, and what to do now. A pure function."""
    step = report.step
    first, stop = report.positions
    where = f"step {step}, positions {first}..{stop - 1}"
    numbers = f"loss {report.loss:.6g}, gradient norm {report.norm:.6g}"
    healthy = math.isfinite(report.loss) and math.isfinite(report.norm)
    recent = [item for item in history.skipped if item[0] > step - policy.window]

    if not (report.applied and healthy):
        recent.append((step, first, stop))
        history = replace(history, skipped=tuple(recent))
        cause = "not finite" if not healthy else "above the spike limit"
        reason = f"{where}: {numbers}: {cause}; the update was not applied"
        if len(recent) <= policy.max_skips:
            count = f"{len(recent)} of at most {policy.max_skips} in {policy.window} steps"
            return history, Action(kind="skip", reason=f"{reason} ({count})", positions=((first, stop),))
        ranges = tuple((a, b) for _, a, b in recent)
        history, action = _rewind(
            history, policy, step, f"{reason} ({len(recent)} in {policy.window} steps)", ranges, recent[0][0]
        )
        return history, replace(action, or_before=step) if action.kind == "rewind" else action

    threshold = limit([x for _, x in history.losses], policy.sigma, window=policy.window)
    history = replace(
        history,
        losses=_appended(history.losses, step, report.loss, policy.window),
        norms=_appended(history.norms, step, report.norm, policy.window + 2),  # see norm_limit
        skipped=tuple(recent),
    )
    if policy.spike == "off" or report.loss <= threshold:
        return history, Action()
    reason = f"{where}: {numbers}: the loss jumped above {threshold:.6g}"
    if policy.spike == "rewind":
        return _rewind(history, policy, step, reason, ((first, stop),), step)
    return history, Action(kind="warn", reason=reason, positions=((first, stop),))


def _rewind(
    history: History,
    policy: Policy,
    step: int,
    reason: str,
    positions: tuple[tuple[int, int], ...],
    first_bad_step: int,
) -> tuple[History, Action]:
    rewinds = (*(at for at in history.rewinds if at > step - 10 * policy.window), step)
    history = replace(history, rewinds=rewinds)
    if len(rewinds) > policy.max_rewinds:
        reason = f"{reason}; {policy.max_rewinds} rewinds did not help"
        return history, Action(kind="stop", reason=reason, positions=positions)
    return history, Action(kind="rewind", reason=reason, positions=positions, before_step=first_bad_step)


def _appended(
    values: tuple[tuple[int, float], ...], step: int, value: float, window: int
) -> tuple[tuple[int, float], ...]:
    return (*values, (step, value))[-window:]
