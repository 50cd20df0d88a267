"""How a run that fails says so: to scripts by status.json, to people by the webhook, to trackers by what they have."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lmcore.disk import DISK, Call
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_SAVED
from lmcore.run.guard import EXIT_STUCK
from tests.support.fork_server import RankFailure, run_ranks
from tests.support.trackers import read_tensorboard, web_server
from tests.support.whole_runs import request, train_in_rank, write_texts

SHORT = {"train__duration": "8 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=300, held=30)


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

    Run.record, Engine.forward = counted, faulty
    return train_in_rank(argv, None, 0)


def test_webhook_gets_rewinds_faults_and_the_end(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_crash_reaches_status_and_webhook(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = text / "crash"
    with web_server() as (url, received):
        monkeypatch.setenv("LMCORE_WEBHOOK", url)
        with pytest.raises(RankFailure, match="a column of mine"):
            run_ranks(_train_and_fail, 1, request(text, run_dir, **SHORT), "crash")
    assert status(run_dir) == ("failed", 1)
    assert [post["text"] for post in received] == ["crash: failed: KeyError: 'a column of mine'"]


def test_stuck_rank_reaches_status_and_webhook(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = text / "stuck"
    with web_server() as (url, received):
        monkeypatch.setenv("LMCORE_WEBHOOK", url)
        with pytest.raises(RankFailure):
            run_ranks(_train_and_fail, 2, request(text, run_dir, **SHORT, guard__stuck_seconds=5), "stuck")
    assert status(run_dir) == ("failed", EXIT_STUCK)
    assert len(received) == 1, "one rank speaks for all"
    assert received[0]["text"].startswith("stuck: failed: rank ")
    assert "no progress for 5 s" in received[0]["text"]


def test_connection_lost_while_the_ranks_meet_ends_with_71(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has died inside the rendezvous, and torch is faster to say that a connection was reset."""
    from lmcore.config import parse
    from lmcore.run import trainer

    def reset(*_arguments: Any, **_more: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(trainer.setup, "open_engine", reset)
    monkeypatch.setattr(trainer, "leaving", lambda error: None)
    monkeypatch.setattr(trainer, "report_dead_rank", lambda: EXIT_STUCK)  # and names it
    config = parse.parse(request(text, tmp_path / "run", **SHORT), default_recipe=None)
    with pytest.raises(RuntimeError), trainer.Run(config):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ending, trainer.Run(config):
        pass
    assert ending.value.code == EXIT_STUCK


def _train_and_interrupt_the_compiler(argv: list[str]) -> int:
    """As ``train_in_rank``; SIGTERM to the process group ends the compiler that the first step has started."""
    import os
    import signal

    from torch._inductor.exc import InductorError

    from lmcore.engine.engine import Engine

    def forward(self: Any, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise InductorError(RuntimeError("g++: fatal error: Terminated\n" * 5_000), None)

    Engine.forward = forward
    return train_in_rank(argv, None, 0)


def _train_on_a_disk_that_fills(argv: list[str], first: str) -> tuple[int, str]:
    """As ``train_in_rank``; rank 0 can write nothing more from the first change of a file called ``first`` on."""
    full = [False]

    def before(call: Call) -> None:
        full[0] = full[0] or first in call.path
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.path)

    if os.environ.get("RANK", "0") == "0":
        DISK.before = before
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = train_in_rank(argv, None, 0)
    return code, error.getvalue()


@pytest.mark.parametrize(
    ("first", "world_size"),
    [
        ("status.json", 1), ("stores.json", 1), ("tokenizer.model", 1), ("tokenizer", 2), ("config.yaml", 1), ("checkpoints", 1),
    ],
)  # fmt: skip
def test_disk_that_fills_while_the_run_starts_ends_it_with_one_line(
    text: Path, tmp_path: Path, first: str, world_size: int
) -> None:
    run_dir = tmp_path / "run"
    argv = request(text, run_dir, **SHORT, data__store_dir=tmp_path / "stores")
    answers = run_ranks(_train_on_a_disk_that_fills, world_size, argv, first)
    assert {code for code, _ in answers} == {EXIT_FAULT}
    said = answers[0][1]
    assert "No space left on device" in said
    assert "Traceback" not in said
    if first != "status.json":
        assert status(run_dir) == ("failed", EXIT_FAULT)


def test_signal_while_compiling_saves_and_ends(text: Path) -> None:
    run_dir = text / "compiling"
    assert run_ranks(_train_and_interrupt_the_compiler, 1, request(text, run_dir, **SHORT)) == [EXIT_SAVED]
    said = json.loads((run_dir / "status.json").read_text())
    assert (said["state"], said["exit_code"]) == ("saved", EXIT_SAVED)
    assert len(said["reason"]) < 100
