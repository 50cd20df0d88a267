"""The script that measures a machine with GPUs runs from end to end, on any device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
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


def test_row_that_hangs_takes_no_more_than_its_own_time(gpu: Any, tmp_path: Path) -> None:
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=2)
    begin = time.monotonic()
    found = gpu.attempt(work, "x", lambda: work.call(["sh", "-c", "echo compiling; sleep 100"]), 1.0)
    assert time.monotonic() - begin < 30
    assert found["not_measured"] == "not done in 1 s"
    assert "compiling" in found["error"], "what it said last"
    assert gpu.attempt(work, "y", lambda: {"passed": True}, 1.0) == {"passed": True}, (
        "the next has its own time"
    )


def test_rows_that_were_reached_are_written_however_the_call_ends(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a call is ended from outside, at a limit of the machine's, and all results were written at its end."""
    speed = {"tokens_per_second": {"median": 55.0}, "peak_bytes": None}

    def ends() -> None:
        raise KeyboardInterrupt

    rows = {("A", "train_lm.py"): lambda: speed, ("B", "train_lm.py"): ends, ("A", "Trainer"): lambda: speed}
    monkeypatch.setattr(gpu.Workplace, "child", lambda *arguments: {})
    monkeypatch.setattr(gpu, "speeds_of", lambda *args, **options: rows)
    monkeypatch.setattr(gpu, "checks_of", lambda *args: {"one": lambda: {"passed": True}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    found = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert found["speeds"]["A / train_lm.py"] == speed
    assert found["checks"] == {"one": {"passed": True}}, "before the second model"
    assert "| A | train_lm.py | 55 |" in found["table"]
    assert "| A | Trainer | not reached |" in found["table"]


def test_checks_run_side_by_side(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another they took three minutes of eight."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=1)
    together = threading.Barrier(3)
    runs = {name: lambda: together.wait(30) for name in "abc"}
    assert dict(gpu.side_by_side(work, runs, 60.0)).keys() == {"a", "b", "c"}
    variable = "TORCHINDUCTOR_COMPILE_THREADS"
    said = dict(gpu.side_by_side(work, {"x": lambda: work.call(["sh", "-c", f"echo ${variable}"])}, 60.0))
    assert said == {"x": "2\n"}


def test_strategy_is_not_compared_with_a_run_that_failed(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=1)

    def train_lm(work: Any, case: Any, *, launch: Any = None, **options: Any) -> Path:
        if launch is None:
            raise RuntimeError("out of memory")
        (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "loss": 1.0}\n')
        return tmp_path

    monkeypatch.setattr(gpu, "train_lm", train_lm)
    checks = gpu.checks_of(work, gpu.TINY["GPT-2 tiny"])
    names = ("one process learns", "FSDP2 with CPU offload follows")
    found = [gpu.attempt(work, name, checks[name]) for name in names]
    assert found[0]["not_measured"] == "out of memory"
    assert "gave no losses" in found[1]["error"]


def test_peak_is_what_the_plan_counts(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the allocator has only reserved was compared with the plan, and with the tensors of the others."""
    lines = [{"kind": "event", "event": "start", "plan": {"memory_bytes": 90}}]
    for step in range(5, 26, 5):
        numbers = {"tokens_per_second": 1.0, "memory_bytes": 150, "tensor_bytes": 100, "loss": 1.0}
        lines.append({"kind": "train", "step": step, **numbers})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(gpu, "train_lm", lambda *args, **options: run_dir)
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=1)
    assert gpu.measure_train_lm(work, gpu.TINY["GPT-2 tiny"])["peak_bytes"] == 100


def test_one_gpu_needs_no_launcher(gpu: Any, tmp_path: Path) -> None:
    """It imports torch for seconds, in each row, to start one process that does so again."""
    work = gpu.Workplace(tmp_path, 60.0, cuda=True, gpus=1)
    assert gpu.launcher(work, "gpu") == [sys.executable]
    assert "accelerate.commands.launch" in gpu.launcher(work, "fsdp2")
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=2)
    assert any("cpu.yaml" in word for word in gpu.launcher(work, "gpu"))


def test_models_without_a_llama_can_be_chosen_on_several_gpus(gpu: Any, tmp_path: Path) -> None:
    work = gpu.Workplace(tmp_path, 60.0, cuda=False, gpus=2)
    rows = gpu.speeds_of(work, {"GPT-2 tiny": gpu.TINY["GPT-2 tiny"]}, compiled=False)
    assert {model for model, _ in rows} == {"GPT-2 tiny"}


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


def test_compiled_loop_beside_has_its_loss_in_its_graph(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nanoGPT has it; with the loss outside the loop was slower than what it stands for."""
    made: list[int] = []

    def look(net: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            found = net(*args, **kwargs)
            made.append(getattr(found, "ndim", -1))
            return found

        return compiled

    monkeypatch.setattr(torch, "compile", look)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(gpu, "without_masks", lambda kind: None)
    found = gpu.child_nanogpt({"case": vars(gpu.TINY["GPT-2 tiny"]), "compiled": True})
    assert set(made) == {0}
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_script_measures_and_checks_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--no-compile"]
    done = subprocess.run(
        [*command, "--seconds", "1200", "--row_seconds", "600", "--out", str(tmp_path)],
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
