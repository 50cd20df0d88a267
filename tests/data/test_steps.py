"""The blocks of every step where the global batch changes: against a walk through all steps, over thousands of random
schedules."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from lmcore.data.steps import Point, StepPlan, largest_divisor, plan_steps
from lmcore.errors import RequestError

SCHEDULES = 3_000
STEPS = 60


def random_points(draw: random.Random) -> list[Point]:
    """A few changes at rising places, some in steps, some in fractions of blocks."""
    points = [Point(0, draw.choice([1, 2, 3, 4, 6, 8, 12]))]
    step, block = 0, Fraction(0)
    for _ in range(draw.randint(0, 5)):
        # Further than the last place in both units, so that the order is clear whatever the batches are.
        step, block = (
            step + draw.randint(1, 12),
            block + Fraction(draw.randint(1, 400), draw.choice([1, 2, 3, 7])),
        )
        batch = draw.choice([1, 2, 3, 4, 6, 8, 12, 48])
        in_steps = draw.random() < 0.4
        points.append(Point(step if in_steps else block, batch, in_steps))
    return points


def walk(points: list[Point], steps: int) -> list[tuple[int, int]]:
    """(blocks before, batch) of every step, by asking at each step which changes are behind."""
    found, block, number = [], 0, 0
    for step in range(steps):
        while number + 1 < len(points):
            after = points[number + 1]
            if (step if after.in_steps else block) < after.place:
                break
            number += 1
        found.append((block, points[number].batch))
        block += points[number].batch
    return found


@pytest.mark.parametrize("part", range(4))
def test_step_and_position_are_those_of_a_walk_through_all_steps(part: int) -> None:
    draw = random.Random(part)
    for _ in range(SCHEDULES // 4):
        points = random_points(draw)
        expected = walk(points, STEPS)
        plan = plan_steps(points, check=False)
        assert [(plan.blocks_before(step), plan.batch_of(step)) for step in range(STEPS)] == expected
        assert len(plan.stretches) <= len(points)
        step = 0
        for block in range(0, expected[-1][0], max(1, expected[-1][0] // 50)):
            while step + 1 < STEPS and expected[step + 1][0] <= block:
                step += 1
            assert plan.step_of(block) == step
            assert plan.steps_to(block) == next(n for n in range(STEPS + 1) if plan.blocks_before(n) >= block)


def test_plan_made_on_the_way_is_the_rest_of_it() -> None:
    draw = random.Random(5)
    for _ in range(SCHEDULES // 4):
        points = random_points(draw)
        plan = plan_steps(points, check=False)
        for step in draw.sample(range(STEPS), 5):
            rest = plan_steps(points, step=step, block=plan.blocks_before(step), check=False)
            for later in range(step, STEPS):
                assert rest.batch_of(later) == plan.batch_of(later)
                assert rest.blocks_before(later) == plan.blocks_before(later)


def test_constant_plans_are_products() -> None:
    plan = StepPlan.constant(6)
    assert plan.is_constant
    assert (plan.blocks_before(7), plan.batch_of(10**12), plan.step_of(41), plan.steps_to(43)) == (
        42,
        6,
        6,
        8,
    )
    assert plan_steps([Point(0, 6)], step=4, block=24).is_constant
    assert not plan_steps([Point(0, 6)], step=4, block=23).is_constant


def test_changes_in_the_wrong_order_raise() -> None:
    with pytest.raises(RequestError, match="change to 16 blocks comes before that to 8"):
        plan_steps([Point(0, 4), Point(1_000, 8), Point(10, 16, in_steps=True)])
    # Places inside one step are in order, and the last one counts.
    assert plan_steps([Point(0, 4), Point(1, 8), Point(2, 16)]).batch_of(1) == 16


def test_long_run_costs_nothing() -> None:
    plan = plan_steps([Point(0, 8), Point(10**15, 16), Point(10**16, 512)])
    assert plan.batch_of(10**17) == 512
    assert plan.step_of(plan.blocks_before(10**15 + 7)) == 10**15 + 7


def test_largest_divisor() -> None:
    assert [largest_divisor(12, at_most) for at_most in (1, 2, 5, 7, 12, 99)] == [1, 2, 4, 6, 12, 12]
