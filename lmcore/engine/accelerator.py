"""Creates accelerate's ``Accelerator`` with every plugin built in code, and checks that it is what was requested.

What the launcher's environment would decide silently (accumulation, compile flags, one FSDP group for the whole model,
gradients reduced in 16 bits) is decided here. FSDP2's plugin and its checks are here too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lmcore.conventions import torch_dtype
from lmcore.engine import launch, zero
from lmcore.engine.ranks import use_job_interface
from lmcore.engine.state import persistent_buffers
from lmcore.errors import RequestError


def build(
    request: launch.Request,
    *,
    precision: str,
    reduce_dtype: str,
    timeout: timedelta,
    cuda: bool,
) -> Accelerator:
    """Join the process group and create the accelerator.

    Raises:
        RequestError: accelerate built something else than was requested.
    """
    if not cuda:
        # accelerate imports DeepSpeed when it unwraps a model, and DeepSpeed would print that it guesses the device.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with_zero = request.deepspeed is not None
    plugins: dict[str, Any] = {}
    backend = None
    if request.deepspeed is not None:
        zero.check_compiler(request.deepspeed)
        zero.quiet_deepspeed(device_is_cpu=not cuda)
        zero.single_process_environment(os.environ)
        config = zero.base_config(request.deepspeed, precision=precision, reduce_dtype=reduce_dtype)
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        backend = None if cuda else "gloo"  # otherwise, on a CPU, every rank would silently train alone
    elif request.strategy == "fsdp2":
        launch.fill_in_mesh(os.environ)
        plugins["fsdp_plugin"] = fsdp_plugin(precision=precision, reduce_dtype=reduce_dtype)
    use_job_interface()
    rejoin(os.environ, backend="cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timeout)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not cuda and not with_zero,
        # A plugin object, because the launcher's environment would override a number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # The engine compiles layers itself, in the same way for every strategy.
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=timeout),
            # The bucket view saves one copy of the gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        **plugins,
    )
    if with_zero:
        # If transformers knew of ZeRO-3, it would partition a pretrained model while loading it, on all ranks
        # together; here only rank 0 loads it.
        unset_hf_deepspeed_config()
    check(accelerator, request, precision)
    return accelerator


def check(accelerator: Accelerator, asked: launch.Request, precision: str) -> str:
    """Compare what accelerate built with what was requested; return the strategy.

    Raises:
        RequestError: the number of processes, the strategy or the precision differs.
    """
    if accelerator.num_processes != asked.world_size:
        raise RequestError(
            f"the launcher started {asked.world_size} processes but accelerate sees "
            f"{accelerator.num_processes}: use {launch.SEVERAL_ON_CPU}"
        )
    built = built_strategy(accelerator)
    # torchrun with one process may give either
    one_process = asked.world_size == 1 and {built, asked.strategy} == {"single", "ddp"}
    if built != asked.strategy and not one_process:
        reason = ""
        if asked.strategy == "fsdp2" and accelerator.device.type == "cpu":
            reason = " (accelerate shards on GPUs only; on a CPU use DDP or ZeRO)"
        raise RequestError(
            f"{asked.strategy} was asked for but accelerate built {built}{reason}: {launch.remedy(asked.strategy)}"
        )
    mixed = accelerator.mixed_precision
    if (mixed if mixed != "no" else "fp32") != precision:
        raise RequestError(f"precision {precision} was asked for but accelerate built {mixed}")
    return built


def built_strategy(accelerator: Accelerator) -> str:
    """The strategy that accelerate has actually built."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return "ddp"
    if kind == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    if kind == DistributedType.DEEPSPEED:
        stage: int = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return f"zero{stage}"
    return str(kind.value).lower()


def rejoin(env: Mapping[str, str], *, backend: str, timeout: timedelta) -> None:
    """Create the process group of a rank that torch's launcher has restarted (``--max_restarts``, one node).

    The launcher's store outlives the ranks and still holds the addresses of the dead ones, which torch no longer
    distinguishes (pytorch issue 135712), so each restart uses its own key prefix. A no-op at the first start, and on
    several nodes, where each launcher counts its own restarts.
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
    """Reset accelerate's state, which it keeps in class attributes, so that the next engine of this process starts fresh."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def choose_kernels(device: torch.device, *, deterministic: bool, tf32: bool) -> None:
    """Set ``deterministic`` (bit-identical reruns, slower) and ``tf32`` (TF32 for fp32 matrix products, CUDA only)."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]


# ---- FSDP2 -------------------------------------------------------------------------------------------------


def fsdp_plugin(*, precision: str, reduce_dtype: str) -> Any:
    """The FSDP2 plugin, with gradients reduced and accumulated in ``reduce_dtype``, and outputs that keep their dtype.

    accelerate's own policy for bf16 reduces gradients in bf16 and returns the loss itself in bf16. Settings that are not
    given here (offload, reshard) come from the launcher's environment (``FSDP_*``).
    """
    compute = None if precision == "fp32" else torch_dtype(precision)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch_dtype(reduce_dtype)
        ),
        activation_checkpointing=False,  # FSDP's own draws different dropout masks when it recomputes
        cpu_ram_efficient_loading=False,  # sharded_init distributes rank 0's weights
    )


def check_fsdp_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse Adafactor (``RequestError``), which fails on sharded tensors."""
    if isinstance(optimizer, torch.optim.Adafactor):
        raise RequestError(
            "torch's Adafactor fails on sharded tensors: use adamw or muon, or DDP instead of FSDP2"
        )


def fsdp_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Switch off fused kernels other than Adam's, which torch 2.13 does not have for sharded tensors.

    Raises:
        RequestError: see :func:`check_fsdp_optimizer`.
    """
    check_fsdp_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one of them
        for group in optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False
    return optimizer


def replicate(accelerator: Accelerator, module: nn.Module, group: Any) -> Any:
    """DDP over the ranks of a group, which accelerate's own does not support; with one rank, only the prepared module."""
    prepared = accelerator.prepare_model(module, evaluation_mode=True)  # without DDP
    if dist.get_world_size(group) == 1:
        return prepared
    return nn.parallel.DistributedDataParallel(
        prepared,
        process_group=group,
        gradient_as_bucket_view=True,
        # Only buffers that training changes must be kept equal.
        broadcast_buffers=bool(persistent_buffers(module)),
    )


def wrap_layers(fsdp_plugin: Any, layers: list[nn.Module]) -> None:
    """Make each of these layers its own FSDP group, unless the launcher's file names other classes.

    Without class names accelerate would make one group of the whole model.
    """
    if not fsdp_plugin.transformer_cls_names_to_wrap:
        fsdp_plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
