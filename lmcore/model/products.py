"""Which matrix products are fast on this machine: bf16 where the hardware has it, float32 by oneDNN on AMD CPUs.

torch multiplies float32 matrices with MKL, which uses AVX2 on an AMD CPU even if the CPU has AVX-512. oneDNN, which is part
of torch too and which torch uses for bfloat16, has no such limit. GFLOP/s on one thread of an EPYC (Zen 5, torch 2.13.0+cpu),
MKL and oneDNN, N x K x M = 768 x 128 x 512: 108 and 237 for the output of a layer, 107 and 242 for the gradient of its input,
95 and 207 for that of its weight. On an AMD CPU without AVX-512 there is little to gain (106 and 119, with oneDNN held to
AVX2), and on an Intel CPU MKL has no such limit: MKL is kept on both.

The choice depends on the CPU and on the sizes only, never on a measurement, so that a run repeats bit for bit on the same
machine.

Letters: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

import functools
import platform
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_MULTIPLICATIONS = 2**21
"""N K M from which oneDNN is used: a call of it takes about 12 us more than one of MKL. Two threads, MKL and oneDNN: 21 and
21 us for 16 x 128 x 512, 29 and 26 us for 32 x 128 x 512, 49 and 34 us for 64 x 128 x 512."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware. Without that a product takes longer than in float32: on one thread of
    an EPYC with AVX2 (Zen 3, torch 2.13.0+cpu) 6 x 192 x 192 x 768 took 332 ms by ``baddbmm`` in bf16, 10 ms in float32."""
    if device.type == "cpu":
        return bool(cpu_bf16())
    return device.type != "cuda" or has_native_bf16()


def cpu_bf16() -> str:
    """The instructions by which this CPU multiplies bf16 matrices: AMX, AVX512-BF16, or none (an empty string)."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def has_native_bf16() -> bool:
    """Whether every visible GPU supports bf16 in hardware (NVIDIA: compute capability 8.0, Ampere, or newer).

    Older GPUs (T4, V100) emulate it without tensor cores, which ``torch.cuda.is_bf16_supported()`` counts as support.
    All GPUs are checked, so that every rank gets the same answer.
    """
    if torch.version.hip is not None:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    devices = range(torch.cuda.device_count())
    return len(devices) > 0 and all(torch.cuda.get_device_capability(index) >= (8, 0) for index in devices)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and this torch has both MKL and oneDNN."""
    return (
        _is_amd()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux; Windows has the vendor in its name of the processor
        return "AuthenticAMD" in platform.processor()


def use_faster_products(model: nn.Module) -> None:
    """Let the linear layers of a model, ``nn.Linear`` and transformers' ``Conv1D``, multiply with :func:`linear`, in place.

    Nothing is changed where :func:`onednn_is_faster` is false.
    """
    if not onednn_is_faster():
        return
    from transformers.pytorch_utils import Conv1D

    forwards: dict[type, Any] = {nn.Linear: _linear_forward, Conv1D: _conv1d_forward}
    for module in model.modules():
        forward = forwards.get(type(module))
        if forward is not None and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)


def _linear_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _conv1d_forward(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias, inputs_first=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, inputs_first: bool = False) -> Tensor:
    """``x @ weight.T + bias``, like ``torch.nn.functional.linear``, with its gradients.

    oneDNN is used for float32 on a CPU, from :data:`FEWEST_MULTIPLICATIONS` on, outside of autocast and compiled code; the
    product of torch for anything else. The numbers are the same up to rounding.

    Args:
        x: (..., K).
        weight: (M, K), or (K, M) with ``inputs_first``, as transformers' ``Conv1D`` has it.
        bias: (M,) or ``None``.

    Returns:
        (..., M).
    """
    suits = x.dim() > 1 and _suits(x, weight, weight.shape[1 if inputs_first else 0])
    if suits and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        made: Tensor = _Linear.apply(x, weight, bias, inputs_first)
        return made
    return F.linear(x, weight.t() if inputs_first else weight, bias)


class _Linear(torch.autograd.Function):
    """:func:`linear`, each of its three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> Tensor:
        # The parameter itself is kept, not a view of it, which would hold memory that ZeRO-3 frees after the layer.
        ctx.save_for_backward(x, weight)
        ctx.inputs_first = inputs_first
        return _onednn(x, weight.t() if inputs_first else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        pair = (rows, grad_rows) if ctx.inputs_first else (grad_rows, rows)
        return (
            _onednn(grad, weight if ctx.inputs_first else weight.t(), None) if of_x else None,
            _sum_of_outer_products(*pair) if of_weight else None,
            grad_rows.sum(0) if of_bias else None,
            None,
        )


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``a @ b``, (N, K) x (K, M), without gradients.

    Args:
        out: (N, M), where torch's own product writes its result. oneDNN makes a tensor of its own.
    """
    if onednn_is_faster() and _suits(a, b, b.shape[1]):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b, out=out)


def sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, (N, K) and (N, M) to (K, M), without gradients: the gradient of a weight."""
    if onednn_is_faster() and _suits(a, b, b.shape[1]):
        return _sum_of_outer_products(a, b)
    return torch.mm(a.t(), b)


def _sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    # oneDNN takes up to 1.8 times as long for the tall form of a result as for the wide one, more than the copy costs.
    if a.shape[1] > b.shape[1]:
        return _onednn(b.t(), a.t(), None).t().contiguous()
    return _onednn(a.t(), b.t(), None)


def _suits(x: Tensor, y: Tensor, outputs: int) -> bool:
    """Whether both are plain float32 tensors on a CPU, neither fake nor distributed, of enough elements for ``outputs``."""
    return (
        type(x) is Tensor
        and type(y) in (Tensor, nn.Parameter)
        and x.device.type == y.device.type == "cpu"
        and x.dtype == y.dtype == torch.float32
        and x.numel() * outputs >= FEWEST_MULTIPLICATIONS
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, (..., K) and (M, K) to (..., M)."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made
