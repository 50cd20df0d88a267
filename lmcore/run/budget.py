"""Global batch, micro-batch, gradient accumulation and steps of a run, with the arithmetic shown.

The global batch and the number of steps do not depend on the number of ranks. Nothing is rounded silently. If the global
batch changes during the run, positions are counted in blocks that were trained on instead of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

from lmcore.config.curves import START, Curve
from lmcore.config.durations import Duration, Spans
from lmcore.config.schema import RunConfig, batch_points, ranges
from lmcore.data.cursor import Skips, count_positions, merge_skips
from lmcore.data.steps import Point, StepPlan, largest_divisor, plan_steps, share_of
from lmcore.errors import RequestError
from lmcore.humanize import amount
from lmcore.model.schedules import on_curve

FEW_STEPS = 10
"""Runs with fewer steps than this get a warning, because a schedule with warmup needs more."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a run and of its steps.

    Attributes:
        steps: the number of blocks of every step.
        world_size: the number of processes among which a step is divided.
        micro_batch_blocks: upper bound for a forward pass; a step uses the largest divisor of its share up to this.
        epoch_blocks: ``None`` if the length is known only at the end of the data.
        total_blocks: of all steps, including the blocks that only fill up the last step of a constant batch.
        run_blocks: the blocks that are trained on.
        end_position: ``None`` unless the duration is a number of epochs.
    """

    steps: StepPlan
    world_size: int
    micro_batch_blocks: int
    block_size: int
    epoch_blocks: int | None
    total_steps: int
    total_blocks: int
    run_blocks: int
    end_position: int | None

    @property
    def global_batch_blocks(self) -> int:
        """The blocks of the first step (of this plan)."""
        return self.steps.stretches[0].batch

    @property
    def accumulation(self) -> int:
        """Micro-batches of a process in the first step."""
        return self.accumulation_of(self.global_batch_blocks)

    def accumulation_of(self, batch: int) -> int:
        """Micro-batches of a process in a step of ``batch`` blocks."""
        share = batch // self.world_size
        return share // largest_divisor(share, self.micro_batch_blocks)

    @property
    def tokens_per_step(self) -> int:
        """Labels of a full first step."""
        return self.global_batch_blocks * self.block_size

    @property
    def run_tokens(self) -> int:
        """Labels of the whole run."""
        return self.run_blocks * self.block_size

    # ---- positions

    def done(self, step: int) -> int:
        """The progress after ``step`` steps in the unit of :meth:`length`: steps if the global batch is constant, otherwise
        blocks."""
        return step if self.steps.is_constant else self.steps.blocks_before(step)

    @property
    def total(self) -> int:
        """The length of the run in the unit of :meth:`done`."""
        return self.total_steps if self.steps.is_constant else self.total_blocks

    def length(self, duration: Duration) -> int:
        """A duration in the unit of :meth:`done`, rounded up; 0 for never."""
        return self.steps_of(duration) if self.steps.is_constant else math.ceil(self._blocks(duration))

    def place(self, duration: Duration) -> Fraction:
        """Like :meth:`length`, but not rounded."""
        blocks = self._blocks(duration)
        return blocks / self.global_batch_blocks if self.steps.is_constant else blocks

    def steps_of(self, duration: Duration) -> int:
        """A duration from the start of the run in whole steps; 0 for never."""
        return self.steps.steps_to(math.ceil(self._blocks(duration)))

    def _blocks(self, duration: Duration) -> Fraction:
        return _blocks_of(
            duration,
            block_size=self.block_size,
            epoch_blocks=self.epoch_blocks,
            total_blocks=self.total_blocks,
            blocks_before=self.steps.blocks_before,
        )

    def spans(self, step: int) -> Spans:
        """The progress before and after update ``step`` (1 = the first) in each unit, for
        :func:`lmcore.config.durations.is_reached`."""
        blocks = [self.steps.blocks_before(one) for one in (step - 1, step)]
        spans: dict[str, tuple[int | Fraction, int | Fraction]] = {
            "steps": (step - 1, step),
            "tokens": (blocks[0] * self.block_size, blocks[1] * self.block_size),
            "percent": (
                Fraction(100 * blocks[0], self.total_blocks),
                Fraction(100 * blocks[1], self.total_blocks),
            ),
        }
        if self.epoch_blocks:
            spans["epochs"] = Fraction(blocks[0], self.epoch_blocks), Fraction(blocks[1], self.epoch_blocks)
        return spans

    def progress(self, step: int) -> tuple[float, float]:
        """The completed fraction of the run after ``step`` steps, and how many steps of the current batch size are left."""
        left = self.total - self.done(step)
        batch = 1 if self.steps.is_constant else self.steps.batch_of(step)
        return min(1.0, self.done(step) / self.total), max(0.0, left / batch)

    def curve(self, value: float | Curve) -> Callable[[int], float]:
        """Steps done -> the value for the next step.

        The curve is evaluated in the middle of the step's blocks, so that neither a rise from zero nor a decay to zero
        wastes a step.
        """
        if not isinstance(value, Curve):
            return lambda step: value
        places = [float(self.place(place)) for place, _ in value.points]
        for first, second in pairwise(range(len(places))):
            if places[second] <= places[first]:
                raise RequestError(
                    f"{value}: {value.points[second][0]} comes no later than {value.points[first][0]} in this run"
                )
        at = partial(on_curve, places=places, values=value.values, shape=value.shape)
        return lambda step: at((self.done(step) + self.done(step + 1)) / 2)

    # ---- what is shown

    def rows(self, config: RunConfig) -> list[tuple[str, str]]:
        """The rows of the start table that show the arithmetic."""
        known = self.epoch_blocks
        epoch = (
            f"blocks of {self.block_size:,} tokens; their number is not known beforehand"
            if known is None
            else f"{amount(known, 'block')} of {self.block_size:,} tokens"
        )
        if config.data.factory is not None:
            items = "items" if known is None else amount(known, "item")
            epoch = f"{items} of data.factory, each counted as a block of {self.block_size:,} tokens (data.block_size)"
        tokens = self.run_tokens
        epochs = "" if known is None else f" = {tokens / self.block_size / known:.2f} epochs"
        given = "" if config.train.duration.unit == "steps" else f"{config.train.duration} = "
        first, *later = self.steps.stretches
        rows = [
            ("epoch", epoch),
            (
                "global batch",
                f"{self._cut(first.batch)} (processes x accumulation x "
                f"micro-batch) = {amount(self.global_batch_blocks, 'block')} = {self.tokens_per_step:,} tokens",
            ),
            (
                "budget",
                f"{given}{amount(self.total_steps, 'step')} = {tokens:,} tokens{epochs}",
            ),
        ]
        if later:
            rows.insert(2, ("batch changes", self.changes()))
        return rows

    def changes(self) -> str:
        """The changes of the global batch in words; empty if it is constant."""
        return "; ".join(
            f"from step {stretch.step + 1:,} (position {stretch.block:,}) {amount(stretch.batch, 'block')} = "
            f"{self._cut(stretch.batch)}"
            for stretch in self.steps.stretches[1:]
            if stretch.step < self.total_steps
        )

    def _cut(self, batch: int) -> str:
        accumulation = self.accumulation_of(batch)
        return f"{self.world_size} x {accumulation} x {batch // self.world_size // accumulation}"

    def warnings(self, config: RunConfig, *, validated: bool, step: int = 0) -> list[str]:
        """Warnings about valid options that make the run useless, each with what to change.

        Args:
            validated: whether there is a validation set.
            step: the step that the run has reached.
        """
        if step >= self.total_steps:
            return [
                f"nothing is left to train: the run is at step {step:,}, and train.duration {config.train.duration} ends at "
                f"step {self.total_steps:,}. It is evaluated and exported once more; to train on give a longer --train.duration"
            ]
        found = []
        if self.total_steps < FEW_STEPS and not config.fast_dev_run:
            has = "" if self.epoch_blocks is None else f" of {self.epoch_blocks:,} in the text"
            smaller = max(1, self.global_batch_blocks * self.total_steps // 100)
            remedy = "train longer with --train.duration"
            if config.train.duration.unit != "steps" and smaller < self.global_batch_blocks:
                remedy = f"reduce --train.global_batch_blocks (to {smaller}, for example), or {remedy}"
            found.append(
                f"only {amount(self.total_steps, 'step')}: hardly anything is learned. A step takes "
                f"{amount(self.global_batch_blocks, 'block')}{has}: {remedy}"
            )
        if not validated and not config.fast_dev_run:
            remedy = "Name some with --data.valid FILE, or hold out a part of the training text with --data.valid_fraction"
            if config.data.mode == "stream":
                remedy = "Name some with --data.valid FILE: data.mode stream holds nothing out"
            if config.data.factory is not None:
                remedy = "Let data.factory return valid beside train"
            found.append(f"no validation text: nothing will tell learning from memorizing. {remedy}")
        return found


def horizon(
    config: RunConfig,
    *,
    block_size: int,
    epoch_blocks: int | None,
    world_size: int,
    micro_batch_blocks: int | None = None,
    step: int = 0,
    blocks: int = 0,
    position: int | None = None,
    skips: Skips = (),
    planned_from: tuple[int, int] = (0, 0),
) -> Sizes:
    """Global batch, accumulation and steps, from the configuration, the data and the number of ranks.

    Args:
        epoch_blocks: ``None`` if the length is known only at the end of the data.
        micro_batch_blocks: the resolved value of ``auto`` (saved in the checkpoint).
        step, blocks: steps done so far and the blocks trained on in them, for a resumed run.
        position, skips: of the resumed run's cursor (default: nothing was skipped); the skips of ``data.skip_positions`` are
            added.
        planned_from: the step and block from which the resumed run's plan was made (saved in the checkpoint). If that plan
            does not lead to ``step`` and ``blocks``, because the configuration was changed, a plan from there is made.

    Raises:
        RequestError: a global batch cannot be divided, or the duration is shorter than a block; the message has the numbers.
    """
    points = batch_points(config, block_size)
    asked = config.train.micro_batch_blocks
    limit = asked if isinstance(asked, int) else micro_batch_blocks
    exact = limit if config.train.micro_batch_exact else None
    shares = [share_of(batch, world_size, micro=exact) for _, batch in points]
    # The micro-batch is only an upper bound: it affects memory, not the result.
    micro = max(largest_share(share, block_size, at_most=limit) for share in shares)
    duration = config.train.duration
    if duration.unit == "epochs" and epoch_blocks is None:
        raise RequestError(
            f"train.duration {duration}: how long an epoch is, only a token store or a dataset with a length knows "
            f"beforehand; give steps or tokens"
        )
    end = end_blocks = None
    if duration.unit == "epochs" and epoch_blocks is not None:
        # N epochs end with their last block; the last step is filled up with blocks without labels.
        end = int(duration.exact() * epoch_blocks)
        skips = merge_skips(skips, ranges(config.data.skip_positions, "data.skip_positions"))
        end_blocks = blocks + max(0, count_positions(blocks if position is None else position, end, skips))
        if end < 1:
            raise RequestError(
                f"train.duration {duration} is less than one block: an epoch has {epoch_blocks:,}"
            )
        if not end_blocks:
            raise RequestError(
                f"data.skip_positions skip all {end} positions of the run: leave some of them in"
            )
    make = partial(
        _planned,
        points,
        duration=duration,
        block_size=block_size,
        epoch_blocks=epoch_blocks,
        end_blocks=end_blocks,
    )
    plan, total_steps, total_blocks = make(*planned_from)
    leads_to = plan.blocks_before(step)
    if end_blocks is not None and step >= total_steps:
        leads_to = min(leads_to, end_blocks)  # blocks that fill up the last step are not trained on
    if step < plan.stretches[0].step or leads_to != blocks:
        plan, total_steps, total_blocks = make(step, blocks)
    if total_steps < 1:
        raise RequestError(f"train.duration {duration} is not one step: a step has {points[0][1]} blocks")
    return Sizes(
        steps=plan,
        world_size=world_size,
        micro_batch_blocks=micro,
        block_size=block_size,
        epoch_blocks=epoch_blocks,
        total_steps=total_steps,
        total_blocks=total_blocks,
        run_blocks=total_blocks if end_blocks is None else end_blocks,
        end_position=end,
    )


def _planned(
    points: list[tuple[Duration, int]],
    step: int,
    blocks: int,
    *,
    duration: Duration,
    block_size: int,
    epoch_blocks: int | None,
    end_blocks: int | None,
) -> tuple[StepPlan, int, int]:
    """The plan from a step on, and the number of steps and blocks of the whole run.

    Args:
        end_blocks: the blocks of a run whose duration is in epochs, without skipped ones.
    """

    def plan(total_blocks: int, *, check: bool = True) -> StepPlan:
        made = [Point(0, points[0][1])]
        for place, batch in points[1:]:
            in_steps = place.unit == "steps"
            where = (
                place.exact()
                if in_steps
                else _blocks_of(
                    place, block_size=block_size, epoch_blocks=epoch_blocks, total_blocks=total_blocks
                )
            )
            made.append(Point(where, batch, in_steps))
        return plan_steps(made, step=step, block=blocks, check=check and not step)

    if duration.unit == "steps":
        steps = int(duration.value)
        low, high = 1, blocks + steps * max(batch for _, batch in points)
        # Percentages refer to the number of blocks of the run, which depends on the batches at these percentages: find the
        # smallest number of blocks that so many steps fill.
        while low < high:
            middle = (low + high) // 2
            if plan(middle, check=False).blocks_before(steps) > middle:
                low = middle + 1
            else:
                high = middle
        # The batch changes between steps, so perhaps no number of blocks fits exactly. The run's length is the number of blocks
        # that it trains on: a schedule over more blocks would never reach its end.
        made = plan(low)
        return made, steps, max(1, made.blocks_before(steps))
    if end_blocks is not None:
        total = end_blocks
    else:
        total = math.ceil(
            _blocks_of(duration, block_size=block_size, epoch_blocks=epoch_blocks, total_blocks=0)
        )
    made = plan(total)
    steps = made.steps_to(total)
    return made, steps, steps * points[0][1] if made.is_constant else total


def _blocks_of(
    duration: Duration,
    *,
    block_size: int,
    epoch_blocks: int | None,
    total_blocks: int,
    blocks_before: Callable[[int], int] | None = None,
) -> Fraction:
    """A length from the start of the run in blocks; 0 for never."""
    value = duration.exact()
    if duration.unit == "never" or duration == START:
        return Fraction(0)
    if duration.unit == "steps" and blocks_before is not None:
        return Fraction(blocks_before(int(value)))
    if duration.unit == "tokens":
        return value / block_size
    if duration.unit == "percent":
        return value * total_blocks / 100
    if duration.unit == "epochs" and epoch_blocks is not None:
        return value * epoch_blocks
    raise RequestError(f"{duration} cannot be converted to steps here: give it in steps")


AUTO_MICRO_BATCH_TOKENS = 8192
"""Without a measured limit, ``auto`` uses at most this many tokens per forward pass: enough to keep the matrix units of a
CPU core or a GPU busy with small models, and few enough to fit into memory (docs/log.md)."""


def largest_share(share: int, block_size: int, at_most: int | None = None) -> int:
    """The largest divisor of ``share`` whose tokens stay within :data:`AUTO_MICRO_BATCH_TOKENS`."""
    return largest_divisor(share, at_most or max(1, AUTO_MICRO_BATCH_TOKENS // block_size))
