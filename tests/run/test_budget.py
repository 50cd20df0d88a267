"""The arithmetic of the budget."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from lmcore.config import parse
from lmcore.config.durations import Duration, Durations, is_reached
from lmcore.errors import RequestError
from lmcore.run.budget import Sizes, horizon
from lmcore.run.setup import describe_optimizer, learning_rates, momenta, weight_decays
from lmcore.run.state import differences, topology
from tests.support.intervals import is_due


def sizes(*words: str, world_size: int = 1, epoch_blocks: int | None = 103, **past: Any) -> Sizes:
    argv = ["--data.train", "x", "--run_dir", "x", "--train.global_batch_blocks", "10", *words]
    config = parse.parse(argv, default_recipe=None)
    return horizon(config, block_size=16, epoch_blocks=epoch_blocks, world_size=world_size, **past)


def test_epochs_are_whole_steps_and_end_with_their_last_block() -> None:
    one = sizes("--train.duration", "2 epochs")
    assert (one.total_steps, one.end_position) == (21, 206)
    assert one.epoch_blocks == 103
    assert one.tokens_per_step == 160


@pytest.mark.parametrize(
    ("duration", "steps"), [("7 steps", 7), ("7", 7), ("1000 tokens", 7), ("1 epochs", 11)]
)
def test_durations_in_steps(duration: str, steps: int) -> None:
    assert sizes("--train.duration", duration).total_steps == steps


@pytest.mark.parametrize("world_size", [1, 2, 5, 10])
def test_number_of_ranks_changes_neither_batch_nor_steps(world_size: int) -> None:
    here = sizes("--train.duration", "2 epochs", world_size=world_size)
    assert here.global_batch_blocks == 10
    assert here.total_steps == 21
    assert here.accumulation * here.micro_batch_blocks * world_size == 10


def test_indivisible_global_batch_raises_with_the_numbers() -> None:
    with pytest.raises(RequestError, match=r"3 processes .*got 10"):
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


def test_tiny_budget_and_missing_validation_are_warned_about() -> None:
    config = parse.parse(["--data.train", "x"], default_recipe=None)
    (few,) = sizes("--train.duration", "2 steps").warnings(config, validated=True)
    assert "only 2 steps" in few
    assert "10 blocks of 103 in the text" in few
    assert "--train.global_batch_blocks" in few
    (done,) = sizes("--train.duration", "2 steps").warnings(config, validated=False, step=5)
    assert (
        "nothing is left to train: the run is at step 5, and train.duration 1 epochs ends at step 2" in done
    )
    (none,) = sizes("--train.duration", "500 steps").warnings(config, validated=False)
    assert "no validation text" in none
    assert "--data.valid FILE" in none
    assert sizes("--train.duration", "500 steps").warnings(config, validated=True) == []
    stream = parse.parse(
        ["--data.train", "x", "--data.mode", "stream", "--train.duration", "5 steps"], default_recipe=None
    )
    (none,) = sizes("--train.duration", "500 steps").warnings(stream, validated=False)
    assert "--data.valid_fraction" not in none, "it has no effect there"
    assert "data.mode stream holds nothing out" in none


def test_epoch_of_a_dataset_of_ones_own_is_counted_in_items() -> None:
    config = parse.parse(
        ["--data.factory", "a:b", "--run_dir", "x", "--train.duration", "5 steps"], default_recipe=None
    )
    rows = dict(sizes("--train.duration", "5 steps", epoch_blocks=100).rows(config))
    assert rows["epoch"].startswith("100 items of data.factory, each counted as a block of ")


def test_stream_does_not_know_its_epochs() -> None:
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
    rows = dict(one.rows(config))
    # 312 blocks of 16; 32 whole steps are 320
    assert "32 steps = 4,992 tokens = 3.00 epochs" in rows["budget"]


def test_another_topology_is_named() -> None:
    same = {
        "world_size": 2,
        "strategy": "ddp",
        "precision": "fp32",
        "residual_dtype": "fp32",
        "device": "cpu",
        "compiled": False,
        "context_parallel": 1,
        "tensor_parallel": 1,
        "micro_batch_blocks": 4,
    }
    old = topology(**same)
    assert differences(old, topology(**same)) == []
    other = topology(**{**same, "world_size": 4})
    assert differences(old, other) == ["world size was 2, is 4"]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "from before"])
def test_another_library_of_products_is_named(monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """On an AMD CPU float32 products are rounded differently than on an Intel one, and than before they were by oneDNN."""
    same: dict[str, Any] = {
        "world_size": 1, "strategy": "single", "residual_dtype": "fp32", "device": "cpu", "compiled": False,
        "context_parallel": 1, "tensor_parallel": 1, "micro_batch_blocks": 4,
    }  # fmt: skip
    monkeypatch.setattr("lmcore.run.state.onednn_is_faster", lambda: False)
    old = {"fp32": topology(**same, precision="fp32"), "bf16": topology(**same, precision="bf16")}
    if not recorded:
        for one in old.values():
            del one["library of float32 products"], one["CPU instructions"]
    monkeypatch.setattr("lmcore.run.state.onednn_is_faster", lambda: True)
    assert differences(old["fp32"], topology(**same, precision="fp32")) == [
        "library of float32 products was torch's choice, is oneDNN"
    ]
    assert differences(old["bf16"], topology(**same, precision="bf16")) == []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "an older CPU")
    named = differences(old["bf16"], topology(**same, precision="bf16"))
    assert [line.split(" was ")[0] for line in named] == (["CPU instructions"] if recorded else [])


def test_a_cpu_with_other_bf16_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon multiplies in bf16 where the CPU does, and in float32 elsewhere, whatever the precision of the run."""
    same: dict[str, Any] = {
        "world_size": 1, "strategy": "single", "residual_dtype": "fp32", "device": "cpu", "compiled": False,
        "context_parallel": 1, "tensor_parallel": 1, "micro_batch_blocks": 4, "precision": "fp32",
    }  # fmt: skip
    monkeypatch.setattr("lmcore.run.state.cpu_bf16", lambda: "AMX")
    old = topology(**same)
    assert differences(old, topology(**same)) == []
    monkeypatch.setattr("lmcore.run.state.cpu_bf16", lambda: "")
    assert differences(old, topology(**same)) == ["bf16 instructions was AMX, is none"]
    del old["bf16 instructions"]  # a checkpoint from before they were recorded
    assert differences(old, topology(**same)) == []


