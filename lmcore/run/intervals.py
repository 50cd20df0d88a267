"""What is due after a step: logging, evaluation, saving. Clocks differ between ranks, so the ranks combine the bits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, final

from lmcore.config.durations import Duration, is_due

if TYPE_CHECKING:
    from lmcore.run.anomalies import Action
    from lmcore.run.budget import Sizes

# Above the bits of lmcore.run.guard, with which the ranks combine them in one number.
LOG, EVALUATE, SAVE = 1 << 16, 1 << 17, 1 << 18


class Due(NamedTuple):
    """What to do after a step; the same on every rank. At most one of ``rewind`` and the others.

    Attributes:
        save: the reason that the checkpoint will carry, or ``None``.
        evaluate: whether to evaluate.
        rewind: the fault to go back before, or ``None``.
    """

    save: str | None = None
    evaluate: bool = False
    rewind: Action | None = None


@final
class Intervals:
    """``report.every``, ``evaluate.every`` and ``checkpoint.every`` against the step and this rank's clock."""

    def __init__(
        self, sizes: Sizes, *, log: Iterable[Duration], evaluate: Iterable[Duration], save: Iterable[Duration]
    ) -> None:
        self._sizes = sizes
        self._every = {LOG: log, EVALUATE: evaluate, SAVE: save}
        self._last_seconds = dict.fromkeys(self._every, time.monotonic())

    def reached(self, step: int, every: Iterable[Duration], minutes_since_last: float = 0.0) -> bool:
        """Whether an interval is due after ``step`` updates."""
        return is_due(
            step,
            every,
            tokens_per_step=self._sizes.tokens_per_step,
            steps_per_epoch=self._sizes.steps_per_epoch,
            total_steps=self._sizes.total_steps,
            minutes_since_last=minutes_since_last,
        )

    def flags(self, step: int, *, saving: bool) -> int:
        """The bits due after ``step``. ``saving``: a save is still being written, so the clock may not start another."""
        now, flags = time.monotonic(), 0
        for bit, every in self._every.items():
            minutes = 0.0 if bit == SAVE and saving else (now - self._last_seconds[bit]) / 60
            if self.reached(step, every, minutes):
                flags |= bit
                self._last_seconds[bit] = now
        return flags
