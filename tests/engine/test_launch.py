"""Through the real launchers: what a person types. Few, because each pays for the imports of every process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lmcore.config.schema import TrainConfig
from lmcore.report.metrics import read_metrics
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import request, words

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "train.txt").write_text(words(300, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(30, 1), encoding="utf-8")
    return folder


def launch(launcher: list[str], argv: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *launcher, str(ROOT / "train_lm.py"), *argv],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_on_a_cpu_by_a_file_then_one_goes_on(text: Path) -> None:
    """The same run on two processes and then on one: the order of the data does not notice."""
    run_dir = text / "two"
    options = {"train__duration": "6 steps", "checkpoint__every": "3 steps", "evaluate__every": "never"}
    argv = request(text, run_dir, **options)
    done = launch(["--config_file", "accelerate_configs/cpu_2.yaml"], argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x CPU" in done.stdout
    assert done.stdout.count("step 6/6") == 1, "one rank speaks"
    longer = launch(
        ["--config_file", "accelerate_configs/cpu.yaml"],
        request(text, run_dir, **{**options, "train__duration": "8 steps", "optim__schedule": "constant"}),
    )
    assert longer.returncode == 0, longer.stdout + longer.stderr
    records = read_metrics(run_dir / "metrics.jsonl", kind="train")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["position"] for r in records] == [12 * step for step in range(1, 9)]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


TORCHRUN = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
time.sleep(600)  # by its command line this is a torchrun
"""


def test_rank_whose_launcher_dies_before_rendezvous_ends(text: Path) -> None:
    """It would wait for the others, and hold its device, until engine.timeout_seconds are over."""
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(nobody_listens.getsockname()[1])}
        launcher = subprocess.Popen(
            [
                sys.executable,
                "-c",
                TORCHRUN,
                sys.executable,
                str(ROOT / "train_lm.py"),
                *request(text, text / "alone"),
            ],
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                **where,
            },
            stdout=subprocess.PIPE,
        )
        assert launcher.stdout is not None
        with launcher.stdout:
            pid = int(launcher.stdout.readline())
        maps = Path(f"/proc/{pid}/maps")
        while "libtorch" not in maps.read_text():  # from here on it imports, and then it waits
            time.sleep(0.05)
        launcher.kill()
        launcher.wait()
        give_up = time.monotonic() + 200
        while maps.exists() and time.monotonic() < give_up:
            time.sleep(0.05)
        left = maps.exists()
        if left:
            os.kill(pid, signal.SIGKILL)
        assert not left


def meet(settings: dict[str, str]) -> tuple[str, int]:
    os.environ.update(settings)  # what the launcher says
    from lmcore.engine.engine import Engine

    engine = Engine(TrainConfig(precision="fp32"))
    return engine.strategy, engine.agree(1 << engine.rank)


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [({"ACCELERATE_USE_CPU": "true"}, "ddp"), ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2")],
)
def test_ranks_that_are_started_again_do_not_call_the_dead_ones(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], strategy: str
) -> None:
    """A launcher keeps its store over its restarts, with the addresses of the ranks that are gone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(dist, "TCPStore", lambda *_words, **_more: store)
    for attempt in ("0", "1", "2"):
        again = {"TORCHELASTIC_RESTART_COUNT": attempt}
        assert run_ranks(meet, 2, settings | again) == [(strategy, 3)] * 2


def test_launch_that_starts_one_process_is_refused(text: Path) -> None:
    """`--cpu --num_processes 2` starts one process without a word (accelerate #2741)."""
    done = launch(["--cpu", "--num_processes", "2"], request(text, text / "trap"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_lm.py:")]
    assert len(lines) == 1, done.stderr
    assert "2" in lines[0]
    assert "accelerate launch" in lines[0], "the remedy is a command"


def test_output_that_is_not_a_terminal_has_no_control_characters(text: Path) -> None:
    done = launch([], request(text, text / "plain", train__duration="3 steps", evaluate__every="never"))
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout) & {"\x1b", "\r", "\b"}
    assert "step 3/3" in done.stdout