# ---- a global batch that changes


GROWING = ("--train.global_batch_blocks", "0: 4, 5%: 8, 600 steps: 16", "--train.duration")


def test_percentages_are_shares_of_the_blocks_seen() -> None:
    """In tokens the run has 8,000 blocks: a quarter of them is step 500, whatever the steps after it are."""
    plan = sizes(*GROWING[:1], "0: 4, 25%: 8", "--train.duration", "128000 tokens")
    assert plan.steps.stretches == ((0, 0, 4), (500, 2_000, 8))
    assert (plan.total_steps, plan.total_blocks) == (500 + 750, 8_000)
    assert plan.steps_of(Duration.parse("50%")) == 750
    assert plan.progress(500) == (0.25, 750)
    assert plan.progress(750) == (0.5, 500)


@pytest.mark.parametrize("batches", ["0: 4, 25%: 8", "0: 8, 25%: 4", "0: 4, 10%: 16, 60%: 8", "linear 2 10"])
@pytest.mark.parametrize("steps", [4, 37, 1_000])
def test_percentages_of_a_run_in_steps_are_of_the_blocks_that_it_will_see(batches: str, steps: int) -> None:
    here = sizes("--train.global_batch_blocks", batches, "--train.duration", f"{steps} steps")
    assert here.total_steps == steps
    seen = here.steps.blocks_before(steps)
    assert 0 <= here.total_blocks - seen < 16  # to within a step
    for (place, batch), stretch in zip(
        [(Fraction(1, 4), 8)] if batches == "0: 4, 25%: 8" else [], here.steps.stretches[1:]
    ):
        assert stretch.batch == batch
        assert place * here.total_blocks <= stretch.block < place * here.total_blocks + 4


def test_schedule_ends_with_the_last_step_where_no_number_of_blocks_fits_the_percentages() -> None:
    here = sizes("--train.global_batch_blocks", "0: 1, 15%: 4, 34%: 8", "--train.duration", "21 steps")
    assert here.total_blocks == here.run_blocks == here.steps.blocks_before(21)
    assert here.progress(21) == (1.0, 0.0)
    for step in range(21):
        assert (
            sizes(
                "--train.global_batch_blocks", "0: 1, 15%: 4, 34%: 8", "--train.duration", "21 steps",
                step=step, blocks=here.steps.blocks_before(step),
            )
            == here
        )  # fmt: skip


