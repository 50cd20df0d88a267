"""Loading weights into a model that was built without them: all at once, or layer by layer while it computes.

The model has its parameters on the meta device and its buffers in memory (:func:`lmcore.model.build.without_weights`). A tensor
that is a view of a file stays a view: its pages are read when they are used, and the system can drop them again.

Example::

    give_weights(model, tensors_of(opened), "runs/demo")      # all at once: memory only for weights in several files
    with layer_by_layer(model, read):                         # one decoder layer at a time
        logits = model(input_ids=ids).logits
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.errors import RequestError
from lmcore.model.module import decoder_layers

Read = Callable[[str], Tensor]
"""Returns the whole weight with a name, as in ``named_parameters`` of the model."""
_Places = list[tuple[nn.Module, str, nn.Parameter]]


def give_weights(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], where: str) -> None:
    """Replace a model's parameters by named tensors without a copy; buffers are copied in place.

    Tied weights are given once, under any of their names. A tensor with another dtype than the parameter is converted.

    Raises:
        RequestError: the model has no weight for a tensor, or a weight of the model is missing.
    """
    own = own_tensors(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, leaf, parameter in _places(model):
        places.setdefault(id(parameter), []).append((module, leaf))
    missing = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors:
            target = fitting(own, name, tensor.shape, where)
            if id(target) not in places:
                target.copy_(tensor)
                continue
            given = nn.Parameter(tensor.to(target.dtype), requires_grad=target.requires_grad)
            for module, leaf in places[id(target)]:
                module._parameters[leaf] = given
            missing.pop(id(target), None)
    if missing:
        raise RequestError(f"{where}: the weight {next(iter(missing.values()))} is missing")


def device_of(model: nn.Module) -> torch.device:
    """The device on which the model computes: that of its loaded weights, even while its layers have none."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, each under all its names, and the buffers."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def fitting(own: dict[str, Tensor], name: str, shape: Sequence[int], where: str) -> Tensor:
    """The tensor of a model that corresponds to a stored one with this name and shape.

    Raises:
        RequestError: the model has no tensor with this name, or it has another shape.
    """
    target = own.get(name)
    if target is None or tuple(target.shape) != tuple(shape):
        have = "no such weight" if target is None else f"shape {tuple(target.shape)}"
        raise RequestError(f"{where}: weight {name} {tuple(shape)} does not fit: the model has {have}")
    return target


@contextlib.contextmanager
def layer_by_layer(model: nn.Module, read: Read) -> Iterator[None]:
    """Context in which a model with empty parameters can compute: each decoder layer gets its weights before it computes and
    loses them afterwards. Weights outside the layers (embedding, head) are loaded all the time, and so are all weights of a
    model without decoder layers.

    Args:
        read: called again whenever a layer computes.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}

    def give(places: _Places) -> None:
        made = {id(p): nn.Parameter(read(names[id(p)]), requires_grad=False) for _, _, p in places}
        for module, leaf, parameter in places:
            module._parameters[leaf] = made[id(parameter)]

    with contextlib.ExitStack() as stack:
        for layer in layers:
            give_layer = functools.partial(_hook, give, _places(layer))
            stack.callback(layer.register_forward_pre_hook(give_layer).remove)
            empty_layer = functools.partial(_hook, _put_back, _places(layer))
            stack.callback(layer.register_forward_hook(empty_layer, always_call=True).remove)
        outside = [place for place in _places(model) if id(place[0]) not in inside]
        stack.callback(_put_back, outside)
        give(outside)
        yield


def _hook(work: Callable[[_Places], None], places: _Places, *_: Any) -> None:
    work(places)


def _put_back(places: _Places) -> None:
    for module, leaf, parameter in places:
        module._parameters[leaf] = parameter


def _places(model: nn.Module) -> _Places:
    """(module, attribute, parameter); a tied parameter has several places."""
    return [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]
