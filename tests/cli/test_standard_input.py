"""Text from a pipe: ``prepare`` reads it once, for the tokenizer, the training side and the held-out side."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from lmcore.cli.main import main
from lmcore.errors import EXIT_FINISHED, EXIT_REQUEST
from lmcore.report.metrics import read_metrics
from tests.e2e.test_run import request, train, words


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def without(argv: list[str], *names: str) -> list[str]:
    """The same command line without these options."""
    pairs = zip(argv[::2], argv[1::2])
    return [word for pair in pairs if pair[0].removeprefix("--") not in names for word in pair]


def test_a_pipe_becomes_stores_that_a_run_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = words(400, 0)
    argv = without(
        request(tmp_path, tmp_path / "prepared", data__valid_fraction=0.1), "data.valid", "data.train"
    )
    stores = []
    for _ in range(2):
        pipe(monkeypatch, text)
        assert main(["prepare", *argv, "--data.train", "-"]) == EXIT_FINISHED
        said = capsys.readouterr().out
        [line] = [line for line in said.splitlines() if line.startswith("train with: ")]
        stores.append(line)
    assert stores[0] == stores[1], "the same text makes the same stores"
    assert len(list((tmp_path / "stores").iterdir())) == 2, "nothing is left of the pipe"
    with_stores = line.removeprefix("train with: ").split()
    assert with_stores[::2] == ["--data.train", "--data.valid", "--tokenizer.path"]
    of_a_pipe = [*without(argv, "run_dir", "data.valid_fraction", "tokenizer.vocab_size"), *with_stores]
    assert train([*of_a_pipe, "--run_dir", str(tmp_path / "run")]) == [EXIT_FINISHED]
    assert "held out (stdin-valid-" in (tmp_path / "run" / "train.log").read_text()
    file = tmp_path / "same"
    file.write_text(text, encoding="utf-8")
    of_a_file = without(argv, "run_dir", "tokenizer.vocab_size")
    of_a_file += ["--data.train", str(file), "--data.unit", "line", "--tokenizer.path", with_stores[-1]]
    assert train([*of_a_file, "--run_dir", str(tmp_path / "file")]) == [EXIT_FINISHED]
    assert losses(tmp_path / "run", "train") == losses(tmp_path / "file", "train")
    assert losses(tmp_path / "run", "eval") == losses(tmp_path / "file", "eval")


def losses(run_dir: Path, kind: str) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir, kind)]


def test_a_training_that_could_not_be_repeated_is_refused(tmp_path: Path) -> None:
    argv = without(request(tmp_path, tmp_path / "run"), "data.train", "data.valid")
    assert train([*argv, "--data.train", "-"]) == [EXIT_REQUEST]
    status = (tmp_path / "run" / "status.json").read_text()
    assert "standard input cannot be read again" in status
    assert "prepare --data.train -" in status
