"""The state of a model and its optimizer by parameter name, for one process, DDP and FSDP2.

Plain tensors are whole on every rank; of FSDP2's DTensors every rank has a shard. ZeRO keeps its state in flat buffers, for
which :class:`lmcore.engine.zero_state.ZeroState` has the same methods. Only one parameter at a time is gathered, and
only until the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lmcore.checkpoint.pieces import Box, Part
from lmcore.checkpoint.pieces import whole as whole_part
from lmcore.engine.tensor import TensorRanks
from lmcore.errors import RequestError


@functools.lru_cache(maxsize=10_000)
def _place(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Box:
    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Box(tuple(offsets), tuple(lengths))


def place_of(tensor: DTensor) -> Box:
    """The part of the whole tensor that this rank holds. Cached: torch takes 20 us, and every save needs all tensors."""
    return _place(tensor.shape, tensor.device_mesh, tensor.placements)


class TensorState:
    """The state of a model and its optimizer, read and written by parameter name.

    Args:
        named: the parameters by name, after wrapping.
        buffers: persistent buffers by name.
        ranks: under tensor parallelism, the ranks that hold parts of the same layers. Each part is then a parameter of its
            own, which FSDP2 may have sharded like any other; callers see shapes, places and values of the whole tensor.
    """

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        ranks: TensorRanks | None = None,
    ) -> None:
        self._ranks = ranks
        self._cuts = ranks.cuts if ranks is not None else {}
        self._named = named
        self._tensors: dict[str, Tensor] = {**named, **buffers}
        self._optimizer = optimizer
        self._begun_with = [own_numbers(group) for group in optimizer.param_groups]

    def weights(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, whole shape and dtype of every weight and persistent buffer."""
        for name, tensor in self._tensors.items():
            yield name, self._whole_shape(name, tensor), tensor.dtype

    def slots(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype]]:
        """Name, slot, whole shape and dtype of every tensor of the optimizer's state."""
        for name, parameter in self._named.items():
            state = self._optimizer.state.get(parameter, {})
            for slot in sorted(state):
                if is_slot(state[slot]):
                    yield name, slot, self._whole_shape(name, state[slot]), state[slot].dtype

    def _whole_shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        cut = self._cuts.get(name)
        return tuple(tensor.shape) if cut is None else cut.whole_shape(tensor.shape)

    def gather(self, name: str, slot: str) -> Tensor:
        """The whole tensor. Collective; callers may rely on the result on rank 0 only."""
        tensor = whole(self._find(name, slot).detach())
        return tensor if self._ranks is None else self._ranks.gather(name, tensor)

    def put(self, name: str, slot: str, value: Tensor) -> None:
        """Take this rank's part of a whole tensor. No communication."""
        target = self._find(name, slot)
        if (cut := self._cuts.get(name)) is not None:
            value = cut.of(value)
        if isinstance(target, DTensor):
            value = value.to(device=target.device, dtype=target.dtype)
            # src_data_rank None: every rank holds the whole value and cuts its own part.
            shard = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(shard.to_local())
        else:
            target.copy_(value)

    def held(self, name: str, slot: str) -> tuple[Part, Tensor, tuple[int, int]]:
        """This rank's part of a tensor: its place, the part itself (not a copy), and (index, count) of its holders."""
        tensor = self._find(name, slot).detach()
        part, local, holders = self._held(tensor)
        if self._ranks is not None:
            holders = self._ranks.holders(name, sharded=isinstance(tensor, DTensor))
            if (cut := self._cuts.get(name)) is not None:
                part = cut.place(part, tensor.shape)
        return part, local, holders

    def _held(self, tensor: Tensor) -> tuple[Box, Tensor, tuple[int, int]]:
        if not isinstance(tensor, DTensor):
            return whole_part(tensor.shape), tensor, self._all_ranks()
        mesh, placements = tensor.device_mesh, tensor.placements
        number, of = 0, 1
        for dimension, placement in enumerate(placements):
            if placement.is_replicate():  # HSDP's replicas
                size = mesh.size(dimension)
                number, of = number * size + mesh.get_local_rank(dimension), of * size
        return place_of(tensor), tensor.to_local(), (number, of)

    def take(self, name: str, slot: str, stored: Stored) -> None:
        """Read only this rank's part."""
        part, tensor, _ = self.held(name, slot)
        tensor.copy_(stored.read(part))

    @staticmethod
    def _all_ranks() -> tuple[int, int]:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def scalars(self) -> dict[str, dict[str, Any]]:
        """slot -> parameter name -> number; 0, the initial value, for a parameter that has had no gradient yet."""
        found: dict[str, dict[str, Any]] = {}
        for name, parameter in self._named.items():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if is_scalar(value):
                    found.setdefault(slot, {})[name] = float(value)
        trained = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._named.items():
            if id(parameter) in trained and not self._optimizer.state.get(parameter):
                for values in found.values():
                    values[name] = 0.0
        return found | self._group_numbers()

    def all_trained(self) -> bool:
        """Whether no parameter is frozen."""
        return all(parameter.requires_grad for parameter in self._named.values())

    def _group_numbers(self) -> dict[str, dict[str, Any]]:
        """Numbers that the optimizer itself has changed in its groups (Prodigy's step size, a step count), per parameter."""
        groups = self._optimizer.param_groups
        names = {id(parameter): name for name, parameter in self._named.items()}
        of_groups = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        return changed_numbers(groups, self._begun_with, of_groups)

    def put_scalar(self, name: str, slot: str, value: float) -> None:
        """Set one number of the optimizer's state; a no-op for a buffer."""
        if name not in self._named:
            return
        parameter = self._named[name]
        if slot.startswith(OF_GROUP):
            for group in self._optimizer.param_groups:
                if any(parameter is one for one in group["params"]):
                    put_numbers(group, {slot.removeprefix(OF_GROUP): value})
        else:
            put_scalar(self._optimizer.state.get(parameter, {}), slot, value)

    def prime(self) -> None:
        """Create the optimizer's slots, all zero, by a step with zero gradients and a learning rate of zero.

        The step may still change the weights, so load them afterwards.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        numbers = [own_numbers(group) for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        fill_in_momenta(self._optimizer)  # at a rewind some exist already
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for group, rate, kept in zip(self._optimizer.param_groups, rates, numbers):
            put_numbers(group, kept)
            group["lr"] = rate
        for state in self._optimizer.state.values():
            zero_state(state)

    def forget(self) -> None:
        """Drop the optimizer's state, as before its first step."""
        self._optimizer.state.clear()

    def without(self, name: str) -> None:
        """The checkpoint has no state of this parameter: zeros are as good, but for a momentum whose first is not dampened."""
        if type(self._optimizer) is torch.optim.SGD and _is_dampened(self._optimizer):
            self._optimizer.state.pop(self._named[name], None)

    def _find(self, name: str, slot: str) -> Tensor:
        return self._optimizer.state[self._named[name]][slot] if slot else self._tensors[name]


