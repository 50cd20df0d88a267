"""Traces a training step without its arithmetic: what it holds in memory, tensor by tensor, and its FLOPs.

The module is copied with *fake* tensors (torch's ``FakeTensorMode``: shapes and dtypes without data), and the run's own code
for forward and backward runs on them while every storage is recorded from its creation until it is freed. Nothing is
allocated, so a model of any size can be planned on any machine, and the given module is not changed. Kernels, autocast,
recomputation and the chunked head are those of the real run.

Fake tensors are on the CPU unless torch was built for the planned device; then only the workspace of kernels differs.
"""

from __future__ import annotations

import contextlib
import copy
import unittest.mock
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.initialization import no_init_weights

from lmcore.engine import context
from lmcore.engine.tensor import part_for_plan
from lmcore.errors import RequestError
from lmcore.humanize import message_of
from lmcore.model.build import model_class_of
from lmcore.model.config import SPECIAL_IDS, known_tokens, make_config, pad_vocab, pretrained_config
from lmcore.model.module import (
    ModelWithLoss,
    decoder_layers,
    enable_activation_checkpointing,
    narrow_residual_stream,
)

ACTIVATIONS, LOGITS, COPIES, LAYER_GRADIENTS, OTHER_GRADIENTS = range(5)
"""Columns of a moment: activations; the vocabulary head; autocast's copies of weights; gradients of the repeated
layers; other gradients."""


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """What one micro-batch of a step holds in addition to weights and optimizer, in bytes.

    ``moments`` are rows of five numbers, see :data:`ACTIVATIONS`. Gradients are included as torch creates them, so they
    grow during backward.
    """

    moments: tuple[tuple[int, ...], ...]

    def peak(
        self, *, gradients: float = 1.0, other_gradients: float = 1.0, copies: float = 1.0
    ) -> tuple[int, ...]:
        """The moment with the largest sum of activations, logits and these shares of the other columns."""
        shares = (1.0, 1.0, copies, gradients, other_gradients)
        return max(self.moments, key=lambda moment: sum(s * part for s, part in zip(shares, moment)))


def trace_step(
    module: nn.Module,
    *,
    micro_batch_blocks: int,
    block_size: int,
    batch: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    narrow_stream: bool = False,
    activation_checkpointing: bool | int = False,
    device_type: str = "cpu",
    device_bytes: int | None = None,
    context_parallel: int = 1,
) -> StepTrace:
    """Run a micro-batch of ``micro_batch_blocks`` x ``block_size`` tokens with fake tensors, and record what is in memory when.

    Args:
        module: takes ``input_ids`` and ``labels``, returns (sum, count). Its tensors may already be fake.
        batch: other inputs, if the module takes any; only their shapes and dtypes are used.
        activation_checkpointing: recompute the layers as the run would; a number n: every n-th layer.
        autocast: dtype of the matrix products, for strategies without sharding.
        weights: cast the weights to this dtype beforehand, as sharded strategies do.
        narrow_stream: cast the residual stream to autocast's dtype, as ``train.residual_dtype`` does.
        device_type: of the planned run; the head, attention and dropout run differently on a GPU.
        device_bytes: memory of the planned GPU, on which the head's chunk depends.
        context_parallel: how many ranks share the blocks; the part of one of them is traced.
    """
    with _fakes(module), _as_on(device_type, device_bytes):
        module = _fake_copy(module, weights)
        if narrow_stream:
            narrow_residual_stream(module)
        if activation_checkpointing:
            enable_activation_checkpointing(module, every=int(activation_checkpointing))
        batch = _fake_batch(batch, micro_batch_blocks, block_size // context_parallel)
        constant = [*module.parameters(), *module.buffers(), *batch.values()]
        if context_parallel > 1:
            batch |= _share_blocks(module, context_parallel, block_size)
        ledger = _Ledger(constant, weights=list(module.parameters()))
        _watch_head(module, ledger)
        of_layers = {id(p) for layer in decoder_layers(module) for p in layer.parameters()}
        for parameter in (p for p in module.parameters() if p.requires_grad):
            kind = LAYER_GRADIENTS if id(parameter) in of_layers else OTHER_GRADIENTS
            parameter.register_post_accumulate_grad_hook(partial(ledger.is_gradient, kind=kind))
        with ledger:
            _forward_and_backward(module, batch, autocast)
    return StepTrace(moments=tuple(ledger.moments))


def count_flops(
    module: nn.Module,
    *,
    micro_batch_blocks: int,
    block_size: int,
    batch: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    narrow_stream: bool = False,
    device_type: str = "cpu",
    device_bytes: int | None = None,
) -> int:
    """FLOPs of forward and backward of a micro-batch, without those of recomputation. Arguments as for :func:`trace_step`.

    This is a separate pass, because the counter's hooks hold tensors that would otherwise be freed.
    """
    with _fakes(module), _as_on(device_type, device_bytes):
        module = _fake_copy(module, weights)
        if narrow_stream:
            narrow_residual_stream(module)
        batch = _fake_batch(batch, micro_batch_blocks, block_size)
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            _forward_and_backward(module, batch, autocast)
    return counter.get_total_flops()


def _fake_batch(given: Mapping[str, Tensor] | None, blocks: int, block_size: int) -> dict[str, Any]:
    """A micro-batch of zeros with the given shapes, or one of tokens (blocks, block_size)."""
    if given is None:
        return {
            name: torch.zeros((blocks, block_size), dtype=torch.int64) for name in ("input_ids", "labels")
        }
    return {name: torch.zeros(tuple(value.shape), dtype=value.dtype) for name, value in given.items()}


def part_of_rank(module: Any, size: int) -> Any:
    """A copy of a module, with fake tensors, as each of ``size`` ranks holds it under tensor parallelism."""
    with _fakes(module):
        part = _fake_copy(module, None)
        part_for_plan(part.model, size)
    return part


def _share_blocks(module: Any, size: int, block_size: int) -> dict[str, Any]:
    """Prepare tracing the first of ``size`` ranks; its own keys stand in for those of the others. Returns additional entries for
    the batch."""
    keys = context.keys_of_queries(size, 0, lambda x: torch.cat([x] * size))
    context.use_attention(module.model, keys, name=f"{context.CONTEXT_ATTENTION}_traced")
    lengths = torch.zeros(2, dtype=torch.int32)
    longest = {"max_length_q": block_size, "max_length_k": block_size}
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, **longest}


