"""accelerate's ``Accelerator``, with every plugin made in code.

Comes in: what was asked for, checked. Goes out: the accelerator; the process group is up. What the launcher's
environment would say silently (accumulation, compile flags, one FSDP group, 16-bit reductions) is said here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lmcore.engine import fsdp, zero
from lmcore.engine.launch import Request
from lmcore.engine.network import stay_on_the_jobs_interface


def build(
    request: Request, *, precision: str, reduce_dtype: str, timeout: timedelta, cuda: bool
) -> Accelerator:
    """Join the process group and make the accelerator."""
    if not cuda:
        # accelerate imports DeepSpeed when it unwraps a model, and that would say that it guesses.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with_zero = request.deepspeed is not None
    plugins: dict[str, Any] = {}
    backend = None
    if request.deepspeed is not None:
        zero.check_compiler(request.deepspeed)
        zero.quiet_deepspeed(device_is_cpu=not cuda)
        zero.alone_environment(os.environ)
        config = zero.base_config(request.deepspeed, precision=precision, reduce_dtype=reduce_dtype)
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        backend = None if cuda else "gloo"  # without it every rank would silently train alone on a CPU
    elif request.strategy == "fsdp2":
        plugins["fsdp_plugin"] = fsdp.plugin(precision=precision, reduce_dtype=reduce_dtype)
    stay_on_the_jobs_interface()
    rejoin(os.environ, backend="cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timeout)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not cuda and not with_zero,
        # A plugin object, not a number: a number would give way to the launcher's environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # Layers are compiled by the engine, for every strategy alike.
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=timeout),
            # The bucket view saves one copy of the gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        **plugins,
    )
    if with_zero:
        # Told of ZeRO-3, transformers would partition a pretrained model while it reads it, on all ranks
        # together; here rank 0 reads it alone.
        unset_hf_deepspeed_config()
    return accelerator


def rejoin(env: Mapping[str, str], *, backend: str, timeout: timedelta) -> None:
    """The process group of a rank that torch's launcher starts again (``--max_restarts``, one node).

    The launcher's store outlives the ranks and still holds the addresses of those that are dead, which torch no longer
    tells apart (pytorch issue 135712): what this start writes goes under a name of its own. Does nothing at a first
    start, nor on several nodes, whose launchers count their restarts each for itself.
    """
    attempt, size = env.get("TORCHELASTIC_RESTART_COUNT", ""), env.get("WORLD_SIZE", "1")
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt in ("", "0") or not shared or env.get("LOCAL_WORLD_SIZE") != size or dist.is_initialized():
        return
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"restart-{attempt}", store),
        rank=int(env["RANK"]),
        world_size=int(size),
        timeout=timeout,
    )


def forget() -> None:
    """accelerate keeps its state in class attributes; another engine of this process must not inherit it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def choose_kernels(device: torch.device, *, deterministic: bool, tf32: bool) -> None:
    """Bit-identical reruns at the cost of speed; TF32 for fp32 matrix products (CUDA only)."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
