"""Gradients that autograd and DDP do not offer: fp32 sums for bf16 parameters, bf16 reductions of fp32 gradients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcore.engine.state import clean_name
from lmcore.errors import RequestError

SHOWN_NAMES = 8
"""Most parameter names shown in a message; a model may have dozens."""
REDUCED_AT_ONCE = 1 << 26
"""Elements reduced in one call, 256 MiB: NCCL reaches its full rate far below that."""


@final
class WideGradients:
    """The fp32 sums of the gradients of parameters in a smaller dtype; for one process and in place of DDP.

    bf16 has 8 significant bits: once a sum holds 256 equal gradients, each further one is lost completely. Here each
    gradient is added to the sums as soon as it is complete, and freed. The sums are averaged over the ranks once at the end
    of the step. DDP is not used, because it reduces in the parameters' dtype; so this class also synchronizes buffers.

    Args:
        trained: the parameters that the optimizer updates, on their device.
        buffers: persistent buffers, which are copied from rank 0 to every rank in each step.
    """

    def __init__(self, trained: list[nn.Parameter], buffers: Iterable[Tensor]) -> None:
        self._trained, self._buffers = trained, list(buffers)
        sizes = [parameter.numel() for parameter in trained]
        # The last elements tell which parameters had a gradient; they are reduced together with the sums.
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
            # Another rank may have gradients that are missing here. If none are missing, the host need not wait.
            if not everything:
                self._seen = set(self._had_gradient.nonzero().flatten().tolist())
            for buffer in self._buffers:
                dist.broadcast(buffer, src=0)
        return [self._sums[index] for index in sorted(self._seen)]

    def give_to_parameters(self, norm: Tensor, clip_norm: float) -> None:
        """Clip to ``clip_norm`` (0: no clipping), round once, set the parameters' ``grad``, and reset the sums to zero."""
        if clip_norm > 0:
            self._flat.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0))  # as nn.utils.clip_grads_with_norm_
        for index in self._seen:
            self._trained[index].grad = self._sums[index].to(self._trained[index].dtype)
        self._flat.zero_()
        self._seen.clear()


def settle_ddp_buckets(wrapped: Any, inner: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run one backward of DDP and discard its gradients.

    DDP reorders its buckets after its first backward, and with three or more ranks the order decides how sums are rounded.
    A resumed run must not round its first step differently from a run that was never stopped.
    """
    kept = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    wrapped.require_backward_grad_sync = True
    (wrapped(**batch)[0] * 0.0).backward()
    refuse_without_gradient(wrapped, [p for p in wrapped.parameters() if p.requires_grad and p.grad is None])
    wrapped.zero_grad(set_to_none=True)
    for name, buffer in inner.named_buffers():
        buffer.copy_(kept[name])


def refuse_without_gradient(wrapped: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse trained parameters that got no gradient in a step under DDP; a no-op if ``parameters`` is empty.

    DDP averages a bucket only after all its parameters have a gradient. Without one, the gradients of that step would not
    be averaged, and the next forward would fail.

    Raises:
        RequestError: there are such parameters; the message names them.
    """
    missing = {id(parameter) for parameter in parameters}
    if missing:
        _refuse_names([name for name, p in wrapped.named_parameters() if id(p) in missing])


@contextlib.contextmanager
def naming_unused_parameters(wrapped: nn.Module) -> Iterator[None]:
    """Context manager that turns DDP's error about parameters unused in a step into a ``RequestError`` that names them."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        _refuse_names([trained[int(index)] for index in found[1].split()] if found else [], error)


def first_names(names: list[str]) -> str:
    """The first of many names, and the number of the others."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _refuse_names(names: list[str], cause: BaseException | None = None) -> None:
    names = [clean_name(name.removeprefix("module.")) for name in names]
    shown = first_names(names)
    frozen = " ".join(f"--optim.freeze {name}" for name in names[:1]) or "--optim.freeze NAME"
    raise RequestError(
        "DDP needs a gradient of every trained parameter in every step, and these took no part in the loss of one: "
        f"{shown or 'unknown'}. If the model never uses them, freeze them ({frozen}, by name or pattern); if it does in some "
        "steps only, let the loss depend on them in all (add 0.0 * parameter.sum()), or use one process or ZeRO-2"
    ) from cause


def average_in_bf16(_, bucket):  # DDP compares annotations, which are text here
    """A DDP communication hook that reduces gradients in bf16: half the bytes over a slow network.

    torch's own ``bf16_compress_hook`` does the same, but refuses to run over gloo.
    """
    narrow = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(narrow, async_op=True)
    assert work is not None

    def widen(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return bucket.buffer().copy_(future.value()[0])

    return work.get_future().then(widen)
