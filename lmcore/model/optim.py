"""Optimizers and schedules: named parameters in, a torch optimizer out; a step in, a learning rate out.

What always holds: every trained parameter is in exactly one group, and each group carries the ``names`` of
its parameters in the order of its ``params``, so that state is addressed by parameter name; a schedule is a
pure function of the step, so that a resumed run needs no scheduler state.

Weight decay follows the GPT-2 replications (nanoGPT's ``configure_optimizers``, llm.c): parameters with two
or more dimensions decay, embeddings among them; biases and norms do not.

Example::

    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, freeze=["transformer.wpe"])
    optimizer = build("adamw", groups, lr=6e-4)
    set_learning_rate(optimizer, learning_rate(step, schedule="cosine", peak=6e-4, warmup_steps=100,
                                               total_steps=2000))
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.errors import RequestError
from lmcore.plugins import import_path

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


# ------------------------------------------------------------------------------------------------- parameters


def choose_trained(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    train_only: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> list[str]:
    """Freeze by name; the names that are trained.

    A pattern is a shell pattern over the whole name (``*.ln_?.*``), or the name of a module, which stands for
    all that is in it (``transformer.h.0``). Trained is what ``train_only`` matches (default: everything) and
    ``freeze`` does not. Call it before the model is wrapped for distributed training. A parameter that came
    frozen stays so.

    Raises:
        RequestError: a pattern matches nothing (with the nearest name), or nothing is left to train.
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
    found = difflib.get_close_matches(pattern, [*names, *sorted(modules)], n=1, cutoff=0.3)
    return f"; the nearest name is {found[0]!r}" if found else ""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    train_only: Sequence[str] = (),
    freeze: Sequence[str] = (),
    vocabulary: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups ``{"params", "names", "weight_decay", "hidden"}`` of the trained parameters; empty groups are
    left out.

    ``hidden`` marks the two-dimensional matrices inside the network, which Muon takes. Embeddings and heads
    are not among them: they are known by ``vocabulary`` (names) and by the usual endings of embeddings'
    names.
    """
    named = list(named_parameters)
    trained = set(choose_trained(named, train_only=train_only, freeze=freeze))
    hidden: list[tuple[str, nn.Parameter]] = []
    other: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named:
        if name not in trained:
            continue
        if parameter.ndim < 2:
            vectors.append((name, parameter))
        elif parameter.ndim == 2 and name not in vocabulary and not _looks_like_embedding(name):
            hidden.append((name, parameter))
        else:
            other.append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": decay,
            "hidden": is_hidden,
        }
        for members, decay, is_hidden in (
            (hidden, weight_decay, True),
            (other, weight_decay, False),
            (vectors, 0.0, False),
        )
        if members
    ]


def _looks_like_embedding(name: str) -> bool:
    module = name.rsplit(".", 2)[-2] if "." in name else name
    return "embed" in module or module in ("wte", "wpe", "lm_head", "output", "score")


# ------------------------------------------------------------------------------------------------- optimizers


def build(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    fused: bool | None = None,
    state_dtype: str | torch.dtype | None = None,
    **config: Any,
) -> torch.optim.Optimizer:
    """Make the optimizer ``name``: one of ``OPTIMIZERS``, or an import path ``package.module:Class``.

    Args:
        groups: from :func:`parameter_groups`; their ``weight_decay`` is used.
        lr: peak rate; :func:`set_learning_rate` sets the rate of each step.
        betas, eps: of adamw and adam (and of the AdamW half of muon).
        momentum: of sgd and muon.
        fused: one kernel for all parameters; default: wherever torch has one (adamw, adam, sgd). It also
        takes the
            device-side gate ``optimizer.found_inf`` (see torch.amp), which skips an update without asking the
            host.
        state_dtype: ``"bfloat16"`` keeps AdamW's two moments in half the memory (adamw only).
        config: further arguments of the optimizer's class (``amsgrad``, ``beta2_decay``, ...).

    Muon is torch's own for the ``hidden`` matrices, with the update scaled to AdamW's size
    (``match_rms_adamw``, Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both halves;
    AdamW for all the rest. A class by import path is called with ``groups``, ``lr`` and those of the others
    that it names.
    """
    usual: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "fused": fused is None or fused} | config
    sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "fused": fused is None or fused} | config
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, **usual),
        "adam": lambda: torch.optim.Adam(groups, **usual),
        "sgd": lambda: torch.optim.SGD(groups, **sgd),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=lr, **config),
        "muon": lambda: MuonWithAdamW(groups, momentum=momentum, **usual),
    }
    make = makers.get(name)
    if state_dtype is not None and _dtype(state_dtype) != torch.float32:
        if name != "adamw":
            raise RequestError(f"optim.state_dtype {state_dtype} is made for adamw, not for {name}")
        make = functools.partial(
            SmallAdamW, groups, lr=lr, betas=betas, eps=eps, state_dtype=_dtype(state_dtype), **config
        )
    if make is None and ":" in name:
        offered = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused}
        make = functools.partial(_by_path, name, groups, offered, config)
    if make is None:
        found = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"; did you mean {found[0]!r}?" if found else ""
        known = ", ".join(OPTIMIZERS)
        raise RequestError(f"optim.name {name!r} is none of {known}, nor package.module:Class{hint}")
    try:
        return make()
    except TypeError as error:  # an argument that the class does not have
        raise RequestError(f"optim.config: {error}") from error


def _dtype(value: str | torch.dtype) -> torch.dtype:
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    if isinstance(value, torch.dtype):
        return value
    if value not in names:
        raise RequestError(f"optim.state_dtype {value!r} is none of {', '.join(names)}")
    return names[value]


def _by_path(
    path: str, groups: list[dict[str, Any]], offered: Mapping[str, Any], config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    factory = import_path(path, "optim.name")
    try:
        known: Collection[str] = inspect.signature(factory).parameters
    except ValueError:  # written in C
        known = ()
    arguments = {k: v for k, v in offered.items() if v is not None and (k == "lr" or k in known)}
    optimizer = factory(groups, **(arguments | dict(config)))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RequestError(f"optim.name {path!r} made a {type(optimizer).__name__}, not a torch Optimizer")
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the ``hidden`` groups and torch's AdamW for the others, as one optimizer.

    The two halves share this object's ``param_groups`` (the same dictionaries) and its ``state`` (the same
    mapping), so that whoever saves, loads, shards or re-rates this optimizer needs to know nothing of them.
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
    ) -> None:
        hidden = [group for group in groups if group["hidden"]]
        other = [group for group in groups if not group["hidden"]]
        self._halves: list[torch.optim.Optimizer] = []
        if hidden:
            self._halves.append(
                torch.optim.Muon(hidden, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            )
        if other:
            self._halves.append(torch.optim.AdamW(other, lr=lr, betas=betas, eps=eps, fused=fused))
        super().__init__([group for half in self._halves for group in half.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        start = 0
        for half in self._halves:
            stop = start + len(half.param_groups)
            half.param_groups = self.param_groups[start:stop]
            half.state = self.state
            start = stop

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
        for half in self._halves:
            half.step()
        return loss


class SmallAdamW(torch.optim.Optimizer):
    """AdamW whose two moments are kept in bfloat16 (4 bytes a parameter instead of 8), computed in float32.

    As DeepSeek-V3 trained (arXiv 2412.19437, section 3.3). Rounding to nearest would freeze the second
    moment: bfloat16 has 8 bits, and an update by ``1 - beta2`` = 0.001 is below half of its last one. So both
    moments are rounded *stochastically*, from a generator keyed by (step, group, index): unbiased, and the
    same after a resume.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        state_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update (Loshchilov & Hutter 2019, algorithm 2)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=self._state_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._state_dtype)
                state["step"] += 1
                step = int(state["step"])
                gradient = parameter.grad.float()
                mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
                square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
                generator = torch.Generator(device=parameter.device)
                generator.manual_seed((step << 32) + (group_index << 24) + index)
                _round_into(state["exp_avg"], mean, generator)
                _round_into(state["exp_avg_sq"], square, generator)
        return loss


