"""What is due after a step: logging, evaluation, saving. Clocks differ between ranks, so rank 0's clock decides for all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, final

from lmcore.config.durations import Duration, is_reached

if TYPE_CHECKING:
    from lmcore.run.anomalies import Action
    from lmcore.run.budget import Sizes

# Above the bits of lmcore.run.guard, because both are combined in one set of flags (lmcore.run.agreement).
LOG, EVALUATE, SAVE = 1 << 16, 1 << 17, 1 << 18
EPOCH = 1 << 19
"""An epoch has ended. For data where the ranks do not see this at the same step, rank 0 decides."""


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
    """``report.every``, ``evaluate.every`` and ``checkpoint.every`` against the step and rank 0's clock."""

    def __init__(
        self, sizes: Sizes, *, log: Iterable[Duration], evaluate: Iterable[Duration], save: Iterable[Duration]
    ) -> None:
        self._sizes = sizes
        self._every = {LOG: log, EVALUATE: evaluate, SAVE: save}
        self._last_seconds = dict.fromkeys(self._every, time.monotonic())

    def reached(self, step: int, every: Iterable[Duration]) -> bool:
        """Whether an interval is due after ``step`` updates. Intervals in minutes never are."""
        return is_reached(every, self._sizes.spans(step))

    def flags(self, step: int) -> int:
        """The bits that are due after ``step`` by the step number; the same on every rank."""
        flags = 0
        for bit, every in self._every.items():
            if self.reached(step, every):
                flags |= bit
                self._last_seconds[bit] = time.monotonic()
        return flags

    def clock_flags(self, *, saving: bool) -> int:
        """The bits that are due by this rank's clock. ``saving``: a save is still being written, so no other may start."""
        now, flags = time.monotonic(), 0
        for bit, every in self._every.items():
            minutes = (now - self._last_seconds[bit]) / 60
            due = any(one.unit == "minutes" and minutes >= one.value for one in every)
            if due and not (bit == SAVE and saving):
                flags |= bit
                self._last_seconds[bit] = now
        return flags
