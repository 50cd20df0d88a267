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
from lmcore.run.start import check_launcher

ROOT = Path(__file__).resolve().parents[2]


def refused(*argv: str, processes: int = 1) -> str:
    with pytest.raises(RequestError) as caught:
        preflight(parse(list(argv), default_recipe=None), processes=processes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_run_dir_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "is not UTF-8" in refused("--run_dir", os.path.join(tmp_path, os.fsdecode(b"run\xe9")))


def test_global_batch_must_divide_among_the_processes() -> None:
    assert "try 6 or 9, or" in refused("--train.global_batch_blocks", "8", processes=3)
    argv = ["--train.global_batch_blocks", "8", "--train.micro_batch_blocks", "8", "--report.trackers", "[]"]
    preflight(parse(argv, default_recipe=None), processes=2)  # the micro-batch is an upper bound
    assert "4 blocks each" in refused(*argv, "--train.micro_batch_exact", processes=2)


def test_global_batch_is_divided_among_groups_that_share_blocks() -> None:
    argv = ["--train.context_parallel", "2", "--report.trackers", "[]", "--train.global_batch_blocks"]
    preflight(parse([*argv, "2"], default_recipe=None), processes=4)
    assert "multiple of the 2 groups of 2 processes (got 3); try 2" in refused(*argv, "3", processes=4)
    preflight(parse([*argv, "3"], default_recipe=None), processes=3 * 2)


def test_checkpoint_to_resume_is_named_by_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    argv = ["--report.trackers", "[]", "--run_dir", str(tmp_path / "run"), "--resume"]
    preflight(parse([*argv, "step-00000002"], default_recipe=None))
    assert "lmcore checkpoints RUN" in refused(*argv, "step-00000003")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume", "autoo"], "did you mean 'auto'"),
        (["--resume", "runs/x/checkpoints/step-1"], "no such checkpoint"),
        (["--tokenizer.path", "./none", "--tokenizer.vocab_size", "null"], "tokenizer.path './none'"),
        (["--model.type", "null", "--model.from_pretrained", "./none"], "no such folder"),
        (["--engine.deepspeed", "zero9.json"], "no such file"),
        (["--engine.deepspeed", "ds_config/zero3.json"], "did you mean 'ds_configs/zero3.json'"),
        (["--report.trackers", "wandbb"], "did you mean 'wandb'"),
        (["--report.trackers", "wandb,trackio"], "--report.trackers wandb trackio"),
        (["--report.trackers", "none"], "'[]'"),
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


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gpt2", "n_positions"),
        ("llama", "max_position_embeddings"),
        ("mpt", "max_seq_len"),
        ("ctrl", "n_positions"),
    ],
)
def test_block_longer_than_the_context_is_refused(family: str, field: str) -> None:
    argv = ["--model.type", family, "--model.config", f"{{{field}: 64}}"]
    parse([*argv, "--data.block_size", "64"])
    with pytest.raises(RequestError, match="block_size 65 is larger than the model's context 64"):
        parse([*argv, "--data.block_size", "65"])


@pytest.mark.parametrize("field", ["max_position_embeddings", "max_seq_len"])
def test_block_longer_than_the_context_of_pretrained_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({field: 64}))
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


@pytest.mark.parametrize("program", [["train_lm.py"], ["-m", "lmcore", "plan"]])
def test_reason_of_a_refusal_is_the_last_line_of_both_streams(program: list[str], tmp_path: Path) -> None:
    """As in ``> log 2>&1``, where Python would keep standard output back until the end."""
    (tmp_path / "text.txt").write_text("some text\n")
    start = ROOT / program[0] if program[0] == "train_lm.py" else program[0]
    command = [sys.executable, str(start), *program[1:], "--data.train", "text.txt", "--seed", "-1"]
    environment = {"PYTHONPATH": str(ROOT)}  # and not PYTHONUNBUFFERED
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == EXIT_REQUEST
    assert done.stdout.strip().splitlines()[-1].endswith("seed must be at least 0 (got -1)")


def test_prompt_that_is_not_utf8_is_refused() -> None:
    preflight(parse(["--evaluate.prompts", "猫"], default_recipe=None))
    said = refused("--evaluate.prompts", "caf\udce9")  # what Python makes of the bytes caf\xe9
    assert r"evaluate.prompts: 'caf\udce9' is not valid UTF-8" in said


@pytest.mark.parametrize("value", ["", "abc", "-1", "1.5", "٣", "9" * 5000, " 2"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
def test_numbers_that_no_launcher_sets_are_refused(name: str, value: str) -> None:
    usual = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    usual |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    check_launcher(usual)
    check_launcher({})
    with pytest.raises(RequestError, match=f"environment variable {name} must be a whole number"):
        check_launcher({**usual, name: value})


def test_no_processes_are_refused() -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        with pytest.raises(RequestError, match="at least 1"):
            check_launcher({name: "0"})