OF_GROUP = "group."
"""Prefix of the name of a number that an optimizer keeps for a whole group; it is stored for each of its parameters."""
_OF_THE_RUN = ("lr", "initial_lr", "momentum", "weight_decay", "lr_multiplier")


def own_numbers(group: dict[str, Any]) -> dict[str, int | float]:
    """The numbers in an optimizer's group, without those that the run sets in every step."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if is_scalar(value) and not isinstance(value, bool) and key not in _OF_THE_RUN
    }


def put_numbers(group: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Set numbers of an optimizer's group, in place if the group keeps them as tensors."""
    for key, value in numbers.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def changed_numbers(
    groups: list[dict[str, Any]], begun_with: list[dict[str, int | float]], names: list[list[str]]
) -> dict[str, dict[str, Any]]:
    """The group numbers that have changed in any group, per parameter; ``names`` are the parameter names of each group."""
    found: dict[str, dict[str, Any]] = {}
    now = [own_numbers(group) for group in groups]
    changed = {
        key
        for group, begun in zip(now, begun_with, strict=True)
        for key in group
        if begun.get(key) != group[key]
    }
    for group, of_group in zip(now, names, strict=True):
        # Also for groups in which it has not changed; otherwise the number of one group would be taken for all.
        for key in changed & group.keys():
            found.setdefault(f"{OF_GROUP}{key}", {}).update(dict.fromkeys(of_group, group[key]))
    return dict(sorted(found.items()))