def _round_into(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 ``value`` into bfloat16 ``target``, up or down with the probability of its distance."""
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    local = value.to_local() if hasattr(value, "to_local") else value
    bits = local.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    (target.to_local() if hasattr(target, "to_local") else target).copy_(rounded.view(local.shape))


# -------------------------------------------------------------------------------------------------- schedules


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int = 0,
    min_ratio: float = 0.1,
) -> float:
    """The learning rate of update ``step``, counted from 0.

    Warmup is linear, ``peak * (step + 1) / warmup_steps``: the first update is not wasted, the last of the
    warmup is at the peak. Then, with ``t`` from 0 to 1 over the rest of the run and the floor ``f = min_ratio
    * peak``:

    - ``constant``: peak
    - ``linear``: ``peak - (peak - f) * t``
    - ``cosine``: ``f + (peak - f) * (1 + cos(pi t)) / 2`` (Loshchilov & Hutter 2017)
    - ``wsd``: peak, then linear to the floor over the last ``decay_steps`` (Hu et al. 2024, arXiv 2404.06395)
    - ``inverse_sqrt``: ``max(f, peak * sqrt(max(warmup_steps, 1) / (step + 1)))`` (Vaswani et al. 2017)

    After the last step the rate stays at its end. Raises RequestError for an unknown schedule or a warmup
    (and decay) longer than the run.
    """
    check_schedule(schedule, warmup_steps=warmup_steps, total_steps=total_steps, decay_steps=decay_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    floor = min_ratio * peak
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak - (peak - floor) * t
    if schedule == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
    if schedule == "wsd":
        done = (step - (total_steps - decay_steps)) / max(1, decay_steps)
        return peak - (peak - floor) * min(1.0, max(0.0, done))
    if schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup_steps, 1) / (step + 1)))
    return peak


def check_schedule(schedule: str, *, warmup_steps: int, total_steps: int, decay_steps: int = 0) -> None:
    """RequestError if there is no such schedule, or its parts are longer than the run."""
    if schedule not in SCHEDULES:
        found = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f"; did you mean {found[0]!r}?" if found else ""
        raise RequestError(f"optim.schedule {schedule!r} is none of {', '.join(SCHEDULES)}{hint}")
    decay = decay_steps if schedule == "wsd" else 0
    if warmup_steps + decay > total_steps:
        parts = f"{warmup_steps} steps" + (f" and optim.decay of {decay}" if decay else "")
        raise RequestError(f"optim.warmup of {parts} do not fit into a run of {total_steps} steps")


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of every group, in place where a group keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# -------------------------------------------------------------------------------------------------------- EMA


def start_average(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Float32 copies by name: the exponential moving average of the weights before the first update."""
    return {name: tensor.detach().float().clone() for name, tensor in named_tensors}


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], named_tensors: Iterable[tuple[str, Tensor]], decay: float
) -> None:
    """``average <- decay * average + (1 - decay) * tensor``, by name, in place."""
    pairs = [(average[name], tensor.detach().float()) for name, tensor in named_tensors]
    if pairs:
        torch._foreach_lerp_([a for a, _ in pairs], [t for _, t in pairs], 1 - decay)
