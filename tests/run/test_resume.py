"""What ``--resume`` asks for when a command is run again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from lmcore.checkpoint import reader
from lmcore.checkpoint.manifest import STATE
from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig, flatten
from lmcore.data.cursor import Cursor, Phase
from lmcore.data.steps import StepPlan
from lmcore.data.store.inventory import USES
from lmcore.errors import RequestError
from lmcore.run import setup
from lmcore.run.early_stopping import EarlyStopping
from lmcore.run.folder import RunFolder
from lmcore.run.resume import (
    changes,
    find_checkpoint,
    kept_before,
    measured_otherwise,
    refuse_changes,
    stop_values_of,
)
from lmcore.run.trainer import Run


def asked(run_dir: Path, resume: str) -> str:
    """What is asked of a bucket by one start of a run, which is killed after it has looked for its checkpoint."""
    seen: list[str] = []
    folder = RunFolder(run_dir)
    report: Any = SimpleNamespace(note=lambda line: None, warn_once=lambda line: None)
    config = replace(RunConfig(), run_dir=str(run_dir), resume=resume)
    try:
        find_checkpoint(config, folder, report, fetch=seen.append)
    finally:
        folder.write_status("running", step=0)
    return seen[0]


@pytest.mark.parametrize("resume", ["never", "best"])
def test_bucket_is_asked_for_the_newest_where_the_command_has_had_its_way(
    tmp_path: Path, resume: str
) -> None:
    """An empty disk of another machine needs the newest checkpoint, not to start over."""
    assert [asked(tmp_path, resume) for _ in range(3)] == [resume, "auto", "auto"]
    path = tmp_path / "status.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"state": "finished"}))
    assert asked(tmp_path, resume) == resume


def test_refused_checkpoint_is_asked_for_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="no such folder"):
            asked(tmp_path, "step-00000002")
        assert "resume_command" not in json.loads((tmp_path / "status.json").read_bytes())


@pytest.mark.parametrize("by_path", [True, False])
def test_run_resumed_from_a_checkpoint_of_its_own_by_name_keeps_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_path: bool
) -> None:
    """As where the checkpoint is looked for: its name alone is one of this run, wherever the command is started."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder, store in ((run_dir, "own"), (elsewhere, "other")):
        (folder / "checkpoints/step-00000003").mkdir(parents=True)
        (folder / USES).write_text(json.dumps([f"stores/{store}"]))
    monkeypatch.chdir(elsewhere)
    seen: list[Any] = []
    monkeypatch.setattr(setup.corpus, "splits_of", lambda *_, **named: seen.append(named["begun_with"]))
    resume = str(elsewhere / "checkpoints/step-00000003") if by_path else "step-00000003"
    setup.splits_of(replace(RunConfig(), resume=resume), run_dir)
    assert seen == [{"other" if by_path else "own"}]


@pytest.mark.parametrize(
    ("was", "now", "allowed"),
    [({"n_embd": 64}, {"n_embd": 32}, False), ({}, {"n_embd": 768}, True), ({"n_head": 2}, {"n_head": 4}, True)],
)  # fmt: skip
def test_change_that_no_option_allows_is_not_advised(was: Any, now: Any, allowed: bool) -> None:
    """Weights of another width never fit; a default that is written out now may be the same model."""
    old, new = (
        flatten(replace(RunConfig(), model=replace(RunConfig().model, config=one))) for one in (was, now)
    )
    with pytest.raises(RequestError, match="restore them") as refused:
        refuse_changes(changes(old, new), [])
    assert ("--allow_changes" in str(refused.value)) is allowed
    assert ("do not fit another model.config.n_embd" in str(refused.value)) is not allowed