def refuse_other_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state holds more than tensors and numbers, which a checkpoint would leave out.

    Raises:
        RequestError: it does; the message names the entry.
    """
    for key in optimizer.state:
        if not isinstance(key, Tensor):
            raise RequestError(
                f"{type(optimizer).__name__} keeps {key!r} in its state for no parameter; checkpoints hold what is kept for a "
                "parameter, so that a resumed run would begin without it. Keep a number in the groups instead"
            )
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "names")} for group in optimizer.param_groups
    ]
    for where, entries in (("the state of a parameter", optimizer.state.values()), ("a group", groups)):
        for state in entries:
            for name, value in state.items():
                if _holds_tensors(value) and (where == "a group" or not is_slot(value)):
                    raise RequestError(
                        f"{type(optimizer).__name__} keeps {name!r}, a {type(value).__name__}, in {where}; checkpoints hold "
                        "tensors and numbers by the name of a parameter, so that a resumed run would begin without it. "
                        "Keep it as tensors and numbers of their own in optimizer.state[parameter]"
                    )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | set):
        return is_slot(value)
    return any(isinstance(one, Tensor) or _holds_tensors(one) for one in value)


class Stored(Protocol):
    """A stored tensor, such as one of a checkpoint, from which any part can be read."""

    shape: tuple[int, ...]

    def read(self, part: Part | None = None) -> Tensor:
        """The elements of the part, in its shape; without ``part``, the whole tensor."""


def load(
    state: Any, layout: Callable[[], list[Any]], stored: Callable[[str, str, str], Stored | None]
) -> None:
    """Load weights and slots; see ``Engine.load_state``."""
    with torch.no_grad():
        state.prime()  # first, because even an empty step may change the weights
        found = 0
        for entry in layout():
            value = stored(entry.kind, entry.name, entry.slot)
            if value is not None and tuple(value.shape) != entry.shape:
                raise RequestError(
                    f"{entry.name} {entry.slot} is {tuple(value.shape)} in the checkpoint but {entry.shape} "
                    "in this model: the checkpoint is of a different model"
                )
            if value is not None:
                state.take(entry.name, entry.slot, value)
                found += entry.kind == "optim"
            elif entry.kind == "model":
                raise RequestError(f"the checkpoint has no tensor {entry.name}: it is of a different model")
            elif isinstance(state, TensorState):
                state.without(entry.name)
        if not found:
            state.forget()


def scalars(state: Any, scaler: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's numbers, as JSON; see ``Engine.optimizer_scalars``."""
    # With frozen parameters numbers stay separate: a parameter that is trained later must not get the step count of others.
    short = compress if state.all_trained() else dict
    slots = {slot: short(values) for slot, values in state.scalars().items()}
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
    """The tensor itself, or the gathered DTensor (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_slot(value: Any) -> bool:
    """Whether an entry of an optimizer's state is stored as a tensor, not as a number."""
    return isinstance(value, Tensor) and value.ndim > 0


def is_scalar(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a number (Adam's step is a 0-dim tensor)."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def put_scalar(state: dict[str, Any], slot: str, value: float) -> None:
    """Set a number of the state, if the state has one of this name."""
    if slot in state:
        if isinstance(state[slot], Tensor):
            state[slot].fill_(value)
        else:
            state[slot] = type(state[slot])(value)


def zero_state(state: dict[str, Any]) -> None:
    """Set a parameter's optimizer state to zero, in place, as if no step had been taken."""
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
    """The buffers that a checkpoint must hold, by name."""
    kept = set(module.state_dict(keep_vars=True))
    return {clean_name(name): b for name, b in module.named_buffers() if name in kept}


def gates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer skips a step by ``found_inf``, a flag on the device, as torch's fused kernels do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    # torch does not dampen the first momentum, so with dampening a buffer must not start at zero (fill_in_momenta).
    begins_at_zero = not _is_dampened(optimizer)
    kinds = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    return fused and begins_at_zero and type(optimizer) in kinds


def _is_dampened(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("dampening") for group in optimizer.param_groups)


def fill_in_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Create zero momentum buffers where torch's SGD would create them in its next step.

    Its fused step allocates them uninitialized, and a step that ``found_inf`` skips leaves them so. It also fails if some
    parameters have a buffer and others, whose first gradient comes later, do not.
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)


def step_with_first_momenta(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``, also of torch's SGD with dampening where some parameters have no momentum yet.

    A first momentum is not dampened, and the fused kernel knows no first one beside later ones: the plain kernel takes the
    steps in which both meet.
    """
    groups = optimizer.param_groups if type(optimizer) is torch.optim.SGD else []
    mixed = [
        group for group in groups if group["fused"] and group["dampening"] and _some_begin(optimizer, group)
    ]
    for group in mixed:
        group["fused"] = False
    try:
        optimizer.step()
    finally:
        for group in mixed:
            group["fused"] = True


def _some_begin(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the next step would make the momenta of some of the parameters, and not of all."""
    trained = [parameter for parameter in group["params"] if parameter.grad is not None]
    have = [optimizer.state[parameter].get("momentum_buffer") is not None for parameter in trained]
    return bool(group["momentum"]) and any(have) and not all(have)


def compress(values: dict[str, float]) -> float | dict[str, float]:
    """One number if all are equal, as step counts usually are."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


_DEEPSPEED_SCALE = ("cur_iter", "last_overflow_iter", "cur_hysteresis")


def get_loss_scale(scaler: Any, optimizer: Any) -> dict[str, Any]:
    """The state of fp16's loss scaling, torch's or DeepSpeed's, as JSON; empty in other precisions."""
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
    """The inverse of :func:`get_loss_scale`; fields that only the other of the two kinds has keep their initial values."""
    stored = scalars.get("scaler")
    theirs = getattr(optimizer, "loss_scaler", None)
    if stored and scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), **stored})
    elif stored and theirs is not None and getattr(theirs, "dynamic", False):
        theirs.cur_scale = stored["scale"]
        for name in _DEEPSPEED_SCALE:
            setattr(theirs, name, stored.get(name, getattr(theirs, name)))
