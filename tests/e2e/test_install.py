"""The package is built, installed in another folder, and trains there: nothing of the repository is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = """\
data: {block_size: 16, processes: 1, valid_fraction: 0.2}
tokenizer: {vocab_size: 300}
model: {config: {n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}
train: {duration: 5 steps, global_batch_blocks: 2, precision: fp32}
evaluate: {every: never}
report: {trackers: []}
"""


def run(command: list[str], folder: Path, site: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    """What is no Python file is installed only if pyproject.toml names it."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "lmcore"
    ]
    shipped = {path for pattern in patterns for path in (ROOT / "lmcore").glob(pattern)}
    data = {
        path for path in (ROOT / "lmcore").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data - shipped == set()
    for config in (ROOT / "lmcore/accelerate_configs").glob("zero*.yaml"):
        file = yaml.safe_load(config.read_text())["deepspeed_config"]["deepspeed_config_file"]
        assert ROOT / "lmcore" / file in shipped


@pytest.mark.slow
def test_wheel_installed_elsewhere_trains_five_steps(tmp_path: Path) -> None:
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train_lm.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lmcore", source / "lmcore", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)], check=True
    )
    shutil.rmtree(source)

    (work / "text.txt").write_text("".join(f"line {n} of a text\n\n" for n in range(300)))
    (work / "tiny.yaml").write_text(TINY)
    where = run([sys.executable, "-c", "import lmcore; print(lmcore.__file__)"], work, site)
    assert Path(where.strip()).is_relative_to(site)
    assert "train" in run([str(site / "bin" / "lmcore"), "--help"], work, site)
    assert "runs/gpt2_small" in run(
        [sys.executable, "-m", "train_lm", "--config", "gpt2_small", "--print_config"], work, site
    )

    options = ["--config", "tiny.yaml", "--data.train", "text.txt"]
    said = run([str(site / "bin" / "lmcore"), "train", *options], work, site)
    assert "step 5/5" in said
    assert (work / "runs/tiny/export/model.safetensors").is_file()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    said = run([*launcher, "-m", "train_lm", *options, "--train.duration", "7 steps"], work, site)
    assert "step 7/7" in said
