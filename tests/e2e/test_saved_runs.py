"""Whole runs whose folder was changed between two starts, or whose export fails: checkpoints, links, exports."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcore.checkpoint.manifest import manifest_bytes
from lmcore.cli.main import main
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_REQUEST, RequestError
from lmcore.report.metrics import read_metrics
from lmcore.saved.load import load_model
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import losses, request, train, train_in_rank, write_texts

SHORT = {"train__duration": "4 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=300, held=30)


@pytest.fixture(scope="module")
def finished(text: Path) -> Path:
    assert train(request(text, text / "finished", **SHORT)) == [EXIT_FINISHED]
    return text / "finished"


def copy(run_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(run_dir, run_dir.parent / name, symlinks=True))


def reason(run_dir: Path) -> str:
    return str(json.loads((run_dir / "status.json").read_text())["reason"])


def test_resume_from_checkpoints_moved_to_another_disk_and_linked_back(text: Path, finished: Path) -> None:
    run_dir = copy(finished, "moved")
    elsewhere = text / "disk2"
    elsewhere.mkdir()
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        shutil.move(path, elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    longer = SHORT | {"train__duration": "6 steps"}
    assert train(request(text, run_dir, **longer)) == [EXIT_FINISHED]
    assert [r["step"] for r in read_metrics(run_dir / "metrics.jsonl") if r.get("event") == "resume"] == [4]
    assert set(losses(run_dir)) == {1, 2, 3, 4, 5, 6}
    assert load_model(run_dir, device="cpu").step == 6
    # The disk is not mounted at the next start: the run must not begin anew.
    shutil.rmtree(elsewhere)
    for path in (run_dir / "checkpoints").glob("step-0000000[56]"):
        shutil.rmtree(path)
    assert train(request(text, run_dir, **(SHORT | {"train__duration": "8 steps"}))) == [EXIT_REQUEST]
    assert "is a link to" in reason(run_dir)
    with pytest.raises(RequestError, match="is a link to"):
        load_model(run_dir, device="cpu")


def test_foreign_files_in_export_are_refused_before_the_training(text: Path) -> None:
    run_dir = text / "foreign"
    (run_dir / "export").mkdir(parents=True)
    (run_dir / "export" / "thesis.txt").write_text("years of work")
    assert train(request(text, run_dir, **SHORT)) == [EXIT_REQUEST]
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "tokenizer").exists(), "before any work"
    assert (run_dir / "export" / "thesis.txt").read_text() == "years of work"


STATES: list[dict[str, Any]] = [
    {"config": []},
    {"cursor": {}},
    {"cursor": [1]},
    {"guard": "none"},
    {"report": 7},
    {"optimizer_scalars": None},
    {"topology": 3},
    {"tokens": None, "metrics": None, "stop_values": 1, "cursor": None},
]


def _resume_from_states(run_dir: Path, argv: list[str]) -> int:
    """Resume from the newest checkpoint with each of the states, its hashes computed anew; the worst exit code."""
    path = run_dir / "checkpoints" / "step-00000004"
    state = json.loads((path / "state.json").read_text())
    codes = []
    for change in STATES:
        data = json.dumps(state | change).encode()
        (path / "state.json").write_bytes(data)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_bytes(manifest_bytes(manifest))
        codes.append(train_in_rank(argv, None, 0))
        assert "its state.json is not one that this lmcore writes" in reason(run_dir), change
    return max(codes) if len(set(codes)) == 1 else -1


def test_hostile_state_with_valid_hashes_is_one_line(text: Path, finished: Path) -> None:
    run_dir = copy(finished, "hostile")
    argv = request(text, run_dir, **(SHORT | {"train__duration": "6 steps"}))
    assert run_ranks(_resume_from_states, 1, run_dir, argv) == [EXIT_REQUEST]


def _train_with_a_failing_export(argv: list[str]) -> int:
    from lmcore.saved import export

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    export._write_model = failing
    return train_in_rank(argv, None, 0)


def test_failed_export_leaves_the_checkpoint_and_names_the_command(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = text / "full"
    assert run_ranks(_train_with_a_failing_export, 1, request(text, run_dir, **SHORT)) == [EXIT_FAULT]
    assert not (run_dir / "export").exists()
    assert not list(run_dir.glob(".export*"))
    why = reason(run_dir)
    assert "checkpoint of step 4 is saved" in why
    assert "No space left on device" in why
    command = why.rpartition("this does the rest: ")[2]
    assert f"lmcore export {run_dir}" in command
    assert main(["export", str(run_dir)]) == 0
    assert "logits verified" in capsys.readouterr().out
    assert load_model(run_dir / "export", device="cpu").kind == "export"


def test_tokenizer_of_another_run_is_refused_by_every_command(
    text: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy(finished, "swapped")
    other = SHORT | {
        "tokenizer__vocab_size": 320,
        "tokenizer__model_type": "unigram",
        "train__duration": "2 steps",
    }
    assert train(request(text, text / "other", **other)) == [EXIT_FINISHED]
    shutil.rmtree(run_dir / "tokenizer")
    shutil.copytree(text / "other" / "tokenizer", run_dir / "tokenizer")
    for command in (
        ["evaluate", str(run_dir), "--data", str(text / "held.txt")],
        ["generate", str(run_dir), "--prompt", "alpha"],
        ["export", str(run_dir), "--out", str(text / "out")],
    ):
        assert main(command) == EXIT_REQUEST
        assert "is not the tokenizer that the checkpoint was trained with" in capsys.readouterr().err
    assert not (text / "out").exists()
