"""Micro-batch ``auto``: the largest that fits into the device, by the plan's own arithmetic.

Comes in: the module that will be trained and the memory of a device. Goes out: blocks of a micro-batch. What always
holds: the global batch does not change, only how it is cut; nothing is allocated to find out (a step is rehearsed over
fake tensors); a resumed run keeps what its checkpoint remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lmcore.conventions import torch_dtype
from lmcore.model.module import ModelWithLoss
from lmcore.plan import plan, trace


def fitting_micro_batch(
    module: ModelWithLoss,
    setting: plan.Setting,
    *,
    share: int,
    block_size: int,
    device_bytes: int,
    make_optimizer: Callable[[list[tuple[str, Any]]], torch.optim.Optimizer],
    device_type: str = "cpu",
) -> int:
    """The largest divisor of ``share`` (blocks of a step on this rank) whose step fits, at least 1.

    Args:
        setting: strategy, world size and precision of the run; its micro-batch and accumulation are not used.
        device_bytes: of the smallest device.
    """
    counted = plan.parameters(module)
    autocast, weights = setting.casts
    kept = None if setting.param_dtype == "fp32" else torch_dtype(setting.param_dtype)
    state_bytes = trace.optimizer_bytes(module, make_optimizer, weights=kept)

    def needs(blocks: int) -> int:
        rehearsed = trace.rehearse(
            module,
            micro_batch_blocks=blocks,
            block_size=block_size,
            autocast=autocast,
            weights=weights,
            activation_checkpointing=setting.activation_checkpointing,
            device_type=device_type,
            count_flops=False,
        )
        one = replace(setting, micro_batch_blocks=blocks, accumulation=share // blocks)
        return plan.memory(counted, rehearsed, one, optimizer_bytes=state_bytes).total

    return plan.largest_micro_batch(share, int(plan.USABLE * device_bytes), needs)
