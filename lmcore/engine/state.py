"""A model's and an optimizer's state by parameter name, where parameters are tensors: one process, DDP and FSDP2.

Plain tensors are whole on every rank, FSDP2's DTensors are a shard on every rank. ZeRO keeps its state in flat buffers:
:class:`lmcore.engine.zero_state.ZeroState` has the same methods for it. One parameter at a time is whole, on the rank
that asks for it, and only until the next.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lmcore.errors import RequestError


class TensorState:
    """``named`` are the parameters by name, after wrapping; ``buffers`` the persistent ones."""

    def __init__(
        self, named: dict[str, nn.Parameter], buffers: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self._named = named
        self._tensors: dict[str, Tensor] = {**named, **buffers}
        self._optimizer = optimizer

    def weights(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, whole shape and dtype of every weight and persistent buffer."""
        for name, tensor in self._tensors.items():
            yield name, tuple(tensor.shape), tensor.dtype

    def slots(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype]]:
        """Name, slot, whole shape and dtype of every tensor of the optimizer."""
        for name, parameter in self._named.items():
            state = self._optimizer.state.get(parameter, {})
            for slot in sorted(state):
                if is_slot(state[slot]):
                    yield name, slot, tuple(state[slot].shape), state[slot].dtype

    def gather(self, name: str, slot: str) -> Tensor:
        """The whole tensor. Collective; the result is good on rank 0."""
        return whole(self._find(name, slot).detach())

    def put(self, name: str, slot: str, value: Tensor) -> None:
        """Take this rank's part of a whole tensor. No communication."""
        target = self._find(name, slot)
        if isinstance(target, DTensor):
            value = value.to(device=target.device, dtype=target.dtype)
            # src_data_rank None: every rank holds the whole value and cuts its own part.
            shard = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(shard.to_local())
        else:
            target.copy_(value)

    def scalars(self) -> dict[str, dict[str, Any]]:
        """slot -> parameter name -> number."""
        found: dict[str, dict[str, Any]] = {}
        for name, parameter in self._named.items():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if is_scalar(value):
                    found.setdefault(slot, {})[name] = float(value)
        return found

    def put_scalar(self, name: str, slot: str, value: float) -> None:
        """Set one number of the optimizer's state."""
        put_scalar(self._optimizer.state.get(self._named[name], {}), slot, value)

    def prime(self) -> None:
        """Make the optimizer's slots exist, all zero, by a step with zero gradients and a zero rate.

        The step may still change the weights (Muon's decay, say): load them afterwards.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self._optimizer.param_groups, rates):
            group["lr"] = rate
        for state in self._optimizer.state.values():
            zero_state(state)

    def forget(self) -> None:
        """Drop the optimizer's state: as before its first step."""
        self._optimizer.state.clear()

    def _find(self, name: str, slot: str) -> Tensor:
        return self._optimizer.state[self._named[name]][slot] if slot else self._tensors[name]


class Skeleton:
    """A model's structure without weights, taken before it is sharded, to be filled for sampling."""

    def __init__(self, model: nn.Module) -> None:
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for p in model.parameters()
        }
        names = {id(empty[id(p)]): name for name, p in model.named_parameters()}
        copied: Any = copy.deepcopy(model, dict(empty))  # the memo gives the empty ones
        self._model: nn.Module = copied
        config = getattr(model, "config", None)
        if str(getattr(config, "_attn_implementation", "")).startswith("flash"):
            copied.set_attn_implementation(
                "sdpa"
            )  # the filled model is on the host, flash attention on GPUs only
        # (module, attribute, name): tied weights have several places and one name.
        self._places = [
            (module, leaf, names[id(p)])
            for module in self._model.modules()
            for leaf, p in module._parameters.items()
            if p is not None
        ]

    def fill(self, tensors: dict[str, Tensor]) -> nn.Module:
        """The model with these weights and persistent buffers, in evaluation mode."""
        weights = {
            name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items() if t.is_floating_point()
        }
        for module, leaf, name in self._places:
            module._parameters[leaf] = weights[name]
        for name, buffer in self._model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        return self._model.eval()

    def empty(self) -> None:
        """Free the weights."""
        for module, leaf, _ in self._places:
            parameter = module._parameters[leaf]
            assert parameter is not None
            module._parameters[leaf] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )


