"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) by ``peft``: few parameters are trained, the rest is frozen.

:func:`adapt` adds two thin matrices to each of the named layers of a transformers model, ``W + alpha / rank * B A``, and
freezes everything else; :func:`merge` adds the adapters to the weights. B starts at zero, so that the output of the model
does not change at first; A is drawn from the seed, the same bits on every rank. The model keeps its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of
from lmcore.model.module import vocabulary_parameters

INSTALL = "pip install peft==0.21.2"


def adapt(
    model: Any,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Iterable[str] = (),
    seed: int = 0,
    weights: bool = True,
) -> None:
    """Add adapters to a model in place, and freeze everything else.

    Args:
        weights: ``False`` for adapters on the meta device, without values.
        alpha: default: twice the rank.
        target_modules: endings of names (``q_proj``), or ``all-linear``; default: peft's choice for this family.

    Raises:
        RequestError: peft is not installed, there are no such layers, or the embedding or the head is among them.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise RequestError(f"model.lora needs peft, which is not installed: {INSTALL}") from error
    from transformers.pytorch_utils import Conv1D

    targets = list(target_modules)
    scale: Any = 2 * rank if alpha is None else alpha  # annotated as int in peft, which accepts any number
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    vocabulary = {name.rpartition(".")[0] for name in vocabulary_parameters(model)}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Conv1D's transposed weights, which peft recognizes itself
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, low_cpu_mem_usage=not weights)
    except ValueError as error:
        words = message_of(error)
        raise RequestError(
            f"model.lora.target_modules {' '.join(targets) or '(none given)'}: {words}"
        ) from error
    found = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if vocabulary & set(found):
        raise RequestError(
            f"model.lora.target_modules: {', '.join(sorted(vocabulary & set(found)))} holds the vocabulary, which is "
            "padded and often shared by embedding and head: name layers inside the blocks"
        )
    model.lora = {
        "rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": targets, "seed": seed,
    }  # fmt: skip


def refuse_unknown_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a target that is not a layer of the model: peft ignores it silently if it finds others.

    Not part of :func:`adapt`, so that a model trained with such a name can still be loaded.

    Raises:
        RequestError: a target matches no layer; the message gives the nearest name.
    """
    layers = [name for name, _ in model.named_modules()]
    for target in () if list(targets) == ["all-linear"] else targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise RequestError(
                f"model.lora.target_modules: {target!r} is not the end of the name of a layer"
                f"{did_you_mean(target, {name.rpartition('.')[2] for name in layers})}; all-linear must stand alone"
            )


def describe(model: Any) -> str:
    """The adapters of a model in words: ``LoRA rank 8, alpha 16, dropout 0.0 in c_attn``; empty without adapters."""
    if not hasattr(model, "lora"):
        return ""
    from peft.tuners.lora import LoraLayer

    layers = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    )
    options = model.lora
    alpha = 2 * options["rank"] if options["alpha"] is None else options["alpha"]
    return (
        f"LoRA rank {options['rank']}, alpha {alpha:g}, dropout {options['dropout']} in {', '.join(layers)}"
    )


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to their weights and remove them, in place; all parameters are trainable again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    del model.lora
    if hasattr(model, "peft_config"):
        del model.peft_config