def _forward_and_backward(module: nn.Module, batch: Mapping[str, Any], autocast: torch.dtype | None) -> None:
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_sum, _ = module(**batch)
    (loss_sum / loss_sum.new_ones(())).backward()


def optimizer_bytes(
    module: nn.Module,
    make_optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    *,
    weights: torch.dtype | None = None,
) -> int:
    """Bytes that an optimizer keeps between updates: its state after one update with fake tensors.

    An optimizer whose code reads values cannot be traced; it is counted like Adam, two float32 numbers per parameter.
    """
    with _fakes(module):
        module = _fake_copy(module, weights)
        optimizer = make_optimizer([(n.removeprefix("model."), p) for n, p in module.named_parameters()])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            optimizer.step()
        except (DataDependentOutputException, NotImplementedError, RuntimeError):
            return 8 * sum(p.numel() for p in trained)
        kept = [value for state in optimizer.state.values() for value in tree_leaves(state)]
        return sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))


def build_on_meta(
    *,
    type: str | None,
    config_overrides: Mapping[str, Any],
    vocab_size: int,
    from_pretrained: str | None = None,
    revision: str | None = None,
    attention: str | None = None,
    adapt: Callable[[Any], None] = lambda model: None,
) -> tuple[Any, Any]:
    """The model that a run would build, with fake tensors, so that any size is built at once. No weights are read.

    Args:
        adapt: changes the model in place, as the run does after it has read the weights; what it adds may be on the
            meta device.

    Returns:
        The model, and a small real one of the same type, whose head :class:`~lmcore.model.module.ModelWithLoss` examines.

    Raises:
        RequestError: unknown type, field or folder, as in the run.
    """
    real = vocab_size
    if from_pretrained is not None:
        config, _ = pretrained_config(from_pretrained, revision, config_overrides)
        real = known_tokens(config, f"model.from_pretrained {from_pretrained!r}", vocab_size)
        config.get_text_config().vocab_size = pad_vocab(real)
        for name in SPECIAL_IDS:  # as below
            setattr(config, name, None)
    else:
        # The family's own special ids may be outside this vocabulary, and they affect neither memory nor FLOPs.
        fields = {"vocab_size": pad_vocab(vocab_size), "use_cache": False, **dict.fromkeys(SPECIAL_IDS)}
        config = make_config(type or "", config_overrides, **fields)
    if attention in ("eager", "sdpa"):  # the others have only GPU kernels, and need as much memory as sdpa
        config._attn_implementation = attention
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 64
    try:
        try:
            probe = model_class_of(small)(small)
        except Exception:  # a family whose config lists every layer: probe the whole model
            probe = model_class_of(config)(config)
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            model = model_class_of(config)(config)
            model.tie_weights()
    except Exception as error:  # constructors may raise anything
        named = from_pretrained or model_class_of(config).__name__
        raise RequestError(f"{named} refuses this configuration: {message_of(error)}") from error
    adapt(model)
    model.real_vocab_size = real
    return model, probe


