"""Which layers can be shared by ranks, and that the parts are the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcore.checkpoint.pieces import Box, cut, problem_of
from lmcore.engine.draws import RankDraws, drops
from lmcore.engine.tensor import Cut, RowLinear, cut_layers, plan_of, why_not, why_not_equal
from tests.support.fork_server import run_ranks

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(family: str, **fields: Any) -> Any:
    from lmcore.model.build import build_model

    own = {"head_dim": 8} if family in ("gemma2", "qwen3", "mistral") else {}
    shape = {} if family == "gpt2" else {**FIELDS, **own}
    if family == "gpt_neox":  # as many heads of keys and values as of queries
        del shape["num_key_value_heads"]
    return build_model(
        type=family,
        config_overrides={**shape, **fields},
        vocab_size=64,
        special_ids={},
        block_size=16,
        seed=1,
    )


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "mistral", "gemma2", "granite", "starcoder2", "gpt_neox", "phi"],
)
def test_families_whose_parts_add_up(family: str) -> None:
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert why_not(model, 2) is None
    assert why_not_equal(model, 2) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "fields", "size", "reason"),
    [
        ("gpt2", {}, 2, "no tensor-parallel plan for GPT2LMHeadModel"),
        ("olmo2", {}, 2, "colwise_gather_output"),
        ("phi3", {}, 2, "rowwise_split_input"),
        ("llama", {"intermediate_size": 41}, 2, "has 41 outputs, which 2 does not divide"),
        ("llama", {}, 4, "its 2 heads (num_key_value_heads) are not a multiple of 4"),
    ],
)
def test_what_cannot_be_cut_is_named(family: str, fields: dict[str, Any], size: int, reason: str) -> None:
    assert reason in str(why_not(model_of(family, **fields), size))


@pytest.mark.parametrize("rule", ["qkv_proj", "gate_up_proj"])
def test_plan_whose_parts_do_not_add_up_is_found_out(rule: str) -> None:
    """Phi-3's fused projections, cut as if they were plain ones: the parts hold other heads than their code takes them for."""
    model = model_of("phi3")
    part = "self_attn" if rule == "qkv_proj" else "mlp"
    last = "o_proj" if rule == "qkv_proj" else "down_proj"
    model.tp_plan = {f"model.layers.*.{part}.{rule}": "colwise", f"model.layers.*.{part}.{last}": "rowwise"}
    assert why_not(model, 2) is None
    assert why_not_equal(model, 2) is not None


def test_norm_over_cut_heads_is_found_out() -> None:
    """OLMo 2's norms see all heads at once, and would see half of them."""
    model = model_of("olmo2")
    kinds = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
    model.tp_plan = {f"model.layers.*.self_attn.{leaf}": kind for leaf, kind in kinds.items()}
    assert why_not(model, 2) is None
    assert why_not_equal(model, 2) is not None


