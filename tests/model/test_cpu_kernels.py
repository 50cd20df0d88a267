"""The faster kernels compute what the plain ones do: against a slow reference in float64, and in a whole training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lmcore.model.cpu_kernels as kernels
from lmcore.model import module as model
from lmcore.model import optim
from lmcore.model.build import build_model

B, H, T, D, V = 2, 3, 48, 16, 160


class Causal(nn.Module):
    is_causal = True


def reference(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention as the 2017 paper has it (arXiv:1706.03762, 3.2.1), row by row, in float64."""
    rows = []
    for t in range(query.shape[2]):
        seen = slice(0, t + 1)
        scores = (query[:, :, t : t + 1].double() * key[:, :, seen].double()).sum(-1) * scaling
        rows.append((scores.softmax(-1).unsqueeze(-1) * value[:, :, seen].double()).sum(2))
    return torch.stack(rows, dim=1)  # (B, T, H, D)


def inputs(dtype: torch.dtype, heads: int = H) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(B, T, n, D).transpose(1, 2).to(dtype) for n in (H, heads, heads)]
    return [tensor.requires_grad_() for tensor in made]


def error(function: Any, scaling: float) -> float:
    """Greatest difference from the reference, of the result and of the three gradients, in bf16."""
    tensors = inputs(torch.bfloat16)
    upstream = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1))
    mixed, weights = function(Causal(), *tensors, None, scaling=scaling)
    assert weights is None
    assert mixed.dtype == torch.bfloat16
    mixed.backward(upstream.bfloat16())
    exact = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    expected = reference(*exact, scaling)
    expected.backward(upstream.bfloat16().double())
    pairs = [
        (mixed.detach(), expected.detach()),
        *((a.grad, b.grad) for a, b in zip(tensors, exact, strict=True)),
    ]
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("scaling", [D**-0.5, 1.0])
def test_plain_attention_is_as_exact_as_the_fused_kernel(scaling: float, monkeypatch: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain = error(kernels.attention, scaling)
        monkeypatch.setattr(kernels, "_plain_is_faster", lambda *args: False)
        fused = error(kernels.attention, scaling)
    # bf16 has 8 bits: one rounding is up to 2^-8 of a value. Inputs, result and the products of the backward pass are
    # rounded on both ways, the scores on the plain one only; a few such roundings meet in a gradient.
    assert fused < 8 * 2**-8
    assert plain < 2 * fused


def test_plain_attention_is_used_for_causal_bf16_only(monkeypatch: Any) -> None:
    here: list[bool] = []
    chosen = kernels._plain_is_faster
    monkeypatch.setattr(kernels, "_plain_is_faster", lambda *args: here.append(chosen(*args)) or here[-1])

    def asked(tensors: list[Tensor], mask: Tensor | None = None, **more: Any) -> bool:
        module = Causal()
        module.num_key_value_groups = H // tensors[1].shape[1]
        result = kernels.attention(module, *tensors, mask, **more)[0]
        expected = sdpa_attention_forward(module, *tensors, mask, **more)[0]
        if not more.get("dropout"):
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        return here[-1]

    narrow = inputs(torch.bfloat16)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril(-1)
    mask[..., 0, 0] = True
    assert asked(narrow)
    assert asked(narrow, dropout=0.1)
    assert not asked(inputs(torch.float32))
    assert not asked(narrow, mask)
    assert not asked(narrow, is_causal=False)
    assert not asked(inputs(torch.bfloat16, heads=1)), "heads in groups"
    assert not asked([narrow[0][:, :, -1:], *narrow[1:]]), "one new token against a cache"
    monkeypatch.setattr(kernels, "MATMUL_BLOCK", T - 1)
    assert not asked(narrow)
    assert asked(narrow, dropout=0.1), "the fused kernel of a CPU knows no dropout"


def test_rotary_models_take_plain_attention_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions leave queries and keys in float32, which autocast narrows inside of sdpa."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    built: Any = build_model(type="nanochat", config_overrides=shape, vocab_size=V, block_size=T, seed=0)
    kernels.use_faster_kernels(built)
    ids = torch.randint(0, V, (2, T))
    taken: list[bool] = []
    rule = kernels._plain_is_faster

    def noted(*arguments: Any) -> bool:
        taken.append(rule(*arguments))
        return taken[-1]

    monkeypatch.setattr(kernels, "_plain_is_faster", noted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = built(input_ids=ids).logits.float()
        monkeypatch.setattr(kernels, "_plain_is_faster", lambda *arguments: False)
        fused = built(input_ids=ids).logits.float()
    assert taken == [True]
    # bfloat16 has 8 bits; the products of one layer are rounded in another order.
    torch.testing.assert_close(plain, fused, rtol=0, atol=2**-6 * float(fused.abs().max()))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_tanh_gelu_is_the_fused_kernel(activation: str) -> None:
    built: Any = build_model(
        type="gpt2",
        config_overrides={"n_layer": 1, "n_embd": 32, "n_head": 2, "activation_function": activation},
        vocab_size=V,
        block_size=T,
        seed=0,
    )
    before = built.transformer.h[0].mlp.act
    kernels.use_faster_kernels(built)
    after = built.transformer.h[0].mlp.act
    assert isinstance(after, kernels.TanhGELU)
    x = torch.linspace(-12, 12, 4001)
    # A few roundings of float32 (2^-24) of values up to 12.
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=2e-6)
    exact = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)))
    torch.testing.assert_close(after(x).double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tanh_gelu_under_a_compiler_is_the_same_function(dtype: torch.dtype) -> None:
    act = kernels.TanhGELU()
    # What the compiler gets is run as it is: whether inductor fuses it rightly is not a matter of formulas.
    compiled = torch.compile(act, backend="aot_eager", fullgraph=True)
    graphs: list[str] = []

    def seen(graph: Any, examples: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    points = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -90.0, 90.0, 1e4])]).to(dtype)
    torch.compile(act, backend=seen)(points)
    assert "sigmoid" in graphs[0]
    assert "gelu" not in graphs[0]
    results = []
    for function in (act, compiled, nn.GELU(approximate="tanh")):
        x = (points.clone() if function in (act, compiled) else points.double()).requires_grad_()
        y = function(x)
        y.sum().backward()
        results.append((y.detach().double(), x.grad.double()))
    exact = results[2]
    # Relative to the value one rounding to the dtype; absolute a few of float32, which both compute in.
    rounding = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float64: 2**-50}[dtype]
    small = 2e-6 if dtype != torch.float64 else 1e-14
    for result in results[:2]:
        for ours, theirs in zip(result, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=small)


