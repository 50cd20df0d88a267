"""The arithmetic of the budget."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lmcore.config import parse
from lmcore.errors import RequestError
from lmcore.run.budget import Sizes, horizon
from lmcore.run.state import differences, topology


def sizes(*words: str, world_size: int = 1, epoch_blocks: int | None = 103, **past: int) -> Sizes:
    argv = ["--data.train", "x", "--run_dir", "x", "--train.global_batch_blocks", "10", *words]
    config = parse.parse(argv, default_recipe=None)
    return horizon(config, block_size=16, epoch_blocks=epoch_blocks, world_size=world_size, **past)


def test_epochs_are_whole_steps_and_end_with_their_last_block() -> None:
    one = sizes("--train.duration", "2 epochs")
    assert (one.total_steps, one.end_position) == (21, 206)
    assert one.steps_per_epoch == Fraction(103, 10)
    assert one.tokens_per_step == 160


@pytest.mark.parametrize(
    ("duration", "steps"), [("7 steps", 7), ("7", 7), ("1000 tokens", 7), ("1 epochs", 11)]
)
def test_durations_in_steps(duration: str, steps: int) -> None:
    assert sizes("--train.duration", duration).total_steps == steps


@pytest.mark.parametrize("world_size", [1, 2, 5, 10])
def test_the_number_of_ranks_changes_neither_batch_nor_steps(world_size: int) -> None:
    here = sizes("--train.duration", "2 epochs", world_size=world_size)
    assert here.global_batch_blocks == 10
    assert here.total_steps == 21
    assert here.accumulation * here.micro_batch_blocks * world_size == 10


def test_indivisible_global_batch_raises_with_the_numbers() -> None:
    with pytest.raises(RequestError, match=r"10 .*3 processes"):
        sizes(world_size=3)


def test_micro_batch_is_an_upper_bound_unless_it_is_exact() -> None:
    for asked, got in ((2, 1), (4, 1), (5, 5), (8, 5), (1_000, 5)):
        here = sizes("--train.micro_batch_blocks", str(asked), world_size=2)
        assert (here.micro_batch_blocks, here.accumulation) == (got, 5 // got)
    exact = ["--train.micro_batch_exact", "--train.micro_batch_blocks"]
    assert sizes(*exact, "5", world_size=2).micro_batch_blocks == 5
    with pytest.raises(
        RequestError, match=r"5 blocks each.*multiple of train.micro_batch_blocks \(got 2\).*1, 5"
    ):
        sizes(*exact, "2", world_size=2)


def test_a_useless_budget_and_missing_validation_are_warned_about() -> None:
    config = parse.parse(["--data.train", "x"], default_recipe=None)
    (few,) = sizes("--train.duration", "2 steps").warnings(config, validated=True)
    assert "only 2 steps" in few
    assert "10 blocks of 103 in the text" in few
    assert "--train.global_batch_blocks" in few
    (none,) = sizes("--train.duration", "500 steps").warnings(config, validated=False)
    assert "no validation text" in none
    assert "--data.valid FILE" in none
    assert sizes("--train.duration", "500 steps").warnings(config, validated=True) == []


def test_a_stream_does_not_know_its_epochs() -> None:
    with pytest.raises(RequestError, match="steps or tokens"):
        sizes("--train.duration", "1 epochs", epoch_blocks=None)
    assert sizes("--train.duration", "5 steps", epoch_blocks=None).end_position is None


def test_auto_is_what_the_checkpoint_remembers_where_that_divides() -> None:
    assert sizes(micro_batch_blocks=5).micro_batch_blocks == 5
    assert sizes(micro_batch_blocks=4).micro_batch_blocks == 2


def test_padding_of_the_last_step_is_not_counted_in_the_budget() -> None:
    one = sizes("--train.duration", "3 epochs", epoch_blocks=104)
    config = parse.parse(
        ["--data.train", "x", "--run_dir", "x", "--train.duration", "3 epochs"], default_recipe=None
    )
    rows = dict(one.rows(config, 1))
    assert (
        "32 steps = 4,992 tokens = 3.00 epochs" in rows["budget"]
    )  # 312 blocks of 16; 32 whole steps are 320


def test_another_topology_is_named() -> None:
    same = {
        "world_size": 2,
        "strategy": "ddp",
        "precision": "fp32",
        "device": "cpu",
        "compiled": False,
        "micro_batch_blocks": 4,
    }
    old = topology(**same)  # type: ignore[arg-type]  # a table of its arguments
    assert differences(old, topology(**same)) == []  # type: ignore[arg-type]  # as above
    other = topology(**{**same, "world_size": 4})  # type: ignore[arg-type]  # as above
    assert differences(old, other) == ["world size was 2, is 4"]
