"""Whole runs in which the global batch grows: resumed before, at and after each change, on other ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcore.data.steps import Point, plan_steps
from lmcore.errors import EXIT_FINISHED, EXIT_SAVED
from lmcore.report.metrics import read_metrics
from tests.support.whole_runs import assert_same_state, losses, request, train, weights, write_texts

STEPS = 14
PLAN = plan_steps([Point(0, 4), Point(16, 8), Point(9, 12, in_steps=True)])
CURVES: dict[str, Any] = {
    # 4 blocks a step; from position 16 on (step 5 is the first) 8; from step 10 on 12: 116 blocks of 16 tokens.
    "train__global_batch_blocks": "0: 4, 256 tokens: 8, 9 steps: 12",
    "train__duration": f"{STEPS} steps",
    "train__micro_batch_blocks": 2,
    "optim__schedule": "0: 0, 20%: 1, 100%: 0",
    "optim__weight_decay": "linear 0.2 0",
    "checkpoint__every": "1 steps",
    "checkpoint__keep": 50,
    "evaluate__every": "25%",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=400, held=40, seed=1)


@pytest.fixture(scope="module")
def whole(text: Path) -> Path:
    """The run that is never interrupted."""
    assert train(request(text, text / "whole", **CURVES)) == [EXIT_FINISHED]
    return text / "whole"


def records(run_dir: Path, kind: str) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_metrics(run_dir / "metrics.jsonl", kind=kind)}


def test_steps_take_the_planned_positions(whole: Path) -> None:
    found = records(whole, "train")
    assert {step: found[step]["position"] for step in found} == {
        step: PLAN.blocks_before(step) for step in range(1, STEPS + 1)
    }
    assert found[STEPS]["tokens"] == 16 * 116
    # Evaluated at each quarter of the blocks that are seen, not of the steps: 29, 58 and 87 of 116.
    assert sorted(records(whole, "eval")) == [6, 10, 12, 14]
    middle = (PLAN.blocks_before(7) + 4) / 116
    assert found[8]["lr"] == pytest.approx(0.003 * (1 - middle) / 0.8)


@pytest.mark.parametrize(
    "step", [4, 9, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 8, 10))]
)
def test_resume_around_a_change_of_the_batch_is_bit_exact(text: Path, whole: Path, step: int) -> None:
    argv = request(text, text / f"killed-{step}", **CURVES)
    assert train(argv, kill_before_step=step) == [EXIT_SAVED]
    assert train(argv) == [EXIT_FINISHED]
    assert losses(text / f"killed-{step}") == losses(whole)
    assert_same_state(weights(text / f"killed-{step}"), weights(whole))


def test_resume_on_other_ranks_and_micro_batches_follows(text: Path) -> None:
    """The same positions, and losses that differ by the order of float32 sums only. Without dropout, whose masks are
    drawn for each micro-batch."""
    plain = CURVES | {f"model__config__{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    assert train(request(text, text / "alone", **plain)) == [EXIT_FINISHED]
    assert train(request(text, text / "ranks", **plain), kill_before_step=3) == [EXIT_SAVED]
    two = request(text, text / "ranks", **plain | {"train__micro_batch_blocks": 3})
    assert train(two, 2, kill_before_step=10) == [EXIT_SAVED] * 2
    assert train(two) == [EXIT_FINISHED]
    expected = records(text / "alone", "train")
    for step, record in records(text / "ranks", "train").items():
        assert record["position"] == expected[step]["position"]
        assert record["lr"] == expected[step]["lr"]
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_stream_grows_too(text: Path) -> None:
    stream = CURVES | {
        "data__mode": "stream", "train__global_batch_blocks": "0: 4, 256 tokens: 8", "train__duration": "8 steps",
    }  # fmt: skip
    assert train(request(text, text / "stream", **stream)) == [EXIT_FINISHED]
    argv = request(text, text / "stream-killed", **stream)
    assert train(argv, kill_before_step=4) == [EXIT_SAVED]
    assert train(argv) == [EXIT_FINISHED]
    assert losses(text / "stream-killed") == losses(text / "stream")
    assert [record["position"] for record in records(text / "stream", "train").values()][-1] == 4 * 4 + 4 * 8


def test_another_batch_at_a_resume_keeps_the_horizon_in_tokens(text: Path) -> None:
    """After 80 of 112 blocks in steps of 16, steps of 8: the run still sees 112 blocks."""
    asked: dict[str, Any] = {"train__duration": f"{112 * 16} tokens", "optim__schedule": "linear_to_zero"}
    asked |= {"checkpoint__every": "2 steps", "checkpoint__keep": 1}
    run_dir = text / "changed"
    first = request(text, run_dir, **CURVES | asked | {"train__global_batch_blocks": 16})
    assert train(first, kill_before_step=4) == [EXIT_SAVED]
    then = request(text, run_dir, **CURVES | asked | {"train__global_batch_blocks": 8})
    assert train(then, kill_before_step=7) == [EXIT_SAVED]
    assert train(then) == [EXIT_FINISHED]
    found = records(run_dir, "train")
    assert max(found) == 5 + 4
    assert found[9]["position"] == 112
    left = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert left == ["step-00000009"], (
        "without checkpoint.keep_every none from before the change is kept for ever"
    )
