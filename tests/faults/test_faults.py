"""A small fault campaign on whole runs: the same trials as ``python -m tests.faults``, a few of each.

In a process of its own: the campaign forks its runs from a process that has imported torch and run nothing
of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kinds import STRATEGIES
from tests.faults.soak import account

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(1200)


def campaign(tmp_path: Path, *words: str) -> str:
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        "--place",
        str(tmp_path / "place"),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_killed_and_nan_runs(tmp_path: Path) -> None:
    """At least 5 kills and 10 NaNs; the continued runs are bit for bit those that nobody hurt."""
    # A kill may come after the end of its run and is none then: five trials ask for eleven of them.
    told = campaign(tmp_path, "--kind", "kill", "--n", "5", "--first", "0")
    assert told.count(": held") == 5
    assert sum(int(number) for number in re.findall(r"'kills': (\d+)", told)) >= 5
    told = campaign(tmp_path, "--kind", "nan", "--kind", "full", "--first", "0")
    assert told.count(": held") == 2 + 4
    assert sum(int(number) for number in re.findall(r"'(?:single|ddp|zero\d|fsdp2)': (\d+)", told)) >= 10


@pytest.mark.slow
def test_signalled_runs(tmp_path: Path) -> None:
    """At least 20 signals, on one and two ranks, in every phase: saved each time, and nothing lost."""
    told = campaign(tmp_path, "--kind", "signal", "--first", "0")
    assert told.count(": held") == 5
    assert sum(int(number) for number in re.findall(r"'signals': (\d+)", told)) >= 20


@pytest.mark.slow
def test_faults_of_single_ranks(tmp_path: Path) -> None:
    """A rank killed, a rank stopped, a data worker killed, and another number of ranks after each kill."""
    words = ("secrets", "rank-killed", "rank-stopped", "worker-killed", "world-size")
    told = campaign(
        tmp_path, *(word for kind in words for word in ("--kind", kind)), "--n", "1", "--first", "0"
    )
    assert told.count(": held") == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepare-killed", "launcher", pytest.param("soak", marks=pytest.mark.long)])
def test_prepare_launcher_and_soak(tmp_path: Path, kind: str) -> None:
    """SIGKILL to ``prepare``; SIGTERM to ``accelerate launch``, which tells nobody; six seconds of kills."""
    told = campaign(tmp_path, "--kind", kind, "--n", "1", "--first", "0")
    assert told.count(": held") == 1


def test_soak_time_is_accounted_for() -> None:
    words = ["start 0", "begin 0", "step 1", "save 0", "step 2", "kill 0", "ended 0"]
    words += ["begin 0", "step 2", "step 3", "ended 0"]
    at = [0.0, 1, 3, 3.5, 5.5, 6, 6.5, 8, 10, 12, 15]
    spent = account([f"{word} {time}" for word, time in zip(words, at, strict=True)])
    assert spent == {
        "counted": 6.0,  # steps 1, 2 (the second time) and 3
        "repeated": 2.0 + 0.5,  # step 2 the first time, and what the kill cut off
        "saving": 0.5,
        "restart": 1.0 + 0.5 + 1.5,
        "end": 3.0,
        "steps trained": 4,
        "saves": 1,
        "steps": 3,
    }
    assert sum(spent[name] for name in ("counted", "repeated", "saving", "restart", "end")) == at[-1]


CASES_OF_EACH_LAUNCHER = {
    "SIGTERM to one rank of torchrun": 5,
    "SIGINT to all, one process": 24,
    "SIGKILL to torchrun": 29,
    "a rank killed under accelerate, started again": 30,
}
MORE_CASES = {
    "SIGUSR1 to an accelerate launch of two": 10,
    "a rank killed under torchrun, started again": 31,
    "a rank asked to stop under torchrun, not started again": 33,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(number, id=name) for name, number in CASES_OF_EACH_LAUNCHER.items()),
        *(pytest.param(number, id=name, marks=pytest.mark.long) for name, number in MORE_CASES.items()),
    ],
)
def test_signals_through_the_real_launchers(tmp_path: Path, number: int) -> None:
    told = campaign(tmp_path, "--kind", "launcher", "--n", "1", "--first", str(number))
    assert told.count(": held") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        # One process and DDP go the same ways in the tests above, ZeRO-1 and 2 those of ZeRO-3.
        pytest.param(number, id=name, marks=[pytest.mark.long] * (name not in {"fsdp2", "zero3"}))
        for number, name in enumerate(STRATEGIES)
    ],
)
def test_every_strategy_survives_a_kill_and_a_nan(tmp_path: Path, number: int) -> None:
    told = campaign(tmp_path, "--kind", "strategies", "--n", "1", "--first", str(number))
    assert told.count(": held") == 1