def test_cut_parts_are_the_whole_once() -> None:
    whole = torch.arange(24.0).view(4, 6)
    for dimension in (0, 1):
        boxes = []
        for rank in range(2):
            one = Cut(dimension, rank, 2)
            part = one.of(whole)
            assert one.whole_shape(part.shape) == (4, 6)
            # As FSDP2 shards a part by rows: the second of two shards.
            for begin, stop in ((0, part.shape[0] // 2), (part.shape[0] // 2, part.shape[0])):
                shard = Box((begin, 0), (stop - begin, part.shape[1]))
                placed = one.place(shard, part.shape)
                assert torch.equal(cut(whole, placed), part[begin:stop])
                boxes.append(placed)
        assert problem_of(boxes, (4, 6)) == ""


def test_layers_of_both_ranks_make_the_model() -> None:
    """Weights, biases and what is whole: the cuts name every part, and the vocabulary head is left alone."""
    model = model_of("qwen2")
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = []
    for rank in range(2):
        one = model_of("qwen2")
        cuts, partial_sums = cut_layers(one, rank, 2, torch.clone)
        parts.append((dict(one.named_parameters()), cuts))
        assert not partial_sums
    assert isinstance(one.model.layers[0].mlp.down_proj, RowLinear)
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in parts[0][1])
    assert len(parts[0][1]) == 2 * (7 + 3)
    for name, value in whole.items():
        first, cuts = parts[0]
        if name in cuts:
            together = torch.cat([part[name] for part, _ in parts], dim=cuts[name].dimension)
            assert torch.equal(together, value)
        else:
            assert torch.equal(first[name], value)


def test_norms_of_heads_are_whole_with_partial_gradients() -> None:
    model = model_of("qwen3")
    assert "model.layers.0.self_attn.q_norm" in plan_of(model)
    _, partial_sums = cut_layers(model, 0, 2, torch.clone)
    assert partial_sums == {
        f"model.layers.{layer}.self_attn.{norm}.weight" for layer in (0, 1) for norm in ("q_norm", "k_norm")
    }


class Masks(torch.utils._python_dispatch.TorchDispatchMode):
    """What is dropped: of attention weights, and of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.of_weights: list[torch.Tensor] = []
        self.of_stream: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if "dropout" in function.name() or "bernoulli" in function.name():
            mask = made[1] if isinstance(made, tuple) else made
            (self.of_stream if mask.shape[-1] == FIELDS["hidden_size"] else self.of_weights).append(mask != 0)
        return made


def masks_of(rank: int, *, recomputed: bool = False) -> Masks:
    """Of one training step of a model of which ``rank`` has its half of the layers."""
    from lmcore.model.module import enable_activation_checkpointing

    model = model_of(
        "starcoder2", attention_dropout=0.4, residual_dropout=0.3, embedding_dropout=0.2, sliding_window=None
    )
    assert drops(model)
    cut_layers(model, rank, 2, torch.clone, RankDraws(rank, torch.device("cpu")))
    if recomputed:
        enable_activation_checkpointing(model)
    model.train()
    torch.manual_seed(5)
    with Masks() as masks:
        model(input_ids=torch.arange(32).view(2, 16), use_cache=False).logits.sum().backward()
    return masks


def test_ranks_drop_other_attention_weights_and_the_same_of_the_stream() -> None:
    first, second = masks_of(0), masks_of(1)
    assert len(first.of_weights) == len(second.of_weights) == 2
    assert len(first.of_stream) == len(second.of_stream) == 1 + 2 * 2
    assert all(torch.equal(*pair) for pair in zip(first.of_stream, second.of_stream))
    drawn = [*first.of_weights, *second.of_weights]
    assert {mask.shape for mask in drawn} == {(2, 2, 16, 16)}  # half of the heads
    for i, mask in enumerate(drawn):
        kept = mask.float().mean()
        assert 0.5 < kept < 0.7
        for other in drawn[:i]:  # independent: the same in 0.6 x 0.6 + 0.4 x 0.4 of the places
            assert 0.45 < (mask == other).float().mean() < 0.6
    for i, mask in enumerate(first.of_stream):
        assert all(not torch.equal(mask, other) for other in first.of_stream[:i])
    assert all(torch.equal(*pair) for pair in zip(first.of_weights, masks_of(0).of_weights))


def test_recomputation_drops_what_the_forward_dropped() -> None:
    once, again = masks_of(1), masks_of(1, recomputed=True)
    assert all(torch.equal(*pair) for pair in zip(once.of_weights, again.of_weights))
    # Backward comes from the last layer to the first.
    assert all(
        torch.equal(*pair) for pair in zip(once.of_weights, reversed(again.of_weights[2:]), strict=True)
    )
    of_layers = again.of_stream[1:5]
    recomputed = [*again.of_stream[7:9], *again.of_stream[5:7]]
    assert all(torch.equal(*pair) for pair in zip(of_layers, recomputed, strict=True))


class CudaGenerator:
    """A CUDA generator: a seed and an offset."""

    device = torch.device("cuda", 1)

    def __init__(self) -> None:
        self.state = (7, 100)

    def initial_seed(self) -> int:
        return self.state[0]

    def get_offset(self) -> int:
        return self.state[1]

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0  # torch takes no other
        self.state = (self.state[0], offset)

    def manual_seed(self, seed: int) -> None:
        self.state = (seed, 0)

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def test_draws_on_a_gpu_are_decided_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = CudaGenerator()
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    seeds = []
    for rank in (0, 1, 0):
        generator.state = (7, 100)
        draws = RankDraws(rank, torch.device("cuda", 1))
        draws.enter()
        seeds.append(generator.initial_seed())
        generator.set_offset(8)  # something is drawn
        draws.enter()  # the next of three linear layers
        assert generator.state == (seeds[-1], 8)
        draws.leave()
        assert generator.state == (7, 104)
        draws.leave()
        draws.enter()
        assert generator.initial_seed() not in (7, *seeds)
        generator.set_state((7, 200))  # a recomputation was stopped here, and the state before it comes back
        draws.enter()
        draws.leave()
        assert generator.state == (7, 204)
    assert seeds[0] == seeds[2] != seeds[1]


def sums_in_rank() -> list[float]:
    from lmcore.config.schema import EngineConfig, TrainConfig
    from lmcore.engine.engine import Engine

    train = TrainConfig(precision="fp32", tensor_parallel=2)
    engine = Engine(train, EngineConfig(timeout_seconds=200), seed=11)
    loss, flags = torch.tensor([3.0, 4.0]), torch.tensor([float(engine.rank == 1), float(engine.rank == 0)])
    summed = engine.sum_over_ranks(loss, own=flags).tolist()
    engine.close()
    return summed


def test_blocks_are_counted_once_and_flags_of_every_rank() -> None:
    """Ranks that share layers have the same losses; a signal may have come to any of them."""
    assert run_ranks(sums_in_rank, 2) == [[3.0, 4.0, 1.0, 1.0]] * 2