def test_checkpoint_of_a_version_that_hid_less_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings hold a secret that those of today hide: this is no change, and nothing prints it."""
    config = RunConfig(run_dir=str(tmp_path))
    config = replace(config, data=replace(config.data, config={"api_key": 12345678}))
    saved = SimpleNamespace(step=1, path=tmp_path / "step-00000001", state={"config": flatten(config)})
    opened = nullcontext()
    for name, value in vars(saved).items():
        setattr(opened, name, value)
    monkeypatch.setattr(reader, "find", lambda *args, **kwargs: opened)
    report: Any = SimpleNamespace(note=pytest.fail, warn_once=pytest.fail)
    assert find_checkpoint(config, RunFolder(tmp_path), report) == (str(saved.path), saved.state)


@pytest.mark.parametrize(
    ("every", "other", "stays"),
    [
        ("20%", "--train.duration 15", True),
        ("1epochs", "--allow_changes data.train --data.train b", True),
        ("2", "--checkpoint.keep_every never", True),
        ("2", "--train.duration 15", False),
        ("20%", "--checkpoint.keep 1", False),
        ("never", "--train.duration 15 --checkpoint.keep_every 20%", False),
    ],
)
def test_checkpoints_of_another_keep_every_stay(every: str, other: str, stays: bool) -> None:
    """They are never to be deleted: a longer run of which 20% are other steps must not delete those of the shorter."""
    words = f"--data.train a --train.duration 10 --checkpoint.keep_every {every}"
    saved = parse(words.split(), default_recipe=None)
    resumed = parse([*words.split(), *other.split()], default_recipe=None)
    assert kept_before({}, saved) == 0
    past = {"step": 10, "config": flatten(saved)}
    assert kept_before(past, saved) == 0
    before = kept_before(past, resumed)
    assert before == (10 if stays else 0)
    again = {"step": 12, "config": flatten(resumed), "kept_before": before}
    assert kept_before(again, resumed) == before
    run: Any = SimpleNamespace(
        _kept_before=before,
        config=resumed,
        sizes=SimpleNamespace(steps=StepPlan.constant(4)),
        _intervals=SimpleNamespace(reached=lambda step, every: False),
    )
    assert [Run._is_kept(run, step) for step in (4, 10, 12)] == [stays, stays, False]


@pytest.mark.parametrize(
    ("other", "counted"),
    [
        ("--optim.lr 0.001 --evaluate.every 5", [5.2, 4.9]),
        ("--evaluate.early_stopping.metric perplexity", []),
        ("--data.valid other.txt", []),
        ("--evaluate.blocks 7", []),
        ("--data.block_size 32", []),
    ],
)
def test_early_stopping_does_not_compare_two_metrics(other: str, counted: list[float]) -> None:
    """A perplexity is never better than a loss, nor may another text's loss be: the run would end although it learns."""
    words = ["--data.train", "a", "--data.valid", "b"]
    state = {"config": flatten(parse(words, default_recipe=None)), "stop_values": [5.2, 4.9]}
    assert stop_values_of(state, parse([*words, *other.split()], default_recipe=None)) == counted


@pytest.mark.parametrize(
    ("other", "valid", "differs"),
    [
        ("", {"b": "store 1"}, False),
        ("--evaluate.early_stopping.metric perplexity", {"b": "store 1"}, False),
        ("", {"b": "store 2"}, True),
        ("--evaluate.blocks 7", {"b": "store 1"}, True),
        ("--loss.factory os:getcwd --allow_changes loss.factory", {"b": "store 1"}, True),
    ],
)
def test_evaluations_of_other_data_are_known(other: str, valid: dict[str, str], differs: bool) -> None:
    words = ["--data.train", "a", "--data.valid", "b"]
    state = {"config": flatten(parse(words, default_recipe=None)), "stop_values": [5.2]}
    config = parse([*words, *other.split()], default_recipe=None)
    assert measured_otherwise(state | {"valid": {"b": "store 1"}}, config, valid) == differs
    assert measured_otherwise(state, config, valid) == (differs and other != "")  # of an earlier version


@pytest.mark.parametrize(("metric", "counted"), [("loss", 2), ("perplexity", 0)])
def test_values_of_another_metric_are_left_where_a_checkpoint_is_loaded(metric: str, counted: int) -> None:
    path = Path(__file__).parents[1] / "data" / "stored_run" / "checkpoints" / "step-00000003"
    state = json.loads((path / STATE).read_text())
    words = ["--data.train", "corpus.txt", "--data.block_size", "32", "--seed", str(state["cursor"]["seed"])]
    run = MagicMock(
        config=parse([*words, "--evaluate.early_stopping.metric", metric], default_recipe=None),
        _early_stopping=EarlyStopping(metric=metric),
        _skips=(),
        _topology={},
    )
    run.data.train.fingerprint = Cursor.from_json(state["cursor"]).fingerprint
    run.data.phases = (Phase(),)
    Run._load(run, str(path))
    assert run.state.stop_values == state["stop_values"][:counted]
