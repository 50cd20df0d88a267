"""Whole runs with an option each: what the option promises is seen in what the run leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_REQUEST, EXIT_SAVED
from lmcore.report.metrics import read_metrics
from lmcore.run.profiler import ProfileWindow
from tests.support.fork_server import RankFailure, run_ranks
from tests.support.whole_runs import (
    ROOT,
    assert_same_state,
    losses,
    request,
    train,
    train_in_rank,
    weights,
    words,
)

SHORT = {"train__duration": "6 steps", "evaluate__every": "3 steps", "checkpoint__every": "never"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(400, 0), encoding="utf-8")
    (folder / "more.txt").write_text(words(200, 2), encoding="utf-8")
    (folder / "held.txt").write_text(words(40, 1), encoding="utf-8")
    return folder


def test_stream_gives_one_and_two_processes_the_same_blocks(text: Path) -> None:
    options = {**SHORT, "data__mode": "stream"}
    one, two = text / "stream-1", text / "stream-2"
    assert train(request(text, one, **options)) == [EXIT_FINISHED]
    assert train(request(text, two, **options), 2) == [EXIT_FINISHED] * 2
    for step, loss in losses(one).items():  # the same tolerance and reason as in test_run.py
        assert math.isclose(loss, losses(two)[step], rel_tol=1e-5), step


def test_stream_resumes_with_exactly_the_next_blocks(text: Path) -> None:
    options = {**SHORT, "data__mode": "stream"}
    stopped = text / "stream-stopped"
    train(request(text, stopped, **options), kill_before_step=2)
    assert train(request(text, stopped, **options)) == [EXIT_FINISHED]
    assert losses(stopped) == losses(text / "stream-1")


def test_weights_mix_sources(text: Path) -> None:
    run_dir = text / "mixed"
    sources = [
        {"path": str(text / "train.txt"), "weight": 3, "name": "a"},
        {"path": str(text / "more.txt"), "weight": 1, "name": "b"},
    ]
    assert train(request(text, run_dir, **SHORT, data__train=json.dumps(sources))) == [EXIT_FINISHED]
    state = json.loads(next((run_dir / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["cursor"]["phases"] == [[0, [3.0, 1.0]]]


def own_parts(run_dir: Path, options: dict[str, Any]) -> list[str]:
    """A command line for the small regression of tests/support/own_parts.py: two steps, if ``options`` do not say otherwise."""
    whole = {
        "run_dir": run_dir,
        "data.factory": "tests.support.own_parts:data",
        "data.config.count": 64,
        "model.type": "null",
        "model.factory": "tests.support.own_parts:model",
        "model.config.width": 8,
        "loss.factory": "tests.support.own_parts:squares",
        "train.duration": "2 steps",
        "train.global_batch_blocks": 8,
    } | options
    return [part for name, value in whole.items() for part in (f"--{name}", str(value))]


def test_own_model_data_and_loss(text: Path) -> None:
    """No tokenizer, no token: a regression, on one process and on two."""
    options = {
        "train.duration": "20 epochs",
        "train.micro_batch_blocks": 4,
        "train.precision": "fp32",
        "optim.lr": 0.05,
        "evaluate.every": "5 epochs",
        "report.every": 1,
        "report.trackers": "[]",
        "checkpoint.every": "never",
    }
    one, two = text / "own-1", text / "own-2"
    for run_dir, world_size in ((one, 1), (two, 2)):
        assert train(own_parts(run_dir, options), world_size) == [EXIT_FINISHED] * world_size
    assert losses(one)[160] < 0.01 < losses(one)[1]
    assert math.isclose(losses(one)[160], losses(two)[160], rel_tol=1e-4)
    evaluations = read_metrics(one / "metrics.jsonl", kind="eval")
    assert [r["set"] for r in evaluations] == ["line"] * len(evaluations)
    assert evaluations[-1]["loss"] < 0.01


def test_own_data_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    """They were trained on: some items twice in an epoch and others never."""
    options = {"data.factory": "tests.support.own_parts:longer_on_rank_1"}
    assert train(own_parts(tmp_path / "run", options), 2) == [EXIT_REQUEST] * 2
    reason = json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    assert "the data of rank 0 and rank 1 differ (train: " in reason


def test_parameters_that_are_not_trained_are_said(tmp_path: Path) -> None:
    """They kept the numbers that they were initialized with, in silence: DeepSeek V3.2's choice of keys, for one."""
    options = {
        "model.factory": "tests.support.own_parts:model_with_a_spare_layer",
        "checkpoint.every": "never",
    }
    assert train(own_parts(tmp_path / "run", options)) == [EXIT_FINISHED]
    said = [
        line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "no gradient" in line
    ]
    assert len(said) == 1
    assert "no gradient in step 1: spare.weight, spare.bias; " in said[0]


