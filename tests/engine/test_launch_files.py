"""The files of accelerate_configs/, through the real launcher: each starts what its name says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.fork_server import free_port

SCRIPT = """
import torch
from lmcore.config.schema import EngineConfig, TrainConfig
from lmcore.engine.engine import Engine
engine = Engine(TrainConfig(precision="fp32"), EngineConfig(timeout_seconds=240))
total = int(engine.sum_over_ranks(torch.tensor(engine.rank + 1, device=engine.device)))
who = f"RANK {engine.rank} of {engine.world_size}"
print(f"{who}: {engine.strategy} on {engine.device.type}, sum {total}", flush=True)
engine.close()
"""
FILES = sorted(Path("accelerate_configs").glob("*.yaml"))


def command(script: Path, name: str, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, "--config_file", f"accelerate_configs/{name}.yaml", *options, str(script)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def launch(script: Path, name: str, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        command(script, name, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "start.py"
    path.write_text(SCRIPT)
    return path


def test_cpu_2_starts_two_processes(script: Path) -> None:
    code, output = launch(script, "cpu_2")
    assert code == 0, output
    for rank in range(2):
        assert f"RANK {rank} of 2: ddp on cpu, sum 3" in output


@pytest.mark.slow
def test_launch_form_that_starts_one_process_is_refused(script: Path) -> None:
    code, output = launch(script, "cpu", "--num_processes", "2")
    assert code != 0
    assert "started one process although several were asked for" in output
    assert "cpu_2.yaml" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("cpu", "single"), ("gpu", "single"), *((name, name) for name in ("ddp", "zero1", "zero2", "zero3"))],
)
def test_each_file_starts_its_strategy(script: Path, name: str, strategy: str) -> None:
    size = 1 if strategy == "single" else 2
    code, output = launch(script, name, "--num_processes", str(size))
    assert code == 0, output
    assert f"RANK {size - 1} of {size}: {strategy} on cpu, sum {size * (size + 1) // 2}" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "strategy"),
    [("ddp_multinode", [], "ddp"), ("zero2", ["--deepspeed_multinode_launcher", "standard"], "zero2")],
)
def test_two_nodes_by_hand(script: Path, name: str, options: list[str], strategy: str) -> None:
    """Two launchers on one machine stand for two nodes; ranks follow machine_rank."""
    port = str(free_port())
    shared = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    nodes = [
        subprocess.Popen(
            command(script, name, *shared, "--main_process_port", port, "--machine_rank", str(k), *options),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(2)
    ]
    for k, node in enumerate(nodes):
        output, _ = node.communicate(timeout=280)
        assert f"RANK {k} of 2: {strategy} on cpu, sum 3" in output


@pytest.mark.slow
def test_fsdp2_on_a_cpu_is_refused(script: Path) -> None:
    code, output = launch(script, "fsdp2", "--num_processes", "2")
    assert code != 0
    assert "fsdp2 was asked for but accelerate built ddp" in output


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_the_sbatch_files_is_explained(path: Path) -> None:
    """A head that says when, how and how much memory; a remark on every setting that is not plain."""
    text = path.read_text()
    head = text.split("compute_environment")[0]
    assert "accelerate launch --config_file accelerate_configs/" in head
    assert re.search(r"Memory for each parameter", head)
    sections = ("fsdp_config:", "deepspeed_config:", "parallelism_config:")
    for line in text[len(head) :].splitlines():
        assert not line.strip() or "#" in line or line.startswith(sections), line
    content = yaml.safe_load(text)
    assert content.get("mixed_precision", "no") == "no"  # the run's own


def test_there_is_a_file_for_every_strategy() -> None:
    names = {path.stem for path in FILES}
    wanted = {
        "cpu",
        "cpu_2",
        "gpu",
        "ddp",
        "ddp_multinode",
        "fsdp2",
        "fsdp2_multinode",
        "zero1",
        "zero2",
        "zero3",
    }
    assert wanted | {"zero2_offload", "zero3_offload"} == names
