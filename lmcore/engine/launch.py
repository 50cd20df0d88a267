"""What the launcher asked for, and whether it came about.

Comes in: the environment that ``accelerate launch`` or ``torchrun`` left, and the run's own wishes. Goes out:
a :class:`Request`, or a :class:`~lmcore.errors.RequestError` with the command that does what was meant.

accelerate has several launch forms that silently train something else: one process instead of two, DDP
instead of FSDP2, no DeepSpeed. Each is recognized here by what it leaves in the environment or by what was
built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from lmcore.engine import zero
from lmcore.errors import RequestError

SEVERAL_ON_CPU = "accelerate launch --config_file accelerate_configs/cpu_2.yaml --num_processes N train_lm.py"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The strategy that was asked for.

    ``strategy`` is "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3"; ``deepspeed`` the JSON's content
    with the launcher's fields merged in (empty but for the stage if there is no file), else ``None``.
    """

    strategy: str
    world_size: int
    deepspeed: dict[str, Any] | None = None


def world_size(env: Mapping[str, str]) -> int:
    """``WORLD_SIZE``; 1 without a launcher."""
    return int(env.get("WORLD_SIZE", "1"))


def flag(env: Mapping[str, str], name: str) -> bool:
    """Whether a variable holds a yes (accelerate writes true, True and 1)."""
    return env.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def forced_to_cpu(env: Mapping[str, str]) -> bool:
    """Whether the launcher asked for the CPU although there may be a GPU."""
    return flag(env, "ACCELERATE_USE_CPU")


def request(env: Mapping[str, str], deepspeed: str | None) -> Request:
    """What the environment asks for; raises where a launch form is known to do something else."""
    size = world_size(env)
    if "ACCELERATE_MIXED_PRECISION" in env and "WORLD_SIZE" not in env and "MASTER_PORT" in env:
        # The plain launcher exports the port when several processes were asked for, and then starts one.
        raise RequestError(
            "accelerate started one process where several were asked for (it does so for --cpu and for "
            f"MULTI_CPU): use {SEVERAL_ON_CPU}; if one is meant, unset MASTER_ADDR and MASTER_PORT"
        )
    for name, value in env.items():
        # Blocks are sharded over all ranks; under these several ranks would have to share one batch.
        split = name.startswith("PARALLELISM_CONFIG_") and name.endswith(("_TP_SIZE", "_CP_SIZE", "_SP_SIZE"))
        if split and value not in ("", "1"):
            raise RequestError(f"{name}={value}: tensor, context and sequence parallelism are not supported")
    with_fsdp = flag(env, "ACCELERATE_USE_FSDP")
    with_deepspeed = deepspeed is not None or flag(env, "ACCELERATE_USE_DEEPSPEED")
    if with_fsdp and with_deepspeed:
        raise RequestError("FSDP2 (by the launcher) and DeepSpeed (by engine.deepspeed) exclude each other")
    if with_deepspeed:
        if forced_to_cpu(env):
            raise RequestError(
                "DeepSpeed is silently dropped with --cpu or ACCELERATE_USE_CPU: leave them out; "
                "to keep a run off the GPU set CUDA_VISIBLE_DEVICES=-1"
            )
        content = zero.read(env, deepspeed)
        return Request(
            strategy=f"zero{content['zero_optimization']['stage']}", world_size=size, deepspeed=content
        )
    if with_fsdp:
        version = env.get("FSDP_VERSION", "1")
        if version != "2":
            raise RequestError(
                f"FSDP version {version} (accelerate's default) was asked for: {remedy('fsdp2')}"
            )
        if flag(env, "FSDP_ACTIVATION_CHECKPOINTING"):
            raise RequestError(
                "fsdp_activation_checkpointing draws other dropout masks when it recomputes: "
                "use --train.activation_checkpointing true"
            )
        return Request(strategy="fsdp2", world_size=size)
    return Request(strategy="ddp" if size > 1 else "single", world_size=size)


def resolve_precision(asked: str, env: Mapping[str, str], *, cuda: bool) -> str:
    """The precision to run in; raises where the launcher's word differs or the device cannot."""
    if asked not in ("auto", "fp32", "bf16", "fp16", "fp8"):
        raise RequestError(f"train.precision {asked!r} is unknown: use fp32, bf16, fp16, fp8 or auto")
    launched = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "auto" and launched == "no":
        return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if asked == "auto":
        asked = launched
    elif launched not in ("no", asked):
        raise RequestError(
            f"the launcher says mixed_precision {launched!r} but the run says train.precision {asked!r}: "
            "drop mixed_precision from the launcher's file or command"
        )
    if asked in ("fp16", "fp8") and not cuda:
        raise RequestError(
            f"{asked} needs a GPU (on a CPU accelerate would silently train in fp32): use bf16 or fp32"
        )
    return asked


def check_compile(env: Mapping[str, str]) -> None:
    """Compiling is asked for in the run's own configuration: the launcher's flags reach some strategies
    only."""
    launched = env.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if launched.upper() != "NO":
        raise RequestError(
            f"the launcher says dynamo_backend {launched!r}, which DeepSpeed runs would silently drop: "
            "use --train.compile true instead"
        )


def check_accumulation(env: Mapping[str, str], asked: int) -> None:
    """The launcher's accumulation, if it names one, must be the run's."""
    launched = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if launched.isdigit() and int(launched) not in (1, asked):
        raise RequestError(
            f"the launcher says gradient_accumulation_steps {launched} but the run's batch sizes give {asked}: "
            "drop it from the launcher's file; accumulation follows from train.global_batch_blocks"
        )


def built_strategy(accelerator: Accelerator) -> str:
    """What accelerate has really built."""
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


def check(accelerator: Accelerator, asked: Request, precision: str) -> str:
    """Compare what accelerate built with what was asked for; return the strategy."""
    if accelerator.num_processes != asked.world_size:
        raise RequestError(
            f"the launcher started {asked.world_size} processes but accelerate sees "
            f"{accelerator.num_processes}: use {SEVERAL_ON_CPU}"
        )
    built = built_strategy(accelerator)
    alone = asked.world_size == 1 and {built, asked.strategy} == {
        "single",
        "ddp",
    }  # torchrun with one process
    if built != asked.strategy and not alone:
        reason = ""
        if asked.strategy == "fsdp2" and accelerator.device.type == "cpu":
            reason = " (accelerate shards on GPUs only; on a CPU use DDP or ZeRO)"
        raise RequestError(
            f"{asked.strategy} was asked for but accelerate built {built}{reason}: {remedy(asked.strategy)}"
        )
    if precision == "fp8" and built in ("fsdp2", "zero3"):
        # accelerate converts layers that have their weights; these are sharded before they have any.
        raise RequestError(f"fp8 under {built} would silently stay bf16: use bf16, or DDP, ZeRO-1 or ZeRO-2")
    mixed = accelerator.mixed_precision
    if (mixed if mixed != "no" else "fp32") != precision:
        raise RequestError(f"precision {precision} was asked for but accelerate built {mixed}")
    return built


def remedy(strategy: str) -> str:
    """How this strategy is started."""
    return f"use accelerate launch --config_file accelerate_configs/{strategy}.yaml train_lm.py"
