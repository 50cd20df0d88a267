"""What a run on GPUs asks of the machine, without one: torch.cuda and nvidia-smi are replaced."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmcore.engine import launch
from lmcore.engine.engine import Engine
from lmcore.engine.ranks import Ranks
from lmcore.errors import RequestError
from lmcore.model import products
from tests.support import engine_runs
from tests.support.engine_runs import Job
from tests.support.fork_server import run_ranks


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """One GPU of each compute capability, as torch.cuda would say; of none it is not available."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an NVIDIA driver, of which nvidia-smi tells."""
    path = tmp_path / "nvidia-smi"
    path.write_text("#!/bin/sh\necho 550.54.15\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return path


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([(7, 0)], "fp32"),  # V100
        ([(7, 5)], "fp32"),  # T4: torch counts its emulation as support
        ([(8, 0)], "bf16"),  # A100
        ([(9, 0), (9, 0)], "bf16"),
        ([(9, 0), (7, 5)], "fp32"),  # the same on every rank
    ],
)
def test_auto_precision_takes_bf16_only_where_the_gpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], precision: str
) -> None:
    pretend_cuda(monkeypatch, *capabilities)
    assert launch.resolve_precision("auto", {}, cuda=True) == precision
    assert products.has_native_bf16() == (precision == "bf16")


@pytest.mark.parametrize(("amx", "avx512", "has"), [(0, 0, ""), (0, 1, "AVX512-BF16"), (1, 1, "AMX")])
def test_auto_precision_takes_bf16_only_on_cpus_that_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, amx: int, avx512: int, has: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    precision = launch.resolve_precision("auto", {}, cuda=False)
    assert precision == ("bf16" if has else "fp32")
    assert launch.resolve_precision("fp32", {}, cuda=False) == "fp32"
    assert (has or "fp32") in launch.describe_precision("auto", precision, cuda=False)
    # Asked for where it is emulated, it says so: such a run takes several times as long as in fp32.
    assert ("fp32 is faster" in launch.describe_precision("bf16", "bf16", cuda=False)) == (not has)


def test_auto_precision_is_the_launchers_where_it_says_one() -> None:
    assert launch.resolve_precision("auto", {"ACCELERATE_MIXED_PRECISION": "bf16"}, cuda=False) == "bf16"


