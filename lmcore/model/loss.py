"""Loss: (sum of losses, count of labels) from hidden states and labels.

``labels`` are already shifted (label ``t`` is the token that follows input ``t``) and are
never shifted again; a label of -100 is ignored. The result is a *sum* and a *count*, so that the only
division, by the number of labels of the whole step over all ranks, happens elsewhere and once. Sums are
float32 (float64 for float64 input), whatever the precision of the matrix products.

The logits are the largest activation of a language model: N tokens times V logits, held several times.
The chunked head computes some rows of logits at a time, and *their gradients immediately, in the
forward pass*: the gradient of a sum depends on nothing that comes later except one scalar factor, which
backward multiplies in. So nothing is recomputed, nothing of size N x V is ever held, and backward is one
multiplication.

Example::

    loss_sum, count = causal_lm_loss(hidden, head.weight, head.bias, labels, chunk=512)
    (loss_sum / count_of_the_step).backward()

Letters: B blocks, T tokens of a block, N = B*T, D width, V vocabulary size, P vocabulary size with padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.conventions import IGNORED_LABEL
from lmcore.errors import RequestError
from lmcore.model.products import onednn_is_faster, product, sum_of_outer_products

CHUNK_BYTES = 128 * 2**20
"""Size of one chunk's logits under ``chunk="auto"`` on a CPU: the chunked head keeps one such buffer."""
CUDA_CHUNK_BYTES, CUDA_CHUNK_SHARE = 2**30, 64
"""The same on a GPU, where small matrix products would leave most of the chip idle: 1 GiB, or 1/64 of the device's memory
if that is more."""
GPU_TILE = 256, 128
"""Rows and columns of the tile of a product that one multiprocessor computes: the largest that cuBLAS usually uses, and the
most efficient (NVIDIA, "Matrix Multiplication Background User's Guide", DU-09799-001, section 2.3)."""
_FP16_LIFT = 8.0
"""Factor of the gradients in float16, whose smallest normal number is 6e-5: the probabilities of rare tokens would be
rounded away before backward applies the loss scale. Eight is far from overflow in the sum over a chunk."""
_TILE_ROWS = 64
"""Rows whose softmax is computed at once on a CPU, in float32: 64 x 50,304 x 4 bytes fit into the outer cache."""


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
    """The loss of every token, (N,) float32, zero where the label is ignored. The slow, simple reference.

    With ``lse = log sum_v exp(l_v)`` over the V real tokens, label ``y``, smoothing ``s``, z-loss ``z``::

        (1 - s) * (lse - l_y)  +  s * (lse - mean_v l_v)  +  z * lse**2

    Smoothing is as in ``torch.nn.CrossEntropyLoss`` (Szegedy et al. 2016, the label's own token included in the
    mean). The z-loss is as in PaLM (Chowdhery et al. 2022, section 5: ``z = 1e-4``) and keeps lse near zero.

    Args:
        logits: (N, P), any float dtype; computed in float32, or in float64 for float64 logits.
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
    """Sum of :func:`token_losses` and count of labels, from full logits (..., P) and labels (...)."""
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


def head_logits(products: Tensor, *, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Logits from the head's products: ``softcap * tanh(scale * x / softcap)``, or ``scale * x`` without a cap."""
    if softcap is not None:
        return torch.tanh(products * (scale / softcap)) * softcap
    return products if scale == 1.0 else products * scale


class Gpu(NamedTuple):
    """What the chunk size depends on: multiprocessors (SMs) and bytes of memory. Default: an H100 with 80 GB."""

    multiprocessors: int = 132
    memory_bytes: int = 80 * 10**9


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The properties of a CUDA device, as a :class:`Gpu`."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, found.total_memory)


