"""A run folder written by lmcore 0.1.0 (commit 0e1cd82) still opens, resumes bit for bit, and exports.

``tests/data/stored_run`` holds the configuration, the tokenizer, the token store and the checkpoint of step 3
of a run of 6 steps. The losses of steps 4 to 6 were recorded by the code that wrote the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "data" / "stored_run"
STEP_3 = "checkpoints/step-00000003"
TRAIN_LOSSES = {4: 5.946744918823242, 5: 5.94441032409668, 6: 5.924302577972412}
VALID_LOSSES = {4: 5.924408622409986, 5: 5.914970729662024, 6: 5.910478011421535}
GRADIENT_NORMS = {4: 1.6272895336151123, 5: 1.5272536277770996, 6: 1.6109400987625122}

SAME_KERNELS = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Kernels that every x86-64 processor has: the recorded losses do not depend on the machine."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_stored_checkpoint_resumes_bit_for_bit(run_dir: Path) -> None:
    environment = os.environ | SAME_KERNELS | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "train_lm.py"), "--config", "config.yaml"]
    done = subprocess.run(command, cwd=run_dir, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    train = [record for record in records if record["kind"] == "train"]
    assert {record["step"]: record["loss"] for record in train} == TRAIN_LOSSES
    assert {record["step"]: record["grad_norm"] for record in train} == GRADIENT_NORMS
    valid = {r["step"]: r["loss"] for r in records if r["kind"] == "eval" and r["step"] > 3}
    assert valid == VALID_LOSSES
    assert [record["position"] for record in train] == [16, 20, 24]


def test_stored_checkpoint_exports(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["checkpoints", str(run_dir), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["export", str(run_dir / STEP_3), "--out", str(run_dir / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(run_dir / "out")
    assert model(torch.tensor([[2, 3, 4]])).logits.shape == (1, 3, 400)
