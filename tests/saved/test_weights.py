"""A model that gets its weights layer by layer computes what the whole model computes, and ends as empty as it began."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.model.module import decoder_layers
from lmcore.saved.weights import give_weights, layer_by_layer

TYPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}


def model_of(type: str, *, weights: bool) -> Any:
    fields = TYPES[type]
    common: dict[str, Any] = {"vocab_size": 70, "block_size": 64, "seed": 1, "weights": weights}
    return build_model(type=type, config_overrides=fields, **common).eval()


@pytest.mark.parametrize("type", TYPES)
def test_layer_by_layer_equals_the_whole_model(type: str) -> None:
    whole, empty = model_of(type, weights=True), model_of(type, weights=False)
    before = {name: id(parameter) for name, parameter in empty.named_parameters(remove_duplicate=False)}
    layers = decoder_layers(empty)
    assert len(layers) == 3
    read: list[str] = []
    most = 0

    def give(name: str) -> Tensor:
        nonlocal most
        read.append(name)
        full = [parts for parts in layers if not any(p.is_meta for p in parts.parameters())]
        most = max(most, len(full))
        return whole.get_parameter(name)

    ids = torch.arange(20)[None]
    with torch.no_grad(), layer_by_layer(empty, give):
        got = empty(input_ids=ids).logits
        assert torch.equal(empty(input_ids=ids).logits, got)
    with torch.no_grad():
        assert torch.equal(got, whole(input_ids=ids).logits)
    assert set(read) == {name for name, _ in whole.named_parameters()}
    assert most == 0  # none is full while another one is being filled
    after = {name: id(parameter) for name, parameter in empty.named_parameters(remove_duplicate=False)}
    assert after == before
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_layer_by_layer_is_empty_again_after_an_error() -> None:
    whole, empty = model_of("llama", weights=True), model_of("llama", weights=False)

    def give(name: str) -> Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise OSError("unreadable")
        return whole.get_parameter(name)

    with pytest.raises(OSError, match="unreadable"), layer_by_layer(empty, give):
        empty(input_ids=torch.arange(5)[None])
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in empty.modules())


@pytest.mark.parametrize("type", TYPES)
def test_given_weights_are_not_copied_and_stay_tied(type: str) -> None:
    whole, empty = model_of(type, weights=True), model_of(type, weights=False)
    give_weights(empty, iter([(name, p.detach()) for name, p in whole.named_parameters()]), "here")
    for name, parameter in empty.named_parameters():
        assert parameter.data_ptr() == whole.get_parameter(name).data_ptr()
    tied = empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert tied == (type == "gpt2")
    with pytest.raises(RequestError, match=r"here: the weight .* is missing"):
        give_weights(model_of(type, weights=False), iter([]), "here")
    with pytest.raises(RequestError, match=r"weight other \(3,\) does not fit: the model has no such weight"):
        give_weights(model_of(type, weights=False), iter([("other", torch.ones(3))]), "here")