def test_intervals_are_reached_once_for_each_multiple_of_what_was_seen() -> None:
    here = sizes(*GROWING, "1000 steps")
    for text, count in (("10%", 10), ("7%", 14), ("1 epochs", here.total_blocks // 103), ("25 steps", 40)):
        every = Durations.parse(text)
        due = [step for step in range(1, 1_001) if is_reached(every, here.spans(step))]
        # 100% is the last step's business where rounding leaves a block
        assert len(due) in (count, count - 1)
    constant = sizes("--train.duration", "1000 steps")
    for text in ("10%", "7%", "3333 tokens", "1 epochs", "0.3 epochs", "9 steps"):
        every, known = Durations.parse(text), {"tokens_per_step": 160, "steps_per_epoch": Fraction(103, 10)}
        for step in range(1, 1_001):
            expected = is_due(step, every, total_steps=1_000, **known)  # a table
            assert is_reached(every, constant.spans(step)) == expected


@pytest.mark.parametrize("duration", ["1000 steps", "128000 tokens", "60 epochs"])
def test_resume_at_any_step_makes_the_same_plan(duration: str) -> None:
    plan = sizes(*GROWING, duration)
    for step in range(0, plan.total_steps, 7):
        blocks = plan.steps.blocks_before(step)
        assert sizes(*GROWING, duration, step=step, blocks=blocks) == plan


def test_another_batch_at_a_resume_counts_what_was_seen() -> None:
    """400 steps of 10 blocks were done; the rest of 6,400 blocks takes steps of 4 or grows."""
    for batches, steps in (("4", 400 + 600), ("0: 4, 80%: 8", 400 + 280 + 160)):
        past: dict[str, Any] = {"step": 400, "blocks": 4_000}
        words = ("--train.global_batch_blocks", batches, "--train.duration", f"{6_400 * 16} tokens")
        plan = sizes(*words, **past)
        assert plan.total_steps == steps
        assert plan.steps.stretches[0][:2] == (400, 4_000)
        later = {"step": 500, "blocks": 4_400, "planned_from": (400, 4_000)}
        assert sizes(*words, **later) == plan  # a table


def test_micro_batches_are_divisors_of_each_share() -> None:
    here = sizes(
        "--train.global_batch_blocks", "0: 12, 50%: 20", "--train.micro_batch_blocks", "8", world_size=2
    )
    assert here.micro_batch_blocks == 6
    assert [here.accumulation_of(batch) for batch in (12, 20)] == [1, 2]
    # What a checkpoint remembers gives the same again.
    past = sizes("--train.global_batch_blocks", "0: 12, 50%: 20", world_size=2, micro_batch_blocks=6)
    assert [past.accumulation_of(batch) for batch in (12, 20)] == [1, 2]


def test_every_batch_of_a_run_must_divide_among_the_processes() -> None:
    with pytest.raises(RequestError, match=r"multiple of the 4 processes \(got 18\); try 16 or 20"):
        sizes("--train.global_batch_blocks", "0: 12, 50%: 18", world_size=4)


def test_growing_batch_is_in_the_start_table() -> None:
    here = sizes(*GROWING, "1000 steps", world_size=2)
    config = parse.parse(["--data.train", "x"], default_recipe=None)
    rows = dict(here.rows(config))
    assert "from step 601" in rows["batch changes"]
    assert rows["batch changes"].endswith("16 blocks = 2 x 1 x 8")


def test_rates_follow_the_blocks_seen() -> None:
    words = ["--data.train", "x", *GROWING, "1000 steps", "--optim.schedule", "0: 0, 10%: 1, 100%: 0"]
    config = parse.parse(
        [*words, "--optim.lr", "0.5", "--optim.weight_decay", "linear 0.2 0"], default_recipe=None
    )
    here = sizes(*GROWING, "1000 steps")
    rate, decay = learning_rates(config, here), weight_decays(config, here)
    for step in (0, 100, 599, 600, 601, 999):
        middle = (here.steps.blocks_before(step) + here.steps.batch_of(step) / 2) / here.total_blocks
        assert decay(step) == pytest.approx(0.2 * (1 - middle), rel=1e-9)
        assert rate(step) == pytest.approx(0.5 * min(middle / 0.1, (1 - middle) / 0.9), rel=1e-9)
    assert rate(0) > 0
    assert rate(999) > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "inverse_sqrt"])
