"""Runs of the data loader over several ranks, put together again by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcore.data.batches import Batches, StepBatch, merge_cursors
from lmcore.data.cursor import Cursor, next_positions
from lmcore.data.steps import StepPlan

Row = dict[str, list[int]]


def take(batches: Batches, count: int | None = None) -> list[StepBatch]:
    """The first ``count`` steps, all by default; the reading thread and workers are ended."""
    found = []
    iterator = iter(batches)
    for step in iterator:
        found.append(step)
        if len(found) == count:
            break
    iterator.close()
    return found


def steps_of_ranks(
    dataset: Any,
    cursor: Cursor,
    count: int | None,
    *,
    world_size: int,
    size: int | StepPlan,
    micro: int,
    **options: Any,
) -> list[list[StepBatch]]:
    """The steps of each rank: the same number on all of them."""
    ranks = [
        take(
            Batches(
                dataset,
                cursor=cursor,
                global_batch_blocks=size,
                micro_batch_blocks=micro,
                rank=rank,
                world_size=world_size,
                **options,
            ),
            count,
        )
        for rank in range(world_size)
    ]
    assert len({len(steps) for steps in ranks}) == 1, "ranks make different numbers of steps"
    return ranks


def run_ranks(
    dataset: Any,
    cursor: Cursor,
    *,
    size: int | StepPlan,
    count: int | None = None,
    world_size: int = 1,
    micro: int = 1,
    **options: Any,
) -> tuple[list[list[Row]], list[Cursor], list[list[StepBatch]]]:
    """(the rows of each global batch in the order of their positions, the cursor after each step, each rank's steps)."""
    plan = StepPlan.constant(size) if isinstance(size, int) else size
    ranks = steps_of_ranks(dataset, cursor, count, world_size=world_size, size=size, micro=micro, **options)
    reader = dataset.resumed(cursor)
    batches, cursors, here = [], [], cursor
    for number in range(len(ranks[0])):
        batch_size = plan.batch_of(options.get("step", 0) + number)
        positions, _ = next_positions(here.position, batch_size, here.skips)
        rows: dict[int, Row] = {}
        for rank, steps in enumerate(ranks):
            mine = reader.rank_slice(positions, rank, world_size).tolist()
            found = [
                {key: value[row].tolist() for key, value in batch.items()}
                for batch in steps[number].micro_batches
                for row in range(len(batch["labels"]))
            ]
            assert len(found) == len(mine)
            rows |= dict(zip(mine, found))
        batches.append([rows[position] for position in sorted(rows)])
        here = merge_cursors([steps[number].cursor for steps in ranks])
        cursors.append(here)
    return batches, cursors, ranks


def inputs_of(batch: list[Row]) -> np.ndarray:
    """(B, T) inputs of a global batch."""
    return np.array([row["input_ids"] for row in batch])
