"""Loss: hidden states and labels in, (sum of losses, count of labels) out.

What always holds: ``labels`` are already shifted (label ``t`` is the token that follows input ``t``) and are
never shifted again; a label of -100 is ignored; what comes out is a *sum* and a *count*, so that the one
division, by the number of labels of the whole step over all ranks, happens elsewhere and once. Sums are
float32 (float64 for float64 input), whatever the precision of the matrix products.

The vocabulary head is the largest activation of a language model: N tokens times V logits, several times
over. The chunked head computes a few hundred rows of logits at a time and *their gradients at once, in the
forward pass*: the gradient of a sum does not depend on anything that comes later but one scalar factor, which
backward multiplies in. So nothing is recomputed, nothing of size N x V is ever held, and backward is one
multiplication.

Example::

    loss_sum, count = causal_lm_loss(hidden, head.weight, head.bias, labels, chunk=512)
    (loss_sum / count_of_the_step).backward()

Letters: B blocks, T tokens of a block, N = B*T, D width, V vocabulary, P the same with its padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.errors import RequestError

IGNORED_LABEL = -100
"""torch's default ``ignore_index``; set by position, so that a pad id equal to EOS never hides a real EOS."""

CHUNK_BYTES = 16 * 2**20
"""Size of one chunk's float32 logits under ``chunk="auto"`` on a CPU."""
CUDA_CHUNK_BYTES = 2**30
"""The same on a GPU, where small matrix products would leave most of the chip idle."""


def count_labels(labels: Tensor) -> Tensor:
    """Number of labels that are not ignored: a 0-dim int64 tensor on their device."""
    return (labels != IGNORED_LABEL).sum()


def token_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The loss of every token, (N,) float32, zero where the label is ignored. The slow, obvious reference.

    With ``lse = log sum_v exp(l_v)`` over the V real tokens, label ``y``, smoothing ``s``, z-loss ``z``::

        (1 - s) * (lse - l_y)  +  s * (lse - mean_v l_v)  +  z * lse**2

    Smoothing as in ``torch.nn.CrossEntropyLoss`` (Szegedy et al. 2016, the label's own token included in the
    mean), z-loss as in PaLM (Chowdhery et al. 2022, section 5: ``z = 1e-4``), which keeps lse near zero.

    Args:
        logits: (N, P), any float dtype; computed in float32, or float64 if they are.
        labels: (N,) int64, -100 = ignored.
        vocab_size: V; columns from V on are padding and take no probability. ``None``: V = P.
    """
    x = logits[:, :vocab_size]
    x = x if x.dtype == torch.float64 else x.float()
    valid = labels != IGNORED_LABEL
    lse = torch.logsumexp(x, dim=-1)
    picked = x.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    loss = lse - picked if not label_smoothing else lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * x.mean(dim=-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(valid, loss, loss.new_zeros(()))


def cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of :func:`token_losses` and the count, from full logits (..., P) and labels (...)."""
    if labels.is_floating_point():
        raise RequestError(
            f"labels are {labels.dtype}: the built-in loss is a cross-entropy; give loss.factory"
        )
    if logits.shape[:-1] != labels.shape:
        raise RequestError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: expected one more "
            "dimension, the classes, at the end; give loss.factory for any other loss"
        )
    losses = token_losses(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )
    return losses.sum(), count_labels(labels)


