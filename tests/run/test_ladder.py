"""Which short runs are due, what they cost, their recipes, and that a longer rung is bit for bit the longer run."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmcore.config import yaml
from lmcore.config.parse import parse
from lmcore.config.schema import flatten
from lmcore.errors import RequestError
from lmcore.run import ladder
from lmcore.run.ladder import Design, Member, due
from tests.support.whole_runs import assert_same_state, losses, request, train, weights, words

DESIGN = Design(members=("w32", "w64", "w96"), steps=(100, 80, 60), rate=0.01, batch_blocks=8, block_size=64)
MEMBERS = {f"w{w}": Member(width=w, parameters=w * 10_000, flops_per_token=w * 60_000) for w in ladder.WIDTHS}


def climb(loss: Any, design: Design = DESIGN) -> tuple[dict[str, float], list[list[str]]]:
    """Run whole stages, as a cluster would, with a made-up loss."""
    known: dict[str, float] = {}
    stages = []
    while waiting := due(design, known):
        stages.append([rung.name for rung in waiting])
        assert len(stages) < 20
        for rung in waiting:
            assert rung.name not in known
            if rung.parent is not None:
                assert rung.parent in known, "a rung goes on from one that is finished"
            known[rung.name] = loss(rung)
    return known, stages


def valley(best: float) -> Any:
    return lambda rung: 4 - math.log(rung.steps) / 10 + 0.05 * math.log(rung.rate / best) ** 2


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(ladder).failed == 0


def test_ladder_tries_three_rates_of_each_size_and_lengthens_the_best_only() -> None:
    known, stages = climb(valley(0.01))
    assert len(stages[0]) == 9
    assert len(known) == 9 + 3 + 2 + 3  # rates; twice as long; two batches; four times as long
    longest = [name for name in known if name.split("-")[-1] in ("400", "320", "240")]
    assert len(longest) == 3
    assert all("-lr0.01-" in name for name in longest)


@pytest.mark.parametrize("best", [0.04, 0.0025])
def test_ladder_follows_a_best_rate_beyond_its_edge(best: float) -> None:
    known, _ = climb(valley(best))
    assert DESIGN.best_rate("w64", known) == pytest.approx(best)


def test_ladder_ends_where_the_rate_runs_away() -> None:
    known, _ = climb(lambda rung: 4 - rung.rate)
    assert max(DESIGN.rates("w32", known)) == 0.01 * 2**ladder.LAST_RATE


def test_diverged_rates_are_avoided_and_all_diverged_is_refused() -> None:
    known, _ = climb(lambda rung: math.inf if rung.rate > 0.012 else 4 - math.log(rung.steps) / 10)
    assert DESIGN.best_rate("w96", known) <= 0.01
    with pytest.raises(RequestError, match="diverged"):
        climb(lambda rung: math.inf)


def test_one_rung_after_another_asks_for_the_same_rungs_as_whole_stages() -> None:
    together, _ = climb(valley(0.017))
    known: dict[str, float] = {}
    while waiting := due(DESIGN, known):
        known[waiting[0].name] = valley(0.017)(waiting[0])
    assert known == together


def test_branch_points_lie_in_the_constant_phase_on_whole_steps() -> None:
    for steps in (50, 60, 130):
        design = Design(members=("w32",), steps=(steps,), rate=0.01, batch_blocks=8, block_size=64)
        for batch in (0.5, 1.0, 2.0):
            short, middle, long = (design.rung("w32", 0.01, h, batch=batch) for h in ladder.HORIZONS)
            assert short.steps * short.batch_blocks == steps * 8
            assert (middle.parent, long.parent) == (short.name, middle.name)
            assert middle.parent_step == short.steps - short.decay_steps
            assert short.decay_steps * ladder.DECAY == short.steps


def test_points_are_those_of_the_best_rate_and_leave_out_what_is_missing() -> None:
    known, _ = climb(valley(0.01))
    found = ladder.points(DESIGN, MEMBERS, known)
    assert len(found) == 9
    assert {p.parameters for p in found} == {320_000, 640_000, 960_000}
    assert found[0].tokens == 100 * 8 * 64
    del known[DESIGN.rung("w64", 0.01, 4).name]
    assert len(ladder.points(DESIGN, MEMBERS, known)) == 8


def test_best_batch_is_read_off_the_smallest_size() -> None:
    def loss(rung: ladder.Rung) -> float:
        rate = 0.01 * math.sqrt(rung.batch_blocks / 8)
        return 4 + 0.01 * math.log2(rung.batch_blocks / 16) ** 2 + 0.05 * math.log(rung.rate / rate) ** 2

    known, _ = climb(loss)
    assert ladder.best_batch(DESIGN, known) == 16


def family(rate_of_one_million: float) -> list[tuple[Member, float]]:
    return [(m, rate_of_one_million * 1e6 / m.parameters) for m in MEMBERS.values()]


def test_design_keeps_the_cost_of_all_rungs_within_the_time() -> None:
    for seconds in (300.0, 3_000.0, 30_000.0):
        made = ladder.design(
            family(5_000), ladder_seconds=seconds, budget_of=lambda needed: 10 * needed,
            wanted_parameters=8e6, rate=0.01, block_size=64, largest_batch_blocks=32,
        )  # fmt: skip
        speed = {m.name: rate for m, rate in family(5_000)}
        known, _ = climb(valley(0.01), made)
        spent = 0.0
        for name in known:
            member, _, rate, _ = name.split("-")
            rung = next(
                r for h in ladder.HORIZONS for b in (0.5, 1.0, 2.0)
                for r in [made.rung(member, float(rate[2:]), h, batch=b)] if r.name == name
            )  # fmt: skip
            spent += rung.new_steps * rung.batch_blocks * 64 / speed[member] + ladder.STARTUP_SECONDS
        assert spent <= seconds * 1.02  # the fourth rate of a size is planned for every second size
        assert min(made.steps) >= ladder.LEAST_STEPS
        assert all(steps % 10 == 0 for steps in made.steps)


def test_design_refuses_a_budget_that_is_too_small_and_says_how_much_is_needed() -> None:
    with pytest.raises(RequestError, match=r"too small to measure: three sizes need .* at least [0-9]+ min"):
        ladder.design(
            family(5_000), ladder_seconds=60.0, budget_of=lambda needed: 10 * needed,
            wanted_parameters=8e6, rate=0.01, block_size=64, largest_batch_blocks=32,
        )  # fmt: skip


@pytest.mark.parametrize("preset", ["gpt2", "modern", "modern_gguf", "modern_conv"])
@pytest.mark.parametrize("width", ladder.WIDTHS)
def test_every_member_is_a_model_that_the_parser_accepts(preset: str, width: int, tmp_path: Path) -> None:
    base = parse(["--data.train", "a.txt", "--model.preset", preset], default_recipe=None)
    values = ladder.changed(base)
    values["model"] = ladder.with_member(base, width, block_size=64)
    values["tokenizer"] = {"path": "folder"}
    made = ladder.rung_values(values, DESIGN, DESIGN.rung("w64", 0.02, 2), tmp_path)
    (tmp_path / "rung.yaml").write_text(yaml.dump(made))
    options = flatten(parse(["--config", str(tmp_path / "rung.yaml")]))
    assert options["optim.lr"] == 0.02
    assert options["train.duration"] == "160 steps"
    assert options["optim.decay"] == "32 steps"
    assert options["resume"].endswith("w64-b8-lr0.02-80/checkpoints/step-00000064")
    assert width % ladder.heads_of(width) == 0


@pytest.mark.parametrize("preset", ["gpt2", "modern"])
def test_members_keep_the_options_of_the_model_that_are_not_chosen(preset: str) -> None:
    def member(*words: str) -> dict[str, Any]:
        config = parse(["--data.train", "a.txt", "--model.preset", preset, *words], default_recipe=None)
        return ladder.with_member(config, 64, block_size=64)

    assert member("--model.attention", "eager")["attention"] == "eager"
    assert member("--model.zero_init", "true")["zero_init"] is True
    assert member("--optim.name", "muon").get("zero_init", False) is (preset == "modern")
    assert "zero_init" not in member("--optim.name", "adamw")
    assert "zero_init" not in member("--model.zero_init", "false")
    assert "attention" not in member()


def test_recipe_holds_what_the_user_asked_for_and_nothing_that_is_the_default(tmp_path: Path) -> None:
    asked = ["--data.train", "a.txt", "--data.valid", "b.txt", "--data.eos", "false", "--seed", "7"]
    values = ladder.changed(parse(asked, default_recipe=None))
    assert values["data"] == {
        "train": ["a.txt"], "valid": ["b.txt"], "valid_fraction": None, "eos": False,
    }  # fmt: skip
    assert values["seed"] == 7
    assert "guard" not in values


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ({"state": "finished", "step": 20, "exit_code": 0}, 3.5),
        ({"state": "failed", "step": 12, "exit_code": 70, "diverged": True}, math.inf),
        ({"state": "failed", "step": 12, "exit_code": 70}, None),  # a full disk
        ({"state": "failed", "step": 12, "exit_code": 71}, None),
        ({"state": "saved", "step": 20, "exit_code": 75}, None),
        ({"state": "running", "step": 20}, None),
    ],
)
def test_result_of_a_rung_is_read_from_its_folder(
    status: dict[str, Any], found: float | None, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(json.dumps(status))
    records = [
        {"kind": "train", "step": s, "tokens": 100 * s, "tokens_per_second": r}
        for s, r in ((1, 5.0), (10, 90.0), (20, 60.0))
    ]
    records += [{"kind": "eval", "set": "valid", "step": 10, "tokens": 1000, "loss": 9.0}]
    records += [
        {"kind": "eval", "set": n, "step": 20, "tokens": 2000, "loss": v}
        for n, v in (("valid", 3.5), ("more", 1.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = ladder.read_result(tmp_path)
    assert result.loss == found
    if found == 3.5:  # 900 tokens in 10 s and 1,000 in 16.7; the first record has the start in it
        assert result.tokens_per_second == pytest.approx(1900 / (900 / 90 + 1000 / 60))


def test_rung_whose_last_validation_loss_is_not_finite_has_diverged(tmp_path: Path) -> None:
    """The training losses were finite, the validation loss after the last update is not: ``null`` in metrics.jsonl."""
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 20}))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "set": "valid", "step": 20, "loss": null}\n')
    assert ladder.read_result(tmp_path).loss == math.inf


def test_no_run_is_no_result(tmp_path: Path) -> None:
    assert ladder.read_result(tmp_path / "nothing") == ladder.Result(loss=None, tokens_per_second=None)


@pytest.mark.slow
def test_longer_rung_is_bit_for_bit_the_longer_run(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(words(300, 0))
    (tmp_path / "held.txt").write_text(words(40, 1))
    wsd = {
        "optim__schedule": "wsd", "optim__min_lr_ratio": 0, "optim__warmup": "2 steps",
        "checkpoint__every": "8 steps", "evaluate__every": "never", "report__every": 1,
    }  # fmt: skip
    short = request(tmp_path, tmp_path / "short", train__duration="10 steps", optim__decay="2 steps", **wsd)
    longer = {"train__duration": "20 steps", "optim__decay": "4 steps", **wsd}
    branch = str(tmp_path / "short" / "checkpoints" / "step-00000008")
    assert train(short) == [0]
    assert train(request(tmp_path, tmp_path / "branch", resume=branch, **longer)) == [0]
    assert train(request(tmp_path, tmp_path / "straight", **longer)) == [0]
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "branch") == {step: straight[step] for step in range(9, 21)}
    assert_same_state(weights(tmp_path / "branch"), weights(tmp_path / "straight"))
