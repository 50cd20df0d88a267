"""Refusals before torch is imported: missing files, indivisible batches, unknown names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmcore.config.parse import parse
from lmcore.errors import EXIT_REQUEST, RequestError
from lmcore.run.preflight import TRACKERS, preflight

ROOT = Path(__file__).resolve().parents[2]


def refused(*argv: str, processes: int = 1) -> str:
    with pytest.raises(RequestError) as caught:
        preflight(parse(list(argv), default_recipe=None), processes=processes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_run_dir_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "is not UTF-8" in refused("--run_dir", os.path.join(tmp_path, os.fsdecode(b"run\xe9")))


def test_global_batch_must_divide_among_the_processes() -> None:
    assert "try 6, or" in refused("--train.global_batch_blocks", "8", processes=3)
    argv = ["--train.global_batch_blocks", "8", "--train.micro_batch_blocks", "8", "--report.trackers", "[]"]
    preflight(parse(argv, default_recipe=None), processes=2)  # the micro-batch is an upper bound
    assert "4 blocks each" in refused(*argv, "--train.micro_batch_exact", processes=2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume", "autoo"], "did you mean 'auto'"),
        (["--resume", "runs/x/checkpoints/step-1"], "no such checkpoint"),
        (["--tokenizer.path", "./none", "--tokenizer.vocab_size", "null"], "tokenizer.path './none'"),
        (["--model.type", "null", "--model.from_pretrained", "./none"], "no such folder"),
        (["--engine.deepspeed", "zero9.json"], "no such file"),
        (["--report.trackers", "wandbb"], "did you mean 'wandb'"),
        (["--report.trackers", "clearml"], "pip install clearml"),
        (["--data.train", "no/such/file.txt"], "no such file"),
        (["--data.valid", "no/such/file.txt"], "no such file"),
        (["--data.test", "no*such.txt"], "no*such.txt"),
    ],
)
def test_missing_files_and_unknown_names_are_refused(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(*argv)


def test_block_longer_than_the_context_of_pretrained_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    argv = ["--model.from_pretrained", "./m", "--report.trackers", "[]"]
    preflight(parse([*argv, "--data.block_size", "64"]))
    assert "larger than the context 64" in refused(*argv, "--data.block_size", "65")


def test_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS) == sorted(TRACKERS)


@pytest.mark.parametrize("program", [["train_lm.py"], ["train_lm.py", "--dry_run"], ["-m", "lmcore", "plan"]])
def test_refusal_needs_no_torch_and_changes_nothing(program: list[str], tmp_path: Path) -> None:
    start = ROOT / program[0] if program[0] == "train_lm.py" else program[0]
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, str(start), *program[1:], "--data.train", "missing.txt"]
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True
    )
    assert done.returncode == EXIT_REQUEST, done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("no such file or folder: missing.txt")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 10  # 0.5 s on an idle machine
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["torch.py"]


def test_prompt_that_is_not_utf8_is_refused() -> None:
    preflight(parse(["--evaluate.prompts", "猫"], default_recipe=None))
    said = refused("--evaluate.prompts", "caf\udce9")  # what Python makes of the bytes caf\xe9
    assert r"evaluate.prompts: 'caf\udce9' is not valid UTF-8" in said
