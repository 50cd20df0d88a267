"""Whole runs by ``train_lm.py`` under every strategy: the same losses, and the same export for transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine_runs import pretend_gpus
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import ROOT, losses, request, train_in_rank, words

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
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "train.txt").write_text(words(300, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(30, 1), encoding="utf-8")
    return folder


def _train_under(argv: list[str], strategy: str) -> int:
    if strategy == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        pretend_gpus()
    return train_in_rank(argv, None, 0)


def run(text: Path, name: str, strategy: str, **options: Any) -> Path:
    if strategy.startswith("zero"):
        options["engine__deepspeed"] = ROOT / "ds_configs" / f"{strategy}.json"
    llama = options.pop("llama")
    argv = request(text, text / name, **SHORT, **options)
    if llama:  # instead of the small GPT-2
        kept = [i for i in range(0, len(argv), 2) if not argv[i].startswith("--model.")]
        argv = [part for i in kept for part in argv[i : i + 2]]
        argv += [part for k, v in LLAMA.items() for part in (f"--{k.replace('__', '.')}", v)]
    world_size = 1 if strategy == "single" else 2
    codes = run_ranks(_train_under, world_size, argv, strategy, timeout=240, launched=strategy != "single")
    assert codes == [0] * world_size
    return text / name


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
def test_a_run_trains_and_exports_the_same_model(
    text: Path, strategy: str, llama: bool, precision: str
) -> None:
    """Tied GPT-2 and untied Llama; the export in bf16 where training was."""
    from transformers import AutoModelForCausalLM

    options = {"llama": llama, "train__precision": precision, "checkpoint__export_dtype": precision}
    kind = f"{'llama' if llama else 'gpt2'}-{precision}"
    alone = text / f"single-{kind}"
    if not alone.exists():
        run(text, alone.name, "single", **options)
    other = run(text, f"{strategy}-{kind}", strategy, **options)
    close = 1e-5 if precision == "fp32" else 2e-3  # as in test_engine.py
    assert losses(other) == pytest.approx(losses(alone), rel=close)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p / "export", dtype="auto") for p in (other, alone))
    assert ours.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == (not llama)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        one, two = (m.float()(input_ids=ids).logits for m in (ours, theirs))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3 if precision == "fp32" else 0.1)
