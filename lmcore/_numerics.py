"""What to do about a loss or gradient that is not finite, or that jumps; the numerical half of ``guard.py``.

Comes in: one report per step, in order (loss, gradient norm, whether the update was applied, positions).
Goes out: an :class:`Action`. What always holds: a decision is a pure function of the policy and the reports
so far, so every rank that sees the same reports decides the same, and a run that was killed decides as the
undisturbed one; the history is JSON and is saved with the checkpoint.

Non-finite: the device has not applied that update already; it is reported as ``skip``. More than
``max_skips`` of them within the window: ``rewind`` to the last checkpoint before the first of them, and skip
their positions. More than ``max_rewinds`` rewinds within ten windows: ``stop``.

Spike: the loss lies more than ``sigma`` robust standard deviations above the median of the window,

    limit = median + sigma * max(1.4826 * median(|x - median|), 0.001 * |median|)

(1.4826 makes the median absolute deviation of a normal distribution its standard deviation; a median does
not move when the outliers themselves are in the window). The second term keeps a flat stretch from calling
noise a spike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final, final

import torch
from torch import Tensor

SPIKE_POLICIES: Final = ("off", "warn", "skip", "rewind")


@final
@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers of the policy.

    ``max_skips`` updates that were not applied are borne within ``window`` steps, then ``max_rewinds``
    rewinds within ten windows. ``spike`` is off, warn, skip (the engine's gate is given a limit for the
    gradient norm) or rewind; ``sigma`` is how far above the median a spike begins.
    """

    max_skips: int = 5
    max_rewinds: int = 3
    spike: str = "warn"
    window: int = 128
    sigma: float = 6.0


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of one step: numbers that are equal on all ranks; ``positions`` are [first, stop)."""

    step: int
    loss: float
    norm: float
    applied: bool
    positions: tuple[int, int]


@final
@dataclass(frozen=True, kw_only=True)
class Action:
    """What to do.

    ``kind`` is go, warn, skip (an update was not applied; go on), rewind or stop. For a rewind: take the
    newest checkpoint with a step below ``before_step`` and skip the ``positions``, ranges [first, stop).
    """

    kind: str = "go"
    reason: str = ""
    positions: tuple[tuple[int, int], ...] = ()
    before_step: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class History:
    """What the decisions rest on. ``losses`` and ``norms`` are (step, value) of applied, finite steps;
    ``skipped`` (step, first, stop) of updates that were not applied; ``rewinds`` the steps at which a rewind
    was decided.
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
    """Where a spike begins; infinity while the window is less than a quarter full (at least 8 values)."""
    if len(values) < max(8, window // 4):
        return math.inf
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return middle + sigma * max(spread, 1e-3 * abs(middle))


def norm_limit(history: History, policy: Policy, step: int) -> float:
    """Above this gradient norm the update of ``step`` shall not be applied (policy ``skip``); else infinity.

    Rests on steps up to ``step - 2`` only: a report may come one step late, and whether it did must not
    matter.
    """
    if policy.spike != "skip":
        return math.inf
    return limit([x for at, x in history.norms if at <= step - 2], policy.sigma, window=policy.window)


def decide(history: History, policy: Policy, report: Report) -> tuple[History, Action]:
    """The history after one more report, and what to do now. Pure."""
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
        return _rewind(history, policy, step, f"{reason}, the {len(recent)}th time", ranges, recent[0][0])

    threshold = limit([x for _, x in history.losses], policy.sigma, window=policy.window)
    history = replace(
        history,
        losses=_appended(history.losses, step, report.loss, policy.window),
        norms=_appended(history.norms, step, report.norm, policy.window),
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
        reason = f"{reason}; {policy.max_rewinds} rewinds have not helped"
        return history, Action(kind="stop", reason=reason, positions=positions)
    return history, Action(kind="rewind", reason=reason, positions=positions, before_step=first_bad_step)


def _appended(
    values: tuple[tuple[int, float], ...], step: int, value: float, window: int
) -> tuple[tuple[int, float], ...]:
    return (*values, (step, value))[-window:]


# ---- do all ranks hold the same weights? -------------------------------------------------------------------


def parameter_hash(named: Iterable[tuple[str, Tensor]]) -> int:
    """A 63-bit hash over every bit of the given tensors, summed on their device; one number comes to the
    host.

    Equal weights give equal hashes on every rank and device; any single flipped bit changes it, since each
    word enters once plainly and once times its place. Only for weights that every rank holds in full (not
    sharded ones).
    """
    total: Tensor | None = None
    for number, (_, tensor) in enumerate(named, 1):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = raw[: len(raw) // 4 * 4].view(torch.int32)
        for start in range(0, len(words), 1 << 22):  # pieces bound the memory of the widening to 64 bits
            piece = words[start : start + (1 << 22)].long()
            place = torch.arange(start + 1, start + 1 + len(piece), device=piece.device)
            part = (piece * (place * 2654435761 % 2147483647 * 2 + 1)).sum() * (2 * number + 1) + piece.sum()
            total = part if total is None else total * 31 + part.to(total.device)
        if tail := len(raw) % 4:
            part = raw[-tail:].long().sum() * (2 * number + 1)
            total = part if total is None else total * 31 + part.to(total.device)
    return 0 if total is None else int(total.item()) & (2**63 - 1)


def odd_ranks(hashes: Sequence[int]) -> list[int]:
    """The ranks whose hash is not that of the majority (of the lowest rank, where there is none)."""
    common = max(hashes, key=lambda value: (hashes.count(value), -hashes.index(value)))
    return [rank for rank, value in enumerate(hashes) if value != common]