def test_batch_that_stays_equal_has_the_rates_of_a_constant_one(schedule: str) -> None:
    words = ["--data.train", "x", "--train.duration", "1000 steps", "--optim.schedule", schedule]
    config = parse.parse([*words, "--optim.name", "muon"], default_recipe=None)
    one = sizes("--train.duration", "1000 steps")
    other = sizes("--train.global_batch_blocks", "0: 10, 30%: 10", "--train.duration", "1000 steps")
    assert not other.steps.is_constant
    for make in (learning_rates, momenta):
        for step in range(0, 1_000, 13):
            assert make(config, other)(step) == pytest.approx(make(config, one)(step), rel=1e-9)


@pytest.mark.parametrize("growing", [[], GROWING[:-1]])
@pytest.mark.parametrize("skipped", [(), ((0, 30),), ((7, 8), (50, 97), (200, 300)), ((0, 1029),)])
@pytest.mark.parametrize("epochs", ["0.5", "1", "3.7", "10"])
def test_run_of_epochs_has_the_steps_that_its_blocks_fill(
    growing: list[str], skipped: tuple[tuple[int, int], ...], epochs: str
) -> None:
    """Counted by walking over the positions, at the start and from any step on."""
    end = int(Fraction(epochs) * 103)
    left = [place for place in range(end) if not any(a <= place < b for a, b in skipped)]
    argv = [*growing, "--train.duration", f"{epochs} epochs"]
    if skipped:
        argv += ["--data.skip_positions", f"[{', '.join(f'{a}-{b - 1}' for a, b in skipped)}]"]
    if not left:
        with pytest.raises(RequestError, match=f"skip all {end} positions"):
            sizes(*argv)
        return
    plan = sizes(*argv)
    assert plan.run_tokens == 16 * len(left)
    seen = step = 0
    while seen < len(left):
        at = left[seen]
        past = {"step": step, "blocks": seen, "position": at}
        assert sizes(*argv, **past).total_steps == plan.total_steps
        seen, step = seen + plan.steps.batch_of(step), step + 1
    assert step == plan.total_steps
    finished = sizes(*argv, step=step, blocks=len(left), position=end)
    assert (finished.steps, finished.total_steps) == (plan.steps, step), (
        "what fills the last step up is no new plan"
    )


def test_epochs_of_no_block_are_refused() -> None:
    with pytest.raises(RequestError, match="less than one block: an epoch has 103"):
        sizes("--train.duration", "0.005 epochs")


def test_few_steps_are_told_with_a_remedy_that_helps() -> None:
    config = parse.parse(["--data.train", "x", "--train.duration", "1 steps"], default_recipe=None)
    [line] = sizes("--train.duration", "1 steps").warnings(config, validated=True)
    assert line.startswith("only 1 step:")
    assert "global_batch_blocks (" not in line  # a smaller batch gives no more steps
    config = parse.parse(["--data.train", "x", "--train.duration", "0.5 epochs"], default_recipe=None)
    [line] = sizes("--train.duration", "0.5 epochs").warnings(config, validated=True)
    assert "reduce --train.global_batch_blocks" in line


def test_momentum_of_a_resumed_run_with_another_batch_is_described_by_its_own_steps() -> None:
    """Its plan begins at the resume; "0.85 to 0.95 over 35 steps" stood there for the 10 steps before it."""
    words = ("--optim.name", "muon", "--train.duration", "80 steps")
    config = parse.parse(["--data.train", "x", "--run_dir", "x", *words], default_recipe=None)

    def row(**past: Any) -> str:
        return dict(describe_optimizer(config, sizes(*words, **past)))["momentum"]

    assert row() == "0.85 to 0.95 over 8 steps"
    assert row(step=60, blocks=300, position=300, planned_from=(60, 300)) == "0.95"
    assert row(step=4, blocks=20, position=20, planned_from=(4, 20)) == "0.85 to 0.95 over 10 steps"