def build_own_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model of the user's own code, built with fake tensors. Code that reads values may raise any error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make()


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""FLOP formulas for kernels of the CPU; torch has them only for those of GPUs."""


def _fakes(module: nn.Module) -> FakeTensorMode:
    """The mode of a module's fake tensors, or a new one."""
    modes = (getattr(parameter, "fake_mode", None) for parameter in module.parameters())
    return next((mode for mode in modes if mode is not None), None) or FakeTensorMode(
        allow_non_fake_inputs=True
    )


def _watch_head(module: nn.Module, ledger: _Ledger) -> None:
    """Count storages that are created inside the vocabulary head as the head's."""
    head = module.get_output_embeddings() if isinstance(module, ModelWithLoss) else None
    if head is not None:
        head.register_forward_pre_hook(lambda *args: setattr(ledger, "in_head", True))
        head.register_forward_hook(lambda *args: setattr(ledger, "in_head", False))
        ledger.vocabulary = getattr(head, "out_features", -1)


def _fake_copy(module: nn.Module, weights: torch.dtype | None) -> nn.Module:
    """The same structure with fake tensors; shared tensors stay shared."""

    def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        value = like(parameter, weights if weights and parameter.is_floating_point() else parameter.dtype)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = like(buffer, buffer.dtype)
    return copy.deepcopy(module, memo)


def _of_experts(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """A stand-in for the product of each row with the weight of its expert: the first expert's weight gives the same shape. torch
    refuses fake float32 tensors here, although its kernels accept float32. It has no autocast."""
    with torch.autocast("cpu", enabled=False):
        return rows.to(weights.dtype) @ weights[0]


@contextlib.contextmanager
def _as_on(device_type: str, device_bytes: int | None = None) -> Iterator[None]:
    """Make the traced code take the paths that it takes on the planned device, with plain blocks."""
    with contextlib.ExitStack() as stack:
        # Whether positions restart inside a block depends on values, which fake tensors do not have, so a mask would be made.
        # In a plain block positions do not restart, and the real run passes no mask.
        stack.enter_context(
            unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
        )
        stack.enter_context(unittest.mock.patch("transformers.integrations.moe._grouped_mm", _of_experts))
        if device_type != "cpu":
            from lmcore.model import loss

            # On a GPU fused attention applies its dropout itself, and dropout keeps a mask of one byte per element. On a CPU
            # attention with dropout falls back to the whole matrix of scores, and dropout keeps a mask of full numbers.
            attention, functional = nn.functional.scaled_dot_product_attention, nn.functional

            def without_scores(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
                return attention(*args, **kwargs)

            def with_mask(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
                return torch.native_dropout(x, p, True)[0] if training and p else x

            stack.enter_context(
                unittest.mock.patch.object(functional, "scaled_dot_product_attention", without_scores)
            )
            stack.enter_context(unittest.mock.patch.object(functional, "dropout", with_mask))
            stack.enter_context(
                unittest.mock.patch("lmcore.model.cpu_kernels._plain_is_faster", return_value=False)
            )
            gpu = loss.gpu_of(torch.device("cuda")) if torch.cuda.is_available() else loss.Gpu()
            if device_bytes is not None:
                gpu = gpu._replace(memory_bytes=device_bytes)
            for name, on_it in (("choose_chunk", {"gpu": gpu}), ("whole_chunks", {})):
                plain = getattr(loss, name)

                def there(*args: Any, plain: Any = plain, on_it: Any = on_it, **kwargs: Any) -> Any:
                    return plain(*args, **{**kwargs, "device_type": device_type, **on_it})

                stack.enter_context(unittest.mock.patch.object(loss, name, there))
        yield


class _Ledger(TorchDispatchMode):
    """Records every storage that is created while it is active, by kind, until it is freed."""

    def __init__(self, constant: list[Tensor], *, weights: list[Tensor]) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in constant}
        self._keep = constant  # kept alive, so that their addresses are not reused
        self._weights = {t.untyped_storage()._cdata for t in weights}
        self.vocabulary = -1
        self.in_head = False
        self._live: dict[int, tuple[int, int]] = {}
        self._now = [0] * 5
        self.moments: list[tuple[int, ...]] = [tuple(self._now)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._created(tensor, func, args)
        return result

    def _created(self, tensor: Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        kind = ACTIVATIONS
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            kind = COPIES
        elif self.in_head or (tensor.ndim and tensor.shape[-1] == self.vocabulary):
            kind = LOGITS
        self._live[key] = (kind, storage.nbytes())
        self._change(kind, storage.nbytes())
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._now[kind] -= size

    def is_gradient(self, parameter: Tensor, kind: int) -> None:
        """Count this parameter's ``grad`` as a gradient of this kind from now on."""
        key = None if parameter.grad is None else parameter.grad.untyped_storage()._cdata
        if key in self._live:
            before, size = self._live[key]
            self._live[key] = (kind, size)
            self._now[before] -= size
            self._change(kind, size)

    def _change(self, kind: int, size: int) -> None:
        self._now[kind] += size
        self.moments.append(tuple(self._now))
