"""How a run that fails says so: to scripts by status.json, to people by the webhook, to trackers by what they have."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_SAVED
from lmcore.run.guard import EXIT_STUCK
from tests.support.fork_server import RankFailure, run_ranks
from tests.support.trackers import read_tensorboard, web_server
from tests.support.whole_runs import request, train_in_rank, words

SHORT = {"train__duration": "8 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(300, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(30, 1), encoding="utf-8")
    return folder


def status(run_dir: Path) -> tuple[str, int]:
    said = json.loads((run_dir / "status.json").read_text())
    return said["state"], said["exit_code"]


def _train_and_fail(argv: list[str], how: str) -> int:
    """As ``train_in_rank``; what the third step has to bear is ``how``."""
    import torch

    from lmcore.engine.engine import Engine
    from lmcore.run.trainer import Run

    record, forward = Run.record, Engine.forward
    step = [1]

    def counted(self: Any, *arguments: Any, **numbers: Any) -> None:
        record(self, *arguments, **numbers)
        step[0] = self.state.step + 1

    def faulty(self: Any, *arguments: Any) -> Any:
        if step[0] >= 3 and how == "crash":
            raise KeyError("a column of mine")
        if step[0] >= 3 and how == "stuck" and self.rank == 1:
            time.sleep(1000)
        loss_sum, count = forward(self, *arguments)
        return (loss_sum * torch.nan if how == "nan" and step[0] >= 3 else loss_sum), count

    Run.record, Engine.forward = counted, faulty  # type: ignore[method-assign]
    return train_in_rank(argv, None, 0)


def test_the_webhook_hears_of_the_end_of_rewinds_and_of_faults(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server() as (url, received):
        monkeypatch.setenv("LMCORE_WEBHOOK", url)
        whole = request(text, text / "whole", **SHORT)
        assert run_ranks(train_in_rank, 1, whole, None, 0) == [EXIT_FINISHED]
        assert [post["text"] for post in received] == ["whole: finished at step 8: reached train.duration"]
        received.clear()
        options = {
            **SHORT,
            "guard__max_skips": 0,
            "guard__max_rewinds": 1,
            "report__trackers": "[tensorboard]",
        }
        argv = request(text, text / "hopeless", **options)
        assert run_ranks(_train_and_fail, 1, argv, "nan") == [EXIT_FAULT]
    assert status(text / "hopeless") == ("failed", EXIT_FAULT)
    rewound, failed = (post["text"] for post in received)
    assert rewound.startswith("hopeless: rewound to step 2: ")
    assert failed.startswith("hopeless: failed: ")
    steps = [step for step, _ in read_tensorboard(text / "hopeless" / "tensorboard")["train/loss"]]
    assert steps[:2] == [1, 2], "what the tracker was told before the fault is in its file"


def test_a_crash_is_a_failure_for_scripts_and_for_the_webhook(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = text / "crash"
    with web_server() as (url, received):
        monkeypatch.setenv("LMCORE_WEBHOOK", url)
        with pytest.raises(RankFailure, match="a column of mine"):
            run_ranks(_train_and_fail, 1, request(text, run_dir, **SHORT), "crash")
    assert status(run_dir) == ("failed", 1)
    assert [post["text"] for post in received] == ["crash: failed: KeyError: 'a column of mine'"]


def test_a_stuck_rank_is_a_failure_for_scripts_and_for_the_webhook(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = text / "stuck"
    with web_server() as (url, received):
        monkeypatch.setenv("LMCORE_WEBHOOK", url)
        with pytest.raises(RankFailure):
            run_ranks(_train_and_fail, 2, request(text, run_dir, **SHORT, guard__stuck_seconds=5), "stuck")
    assert status(run_dir) == ("failed", EXIT_STUCK)
    assert len(received) == 1, "one rank speaks for all"
    assert received[0]["text"].startswith("stuck: failed: rank ")
    assert "no progress for 5 s" in received[0]["text"]


def _train_and_interrupt_the_compiler(argv: list[str]) -> int:
    """As ``train_in_rank``; SIGTERM to the process group ends the compiler that the first step has started."""
    import os
    import signal

    from torch._inductor.exc import InductorError

    from lmcore.engine.engine import Engine

    def forward(self: Any, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise InductorError(RuntimeError("g++: fatal error: Terminated\n" * 5_000), None)

    Engine.forward = forward  # type: ignore[method-assign]
    return train_in_rank(argv, None, 0)


def test_a_signal_while_compiling_ends_as_saved(text: Path) -> None:
    run_dir = text / "compiling"
    assert run_ranks(_train_and_interrupt_the_compiler, 1, request(text, run_dir, **SHORT)) == [EXIT_SAVED]
    said = json.loads((run_dir / "status.json").read_text())
    assert (said["state"], said["exit_code"]) == ("saved", EXIT_SAVED)
    assert len(said["reason"]) < 100
