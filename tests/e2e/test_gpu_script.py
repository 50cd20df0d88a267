"""The script that measures a machine with GPUs runs from end to end, on any device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", made)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("name", ["documents", "softcap", "muon"])
def test_checks_pass_on_a_cpu(gpu: Any, name: str) -> None:
    found = gpu.CHILDREN[name](None)
    assert found["passed"] is True, found


def test_row_without_a_result_says_why(gpu: Any, tmp_path: Path) -> None:
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=2)

    def fails() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    found = gpu.attempt(work, "x", fails)
    assert gpu.row_of(found, None, None, {})[0] == "out of memory"
    late = gpu.Workplace(tmp_path, 1.0, cuda=False, gpus=2)
    assert gpu.attempt(late, "x", fails) == {"not_measured": "out of time"}
    device = {"peak_flops": 1e12, "matrix_flops": 5e11}
    fast = {"tokens_per_second": {"median": 55.0}, "peak_bytes": 2**30, "planned_bytes": 2**29}
    row = gpu.row_of(fast, gpu.Case(**{**vars(gpu.TINY["GPT-2 tiny"]), "goal": 50}), 10**10, device)
    assert row == ["55", "50", "1.10", "55.0%", "110.0%", "1.0 GiB", "0.50"]


def test_out_of_time_ends_what_a_launcher_has_started(gpu: Any, tmp_path: Path) -> None:
    """A run that went on would write into the folder while it is removed, and no result would be kept."""
    work = gpu.Workplace(tmp_path, 0.0, cuda=False, gpus=2)
    number = tmp_path / "number"
    with pytest.raises(subprocess.TimeoutExpired):
        work.call(["sh", "-c", f"sleep 100 & echo $! > {number}; wait"])
    started = int(number.read_text())
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_run_that_has_measured_enough_is_ended(gpu: Any, tmp_path: Path) -> None:
    """Its last checkpoint and export, 25 GB of the largest model, took time from the rows below it."""
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=2)
    enough = tmp_path / "enough"
    begin = time.monotonic()
    assert work.call(["sh", "-c", f"touch {enough}; sleep 100"], enough.exists) == ""
    assert time.monotonic() - begin < 30


def test_device_that_cannot_be_asked_costs_no_other_result(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no such function in this torch")

    monkeypatch.setattr(gpu.Workplace, "child", fails)
    monkeypatch.setattr(gpu, "speeds_of", lambda *args, **options: {})
    monkeypatch.setattr(gpu, "checks_of", lambda *args: {"one": lambda: {"passed": True}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    assert json.loads((tmp_path / "gpu-tiny.json").read_text())["checks"] == {"one": {"passed": True}}


@pytest.mark.parametrize("name", ["GPT-2 tiny", "Llama tiny"])
def test_compiled_loop_beside_has_no_mask_in_its_graph(
    gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.13 lets transformers build one there, with which no fast kernel runs."""
    import importlib

    case = gpu.TINY[name]
    modeling = importlib.import_module(f"transformers.models.{case.type}.modeling_{case.type}")
    monkeypatch.setattr(modeling, "create_causal_mask", modeling.create_causal_mask)  # put back afterwards
    calls: list[tuple[Any, Any]] = []

    def look(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                calls.append((node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")))
        return graph.forward

    torch._dynamo.reset()
    net = torch.compile(gpu.plain_model(case), backend=look)
    net(input_ids=torch.ones(2, 8, dtype=torch.int64))
    assert calls == [(None, True)] * 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_script_measures_and_checks_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--no-compile"]
    done = subprocess.run(
        [*command, "--seconds", "1200", "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-tiny.json").read_text())
    ways = [f"{model} / {way}" for model in ("GPT-2 tiny", "Llama tiny") for way in WAYS]
    extra = ["Llama, blocks of 128 over 2 / train_lm.py"]
    extra += [f"GPT-2 tiny / train_lm.py, {what}" for what in ("fp32 stream", "profiled")]
    assert set(found["speeds"]) == {*ways, *extra}
    assert all("not_measured" not in speed for speed in found["speeds"].values()), found["speeds"]
    assert len(found["checks"]) == 7
    assert {name: one["passed"] for name, one in found["checks"].items()} == dict.fromkeys(
        found["checks"], True
    )
    assert "GPT-2 tiny: 238,848 FLOPs a token" in done.stdout
    assert "| resume bit for bit | passed | files 2, resumed at 3 |" in done.stdout


WAYS = ("train_lm.py", "nanoGPT-style loop", "Trainer")
