"""A model's structure without its weights, a part of the room ``model``.

Where a model is sharded, rank 0 alone needs its weights at first; the others build the structure, and are
given their shards. What always holds: parameters are on the meta device, no more than one of them is ever
allocated; buffers are real, for constructors compute them (rotary frequencies) and no checkpoint has them.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Inside, every parameter goes to the meta device as soon as a module registers it; nothing is drawn."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
            )
        register(module, name, parameter)

    with no_init_weights(), unittest.mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield


@contextlib.contextmanager
def random_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the empty parameters of these modules (not of their children) have random values."""
    generator = torch.Generator().manual_seed(0)
    kept = [
        (module, leaf, parameter)
        for module in modules
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for module, leaf, parameter in kept:
        module._parameters[leaf] = nn.Parameter(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for module, leaf, parameter in kept:
            module._parameters[leaf] = parameter
