"""Models by name and size: the transformers type and config fields for ``model.preset`` and ``model.size``.

Every preset is a plain class of transformers, so that an export opens with ``AutoModelForCausalLM``:

- ``gpt2``: learned positions, LayerNorm, GELU, tied embedding and head (Radford et al. 2019).
- ``modern``: transformers' ``nanochat``: rotary positions, RMSNorm also on queries and keys, ReLU squared, logits
  capped at 15, head not tied.
- ``modern_gguf``: ``qwen3`` (rotary positions, RMSNorm also on queries and keys, SwiGLU), which llama.cpp reads too.
- ``modern_conv``: ``lfm2``: the same with a gated convolution over three tokens instead of attention in every other layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmcore.conventions import context_in

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig

DEFAULT_SIZE = "5M"
MODERN_PRESETS = ("modern", "modern_gguf", "modern_conv")
"""Presets that normalize queries and keys, and whose head is not tied."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A size, named after the approximate number of parameters of gpt2 with a suitable vocabulary."""

    layers: int
    width: int
    heads: int
    context: int


SHAPES = {
    "5M": Shape(layers=8, width=192, heads=6, context=256),
    "8M": Shape(layers=8, width=256, heads=4, context=256),
    "15M": Shape(layers=8, width=320, heads=5, context=512),
    "124M": Shape(layers=12, width=768, heads=12, context=1024),
    "350M": Shape(layers=24, width=1024, heads=16, context=1024),
    "1B": Shape(layers=16, width=2048, heads=16, context=2048),
}


def model_type_and_fields(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    """The transformers type, and the fields of its config, that the options select.

    Without a preset these are ``model.type`` and ``model.config``. With a preset, ``model.config`` overrides single fields,
    and the context is ``data.block_size`` if that is given.

    Example::

        type, fields = model_type_and_fields(parse(["--model.preset", "modern", "--model.size", "15M"]))
    """
    model = config.model
    if model.preset is None:
        return model.type, dict(model.config)
    shape = SHAPES[model.size or DEFAULT_SIZE]
    if isinstance(layers := model.config.get("num_hidden_layers"), int):
        shape = replace(shape, layers=layers)  # some types have a field with an entry per layer
    type, fields = fields_of(model.preset, shape, config.data.block_size or shape.context)
    return type, fields | model.config


def fields_of(preset: str, shape: Shape, context: int) -> tuple[str, dict[str, Any]]:
    """The transformers type of a preset, and the fields of its config for a shape.

    Example::

        type, fields = fields_of("modern", Shape(layers=4, width=128, heads=4, context=256), 256)
    """
    if preset == "gpt2":
        return "gpt2", {
            "n_layer": shape.layers,
            "n_embd": shape.width,
            "n_head": shape.heads,
            "n_positions": context,
            # No dropout: in pretraining every token is seen only once or a few times.
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    fields: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }
    if preset == "modern":
        return "nanochat", fields | {"intermediate_size": 4 * shape.width}
    gated = -(-8 * shape.width // (3 * 64)) * 64  # 3 matrices 8/3 wide have the size of 2 that are 4 wide
    if preset == "modern_gguf":
        return "qwen3", fields | {"intermediate_size": gated, "head_dim": shape.width // shape.heads}
    # With 32 dimensions per head, normalized queries and keys cannot attend to a single token (docs/log.md, 2026-11-29).
    heads = min(shape.heads, max(1, shape.width // 64))
    heads = max(count for count in range(1, heads + 1) if shape.width % (2 * count) == 0)
    return "lfm2", fields | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": gated,
        "block_auto_adjust_ff_dim": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        # Attention in every other layer, including the last.
        "layer_types": ["full_attention" if (shape.layers - i) % 2 else "conv" for i in range(shape.layers)],
    }


def zero_init(config: RunConfig) -> bool:
    """Whether output projections and head start at zero: ``model.zero_init``, by default for the modern presets with Muon.

    With AdamW it raises the loss of a short run by up to 0.9 (docs/log.md, 2026-11-30), which made ``modern`` worse than
    ``gpt2`` there.
    """
    if config.model.zero_init is None:
        return config.model.preset in MODERN_PRESETS and config.optim.name == "muon"
    return config.model.zero_init


def describe_preset(config: RunConfig) -> str:
    """``modern 5M: nanochat, 8 layers, width 192, 6 heads, context 256``."""
    shape = SHAPES[config.model.size or DEFAULT_SIZE]
    type, fields = model_type_and_fields(config)
    layers, width, heads, context = (
        fields.get("n_layer", fields.get("num_hidden_layers", shape.layers)),
        fields.get("n_embd", fields.get("hidden_size", shape.width)),
        fields.get("n_head", fields.get("num_attention_heads", shape.heads)),
        context_in(fields) or shape.context,
    )
    name = f"{config.model.preset} {config.model.size or DEFAULT_SIZE}"
    return f"{name}: {type}, {layers} layers, width {width}, {heads} heads, context {context}"
