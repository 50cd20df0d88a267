"""Ctrl-C while a command still imports: one line, and the exit code by which shells know it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from lmcore.errors import EXIT_INTERRUPTED
from tests.support.terminal import INTERRUPT, Terminal

ROOT = Path(__file__).resolve().parents[2]
SLOW_IMPORT = """
import os, sys, time

class SlowImport:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SLOW_IMPORT"]:
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, SlowImport())
"""
NOTHING_TO_SAVE = "interrupted before the first step: nothing to save"
TRAIN = ["train", "--data.train", "a.txt"]


def interrupted(folder: Path, command: list[str], module: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command that got Ctrl-C while it imported ``module``."""
    (folder / "sitecustomize.py").write_text(SLOW_IMPORT)
    (folder / "a.txt").write_text("some words of a text\n" * 2000)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}",
        "SLOW_IMPORT": module,
        "OMP_NUM_THREADS": "1",
    }
    with Terminal([sys.executable, *command], cwd=folder, env=environment, columns=200) as terminal:
        terminal.wait_for(lambda text: "importing" in text)
        terminal.type(INTERRUPT)
        code = terminal.wait()
        return code, terminal.text().replace("^C", "").split("importing", 1)[1].strip().splitlines()


@pytest.mark.parametrize(
    ("command", "module", "line"),
    [
        ([str(ROOT / "train_lm.py"), *TRAIN[1:]], "lmcore.run.trainer", f"train_lm.py: {NOTHING_TO_SAVE}"),
        (["-m", "lmcore", "generate", "x"], "lmcore.cli.saved", "lmcore: interrupted"),
        (["-m", "lmcore", *TRAIN], "lmcore.cli.train", "lmcore: interrupted"),
        (["-m", "lmcore", *TRAIN], "accelerate.commands.launch", f"lmcore train: {NOTHING_TO_SAVE}"),
        (["-m", "lmcore", *TRAIN], "lmcore.run.trainer", f"train_lm.py: {NOTHING_TO_SAVE}"),
    ],
)
def test_ctrl_c_while_importing_is_one_line(
    tmp_path: Path, command: list[str], module: str, line: str
) -> None:
    code, lines = interrupted(tmp_path, command, module)
    assert lines == [line]
    assert code in (EXIT_INTERRUPTED, -signal.SIGINT)  # a shell shows both as 130


def test_ctrl_c_under_accelerate_explains_the_launcher_s_traceback(tmp_path: Path) -> None:
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs/cpu.yaml"),
    ]
    command = [*launcher, str(ROOT / "train_lm.py"), *TRAIN[1:]]
    _, lines = interrupted(tmp_path, command, "lmcore.run.trainer")
    assert f"train_lm.py: {NOTHING_TO_SAVE}" in lines
    assert any("`lmcore train` starts the same run without it" in line for line in lines)
