"""The arithmetic of the budget, and the cursor that a resumed run reads on from."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lmcore.config import parse
from lmcore.data.order import Cursor, Phase
from lmcore.errors import RequestError
from lmcore.run.budget import Sizes, horizon
from lmcore.run.resume import cursor_of
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


def test_a_stream_does_not_know_its_epochs() -> None:
    with pytest.raises(RequestError, match="steps or tokens"):
        sizes("--train.duration", "1 epochs", epoch_blocks=None)
    assert sizes("--train.duration", "5 steps", epoch_blocks=None).end_position is None


def test_auto_is_what_the_checkpoint_remembers_where_that_divides() -> None:
    assert sizes(micro_batch_blocks=5).micro_batch_blocks == 5
    assert sizes(micro_batch_blocks=4).micro_batch_blocks == 2


def test_what_lies_behind_a_cursor_never_moves() -> None:
    past = Cursor(fingerprint="f", seed=1, position=100, phases=(Phase(weights=(1.0, 1.0)),), skips=((3, 5),))

    def now(*phases: Phase) -> Cursor:
        return cursor_of(
            {"cursor": past.to_json()},
            fingerprint="f",
            seed=1,
            phases=phases,
            skips=((200, 210),),
            accept_other_data=False,
        )

    same = now(Phase(weights=(1.0, 1.0)))
    assert same.phases == past.phases
    assert same.skips == ((3, 5), (200, 210))
    changed = now(Phase(weights=(3.0, 1.0)))
    assert changed.phases == (Phase(weights=(1.0, 1.0)), Phase(position=100, weights=(3.0, 1.0)))
    planned = now(Phase(weights=(1.0, 1.0)), Phase(position=150, weights=(0.0, 1.0)))
    assert planned.phases == (Phase(weights=(1.0, 1.0)), Phase(position=150, weights=(0.0, 1.0)))
    with pytest.raises(RequestError, match="seed"):
        cursor_of(
            {"cursor": past.to_json()},
            fingerprint="f",
            seed=2,
            phases=past.phases,
            skips=(),
            accept_other_data=False,
        )


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