def trained(*, fast: bool, bf16: bool, steps: int, monkeypatch: Any) -> list[float]:
    """The losses of a small GPT-2 with dropout in nothing, on tokens that can be learned."""
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(model, "use_faster_kernels", lambda built: None)
        built = build_model(
            type="gpt2",
            config_overrides={
                "n_layer": 2,
                "n_embd": 48,
                "n_head": 3,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
            vocab_size=V,
            block_size=T,
            seed=0,
        )
        module = model.ModelWithLoss(built)
    assert (built.config._attn_implementation == kernels.ATTENTION) is fast
    optimizer = optim.build_optimizer(
        "adamw", optim.parameter_groups(built.named_parameters(), weight_decay=0.1), lr=3e-3
    )
    losses = []
    for step in range(steps):
        start = torch.randint(0, V, (4, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + 7 * torch.arange(T + 1)) % V
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss_sum, count = module(input_ids=ids[:, :-1], labels=ids[:, 1:])
        loss = loss_sum / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_with_faster_kernels_reaches_the_same_loss(monkeypatch: Any) -> None:
    """fp32: the same to rounding. bf16: the fast curve is as near to the fp32 one as the plain bf16 curve is."""
    exact = trained(fast=False, bf16=False, steps=100, monkeypatch=monkeypatch)
    assert exact[-1] < 0.2 * exact[0], "it learns"
    fast = trained(fast=True, bf16=False, steps=100, monkeypatch=monkeypatch)
    assert max(abs(a - b) / b for a, b in zip(fast[:20], exact[:20], strict=True)) < 1e-5
    plain = trained(fast=False, bf16=True, steps=100, monkeypatch=monkeypatch)
    fast = trained(fast=True, bf16=True, steps=100, monkeypatch=monkeypatch)

    def far(curve: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(curve, exact, strict=True)) / len(exact)

    # Two roundings of the same kind, neither better than the other: twice is the spread of such a sum.
    assert far(fast) < 2 * far(plain)


def test_saved_config_does_not_name_the_kernels(tmp_path: Path) -> None:
    for family, width in (("gpt2", {}), ("llama", {"intermediate_size": 64})):
        built: Any = build_model(
            type=family,
            config_overrides={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, **width},
            vocab_size=V,
            block_size=T,
            seed=0,
        )
        plain = built.config.to_dict()
        module = model.ModelWithLoss(built)
        assert module.model.config._attn_implementation == kernels.ATTENTION
        built.config.save_pretrained(tmp_path)
        assert built.config.to_dict() == plain
        assert kernels.ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_attention_that_was_asked_for_is_kept() -> None:
    built: Any = build_model(
        type="gpt2",
        config_overrides={"n_layer": 1, "n_embd": 32, "n_head": 2},
        vocab_size=V,
        block_size=T,
        seed=0,
        attention="eager",
    )
    assert model.ModelWithLoss(built).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("falcon", {}),  # under another name its tokens would see all others, the labels among them
        (
            "deepseek_v32",  # and these all keys instead of the chosen two
            {
                "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 2, "index_n_heads": 2, "index_head_dim": 16,
                "num_key_value_heads": 4, "first_k_dense_replace": 1,
            },
        ),
    ],
)  # fmt: skip
def test_family_whose_code_asks_for_sdpa_by_name_keeps_it(family: str, fields: dict[str, Any]) -> None:
    made: Any = build_model(
        type=family,
        config_overrides={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **fields},
        vocab_size=V,
        block_size=T,
        seed=0,
    ).eval()
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        model.ModelWithLoss(made)
        found = made(input_ids=ids).logits
        changed = made(input_ids=torch.cat([ids[:, :-1], 1 - ids[:, -1:].clamp(max=1)], dim=1)).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(changed[:, :-1], expected[:, :-1])
