"""Attention by sequence lengths equals plain attention over each sequence, forward and backward, compiled or not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcore.model import varlen
from lmcore.model.varlen import varlen_attention

# Empty sequences, keys without queries, more keys than queries, as many.
QUERIES, KEYS = [0, 0, 3, 10, 11, 40, 40], [0, 5, 10, 17, 18, 80, 80]


def tensors(groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(40, 4, 16), (80, groups, 16), (80, groups, 16), (40, 4, 16)]
    q, k, v, grad = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def by_lengths(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    lengths = (torch.tensor(line, dtype=torch.int32) for line in (QUERIES, KEYS))
    return varlen_attention(q, k, v, *lengths, max_length_q=40, max_length_k=80, **options)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The obvious way, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    out = []
    for (a, b), (c, d) in zip(pairwise(QUERIES), pairwise(KEYS)):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * (
            q.shape[-1] ** -0.5 if scale is None else scale
        )
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(out)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)]
)
def test_equals_plain_attention(groups: int, scale: float | None, dtype: torch.dtype, close: float) -> None:
    """Tolerances: a few units in the last place of numbers up to 4, in the type's own precision."""
    q, k, v, grad = tensors(groups, dtype)
    found, expected = by_lengths(q, k, v, scale=scale), plain(q, k, v, scale)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    theirs = torch.autograd.grad(expected, (q, k, v), grad.double())
    for one, other in zip(torch.autograd.grad(found, (q, k, v), grad), theirs):
        torch.testing.assert_close(one.double(), other.double(), rtol=close, atol=close)
    with_dropout = by_lengths(q, k, v, scale=scale, dropout=1e-15)  # drops nothing, and takes the other way
    torch.testing.assert_close(with_dropout.double(), expected, rtol=close, atol=close)


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    q, k, _, _ = tensors(2, torch.float64)
    ones = torch.ones(80, 2, 16, dtype=torch.float64)
    torch.manual_seed(0)
    made = torch.stack([by_lengths(q, k, ones, dropout=0.25).detach() for _ in range(200)])
    assert float(made.std()) > 0.05
    assert float(made.mean()) == pytest.approx(1.0, abs=0.02)


def test_compiles_without_a_graph_break() -> None:
    q, k, v, _ = tensors(2, torch.float32)
    explained = torch._dynamo.explain(lambda *x: by_lengths(*x).sum())(q, k, v)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("told_of_groups", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_gpu_gets_one_call_of_torchs_kernel(monkeypatch: pytest.MonkeyPatch, told_of_groups: bool) -> None:
    """Its arguments are checked against plain attention on a CPU; the kernel itself has not been run."""
    calls: list[dict[str, Any]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
        calls.append({"lengths": lengths, **options})
        return torch.zeros_like(q)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(varlen, "_device_of", lambda tensor: "cuda")
    monkeypatch.setattr(varlen, "_TOLD_OF_GROUPS", told_of_groups)
    q, k, v, _ = tensors(2, torch.bfloat16)
    by_lengths(q, k, v, scale=0.3)
    (call,) = calls
    of_q, of_k, longest_q, longest_k = call["lengths"]
    assert (of_q.tolist(), of_k.tolist(), longest_q, longest_k) == (QUERIES, KEYS, 40, 80)
    assert call["window_size"] == (-1, 0)  # causal, aligned to the last key
    assert call["scale"] == 0.3
    assert call.get("enable_gqa") == (True if told_of_groups else None)
