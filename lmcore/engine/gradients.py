"""Gradients that autograd and DDP alone would not make: fp32 sums for bf16 parameters, bf16 reductions of fp32 ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

REDUCED_AT_ONCE = 1 << 26
"""Elements of one message, 256 MiB: NCCL is at full rate far below."""


@final
class WideGradients:
    """The fp32 sums of the gradients of parameters in a smaller type; for one process and DDP.

    bf16 has 8 significant bits: once a sum holds 256 equal gradients, each further one is lost whole. A gradient is added
    here as soon as it is complete, and freed; the ranks are averaged once at the end of the step, because
    DDP's own reduction is in the parameters' type. It therefore replaces DDP, for buffers too.

    Args:
        trained: the parameters that the optimizer updates, on their device.
        buffers: persistent ones, which every rank takes from rank 0 after a step.
    """

    def __init__(self, trained: list[nn.Parameter], buffers: Iterable[Tensor]) -> None:
        self._trained, self._buffers = trained, list(buffers)
        sizes = [parameter.numel() for parameter in trained]
        # The last numbers say which parameters had a gradient: they are reduced with the sums.
        self._flat = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float32, device=trained[0].device)
        *parts, self._had_gradient = self._flat.split([*sizes, len(sizes)])
        self._sums = [part.view_as(p) for part, p in zip(parts, trained)]
        self._seen: set[int] = set()
        for index, parameter in enumerate(trained):
            parameter.register_post_accumulate_grad_hook(partial(self._take, index))

    def _take(self, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._sums[index].add_(parameter.grad)
        parameter.grad = None
        self._seen.add(index)

    def reduced(self) -> list[Tensor]:
        """The gradients of the step, fp32, averaged over the ranks. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            everything = len(self._seen) == len(self._trained)
            if everything:
                self._had_gradient.fill_(1.0)
            else:
                seen = [float(index in self._seen) for index in range(len(self._trained))]
                self._had_gradient.copy_(torch.tensor(seen))
            for part in self._flat.split(REDUCED_AT_ONCE):
                dist.all_reduce(part.div_(dist.get_world_size()))
            if (
                not everything
            ):  # another rank may have the gradients that are missing here; else no host waits
                self._seen = set(self._had_gradient.nonzero().flatten().tolist())
            for buffer in self._buffers:
                dist.broadcast(buffer, src=0)
        return [self._sums[index] for index in sorted(self._seen)]

    def give_to_parameters(self, norm: Tensor, clip_norm: float) -> None:
        """Clip to ``clip_norm`` (0: no clipping), round once, set the parameters' ``grad``; the sums start at zero again."""
        if clip_norm > 0:
            self._flat.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0))  # as nn.utils.clip_grads_with_norm_
        for index in self._seen:
            self._trained[index].grad = self._sums[index].to(self._trained[index].dtype)
        self._flat.zero_()
        self._seen.clear()


def settle_ddp_buckets(wrapped: Any, inner: nn.Module, batch: dict[str, Tensor]) -> None:
    """One backward of DDP whose gradients are thrown away.

    DDP reorders its buckets after its first backward, and with three or more ranks the order decides how sums round. A
    run that resumes must not round its first step differently from the run that never stopped.
    """
    kept = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    wrapped.require_backward_grad_sync = True
    (wrapped(**batch)[0] * 0.0).backward()
    wrapped.zero_grad(set_to_none=True)
    for name, buffer in inner.named_buffers():
        buffer.copy_(kept[name])


def average_in_bf16(_, bucket):  # DDP compares annotations, which are text here
    """DDP's reduction with gradients rounded to bf16 on their way: half the bytes over a slow network.

    torch's own ``bf16_compress_hook`` does the same, but refuses to run over gloo.
    """
    narrow = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(narrow, async_op=True)
    assert work is not None

    def widen(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return bucket.buffer().copy_(future.value()[0])

    return work.get_future().then(widen)
