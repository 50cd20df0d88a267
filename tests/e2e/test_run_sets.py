"""Held-out sets and test sets of a run: scored when, under which names, in records, trackers and the model card."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcore.errors import EXIT_FINISHED
from lmcore.report.metrics import read_metrics
from lmcore.saved.load import load_model
from lmcore.saved.score import score
from tests.support.trackers import read_tensorboard
from tests.support.whole_runs import request, train, words

SHORT = {"train__duration": "6 steps", "evaluate__every": "3 steps", "report__trackers": "[tensorboard]"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(300, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(30, 1), encoding="utf-8")
    (folder / "other.txt").write_text(words(30, 2), encoding="utf-8")
    return folder


def test_test_set_is_scored_once_with_the_last_weights(text: Path) -> None:
    """Also one that is called as a held-out set: the two are kept apart."""
    run_dir = text / "one"
    (text / "elsewhere").mkdir()
    (text / "elsewhere" / "held.txt").write_text(words(40, 3), encoding="utf-8")
    argv = request(text, run_dir, **SHORT, data__test=text / "elsewhere" / "held.txt")
    assert train(argv) == [EXIT_FINISHED]
    records = read_metrics(run_dir, "eval")
    assert [(r["set"], r["step"]) for r in records] == [("held", 3), ("held", 6), ("test", 6)]
    expected = score(load_model(run_dir), {"test": [str(text / "elsewhere" / "held.txt")]}, block_size=16)[
        "test"
    ]
    assert records[-1]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    log = (run_dir / "train.log").read_text()
    assert f"test loss: {records[-1]['loss']:.4f}" in log
    assert f"| test | 6 | {records[-1]['loss']:.4f} |" in (run_dir / "export" / "README.md").read_text()


def test_trackers_see_train_valid_and_test_by_step_and_epoch(text: Path) -> None:
    run_dir = text / "several"
    argv = request(text, run_dir, **SHORT)
    at = argv.index("--data.valid")
    del argv[at : at + 2]
    for option in ("--data.valid", "--data.test"):  # the second is called as the training records are
        argv += [option, str(text / "held.txt"), f"{{path: {text / 'other.txt'}, name: train}}"]
    assert train(argv) == [EXIT_FINISHED]
    scalars = read_tensorboard(run_dir / "tensorboard")
    assert {key.rpartition("/")[0] for key in scalars} == {
        "train", "valid/held", "valid/train", "test/held", "test/train"
    }  # fmt: skip
    epochs = {r["step"]: r["epoch"] for r in read_metrics(run_dir, "eval")}
    for group, steps in (("valid/held", [3, 6]), ("valid/train", [3, 6]), ("test/train", [6])):
        assert [step for step, _ in scalars[f"{group}/loss"]] == steps
        assert scalars[f"{group}/epoch"] == [(step, pytest.approx(epochs[step])) for step in steps]


def test_early_stop_reason_is_printed(text: Path) -> None:
    run_dir = text / "early"
    argv = request(text, run_dir, **SHORT, evaluate__early_stopping__divergence=1.0)
    assert train(argv) == [EXIT_FINISHED]
    log = (run_dir / "train.log").read_text()
    loss = read_metrics(run_dir, "eval")[0]["loss"]
    assert f"stopped early at step 3 of 6: loss {loss:.4f} is worse than the divergence bound 1.0\n" in log
