"""Decides by a metric of the evaluations whether a run stops before the end of its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmcore.humanize import amount


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Decides from the values of one metric, oldest first. The decision is a pure function of these values.

    They are saved in the checkpoint, so that a resumed run continues to count.

    Args:
        metric: name of the logged value, for the message.
        patience: stop after this many evaluations in a row without an improvement by more than ``threshold``; 0 and
            ``None``: never stop for this reason.
        mode: ``min`` where lower is better, ``max`` where higher is.
        target: stop when the metric is at least this good.
        divergence: stop when the metric is worse than this.
    """

    metric: str = "loss"
    patience: int | None = None
    threshold: float = 0.0
    mode: str = "min"
    target: float | None = None
    divergence: float | None = None

    def reason(self, values: list[float]) -> str | None:
        """The reason to stop now, or ``None``."""
        if not values:
            return None
        sign = 1.0 if self.mode == "min" else -1.0
        last, costs = values[-1], [sign * value for value in values]
        if self.target is not None and costs[-1] <= sign * self.target:
            return f"{self.metric} {last:.4f} has reached the target {self.target}"
        if self.divergence is not None and not costs[-1] <= sign * self.divergence:  # NaN diverges too
            return f"{self.metric} {last:.4f} is worse than the divergence bound {self.divergence}"
        if self.patience:
            best, waited = math.inf, 0
            for cost in costs:
                improved = cost < best - self.threshold if math.isfinite(best) else cost < best
                best, waited = (cost, 0) if improved else (best, waited + 1)
            if waited >= self.patience:
                return (
                    f"{self.metric} has not improved by more than {self.threshold} in {amount(waited, 'evaluation')} "
                    f"(best {sign * best:.4f}, last {last:.4f})"
                )
        return None