@pytest.mark.parametrize(("where", "workers"), [("factory", 0), ("item", 1)])
def test_error_of_one_rank_is_the_reason_that_rank_0_gives(tmp_path: Path, where: str, workers: int) -> None:
    """It was said only that rank 1 is dead, below a traceback of rank 0 about a lost connection."""
    options = {
        "data.factory": "tests.support.own_parts:broken_on_rank_1",
        "data.config.where": where,
        "data.workers": workers,
    }
    with pytest.raises(RankFailure) as failure:
        train(own_parts(tmp_path / "run", options), 2)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 71)
    assert status["reason"].startswith("rank 1 (pid ")
    assert f"has ended: ValueError: no {where}: the file is gone" in status["reason"]
    assert status["reason"] in (tmp_path / "run" / "train.log").read_text()
    printed = str(failure.value).partition("--- last output of rank 0 ---")[2]
    assert status["reason"] in printed
    assert "Traceback" not in printed


def test_ema_is_kept_evaluated_and_exported(text: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run_dir = text / "average"
    options = {**SHORT, "optim__ema_decay": 0.5, "data__test": text / "more.txt"}
    train(request(text, run_dir, **options), kill_before_step=3)
    assert train(request(text, run_dir, **options)) == [EXIT_FINISHED]
    straight = text / "average-straight"
    assert train(request(text, straight, **options)) == [EXIT_FINISHED]
    scored = {r["set"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl", kind="eval")}
    assert scored.keys() == {"held", "held-ema", "test", "test-ema"}
    assert scored["test"] != scored["test-ema"], "the export holds the average"
    exported = load_file(run_dir / "export" / "model.safetensors")
    for name, tensor in load_file(straight / "export" / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name
    trained = weights(run_dir)
    name = next(n for n in exported if "attn.c_attn.weight" in n)
    raw = next(
        t for n, t in trained.items() if name.removeprefix("transformer.") in n and n.startswith("model")
    )
    assert not torch.equal(exported[name], raw), "the export holds the weights, not their average"


@pytest.mark.parametrize(
    ("duration", "reason"), [("30 steps", "target"), ("3 steps", "reached train.duration")]
)
def test_early_stopping_says_why_and_still_saves(text: Path, duration: str, reason: str) -> None:
    """A run that has come to its end was not stopped early."""
    run_dir = text / f"early-{duration}"
    options = {**SHORT, "train__duration": duration, "evaluate__early_stopping__target": 100.0}
    assert train(request(text, run_dir, **options)) == [EXIT_FINISHED]
    status = json.loads((run_dir / "status.json").read_text())
    assert status["step"] == 3
    assert reason in status["reason"]
    assert ("stopped early" in (run_dir / "train.log").read_text()) == (reason == "target")
    assert (run_dir / "checkpoints" / "step-00000003" / "manifest.json").exists()
    assert (run_dir / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("asked", "written"), [("2-3", "2-3"), ("1-2", "1-2"), ("3-1000", "3-4"), ("900-901", None)]
)
def test_profile_window_is_written(text: Path, asked: str, written: str | None) -> None:
    run_dir = text / f"profile-{asked}"
    options = SHORT | {"train__duration": "4 steps", "train__profile": asked}
    assert train(request(text, run_dir, **options)) == [EXIT_FINISHED]
    if written is None:
        assert not (run_dir / "profile").exists()
        return
    assert (run_dir / "profile" / f"steps-{written}.json.gz").stat().st_size > 0
    assert "aten::" in (run_dir / "profile" / f"steps-{written}.txt").read_text()


def _train_with_nan(argv: list[str], positions: list[int]) -> int:
    """As ``train_in_rank``, with a loss that is not a number in every step that holds one of these positions."""
    from lmcore.engine.engine import Engine
    from lmcore.run.trainer import Run

    forward, batches = Engine.forward, Run.batches

    def poisoned_read(self: Any) -> Any:
        for batch in batches(self):
            first, last = batch.positions
            self.engine.poison = any(first <= position <= last for position in positions)
            yield batch

    def poisoned_forward(self: Any, batch: Any, key: int | None = None) -> Any:
        loss_sum, count = forward(self, batch, key)
        return (loss_sum * math.nan if key is not None and self.poison else loss_sum), count

    Run.batches, Engine.forward = poisoned_read, poisoned_forward
    return train_in_rank(argv, None, 0)


def test_rewind_equals_a_run_that_skips_these_blocks(text: Path) -> None:
    """Replay: blocks that give no number are rewound over; the result is that of a run told beforehand to skip them."""
    options = {
        "train__duration": "8 steps",
        "checkpoint__every": "2 steps",
        "evaluate__every": "never",
        "guard__max_skips": 0,
    }
    rewound, told = text / "rewound", text / "told"
    assert run_ranks(_train_with_nan, 1, request(text, rewound, **options), [37]) == [EXIT_FINISHED]
    events = [r["event"] for r in read_metrics(rewound / "metrics.jsonl", kind="event")]
    assert "rewind" in events
    assert train(request(text, told, **options, data__skip_positions="36-47")) == [EXIT_FINISHED]
    assert losses(rewound) == losses(told)
    assert_same_state(weights(rewound), weights(told))


def test_profile_window_that_was_not_reached_is_told(tmp_path: Path) -> None:
    window = ProfileWindow(tmp_path, 900, 901)
    assert [window.step(done) for done in range(3)] == [None] * 3
    told = window.end()
    assert told == (
        "nothing was profiled: steps 900-901 (train.profile) are not among those of this start, which ended at step 2"
    )


@pytest.mark.parametrize("kind", ["skipped", "rewound"])
def test_run_of_epochs_that_skips_comes_to_its_end(text: Path, kind: str) -> None:
    """Fewer blocks are fewer steps: the last one has the last rate and is evaluated."""
    run_dir = text / f"epoch-{kind}"
    options = {
        "train__duration": "1 epochs",
        "data__block_size": 64,
        "optim__schedule": "linear_to_zero",
        "checkpoint__every": "2 steps",
        "evaluate__every": "never",
        "guard__max_skips": 0,
    }
    if kind == "skipped":
        argv = request(text, run_dir, **options, data__skip_positions="12-47")
        assert train(argv) == [EXIT_FINISHED]
    else:
        argv = request(text, run_dir, **options)
        assert run_ranks(_train_with_nan, 1, argv, [37]) == [EXIT_FINISHED]
    last = list(read_metrics(run_dir / "metrics.jsonl", kind="train"))[-1]
    scored = list(read_metrics(run_dir / "metrics.jsonl", kind="eval"))
    end = list(read_metrics(run_dir / "metrics.jsonl", kind="event"))[-1]
    assert end["reason"] == "reached train.duration"
    assert [record["step"] for record in scored] == [last["step"]] == [end["step"]]
    # From the peak after one step of warm-up in a straight line to zero after the last step.
    assert last["lr"] == pytest.approx(0.003 / (last["step"] - 1))


def test_second_rewind_keeps_what_the_first_skips(text: Path) -> None:
    """Both go back to the same checkpoint."""
    options = {
        "train__duration": "10 steps",
        "checkpoint__every": "4 steps",
        "evaluate__every": "never",
        "guard__max_skips": 0,
    }
    rewound, told = text / "rewound-twice", text / "told-twice"
    assert run_ranks(_train_with_nan, 1, request(text, rewound, **options), [62, 86]) == [EXIT_FINISHED]
    assert train(request(text, told, **options, data__skip_positions="[60-71, 84-95]")) == [EXIT_FINISHED]
    assert losses(rewound) == losses(told)
    assert_same_state(weights(rewound), weights(told))
    rates = [r["tokens_per_second"] for r in read_metrics(rewound / "metrics.jsonl", kind="train")]
    assert min(rates) > 0


def test_rewind_takes_a_newer_checkpoint_where_no_older_one_is_kept(text: Path) -> None:
    """Updates that were not finite were never applied: every checkpoint is sound."""
    run_dir = text / "scattered"
    options = {
        "train__duration": "16 steps", "checkpoint__every": "2 steps", "checkpoint__keep": 3, "evaluate__every": "never",
        "guard__max_skips": 2, "guard__spike_window": 16,
    }  # fmt: skip
    argv = request(text, run_dir, **options)
    assert run_ranks(_train_with_nan, 1, argv, [26, 86, 146]) == [EXIT_FINISHED]  # in steps 3, 8 and 13
    events = [r["event"] for r in read_metrics(run_dir / "metrics.jsonl", kind="event")]
    assert events.count("rewind") == 1


def test_rewind_of_the_last_step_of_an_epoch_ends_the_run(text: Path) -> None:
    """Nothing is left to train: it is evaluated and saved, and the same command does nothing again."""
    run_dir = text / "nothing-left"
    options = {
        "train__duration": "1 epochs", "data__block_size": 64, "checkpoint__every": "never", "evaluate__every": "never",
        "guard__max_skips": 0,
    }  # fmt: skip
    assert train(request(text, text / "measured", **options)) == [EXIT_FINISHED]
    steps = len(losses(text / "measured"))
    options["checkpoint__every"] = f"{steps - 1} steps"
    argv = request(text, run_dir, **options)
    assert run_ranks(_train_with_nan, 1, argv, [12 * (steps - 1)]) == [EXIT_FINISHED]
    assert [r["step"] for r in read_metrics(run_dir / "metrics.jsonl", kind="eval")] == [steps - 1]
    assert run_ranks(_train_with_nan, 1, argv, [12 * (steps - 1)]) == [EXIT_FINISHED]
    events = [r["event"] for r in read_metrics(run_dir / "metrics.jsonl", kind="event")]
    assert events.count("rewind") <= 1


def test_early_stopping_does_not_hide_a_step_that_was_not_finite(text: Path) -> None:
    run_dir = text / "early-nan"
    options = {
        "train__duration": "12 steps", "checkpoint__every": "never", "evaluate__every": "4 steps",
        "evaluate__early_stopping__target": 100.0,
    }  # fmt: skip
    assert run_ranks(_train_with_nan, 1, request(text, run_dir, **options), [40]) == [EXIT_FINISHED]
    records = list(read_metrics(run_dir / "metrics.jsonl", kind="event"))
    assert [r["step"] for r in records if r["event"] == "skip"] == [4]
    assert "target" in records[-1]["reason"]


def test_step_is_checked_before_its_evaluation_ends_the_run(text: Path) -> None:
    """A rewind that was announced and not made would leave the report with one more than there were."""
    run_dir = text / "early-rewind"
    options = {
        "train__duration": "12 steps", "checkpoint__every": "3 steps", "evaluate__every": "4 steps",
        "evaluate__early_stopping__target": 100.0, "guard__max_skips": 0,
    }  # fmt: skip
    assert run_ranks(_train_with_nan, 1, request(text, run_dir, **options), [40]) == [EXIT_FINISHED]
    events = [r["event"] for r in read_metrics(run_dir / "metrics.jsonl", kind="event")]
    assert [events.count(one) for one in ("rewind", "rewound")] == [1, 1]
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]


def _train_and_fail(argv: list[str], step: int, twice: bool) -> int:
    """As ``train_in_rank``, with an exception in a step, and another in the save that it brings about."""
    from lmcore.engine.engine import Engine
    from lmcore.run.trainer import Run

    forward, save = Engine.forward, Run.save
    runs: list[Any] = []

    def failing_forward(self: Any, batch: Any, key: int | None = None) -> Any:
        if key is not None and key >= 12 * (step - 1):
            raise ValueError("the first error")
        return forward(self, batch, key)

    def failing_save(self: Any, reason: str) -> None:
        runs.append(self)
        if reason == "exception" and twice:
            raise OSError("the second error")
        save(self, reason)

    Engine.forward, Run.save = failing_forward, failing_save
    try:
        return train_in_rank(argv, None, 0)
    except ValueError:
        return 1


def test_first_error_is_told_where_the_save_fails_too(text: Path) -> None:
    run_dir = text / "fails-twice"
    argv = request(
        text, run_dir, train__duration="8 steps", checkpoint__every="never", evaluate__every="never"
    )
    assert run_ranks(_train_and_fail, 1, argv, 5, True) == [1]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "the first error" in status["reason"]


def test_evaluation_before_an_exception_is_not_repeated(text: Path) -> None:
    run_dir = text / "fails-once"
    argv = request(
        text, run_dir, train__duration="8 steps", checkpoint__every="never", evaluate__every="2 steps"
    )
    assert run_ranks(_train_and_fail, 1, argv, 5, False) == [1]
    assert train(argv) == [EXIT_FINISHED]
    scored = [r["step"] for r in read_metrics(run_dir / "metrics.jsonl", kind="eval")]
    assert scored == [2, 4, 6, 8]


def test_epoch_means_after_a_resume_at_the_end_of_an_epoch(text: Path) -> None:
    options = {
        "data__block_size": 64,
        "evaluate__every": "never",
        "checkpoint__every": "1 epochs",
        "checkpoint__keep": 10,
    }
    argv = request(text, text / "two-epochs", train__duration="2 epochs", **options)
    assert train(argv) == [EXIT_FINISHED]

    def ended() -> list[tuple[int, int, float]]:
        records = read_metrics(text / "two-epochs" / "metrics.jsonl", kind="epoch")
        return [(r["epoch"], r["step"], r["train_loss"]) for r in records]

    whole = ended()
    assert [epoch for epoch, _, _ in whole] == [1, 2]
    first, last = sorted((text / "two-epochs" / "checkpoints").glob("step-*"))[-2:]
    assert int(first.name[5:]) == whole[0][1]
    shutil.rmtree(last)
    (text / "two-epochs" / "status.json").unlink()
    assert train(argv) == [EXIT_FINISHED]
    assert ended() == whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_stream_of_several_ranks_goes_over_the_end_of_an_epoch(text: Path, world_size: int) -> None:
    """Each rank knows its own lanes only; rank 0 says when an epoch ends, for all at the same step."""
    options = {
        "data__mode": "stream", "data__block_size": 64, "data__shuffle_window": 12, "train__duration": "40 steps",
        "train__micro_batch_blocks": 2, "evaluate__every": "never", "checkpoint__every": "never",
    }  # fmt: skip

    def run(size: int) -> list[dict[str, Any]]:
        folder = text / f"over-the-end-{world_size}-{size}"
        assert train(request(text, folder, **options), world_size=size) == [EXIT_FINISHED] * size
        return [
            {name: record.get(name) for name in ("kind", "step", "epoch")}
            for record in read_metrics(folder / "metrics.jsonl")
            if record["kind"] in ("train", "epoch")
        ]

    alone = run(1)
    assert max(record["epoch"] for record in alone if record["kind"] == "epoch") >= 2
    assert run(world_size) == alone


def test_too_many_rewinds_end_the_run_with_the_evidence(text: Path) -> None:
    run_dir = text / "hopeless"
    options = {"train__duration": "8 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}
    argv = request(text, run_dir, **options, guard__max_skips=0, guard__max_rewinds=1)
    assert run_ranks(_train_with_nan, 1, argv, list(range(36, 10_000))) == [EXIT_FAULT]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAULT)
    assert "positions" in status["reason"]


def _train_with_a_flipped_bit(argv: list[str], at_step: int, victim: int) -> int:
    """As ``train_in_rank``; after step ``at_step`` one bit of one weight of one rank is another, as a faulty device leaves
    it.
    """
    import torch

    from lmcore.run.trainer import Run

    record = Run.record

    def flips(self: Any, *step: Any, **numbers: Any) -> None:
        if self.state.step + 1 == at_step and self.engine.rank == victim:
            _, weight = self._weights()[3]
            weight.detach().view(-1).view(torch.int32)[5] ^= 1 << 12
        record(self, *step, **numbers)

    Run.record = flips
    return train_in_rank(argv, None, 0)


def test_diverged_rank_is_found_at_the_next_check(text: Path) -> None:
    run_dir, straight = text / "diverged", text / "not-diverged"
    options = {
        "train__duration": "12 steps",
        "train__micro_batch_blocks": 4,
        "checkpoint__every": "5 steps",
        "evaluate__every": "never",
        "guard__hash_every": "4 steps",
    }
    argv = request(text, run_dir, **options)
    assert run_ranks(_train_with_a_flipped_bit, 3, argv, 6, 1, timeout=240) == [EXIT_FAULT] * 3
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAULT)
    assert "the weights of rank 1 differ from the others' at step 8" in status["reason"]
    assert train(argv, 3) == [EXIT_FINISHED] * 3, "the checkpoint before it was good"
    assert train(request(text, straight, **options), 3) == [EXIT_FINISHED] * 3
    assert losses(run_dir) == losses(straight)
    assert_same_state(weights(run_dir), weights(straight))


def _train_with_a_large_gradient(argv: list[str], at_step: int, factor: float) -> int:
    """As ``train_in_rank``; the loss of the last rank is ``factor`` times itself in one step."""
    from lmcore.engine.engine import Engine
    from lmcore.run.trainer import Run

    backward, rate = Engine.backward, Run.learning_rate
    now = [-1]

    def noted(run: Run) -> float:
        now[0] = run.state.step
        return rate(run)

    def scaled(self: Any, loss_sum: Any, labels: Any) -> None:
        large = now[0] + 1 == at_step and self.rank == self.world_size - 1
        backward(self, loss_sum * factor if large else loss_sum, labels)

    Run.learning_rate, Engine.backward = noted, scaled
    return train_in_rank(argv, None, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_spike_skip_holds_the_update_back_on_every_rank(text: Path, world_size: int) -> None:
    """The run whose gradient was 1,000 times too large in one step is that in which the same step had no number."""
    options = {
        "train__duration": "16 steps",
        "checkpoint__every": "never",
        "evaluate__every": "never",
        "guard__spike": "skip",
        "guard__spike_window": 10,
        "guard__spike_sigma": 30,
    }
    found = {}
    for name, factor in (("large", 1e3), ("nan", math.nan)):
        run_dir = found[name] = text / f"spike-{name}-{world_size}"
        argv = request(text, run_dir, **options)
        codes = run_ranks(_train_with_a_large_gradient, world_size, argv, 13, factor, timeout=240)
        assert codes == [EXIT_FINISHED] * world_size
        skips = [r for r in read_metrics(run_dir / "metrics.jsonl", kind="event") if r["event"] == "skip"]
        assert [skip["step"] for skip in skips] == [13]
        assert skips[0]["positions"] == [[144, 156]]
        assert ("above the spike limit" in skips[0]["reason"]) == (name == "large")
    assert losses(found["large"]) == losses(found["nan"])
    assert_same_state(weights(found["large"]), weights(found["nan"]))


def test_spike_skip_is_refused_under_zero(text: Path) -> None:
    options = {"guard__spike": "skip", "engine__deepspeed": ROOT / "ds_configs" / "zero2.json"}
    argv = request(text, text / "spike-zero", **options)
    assert run_ranks(train_in_rank, 1, argv, None, 0, env={"ACCELERATE_USE_DEEPSPEED": "true"}) == [
        EXIT_REQUEST
    ]
    assert not (text / "spike-zero" / "tokenizer").exists(), "before any work"


def _train_with_a_slow_disk(argv: list[str], steps: int) -> int:
    """As ``train_in_rank``; a save is committed when training has gone on by three steps, no sooner and no later. (If training
    waits for it, after 60 s.)
    """
    from lmcore import disk
    from lmcore.run.trainer import Run

    record, save, now, moved = Run.record, Run.save, [0], threading.Condition()
    saved_at = [steps]

    def noted(self: Any, reason: str) -> None:
        save(self, reason)
        saved_at[0] = self.state.step

    def told(self: Any, *step: Any, **numbers: Any) -> None:
        record(self, *step, **numbers)
        with moved:
            now[0] = self.state.step
            moved.notify_all()
        while self.engine.is_main and now[0] >= saved_at[0] + 3 and self.saves.busy:
            time.sleep(0.002)  # a slow disk or a thread without a core: not what this is about

    def slow(call: Any) -> None:
        name = Path(call.target).name
        if call.operation == "rename" and name.startswith("step-"):
            goal = min(int(name.removeprefix("step-")) + 3, steps)
            with moved:
                moved.wait_for(lambda: now[0] >= goal, timeout=60)

    Run.record, Run.save, disk.DISK.before = told, noted, slow
    return train_in_rank(argv, None, 0)


def test_save_by_time_does_not_wait_for_the_previous_save(text: Path) -> None:
    run_dir = text / "slow-disk"
    options = {**SHORT, "train__duration": "40 steps", "checkpoint__every": "0.001 s"}
    assert run_ranks(_train_with_a_slow_disk, 2, request(text, run_dir, **options), 40) == [EXIT_FINISHED] * 2
    events = read_metrics(run_dir / "metrics.jsonl", kind="event")
    saves = [(r["step"], r["reason"]) for r in events if r["event"] == "checkpoint"]
    by_the_clock = [step for step, reason in saves if reason == "interval"]
    assert by_the_clock[0] == 1
    assert len(by_the_clock) >= 2  # and it does come again, long before the horizon
    assert all(later - earlier >= 3 for earlier, later in pairwise(by_the_clock)), saves
    assert saves[-1] == (40, "end")  # the horizon's own save comes whenever the last one by the clock was


def _recomputed_layers(argv: list[str]) -> int:
    """As ``train_in_rank``; how many layers are run by way of torch's checkpoint, in the trainer itself."""
    from torch._subclasses.fake_tensor import FakeTensor

    import lmcore.model.module

    layers, recomputed = set(), lmcore.model.module._recomputed

    def seen(forward: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], FakeTensor):  # of the plan's traced step
            layers.add(id(layer))
        return recomputed(forward, layer, *args, **kwargs)

    lmcore.model.module._recomputed = seen
    assert train_in_rank(argv, None, 0) == EXIT_FINISHED
    return len(layers)


@pytest.mark.slow
def test_every_layer_or_every_second_one_is_recomputed_and_nothing_changes(text: Path) -> None:
    found = {}
    for choice in ("false", "true", "2"):
        options = {**SHORT, "model__config__n_layer": 3, "train__activation_checkpointing": choice}
        found[choice] = run_ranks(
            _recomputed_layers, 1, request(text, text / f"recomputed-{choice}", **options)
        )
    assert found == {"false": [0], "true": [3], "2": [2]}
    assert (
        losses(text / "recomputed-false") == losses(text / "recomputed-true") == losses(text / "recomputed-2")
    )


def _train_with_an_error(argv: list[str], at_step: int) -> str:
    from lmcore.run.trainer import Run

    rate = Run.learning_rate

    def fails(run: Run) -> float:
        if run.state.step == at_step:
            raise OSError("the disk of the data is gone")
        return rate(run)

    Run.learning_rate = fails
    try:
        train_in_rank(argv, None, 0)
    except OSError as error:
        return str(error)
    return ""


def test_checkpoints_to_keep_for_ever_are_saved(text: Path) -> None:
    """Also where ``checkpoint.every`` has no step in common with ``checkpoint.keep_every``."""
    run_dir = text / "keep-every"
    argv = request(
        text,
        run_dir,
        train__duration="7 steps",
        checkpoint__every="5 steps",
        checkpoint__keep_every="3 steps",
        checkpoint__keep=1,
        evaluate__every="never",
    )
    assert train(argv) == [EXIT_FINISHED]
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006", "step-00000007"]


def test_exception_saves_first_and_is_raised(text: Path) -> None:
    run_dir = text / "exception"
    assert "gone" in run_ranks(_train_with_an_error, 1, request(text, run_dir, **SHORT), 4)[0]
    assert [p.name for p in (run_dir / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert train(request(text, run_dir, **SHORT)) == [EXIT_FINISHED]
    straight = text / "no-exception"
    assert train(request(text, straight, **SHORT)) == [EXIT_FINISHED]
    assert losses(run_dir) == losses(straight)


def test_fast_dev_run_goes_through_every_part(text: Path) -> None:
    run_dir = text / "fast"
    argv = [*request(text, run_dir, data__train=str(text / "*.txt")), "--fast_dev_run"]
    assert train(argv) == [EXIT_FINISHED]
    for name in ("export/model.safetensors", "report.html", "checkpoints/step-00000004/manifest.json"):
        assert (run_dir / name).exists(), name
    assert os.listdir(run_dir / "sample")


def test_fast_dev_run_of_token_files_and_of_text_that_cannot_be_read(text: Path) -> None:
    assert train(request(text, text / "first", train__duration="2 steps")) == [EXIT_FINISHED]
    store = next(path for path in (text / "stores").iterdir() if path.name.startswith("train-"))
    argv = request(text, text / "tokens", data__train=store, tokenizer__path=text / "first" / "tokenizer")
    del argv[argv.index("--tokenizer.vocab_size") :][:2]
    assert train([*argv, "--tokenizer.vocab_size", "null", "--fast_dev_run"]) == [EXIT_FINISHED]
    (text / "sjis.txt").write_bytes("吾輩は猫である。\n".encode("cp932") * 99)
    argv = [*request(text, text / "bad", data__train=text / "sjis.txt"), "--fast_dev_run"]
    assert train(argv) == [EXIT_REQUEST]
    reason = (
        json.loads((text / "bad" / "status.json").read_text())["reason"]
        if (text / "bad" / "status.json").exists()
        else ""
    )
    assert not reason or "set data.encoding" in reason


def test_auto_precision_keeps_the_fp32_that_a_run_on_a_cpu_began_in(text: Path) -> None:
    """Bit for bit: a run of an older version, which took fp32, is not continued in bf16."""
    expected = request(text, text / "fp32", train__duration="6 steps")
    assert train(expected) == [EXIT_FINISHED]
    argv = request(text, text / "fp32-then-auto", train__duration="6 steps")
    assert train(argv, kill_before_step=3) == [EXIT_SAVED]
    auto = request(text, text / "fp32-then-auto", train__duration="6 steps", train__precision="auto")
    assert train(auto) == [EXIT_FINISHED]
    assert losses(text / "fp32-then-auto") == losses(text / "fp32")


def test_early_stopping_is_off_where_nothing_is_evaluated(text: Path) -> None:
    options: dict[str, Any] = {
        "train__duration": "30 steps",
        "evaluate__every": "never",
        "report__every": "10",
    }
    assert train(request(text, text / "unevaluated", **options)) == [EXIT_FINISHED]
    assert "early stopping" not in (text / "unevaluated" / "train.log").read_text(encoding="utf-8")


def test_early_stopping_is_on_by_default_where_text_is_repeated(text: Path) -> None:
    """Four evaluations without an improvement by 0.5, over a text that is seen more than twice."""
    options: dict[str, Any] = {
        "train__duration": "30 steps", "evaluate__every": "2 steps", "checkpoint__every": "never",
        "optim__lr": 1e-5, "evaluate__early_stopping__threshold": 0.5,
    }  # fmt: skip
    assert train(request(text, text / "stops", **options)) == [EXIT_FINISHED]
    assert max(losses(text / "stops")) == 8
    log = (text / "stops" / "train.log").read_text(encoding="utf-8")
    assert "early stopping: after 3 evaluations without improvement, because the text is seen" in log
    off = options | {"evaluate__early_stopping__patience": 0, "train__duration": "16 steps"}
    assert train(request(text, text / "goes-on", **off)) == [EXIT_FINISHED]
    assert max(losses(text / "goes-on")) == 16
