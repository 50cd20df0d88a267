"""Defaults for a text that is trained on without a recipe: model, vocabulary, steps and learning rate by its size.

The defaults depend on the text and the options alone, never on the machine or the number of processes, so that the same
command resumes the same run anywhere. Neither torch nor the text itself is loaded; only the sizes of the files are read.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from lmcore.data.text import sources
from lmcore.humanize import short
from lmcore.humanize import size as human_size

BYTES_PER_TOKEN = 4
"""Of English and of Japanese UTF-8 with the vocabularies below, roughly."""
PACKED = {".gz": 4, ".zst": 4, ".xz": 4, ".bz2": 4, ".parquet": 3}
"""Bytes of text per byte of file, roughly."""
UNKNOWN_BYTES = 1_000_000_000
"""Assumed for a data set of the Hub, whose size is not known before it is read."""


@dataclass(frozen=True)
class Size:
    """Defaults for texts of up to ``bytes`` bytes."""

    bytes: float
    vocabulary: int
    layers: int
    width: int
    heads: int
    context: int
    blocks: int
    passes: float
    steps: int
    learning_rate: float
    preset_size: str


SIZES = (
    Size(1e5, 1_000, 2, 64, 2, 128, 8, 20, 300, 3e-3, "5M"),
    Size(1e6, 2_000, 4, 128, 4, 256, 8, 20, 600, 3e-3, "5M"),
    Size(2e7, 8_000, 8, 192, 6, 256, 8, 4, 2_000, 3e-3, "5M"),
    Size(3e8, 16_000, 8, 384, 6, 512, 32, 3, 10_000, 1.5e-3, "15M"),
    Size(3e9, 32_000, 12, 512, 8, 1_024, 64, 2, 20_000, 1e-3, "124M"),
    Size(math.inf, 32_000, 12, 768, 12, 1_024, 512, 1, 20_000, 6e-4, "124M"),
)
"""From the demo's measured values upwards to GPT-2 small's: width and rate as in the recipes, about 20 tokens a parameter
where the text has as many."""
FINE_TUNING_RATE = 6e-5
"""A tenth of a usual peak: less of what the model knows is forgotten (Ibrahim et al. 2024, arXiv 2403.08763)."""
FINE_TUNING_BLOCKS = 32
DROPOUT = 0.1
"""Where a small text is passed over many times; elsewhere it would cost more than it regularizes."""
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


def text_bytes(entries: list[Any], **reading: Any) -> int:
    """Bytes of text in the files of ``data.train``, roughly where they are compressed.

    Raises:
        RequestError: no such file, as when the text is opened.
    """
    total = 0
    for source in sources.resolve_sources(entries, **reading):
        for path in source.paths:
            if path.startswith(sources.HUB):
                total += UNKNOWN_BYTES
            elif os.path.isdir(path):  # a token store
                total += sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file()) * 2
            else:
                total += os.path.getsize(path) * PACKED.get(os.path.splitext(path.lower())[1], 1)
    return total


def defaults(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Defaults by dotted name for the text of ``data.train``, and lines that explain each of them.

    Args:
        given: the options that the user has set, by dotted name; they are not chosen again.

    Example::

        defaults({"data.train": ["mytext/*.txt"]})
    """
    reading = {
        name: given[f"data.{name}"]
        for name in ("text_field", "encoding")
        if given.get(f"data.{name}") is not None
    }
    found = text_bytes(given.get("data.train") or ["stdlib"], unit="line", **reading)
    size = next(size for size in SIZES if found <= size.bytes)
    tokens = max(1, found // BYTES_PER_TOKEN)
    pretrained = bool(given.get("model.from_pretrained"))
    values: dict[str, Any] = {"evaluate.prompts": ["auto"]}
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, reason: str) -> None:
        values[name] = value
        if name not in given:
            reasons[name] = f"{value}: {reason}"

    if pretrained:
        choose(
            "optim.lr", FINE_TUNING_RATE, "a tenth of a usual peak, so that a pretrained model forgets less"
        )
    else:
        if "tokenizer.path" not in given:
            choose("tokenizer.vocab_size", size.vocabulary, f"for {human_size(found)} of text")
        choose("optim.lr", size.learning_rate, f"for a model {size.width} wide")
        if given.get("model.preset") is not None:
            choose("model.size", size.preset_size, "the nearest of the preset's sizes")
        fields = _architecture(given, size)
        if fields:
            values |= {"model.type": given.get("model.type") or "gpt2", "model.config": fields}
            if "model.config" not in given:
                reasons["model.config"] = f"{size.layers} layers, {size.width} wide, context {size.context:,}"
    blocks = given.get("train.global_batch_blocks") or (FINE_TUNING_BLOCKS if pretrained else size.blocks)
    block_size = given.get("data.block_size") or size.context
    if given.get("train.global_batch_tokens") is None:
        choose("train.global_batch_blocks", blocks, f"blocks of {block_size:,} tokens in a step")
    if not pretrained and given.get("model.factory") is None and given.get("model.preset") is None:
        choose("data.block_size", block_size, "tokens in a block")
    step_tokens = given.get("train.global_batch_tokens") or blocks * block_size
    passes = 2 if pretrained else size.passes
    steps = min(size.steps, max(20 if pretrained else 100, math.ceil(passes * tokens / step_tokens)))
    shown = steps * step_tokens / tokens
    choose(
        "train.duration",
        f"{steps} steps",
        f"about {shown:.2g} passes over the text, at most {size.steps:,} steps",
    )
    choose("report.every", "[25 steps, 10 s]", "something to see in the first minute")
    lines = [
        f"no --config: defaults for {human_size(found)} of text (about {short(tokens)} tokens); every option "
        "overrides its default",
        *(f"  {name:<26} {reason}" for name, reason in reasons.items()),
    ]
    kept = ("model.type", "model.config")  # merged with what the user sets of the model
    return {name: value for name, value in values.items() if name not in given or name in kept}, lines


def _architecture(given: dict[str, Any], size: Size) -> dict[str, Any]:
    """Fields of ``model.config``; none where the user names a model of which the field names are not known here."""
    kind = given.get("model.type") or "gpt2"
    if given.get("model.factory") is not None or given.get("model.preset") is not None:
        return {}
    context = max(size.context, given.get("data.block_size") or 0)
    if kind == "gpt2":
        return {
            "n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": context,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), DROPOUT if size.passes > 4 else 0.0),
        }  # fmt: skip
    if kind in LIKE_LLAMA and not given.get("model.config"):
        return {
            "num_hidden_layers": size.layers, "hidden_size": size.width, "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads, "head_dim": size.width // size.heads,
            "intermediate_size": 64 * math.ceil(size.width * 8 / 3 / 64), "max_position_embeddings": context,
        }  # fmt: skip
    return {}
