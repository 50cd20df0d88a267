"""Optimizers: build a torch optimizer from named parameters.

Every trained parameter is in exactly one group, and each group carries the ``names`` of its parameters in the
order of its ``params``, so that state is addressed by parameter name. The learning rate is a function of
the step (:mod:`lmcore.model.schedules`); each group multiplies it by its own ``lr_multiplier``.

Weight decay follows the GPT-2 replications (nanoGPT's ``configure_optimizers``, llm.c): it applies to parameters with two
or more dimensions, including embeddings. It does not apply to biases and norms, whatever their shape (GPT-OSS keeps the
biases of all experts as one matrix, Cohere the norms of all heads), nor to the decay rates of state-space layers (Mamba).

Example::

    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, freeze=["transformer.wpe"])
    optimizer = build_optimizer("adamw", groups, lr=6e-4)
    set_learning_rate(optimizer, 3e-4)
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.conventions import OPTIMIZERS
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of
from lmcore.model.products import multiplies_bf16
from lmcore.plugins import import_path

KINDS = ("matrices", "embedding", "head", "vectors")
"""Kinds of parameters that can have a learning rate of their own: the weights inside the network; the embeddings
of tokens and positions (a head that is tied to them included); the vocabulary head; biases, norms, and the decay
rates of state-space layers."""

_STATE_SPACE = frozenset(("A_log", "dt_bias"))
"""Logarithms of the rates at which the state of a channel decays: (channels, states) in Mamba, whose authors exclude them
from weight decay. They are not a matrix that multiplies activations."""
_BIAS_OR_NORM = re.compile(r"(?:bias|norm(?:_?\d+)?)$")
"""The end of the name of a bias or norm, or of the module that owns it (a table of relative positions is also a bias)."""

MUON_STEPS = 5
"""Newton-Schulz iterations of an update, as in torch.optim.Muon."""
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al. 2024): the steepest at zero whose results still lie between 0.7 and 1.2."""
MUON_BATCH_ELEMENTS = 2**26
"""Elements of the matrices of one shape that are orthogonalized at once: 128 MiB in bfloat16, twice that in float32; three
buffers."""
MUON_CPU_BATCH_ELEMENTS = 2**20
"""The same on a CPU, where the cache is the limit. Time of one update of all matrices on one thread, torch.optim.Muon and
this: 6.6 and 1.8 ms (4 layers of width 64), 51 and 46 ms (8 of 192), 190 and 204 ms (8 of 320)."""


# ------------------------------------------------------------------------------------------------- parameters


