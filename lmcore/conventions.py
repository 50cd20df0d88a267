"""What several packages must agree on: the ignored label, names of optimizers, schedules and context lengths, dtypes, ...

A leaf that imports nothing heavy, so that the options, the data and the model can all use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # reading options must not pay for torch
    import torch

IGNORED_LABEL = -100
"""torch's default ``ignore_index``; set by position, so that a pad id equal to EOS never hides a real EOS."""

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
"""Values of ``optim.name``, besides ``package.module:Class``."""

SOURCE_KEYS = ("path", "paths", "weight", "name", "text_field", "unit", "encoding")
"""Allowed keys where an entry of ``data.train``, ``data.valid`` or ``data.test`` is a mapping."""

SCHEDULES = ("constant", "linear", "linear_to_zero", "cosine", "wsd", "inverse_sqrt")
"""Values of ``optim.schedule``."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short dtype names used in options -> torch's names."""


def torch_dtype(name: str) -> torch.dtype:
    """``"bf16"`` -> ``torch.bfloat16``.

    Raises:
        KeyError: ``name`` is not one of :data:`DTYPE_NAMES`.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[name])
    return dtype


def flag(environment: Mapping[str, str], name: str) -> bool:
    """Whether an environment variable is switched on, by the values that accelerate accepts as true.

    >>> flag({"ACCELERATE_USE_FSDP": "True"}, "ACCELERATE_USE_FSDP")
    True
    """
    return environment.get(name, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


DS_CONFIGS: Final = Path(__file__).resolve().parent / "ds_configs"
"""DeepSpeed config files installed with the package; ``ds_configs/`` in the repository is a link to this folder."""


def deepspeed_file(path: str) -> Path:
    """The file at ``path``. If ``ds_configs/NAME.json`` does not exist here, the package's file of that name is used."""
    given = Path(path)
    shipped = DS_CONFIGS / given.name
    named = given.parts[:-1] == ("ds_configs",) and not given.exists() and shipped.is_file()
    return shipped if named else given


LONGEST_DEFAULT_BLOCK_TOKENS: Final = 1024
"""By default a block is as long as the model's context, but at most this: the cost of attention is quadratic."""

HIDDEN: Final = "<hidden>"
"""Replaces a secret in everything that is written or shown."""

CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
"""Config fields in which model families keep their context length."""


def context_in(fields: Mapping[str, Any]) -> int | None:
    """The context length in the fields of a model's config, or ``None`` if it is not there.

    >>> context_in({"n_layer": 2, "n_positions": 64})
    64
    """
    values = (fields.get(name) for name in CONTEXT_FIELDS)
    return next((n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
