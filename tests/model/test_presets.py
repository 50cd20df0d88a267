"""Presets: models by name and size, zero-initialized outputs, learning rates and momentum as the options say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lmcore.config.parse import parse
from lmcore.config.presets import SHAPES, describe_preset, model_type_and_fields, zero_init
from lmcore.data.steps import StepPlan
from lmcore.errors import RequestError
from lmcore.model import schedules
from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss, decoder_layers, head_parameters, parameter_counts
from lmcore.run.budget import Sizes
from lmcore.run.setup import build_model as build_from_options
from lmcore.run.setup import describe_optimizer, make_optimizer, momenta


def options(*words: str) -> Any:
    return parse([*words], default_recipe=None)


def built(*words: str) -> ModelWithLoss:
    config = options(*words)
    return build_from_options(config, vocab_size=500, special_ids={}, block_size=64, note=lambda text: None)


@pytest.mark.parametrize(
    ("preset", "class_name"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("modern", "NanoChatForCausalLM"),
        ("modern_gguf", "Qwen3ForCausalLM"),
        ("modern_conv", "Lfm2ForCausalLM"),
    ],
)
def test_preset_is_a_plain_transformers_class(preset: str, class_name: str) -> None:
    module = built("--model.preset", preset, "--data.block_size", "64")
    assert module.model.__class__.__name__ == class_name
    assert module.head_path == "chunked"
    assert len(decoder_layers(module.model)) == SHAPES["5M"].layers
    ids = torch.randint(0, 500, (1, 65))
    loss_sum, count = module(input_ids=ids[:, :-1], labels=ids[:, 1:])
    loss_sum.backward()
    assert int(count) == 64


@pytest.mark.parametrize("preset", ["gpt2", "modern", "modern_gguf", "modern_conv"])
@pytest.mark.parametrize(("size", "expected"), [("124M", 124e6), ("350M", 350e6), ("1B", 1e9)])
def test_sizes_have_about_their_number_of_parameters(preset: str, size: str, expected: float) -> None:
    type, fields = model_type_and_fields(options("--model.preset", preset, "--model.size", size))
    model = build_model(
        type=type or "", config_overrides=fields, vocab_size=50_257, block_size=64, seed=0, weights=False
    )
    counts = parameter_counts(model)
    # gpt2 ties the vocabulary to the head; without embeddings the bodies are what the size means.
    vocabulary = 50_304 * model.config.hidden_size
    assert counts["body"] - (0 if preset == "gpt2" else vocabulary) + vocabulary == pytest.approx(
        expected, rel=0.12
    )


def test_options_override_single_fields_and_the_size_is_shown() -> None:
    config = options(
        "--model.preset", "modern", "--model.size", "15M", "--model.config.num_hidden_layers", "3"
    )
    type, fields = model_type_and_fields(config)
    assert (type, fields["num_hidden_layers"], fields["hidden_size"]) == ("nanochat", 3, 320)
    assert describe_preset(config) == "modern 15M: nanochat, 3 layers, width 320, 5 heads, context 512"
    assert (
        model_type_and_fields(options("--model.preset", "gpt2", "--data.block_size", "77"))[1]["n_positions"]
        == 77
    )


def test_preset_with_convolutions_has_attention_in_every_other_layer_and_in_the_last() -> None:
    words = ["--model.preset", "modern_conv", "--model.config.num_hidden_layers"]
    for layers in (1, 2, 5):
        types = model_type_and_fields(options(*words, str(layers)))[1]["layer_types"]
        assert types[::-1] == (["full_attention", "conv"] * layers)[:layers]
    config = options("--model.preset", "modern_conv", "--model.size", "8M")
    assert describe_preset(config) == "modern_conv 8M: lfm2, 8 layers, width 256, 4 heads, context 256"


def test_size_without_a_preset_is_refused() -> None:
    with pytest.raises(RequestError, match=r"model\.size 15M .*model\.preset"):
        options("--model.size", "15M")


def test_preset_replaces_the_recipes_type_and_repeats_from_its_own_file(tmp_path: Any) -> None:
    from lmcore.config.schema import to_yaml

    config = parse(["--model.preset", "modern"])  # over the demo recipe
    assert config.model.type is None
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "again.yaml")]).model == config.model


@pytest.mark.parametrize("preset", ["gpt2", "modern", "modern_gguf", "modern_conv"])
def test_zero_init_makes_every_layer_the_identity(preset: str) -> None:
    module = built("--model.preset", preset, "--model.zero_init", "true")
    model: Any = module.model
    states = model(input_ids=torch.randint(0, 500, (1, 16)), output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states[:-1]):
        assert torch.equal(before, after)
    for name, parameter in model.named_parameters():
        if name in head_parameters(model):
            assert not parameter.any(), name
    assert model.get_input_embeddings().weight.any()


def test_modern_presets_start_at_zero_with_muon_unless_told_otherwise() -> None:
    muon = ("--optim.name", "muon")
    assert zero_init(options("--model.preset", "modern", *muon))
    assert zero_init(options("--model.preset", "modern_conv", *muon))
    assert not zero_init(options("--model.preset", "modern", *muon, "--model.zero_init", "false"))
    assert not zero_init(options("--model.preset", "modern", "--optim.name", "adamw"))
    assert zero_init(options("--model.preset", "modern", "--model.zero_init", "true"))
    assert not zero_init(options("--model.preset", "gpt2", *muon))
    assert not zero_init(options())
    with pytest.raises(RequestError, match=r"model\.zero_init"):
        options("--model.zero_init", "true", "--model.from_pretrained", "somewhere")


def sizes(steps: int) -> Sizes:
    return Sizes(
        steps=StepPlan.constant(4),
        world_size=1,
        micro_batch_blocks=4,
        block_size=64,
        epoch_blocks=None,
        total_steps=steps,
        total_blocks=4 * steps,
        run_blocks=4 * steps,
        end_position=None,
    )


def test_momentum_may_begin_at_zero_also_with_nesterov() -> None:
    sgd = ("--optim.name", "sgd", "--optim.config.nesterov", "true", "--model.preset", "gpt2")
    config = options(*sgd, "--optim.momentum", "linear 0 0.9")
    module = built("--model.preset", "gpt2")
    optimizer = make_optimizer(config, module, list(module.named_parameters()))
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_muon_momentum_warms_up_and_others_stay_constant() -> None:
    muon = momenta(options("--optim.name", "muon"), sizes(100))
    assert [muon(0), muon(5), muon(10), muon(99)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momenta(options("--optim.name", "sgd"), sizes(100))(0) == 0.95
    asked = momenta(
        options("--optim.name", "sgd", "--optim.momentum_start", "0.5", "--optim.momentum_warmup", "50"),
        sizes(100),
    )
    assert asked(25) == pytest.approx((0.5 + 0.95) / 2)
    assert schedules.momentum(0, start=0.5, end=0.9, warmup_steps=0) == 0.9


def test_start_table_shows_the_rate_of_each_kind() -> None:
    words = ["--optim.name", "adamw", "--optim.lr", "0.01", "--optim.lr_multipliers.embedding", "5"]
    rows = dict(describe_optimizer(options(*words), sizes(100)))
    assert rows["optimizer"] == "adamw, peak rate matrices 0.01, embedding 0.05, head 0.01, vectors 0.01"
    assert (
        dict(describe_optimizer(options("--optim.lr", "0.01"), sizes(1)))["optimizer"]
        == "adamw, peak rate 0.01"
    )
