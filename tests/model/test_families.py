"""Families of unusual form: what is trained, however it is computed, is what the family's own code computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.disk import DISK
from lmcore.model import module as m
from lmcore.model.build import build_model
from lmcore.saved import export

V, T = 50, 12
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}
LOW_RANK = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "codegen": {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 32},
    "deepseek_v3": SIZES | EXPERTS | LOW_RANK | {"num_key_value_heads": 2, "first_k_dense_replace": 1},
    "falcon": {name: SIZES[name] for name in SIZES if name != "intermediate_size"},
    "gemma3_text": GQA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": GQA | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "lfm2": SIZES | {"num_key_value_heads": 1} | {"layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "marian": {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    | {"max_position_embeddings": 32},
    "opt": {name: SIZES[name] for name in SIZES if name != "intermediate_size"}
    | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "roberta": SIZES | {"max_position_embeddings": 32},
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "context_length": 32},
    "stablelm": SIZES | {"num_key_value_heads": 1},
}


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():  # float32: sums in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_trained_as_its_own_code_computes(family: str, tmp_path: Path) -> None:
    ids_of = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    plain: Any = build_model(
        type=family, config_overrides=FAMILIES[family], vocab_size=V, special_ids=ids_of, block_size=T, seed=0
    ).eval()
    wrapped: Any = m.ModelWithLoss(copy.deepcopy(plain)).eval()
    ids = torch.randint(4, V, (2, T + 1), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    logits = plain(input_ids=batch["input_ids"]).logits[..., :V].float()
    expected = F.cross_entropy(logits.reshape(-1, V), batch["labels"].reshape(-1), reduction="sum")
    loss, count = wrapped(**batch)
    assert int(count) == 2 * T
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert_equal(gradients(loss, wrapped.model), gradients(expected, plain))

    recomputing = copy.deepcopy(wrapped).train()
    m.enable_activation_checkpointing(recomputing.model)
    found = []
    for model in (recomputing, copy.deepcopy(wrapped).train()):
        torch.manual_seed(0)
        found.append(gradients(model(**batch)[0], model))
    assert_equal(*found)

    narrow = copy.deepcopy(wrapped)
    m.narrow_residual_stream(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(**batch)
    assert abs(float(loss.detach()) / float(expected.detach()) - 1) < 0.01  # 8 bits
    assert all(gradient.isfinite().all() for gradient in gradients(loss, narrow).values())

    export._write_model(plain, plain.get_parameter, tmp_path, torch.float32, 10**9, DISK)
    export.verify(tmp_path, plain, plain.get_parameter, torch.float32)
