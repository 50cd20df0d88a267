"""What changes from step to step besides weights and optimizer, and what must stay the same to repeat it exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lmcore.data.cursor import Cursor


@dataclass(kw_only=True)
class State:
    """The training state; every checkpoint holds all of it.

    Attributes:
        cursor: where the next step starts reading.
        step: updates done.
        tokens: tokens trained on.
        metrics: the last evaluation, and the step it belongs to in ``metrics_step`` (-1: none yet).
        stop_values: the watched metric at every evaluation, oldest first (early stopping).
    """

    cursor: Cursor
    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_step: int = -1
    stop_values: list[float] = field(default_factory=list)


def topology(
    *,
    world_size: int,
    strategy: str,
    precision: str,
    residual_dtype: str,
    device: str,
    compiled: bool,
    context_parallel: int,
    tensor_parallel: int,
    micro_batch_blocks: int,
) -> dict[str, Any]:
    """What has to be the same for a bit-exact continuation (law 13). Keys are words for a message."""
    return {
        "world size": world_size,
        "strategy": strategy,
        "precision": precision,
        "residual stream": residual_dtype,
        "device": device,
        "compiled": compiled,
        "context parallel": context_parallel,
        "tensor parallel": tensor_parallel,
        "micro_batch_blocks": micro_batch_blocks,  # dropout is seeded by the micro-batch
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How the topology differs from the checkpoint's, one phrase each."""
    return [
        f"{name} was {old[name]}, is {new[name]}" for name in new if name in old and old[name] != new[name]
    ]
