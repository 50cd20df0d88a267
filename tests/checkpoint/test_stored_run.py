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
from lmcore.config.parse import parse
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.run.resume import with_sources_of
from lmcore.run.setup import reading_of
from lmcore.saved.load import load_model

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


def test_tokenizer_of_a_stored_checkpoint_is_compared_by_its_token_store(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of version 0.1.0 have no fingerprint of the tokenizer, but the store that they read has one."""
    notes: list[str] = []
    assert load_model(run_dir, note=notes.append).tokenizer.vocab_size == 400
    assert notes == []
    shutil.rmtree(run_dir / "tokenizer")
    train_tokenizer([f"other words {n}" for n in range(500)], vocab_size=300, folder=run_dir / "tokenizer")
    with pytest.raises(RequestError, match="is not the tokenizer that the checkpoint was trained with"):
        load_model(run_dir, note=notes.append)
    assert main(["export", str(run_dir / STEP_3), "--out", str(run_dir / "out")]) == 2
    shutil.rmtree(run_dir / "stores")
    assert load_model(run_dir, note=notes.append).tokenizer.vocab_size <= 300
    assert "is taken to be the one that it was trained with" in notes[-1]


def test_files_that_were_sources_of_their_own_stay_so_in_a_run_of_order_version_1(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    config = parse(["--data.train", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    reading = reading_of(config)
    assert len(reading.sources(config.data.train)) == 1
    begun = with_sources_of(config, {"cursor": {"version": 1}})
    assert [source.name for source in reading.sources(begun.data.train)] == ["a", "b"]
    for state in ({}, {"cursor": {"version": 2}}, {"cursor": None}):
        assert with_sources_of(config, state) is config
