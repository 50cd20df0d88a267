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
"""Values of ``optim.name`` beside ``package.module:Class``."""

SOURCE_KEYS = ("path", "paths", "weight", "name", "text_field", "unit", "encoding")
"""Keys of an entry of ``data.train``, ``data.valid`` or ``data.test`` that is a mapping."""

SCHEDULES = ("constant", "linear", "linear_to_zero", "cosine", "wsd", "inverse_sqrt")
"""Values of ``optim.schedule``."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The short names that options use, and torch's."""


def torch_dtype(name: str) -> torch.dtype:
    """``"bf16"`` -> ``torch.bfloat16``.

    Raises:
        KeyError: ``name`` is not one of :data:`DTYPE_NAMES`.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[name])
    return dtype


def flag(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable of the environment is switched on, by the words that accelerate takes for that.

    >>> flag({"ACCELERATE_USE_FSDP": "True"}, "ACCELERATE_USE_FSDP")
    True
    """
    return environment.get(name, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


DS_CONFIGS: Final = Path(__file__).resolve().parent / "ds_configs"
"""DeepSpeed's files that are installed with the package; ``ds_configs/`` in the repository is a link to this folder."""


def deepspeed_file(path: str) -> Path:
    """The file that ``path`` names; ``ds_configs/NAME.json`` is the package's where the current folder has no such file."""
    given = Path(path)
    shipped = DS_CONFIGS / given.name
    named = given.parts[:-1] == ("ds_configs",) and not given.exists() and shipped.is_file()
    return shipped if named else given


LONGEST_DEFAULT_BLOCK_TOKENS: Final = 1024
"""A block is the model's context by default, but no longer than this: attention grows with the square."""

HIDDEN: Final = "<hidden>"
"""Stands for a secret in everything that is written or shown."""

CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
"""How model families call the number of tokens that they see at once."""


def context_in(fields: Mapping[str, Any]) -> int | None:
    """The context length that fields of a model's config name; ``None`` if they name none.

    >>> context_in({"n_layer": 2, "n_positions": 64})
    64
    """
    values = (fields.get(name) for name in CONTEXT_FIELDS)
    return next((n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
