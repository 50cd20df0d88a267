"""The script that measures a GPU runs from end to end, on any device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_script_measures_every_way_to_train(tmp_path: Path) -> None:
    sizes = ["--tiny", "--no-compile", "--steps", "1", "--parity-steps", "3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *sizes, "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "gpu-tiny.json").read_text())["cases"]
    assert set(cases) == {
        f"{model} / {way}"
        for model in ("GPT-2 tiny", "Llama tiny")
        for way in ("lmcore", "plain loop", "Trainer")
    }
    for model in ("GPT-2 tiny", "Llama tiny"):
        ours, plain = (cases[f"{model} / {way}"]["losses"] for way in ("lmcore", "plain loop"))
        assert len(ours) == 3
        assert ours == pytest.approx(plain, rel=1e-3), "the same training in bf16, by other kernels"
    assert "6 x 68,480 + 12 x 2 x 32 x 32 = 435,456 FLOPs a token" in done.stdout
