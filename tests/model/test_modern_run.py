"""Whole runs of the modern preset with muon, rates by kind and momentum warm-up: resume, export, DDP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.errors import EXIT_FINISHED, EXIT_SAVED
from lmcore.saved import load
from tests.support.whole_runs import assert_same_state, losses, request, train, weights, words

SMALL = {
    "model.preset": "modern",
    "model.config.num_hidden_layers": 2,
    "model.config.hidden_size": 32,
    "model.config.intermediate_size": 64,
    "model.config.num_attention_heads": 2,
    "model.config.num_key_value_heads": 2,
    "optim.name": "muon",
    "optim.lr_multipliers.embedding": 3.0,
    "optim.lr_multipliers.head": 0.5,
    "optim.momentum_warmup": "4 steps",
    "optim.cautious_weight_decay": "true",
    "optim.schedule": "linear",
    "optim.min_lr_ratio": 0,
    "optim.warmup": "never",
    "train.duration": "8 steps",
}


def modern(text: Path, run_dir: Path, **options: Any) -> list[str]:
    argv = request(text, run_dir, **options)
    for name in ("n_layer", "n_head", "n_embd", "n_positions"):
        place = argv.index(f"--model.config.{name}")
        del argv[place : place + 2]
    return argv + [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(400, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(40, 1), encoding="utf-8")
    assert train(modern(folder, folder / "whole")) == [EXIT_FINISHED]
    return folder


def test_muon_resume_is_bit_exact_with_momentum_warmup_and_multipliers(text: Path) -> None:
    stopped = text / "stopped"
    assert train(modern(text, stopped), kill_before_step=3) == [EXIT_SAVED]
    assert train(modern(text, stopped)) == [EXIT_FINISHED]
    assert losses(stopped) == losses(text / "whole")
    assert_same_state(weights(stopped), weights(text / "whole"))
    values = list(losses(text / "whole").values())
    assert values[-1] < values[0] - 0.1


def test_modern_export_is_a_plain_model_with_softcapped_logits(text: Path) -> None:
    trained = load.load_model(text / "whole", device="cpu")
    plain: Any = load.open_export(text / "whole" / "export").eval()
    assert plain.__class__.__name__ == "NanoChatForCausalLM"
    ids = torch.arange(300).reshape(-1, 30)
    real = plain.config.vocab_size
    with torch.no_grad():
        found = plain(input_ids=ids).logits
        expected = trained.model(input_ids=ids).logits[..., :real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) < plain.config.final_logit_softcapping


def test_muon_ddp_follows_one_process(text: Path) -> None:
    one = text / "whole"
    assert train(modern(text, text / "two"), 2) == [EXIT_FINISHED] * 2
    for step, loss in losses(one).items():  # muon's bf16 iteration amplifies the rounding of other sums
        assert math.isclose(loss, losses(text / "two")[step], rel_tol=1e-3), step
