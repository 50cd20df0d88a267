"""Scoring a saved model uses its own context, whatever its family calls the number, and gives it text as its training did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.model.evaluate import Evaluation
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


def test_text_is_scored_as_the_model_was_trained(tmp_path: Path) -> None:
    """Without end-of-sequence tokens, and with blocks in which documents do not see each other, if that was the training."""
    words = train_tokenizer(["def f(x):\n    return x + 1\n"] * 40, vocab_size=300)
    model = build_model(
        type="gpt2",
        config_overrides={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64},
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=64,
        seed=0,
    )
    with torch.no_grad():  # so that the context matters
        for parameter in model.parameters():
            parameter.mul_(4)
    (tmp_path / "text.txt").write_text("def g(y):\n\nreturn y * 2\n\n" * 4)

    def scored(asked: str | None = "paragraph", **trained: Any) -> Evaluation:
        saved = Saved(
            model=model.eval(),
            tokenizer=words,
            path=tmp_path,
            kind="export",
            step=None,
            run_dir=None,
            **trained,
        )
        return score(saved, {"held": [str(tmp_path / "text.txt")]}, unit=asked)["held"]

    usual, without_eos, masked = scored(), scored(eos=False), scored(document_mask=True)
    assert without_eos.tokens == usual.tokens - 8, "each of the 8 documents ends with one"
    assert masked.tokens == usual.tokens
    of_the_run = scored(None, unit="file")
    assert of_the_run == scored("file") == scored("file", unit="line")
    assert of_the_run.tokens != scored(None).tokens, "data.unit of the run"
    assert masked.loss != pytest.approx(usual.loss, rel=1e-3)


def test_blocks_are_as_long_as_in_training(tmp_path: Path) -> None:
    """A run with ``data.block_size`` below the model's context never trained the positions after it."""
    words = train_tokenizer(["def f(x):\n    return x + 1\n"] * 40, vocab_size=300)
    model = build_model(
        type="gpt2",
        config_overrides={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64},
        vocab_size=words.vocab_size,
        block_size=16,
        seed=0,
    )
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    (tmp_path / "text.txt").write_text("def g(y):\n    return y * 2\n" * 60)
    saved = Saved(
        model=model.eval(),
        tokenizer=words,
        path=tmp_path,
        kind="export",
        step=None,
        run_dir=None,
        block_size=16,
    )
    score(saved, {"held": [str(tmp_path / "text.txt")]}, blocks=1)
    score(saved, {"held": [str(tmp_path / "text.txt")]}, blocks=1, block_size=32)
    assert lengths == [16, 32]