def rows_of_whole_waves(most: int, *, width: int, multiprocessors: int) -> int:
    """The largest number of rows, at most ``most``, for which (rows, V) x (V, width) keeps all multiprocessors busy.

    With tiles of :data:`GPU_TILE`, a product has ``ceil(rows / 256) ceil(width / 128)`` tiles, computed in waves of one tile
    per multiprocessor. A last wave that is not full takes as long as a full one ("wave quantization", section 3.2 of the
    guide at :data:`GPU_TILE`). ``w`` waves hold::

        256 floor(w multiprocessors / ceil(width / 128))   rows

    and the largest ``w`` is used whose rows are at most ``most``. If one wave is already too much, the result is as many
    whole tiles of rows as fit into ``most``, at least one.

    Example::

        rows_of_whole_waves(10_674, width=768, multiprocessors=132)     # 5632: 22 x 6 = 132 tiles, one wave
    """
    tile_rows, tile_columns = GPU_TILE
    wide = -(-width // tile_columns)
    waves = (most // tile_rows + 1) * wide // multiprocessors + 1
    while waves and tile_rows * (waves * multiprocessors // wide) > most:
        waves -= 1
    rows = waves * multiprocessors // wide
    return tile_rows * (rows or max(1, most // tile_rows))


def choose_chunk(
    chunk: int | str | None,
    *,
    tokens: int,
    vocab_size: int,
    width: int = 768,
    element_bytes: int = 2,
    device_type: str = "cpu",
    gpu: Gpu | None = None,
) -> int:
    """Tokens per chunk of the vocabulary head; 0 means the plain head.

    ``"auto"`` on a CPU: the fewest equal chunks whose logits stay within ``CHUNK_BYTES``. Few, because each chunk adds a
    product of the weight's size to the weight's gradient; not one, because a small buffer is the purpose of the chunked
    head. On a GPU: one chunk if it is within ``CUDA_CHUNK_BYTES`` or ``1 / CUDA_CHUNK_SHARE`` of its memory, else
    :func:`rows_of_whole_waves` for the gradient of the hidden state, which has the fewest tiles of the three products.
    Measured on a CPU in ``benchmarks/head.py``; not measured on a GPU.

    Args:
        tokens: rows of all chunks. vocab_size: columns of the logits. width: width of the hidden state.
        element_bytes: bytes of a logit.
        gpu: properties of the GPU (:func:`gpu_of`); default: :class:`Gpu`'s.
    """
    if chunk is None or chunk == "auto":
        if device_type == "cuda":
            gpu = gpu or Gpu()
            budget = max(CUDA_CHUNK_BYTES, gpu.memory_bytes // CUDA_CHUNK_SHARE)
            most = budget // (element_bytes * vocab_size)
            if tokens <= most:
                return tokens
            rows = rows_of_whole_waves(most, width=width, multiprocessors=gpu.multiprocessors)
            return min(rows, tokens)
        most = max(_TILE_ROWS, CHUNK_BYTES // (element_bytes * vocab_size))
        rows = -(-tokens // -(-tokens // most))
        return min(-(-rows // _TILE_ROWS) * _TILE_ROWS, tokens)
    rows = int(chunk)
    if rows < 0:
        raise RequestError(f"loss.chunk is {rows}: give tokens per chunk, 0 for the plain head, or auto")
    return min(rows, tokens)


def whole_chunks(*, device_type: str) -> bool:
    """Whether the softmax takes a whole chunk at once. On a CPU it takes a few rows, whose float32 copy fits the cache."""
    return device_type != "cpu"


def causal_lm_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    *,
    chunk: int | str | None = "auto",
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of a linear vocabulary head: (sum, count) as 0-dim tensors.

    The logits are :func:`head_logits`: ``softcap * tanh(scale * (W h + b) / softcap)``, or without a cap
    ``scale * (W h + b)``.

    Args:
        hidden: (B, T, D) or (N, D), last hidden state.
        head_weight: (P, D); may be tied to the input embedding.
        head_bias: (P,) or ``None``.
        labels: (B, T) or (N,) int64, already shifted, -100 = ignored.
        chunk: tokens per chunk, 0 for the plain head, ``"auto"`` for :func:`choose_chunk`.
        scale: factor of the logits (granite, cohere).
        softcap: largest absolute logit (nanochat, gemma 2).
        label_smoothing, z_loss, vocab_size: see :func:`token_losses`.
        compiled: compute the softmax and its gradient in compiled code (chunked head only; ignored on a CPU, where the
            whole head is 1.25 times slower with it than with a few rows at a time in the cache, docs/log.md).

    The products run in the autocast dtype if autocast is on, else in ``hidden``'s dtype. The first
    derivative is exact. With the chunked head torch refuses a second derivative, and backward can run only
    once per forward.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    target = labels.reshape(-1)
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = choose_chunk(
        chunk,
        tokens=flat.shape[0],
        vocab_size=head_weight.shape[0],
        width=head_weight.shape[1],
        element_bytes=compute.itemsize,
        device_type=device,
        gpu=gpu_of(flat.device) if device == "cuda" else None,
    )
    if rows == 0:
        logits = head_logits(F.linear(flat, head_weight, head_bias), scale=scale, softcap=softcap)
        return cross_entropy_sum(
            logits, target, label_smoothing=label_smoothing, z_loss=z_loss, vocab_size=vocab_size
        )
    real = head_weight.shape[0] if vocab_size is None else vocab_size
    lift = _FP16_LIFT if compute == torch.float16 else 1.0
    whole = whole_chunks(device_type=device)
    tile = functools.partial(
        _compiled_tile() if compiled and whole else _tile,
        gradient=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (flat, head_weight, head_bias)),
        real=real,
        scale=scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        lift=lift,
    )
    # A softcap needs one more float32 buffer for its slope. With a quarter of the rows, less memory is used than without
    # a softcap.
    whole_rows = rows if softcap is None else -(-rows // 4)
    tile_rows = whole_rows if whole else _TILE_ROWS
    loss = _ChunkedHead.apply(flat, head_weight, head_bias, target, rows, tile_rows, compute, tile, lift)
    return loss, count_labels(labels)


def _tile(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient: bool,
    real: int,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    lift: float,
) -> Tensor:
    """Sum of the losses of some rows of products (t, P), which are overwritten by the sum's gradient.

    With the logits ``x = softcap * tanh(scale * product / softcap)`` the gradient with respect to ``x`` is
    ``p_v (1 + 2 z lse) - (1 - s) [v == y] - s / V`` (see :func:`token_losses`), zero for padding. With respect to the
    product it is that times ``scale * (1 - (x / softcap)**2)``, times ``lift``. Rows whose label is ignored hold
    meaningless values. Without ``gradient`` the products may be overwritten by arbitrary values.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    slope: Tensor | None = None
    if softcap is not None:
        x = x.mul_(scale / softcap).tanh_()
        slope = (1 - x * x).mul_(scale) if gradient else None
        x.mul_(softcap)
    elif scale != 1.0:
        x = x.mul_(scale)
    valid = labels != IGNORED_LABEL
    index = labels.clamp_min(0).unsqueeze(1)
    if real < x.shape[1]:
        x[:, real:].fill_(float("-inf"))
    picked = x.gather(1, index)
    mean = x[:, :real].mean(dim=1, keepdim=True) if label_smoothing else picked
    top = x.amax(dim=1, keepdim=True)
    p = torch.softmax(x, dim=1, out=x)
    lse = top - p.amax(dim=1, keepdim=True).log()  # accurate: the largest p is at least 1/V
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * mean
    if z_loss:
        loss += z_loss * lse.square()
    if gradient:
        if z_loss:
            p.mul_(1 + 2 * z_loss * lse)
        if label_smoothing:
            p[:, :real] -= label_smoothing / real
        p.scatter_add_(1, index, torch.full_like(picked, label_smoothing - 1))
        if slope is not None:
            p.mul_(slope)
        if lift != 1.0 or (scale != 1.0 and slope is None):
            p.mul_(lift if slope is not None else lift * scale)
        if p is not logits:
            logits.copy_(p)
    return torch.where(valid, loss.squeeze(1), 0.0).sum()


def _tile_to_compile(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient: bool,
    real: int,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    lift: float,
) -> Tensor:
    """:func:`_tile` without in-place writes except the last, so that a compiler can fuse it: two reads, one write.

    Neither form suits both uses. Not compiled, this one is 4 to 11 times slower on a CPU, because it makes many tensors of
    the logits' size; compiled, :func:`_tile` becomes 8 kernels instead of 6 (docs/log.md).
    """
    x = head_logits(logits if logits.dtype == torch.float64 else logits.float(), scale=scale, softcap=softcap)
    slope = scale if softcap is None else scale * (1 - (x / softcap).square())
    valid = labels != IGNORED_LABEL
    index = labels.clamp_min(0).unsqueeze(1)
    column = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    is_real = column < real
    picked = x.gather(1, index)
    mean = torch.where(is_real, x, 0.0).sum(dim=1, keepdim=True) / real if label_smoothing else picked
    x = torch.where(is_real, x, float("-inf"))
    top = x.amax(dim=1, keepdim=True)
    exponential = (x - top).exp()
    total = exponential.sum(dim=1, keepdim=True)
    lse = top + total.log()
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * mean
    if z_loss:
        loss = loss + z_loss * lse.square()
    if gradient:
        g = exponential * ((1 + 2 * z_loss * lse) / total)
        g = torch.where(column == index, g - (1 - label_smoothing), g)
        if label_smoothing:
            g = torch.where(is_real, g - label_smoothing / real, g)
        if softcap is not None or scale != 1.0:
            g = g * slope
        if lift != 1.0:
            g = g * lift
        logits.copy_(g)
    return torch.where(valid, loss.squeeze(1), 0.0).sum()


@functools.cache
def _compiled_tile() -> Callable[..., Tensor]:
    return torch.compile(_tile_to_compile, dynamic=False)


class _ChunkedHead(torch.autograd.Function):
    """Linear head and cross-entropy, chunk by chunk; the gradients of the sum are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        tile_rows: int,
        compute: torch.dtype,
        tile: functools.partial[Tensor],
        lift: float,
    ) -> Tensor:
        # needs_input_grad ignores no_grad, and gradients are always off inside this method: hence the keyword.
        need_hidden, need_weight, need_bias = (
            need and tile.keywords["gradient"] for need in ctx.needs_input_grad[:3]
        )
        accumulate = torch.float64 if compute == torch.float64 else torch.float32
        n = hidden.shape[0]
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(compute)
            b = None if bias is None else bias.to(compute)
            # Allocated once: on a virtual machine the page faults of fresh large buffers cost more than the
            # arithmetic. oneDNN's product makes a tensor of its own.
            buffer: Tensor | None = None
            if not (onednn_is_faster() and hidden.device.type == "cpu" and compute == torch.float32):
                buffer = torch.empty(min(rows, n), weight.shape[0], dtype=compute, device=hidden.device)
            for start in range(0, n, rows):
                h = hidden[start : start + rows].to(compute)
                logits = product(h, w.t(), out=None if buffer is None else buffer[: h.shape[0]])
                if b is not None:
                    logits.add_(b)
                y = labels[start : start + rows]
                for part, part_labels in zip(logits.split(tile_rows), y.split(tile_rows)):
                    total += tile(part, part_labels)
                # Ignored rows are zeroed on the narrow side of the products, which is D wide instead of V.
                ignored = (y == IGNORED_LABEL).unsqueeze(1)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = product(logits, w).masked_fill_(ignored, 0.0)
                if need_weight:
                    # Sums in float32 internally and rounds once per chunk, like the product of the plain head.
                    made = sum_of_outer_products(logits, h.masked_fill(ignored, 0.0))
                    grad_weight = made.to(accumulate) if grad_weight is None else grad_weight.add_(made)
                if need_bias:
                    column_sums = torch.mv(logits.t(), (~ignored[:, 0]).to(compute)).to(accumulate)
                    grad_bias = column_sums if grad_bias is None else grad_bias.add_(column_sums)
                del logits  # before the next chunk's, where those are not in the buffer
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.lift = lift
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the chunked head's gradients are used up: backward runs once per forward")
        grads, ctx.grads = ctx.grads, None
        factor = grad_loss / ctx.lift
        # In place, on buffers that nothing else refers to; rounding comes after the scaling.
        scaled = tuple(
            None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in zip(grads, ctx.dtypes)
        )
        return (*scaled, None, None, None, None, None, None)
