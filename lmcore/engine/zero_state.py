"""ZeRO's state by parameter name: reads and writes DeepSpeed's flat buffers.

DeepSpeed flattens the parameters of a group into one fp32 buffer. Every rank owns a part of it, and keeps the
optimizer's slots for that part. Its own per-parameter accessors
(``deepspeed.utils.safe_get_full_fp32_param`` and similar ones) are not usable for checkpoints; seen in 0.19.8:

- they fail before the first step, when the slots do not exist;
- under stages 1 and 2 only the first parameter group is linked to its slots
  (``_hp_optimizer_states_linked`` is one flag for all groups, set after the first);
- under stage 3 the full setters fail for sizes that the world size does not divide, and they reach neither Adam's
  ``step`` nor the low-precision copies.

So this module reads DeepSpeed's own addresses (``_hp_mapping``, ``grad_position``) and slices the buffers itself. Bits
are copied, never rounded, and only one parameter at a time is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcore.checkpoint.pieces import Part, Range, whole
from lmcore.engine.state import (
    OF_GROUP,
    Stored,
    changed_numbers,
    is_scalar,
    is_slot,
    own_numbers,
    put_numbers,
    put_scalar,
    zero_state,
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's part of one parameter: ``count`` elements from element ``start`` of the parameter, stored at ``offset``
    of ``flat``. ``count`` is 0 if this rank owns none of it."""

    flat: Tensor
    offset: int
    start: int
    count: int


