"""Which checkpoint a run starts from, whatever was done to its folder in between."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lmcore.errors import EXIT_FINISHED, EXIT_REQUEST, EXIT_SAVED
from lmcore.report.metrics import read_metrics
from tests.support.fork_server import RankFailure
from tests.support.whole_runs import assert_same_state, request, train, weights, write_texts

SHORT = {"train__duration": "8 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=300, held=30)


def starts(run_dir: Path) -> list[tuple[str, int]]:
    """(event, step) of every start of a run."""
    events: list[dict[str, Any]] = read_metrics(run_dir / "metrics.jsonl", kind="event")
    return [(e["event"], e["step"]) for e in events if e["event"] in ("start", "resume")]


@pytest.mark.parametrize("how", ["removed", "renamed", "removed_with_status"])
def test_resume_is_refused_if_the_checkpoints_of_a_run_are_gone(text: Path, how: str) -> None:
    run_dir = text / how
    argv = request(text, run_dir, **SHORT)
    assert train(argv, kill_before_step=5) == [EXIT_SAVED]
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        if how != "renamed":
            shutil.rmtree(path)
        else:
            path.rename(text / f"{how}-{path.name}.bak")
    if how == "removed_with_status":
        shutil.rmtree(run_dir / "checkpoints")
        (run_dir / "status.json").unlink()
    for _ in range(2):  # the refusal leaves what it was decided by
        assert train(argv) == [EXIT_REQUEST]
        if how == "removed_with_status":  # a refusal makes none
            continue
        status = json.loads((run_dir / "status.json").read_text())
        assert status["state"] == "failed"
        assert "saved step 6" in status["reason"]
    assert train([*argv, "--resume", "never"]) == [EXIT_FINISHED]
    assert starts(run_dir)[-1] == ("start", 0)


def test_resume_from_an_older_checkpoint_than_the_last_is_said(text: Path) -> None:
    run_dir = text / "older"
    argv = request(text, run_dir, **SHORT)
    assert train(argv, kill_before_step=5) == [EXIT_SAVED]
    newest = max((run_dir / "checkpoints").glob("step-*"))
    newest.rename(text / "somewhere else")
    assert train(argv) == [EXIT_FINISHED]
    assert re.search(
        r"this run saved step 6, but \S+ has nothing newer", (run_dir / "train.log").read_text("utf-8")
    )


@pytest.mark.parametrize("kill_with", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_resume_never_counts_once_for_a_command(text: Path, kill_with: int) -> None:
    """A requeued job repeats its command: it must not start over each time."""
    run_dir = text / f"never-{kill_with}"
    assert train(request(text, run_dir, **SHORT)) == [EXIT_FINISHED]
    argv = [*request(text, run_dir, **SHORT), "--resume", "never"]
    with contextlib.suppress(RankFailure):  # how a rank that was killed is told
        assert train(argv, kill_before_step=5, kill_with=kill_with) == [EXIT_SAVED]
    assert train(argv) == [EXIT_FINISHED]
    assert [event for event, _ in starts(run_dir)] == ["start", "start", "resume"]
    assert starts(run_dir)[-1][1] >= 2
    assert train(argv) == [EXIT_FINISHED], "after its end the same words start over"
    assert starts(run_dir)[-1] == ("start", 0)


def test_resume_from_a_given_checkpoint_counts_once_for_a_command(text: Path) -> None:
    """A refusal does not count: what was asked for was not done."""
    run_dir = text / "given"
    assert train(request(text, run_dir, **SHORT), kill_before_step=5) == [EXIT_SAVED]
    argv = [*request(text, run_dir, **SHORT), "--resume", "step-00000002"]
    hidden = (run_dir / "checkpoints" / "step-00000002").rename(text / "hidden")
    assert train(argv) == [EXIT_REQUEST]
    hidden.rename(run_dir / "checkpoints" / "step-00000002")
    assert train(argv, kill_before_step=7) == [EXIT_SAVED]
    assert train(argv) == [EXIT_FINISHED]
    assert [step for _, step in starts(run_dir)] == [0, 2, 8]


def own_run(folder: Path, data: str = "data", **options: Any) -> list[str]:
    """A run of the user's own model, data and loss."""
    given = {
        "run_dir": folder,
        "data.factory": f"tests.support.own_parts:{data}",
        "data.config.count": 64,
        "model.type": "null",
        "model.factory": "tests.support.own_parts:model",
        "model.config.width": 8,
        "loss.factory": "tests.support.own_parts:squares",
        "train.duration": "6 steps",
        "train.global_batch_blocks": 8,
        "train.micro_batch_blocks": 4,
        "train.precision": "fp32",
        "optim.schedule": "constant",
        "checkpoint.every": "3 steps",
        "evaluate.every": "never",
        "report.trackers": "[]",
    } | {name.replace("__", "."): value for name, value in options.items()}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [("adamw", None), ("sgd", None), ("sgd", "linear 0 0.9"), ("torch.optim:RAdam", None)],
)
def test_model_with_a_buffer_resumes_bit_for_bit(
    tmp_path: Path, optimizer: str, momentum: str | None
) -> None:
    """A buffer belongs to the checkpoint, and the optimizer counts no steps for it. A momentum that begins at 0 is resumed."""
    options = {} if momentum is None else {"optim__momentum": momentum}
    argv = own_run(tmp_path / "run", optim__name=optimizer, **options)
    assert train(argv) == [EXIT_FINISHED]
    whole = weights(tmp_path / "run")
    assert any("scale" in name for name in whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    (tmp_path / "run" / "status.json").unlink()
    assert train(argv) == [EXIT_FINISHED]
    assert_same_state(weights(tmp_path / "run"), whole)


def test_own_collate_makes_the_batches_of_the_validation_too(tmp_path: Path) -> None:
    """Doubled labels: a net that has learned them has a small loss on the validation set as well."""
    options = {"train__duration": "200 steps", "optim__lr": 0.03, "data": "pairs"}
    assert train(own_run(tmp_path / "run", **options)) == [EXIT_FINISHED]
    [record] = read_metrics(tmp_path / "run" / "metrics.jsonl", kind="eval")
    assert (
        record["loss"] < 0.5
    )  # the labels are between -2 and 4; without doubling they would be 1 away on average


def test_losses_of_another_validation_text_are_not_compared(text: Path) -> None:
    """An easy text gave way to a hard one under the same name: the best of the easy one must not be exported."""
    run_dir, held = text / "other-valid", text / "other.txt"
    options = {
        "data__valid": held, "evaluate__every": "4 steps", "checkpoint__keep_best__k": 1, "checkpoint__keep": 1,
        "checkpoint__export": "best", "evaluate__early_stopping__patience": 1,
    }  # fmt: skip
    held.write_text("alpha beta\n" * 40, encoding="utf-8")
    assert train(request(text, run_dir, **options, train__duration="8 steps")) == [EXIT_FINISHED]
    held.write_text("Quite another text, in WORDS.\n" * 40, encoding="utf-8")
    assert train(request(text, run_dir, **options, train__duration="16 steps")) == [EXIT_FINISHED]
    scored = read_metrics(run_dir / "metrics.jsonl", kind="eval")
    losses = {record["step"]: record["loss"] for record in scored}
    later = {step: loss for step, loss in losses.items() if step > 8}
    best = min(later, key=lambda step: later[step])
    assert losses[4] < later[best]
    assert max(losses) == 16  # nor was it stopped by the losses of before
    assert (run_dir / "checkpoints" / "best").readlink() == Path(f"step-{best:08d}")
    assert "evaluations up to step 8 were of other data" in (run_dir / "train.log").read_text()
    # The checkpoint of step 8 was evaluated again, on the new text: it can be compared, and those before it cannot.
    manifest = json.loads((run_dir / "checkpoints" / "step-00000016" / "manifest.json").read_text())
    assert manifest["measured_after"] == 7


def test_allowed_changes_of_data_and_seed_are_enough(tmp_path: Path, text: Path) -> None:
    argv = request(text, tmp_path / "run", train__duration="4 steps")
    assert train(argv) == [EXIT_FINISHED]
    longer = request(text, tmp_path / "run", train__duration="6 steps", seed=9)
    assert train(longer) == [EXIT_REQUEST]
    assert train([*longer, "--allow_changes", "seed"]) == [EXIT_FINISHED]
    blocks = request(text, tmp_path / "run", train__duration="8 steps", seed=9, data__shuffle="blocks")
    assert train([*blocks, "--allow_changes", "seed"]) == [EXIT_REQUEST]
    assert train([*blocks, "--allow_changes", "data.shuffle"]) == [EXIT_FINISHED]
    assert train([*blocks, "--allow_changes", "data.shufle"]) == [EXIT_REQUEST]


@pytest.mark.parametrize("world_size", [2, 4])
def test_iterable_of_several_ranks_goes_over_the_end_of_a_pass(tmp_path: Path, world_size: int) -> None:
    """Each rank knows what it has read; rank 0 says when a pass ends, for all at the same step."""
    options = {"train__duration": "20 steps", "train__micro_batch_blocks": 2, "report__every": 1}
    for size in (1, world_size):
        argv = own_run(tmp_path / str(size), "iterable", **options)
        assert train(argv, world_size=size) == [EXIT_FINISHED] * size
    ended = [
        list(read_metrics(tmp_path / str(size) / "metrics.jsonl", kind="epoch")) for size in (1, world_size)
    ]
    assert [record["epoch"] for record in ended[0]] == [1, 2]
    assert [record["epoch"] for record in ended[1]] == [1, 2]
    [scored] = read_metrics(tmp_path / str(world_size) / "metrics.jsonl", kind="eval")
    assert scored["epoch"] == 2
