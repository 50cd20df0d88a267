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
from tests.support.whole_runs import request, train, write_texts

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