def choose_trained(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    train_only: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> list[str]:
    """Freeze parameters by name. Returns the names of those that are trained.

    A pattern is a shell pattern over the whole name (``*.ln_?.*``), or the name of a module, which means all of
    its parameters (``transformer.h.0``). A parameter is trained if ``train_only`` matches it (default: everything)
    and ``freeze`` does not. A parameter that is already frozen stays frozen. Call this before the model is wrapped
    for distributed training.

    Raises:
        RequestError: a pattern matches nothing (the message gives the nearest name), or nothing is left to train.
    """
    named = list(named_parameters)
    for option, patterns in (("optim.train_only", train_only), ("optim.freeze", freeze)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name, _ in named):
                raise RequestError(f"{option} {pattern!r} matches no parameter{_nearest(pattern, named)}")
    trained = []
    for name, parameter in named:
        wanted = not train_only or any(_matches(name, pattern) for pattern in train_only)
        if not wanted or any(_matches(name, pattern) for pattern in freeze):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            trained.append(name)
    if not trained:
        raise RequestError("optim.train_only and optim.freeze leave no parameter to train")
    return trained


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _nearest(pattern: str, named: Iterable[tuple[str, Any]]) -> str:
    names = [name for name, _ in named]
    modules = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    return did_you_mean(pattern, [*names, *sorted(modules)], cutoff=0.3)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    train_only: Sequence[str] = (),
    freeze: Sequence[str] = (),
    vocabulary: Collection[str] = (),
    head: Collection[str] = (),
    lr_multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups ``{"params", "names", "weight_decay", "decays", "hidden", "lr_multiplier"}`` of the trained parameters.

    ``hidden`` marks the two-dimensional matrices inside the network, which Muon updates; embeddings and heads are
    not among them. Kinds with equal settings share a group; empty groups are left out.

    Args:
        vocabulary: names of the embedding and the head, as :func:`lmcore.model.module.vocabulary_parameters`
            returns them; other embeddings (positions) are recognized by the usual names.
        head: names of the parameters of a head that is not tied to the embedding.
        lr_multipliers: by kind (:data:`KINDS`); 1 for kinds that are not given.
    """
    named = list(named_parameters)
    trained = set(choose_trained(named, train_only=train_only, freeze=freeze))
    multipliers = dict.fromkeys(KINDS, 1.0) | dict(lr_multipliers or {})
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for is_hidden, decays in ((True, True), (False, True), (False, False)):
        for name, parameter in named:
            kind = parameter_kind(name, parameter, vocabulary=vocabulary, head=head)
            placed = (kind == "matrices" and parameter.ndim == 2, kind != "vectors")
            if name not in trained or placed != (is_hidden, decays):
                continue
            decay = weight_decay if decays else 0.0
            group = groups.setdefault(
                (is_hidden, decay, multipliers[kind]),
                {
                    "params": [],
                    "names": [],
                    "weight_decay": decay,
                    "decays": decay > 0,
                    "hidden": is_hidden,
                    "lr_multiplier": multipliers[kind],
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def parameter_kind(
    name: str, parameter: nn.Parameter, *, vocabulary: Collection[str] = (), head: Collection[str] = ()
) -> str:
    """The kind of a parameter, one of :data:`KINDS`."""
    module = name.rsplit(".", 2)[-2] if "." in name else name
    leaf = name.rpartition(".")[2]
    if parameter.ndim < 2 or leaf in _STATE_SPACE:
        return "vectors"
    if _BIAS_OR_NORM.search((module if leaf == "weight" else leaf).lower()):
        return "vectors"
    if parameter.ndim > 2 and sum(size > 1 for size in parameter.shape) < 2:
        return "vectors"  # (1, 1, D): RWKV's mixing of tokens
    if name in head or (not vocabulary and module in ("lm_head", "output", "score")):
        return "head"
    if name in vocabulary or "embed" in module or module in ("wte", "wpe"):
        return "embedding"
    return "matrices"


# ------------------------------------------------------------------------------------------------- optimizers


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    fused: bool | None = None,
    cautious_weight_decay: bool = False,
    **config: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer ``name``: one of ``OPTIMIZERS`` (case-insensitive), or an import path ``package.module:Class``.

    Args:
        groups: from :func:`parameter_groups`; their ``weight_decay`` and ``lr_multiplier`` are used.
        lr: peak rate; :func:`set_learning_rate` sets the rate of each step.
        betas, eps: for adamw and adam (and the AdamW half of muon).
        momentum: for sgd and muon.
        fused: use one kernel for all parameters; default: wherever torch has one (adamw, adam, sgd). Such a kernel
            also accepts ``optimizer.found_inf`` (see torch.amp), a flag on the device that skips an update
            without waiting for the host.
        cautious_weight_decay: for muon's matrices, see :class:`MuonWithAdamW`.
        config: further arguments of the optimizer's class (``amsgrad``, ``beta2_decay``, ...).

    A class given by import path is called with ``groups``, ``lr``, those other arguments that its signature names, and, if
    it has ``**kwargs``, those whose value is not the default.

    Raises:
        RequestError: no such optimizer, or it does not accept an argument or its value.
    """
    adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "fused": fused is None or fused} | config
    sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "fused": fused is None or fused} | config
    muon: dict[str, Any] = adam | {"momentum": momentum, "cautious_weight_decay": cautious_weight_decay}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, **adam),
        "adam": lambda: torch.optim.Adam(groups, **adam),
        "sgd": lambda: torch.optim.SGD(groups, **sgd),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=lr, **config),
        "muon": lambda: MuonWithAdamW(groups, **muon),
    }
    make = makers.get(name.lower())
    if make is None and ":" in name:
        offered = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused}
        make = functools.partial(_by_path, name, groups, offered, config)
    if make is None:
        raise RequestError(
            f"unknown optim.name {name!r}; choose from {', '.join(OPTIMIZERS)}, or give package.module:Class"
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    if cautious_weight_decay and name.lower() != "muon":
        raise RequestError(f"optim.cautious_weight_decay is for optim.name muon, not for {name}")
    try:
        optimizer = make()
    # The class has no such argument, its value is out of range, or it does not go with fused.
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"optim.name {name}, optim.config: {message_of(error)}") from error
    set_learning_rate(optimizer, lr)
    return optimizer


