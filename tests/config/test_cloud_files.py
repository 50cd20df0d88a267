"""The files of cloud/ ask for what there is: options, recipes, launcher configurations and extras of the package."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from lmcore.config.parse import parse

ROOT = Path(__file__).resolve().parents[2]


def options_after(words: list[str], last: str) -> list[str]:
    """The options of a command line after the word ``last``."""
    return words[words.index(last) + 1 :]


def test_skypilot_job_asks_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = yaml.safe_load((ROOT / "cloud/sky.yaml").read_text())
    words = shlex.split(job["run"].replace("$BUCKET", "my-bucket").replace("\\\n", " "), comments=True)
    # Exit codes 71 and 75 come through: accelerate launch would make 1 of them.
    assert Path(words[0]).name == "lmcore"
    assert words[1] == "train"
    assert words[words.index("--processes") + 1] == "$SKYPILOT_NUM_GPUS_PER_NODE"
    config = parse(options_after(words, "$SKYPILOT_NUM_GPUS_PER_NODE"), default_recipe=None)
    assert config.run_dir == "s3://my-bucket/runs/gpt2_small"
    assert config.data.train == ["s3://my-bucket/corpus/**/*.jsonl.zst"]
    assert config.data.store_dir == "s3://my-bucket/token_stores"
    assert (ROOT / words[words.index("--config_file") + 1]).exists()
    assert job["resources"]["use_spot"] is True
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [71, 75]
    [extra] = re.findall(r"'\.\[(\w+)\]'", job["setup"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[extra][0].startswith("s3fs")
    assert all(value is None for value in job["secrets"].values()), "secrets are given, not written down"


def test_kubeflow_job_asks_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = yaml.safe_load((ROOT / "cloud/trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    # The image has no train_lm.py in its working folder; it has the module.
    assert trainer["command"][:3] == ["torchrun", "-m", "train_lm"]
    config = parse(options_after(trainer["command"], "train_lm"), default_recipe=None)
    assert config.run_dir == "s3://my-bucket/runs/gpt2_small"
    assert config.data.train == ["s3://my-bucket/corpus/**/*.jsonl.zst"]
    assert config.data.store_dir == "s3://my-bucket/token_stores"
    assert (job["kind"], trainer["numNodes"]) == ("TrainJob", 1)
    secrets = [variable for variable in trainer["env"] if variable["name"].startswith("AWS_")]
    assert len(secrets) == 2
    assert all("secretKeyRef" in variable["valueFrom"] for variable in secrets)
    assert {"name": "PET_SHUTDOWN_TIMEOUT", "value": "120"} in trainer["env"]
