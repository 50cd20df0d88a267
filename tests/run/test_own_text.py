"""Defaults for a text without a recipe: they fit its size, and what the user sets stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig
from lmcore.errors import RequestError
from lmcore.report.metrics import read_metrics
from lmcore.run import own_text
from tests.support.whole_runs import request, train, words


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text\n" * 1_000)
    return tmp_path


def configure(text: Path, *argv: str) -> tuple[RunConfig, list[str]]:
    notes: list[str] = []
    words = ["--data.train", str(text / "*.txt"), *argv]
    return parse(words, note=notes.append, own_text=own_text.defaults), notes


def grown(text: Path, n_bytes: int) -> Path:
    with (text / "a.txt").open("r+b") as file:
        file.truncate(n_bytes)  # sparse: only its size is looked at
    return text


@pytest.mark.parametrize("n_bytes", [1, 10**4, 10**6, 10**7, 10**8, 10**9, 10**11])
def test_a_larger_text_gets_a_larger_model_with_a_smaller_rate(text: Path, n_bytes: int) -> None:
    small, _ = configure(text)
    large, _ = configure(grown(text, n_bytes))
    assert large.model.config["n_embd"] >= small.model.config["n_embd"]
    assert large.model.config["n_embd"] % large.model.config["n_head"] == 0
    assert large.optim.lr <= small.optim.lr
    assert large.data.block_size == large.model.config["n_positions"]
    assert large.train.duration.unit == "steps"
    assert large.train.duration.value >= 100
    assert large.evaluate.prompts == ["auto"]


def test_each_default_is_explained_and_each_option_overrides_its_own(text: Path) -> None:
    argv = [
        "--optim.lr",
        "0.5",
        "--train.duration",
        "7 steps",
        "--model.config.n_layer",
        "1",
        "--evaluate.prompts",
        "a",
    ]
    config, notes = configure(text, *argv)
    assert (config.optim.lr, str(config.train.duration), config.evaluate.prompts) == (0.5, "7 steps", ["a"])
    assert config.model.config["n_layer"] == 1
    assert config.model.config["n_embd"] == 64
    told = "\n".join(notes)
    assert "tokenizer.vocab_size" in told
    assert "optim.lr" not in told
    assert "train.duration" not in told
    assert configure(text, *argv) == (config, notes), "the same command, the same run"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_other_model_types_get_sizes_too(text: Path, kind: str) -> None:
    config, _ = configure(text, "--model.type", kind)
    assert config.model.config["hidden_size"] == 64
    assert config.model.type == kind
    assert configure(text, "--model.type", kind, "--model.config.hidden_size", "64")[0].model.config == {
        "hidden_size": 64
    }


def test_a_pretrained_model_gets_a_fine_tuning_rate_and_keeps_its_own_sizes(text: Path) -> None:
    config, _ = configure(text, "--model.from_pretrained", "owner/name")
    assert config.optim.lr == own_text.FINE_TUNING_RATE
    assert config.model.config == {}
    assert config.data.block_size is None


def test_a_missing_file_is_refused_when_its_size_is_asked(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"\*.txt"):
        configure(tmp_path)


def test_samples_continue_the_beginnings_of_the_validation_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(words(200, 0), encoding="utf-8")
    (tmp_path / "held.txt").write_text(words(40, 1), encoding="utf-8")
    run_dir = tmp_path / "run"
    options = {"train__duration": "2 steps", "evaluate__every": "never", "evaluate__prompts": "auto"}
    assert train(request(tmp_path, run_dir, **options)) == [0]
    prompts = [record["prompt"] for record in read_metrics(run_dir / "metrics.jsonl", kind="sample")]
    held = (tmp_path / "held.txt").read_text(encoding="utf-8")
    assert 1 <= len(prompts) <= 3
    assert all(prompt.strip() in held for prompt in prompts), prompts
