"""What the launcher asked for, and whether it came about.

Comes in: the environment that ``accelerate launch`` or ``torchrun`` left, and the run's own wishes. Goes out: a
:class:`Request`, or a :class:`~lmcore.errors.RequestError` with the command that does what was meant.

accelerate has several launch forms that silently train something else: one process instead of two, DDP instead of
FSDP2, no DeepSpeed. Each is recognized here by what it leaves in the environment or by what was built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from lmcore.errors import RequestError

CPU_RANKS_COMMAND = (
    "accelerate launch --config_file accelerate_configs/cpu_2.yaml --num_processes N train_lm.py"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The strategy that was asked for: single, ddp, fsdp2, zero1, zero2, zero3."""

    strategy: str
    world_size: int


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
    launched_alone = "ACCELERATE_MIXED_PRECISION" in env and "WORLD_SIZE" not in env
    if launched_alone and "MASTER_PORT" in env:
        # The plain launcher exports the port when several processes were asked for, and then starts one.
        raise RequestError(
            "accelerate started one process where several were asked for (it does so for --cpu and MULTI_CPU): "
            f"use {CPU_RANKS_COMMAND}; if one is meant, unset MASTER_ADDR and MASTER_PORT"
        )
    return Request(strategy="ddp" if size > 1 else "single", world_size=size)


def resolve_precision(asked: str, env: Mapping[str, str], *, cuda: bool) -> str:
    """The precision to run in; raises where the launcher's word differs or the device cannot."""
    if asked not in ("auto", "fp32", "bf16", "fp16", "fp8"):
        raise RequestError(f"train.precision {asked!r} is unknown: use fp32, bf16, fp16, fp8 or auto")
    launched = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "auto":
        if launched != "no":
            asked = launched
        else:
            return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    elif launched not in ("no", asked):
        raise RequestError(
            f"the launcher says mixed_precision {launched!r} but the run says train.precision {asked!r}: "
            "drop mixed_precision from the launcher's file or command"
        )
    if asked == "fp16" and not cuda:
        raise RequestError(
            "fp16 needs a GPU (on a CPU accelerate would silently train in fp32): use bf16 or fp32"
        )
    return asked


def resolve_compile(asked: str, env: Mapping[str, str]) -> str:
    """Compiling is asked for in the run's own configuration, because the launcher's flags reach some strategies only."""
    if asked not in ("none", "regional", "full"):
        raise RequestError(f"train.compile {asked!r} is unknown: use none, regional or full")
    launched = env.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if launched.upper() != "NO":
        raise RequestError(
            f"the launcher says dynamo_backend {launched!r}, which DeepSpeed runs would silently drop: "
            "use --train.compile regional instead"
        )
    return asked


def check_accumulation(env: Mapping[str, str], asked: int) -> None:
    """The launcher's accumulation, if it names one, must be the run's."""
    launched = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if launched.isdigit() and int(launched) not in (1, asked):
        raise RequestError(
            f"the launcher says gradient_accumulation_steps {launched} but the run's batch sizes give {asked}: "
            "drop it from the launcher's file; accumulation follows from global_batch_blocks"
        )


def built_strategy(accelerator: Accelerator) -> str:
    """What accelerate has really built."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    return (
        "ddp" if kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU) else str(kind.value).lower()
    )


def check(accelerator: Accelerator, asked: Request, env: Mapping[str, str], precision: str) -> None:
    """Compare what accelerate built with what was asked for."""
    if accelerator.num_processes != asked.world_size:
        raise RequestError(
            f"the launcher started {asked.world_size} processes but accelerate sees {accelerator.num_processes}: "
            f"use {CPU_RANKS_COMMAND}"
        )
    built = built_strategy(accelerator)
    if built != asked.strategy:
        raise RequestError(
            f"{asked.strategy} was asked for but accelerate built {built}: {remedy(asked.strategy)}"
        )
    mixed: Any = accelerator.mixed_precision
    if (mixed if mixed != "no" else "fp32") != precision and not asked.strategy.startswith("zero"):
        raise RequestError(f"precision {precision} was asked for but accelerate built {mixed}")


def remedy(strategy: str) -> str:
    """How this strategy is started."""
    return f"use accelerate launch --config_file accelerate_configs/{strategy}.yaml train_lm.py"
