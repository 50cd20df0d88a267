"""Whole runs by ``train_lm.py`` under every strategy: the same losses, and the same export for transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine_runs import pretend_gpus
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import ROOT, losses, request, train_in_rank, write_texts

LLAMA = {
    "model__type": "llama",
    "model__config": "{hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: false}",
}
SHORT = {
    "train__duration": "4 steps",
    "checkpoint__every": "2 steps",
    "evaluate__every": "never",
    "train__micro_batch_blocks": 3,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("strategies"), train=300, held=30)


def _train_under(argv: list[str], strategy: str) -> int:
    if strategy == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        pretend_gpus()
    return train_in_rank(argv, None, 0)


def run(text: Path, name: str, strategy: str, **options: Any) -> Path:
    if strategy.startswith("zero"):
        options["engine__deepspeed"] = ROOT / "ds_configs" / f"{strategy}.json"
    llama = options.pop("llama")
    argv = request(text, text / name, **SHORT | options)
    if llama:  # instead of the small GPT-2
        kept = [i for i in range(0, len(argv), 2) if not argv[i].startswith("--model.")]
        argv = [part for i in kept for part in argv[i : i + 2]]
        argv += [part for k, v in LLAMA.items() for part in (f"--{k.replace('__', '.')}", v)]
    world_size = 1 if strategy == "single" else 2
    codes = run_ranks(_train_under, world_size, argv, strategy, timeout=240, launched=strategy != "single")
    assert codes == [0] * world_size
    return text / name


def samples(run_dir: Path) -> dict[tuple[int, str], str]:
    """Step and prompt -> continuation."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], r["prompt"]): r["text"] for r in records if r["kind"] == "sample"}


PAIRS = [("fsdp2", False, "fp32"), ("zero3", True, "fp32")]
REST = [
    (strategy, llama, precision)
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for llama in (False, True)
    for precision in ("fp32", "bf16")
    if (strategy, llama, precision) not in PAIRS
]


@pytest.mark.parametrize(
    ("strategy", "llama", "precision"), [*PAIRS, *(pytest.param(*p, marks=pytest.mark.slow) for p in REST)]
)
def test_run_trains_and_exports_the_same_model(
    text: Path, strategy: str, llama: bool, precision: str
) -> None:
    """Tied GPT-2 and untied Llama; the export in bf16 where training was; the samples on the way, in fp32."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "llama": llama,
        "train__precision": precision,
        "checkpoint__export_dtype": precision,
    }
    options |= {"evaluate__every": "2 steps", "evaluate__prompts": "[a, the]", "evaluate__sample_tokens": 40}
    kind = f"{'llama' if llama else 'gpt2'}-{precision}"
    alone = text / f"single-{kind}"
    if not alone.exists():
        run(text, alone.name, "single", **options)
    other = run(text, f"{strategy}-{kind}", strategy, **options)
    close = 1e-5 if precision == "fp32" else 2e-3  # as in test_engine.py
    assert losses(other) == pytest.approx(losses(alone), rel=close)
    written = samples(alone)
    assert len(written) == 4
    assert precision != "fp32" or samples(other) == written
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p / "export", dtype="auto") for p in (other, alone))
    assert ours.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == (not llama)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        one, two = (m.float()(input_ids=ids).logits for m in (ours, theirs))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3 if precision == "fp32" else 0.1)


GROWTH = {
    "llama": False, "optim__weight_decay": "linear 0.2 0", "optim__schedule": "linear_to_zero",
    "train__global_batch_blocks": "0: 6, 1 steps: 24, 3 steps: 12",
}  # fmt: skip


@pytest.mark.parametrize(
    "strategy",
    ["zero2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ddp", "fsdp2", "zero1", "zero3"))],
)
def test_global_batch_grows_under_every_strategy(text: Path, strategy: str) -> None:
    """1, 4, 4 and 2 micro-batches a step on each of two ranks; one process takes twice as many."""
    options = GROWTH | {f"model__config__{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    alone = text / "single-growth"
    if not alone.exists():
        run(text, alone.name, "single", **options)
    expected, found = losses(alone), losses(run(text, f"{strategy}-growth", strategy, **options))
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for step, loss in expected.items():  # the order of float32 sums differs
        assert found[step] == pytest.approx(loss, rel=1e-5), step


MUON = GROWTH | {
    "optim__name": "muon",
    "optim__lr_multipliers__embedding": 2,
    "optim__lr_multipliers__vectors": 0.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_muon_with_rates_by_kind_and_a_growing_batch(text: Path, strategy: str) -> None:
    """20 steps follow one process. Muon orthogonalizes in bfloat16, whose rounding the order of sums can change."""
    options = MUON | {f"model__config__{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    options |= {
        "train__duration": "20 steps",
        "train__global_batch_blocks": "0: 6, 5 steps: 24, 12 steps: 12",
    }
    alone = text / "single-muon-growth"
    if not alone.exists():
        run(text, alone.name, "single", **options)
    expected, found = losses(alone), losses(run(text, f"{strategy}-muon-growth", strategy, **options))
    assert sorted(found) == sorted(expected) == list(range(1, 21))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=2e-4), step
