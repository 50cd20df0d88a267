"""What several packages must agree on: the ignored label, the names of optimizers and schedules, dtypes.

A leaf that imports nothing heavy, so that the options, the data and the model can all use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading options must not pay for torch
    import torch

IGNORED_LABEL = -100
"""torch's default ``ignore_index``; set by position, so that a pad id equal to EOS never hides a real EOS."""

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
"""Values of ``optim.name`` beside ``package.module:Class``."""

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
"""Values of ``optim.schedule``."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""The short names that options use, and torch's; what fp8 does not cover is computed in bfloat16."""


def torch_dtype(name: str) -> torch.dtype:
    """``"bf16"`` -> ``torch.bfloat16``.

    Raises:
        KeyError: ``name`` is not one of :data:`DTYPE_NAMES`.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[name])
    return dtype
