"""Faster kernels for functions of transformers models, mostly on a CPU.

Parameters, their names and the saved configuration stay as they are, so checkpoints and exports do not change. The
results are the same up to rounding.

Letters: B blocks, H heads, T tokens of a block, D width of a head.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.errors import RequestError
from lmcore.model.products import use_faster_products
from lmcore.model.varlen import varlen_attention

ATTENTION = "lmcore"
"""The name of :func:`attention` in transformers' registries; never in a saved configuration."""

MATMUL_BLOCK = 512
"""The longest block for which attention by plain matrix products is faster, on a CPU in bf16 without dropout.

Forward and backward on one thread of a Xeon with AMX, fused and plain: 22 and 10 ms at T = 256 (8 x 6 heads of 32),
85 and 72 ms at 512 (4 x 12 of 64), 86 and 160 ms at 1,024 (2 x 12 of 64). docs/log.md, 2026-11-21.
"""


class TanhGELU(nn.GELU):
    """0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.

    transformers' ``gelu_new`` computes it in eight operations, torch's own kernel in one, in half of the time and with one
    saved tensor instead of four. When compiled on a CPU, it is computed as x sigmoid(2 u), which is mathematically equal:
    tanh takes three times as long there as the exponential in a sigmoid (docs/log.md, 2026-11-21).
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` has any shape and any float dtype. Compiled on a CPU, it is computed in float32 at least."""
        if x.device.type != "cpu" or not torch.compiler.is_compiling():
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        twice_u = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide * wide * wide)
        return (wide * torch.sigmoid(twice_u)).to(x.dtype)


def use_faster_kernels(model: Any) -> None:
    """Replace, in place, the tanh form of GELU by :class:`TanhGELU` and ``sdpa`` by :func:`attention`.

    Any attention other than ``sdpa`` was chosen by name and is kept. ``sdpa`` is kept in a family whose code compares with
    that name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.activations import GELUTanh, NewGELUActivation
    from transformers.masking_utils import sdpa_mask

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (NewGELUActivation, GELUTanh):
                setattr(parent, name, TanhGELU())
    use_faster_products(model)
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if chosen == "sdpa" and not asks_for_sdpa(model):
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.config._attn_implementation = ATTENTION


def asks_for_sdpa(model: nn.Module) -> bool:
    """Whether the code of a model compares the name of its attention with ``sdpa``.

    Under another name such a family silently computes something else: Falcon applies no causal mask, so that its tokens
    see the labels; DeepSeek V3.2 and similar families do not select keys sparsely. Also true if the code cannot be read.
    """
    names = {module.__class__.__module__ for module in model.modules()}
    return any(_compares_with_sdpa(name) for name in names if not name.startswith("torch."))


_COMPARISON = re.compile(r"attn_implementation\W{0,4}(?:==|!=|(?:not\s+)?in\b)[^\n]*[\"']sdpa[\"']")


@functools.cache
def _compares_with_sdpa(module_name: str) -> bool:
    try:
        return _COMPARISON.search(inspect.getsource(sys.modules[module_name])) is not None
    except (OSError, TypeError, KeyError):  # no file: typed into an interpreter, or compiled
        return True


def tokens_first(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B x T, H, D)"""
    return x.transpose(1, 2).flatten(0, 1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    keys_of: Callable[[Tensor], Tensor] = tokens_first,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention: ``sdpa``, plain matrix products where those are faster, or sequence by sequence
    (:func:`lmcore.model.varlen.varlen_attention`) if the batch has ``cu_seq_lens_q`` and ``cu_seq_lens_k``.

    Plain matrix products are used where the fused kernel on a CPU is weak: in bf16 with short blocks, and in bf16 with
    dropout, which it does not support. They compute plain causal attention only; anything else (masks, grouped heads,
    caches) goes to ``sdpa``.

    Args:
        query: (B, H, T, D); ``key`` and ``value`` likewise, or with fewer heads.
        keys_of: maps the keys (or values) of this rank, (B, H, T, D), to those that its queries see, (tokens, H, D). Under
            context parallelism they also come from other ranks.

    Returns:
        (B, T, H, D), and ``None`` for the attention weights, which are not kept.
    """
    with_lengths = more.get("cu_seq_lens_q") is not None
    device = query.device.type
    if (device == "cpu" or with_lengths) and torch.is_autocast_enabled(device):
        # As autocast does for sdpa: rotary positions leave queries and keys in float32.
        narrow = torch.get_autocast_dtype(device)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if with_lengths:
        _check_plain(attention_mask, more)
        mixed = varlen_attention(
            tokens_first(query),
            keys_of(key),
            keys_of(value),
            more["cu_seq_lens_q"],
            more["cu_seq_lens_k"],
            max_length_q=more["max_length_q"],
            max_length_k=more["max_length_k"],
            scale=scaling,
            dropout=dropout,
        )
        return mixed.unflatten(0, (query.shape[0], query.shape[2])), None
    if not _plain_is_faster(module, query, key, value, attention_mask, dropout, more):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    blocks, heads, tokens, width = query.shape
    flat = (blocks * heads, tokens, width)
    # Autocast would widen the scores for softmax and narrow them again for the next product. Softmax computes in
    # float32 internally, whatever the dtype of its input.
    with torch.autocast("cpu", enabled=False):
        future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
        scores = torch.baddbmm(
            future.expand(flat[0], tokens, tokens),
            query.reshape(flat),
            key.reshape(flat).transpose(1, 2),
            alpha=width**-0.5 if scaling is None else scaling,
        )
        weights = nn.functional.dropout(torch.softmax(scores, dim=-1), dropout, training=True)
        mixed = torch.bmm(weights, value.reshape(flat))
    return mixed.view(query.shape).transpose(1, 2).contiguous(), None


_NOT_PLAIN = ("softcap", "position_bias", "cache", "s_aux")
"""Arguments with which attention is not a plain causal softmax."""


def _check_plain(mask: Tensor | None, more: dict[str, Any]) -> None:
    """Refuse a mask or a bias next to sequence lengths, which alone decide what a query sees: it would be ignored."""
    ignored = [name for name in _NOT_PLAIN if more.get(name) is not None]
    if mask is not None or ignored or more.get("is_causal") is False:
        raise RequestError(
            f"attention by sequence lengths is plain causal attention: this model gives it "
            f"{ignored[0] if ignored else 'a mask' if mask is not None else 'is_causal False'}"
        )


def _plain_is_faster(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    more: dict[str, Any],
) -> bool:
    """Whether plain matrix products are faster than ``sdpa``: see :func:`attention` and :data:`MATMUL_BLOCK`."""
    causal = more.get("is_causal")
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape == key.shape == value.shape
        and query.shape[2] > 1
        and (query.shape[2] <= MATMUL_BLOCK or dropout > 0)
        and not any(more.get(name) is not None for name in _NOT_PLAIN)
    )
