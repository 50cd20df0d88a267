"""Which models may keep documents apart by sequence lengths, and share blocks: found by trying them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss
from lmcore.model.token_mixing import (
    attention_dropout,
    how_documents_meet,
    why_no_context_parallel,
    why_no_language_model,
    why_no_sequence_lengths,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BERT = {name: SMALL[name] for name in list(SMALL)[:4]}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}


def module(family: str, fields: dict[str, Any], **options: Any) -> ModelWithLoss:
    return ModelWithLoss(
        build_model(
            type=family,
            config_overrides=fields,
            vocab_size=67,
            seed=0,
            **{"special_ids": {}, "block_size": 16} | options,
        )
    )


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", GPT2),
        ("llama", SMALL),
        ("qwen3", SMALL | {"head_dim": 16}),
        ("olmo2", SMALL),
        ("mistral", SMALL | {"sliding_window": 17}),
        ("gpt_neox", {name: SMALL[name] for name in list(SMALL)[:4]}),
    ],
)
def test_families_with_plain_causal_attention_can_share_blocks(family: str, fields: dict[str, Any]) -> None:
    made = module(family, fields)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    assert why_no_sequence_lengths(made, 16) is None
    assert why_no_context_parallel(made, 16) is None
    assert made.training  # nothing is left behind
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())


@pytest.mark.parametrize(
    ("family", "fields", "options", "reason"),
    [
        ("gpt2", GPT2, {"attention": "eager"}, "its attention is eager"),
        ("mistral", SMALL | {"sliding_window": 16}, {}, "a window of 16 (sliding_window)"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, {}, "not sdpa"),
        (
            "falcon",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            {},
            "asks for sdpa by its name",
        ),
    ],
)
def test_others_are_refused_with_the_reason(
    family: str, fields: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    made = module(family, fields, **options)
    assert reason in str(why_no_sequence_lengths(made, 16))
    assert reason in str(why_no_context_parallel(made, 16))


def test_convolution_beside_the_attention_is_found() -> None:
    made = module("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]})
    assert why_no_sequence_lengths(made, 16) is None  # as before, a mask would not help there either
    assert "outside of attention" in str(why_no_context_parallel(made, 16))


def test_model_of_the_users_own_is_refused() -> None:
    made = ModelWithLoss(torch.nn.Linear(4, 4))
    assert "not a model of transformers" in str(why_no_context_parallel(made, 16))


def test_attention_dropout_is_read_from_the_configuration() -> None:
    assert attention_dropout(module("gpt2", GPT2)) == 0.1
    assert attention_dropout(module("llama", SMALL)) == 0.0


@pytest.mark.parametrize(
    ("family", "fields", "meet"),
    [
        ("gpt2", GPT2, None),
        ("gemma2", SMALL | {"head_dim": 16}, None),  # by a mask
        ("mixtral", SMALL | {"num_local_experts": 2}, None),
        ("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}, "elsewhere"),
        ("gpt_oss", SMALL | {"num_local_experts": 4, "head_dim": 16}, "everywhere"),
        ("roberta", BERT | {"max_position_embeddings": 32}, "by position"),
    ],
)
def test_families_in_which_documents_meet_all_the_same_are_found(
    family: str, fields: dict[str, Any], meet: str | None
) -> None:
    ids = {"pad_token_id": 3} if family == "roberta" else {}
    made = module(family, fields, zero_init=family == "lfm2", special_ids=ids)
    by_lengths = why_no_sequence_lengths(made, 16) is None
    assert how_documents_meet(made, sequence_lengths=by_lengths) == meet
    assert why_no_language_model(made) is None
    assert made.training


def test_models_that_see_the_future_are_found() -> None:
    made = module("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 40})
    assert "not causal" in str(why_no_language_model(made))
    assert why_no_language_model(module("bert", BERT)) is None
    assert "not causal" in str(why_no_language_model(module("bert", BERT | {"is_decoder": False})))


def test_models_that_want_more_than_token_ids_are_found() -> None:
    # It counts the tokens that are no padding, and this tokenizer defines no padding.
    roberta = module("roberta", BERT)
    assert "RobertaForCausalLM does not compute with token ids alone: TypeError" in str(
        why_no_language_model(roberta)
    )
    assert roberta.training
    assert why_no_language_model(module("roberta", BERT, special_ids={"pad_token_id": 3})) is None
    assert why_no_language_model(module("gpt2", GPT2 | {"n_positions": 4}, block_size=4)) is None
    assert why_no_language_model(ModelWithLoss(torch.nn.Linear(4, 4))) is None
