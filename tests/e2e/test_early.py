"""Before the text is tokenized, which may take hours, wrong requests are refused; a signal then says what is kept."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import unittest.mock
from pathlib import Path

import pytest

from lmcore.errors import EXIT_REQUEST, EXIT_SAVED
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import request, train_in_rank, words


def _train_and_say(argv: list[str]) -> tuple[int, str]:
    """As ``train_in_rank``, with what it says on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return train_in_rank(argv, None, 0), said.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report.trackers": "[wandbb]"}, "report.trackers: unknown tracker 'wandbb'"),
        ({"report.trackers": "[clearml]"}, "report.trackers: clearml is not installed: pip install clearml"),
        ({"report.webhook": "ftp://hooks"}, "report.webhook: not a http:// or https:// address"),
        (
            {"loss.factory": "tests.support.own_parts:nothing"},
            "loss.factory 'tests.support.own_parts:nothing'",
        ),
        (
            {"model.type": "null", "model.factory": "nowhere:model"},
            "model.factory 'nowhere:model': cannot import",
        ),
        (
            {"model.config.n_head": 3},
            "model.config.n_embd must be a multiple of model.config.n_head 3 (got 32); try 30 or 33",
        ),
        ({"optim.warmup": "1e6 tokens"}, "optim.warmup of 5209 steps do not fit into a run of 20 steps"),
        (
            {"optim.schedule": "0: 0, 50: 1, 100%: 0"},
            "0: 0, 50 steps: 1, 100%: 0: 100% comes no later than 50 steps",
        ),
    ],
)
def test_wrong_request_is_refused_before_tokenizing(
    tmp_path: Path, options: dict[str, object], said: str
) -> None:
    (tmp_path / "train.txt").write_text(words(20, 0), encoding="utf-8")
    (tmp_path / "held.txt").write_text(words(10, 1), encoding="utf-8")
    argv = request(tmp_path, tmp_path / "run")
    if "model.type" in options:
        pairs = zip(argv[::2], argv[1::2])
        argv = [word for pair in pairs if not pair[0].startswith("--model.") for word in pair]
    argv += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    [(code, line)] = run_ranks(_train_and_say, 1, argv)
    assert code == EXIT_REQUEST
    assert line.removeprefix("train_lm.py: ").startswith(said)
    assert line.count("\n") == 1
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert not (tmp_path / "run" / "status.json").exists(), "nothing was changed"
    assert not (tmp_path / "stores").exists()


def _refused_before_preparing(argv: list[str]) -> tuple[int, str]:
    from lmcore.engine.engine import Engine

    def prepare(*_: object, **__: object) -> None:
        raise AssertionError("prepared")

    with unittest.mock.patch.object(Engine, "prepare", prepare):
        return _train_and_say(argv)


def test_key_that_the_model_does_not_take_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    options = {
        "run_dir": tmp_path / "run",
        "data.factory": "tests.support.own_parts:with_a_stray_key",
        "data.config.count": 8,
        "model.type": "null",
        "model.factory": "tests.support.own_parts:model",
        "loss.factory": "tests.support.own_parts:squares",
        "train.duration": "1 epochs",
        "train.global_batch_blocks": 4,
        "train.precision": "fp32",
        "report.trackers": "[]",
    }
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    [(code, line)] = run_ranks(_refused_before_preparing, 1, argv)
    assert code == EXIT_REQUEST, line
    assert "the batch has keys that are not arguments (z) of Net.forward" in line


def _train_and_interrupt(argv: list[str], calls: int) -> tuple[int, list[str]]:
    """Exit code and lines of a run that gets SIGTERM before it builds part ``calls`` of its token stores; -1: never."""
    from lmcore.data.store import workers

    build, done = workers._build, [0]

    def interrupted(*arguments: object) -> None:
        if done[0] == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        done[0] += 1
        build(*arguments)

    workers._build = interrupted
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = train_in_rank(argv, None, 0)
    return code, said.getvalue().splitlines()


def test_signal_while_tokenizing_says_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(words(200, 0), encoding="utf-8")
    (tmp_path / "held.txt").write_text(words(10, 1), encoding="utf-8")
    argv = request(tmp_path, tmp_path / "run", train__duration="2 steps")
    [(code, lines)] = run_ranks(_train_and_interrupt, 1, argv, 1)
    assert code == EXIT_SAVED
    assert lines[-1].startswith("interrupted (SIGTERM) before the first step: ")
    assert lines[-1].endswith("are kept; run the same command to resume")
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("saved", EXIT_SAVED)
    assert lines[-1] in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("part-*.bin")}
    assert len(kept) == 1
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.model").exists()
    [(code, lines)] = run_ranks(_train_and_interrupt, 1, argv, -1)
    assert code == 0, lines
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items()), "and they were kept"