def assemble(skeleton: Skeleton | None, state: Any) -> nn.Module | None:
    """The whole model on the host of the rank that has the skeleton (rank 0); the others take part in
    gathering."""
    tensors: dict[str, Tensor] = {}
    for name, _, _ in state.weights():
        tensor = state.gather(name, "")
        if skeleton is not None:
            tensors[name] = tensor.cpu()
    return skeleton.fill(tensors) if skeleton is not None else None


def load(state: Any, layout: Callable[[], list[Any]], read: Callable[[str, str, str], Tensor | None]) -> None:
    """Load weights and slots; see ``Engine.load_state``."""
    with torch.no_grad():
        state.prime()  # first: a step, even an empty one, may touch the weights
        found = 0
        for entry in layout():
            value = read(entry.kind, entry.name, entry.slot)
            if value is not None and tuple(value.shape) != entry.shape:
                raise RequestError(
                    f"{entry.name} {entry.slot} is {tuple(value.shape)} in the checkpoint but {entry.shape} "
                    "in this model: the checkpoint is of a different model"
                )
            if value is not None:
                state.put(entry.name, entry.slot, value)
                found += entry.kind == "optim"
            elif entry.kind == "model":
                raise RequestError(f"the checkpoint has no tensor {entry.name}: it is of a different model")
        if not found:
            state.forget()


def scalars(state: Any, scaler: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's numbers, as JSON; see ``Engine.optimizer_scalars``."""
    slots = {slot: compress(values) for slot, values in state.scalars().items()}
    return {"slots": slots, **get_loss_scale(scaler, optimizer)}


def load_scalars(state: Any, scaler: Any, optimizer: Any, stored: dict[str, Any]) -> None:
    """The inverse of :func:`scalars`."""
    for slot, values in stored.get("slots", {}).items():
        for name, _, _ in state.weights():
            value = values.get(name) if isinstance(values, dict) else values
            if value is not None:
                state.put_scalar(name, slot, value)
    set_loss_scale(scaler, optimizer, stored)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all shards of a DTensor put together (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_slot(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a tensor to be stored as one."""
    return isinstance(value, Tensor) and value.ndim > 0


def is_scalar(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a number (Adam's step is a 0-dim tensor)."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def put_scalar(state: dict[str, Any], slot: str, value: float) -> None:
    """Set a number where the state has one of this name."""
    if slot in state:
        if isinstance(state[slot], Tensor):
            state[slot].fill_(value)
        else:
            state[slot] = type(state[slot])(value)


def zero_state(state: dict[str, Any]) -> None:
    """As if no step had been taken."""
    for slot, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, int | float):
            state[slot] = type(value)(0)


def clean_name(name: str) -> str:
    """A parameter's name in the user's model, without the prefixes of wrappers."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("model.")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint must hold, by name."""
    kept = set(module.state_dict(keep_vars=True))
    return {clean_name(name): b for name, b in module.named_buffers() if name in kept}


def keyed_seed(seed: int, purpose: str, key: int) -> int:
    """63 bits that depend on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer skips a step by ``found_inf``, a number on the device: torch's fused kernels
    do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def compress(values: dict[str, float]) -> float | dict[str, float]:
    """One number where all are equal (every parameter's step count is)."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


_DEEPSPEED_SCALE = ("cur_iter", "last_overflow_iter", "cur_hysteresis")


def get_loss_scale(scaler: Any, optimizer: Any) -> dict[str, Any]:
    """The state of fp16's loss scaling, torch's or DeepSpeed's, as JSON; nothing in other precisions."""
    if scaler is not None:
        return {"scaler": scaler.state_dict()}
    theirs = getattr(optimizer, "loss_scaler", None)
    if theirs is None or not getattr(theirs, "dynamic", False):
        return {}
    return {
        "scaler": {
            "scale": float(theirs.cur_scale),
            **{name: getattr(theirs, name) for name in _DEEPSPEED_SCALE},
        }
    }


def set_loss_scale(scaler: Any, optimizer: Any, scalars: dict[str, Any]) -> None:
    """The inverse; fields that one of the two kinds does not have keep their initial values."""
    stored = scalars.get("scaler")
    theirs = getattr(optimizer, "loss_scaler", None)
    if stored and scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), **stored})
    elif stored and theirs is not None and getattr(theirs, "dynamic", False):
        theirs.cur_scale = stored["scale"]
        for name in _DEEPSPEED_SCALE:
            setattr(theirs, name, stored.get(name, getattr(theirs, name)))
