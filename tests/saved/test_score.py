"""Scoring a saved model uses the model's own context, whatever its family calls the number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.saved.load import Saved
from lmcore.saved.score import score

SMALL_MPT = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}


def test_evaluation_block_is_the_models_context(tmp_path: Path) -> None:
    words = train_tokenizer(["def f(x):\n    return x + 1\n"] * 40, vocab_size=300)
    model = build_model(
        type="mpt", config_overrides=SMALL_MPT, vocab_size=words.vocab_size, block_size=64, seed=0
    )
    lengths: set[int] = set()
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: lengths.add(inputs[0].shape[1])
    )
    (tmp_path / "text.txt").write_text("def g(y):\n    return y * 2\n" * 60)
    saved = Saved(model=model.eval(), tokenizer=words, path=tmp_path, kind="export", step=None, run_dir=None)
    found = score(saved, {"held": [str(tmp_path / "text.txt")]})
    assert lengths == {64}
    assert found["held"].tokens > 64
    with torch.no_grad(), pytest.raises(RequestError, match="context of 64"):
        score(saved, {"held": [str(tmp_path / "text.txt")]}, block_size=65)
