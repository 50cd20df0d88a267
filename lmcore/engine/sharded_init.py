"""The initial weights of a sharded model. Only rank 0 ever holds them whole, on its host.

Every rank gets its part of rank 0's values, parameter by parameter. On the other ranks the module may have been built
with empty parameters (on the meta device). Tied parameters stay tied; a rank that built a different model is refused.

    first = FirstWeights(module, keep=rank == 0)
    empty(module)                        # the structure stays
    ...                                  # shard it, by FSDP2 or by ZeRO-3
    first.give(state, device)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from lmcore.engine.state import clean_name
from lmcore.errors import RequestError


class Shape(NamedTuple):
    """Name, shape and dtype of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@final
class FirstWeights:
    """The parameters of a module before it is sharded: their shapes, and with ``keep`` their values."""

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        named = [(clean_name(name), p) for name, p in module.named_parameters()]
        self.shapes = [Shape(name, tuple(p.shape), p.dtype) for name, p in named]
        self.kind = [getattr(module, "head_path", ""), *self.shapes]
        """Must be equal on every rank."""
        self._values = {name: p.detach() for name, p in named} if keep else {}

    def check(self, all_kinds: list[list[Any]]) -> None:
        """Raise ``RequestError``, on every rank, if :attr:`kind` differs between ranks."""
        for rank, theirs in enumerate(all_kinds):
            if theirs != all_kinds[0]:
                pairs = itertools.zip_longest(all_kinds[0], theirs)
                first, other = next(pair for pair in pairs if pair[0] != pair[1])
                raise RequestError(
                    f"rank {rank} built a different model than rank 0 ({other}, not {first}): model.factory must "
                    "build the same model on every rank"
                )

    def give(self, state: Any, device: torch.device) -> None:
        """Set every rank's part from rank 0's values, parameter by parameter. Collective."""
        with torch.no_grad():
            for name, shape, dtype in self.shapes:
                value = self._values.pop(name, None)  # freed on rank 0, too
                if value is None:
                    value = torch.empty(shape, dtype=dtype, device=device)
                state.put(name, "", _of_rank_0(value.to(device)))


def empty(module: nn.Module) -> None:
    """Move every parameter of a module to the meta device, without values; buffers stay as they are."""
    replace_parameters(
        module, lambda p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    )


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> dict[int, Any]:
    """Replace every parameter by ``make(parameter)``, which is called once for a tied parameter.

    Returns the pairs (old, new) by the ``id`` of the old parameter.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = parameter, make(parameter)
                part._parameters[leaf] = made[id(parameter)][1]
    return made


def same_buffers(module: nn.Module, device: torch.device) -> None:
    """Copy rank 0's buffers to every rank, on the device. They are small, and whole on every rank. Collective."""
    for part in module.modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[leaf] = _of_rank_0(buffer.detach().to(device))


def same_on_every_rank(module: nn.Module, device: torch.device) -> None:
    """Copy rank 0's weights and buffers to every rank, on the device, as DDP does when it is created. Collective."""
    for parameter in module.parameters():
        parameter.data = _of_rank_0(parameter.data.to(device))
    same_buffers(module, device)


def _of_rank_0(value: Tensor) -> Tensor:
    value = value.contiguous()
    if dist.is_initialized() and value.numel():
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)  # bits, whatever the type
    return value


def allocate(module: nn.Module, device: torch.device) -> None:
    """Allocate the parameters on the device instead of the meta device, without values, and copy rank 0's buffers."""
    replace_parameters(
        module, lambda p: nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    )
    same_buffers(module, device)


def shard_empty(module: nn.Module, accelerator: Any, group: Any = None) -> Any:
    """Apply FSDP2 to a module on the meta device, and allocate the shards on their device, without values.

    ``group``: shard over these ranks only; default: over all ranks, or the launcher's mesh.
    """
    place = shards_live_on(accelerator.state.fsdp_plugin.cpu_offload, accelerator.device)
    same_buffers(module, accelerator.device)
    chosen = accelerator
    if group is not None:
        # The attributes that fsdp2_prepare_model reads from an accelerator, with a mesh that is not in the launcher's file.
        names = ("data",)
        mesh = DeviceMesh.from_group(group, accelerator.device.type, mesh_dim_names=names)
        chosen = SimpleNamespace(
            state=accelerator.state,
            device=accelerator.device,
            mixed_precision=accelerator.mixed_precision,
            is_main_process=accelerator.is_main_process,
            torch_device_mesh=mesh,
            parallelism_config=SimpleNamespace(fsdp_dim_names=names),
        )
    wrapped = fsdp2_prepare_model(chosen, module)
    wrapped._apply(lambda t: torch.empty_like(t, device=place) if isinstance(t, DTensor) or t.is_meta else t)
    return wrapped


def shards_live_on(policy: OffloadPolicy, device: torch.device) -> torch.device:
    """The host with offloading (the base class means none), else the device."""
    return torch.device("cpu") if isinstance(policy, CPUOffloadPolicy) else device


def partition_empty(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device
) -> None:
    """Allocate ZeRO-3's parameters and partition each at once, without values; the optimizer then refers to them.

    DeepSpeed alone would first move the whole model to every device, and partition it there."""
    from deepspeed.runtime.zero import Init  # seconds, and only this strategy needs it

    same_buffers(module, device)
    dtype = next((t for t, n in _COMPUTE.items() if (config.get(n) or {}).get("enabled")), torch.float32)
    settled = _without_auto(config)
    first: list[Any] = []

    def allocate(old: nn.Parameter) -> nn.Parameter:
        new = nn.Parameter(
            torch.zeros(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad
        )
        if first:
            first[0].convert_to_zero_parameters(param_list=[new])
        else:
            Init(module=nn.ParameterList([new]), config_dict_or_path=settled, dtype=dtype)
            first.append(new)
        return new

    made = replace_parameters(module, allocate)
    for group in optimizer.param_groups:
        group["params"] = [made[id(parameter)][1] for parameter in group["params"]]


_COMPUTE = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Remove "auto" values, which accelerate fills in later and the partitioning does not need."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }
