"""Tensor parallelism: the ranks of a group hold parts of the same linear layers, and compute the same blocks together.

Pairs of linear layers are cut as in Megatron-LM (arXiv 1909.08053, section 3): the first by its outputs (columns of W^T),
the second by its inputs (rows), so that the outputs of the second layer's parts add up to the whole output.
transformers' own plan for the family says which layers are cut; everything else, including the vocabulary head, is whole
on every rank. Parts are plain tensors, so that DDP, FSDP2 and fused optimizers work on them as on any other parameter.

Letters: t ranks of a group, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmcore.checkpoint.pieces import Box
from lmcore.engine.draws import RankDraws, drops
from lmcore.engine.zero import is_elementwise
from lmcore.errors import RequestError
from lmcore.model.build import random_weights

COLUMNS, ROWS, PARTIAL = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""The supported kinds in a plan of transformers: cut by outputs, cut by inputs, or whole with a gradient that is summed over
the ranks (a norm per head, which sees only the heads of its rank)."""
Sum = Callable[[Tensor], Tensor]


class Cut(NamedTuple):
    """How a tensor is cut over the ranks of a group, and which part this rank has."""

    dimension: int
    rank: int
    size: int

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, a view."""
        length = whole.shape[self.dimension] // self.size
        return whole.narrow(self.dimension, self.rank * length, length)

    def whole_shape(self, part: Iterable[int]) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of a part."""
        return tuple(n * self.size if d == self.dimension else n for d, n in enumerate(part))

    def place(self, box: Box, part: Iterable[int]) -> Box:
        """Translate a box inside this rank's part to the whole tensor. ``part`` is the shape of the part."""
        lengths = tuple(part)
        offsets = tuple(
            o + self.rank * n if d == self.dimension else o
            for d, (o, n) in enumerate(zip(box.offsets, lengths, strict=True))
        )
        return Box(offsets, box.lengths)


# ---- what can be cut ---------------------------------------------------------------------------------------


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that needs whole matrices (``RequestError``)."""
    if not is_elementwise(optimizer):
        raise RequestError(
            f"{type(optimizer).__name__} needs whole matrices, of which each rank has a part under "
            "train.tensor_parallel: use adamw, adam or sgd (an elementwise optimizer of your own has an attribute "
            "elementwise = True)"
        )


def plan_of(model: Any) -> dict[str, str]:
    """transformers' plan for the modules and parameters in the layers of this model: name -> kind."""
    rules = {rule: kind for rule, kind in (getattr(model, "tp_plan", None) or {}).items() if "*" in rule}
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    found = ((name, rules.get(re.sub(r"\d+", "*", name))) for name in dict.fromkeys(names))
    return {name: kind for name, kind in found if kind is not None}


def why_not(model: Any, size: int) -> str | None:
    """Why the layers of a model cannot be cut over ``size`` ranks; ``None`` if they can.

    This assumes that the plan is correct; :func:`why_not_equal` tests it.
    """
    plan, name = plan_of(model), model.__class__.__name__
    if not plan:
        return f"transformers has no tensor-parallel plan for {name}"
    for path, kind in plan.items():
        if kind not in (COLUMNS, ROWS, PARTIAL):
            return f"the plan of {name} cuts {path} by {kind!r}; {COLUMNS}, {ROWS} and {PARTIAL} are known"
        module = model.get_submodule(path)
        if kind == PARTIAL:
            continue
        if type(module) is not nn.Linear:
            return f"{path} is a {type(module).__name__}, not a plain linear layer"
        length = module.out_features if kind == COLUMNS else module.in_features
        if length % size:
            return f"{path} has {length} {'outputs' if kind == COLUMNS else 'inputs'}, which {size} does not divide"
    config = model.config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % size:
            return f"its {heads} heads ({field}) are not a multiple of {size}"
    return None


def why_not_equal(model: Any, size: int) -> str | None:
    """Why the outputs of the parts of a model's layers do not add up to the whole output; ``None`` if they do.

    Tested on four tokens: for each kind of module with cut children (attention, MLP), its output must be the sum of the
    outputs of all ranks' parts for the same input. Empty weights are replaced by random ones.
    """
    plan = plan_of(model)
    parents: dict[str, str] = {}  # the first module of each kind
    for path in plan:
        parent = path.rpartition(".")[0]
        parents.setdefault(re.sub(r"\d+", "*", parent), parent)
    seen: dict[str, tuple[Any, Any, Tensor]] = {}

    def keep(parent: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[parent] = args, kwargs, _first(output)

    training = model.training
    hooks = [
        model.get_submodule(parent).register_forward_hook(partial(keep, parent), with_kwargs=True)
        for parent in parents.values()
    ]
    try:
        with torch.no_grad(), random_weights(list(model.base_model.modules()), zeros=True):
            model.eval()
            model.base_model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False)
            for parent, (args, kwargs, expected) in seen.items():
                children = {
                    path.removeprefix(f"{parent}."): kind
                    for path, kind in plan.items()
                    if path.rpartition(".")[0] == parent
                }
                found = torch.zeros_like(expected)
                for rank in range(size):
                    part = copy.deepcopy(model.get_submodule(parent))
                    part._forward_hooks.clear()
                    _cut_children(part, children, rank, size, bias=rank == 0)
                    found += _first(part(*args, **kwargs))
                # The tolerance is relative to the outputs, which are small because random weights are.
                if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                    return f"the parts of {parent} do not add up to the whole"
    except Exception as error:  # a family may require other arguments, and raise any error
        return f"{model.__class__.__name__} could not be tried ({error.__class__.__name__})"
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return None


