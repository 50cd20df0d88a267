"""Step -> its blocks and back, for a global batch that may change during the run.

Blocks are counted in the order of training: block 0 is the first of the run, and skipped positions are not counted. A
:class:`StepPlan` consists of a few stretches of steps with one global batch each. Look-ups use integer arithmetic in
time logarithmic in the number of stretches, so that nothing grows with the length of the run.

    >>> plan = plan_steps([Point(0, 4), Point(10, 8)])     # 4 blocks a step, from block 10 on 8
    >>> [(plan.blocks_before(step), plan.batch_of(step)) for step in range(5)]
    [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8)]
    >>> plan.step_of(12), plan.steps_to(12), plan.steps_to(13)
    (3, 3, 4)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from lmcore.errors import RequestError
from lmcore.humanize import amount, multiples_near


class Point(NamedTuple):
    """A change of the global batch to ``batch`` blocks, at the first step that begins at or after ``place``.

    ``place`` is in blocks, or in steps if ``in_steps``."""

    place: int | Fraction
    batch: int
    in_steps: bool = False


class Stretch(NamedTuple):
    """From ``step`` on, each step takes ``batch`` blocks; ``block`` blocks come before ``step``."""

    step: int
    block: int
    batch: int


@dataclass(frozen=True)
class StepPlan:
    """The blocks of every step, counted from 0.

    ``stretches`` are in ascending order of step and block; before the first one, its batch is assumed.
    """

    stretches: tuple[Stretch, ...]

    @staticmethod
    def constant(batch: int) -> StepPlan:
        """The same global batch in every step."""
        return StepPlan((Stretch(0, 0, batch),))

    @property
    def is_constant(self) -> bool:
        """Whether step s begins at block s times the global batch, for every s."""
        first = self.stretches[0]
        return len(self.stretches) == 1 and first.block == first.step * first.batch

    @cached_property
    def _steps(self) -> list[int]:
        return [stretch.step for stretch in self.stretches]

    @cached_property
    def _blocks(self) -> list[int]:
        return [stretch.block for stretch in self.stretches]

    def _at(self, starts: list[int], place: int) -> Stretch:
        return self.stretches[max(0, bisect_right(starts, place) - 1)]

    def batch_of(self, step: int) -> int:
        """The number of blocks of a step."""
        return self._at(self._steps, step).batch

    def blocks_before(self, step: int) -> int:
        """The number of blocks of all steps before this one."""
        stretch = self._at(self._steps, step)
        return max(0, stretch.block + (step - stretch.step) * stretch.batch)

    def step_of(self, block: int) -> int:
        """The step that contains this block."""
        stretch = self._at(self._blocks, block)
        return max(0, stretch.step + (block - stretch.block) // stretch.batch)

    def steps_to(self, blocks: int) -> int:
        """The number of steps after which at least ``blocks`` blocks have been used."""
        return self.step_of(blocks - 1) + 1 if blocks > 0 else 0


def plan_steps(points: Sequence[Point], *, step: int = 0, block: int = 0, check: bool = True) -> StepPlan:
    """The plan of a run that is at ``step`` and has seen ``block`` blocks.

    Planning again from a later state of the same plan gives the rest of that plan. If several points fall into one step,
    the last one counts.

    Args:
        points: in the order in which they are reached; the first is at 0.
        check: refuse points that are reached in another order.

    Raises:
        RequestError: a point is reached before the one that is listed before it.
    """
    stretches: list[Stretch] = []
    number, last = 0, len(points) - 1
    while True:
        while number < last:
            steps = _steps_until(points[number + 1], step, block, points[number].batch)
            if steps < 0 and check and stretches:
                raise RequestError(
                    f"train.global_batch_blocks: the change to {points[number + 1].batch} blocks comes before that to "
                    f"{points[number].batch} blocks in this run; name them in the order in which they come"
                )
            if steps > 0:
                break
            number += 1
        batch = points[number].batch
        stretches.append(Stretch(step, block, batch))
        if number == last:
            return StepPlan(tuple(stretches))
        step, block = step + steps, block + steps * batch


def _steps_until(point: Point, step: int, block: int, batch: int) -> int:
    """The number of steps of ``batch`` blocks until the point is reached."""
    return math.ceil(point.place - step if point.in_steps else (point.place - block) / Fraction(batch))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of ``number`` that is at most ``at_most``. ``at_most`` must be at least 1."""
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)


def share_of(batch: int, ranks: int, *, micro: int | None = None, whom: str = "") -> int:
    """The blocks of a global batch that each of ``ranks`` processes computes.

    Args:
        micro: micro-batch size that must divide the share; ``None``: not checked.
        whom: among what the batch is divided, for messages; default: the processes.

    Raises:
        RequestError: the batch cannot be divided equally.
    """
    whom = whom or amount(ranks, "process")
    if batch % ranks:
        raise RequestError(
            f"train.global_batch_blocks must be a multiple of the {whom} (got {batch}); try {multiples_near(batch, ranks)}, "
            "or another number of processes"
        )
    share = batch // ranks
    if micro is not None and share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise RequestError(
            f"train.global_batch_blocks {batch} over {whom} is {amount(share, 'block')} each, which must be a multiple of "
            f"train.micro_batch_blocks (got {micro}): try one of {', '.join(map(str, divisors))}, or leave out "
            "train.micro_batch_exact"
        )
    return share
