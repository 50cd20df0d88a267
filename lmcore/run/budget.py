"""Global batch, micro-batch, accumulation and steps of a run, with the arithmetic shown.

The global batch and the number of steps do not depend on the number of ranks. Nothing is rounded silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from lmcore.config.durations import Duration
from lmcore.config.schema import RunConfig, global_batch_blocks
from lmcore.errors import RequestError

FEW_STEPS = 10
"""Fewer steps than this are said loudly: a schedule and a warmup need more."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the budget means here. ``end_position`` is ``None`` unless the horizon is a number of epochs."""

    global_batch_blocks: int
    micro_batch_blocks: int
    accumulation: int
    block_size: int
    steps_per_epoch: Fraction | None
    total_steps: int
    end_position: int | None

    @property
    def tokens_per_step(self) -> int:
        """Labels of a full step."""
        return self.global_batch_blocks * self.block_size

    def rows(self, config: RunConfig, world_size: int) -> list[tuple[str, str]]:
        """The arithmetic, for the start table."""
        known = self.steps_per_epoch
        blocks = (
            "not known beforehand" if known is None else f"{int(known * self.global_batch_blocks):,} blocks"
        )
        positions = self.total_steps * self.global_batch_blocks
        if self.end_position is not None:
            positions = min(
                positions, self.end_position
            )  # what only fills up the last step is not trained on
        tokens = positions * self.block_size
        epochs = (
            "" if known is None else f" = {float(positions / known / self.global_batch_blocks):.2f} epochs"
        )
        given = "" if config.train.duration.unit == "steps" else f"{config.train.duration} = "
        return [
            ("epoch", f"{blocks} of {self.block_size:,} tokens"),
            (
                "global batch",
                f"{world_size} x {self.accumulation} x {self.micro_batch_blocks} (processes x accumulation x "
                f"micro-batch) = {self.global_batch_blocks} blocks = {self.tokens_per_step:,} tokens",
            ),
            (
                "budget",
                f"{given}{self.total_steps:,} steps = {tokens:,} tokens{epochs}",
            ),
        ]

    def warnings(self, config: RunConfig, *, validated: bool) -> list[str]:
        """What makes the run useless although nothing is wrong, each with what to change.

        Args:
            validated: whether there is a validation set.
        """
        found = []
        if self.total_steps < FEW_STEPS and not config.fast_dev_run:
            has = (
                ""
                if self.steps_per_epoch is None
                else f" of {int(self.steps_per_epoch * self.global_batch_blocks):,} in the text"
            )
            smaller = max(1, self.global_batch_blocks * self.total_steps // 100)
            found.append(
                f"only {self.total_steps} steps: hardly anything is learnt. A step takes {self.global_batch_blocks} blocks"
                f"{has}: reduce --train.global_batch_blocks (to {smaller}, for example), or train longer with "
                "--train.duration"
            )
        if not validated and not config.fast_dev_run:
            found.append(
                "no validation text: nothing will tell learning from memorizing. Name some with --data.valid FILE, or "
                "hold out a part of the training text with --data.valid_fraction"
            )
        return found

    def steps_of(self, duration: Duration) -> int:
        """A duration of the configuration in whole steps; 0 for never."""
        steps = duration.to_steps(
            tokens_per_step=self.tokens_per_step,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        return steps or 0


def horizon(
    config: RunConfig,
    *,
    block_size: int,
    epoch_blocks: int | None,
    world_size: int,
    micro_batch_blocks: int | None = None,
) -> Sizes:
    """Global batch, accumulation and steps, from the configuration, the data and the number of ranks.

    Args:
        epoch_blocks: ``None`` where only the end of the data will tell.
        micro_batch_blocks: what ``auto`` was resolved to before (a checkpoint remembers it).

    Raises:
        RequestError: the global batch does not divide; the numbers are named.
    """
    blocks = global_batch_blocks(config, block_size)
    if blocks % world_size:
        raise RequestError(
            f"train.global_batch_blocks {blocks} is not a multiple of the {world_size} processes: make it "
            f"{blocks // world_size * world_size or world_size}, or start another number of processes"
        )
    share = blocks // world_size
    asked = config.train.micro_batch_blocks
    micro = asked if isinstance(asked, int) else micro_batch_blocks or largest_share(share, block_size)
    if share % micro and config.train.micro_batch_exact:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise RequestError(
            f"train.global_batch_blocks {blocks} over {world_size} processes is {share} blocks each, which must be a "
            f"multiple of train.micro_batch_blocks (got {micro}): try one of {', '.join(map(str, divisors))}, or leave "
            f"out train.micro_batch_exact"
        )
    if share % micro:  # the micro-batch is an upper bound: a matter of memory, not of the result
        micro = largest_share(share, block_size, at_most=micro)
    duration = config.train.duration
    steps_per_epoch = None if epoch_blocks is None else Fraction(epoch_blocks, blocks)
    if duration.unit == "epochs" and epoch_blocks is None:
        raise RequestError(
            f"train.duration {duration}: how long an epoch is, only a token store or a dataset with a length knows "
            f"beforehand; give steps or tokens"
        )
    total = duration.to_steps(tokens_per_step=blocks * block_size, steps_per_epoch=steps_per_epoch)
    if total is None or total < 1:
        raise RequestError(f"train.duration {duration} is not one step: a step has {blocks} blocks")
    end = None
    if duration.unit == "epochs" and epoch_blocks is not None:
        # N epochs end with their last block; the last step is filled up with blocks without labels.
        end = int(duration.exact() * epoch_blocks)
    return Sizes(
        global_batch_blocks=blocks,
        micro_batch_blocks=micro,
        accumulation=share // micro,
        block_size=block_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        end_position=end,
    )


AUTO_MICRO_BATCH_TOKENS = 8192
"""Without a measured limit ``auto`` takes at most so many tokens per forward pass: enough to fill the matrix units of
a CPU core or a GPU for small models, and little enough to fit (docs/log.md)."""


def largest_share(share: int, block_size: int, at_most: int | None = None) -> int:
    """The largest divisor of ``share`` whose tokens stay within :data:`AUTO_MICRO_BATCH_TOKENS`."""
    limit = at_most or max(1, AUTO_MICRO_BATCH_TOKENS // block_size)
    return max(divisor for divisor in range(1, min(share, limit) + 1) if share % divisor == 0)