def refuse(size: int, reason: str | None) -> None:
    """Raise ``RequestError`` if there is a reason why layers cannot be cut."""
    if reason is not None:
        raise RequestError(f"train.tensor_parallel {size} is not available for this model: {reason}")


def why_not_compiled(model: Any) -> str | None:
    """Why layers that are cut cannot be compiled; ``None`` if they can."""
    if not drops(model):
        return None
    # A compiled graph cannot contain a change of the generator's state.
    return "the model has dropout, for which train.tensor_parallel changes the random state in every layer"


def refuse_to_compile(asked: bool | str, reason: str | None) -> None:
    """Raise ``RequestError`` if ``train.compile`` is true and there is a reason against it."""
    if asked is True and reason is not None:
        raise RequestError(f"train.compile true: {reason}; set its dropout to 0, or leave train.compile out")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cut_children(part: nn.Module, children: Mapping[str, str], rank: int, size: int, *, bias: bool) -> None:
    for leaf, kind in children.items():
        if kind == PARTIAL:
            continue
        linear = _cut_linear(part.get_submodule(leaf), kind, rank, size, _same)
        if kind == ROWS and not bias:  # the bias must be added only once
            linear.bias = None
        setattr(part, leaf, linear)


# ---- the layers --------------------------------------------------------------------------------------------


class ColumnLinear(nn.Linear):
    """The part of a linear layer that computes some of its outputs: (..., I) to (..., O / t)."""

    sum_over_ranks: Sum
    draws: RankDraws | None

    def forward(self, input: Tensor) -> Tensor:
        """Every rank has the same input; the input's gradient is summed over the ranks."""
        if self.draws is not None and self.training:
            self.draws.enter()
        return F.linear(_SumOfGradients.apply(input, self.sum_over_ranks), self.weight, self.bias)


class RowLinear(nn.Linear):
    """The part of a linear layer that sees some of its inputs: (..., I / t) to (..., O), the same on every rank."""

    sum_over_ranks: Sum
    draws: RankDraws | None

    def forward(self, input: Tensor) -> Tensor:
        """The bias, which is whole on every rank, is added once, after the sum over the ranks."""
        if self.draws is not None and self.training:
            self.draws.leave()
        output = _SumOfValues.apply(F.linear(input, self.weight), self.sum_over_ranks)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _SumOfGradients(torch.autograd.Function):
    """The identity in forward; sums the gradient over the ranks in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Sum) -> Tensor:
        ctx.total = total
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.total(gradients[0].contiguous()), None


class _SumOfValues(torch.autograd.Function):
    """The sum over the ranks in forward; the identity in backward, because every rank already has the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Sum) -> Tensor:
        return total(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _cut_linear(
    linear: Any, kind: str, rank: int, size: int, total: Sum, draws: RankDraws | None = None
) -> Any:
    """This rank's part of a linear layer; empty (meta) if the layer is."""
    new: Any = (ColumnLinear if kind == COLUMNS else RowLinear)(1, 1, bias=False, device="meta")
    outputs = linear.out_features // (size if kind == COLUMNS else 1)
    inputs = linear.in_features // (size if kind == ROWS else 1)
    new.in_features, new.out_features, new.sum_over_ranks, new.draws = inputs, outputs, total, draws

    def part(parameter: nn.Parameter, cut: Cut | None) -> nn.Parameter:
        value = parameter.detach() if cut is None else cut.of(parameter.detach()).contiguous()
        return nn.Parameter(value, requires_grad=parameter.requires_grad)

    new.weight = part(linear.weight, Cut(0 if kind == COLUMNS else 1, rank, size))
    if linear.bias is not None:
        new.bias = part(linear.bias, Cut(0, rank, size) if kind == COLUMNS else None)
    return new.train(linear.training)


def cut_layers(
    model: Any, rank: int, size: int, total: Sum, draws: RankDraws | None = None
) -> tuple[dict[str, Cut], set[str]]:
    """Replace the layers of a model by one rank's parts of them, in place.

    Args:
        total: sums a tensor over the ranks of the group and returns a new one.
        draws: the rank's own random numbers between the cuts, if the model has dropout.

    Returns:
        The cut of each parameter that is cut, and the names of the parameters whose gradients must be summed over the ranks.
    """
    cuts: dict[str, Cut] = {}
    partial_sums: set[str] = set()
    for path, kind in plan_of(model).items():
        module = model.get_submodule(path)
        if kind == PARTIAL:
            partial_sums |= {f"{path}.{name}" for name, _ in module.named_parameters()}
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _cut_linear(module, kind, rank, size, total, draws))
        cuts[f"{path}.weight"] = Cut(0 if kind == COLUMNS else 1, rank, size)
        if kind == COLUMNS and module.bias is not None:
            cuts[f"{path}.bias"] = Cut(0, rank, size)
    return cuts, partial_sums


