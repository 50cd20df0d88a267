"""``lmcore train``: the launcher's configuration fits the machine, and every option is passed on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcore.cli.main import main
from lmcore.cli.train import launch_command, script, train
from lmcore.errors import EXIT_REQUEST, RequestError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("gpus", "options", "name", "count"),
    [
        (0, {}, "cpu", None),
        (1, {}, "gpu", None),
        (8, {}, "ddp", "8"),
        (0, {"processes": 4}, "cpu_2", "4"),
        (8, {"processes": 2}, "ddp", "2"),
        (8, {"processes": 1}, "gpu", None),
        (8, {"config_file": "fsdp2"}, "fsdp2", None),
        (4, {"config_file": "fsdp2"}, "fsdp2", "4"),
        (16, {"config_file": "fsdp2"}, "fsdp2", None),
        (0, {"config_file": "fsdp2"}, "fsdp2", None),
        (4, {"config_file": "ddp_multinode"}, "ddp_multinode", None),
        (8, {"config_file": "accelerate_configs/zero3.yaml", "processes": 4}, "zero3", "4"),
    ],
)
def test_configuration_fits_the_machine(
    gpus: int, options: dict[str, object], name: str, count: str | None
) -> None:
    words = ["--config", "a b.yaml", "--seed", "1"]
    command = launch_command(words, gpus=gpus, **options)
    assert command[0] == "--config_file"
    assert Path(command[1]).stem == name
    assert Path(command[1]).is_file()
    assert (command[3] if "--num_processes" in command else None) == count
    assert command[-4:] == words
    assert command[-5] == str(script())


def test_unknown_configuration_and_too_many_processes_are_refused() -> None:
    with pytest.raises(RequestError, match="by name there are cpu"):
        launch_command([], gpus=0, config_file="fsdp9")
    with pytest.raises(RequestError, match="has 2 GPUs"):
        launch_command([], gpus=2, processes=3)


def test_processes_that_do_not_divide_the_batch_are_refused_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a line of text\n" * 50)
    monkeypatch.setitem(sys.modules, "torch", None)
    words = ["--data.train", str(tmp_path / "a.txt"), "--train.global_batch_blocks", "8", "--processes", "3"]
    with pytest.raises(RequestError, match="multiple of the 3 processes"):
        train(words)


def test_command_is_printed_and_every_option_reaches_the_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = ["--data.train", "my text.txt", "--seed", "7", "--dry_run", "--report.trackers", "[]"]
    (tmp_path / "my text.txt").write_text("some words\n" * 200)
    done = subprocess.run(
        [sys.executable, "-m", "lmcore", "train", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accelerate launch --config_file" in done.stdout
    assert "'my text.txt'" in done.stdout
    assert "runs/my_text" in done.stdout
    for wrong in (["--seeed", "1"], ["--data.train", "missing.txt"], ["--processes", "0"]):
        done = subprocess.run(
            [sys.executable, "-m", "lmcore", "train", *wrong],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == EXIT_REQUEST
        assert "accelerate launch" not in done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["train", "--debug", "--seed", "1"], ["--debug", "train", "--seed", "1"]])
def test_debug_reaches_the_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on: list[list[str]] = []
    monkeypatch.setattr("lmcore.cli.train.train", passed_on.append)
    main(words)
    assert passed_on == [["--seed", "1", "--debug"]]