@pytest.mark.parametrize("words", [["--config_file", "mine.yaml"], ["--config_file=mine.yaml"], []])
def test_contradicting_precision_names_the_launchers_file(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "accelerate" / "default_config.yaml"
    answers.parent.mkdir()
    answers.write_text("mixed_precision: bf16\n")
    process = SimpleNamespace(cmdline=lambda: ["python", "accelerate", "launch", *words, "train_lm.py"])
    monkeypatch.setattr(launch.psutil, "Process", lambda pid: process)
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "HF_HOME": str(tmp_path)}
    with pytest.raises(
        RequestError, match=r"mixed_precision 'bf16'.*'fp32'.*--train.precision bf16"
    ) as error:
        launch.resolve_precision("fp32", env, cuda=False)
    assert ("mine.yaml" if words else str(answers)) in str(error.value)
    assert "accelerate_configs/cpu.yaml" in str(error.value)
    with pytest.raises(RequestError, match=r"dynamo_backend 'INDUCTOR' .in "):
        launch.check_compile({**env, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    with pytest.raises(RequestError, match=r"gradient_accumulation_steps 4 .in "):
        launch.check_accumulation({**env, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 2)


# ---- devices -----------------------------------------------------------------------------------------------


def test_gpu_that_torch_cannot_use_is_refused(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver older than torch's CUDA, or a torch built for the CPU: not a silent training on the CPU."""
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RequestError, match=r"driver 550.54.15.*built for the CPU.*CUDA_VISIBLE_DEVICES=-1"):
        launch.uses_cuda({})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RequestError, match=r"needs a newer driver for CUDA 13.0"):
        launch.uses_cuda({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(RequestError, match="CUDA_VISIBLE_DEVICES is '7': unset it"):
        launch.uses_cuda({"CUDA_VISIBLE_DEVICES": "7"})


@pytest.mark.parametrize(
    "env", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1,-1"}, {"ACCELERATE_USE_CPU": "true"}]
)
def test_requested_cpu_is_used_on_a_machine_with_gpus(
    env: dict[str, str], smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch)
    assert not launch.uses_cuda(env)


def test_machine_without_a_gpu_trains_on_the_cpu(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    smi.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert not launch.uses_cuda({})


def test_more_processes_than_gpus_are_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, (9, 0), (9, 0), (9, 0), (9, 0))
    assert launch.uses_cuda({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(RequestError, match=r"8 processes .* has 4 GPUs .* --num_processes 4"):
        launch.uses_cuda({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"})
    with pytest.raises(RequestError, match="--num_processes 8"):
        launch.uses_cuda({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})


# ---- compiling ---------------------------------------------------------------------------------------------


def test_compile_auto_is_on_for_gpus_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert launch.compiles("auto", cuda=False) == (False, "off on a CPU (train.compile auto)")
    on, row = launch.compiles("auto", cuda=True)
    assert (on, "no C++ compiler" in row) == (False, True)
    assert launch.compiles(False, cuda=True)[0] is False
    with pytest.raises(RequestError, match=r"C\+\+ compiler.*apt install g\+\+.*--train.compile false"):
        launch.compiles(True, cuda=False)
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    on, row = launch.compiles("auto", cuda=True)
    assert (on, "the first step compiles" in row) == (True, True)
    assert launch.compiles(True, cuda=False)[0] is True
    # A system's Python may be installed without its header files.
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    on, row = launch.compiles("auto", cuda=True)
    assert (on, "no Python.h" in row) == (False, True)
    with pytest.raises(RequestError, match=r"Python.h does not exist.*python3-dev.*--train.compile false"):
        launch.compiles(True, cuda=False)


# ---- HSDP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "world", "here", "mesh"),
    [
        (("2", "8"), 16, 8, (2, 8)),  # it fits
        (("2", "8"), 32, 8, (4, 8)),  # another number of nodes
        (("2", "8"), 8, 4, (2, 4)),  # smaller nodes
        (("4", "4"), 16, 8, (4, 4)),  # the user's own cut
    ],
)
def test_hsdp_sizes_follow_the_number_of_processes(
    sizes: tuple[str, str], world: int, here: int, mesh: tuple[int, int]
) -> None:
    names = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
    env = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(here),
        **dict(zip(names, sizes)),
    }
    assert launch.fill_in_mesh(env) == mesh
    assert tuple(int(env[name]) for name in names) == mesh
    assert launch.fill_in_mesh({"WORLD_SIZE": "8"}) is None


# ---- reductions --------------------------------------------------------------------------------------------


def test_ddp_reduces_in_bf16_if_asked() -> None:
    exact = engine_runs.run(Job(mode="ddp2", steps=4))
    rounded = engine_runs.run(Job(mode="ddp2", steps=4, reduce_dtype="bf16"))
    assert rounded.losses[0] == exact.losses[0]
    assert rounded.norms != exact.norms, "the gradients are rounded on their way"
    torch.testing.assert_close(torch.tensor(rounded.norms), torch.tensor(exact.norms), rtol=1e-2, atol=0)


# ---- offloading --------------------------------------------------------------------------------------------


def norm_with_gradients_elsewhere() -> list[str]:
    """Under FSDP2's CPU offload gradients are on the host although the device is another."""
    engine = engine_runs.make_engine(Job(mode="fsdp2"))
    engine.prepare(
        engine_runs.make_model("gpt2-tied", weights=engine.needs_weights),
        engine_runs.make_optimizer("adamw"),
        gradient_accumulation=1,
        micro_batch_blocks=9,
        clip_norm=1.0,
    )
    batch = {k: v[9 * engine.rank : 9 * engine.rank + 9] for k, v in engine_runs.batch_of(0).items()}
    loss_sum, count = engine.forward(batch, 0)
    engine.backward(loss_sum, int(count))
    engine.device = torch.device("meta")
    return [tensor.device.type for tensor in engine.update()]


def test_norm_is_on_the_device_when_fsdp_offloads_to_the_host() -> None:
    assert run_ranks(norm_with_gradients_elsewhere, 2) == [["meta", "meta"]] * 2


# ---- sampling with flash attention -------------------------------------------------------------------------


def sample_with_flash(mode: str) -> list[Any]:
    engine = engine_runs.make_engine(Job(mode=mode, precision="bf16"))
    module: Any = engine_runs.make_model("llama", weights=engine.needs_weights)
    module.model.config._attn_implementation = "flash_attention_2"
    engine.prepare(module, engine_runs.make_optimizer("adamw"), gradient_accumulation=1, micro_batch_blocks=1)
    with engine.sampling() as sampling:
        attention = sampling.model.config._attn_implementation
        return [attention, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")]


def test_sampling_computes_in_bf16_where_flash_attention_needs_it() -> None:
    """Flash attention takes no fp32; a sharded model computes in the types of the training anyway."""
    assert run_ranks(sample_with_flash, 1, "single") == [["flash_attention_2", True, torch.bfloat16]]
    assert run_ranks(sample_with_flash, 2, "zero3") == [["flash_attention_2", False, torch.bfloat16]] * 2


# ---- a failing rank ----------------------------------------------------------------------------------------


def test_engine_of_a_failing_rank_aborts_instead_of_waiting_in_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Destroying NCCL's group waits for collectives in which the other ranks may never join."""
    events: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl,cpu:gloo")
    monkeypatch.setattr(dist, "new_group", lambda **_: object())
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: events.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: events.append("destroy"))
    engine = Engine.__new__(Engine)

    def run(error: Exception | None) -> None:
        engine._ranks = Ranks(timedelta(seconds=1))
        with contextlib.ExitStack() as stack:
            stack.callback(engine.close)
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        run(KeyError("a column of mine"))
    assert events == ["abort"]
    events.clear()
    run(None)
    assert events == ["destroy"], "in good order all ranks close together"


def test_answers_about_deepspeed_that_a_run_sets_itself_are_refused_with_the_remedy() -> None:
    """Those of an old ``accelerate config``."""
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_CONFIG_DS_FIELDS": "gradient_accumulation_steps,zero_stage,zero3_init_flag",
        "WORLD_SIZE": "1",
    }
    with pytest.raises(
        RequestError, match=r"gradient_accumulation_steps, zero_stage of DeepSpeed.*accelerate_configs/zero2"
    ):
        launch.request(env, None)
    env["ACCELERATE_CONFIG_DS_FIELDS"] = "zero3_init_flag,deepspeed_config_file"
    assert launch.request(env, None).strategy == "zero2"