def part_for_plan(model: Any, size: int) -> None:
    """Replace the layers by the first rank's parts, for a memory plan; sums over ranks are replaced by copies."""
    cut_layers(model, 0, size, torch.clone)


def _same(x: Tensor) -> Tensor:
    return x


def _sum_in(group: Any, x: Tensor) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x, "sum", group))


# ---- the ranks ---------------------------------------------------------------------------------------------


@final
class TensorRanks:
    """The ranks that hold parts of the same layers, and those that hold the same parts. Creating it is collective.

    Consecutive ranks hold parts of the same layers, so that they are on one node.

    Attributes:
        rank, size: rank in, and size of, the group that holds parts of the same layers.
        group, data_group: the process group of that group, and the one of the ranks that hold the same parts.
        data_rank, data_size: rank in, and size of, ``data_group``.
        cuts: how each parameter is cut, by name, once :meth:`cut` was called.
    """

    def __init__(self, rank: int, size: int, world_size: int, timeout: timedelta) -> None:
        self.data_rank, self.rank = divmod(rank, size)
        self.size, self.data_size = size, world_size // size
        every = range(world_size)
        groups = [dist.new_group(list(every[i : i + size]), timeout=timeout) for i in every[::size]]
        same = [dist.new_group(list(every[i::size]), timeout=timeout) for i in range(size)]
        self.group: Any = groups[self.data_rank]
        self.data_group: Any = same[self.rank]
        self.cuts: dict[str, Cut] = {}
        self._partial_sums: set[str] = set()

    def cut(self, model: nn.Module, device: torch.device) -> None:
        """Replace the layers of a model by this rank's parts, in place; ``device`` is where they compute."""
        total = partial(_sum_in, self.group.group_name)
        draws = RankDraws(self.rank, device) if drops(model) else None
        self.cuts, self._partial_sums = cut_layers(model, self.rank, self.size, total, draws)

    def holders(self, name: str, *, sharded: bool) -> tuple[int, int]:
        """(index, count): which of the ranks that hold the same elements of a tensor this one is, and how many there are."""
        if name in self.cuts:
            return (0, 1) if sharded else (self.data_rank, self.data_size)
        if sharded:
            return self.rank, self.size
        return self.data_rank * self.size + self.rank, self.data_size * self.size

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor, from every rank's part. Collective."""
        cut = self.cuts.get(name)
        if cut is None:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts, dim=cut.dimension)

    @torch.no_grad()
    def settle(self, gradients: Mapping[str, Tensor]) -> None:
        """Make the gradients of parameters that are whole on every rank equal on all ranks, in place. Collective.

        The gradient of a norm per head covers only the heads of its rank, so it is summed. All others are equal already,
        except for kernels that add in arbitrary order (an embedding's on a GPU); they are averaged, because otherwise the
        weights would silently drift apart.
        """
        for name, gradient in gradients.items():
            if name not in self.cuts:
                local = _local(gradient)
                if name not in self._partial_sums:
                    local.div_(self.size)
                dist.all_reduce(local, group=self.group)

    @torch.no_grad()
    def total_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of the gradient of all parameters, 0-dim fp32, the same on every rank. Collective.

        The squares of each rank's elements are summed over all ranks that hold different elements. Parameters that are whole
        on the t ranks of a group are counted by each of them, so their part is divided by t.
        """
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        sharded = False
        for name, gradient in gradients.items():
            sharded = sharded or isinstance(gradient, DTensor)
            parts[name not in self.cuts].append(_local(gradient))
        cut, whole = (nn.utils.get_total_norm(part).float().square() for part in parts)
        total = (cut + whole / self.size).reshape(1)
        # FSDP2 also shards over the data ranks; otherwise those hold the same gradients.
        dist.all_reduce(total, group=None if sharded else self.group)
        return total[0].sqrt()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