def choose_chunk(chunk: int | str | None, *, tokens: int, vocab_size: int, device_type: str = "cpu") -> int:
    """Tokens per chunk of the vocabulary head; 0 = the plain head.

    ``"auto"``: as many rows as keep one chunk's float32 logits within ``CHUNK_BYTES`` (CPU) or
    ``CUDA_CHUNK_BYTES`` (GPU), a multiple of 128, at least 128, at most all of them. Measured in
    ``benchmarks/head.py``.
    """
    if chunk is None or chunk == "auto":
        budget = CUDA_CHUNK_BYTES if device_type == "cuda" else CHUNK_BYTES
        rows = max(128, budget // (4 * vocab_size) // 128 * 128)
        return min(rows, tokens)
    rows = int(chunk)
    if rows < 0:
        raise RequestError(f"loss.chunk is {rows}: give tokens per chunk, 0 for the plain head, or auto")
    return min(rows, tokens)


def causal_lm_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    *,
    chunk: int | str | None = "auto",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a linear vocabulary head: (sum, count) as 0-dim tensors.

    Args:
        hidden: (B, T, D) or (N, D), last hidden state.
        head_weight: (P, D); may be tied to the input embedding.
        head_bias: (P,) or ``None``.
        labels: (B, T) or (N,) int64, already shifted, -100 = ignored.
        chunk: tokens per chunk, 0 for the plain head, ``"auto"`` for :func:`choose_chunk`.
        label_smoothing, z_loss, vocab_size: see :func:`token_losses`.

    The products run in the autocast dtype where autocast is on, else in ``hidden``'s dtype. The first
    derivative is exact; a second derivative is refused (by torch) under the chunked head.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    target = labels.reshape(-1)
    rows = choose_chunk(
        chunk, tokens=flat.shape[0], vocab_size=head_weight.shape[0], device_type=hidden.device.type
    )
    if rows == 0:
        logits = F.linear(flat, head_weight, head_bias)
        return cross_entropy_sum(
            logits, target, label_smoothing=label_smoothing, z_loss=z_loss, vocab_size=vocab_size
        )
    loss = _ChunkedHead.apply(
        flat,
        head_weight,
        head_bias,
        target,
        rows,
        label_smoothing,
        z_loss,
        vocab_size,
        torch.is_grad_enabled(),
    )
    return loss, count_labels(labels)


# float16 has no room below 6e-5: probabilities of rare tokens would be rounded away before the loss scale,
# which arrives in backward, could lift them. Eight is far from overflow in the
# sum over a chunk.
_FP16_LIFT = 8.0


class _ChunkedHead(torch.autograd.Function):
    """Linear head + cross-entropy, chunk by chunk, with the gradients of the sum made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        label_smoothing: float,
        z_loss: float,
        vocab_size: int | None,
        grad_enabled: bool,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        accumulate = torch.float64 if compute == torch.float64 else torch.float32
        lift = _FP16_LIFT if compute == torch.float16 else 1.0
        n, padded = hidden.shape[0], weight.shape[0]
        real = padded if vocab_size is None else vocab_size

        with torch.autocast(device, enabled=False):
            w = weight.to(compute)
            b = None if bias is None else bias.to(compute)
            total = torch.zeros((), dtype=accumulate, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = (
                torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if need_weight else None
            )
            grad_bias = torch.zeros(padded, dtype=accumulate, device=weight.device) if need_bias else None
            # Allocated once: on a virtual machine the page faults of fresh large buffers cost more than
            # the arithmetic.
            buffer = torch.empty(min(rows, n), padded, dtype=compute, device=hidden.device)
            wide = buffer if compute == accumulate else torch.empty_like(buffer, dtype=accumulate)

            for start in range(0, n, rows):
                h = hidden[start : start + rows].to(compute)
                y = labels[start : start + rows]
                valid = y != IGNORED_LABEL
                index = y.clamp_min(0).unsqueeze(1)
                logits, x = buffer[: h.shape[0]], wide[: h.shape[0]]
                torch.mm(h, w.t(), out=logits)
                if b is not None:
                    logits.add_(b)
                if x is not logits:
                    x.copy_(logits)
                if real < padded:
                    x[:, real:] = float("-inf")
                lse = torch.logsumexp(x, dim=-1)
                loss = lse - (1 - label_smoothing) * x.gather(1, index).squeeze(1)
                if label_smoothing:
                    loss -= label_smoothing * x[:, :real].mean(dim=-1)
                if z_loss:
                    loss += z_loss * lse.square()
                total += torch.where(valid, loss, 0.0).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue

                # d loss / d logits = p * (1 + 2 z lse) - (1 - s) [v == y] - s / V; zero where ignored.
                g = x.sub_(lse.unsqueeze(1)).exp_()
                kept = valid.to(accumulate)
                if z_loss:
                    g.mul_((kept * (1 + 2 * z_loss * lse)).unsqueeze(1))
                else:
                    g.mul_(kept.unsqueeze(1))
                if label_smoothing:
                    g[:, :real] -= (label_smoothing / real) * kept.unsqueeze(1)
                g.scatter_add_(1, index, ((label_smoothing - 1) * kept).unsqueeze(1))
                if lift != 1.0:
                    g.mul_(lift)
                if grad_bias is not None:
                    grad_bias += g.sum(dim=0)
                if g is not logits:
                    logits.copy_(g)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = torch.mm(logits, w)
                if grad_weight is not None:
                    if compute == accumulate:
                        grad_weight.addmm_(logits.t(), h)
                    else:  # sums in float32 inside, rounded once per chunk, as the plain head's product
                        grad_weight += torch.mm(logits.t(), h)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.lift = lift
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the chunked head's gradients were already used: backward runs once per forward"
            )
        grads, ctx.grads = ctx.grads, None
        factor = grad_loss / ctx.lift
        # In place, on buffers that nobody else holds; rounding comes after the scaling.
        scaled = tuple(
            None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in zip(grads, ctx.dtypes)
        )
        return (*scaled, None, None, None, None, None, None)
