"""``lmcore train``: what ends under its launcher leaves the run's exit code and no traceback but its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcore.engine.launcher import exit_code_of
from lmcore.errors import EXIT_REQUEST, EXIT_SAVED, EXIT_STUCK
from tests.support.terminal import INTERRUPT, Terminal

ROOT = Path(__file__).resolve().parents[2]
ENDS = """
import os, sys
from lmcore.errors import RequestError, one_line_errors
with one_line_errors():
    raise RequestError("a wrong request")
"""
WAITS = """
import os, signal, sys, time
def say(word):  # in one write: the ranks share the terminal, and print() writes the end of the line by itself
    os.write(1, (word + "\\n").encode())
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run that saves: the launcher sends it when the other has ended
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), say("saved"), os._exit(75)))
say("ready")
while True:
    time.sleep(0.1)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def launched(tmp_path: Path, code: str, *options: str, module: str) -> list[str]:
    (tmp_path / "script.py").write_text(code)
    return [sys.executable, "-m", module, *options, str(tmp_path / "script.py")]


def config(name: str) -> list[str]:
    return ["--config_file", str(ROOT / "lmcore" / "accelerate_configs" / f"{name}.yaml")]


def test_process_that_failed_by_itself_gives_the_exit_code() -> None:
    assert exit_code_of([2]) == 2
    assert exit_code_of([-15, 70]) == 70
    assert exit_code_of([EXIT_STUCK, EXIT_STUCK, 1]) == 1
    assert exit_code_of([EXIT_STUCK, -15]) == EXIT_STUCK
    assert exit_code_of([-9]) == 137
    assert exit_code_of([]) == 1


@pytest.mark.parametrize("name", ["cpu", "cpu_2"])
def test_refusal_is_one_line(tmp_path: Path, name: str) -> None:
    command = launched(tmp_path, ENDS, *config(name), module="lmcore.engine.launcher")
    usual = {
        key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"
    }  # accelerate tells its default
    done = subprocess.run(command, env=usual, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_REQUEST
    assert done.stderr == "train_lm.py: a wrong request\n"


@pytest.mark.parametrize("seconds", [2, pytest.param(600, marks=pytest.mark.slow)])
def test_refusal_is_said_though_rank_0_is_slower(tmp_path: Path, seconds: int) -> None:
    """The launcher ends all ranks with the first one: rank 0 gets time to say why, and else another one does."""
    code = f"import os, time; time.sleep({seconds} if os.environ['RANK'] == '0' else 0)\n{ENDS}"
    command = launched(tmp_path, code, *config("cpu_2"), module="lmcore.engine.launcher")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_REQUEST
    assert done.stderr == "train_lm.py: a wrong request\n"


@pytest.mark.parametrize("name", ["cpu", "cpu_2"])
def test_accelerate_s_own_traceback_is_explained(tmp_path: Path, name: str) -> None:
    command = launched(tmp_path, ENDS, *config(name), module="accelerate.commands.launch")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said, explained = done.stderr.splitlines()[:2]
    assert said == "train_lm.py: a wrong request"
    assert "the launcher's own; `lmcore train` starts the same run without it" in explained
    if name == "cpu_2":  # the table at the end of torch's launcher names the reason
        assert done.stderr.count("traceback : train_lm.py: a wrong request") >= 1


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("cpu_2", 2)])
def test_ctrl_c_leaves_the_run_the_time_to_save(tmp_path: Path, name: str, processes: int) -> None:
    command = launched(tmp_path, WAITS, *config(name), module="lmcore.engine.launcher")
    with Terminal(command, cwd=tmp_path, env=environment()) as terminal:
        terminal.wait_for(lambda text: text.count("ready") == processes)
        terminal.type(INTERRUPT)
        assert terminal.wait() == EXIT_SAVED
        said = terminal.text().replace("^C", " ").split()
        assert said == ["ready"] * processes + ["saved"] * processes, "no traceback"
