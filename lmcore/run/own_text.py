"""Defaults for training on a text without a recipe: model, vocabulary, steps and learning rate by the size of the text.

The defaults depend on the text, the options and whether DeepSpeed is used (Muon does not run under ZeRO), never on the
machine or the number of processes, so that the same command resumes the same run anywhere. torch is not loaded. Only the
sizes of the files are read, and the characters of a text of up to SMALL_BYTES, because a vocabulary must hold them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.config.curves import values_of
from lmcore.config.presets import MODERN_PRESETS, SHAPES
from lmcore.conventions import LONGEST_DEFAULT_BLOCK_TOKENS, context_in, flag
from lmcore.data.text import listing, sources
from lmcore.errors import RequestError
from lmcore.humanize import short
from lmcore.humanize import size as human_size
from lmcore.plan.scaling import Published, published

BYTES_PER_TOKEN = 4
"""Approximate value for English and for Japanese in UTF-8 with the vocabularies below."""
PACKED = {".gz": 4, ".zst": 4, ".xz": 4, ".bz2": 4, ".parquet": 3}
"""Approximate bytes of text per byte of a compressed file."""
UNKNOWN_BYTES = 1_000_000_000
"""Assumed size of a dataset on the Hub, because it is not known before the dataset is read."""


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
    Size(1e5, 1_000, 2, 64, 2, 128, 8, 4, 300, 3e-3, "5M"),
    Size(1e6, 2_000, 4, 128, 4, 256, 8, 4, 600, 3e-3, "5M"),
    Size(2e7, 8_000, 8, 192, 6, 256, 8, 4, 2_000, 3e-3, "5M"),
    Size(3e8, 16_000, 8, 384, 6, 512, 32, 3, 10_000, 1.5e-3, "15M"),
    Size(3e9, 32_000, 12, 512, 8, 1_024, 64, 2, 20_000, 1e-3, "124M"),
    Size(math.inf, 32_000, 12, 768, 12, 1_024, 512, 1, 20_000, 6e-4, "124M"),
)
"""From the demo's measured values up to those of GPT-2 small: width and AdamW's rate as in the recipes, and about 20 tokens
per parameter if the text has that many. For four passes over a small text see docs/log.md, 2026-11-28, own text with Muon."""
MUON_RATE_FACTOR = 2
"""Ratio of Muon's peak rate to AdamW's (the update of a matrix has the same root mean square as AdamW's, ``match_rms_adamw``).
Measured at widths 128 and 192 (docs/log.md, 2026-11-28); assumed, but not measured, for larger widths."""
OTHER_PIECES = 256 + 4 + 1
"""Pieces besides the characters: bytes, special tokens, and one for a space in text without spaces."""
SMALL_BYTES = 1e6
ADAMW_PASSES_FACTOR = 4
"""On a text of up to SMALL_BYTES, AdamW needs about four times as many passes for the same validation loss."""
FINE_TUNING_RATE = 6e-5
"""A tenth of a usual peak rate, so that the model forgets less (Ibrahim et al. 2024, arXiv 2403.08763)."""
LORA_RATE = 6e-4
"""Ten times the rate for all weights, for any rank of the adapters (Schulman et al. 2025, "LoRA Without Regret")."""
FINE_TUNING_BLOCKS = 32
LEAST_STEPS, LEAST_FINE_TUNING_STEPS = 100, 20
"""Minimum for any text: with fewer steps the rate could not rise and fall."""
DROPOUT = 0.1
"""Dropout of gpt2 for many passes over a small text; for larger texts it would cost more than it regularizes."""
GPT2_FIELDS = frozenset({"n_layer", "n_embd", "n_head", "n_positions", "n_inner"})
"""If the user sets one of these fields in ``model.config``, the model type is gpt2."""
MODERN = "nanochat"
"""The transformers type of the preset ``modern``."""
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


def text_bytes(entries: list[Any], **reading: Any) -> int:
    """Bytes of text in the files of ``data.train``; approximate for compressed files.

    Raises:
        RequestError: a file does not exist; the same error as when the text is opened.
    """
    total = 0.0
    for source in sources.resolve_sources(entries, **reading):
        for path in source.paths:
            if path.startswith(sources.HUB):
                total += UNKNOWN_BYTES
            else:
                found = listing.stat(path)
                packed: float = PACKED.get(os.path.splitext(path.lower())[1], 1)
                if path.endswith(sources.FOREIGN_SUFFIXES):
                    packed = BYTES_PER_TOKEN / token_bytes(path)
                total += 0 if found is None else found.st_size * packed
    return int(total)


def vocabulary_for(
    entries: list[Any], size: Size, options: dict[str, Any], **reading: Any
) -> tuple[int, int]:
    """The size of the vocabulary, and the number of characters that raise it above the table's (0 if none do).

    Japanese and Chinese have thousands of characters, and SentencePiece refuses a vocabulary that cannot hold those of the
    text. Then it is the next multiple of the table's. Text that cannot be read is left to the run, which says what is wrong.

    Args:
        options: the options that the user has set, by dotted name.
    """
    if size.bytes > SMALL_BYTES or options.get("tokenizer.model_type") == "char":
        return size.vocabulary, 0
    from lmcore.config.schema import TokenizerConfig  # lazily, as the readers of the text
    from lmcore.data import corpus

    counts: Counter[str] = Counter()
    with contextlib.suppress(RequestError, OSError):
        texts = corpus.sample_texts(
            sources.resolve_sources(entries, **reading),
            max_bytes=int(4 * SMALL_BYTES),
            bad=lambda record: None,
        )
        for text in texts:
            counts.update(text)
    del counts["\n"]  # the trainer sees single lines
    coverage = options.get("tokenizer.character_coverage") or TokenizerConfig.character_coverage
    total, covered, characters = counts.total(), 0, 0
    for _, count in counts.most_common():
        if covered >= coverage * total:
            break
        covered, characters = covered + count, characters + 1
    needed = OTHER_PIECES + len(options.get("tokenizer.user_symbols") or []) + characters
    if needed <= size.vocabulary:
        return size.vocabulary, 0
    return size.vocabulary * math.ceil(needed / size.vocabulary), characters


def token_bytes(path: str) -> float:
    """Bytes per token in a token file; infinity for an index file.

    Not all ``.bin`` and ``.ds`` files say it; for them it is 2, as in nanoGPT's files.
    """
    if path.endswith((".idx", ".index")):
        return math.inf
    if path.endswith(".npy"):
        with contextlib.suppress(OSError, ValueError, EOFError):
            import numpy as np

            return np.lib.format.open_memmap(path, mode="r").dtype.itemsize
    return 2


def defaults(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Defaults by dotted name for the text of ``data.train``, and lines that explain them.

    Args:
        given: the options that the user has set, by dotted name; no defaults are chosen for them.

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
    optimizer = given.get("optim.name") or (
        "muon" if _is_modern(given) and not _under_deepspeed(given) else "adamw"
    )
    passes = 2.0 if pretrained else size.passes
    if size.bytes <= SMALL_BYTES and not pretrained and optimizer != "muon":
        passes *= ADAMW_PASSES_FACTOR
    values: dict[str, Any] = {"evaluate.prompts": ["auto"]}
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, reason: str) -> None:
        values[name] = value
        if name not in given:
            reasons[name] = f"{value}: {reason}"

    if pretrained and given.get("model.lora.rank"):
        choose("optim.lr", LORA_RATE, "for adapters, ten times that of all weights of a pretrained model")
    elif pretrained:
        choose(
            "optim.lr", FINE_TUNING_RATE, "a tenth of a usual peak, so that a pretrained model forgets less"
        )
    else:
        # With either of them given, there is no reason to read the text.
        if "tokenizer.path" not in given and "tokenizer.vocab_size" not in given:
            vocabulary, characters = vocabulary_for(
                given.get("data.train") or ["stdlib"], size, given, unit="line", **reading
            )
            many = (
                f", whose {characters:,} characters need more than {size.vocabulary:,}" if characters else ""
            )
            choose("tokenizer.vocab_size", vocabulary, f"for {human_size(found)} of text{many}")
        if optimizer == "muon" and "optim.name" not in given:
            choose(
                "optim.name", "muon", "learns more from each token than adamw (docs/models_and_optimizers.md)"
            )
            values |= {"optim.schedule": "linear", "optim.min_lr_ratio": 0.0}
        rate = size.learning_rate * (MUON_RATE_FACTOR if optimizer == "muon" else 1)
        fields, own_width, table = _architecture(given, size), _set_width(given), ""
        if own_width:
            table = f", the table's for this size of text (the model is {own_width} wide)"
        elif not fields and given.get("model.type") is not None:
            table = ", the table's for this size of text (the model has the shape that transformers gives it: set model.config)"
        choose("optim.lr", rate, f"for a model {size.width} wide and {optimizer}{table}")
        if given.get("model.preset") is not None:
            choose("model.size", size.preset_size, "the nearest of the preset's sizes")
        if fields:
            kind = _model_type(given)
            values |= {"model.type": kind, "model.config": fields}
            if kind == MODERN and optimizer == "muon":  # as in presets.zero_init
                values["model.zero_init"] = True
            if "model.config" not in given:
                context = _longest(given, size)
                reasons["model.config"] = (
                    f"{kind}, {size.layers} layers, {size.width} wide, context {context:,}"
                )
            elif "model.type" not in given:
                own = sorted(GPT2_FIELDS & set(given["model.config"] or {}))
                reasons["model.type"] = (
                    f"{kind}: {f'{own[0]} is one of its fields' if own else 'the default'}"
                )
    asked = given.get("train.global_batch_blocks") or (FINE_TUNING_BLOCKS if pretrained else size.blocks)
    blocks = max(values_of(asked))
    block_size = given.get("data.block_size") or _context(given, size)
    if given.get("train.global_batch_tokens") is None:
        choose("train.global_batch_blocks", asked, f"blocks of {block_size:,} tokens in a step")
    if not pretrained and given.get("model.factory") is None and given.get("model.preset") is None:
        choose("data.block_size", block_size, "tokens in a block")
    asked_tokens = given.get("train.global_batch_tokens")
    step_tokens = max(values_of(asked_tokens)) if asked_tokens else blocks * block_size
    least = LEAST_FINE_TUNING_STEPS if pretrained else LEAST_STEPS
    by_passes = math.ceil(passes * tokens / step_tokens)
    steps = min(size.steps, max(least, by_passes))
    bound = f"at least {least:,} steps" if by_passes < least else f"at most {size.steps:,} steps"
    law = _law(given, size, optimizer, run_tokens=steps * step_tokens, tokens=tokens)
    if law is not None and law.learning_rate and law.batch_tokens and asked_tokens is None:
        context = given.get("data.block_size") or _context(given, size)
        reason = f"{law.source}; {law.measured}: inside its range"
        choose("optim.lr", float(f"{law.learning_rate:.2g}"), reason)
        if "train.global_batch_blocks" not in given:
            blocks = max(8, round(law.batch_tokens / context / 8) * 8)
            choose(
                "train.global_batch_blocks",
                blocks,
                f"blocks of {context:,} tokens in a step, by the same law",
            )
            steps, step_tokens = math.ceil(steps * step_tokens / (blocks * context)), blocks * context
    shown = steps * step_tokens / tokens
    choose(
        "train.duration",
        f"{steps} steps",
        f"about {f'{shown:.2g}' if shown < 100 else f'{shown:,.0f}'} passes over the text, {bound}",
    )
    choose("report.every", "[25 steps, 10 s]", "something to see in the first minute")
    lines = [
        f"no --config: defaults for {human_size(found)} of text (about {short(tokens)} tokens); every option "
        "overrides its default",
        *(f"  {name:<26} {reason}" for name, reason in reasons.items()),
    ]
    kept = ("model.type", "model.config")  # merged with what the user sets of the model
    return {name: value for name, value in values.items() if name not in given or name in kept}, lines


def _context(given: dict[str, Any], size: Size) -> int:
    """The block size if ``data.block_size`` is not given, as :func:`lmcore.run.setup.block_size_of` will choose it."""
    if given.get("model.preset") is not None:
        context = SHAPES[given.get("model.size") or size.preset_size].context
        return min(context, LONGEST_DEFAULT_BLOCK_TOKENS)
    if given.get("model.from_pretrained"):
        with contextlib.suppress(OSError, ValueError):
            path = Path(given["model.from_pretrained"]) / "config.json"
            fields = json.loads(path.read_text(encoding="utf-8"))
            known = context_in(fields if isinstance(fields, dict) else {})
            return min(known or LONGEST_DEFAULT_BLOCK_TOKENS, LONGEST_DEFAULT_BLOCK_TOKENS)
        return LONGEST_DEFAULT_BLOCK_TOKENS
    if given.get("model.factory"):
        return LONGEST_DEFAULT_BLOCK_TOKENS
    return min(context_in(given.get("model.config") or {}) or size.context, LONGEST_DEFAULT_BLOCK_TOKENS)


def _longest(given: dict[str, Any], size: Size) -> int:
    """The context of a model if the user does not set it: at least one block."""
    return max(size.context, given.get("data.block_size") or 0)


def _set_width(given: dict[str, Any]) -> int | None:
    """The width that the user has set; ``None`` if the table's is used."""
    return _set_count(given, "hidden_size", "n_embd", "d_model")


def _set_count(given: dict[str, Any], *names: str) -> int | None:
    """The first of these fields of ``model.config`` that the user has set; ``None`` if none is set."""
    fields = given.get("model.config") or {}
    return next((count for name in names if (count := _count(fields.get(name)))), None)


def _count(value: Any) -> int | None:
    """``value`` if it is a positive integer, otherwise ``None``; other values are refused later, with their name."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _model_type(given: dict[str, Any]) -> str:
    """``model.type``; by default that of the preset ``modern``, or gpt2 if the user sets fields by gpt2's names."""
    named = given.get("model.type")
    return named or ("gpt2" if GPT2_FIELDS & set(given.get("model.config") or {}) else MODERN)


def _is_modern(given: dict[str, Any]) -> bool:
    """Whether the architecture is one of the modern presets, by default or by name."""
    if given.get("model.preset") is not None:
        return given["model.preset"] != "gpt2"
    names = ("model.from_pretrained", "model.factory", "model.type")
    return not any(given.get(name) for name in names) and _model_type(given) == MODERN


def _under_deepspeed(given: dict[str, Any]) -> bool:
    return flag(os.environ, "ACCELERATE_USE_DEEPSPEED") or given.get("engine.deepspeed") is not None


def _law(
    given: dict[str, Any], size: Size, optimizer: str, *, run_tokens: float, tokens: int
) -> Published | None:
    """The published law whose range includes this run, or ``None``; then the table is used.

    The laws are for AdamW, and for models that normalize queries and keys, as the modern presets do; their rates would be
    too high for a plain GPT-2.
    """
    is_modern = given.get("model.preset") in MODERN_PRESETS and not given.get("model.config")
    if not is_modern or optimizer != "adamw":
        return None
    shape = SHAPES[given.get("model.size") or size.preset_size]
    vocabulary = given.get("tokenizer.vocab_size") or size.vocabulary
    parameters = 12 * shape.layers * shape.width**2 + vocabulary * shape.width
    laws = published([parameters], lambda _: run_tokens, tokens)
    return next((law for law in laws if law.inside and law.learning_rate), None)


def _architecture(given: dict[str, Any], size: Size) -> dict[str, Any]:
    """Fields of ``model.config``; none if the user names a model with a shape of its own, or a family without such fields."""
    kind = _model_type(given)
    if given.get("model.factory") is not None or given.get("model.preset") is not None:
        return {}
    context = _longest(given, size)
    if kind == "gpt2":
        return {
            "n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": context,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), DROPOUT if size.bytes <= SMALL_BYTES else 0.0),
        }  # fmt: skip
    # If the user sets some fields of the shape, the others are derived from them or from the text: the defaults of transformers
    # are for models with billions of parameters, and a wider model would keep the narrow MLP of the table.
    set_by_user = given.get("model.config") or {}
    width = _set_width(given) or size.width
    heads = _set_count(given, "num_attention_heads", "n_head") or size.heads
    shape = {
        "num_hidden_layers": size.layers, "hidden_size": size.width, "num_attention_heads": size.heads,
        "num_key_value_heads": heads, "max_position_embeddings": context,
    }  # fmt: skip
    if kind == MODERN:
        return shape | {"intermediate_size": 4 * width}
    if kind in LIKE_LLAMA:
        # Rotary embeddings rotate pairs of dimensions, so the head dimension must be even.
        head_dim = max(2, width // heads // 2 * 2)
        return shape | {"head_dim": head_dim, "intermediate_size": 64 * math.ceil(width * 8 / 3 / 64)}
    from lmcore.model.config import shape_of_family  # lazily: the families of transformers import torch

    own = {
        "head_dim": max(2, width // heads // 2 * 2),
        "intermediate_size": 4 * width,
        "moe_intermediate_size": width,
    }
    # OPT and similar families have other names for the width of the MLP and of the embedding.
    own |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    return shape_of_family(kind, shape | own, set_by_user)
