"""Models by name and size: what ``model.preset`` and ``model.size`` mean as a transformers type and its fields.

Every preset is a plain class of transformers, so that an export opens with ``AutoModelForCausalLM``:

- ``gpt2``: learned positions, LayerNorm, GELU, embedding and head tied (Radford et al. 2019).
- ``modern``: transformers' ``nanochat``: rotary positions, RMSNorm also on queries and keys, ReLU squared, logits
  capped at 15, head not tied.
- ``modern_gguf``: ``qwen3`` (rotary positions, RMSNorm also on queries and keys, SwiGLU), which llama.cpp reads too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig

DEFAULT_SIZE = "5M"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A size: its name is about the number of parameters that gpt2 has with the vocabulary that fits it."""

    layers: int
    width: int
    heads: int
    context: int


SHAPES = {
    "5M": Shape(layers=8, width=192, heads=6, context=256),
    "15M": Shape(layers=8, width=320, heads=5, context=512),
    "124M": Shape(layers=12, width=768, heads=12, context=1024),
    "350M": Shape(layers=24, width=1024, heads=16, context=1024),
    "1B": Shape(layers=16, width=2048, heads=16, context=2048),
}


def model_type_and_fields(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    """The transformers type, and the fields of its config, that the options ask for.

    Without a preset these are ``model.type`` and ``model.config``. With one, ``model.config`` overrides single
    fields, and the context is ``data.block_size`` where that is given.

    Example::

        type, fields = model_type_and_fields(parse(["--model.preset", "modern", "--model.size", "15M"]))
    """
    model = config.model
    if model.preset is None:
        return model.type, dict(model.config)
    shape = SHAPES[model.size or DEFAULT_SIZE]
    context = config.data.block_size or shape.context
    if model.preset == "gpt2":
        fields: dict[str, Any] = {
            "n_layer": shape.layers,
            "n_embd": shape.width,
            "n_head": shape.heads,
            "n_positions": context,
            # In pretraining every token is seen once or a few times: there is nothing to regularize.
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        return "gpt2", fields | model.config
    fields = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }
    if model.preset == "modern":
        return "nanochat", fields | {"intermediate_size": 4 * shape.width} | model.config
    gated = -(-8 * shape.width // (3 * 64)) * 64  # three matrices of 8/3 of the width cost what two of 4 do
    extra = {"intermediate_size": gated, "head_dim": shape.width // shape.heads}
    return "qwen3", fields | extra | model.config


def zero_init(config: RunConfig) -> bool:
    """Whether output projections and head start at zero: ``model.zero_init``, by default for the modern presets."""
    asked = config.model.zero_init
    return config.model.preset in ("modern", "modern_gguf") if asked is None else asked


def describe_preset(config: RunConfig) -> str:
    """``modern 5M: nanochat, 8 layers, width 192, 6 heads, context 256``."""
    shape = SHAPES[config.model.size or DEFAULT_SIZE]
    type, fields = model_type_and_fields(config)
    layers, width, heads, context = (
        fields.get("n_layer", fields.get("num_hidden_layers", shape.layers)),
        fields.get("n_embd", fields.get("hidden_size", shape.width)),
        fields.get("n_head", fields.get("num_attention_heads", shape.heads)),
        fields.get("n_positions", fields.get("max_position_embeddings", shape.context)),
    )
    name = f"{config.model.preset} {config.model.size or DEFAULT_SIZE}"
    return f"{name}: {type}, {layers} layers, width {width}, {heads} heads, context {context}"
