"""Causal attention over sequences of different lengths that are concatenated in one tensor.

The documents of a block are such sequences, and so are the pieces of a block that a context-parallel rank computes: each
query sequence has a key sequence, which may begin earlier. No T x T mask is ever built: on a CPU torch's fused kernel
runs sequence by sequence, on a GPU ``torch.nn.attention.varlen.varlen_attn`` takes all of them at once.

Letters: N queries and M keys of all sequences together, H heads, G heads of keys and values, D width of a head,
S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# torch 2.11 accepts fewer heads of keys and values without the argument enable_gqa, which it does not have.
_TOLD_OF_GROUPS = torch.__version__ >= "2.12"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    *,
    max_length_q: int,
    max_length_k: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal softmax(scale Q K^T) V of each sequence; its last query is aligned with its last key.

    Query i of a sequence with n queries and m >= n keys sees the keys up to i + m - n.

    Args:
        query: (N, H, D). key, value: (M, G, D); G divides H.
        cu_seq_lens_q: (S + 1,) int32, where the queries of each sequence begin, then N. cu_seq_lens_k: likewise for the
            keys, then M. A sequence may be empty, or have keys and no queries.
        max_length_q, max_length_k: upper bounds of the sequence lengths.
        scale: default D**-0.5.
        dropout: probability of dropping a weight; computed sequence by sequence without a fused kernel.

    Returns:
        (N, H, D)

    Example::

        lengths = torch.tensor([0, 3, 8], dtype=torch.int32)          # two documents, of 3 and 5 tokens
        varlen_attention(q, k, v, lengths, lengths, max_length_q=8, max_length_k=8)
    """
    if dropout > 0:
        return _with_dropout(query, key, value, cu_seq_lens_q, cu_seq_lens_k, scale, dropout)
    if _device_of(query) == "cuda":
        from torch.nn.attention.varlen import varlen_attn  # lazily: it registers kernels

        groups: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _TOLD_OF_GROUPS else {}
        mixed = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scale,
            window_size=(-1, 0),  # causal, aligned to the last key
            **groups,
        )
        assert isinstance(mixed, Tensor)  # the softmax denominators were not requested
        return mixed
    return _sequence_by_sequence(query, key, value, cu_seq_lens_q, cu_seq_lens_k, scale)[0]


def _device_of(tensor: Tensor) -> str:
    return tensor.device.type


def _sequences(cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The slices of the queries and keys of each sequence that has queries."""
    for q, k in zip(pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist())):
        if q[0] < q[1]:
            yield slice(*q), slice(*k)


def _parts(queries: int, keys: int) -> list[tuple[slice, bool]]:
    """Split the keys of a sequence into (slice, causal): the fused kernel's causal mask needs as many keys as queries."""
    before = keys - queries
    last = (slice(before, keys), queries > 1)
    return [(slice(0, before), False), last] if before else [last]


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(L, G, D) -> (1, H, L, D): each head is repeated for the H / G query heads that share it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("lmcore::sequence_by_sequence", mutates_args=())
def _sequence_by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """On a CPU: the output (N, H, D), and the logarithms of the softmax denominators (H, N) in float32 or float64.

    A custom operator, so that a compiler does not trace into it. Where a sequence has more keys than queries, two calls of
    the kernel are combined by their denominators, as in ring attention (Liu et al. 2023, arXiv 2310.01889).
    """
    heads = query.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.zeros(heads, query.shape[0], dtype=wide, device=query.device)
    for of_q, of_k in _sequences(cu_seq_lens_q, cu_seq_lens_k):
        q = _heads_first(query[of_q], heads)
        k, v = _heads_first(key[of_k], heads), _heads_first(value[of_k], heads)
        found: list[tuple[Tensor, Tensor]] = []
        for part, causal in _parts(q.shape[2], k.shape[2]):
            mixed, sums = _flash(q, k[:, :, part], v[:, :, part], 0.0, causal, scale=scale)
            found.append((mixed[0].transpose(0, 1), sums.view(heads, -1)))
        if len(found) == 1:
            out[of_q], lse[:, of_q] = found[0]
            continue
        total = torch.logaddexp(found[0][1], found[1][1])
        out[of_q] = sum((sums - total).exp().t().unsqueeze(2) * mixed for mixed, sums in found)
        lse[:, of_q] = total
    return out, lse


@_sequence_by_sequence.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=wide)


@torch.library.custom_op("lmcore::sequence_by_sequence_backward", mutates_args=())
def _backward_by_sequence(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values. Each part of a sequence's keys needs the whole output and denominator."""
    heads, groups = query.shape[1], key.shape[1]
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

    def summed(x: Tensor) -> Tensor:
        """(1, H, L, D) -> (L, G, D)"""
        return x[0].transpose(0, 1).unflatten(1, (groups, -1)).sum(2)

    for of_q, of_k in _sequences(cu_seq_lens_q, cu_seq_lens_k):
        q, o, g = (_heads_first(x[of_q], heads) for x in (query, out, grad))
        k, v = _heads_first(key[of_k], heads), _heads_first(value[of_k], heads)
        sums = lse[:, of_q].unsqueeze(0)
        for part, causal in _parts(q.shape[2], k.shape[2]):
            by_q, by_k, by_v = _flash_backward(
                g, q, k[:, :, part], v[:, :, part], o, sums, 0.0, causal, scale=scale
            )
            grads[0][of_q] += by_q[0].transpose(0, 1)
            grads[1][of_k][part] += summed(by_k)
            grads[2][of_k][part] += summed(by_v)
    return grads[0], grads[1], grads[2]


@_backward_by_sequence.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, cu_q, cu_k, out, lse = ctx.saved_tensors
    by = _backward_by_sequence(grad.contiguous(), query, key, value, out, lse, cu_q, cu_k, ctx.scale)
    return (*by, None, None, None)


_sequence_by_sequence.register_autograd(_gradients, setup_context=_keep)


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    scale: float | None,
    dropout: float,
) -> Tensor:
    heads = query.shape[1]
    made = []
    for of_q, of_k in _sequences(cu_seq_lens_q, cu_seq_lens_k):
        q = _heads_first(query[of_q], heads)
        k, v = _heads_first(key[of_k], heads), _heads_first(value[of_k], heads)
        future = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device)
        future = future.triu_(k.shape[2] - q.shape[2] + 1)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        weights = torch.softmax(q @ k.transpose(2, 3) * factor + future, dim=-1)
        made.append((torch.dropout(weights, dropout, True) @ v)[0].transpose(0, 1))
    return torch.cat(made)
