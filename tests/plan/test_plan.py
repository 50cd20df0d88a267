"""The plan: its memory against what torch's profiler counts, its FLOPs against the formula, its arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from lmcore import humanize
from lmcore.model import optim
from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss, enable_activation_checkpointing
from lmcore.plan import plan
from lmcore.plan.trace import (
    StepTrace,
    build_on_meta,
    count_flops,
    optimizer_bytes,
    part_of_rank,
    trace_step,
)
from tests.support.plan_runs import Case, make_module, measure, measured_resident_bytes

GPT2 = {"n_layer": 6, "n_embd": 256, "n_head": 4}
LLAMA = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 704,
}  # fmt: skip
# DeepSpeed's buckets are of a fixed size, which would hide everything else in a model of a few million parameters.
ZERO = {"reduce_bucket_size": 200_000, "stage3_prefetch_bucket_size": 100_000}
GPT2_CASE = Case(fields=GPT2, vocab_size=4_000, block_size=128, micro_batch_blocks=4)
LLAMA_CASE = replace(GPT2_CASE, type="llama", fields=LLAMA, precision="bf16")
LARGE = {"n_layer": 12, "n_embd": 512, "n_head": 8}
LARGE_CASE = replace(GPT2_CASE, fields=LARGE, vocab_size=16_000, micro_batch_blocks=2)

QUICK = {
    "gpt2 fp32": replace(GPT2_CASE, fields=GPT2 | {"n_layer": 4}, vocab_size=2_000, block_size=64),
    "llama bf16, recomputed, accumulated": replace(
        LLAMA_CASE,
        fields=LLAMA | {"num_hidden_layers": 4},
        vocab_size=2_000,
        block_size=64,
        checkpointing=True,
        accumulation=2,
    ),
}
SLOW = {
    "gpt2 fp32, longer": GPT2_CASE,
    "llama bf16, recomputed, accumulated, longer": replace(LLAMA_CASE, checkpointing=True, accumulation=2),
    "llama bf16, accumulated": replace(LLAMA_CASE, accumulation=2),
    "mixtral bf16, recomputed": replace(
        LLAMA_CASE, type="mixtral", fields=LLAMA | {"num_local_experts": 4}, checkpointing=True
    ),
    "gpt2 large fp32": LARGE_CASE,
    "gpt2 large bf16 weights": replace(LARGE_CASE, precision="bf16", param_dtype="bf16"),
    "gpt2 sgd, plain head": replace(GPT2_CASE, optimizer="sgd", chunk=0),
    "ddp gpt2": replace(GPT2_CASE, strategy="ddp", world_size=2),
    "ddp llama, accumulated": replace(LLAMA_CASE, strategy="ddp", world_size=2, accumulation=2),
    "fsdp2 gpt2": replace(GPT2_CASE, strategy="fsdp2", world_size=2),
    "fsdp2 llama bf16": replace(LLAMA_CASE, strategy="fsdp2", world_size=2),
    "zero1 gpt2": replace(GPT2_CASE, strategy="zero1", world_size=2, zero=ZERO),
    "zero2 gpt2 bf16": replace(GPT2_CASE, strategy="zero2", world_size=2, zero=ZERO, precision="bf16"),
    "zero2 gpt2, accumulated": replace(GPT2_CASE, strategy="zero2", world_size=2, zero=ZERO, accumulation=2),
    "zero3 gpt2": replace(GPT2_CASE, strategy="zero3", world_size=2, zero=ZERO),
    "zero3 llama bf16": replace(LLAMA_CASE, strategy="zero3", world_size=2, zero=ZERO),
}
# About 100 million parameters: short blocks, so that weights, gradients and moments are most of it, and few steps.
GPT2_100M = Case(vocab_size=50_257, block_size=64, micro_batch_blocks=1, steps=2)
LLAMA_100M = replace(
    GPT2_100M,
    type="llama",
    fields={
        "hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 5,
        "intermediate_size": 1_728,
    },
    vocab_size=32_000,
)  # fmt: skip
LARGE_MODELS = {
    "gpt2 124M fp32": GPT2_100M,
    "gpt2 124M bf16, recomputed, longer": replace(
        GPT2_100M, precision="bf16", checkpointing=True, block_size=128, micro_batch_blocks=2
    ),
    "gpt2 124M bf16 weights": replace(GPT2_100M, precision="bf16", param_dtype="bf16"),
    "llama 100M fp32": LLAMA_100M,
    "llama 100M bf16, accumulated": replace(LLAMA_100M, precision="bf16", accumulation=2),
    "ddp llama 100M": replace(LLAMA_100M, strategy="ddp", world_size=2),
    "zero2 llama 100M": replace(
        LLAMA_100M, strategy="zero2", world_size=2, precision="bf16", zero={"reduce_bucket_size": 20_000_000}
    ),
}


def make_optimizer(name: str, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return optim.build_optimizer(name, optim.parameter_groups(named, weight_decay=0.1), lr=1e-3)


def planned_bytes(case: Case) -> int:
    module = make_module(case)
    if case.checkpointing:
        enable_activation_checkpointing(module.model)
    setting = plan.Setting(
        strategy=case.strategy,
        world_size=case.world_size,
        precision=case.precision,
        param_dtype=case.param_dtype,
        micro_batch_blocks=case.micro_batch_blocks,
        accumulation=case.accumulation,
        activation_checkpointing=case.checkpointing,
        zero_bucket=case.zero.get("reduce_bucket_size", plan.ZERO_BUCKET),
    )
    autocast, weights = setting.casts
    held = trace_step(
        module,
        micro_batch_blocks=case.micro_batch_blocks,
        block_size=case.block_size,
        autocast=autocast,
        weights=weights,
    )
    state = optimizer_bytes(
        module,
        partial(make_optimizer, case.optimizer),
        weights=weights if setting.param_dtype == "bf16" else None,
    )
    return plan.memory(plan.parameters(module), held, setting, optimizer_bytes=state).total


@pytest.mark.parametrize("name", QUICK)
def test_planned_memory_is_within_a_tenth_of_the_measured_peak(name: str) -> None:
    assert planned_bytes(QUICK[name]) == pytest.approx(measure(QUICK[name]), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_planned_memory_of_every_strategy(name: str) -> None:
    planned, measured = planned_bytes(SLOW[name]), measure(SLOW[name])
    for _ in range(5 if SLOW[name].world_size > 1 else 0):
        # gloo's threads hold buffers of finished collectives, more or fewer as the ranks are ahead of one another (188
        # to 206 MB were measured for one case): that only adds, so the least of some launches is what is needed.
        if measured <= planned / 0.9:
            break
        measured = min(measured, measure(SLOW[name]))
    assert 0.9 * measured <= planned <= 1.1 * measured


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_MODELS)
def test_planned_memory_of_100_million_parameters(name: str) -> None:
    """Tensors within a tenth; what is in RAM, with fragments and libraries, within a quarter."""
    case, planned = LARGE_MODELS[name], planned_bytes(LARGE_MODELS[name])
    assert planned == pytest.approx(measure(case), rel=0.1)
    # Which holds copies while it prepares, and a CPU keeps what is freed
    if not case.strategy.startswith("zero"):
        assert planned == pytest.approx(measure(case, measured_resident_bytes), rel=0.25)


# --- the traced ---


def without_weights(fields: dict[str, int], vocab_size: int) -> ModelWithLoss:
    model, probe = build_on_meta(type="gpt2", config_overrides=fields, vocab_size=vocab_size)
    return ModelWithLoss(model, probe=probe)


@cache
def small() -> ModelWithLoss:
    fields = {"n_layer": 3, "n_embd": 64, "n_head": 2, "n_positions": 64}
    return ModelWithLoss(
        build_model(type="gpt2", config_overrides=fields, vocab_size=640, block_size=64, seed=0)
    )


def held_bytes(module: nn.Module = None, **options: int) -> int:
    blocks = options.pop("micro_batch_blocks", 2)
    found = trace_step(module or small(), micro_batch_blocks=blocks, block_size=64, **options)
    return sum(found.peak())


def test_trace_step_changes_nothing_and_computes_nothing() -> None:
    before = {name: p.detach().clone() for name, p in small().named_parameters()}
    state = torch.get_rng_state()
    trace_step(small(), micro_batch_blocks=4, block_size=64)
    count_flops(small(), micro_batch_blocks=4, block_size=64)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in small().named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_model_on_meta_has_the_same_parameters() -> None:
    fields = {"n_layer": 3, "n_embd": 64, "n_head": 2, "n_positions": 64}
    bare = without_weights(fields, 640)
    assert bare.head_path == small().head_path == "chunked"
    assert plan.parameters(bare) == plan.parameters(small())
    for traced in (trace_step, count_flops):
        real, fake = (traced(module, micro_batch_blocks=2, block_size=64) for module in (small(), bare))
        assert real == fake


def test_memory_grows_with_the_micro_batch_and_shrinks_by_recomputation() -> None:
    sizes = [held_bytes(micro_batch_blocks=blocks) for blocks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    fields = {"n_layer": 8, "n_embd": 64, "n_head": 2, "n_positions": 64}
    deep = ModelWithLoss(
        build_model(type="gpt2", config_overrides=fields, vocab_size=640, block_size=64, seed=0)
    )
    before = held_bytes(deep, micro_batch_blocks=8)
    recomputed = held_bytes(deep, micro_batch_blocks=8, activation_checkpointing=True)
    second = held_bytes(deep, micro_batch_blocks=8, activation_checkpointing=2)
    assert recomputed < second < before
    assert held_bytes(deep, micro_batch_blocks=8) == before, "the module itself is as it was"
    enable_activation_checkpointing(deep.model)
    assert held_bytes(deep, micro_batch_blocks=8) == recomputed < before / 2


def test_flops_are_those_of_the_formula() -> None:
    fields = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128}
    module = without_weights(fields, 8_000)
    found = count_flops(module, micro_batch_blocks=2, block_size=128)
    counted = plan.parameters(module)
    formula = plan.flops_per_token(counted, positions=128 * 128, block_size=128, tied=True)
    assert formula == 6 * (counted.total - 128 * 128) + 12 * 4 * 128 * 128
    assert found / (2 * 128) == pytest.approx(formula, rel=0.05)  # biases and norms are no products


SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
EXPERTS = {"intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 64, "max_position_embeddings": 512},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 1, "intermediate_size": 128},
    "lfm2": {"num_key_value_heads": 2, "intermediate_size": 192, "layer_types": ["conv", "full_attention"]},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_the_formula_are_those_that_are_counted(family: str) -> None:
    fields = SHAPE | FAMILIES[family]
    model, probe = build_on_meta(type=family, config_overrides=fields, vocab_size=2_000)
    module = ModelWithLoss(model, probe=probe)
    found = count_flops(module, micro_batch_blocks=2, block_size=128) / (2 * 128)
    assert plan.model_flops_per_token(module, 128) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_routed_experts_are_traced_and_their_flops_counted(
    autocast: torch.dtype | None, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    few, many = (
        build_on_meta(
            type="mixtral",
            config_overrides=fields | {"intermediate_size": 128, "num_experts_per_tok": each},
            vocab_size=640,
        )[0]
        for each in (1, 2)
    )
    flops = [
        count_flops(ModelWithLoss(model), micro_batch_blocks=2, block_size=64, autocast=autocast)
        for model in (few, many)
    ]
    assert flops[1] - flops[0] == 2 * 6 * 2 * 64 * (3 * 64 * 128)
    held = held_bytes(ModelWithLoss(many), autocast=autocast)
    assert held > held_bytes(ModelWithLoss(few), autocast=autocast)
    assert held > held_bytes(ModelWithLoss(many), autocast=autocast, activation_checkpointing=True)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("name", "per_parameter"), [("adamw", 8), ("sgd", 4)])
def test_optimizer_state_is_counted(name: str, per_parameter: int) -> None:
    total = plan.parameters(small()).total
    assert optimizer_bytes(small(), partial(make_optimizer, name)) == pytest.approx(
        per_parameter * total, rel=0.01
    )
    # Adafactor looks at numbers, and there are none: it is taken for Adam, which is too much rather than too little.
    assert optimizer_bytes(small(), partial(make_optimizer, "adafactor")) == 8 * total


# --- the formulas, by hand ---

COUNTED = plan.Parameters(
    total=1_000, trained=1_000, groups={"embeddings": 200, "attention": 800}, outside_layers=200,
    largest_layer=200, layers=4, attention_width=40, buffer_bytes=0,
)  # fmt: skip
HELD = StepTrace(moments=((0, 0, 0, 0, 0), (50, 30, 0, 0, 0), (40, 0, 0, 1_600, 0), (0, 0, 0, 3_200, 800)))


@pytest.mark.parametrize(
    ("setting", "weights", "gradients", "optimizer"),
    [
        (plan.Setting(), 4_000, 4_000, 8_000),
        (plan.Setting(accumulation=2), 4_000, 4_000, 8_000),
        (plan.Setting(strategy="ddp", world_size=4), 4_000, 4_000, 8_000),
        (plan.Setting(strategy="ddp", world_size=4, accumulation=2), 4_000, 8_000, 8_000),
        # 1,000 in shards and 800 of what is outside of the layers, not reduced yet
        (plan.Setting(strategy="fsdp2", world_size=4, accumulation=2), 1_000, 1_800, 2_000),
        (plan.Setting(strategy="zero1", world_size=4), 4_000, 1_000, 3_000),
        (plan.Setting(strategy="zero1", world_size=4, precision="bf16"), 2_000, 4_000, 3_000),
        (plan.Setting(strategy="zero2", world_size=4, precision="bf16"), 2_000, 1_000, 3_000),
        (plan.Setting(strategy="zero3", world_size=4, precision="bf16"), 500, 1_000, 3_000),
        (plan.Setting(strategy="zero3", world_size=4, precision="bf16", offload_optimizer=True), 500, 0, 0),
    ],
)  # fmt: skip
def test_memory_terms_of_each_strategy(
    setting: plan.Setting, weights: int, gradients: int, optimizer: int
) -> None:
    found = plan.memory(COUNTED, HELD, setting, optimizer_bytes=8_000)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.host == (4_000 if setting.offload_optimizer else 0)


def test_zero2_counts_gradients_and_buckets_when_backward_has_made_them() -> None:
    """DeepSpeed frees its share after the update; under accumulation it stays from micro-batch to micro-batch."""
    setting = plan.Setting(strategy="zero2", world_size=4, precision="bf16", zero_bucket=100)
    counted = replace(COUNTED, largest_tensor=50)

    def at(*moments: tuple[int, ...], **changes: Any) -> plan.Memory:
        traced = StepTrace(moments=((0,) * 5, *moments, (0, 0, 0, 3_200, 800)))
        return plan.memory(counted, traced, replace(setting, **changes), optimizer_bytes=8_000)

    head, middle = (2_000, 600, 0, 0, 0), (700, 0, 0, 1_600, 0)
    found = at(head, middle)
    assert (found.activations, found.logits, found.gradients, found.buffers) == (2_000, 600, 0, 0)
    # 400 of 1,000 gradients; two buckets and the largest gradient in 16 bits, and a bucket in fp32.
    found = at(middle, (900, 0, 0, 0, 0))
    assert (found.activations, found.gradients, found.buffers) == (700, 400, 400 + 100 + 400)
    found = at(head, middle, accumulation=2)
    assert (found.activations, found.logits, found.gradients, found.buffers) == (2_000, 600, 1_000, 400)
    assert at(head, middle, offload_optimizer=True).host == 4_000


def test_fitting_micro_batch_divides_and_fits() -> None:
    for share in (1, 12, 30, 64):
        for capacity in (0, 5, 17, 10_000):
            fitting = [size for size in range(1, share + 1) if share % size == 0 and 3 * size <= capacity]
            assert plan.largest_micro_batch(share, capacity, lambda size: 3 * size) == max(fitting, default=1)


def test_advice_names_changes_that_fit() -> None:
    setting = plan.Setting(micro_batch_blocks=8)

    def needs(changed: plan.Setting) -> int:
        return changed.micro_batch_blocks * (1 if changed.precision == "bf16" else 2)

    advice = plan.advise(setting, 10, needs)
    assert len(advice) == 3
    assert all(size <= plan.USABLE * 10 for _, size in advice)
    assert advice[0] == ("--train.precision bf16", 8)
    (together,) = plan.advise(setting, 2, needs)
    assert " and " in together[0]
    assert together[1] < 8


def test_plan_shows_its_arithmetic() -> None:
    made = plan.Plan(
        parameters=COUNTED, setting=plan.Setting(world_size=2, micro_batch_blocks=4, accumulation=3),
        memory=plan.memory(COUNTED, HELD, plan.Setting(), optimizer_bytes=8_000), device_bytes=1_000,
        advice=(("x", 5),),
        flops_per_token=6_000, flops_counted=5_900, block_size=10, steps=100, tokens_per_step=240, epoch_tokens=12_000,
        checkpoint_bytes=12_000, checkpoints_kept=4, tokens_per_second=10,
    )  # fmt: skip
    text = humanize.table(made.rows())
    for word in (
        "2 x 3 x 4 x 10",
        "240 tokens",
        "100 steps",
        "2 epochs",
        "24; about 20 are best above 70M parameters",
        "does not fit",
        "would fit with",
    ):
        assert word in text, text
    assert (made.tokens, made.seconds, made.fits) == (24_000, 2_400, False)
    assert made.numbers()["steps"] == 100
    large = replace(made, parameters=replace(COUNTED, total=100_000_000))
    assert dict(large.rows())["tokens per parameter"].startswith("0.00024; about 20 make the best model")


def test_advice_that_is_not_enough_does_not_say_that_it_is() -> None:
    setting = plan.Setting()
    needed = plan.memory(COUNTED, HELD, setting, optimizer_bytes=8_000)
    for bytes_needed, label in ((900, "it would fit with"), (950, "least memory by")):
        made = plan.Plan(
            parameters=COUNTED, setting=setting, memory=needed, device_bytes=1_000, advice=(("x", bytes_needed),),
            flops_per_token=1, flops_counted=1, block_size=10, steps=1, tokens_per_step=10, epoch_tokens=None,
            checkpoint_bytes=1, checkpoints_kept=1,
        )  # fmt: skip
        assert label in dict(made.rows())


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD Instinct MI300X", 1307),
        ("CPU", None),
    ],
)
def test_peaks_are_those_of_the_device_and_no_other(device: str, teraflops: float | None) -> None:
    assert plan.peak_flops(device, "bf16") == (None if teraflops is None else teraflops * 1e12)
    assert plan.peak_flops(device, "fp32") is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharing_blocks_divides_activations_but_for_keys_and_values(family: str) -> None:
    """Of c ranks each holds 1/c of what grows with the tokens, and keys and values of T (1 + 1/2c) tokens a layer."""
    fields: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    if family == "llama":
        fields |= {"intermediate_size": 192, "num_key_value_heads": 1, "max_position_embeddings": 512}
    else:
        fields = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 512}
        fields |= {f"{part}_pdrop": 0.0 for part in ("attn", "resid", "embd")}
    built = build_model(
        type=family, config_overrides=fields, vocab_size=256, block_size=512, seed=0, special_ids={}
    )
    module = ModelWithLoss(built)

    def held(size: int) -> int:
        traced = trace_step(module, micro_batch_blocks=2, block_size=512, context_parallel=size)
        return sum(traced.peak(gradients=0.0, other_gradients=0.0, copies=0.0))

    whole, groups = held(1), 1 if family == "llama" else 4
    for size in (2, 4):
        keys_and_values = 4 * 2 * 2 * 512 * (1 + 1 / (2 * size)) * groups * 16 * 4
        assert held(size) == pytest.approx(whole / size + keys_and_values, rel=0.15)


def test_sharing_layers_divides_what_is_cut_and_nothing_else() -> None:
    """Of t ranks each holds 1/t of the linear layers, and of what is computed between their two cuts."""
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 4, "max_position_embeddings": 128}
    built = build_model(
        type="llama", config_overrides=fields, vocab_size=320, block_size=128, seed=0, special_ids={}
    )
    module = ModelWithLoss(built)
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 256)

    def adamw(named: list[tuple[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named])

    def activations(one: Any) -> int:
        traced = trace_step(one, micro_batch_blocks=2, block_size=128)
        return traced.peak(gradients=0.0, other_gradients=0.0, copies=0.0)[plan.ACTIVATIONS]

    whole = plan.parameters(module)
    for size in (2, 4):
        part = part_of_rank(module, size)
        counted = plan.parameters(part)
        assert whole.total - counted.total == linear - linear // size
        assert optimizer_bytes(part, adamw) == pytest.approx(8 * counted.total, rel=1e-3)
        # At least gate, up, their product and its activation of each layer are divided.
        between = 2 * 4 * 2 * 128 * 256 * 4
        assert activations(module) - activations(part) >= between - between // size
    assert plan.parameters(module) == whole  # the module itself is not changed
    setting = plan.Setting(strategy="ddp", world_size=4, tensor_parallel=2)
    assert (setting.data_world_size, plan.setting_of_part(setting).world_size) == (2, 2)
    assert plan.setting_of_part(replace(setting, world_size=2)).strategy == "single"