def _by_path(
    path: str, groups: list[dict[str, Any]], offered: Mapping[str, Any], config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    factory = import_path(path, "optim.name")
    named, takes_any = _arguments(path)
    defaults = build_optimizer.__kwdefaults__ or {}
    arguments = {
        k: v
        for k, v in offered.items()
        if k == "lr" or (v is not None and (k in named or (takes_any and v != defaults[k])))
    }
    optimizer = factory(groups, **(arguments | dict(config)))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RequestError(f"optim.name {path!r} made a {type(optimizer).__name__}, not a torch Optimizer")
    return optimizer


def _arguments(path: str) -> tuple[Collection[str], bool]:
    """The names of the arguments of the class at an import path, and whether it has ``**kwargs``."""
    try:
        parameters = inspect.signature(import_path(path, "optim.name")).parameters
    except ValueError:  # written in C
        return (), False
    return parameters, any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def takes_option(path: str, option: str) -> bool:
    """Whether a non-default value of ``option`` is passed to the class at an import path."""
    named, takes_any = _arguments(path)
    return takes_any or option in named


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of every group to ``lr`` times its ``lr_multiplier``, in place if the group keeps it as a tensor."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_multiplier", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def set_momentum(optimizer: Any, momentum: float) -> None:
    """Set the momentum of the groups that have one (sgd, muon's matrices)."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum


def set_weight_decay(optimizer: Any, weight_decay: float) -> None:
    """Set the weight decay of the groups that decay (see :func:`parameter_groups`)."""
    for group in optimizer.param_groups:
        if group.get("decays"):
            group["weight_decay"] = weight_decay


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the ``hidden`` groups and torch's AdamW for the others, as one optimizer.

    Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, so that all directions
    are learned at the same speed. The update has the root mean square of an AdamW update (0.2; Liu et al. 2025, arXiv
    2502.16982), so that one learning rate serves both halves. It is the update of ``torch.optim.Muon`` with
    ``adjust_lr_fn="match_rms_adamw"``; matrices of one shape are orthogonalized together, in one batch.

    Args:
        groups: from :func:`parameter_groups`.
        momentum: Nesterov momentum of the matrices.
        cautious_weight_decay: apply weight decay only to those weights of the matrices that the update also makes
            smaller (Chen et al. 2025, arXiv 2510.12402).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        fused: bool,
        cautious_weight_decay: bool = False,
    ) -> None:
        self._cautious = cautious_weight_decay
        hidden = [{**group, "lr": lr, "momentum": momentum} for group in groups if group["hidden"]]
        other = [group for group in groups if not group["hidden"]]
        self._adamw = torch.optim.AdamW(other, lr=lr, betas=betas, eps=eps, fused=fused) if other else None
        groups_of_adamw = self._adamw.param_groups if self._adamw else []
        super().__init__([*hidden, *groups_of_adamw], {"lr": lr})
        self._share()

    def _share(self) -> None:
        # Share the group dictionaries and the state, so that code that saves, loads or shards sees one optimizer.
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not group["hidden"]]
            self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict ends here, with new groups and a new mapping
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of both halves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["hidden"]:
                self._update_matrices(group)
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not matrices:
            return
        gradients = [parameter.grad for parameter in matrices]
        for parameter in matrices:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        averages = [self.state[parameter]["momentum_buffer"] for parameter in matrices]
        momentum, rate = group["momentum"], float(group["lr"])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        wanted = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov: one step ahead
        for batch in _by_shape(matrices):
            updates = _orthogonalized([wanted[index] for index in batch])
            parameters = [matrices[index] for index in batch]
            if self._cautious:
                for parameter, update in zip(parameters, updates):
                    shrinks = (update * parameter) > 0
                    parameter.sub_(parameter * shrinks, alpha=rate * group["weight_decay"])
            else:
                torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-rate * 0.2 * math.sqrt(max(parameters[0].shape)))


def _by_shape(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices in batches of equal shape (or its transpose), each of at most ``MUON_BATCH_ELEMENTS`` elements.

    On a CPU the limit is ``MUON_CPU_BATCH_ELEMENTS``."""
    most = MUON_CPU_BATCH_ELEMENTS if matrices[0].device.type == "cpu" else MUON_BATCH_ELEMENTS
    batches: list[list[int]] = []
    current: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        shape = tuple(sorted(matrix.shape))
        batch = current.get(shape)
        if batch is None or (len(batch) + 1) * matrix.numel() > most:
            batch = current[shape] = []
            batches.append(batch)
        batch.append(index)
    return batches


def _orthogonalized(matrices: list[Any]) -> list[Any]:
    """Apply :func:`orthogonalize` to matrices of one shape, (a, b) or (b, a) with a <= b; sharded ones are gathered.

    In bfloat16 where the device multiplies it in hardware, else in float32: on a CPU with AVX2, which emulates bfloat16, an update
    of six layers of width 192 took 6.5 s instead of 0.31 s (docs/log.md, 2026-12-01).
    """
    whole = [m.full_tensor() if hasattr(m, "full_tensor") else m for m in matrices]
    wide = [m if m.shape[0] <= m.shape[1] else m.mT for m in whole]
    dtype = torch.bfloat16 if multiplies_bf16(wide[0].device) else torch.float32
    batch = wide[0].new_empty(len(wide), *wide[0].shape, dtype=dtype)
    torch._foreach_copy_(list(batch.unbind()), wide)  # one launch, which rounds as well
    made = orthogonalize(batch).to(whole[0].dtype)
    results: list[Any] = []
    for one, full, update in zip(matrices, whole, made.unbind()):
        update = update if full.shape[0] <= full.shape[1] else update.mT
        if one is not full:  # a DTensor: cut this rank's shard out again, without communication
            from torch.distributed.tensor import distribute_tensor

            update = distribute_tensor(
                update.contiguous(), one.device_mesh, one.placements, src_data_rank=None
            )
        results.append(update)
    return results


def orthogonalize(matrices: Tensor, *, steps: int = MUON_STEPS) -> Tensor:
    """Replace the singular values of each matrix by numbers near 1 (between about 0.7 and 1.2).

    Newton-Schulz iteration, as in ``torch.optim.Muon``, for a batch.

    Args:
        matrices: (N, a, b) with a <= b; the products run in their dtype (bfloat16 is exact enough).

    Returns:
        (N, a, b), the same dtype.
    """
    a, b, c = MUON_COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the largest is at most 1
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
