"""FSDP2's plugin, with what no YAML key can say and what accelerate would choose badly.

accelerate's own policy for bf16 reduces gradients in bf16 and returns the loss itself in bf16; here gradients
are reduced and accumulated in fp32 and outputs keep their type. Layers are wrapped one by one: the default of
the launcher's file is one giant group. What else the launcher's file says (offload, reshard) stays.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lmcore.conventions import torch_dtype
from lmcore.errors import RequestError


def plugin(*, precision: str, reduce_dtype: str) -> Any:
    """Fields that are not named here come from the launcher's environment (``FSDP_*``)."""
    compute = None if precision == "fp32" else torch_dtype(precision)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch_dtype(reduce_dtype)
        ),
        activation_checkpointing=False,  # its own draws other dropout masks in the recomputation
        cpu_ram_efficient_loading=False,  # _strategy_start has rank 0's weights distributed
    )


def checked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, without what has no form for sharded tensors in torch 2.13: fused kernels but Adam's are
    taken back, Adafactor is refused.

    Raises:
        RequestError: Adafactor.
    """
    if isinstance(optimizer, torch.optim.Adafactor):
        raise RequestError(
            "torch's Adafactor fails on sharded tensors: use adamw or muon, or DDP instead of FSDP2"
        )
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one of them
        for group in optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False
    return optimizer


def name_layers(fsdp_plugin: Any, layers: list[nn.Module]) -> None:
    """Wrap these layers, unless the launcher's file names other classes."""
    if not fsdp_plugin.transformer_cls_names_to_wrap:
        fsdp_plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
