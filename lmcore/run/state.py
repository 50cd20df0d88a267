"""The training state besides weights and optimizer, and the conditions under which a run continues bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lmcore.data.cursor import Cursor
from lmcore.model.products import cpu_bf16, onednn_is_faster

PRODUCTS, PRODUCTS_OF_TORCH = "library of float32 products", "torch's choice"
"""A key of :func:`topology` (:mod:`lmcore.model.products`), and its value in CPU runs from before it was recorded."""


@dataclass(kw_only=True)
class State:
    """The training state; every checkpoint holds all of it.

    Attributes:
        cursor: where the next step starts reading.
        step: number of updates so far.
        tokens: number of tokens trained on.
        metrics: results of the last evaluation, which was made at step ``metrics_step`` (-1: none yet).
        stop_values: the metric that early stopping watches, at every evaluation, oldest first.
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
    """What must be the same for a bit-exact continuation (law 13). The keys are words for a message."""
    found = {
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
    if device == "cpu":
        by_onednn = precision == "fp32" and not compiled and onednn_is_faster()
        found["CPU instructions"] = torch.backends.cpu.get_cpu_capability()
        # In fp32, too: Muon multiplies in bf16 wherever there are any.
        found["bf16 instructions"] = cpu_bf16() or "none"
        found[PRODUCTS] = "oneDNN" if by_onednn else PRODUCTS_OF_TORCH
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between the topology and that of the checkpoint, one phrase each."""
    if old.get("device") == "cpu":
        old = {PRODUCTS: PRODUCTS_OF_TORCH, **old}
    return [
        f"{name} was {old[name]}, is {new[name]}" for name in new if name in old and old[name] != new[name]
    ]
