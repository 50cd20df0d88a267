"""benchmarks/bucket.py runs from end to end, in sizes that measure nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(comparison: str, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/bucket.py"), comparison, "--tiny", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / f"bucket-{comparison}-tiny.json").read_text())
    assert found["table"] in done.stdout
    return found["found"]


@pytest.mark.long
@pytest.mark.slow
def test_cost_of_uploads_is_measured(tmp_path: Path) -> None:
    found = run("saving", tmp_path)
    [both] = [one for one in found.values() if isinstance(one, dict)]
    assert list(both["turns"]) == ["uploads every 50 steps", "the same without uploads"]
    assert all(len(turns) == 2 for turns in both["turns"].values())
    assert found["uploaded"] == 2


@pytest.mark.long
@pytest.mark.slow
def test_reading_from_a_bucket_is_compared_with_the_disk(tmp_path: Path) -> None:
    found = run("reading", tmp_path)
    pairs = {what for what, one in found.items() if isinstance(one, dict) and "ratio" in one}
    assert pairs == {"training from a store", "training from text", "reading and tokenizing", "reading"}
    assert all(seconds > 0 for seconds in found["first_seconds"].values())
    for what in ("training from text", "reading and tokenizing", "reading"):
        assert found[what]["requests"].get("GET", 0) == 0, "text comes from the cache"
        assert found[what]["requests"]["HEAD"] > 0, "the version of an object is looked at"