class ZeroState:
    """The methods of ``TensorState`` for a DeepSpeed engine's optimizer.

    Args:
        named: the model's parameters by name (low-precision copies, or empty shells under stage 3).
        buffers: persistent buffers by name.
        zero: DeepSpeed's ZeRO optimizer (stage 1, 2, 3 or BF16_Optimizer); ``zero.optimizer`` is torch's.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], buffers: dict[str, Tensor], zero: Any, stage: int
    ) -> None:
        self._named = named
        self._buffers = buffers
        self._zero = zero
        self._stage = stage
        self._rank = dist.get_rank()
        self._pieces = {name: self._piece(p) for name, p in named.items() if p.requires_grad}
        self._begun_with = [own_numbers(group) for group in zero.optimizer.param_groups]

    # ---- the methods of TensorState ------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, whole shape and dtype of every weight and buffer; for trained parameters, of the fp32 master weights."""
        for name, parameter in self._named.items():
            trained = self._pieces.get(name)
            yield name, self._shape(parameter), parameter.dtype if trained is None else trained.flat.dtype
        for name, buffer in self._buffers.items():
            yield name, tuple(buffer.shape), buffer.dtype

    def slots(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype]]:
        """Name, slot, whole shape and dtype of every tensor of the optimizer's state."""
        for name, piece in self._pieces.items():
            state = self._state(piece.flat)
            for slot in sorted(state):
                if is_slot(state[slot]):
                    yield name, slot, self._shape(self._named[name]), state[slot].dtype

    def gather(self, name: str, slot: str) -> Tensor:
        """The whole tensor. Collective; the result is valid on rank 0 only."""
        if name in self._buffers:
            return self._buffers[name]
        parameter, piece = self._named[name], self._pieces.get(name)
        if piece is None:
            return self._gather_frozen(parameter)
        source = piece.flat if not slot else self._state(piece.flat)[slot]
        part = source.detach().narrow(0, piece.offset, piece.count)
        return self._put_together(part, piece.start, self._shape(parameter), parameter.device)

    def put(self, name: str, slot: str, value: Tensor) -> None:
        """Take this rank's part of a whole tensor. No communication."""
        if name in self._buffers:
            self._buffers[name].copy_(value)
            return
        parameter, piece = self._named[name], self._pieces.get(name)
        flat_value = value.reshape(-1)
        if piece is not None:
            target = piece.flat if not slot else self._state(piece.flat)[slot]
            part = flat_value.narrow(0, piece.start, piece.count)
            target.detach().narrow(0, piece.offset, piece.count).copy_(part)
        if not slot:
            self._put_low_precision(parameter, flat_value)

    def held(self, name: str, slot: str) -> tuple[Part, Tensor, tuple[int, int]]:
        """This rank's part of a tensor: its place, the part itself (not a copy), and (index, count) of its holders."""
        everywhere = self._rank, dist.get_world_size()
        if name in self._buffers:
            return whole(self._buffers[name].shape), self._buffers[name].detach(), everywhere
        parameter: Any = self._named[name]
        piece = self._pieces.get(name)
        if piece is not None:
            source = piece.flat if not slot else self._state(piece.flat)[slot]
            part = Range(piece.start, piece.count)
            return part, source.detach().narrow(0, piece.offset, piece.count), (0, 1)
        if self._stage != 3:
            return whole(parameter.shape), parameter.detach(), everywhere
        start, count = self._own_range(parameter)
        return Range(start, count), parameter.ds_tensor.detach().narrow(0, 0, count), (0, 1)

    def take(self, name: str, slot: str, stored: Stored) -> None:
        """Read this rank's part. Under stages 1 and 2 also read whole weights, which every rank keeps for the forward."""
        if name in self._buffers:
            self._buffers[name].copy_(stored.read())
            return
        part, tensor, _ = self.held(name, slot)
        if name in self._pieces:
            tensor.copy_(stored.read(part).view(-1))
        if slot:
            return
        parameter: Any = self._named[name]
        if self._stage != 3 or parameter.numel() == parameter.ds_numel:  # small ones stay gathered
            parameter.detach().view(-1).copy_(stored.read().reshape(-1))
        if self._stage == 3:
            start, count = self._own_range(parameter)
            parameter.ds_tensor.detach().narrow(0, 0, count).copy_(stored.read(Range(start, count)))

    def scalars(self) -> dict[str, dict[str, Any]]:
        """slot -> parameter name -> number; a parameter has the numbers of the flat buffer that contains it."""
        found: dict[str, dict[str, Any]] = {}
        for name, piece in self._pieces.items():
            for slot, value in self._state(piece.flat).items():
                if is_scalar(value):
                    found.setdefault(slot, {})[name] = float(value)
        return found | changed_numbers(
            self._zero.optimizer.param_groups, self._begun_with, self._names_of_groups()
        )

    def all_trained(self) -> bool:
        """Whether no parameter is frozen."""
        return len(self._pieces) == len(self._named)

    def _names_of_groups(self) -> list[list[str]]:
        of_flats = {id(flat): index for index, flats in self._flats_of_groups().items() for flat in flats}
        names: list[list[str]] = [[] for _ in self._zero.optimizer.param_groups]
        for name, piece in self._pieces.items():
            names[of_flats[id(piece.flat)]].append(name)
        return names

    def put_scalar(self, name: str, slot: str, value: float) -> None:
        """Set one number of the optimizer's state."""
        if name in self._pieces and slot.startswith(OF_GROUP):
            groups = zip(self._zero.optimizer.param_groups, self._names_of_groups(), strict=True)
            for group in (group for group, names in groups if name in names):
                put_numbers(group, {slot.removeprefix(OF_GROUP): value})
        elif name in self._pieces:
            put_scalar(self._state(self._pieces[name].flat), slot, value)

    def prime(self) -> None:
        """Create the optimizer's slots, all zero, by a step with zero gradients and a learning rate of zero."""
        torch_optimizer = self._zero.optimizer
        groups = torch_optimizer.param_groups
        kept = [(group["params"], group["lr"], own_numbers(group)) for group in groups]
        for index, flats in self._flats_of_groups().items():
            groups[index]["params"] = flats
            groups[index]["lr"] = groups[index]["lr"] * 0.0
        gradients = {id(flat): flat.grad for flats in self._flats_of_groups().values() for flat in flats}
        for flats in self._flats_of_groups().values():
            for flat in flats:
                flat.grad = torch.zeros_like(flat)
        torch_optimizer.step()
        for flats in self._flats_of_groups().values():
            for flat in flats:
                flat.grad = gradients[id(flat)]
                zero_state(torch_optimizer.state[flat])
        for group, (parameters, rate, numbers) in zip(groups, kept):
            put_numbers(group, numbers)
            group["params"], group["lr"] = parameters, rate

    def forget(self) -> None:
        """Drop the optimizer's state, as before its first step."""
        self._zero.optimizer.state.clear()

    # ---- DeepSpeed's buffers -------------------------------------------------------------------------------

    def _state(self, flat: Tensor) -> dict[str, Any]:
        return self._zero.optimizer.state.get(flat, {})

    def _flat_list(self) -> list[Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if hasattr(self._zero, "single_partition_of_fp32_groups"):
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_groups_flat_partition  # BF16_Optimizer: stage 1 with fp32 accumulation

    def _flats_of_groups(self) -> dict[int, list[Tensor]]:
        flats = self._flat_list()
        if self._stage != 3:
            return {index: [flat] for index, flat in enumerate(flats)}
        groups: dict[int, list[Tensor]] = {}
        for index, flat in enumerate(flats):
            groups.setdefault(self._zero.sub_group_to_group_id[index], []).append(flat)
        return groups

    def _piece(self, parameter: Any) -> Piece:
        if self._stage == 3:
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(self._rank * size, parameter.ds_numel)  # the last ranks' parts may be padding only
            count = min(size, parameter.ds_numel - start)
            return Piece(flat=self._flat_list()[group], offset=offset, start=start, count=count)
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank has none of it: the buffer of its group gives dtype and slots
            return Piece(flat=self._flat_list()[self._group_of(parameter)], offset=0, start=0, count=0)
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = self._flat_list()[mapping.param_group_index]
        return Piece(flat=flat, offset=high.start, start=low.start, count=low.numel)

    def _group_of(self, parameter: nn.Parameter) -> int:
        groups = getattr(self._zero, "bit16_groups", None) or self._zero.bf16_groups
        return next(i for i, group in enumerate(groups) if any(p is parameter for p in group))

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape if self._stage == 3 else parameter.shape)

    def _put_together(self, part: Tensor, start: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        # Reduce bytes, because neither gloo nor NCCL supports every dtype (such as 16-bit integers). Parts do not overlap,
        # so that the sum of the bytes is the whole tensor.
        width = part.element_size()
        buffer = torch.zeros(torch.Size(shape).numel() * width, dtype=torch.uint8, device=device)
        buffer.narrow(0, start * width, part.numel() * width).copy_(part.contiguous().view(torch.uint8))
        dist.reduce(buffer, dst=0)
        return buffer.view(part.dtype).view(shape)

    def _gather_frozen(self, parameter: Any) -> Tensor:
        if self._stage != 3:
            return parameter.detach()
        start, count = self._own_range(parameter)
        part = parameter.ds_tensor.detach().narrow(0, 0, count)
        device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else part.device
        )
        return self._put_together(part.to(device), start, self._shape(parameter), device)

    def _own_range(self, parameter: Any) -> tuple[int, int]:
        """Stage 3: where this rank's part of a parameter begins, and its number of elements without padding."""
        size = parameter.ds_tensor.ds_numel
        start = min(self._rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _put_low_precision(self, parameter: Any, flat_value: Tensor) -> None:
        """Set the low-precision copy that the forward pass reads; a step refreshes it, and so must a load."""
        if self._stage != 3:
            parameter.detach().view(-1).copy_(flat_value)
            return
        start, count = self._own_range(parameter)
        parameter.ds_tensor.detach().narrow(0, 0, count).copy_(flat_value.narrow(0, start, count))
        if parameter.numel() == parameter.ds_numel:  # small ones stay gathered
            parameter.detach().view(-1).copy_(flat_value)
