"""Defaults for a text without a recipe: they fit its size, and what the user sets stays."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lmcore.cli.size import requested
from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.report.metrics import read_metrics
from lmcore.run import own_text
from lmcore.run.setup import build_model
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
def test_larger_text_gets_a_larger_model_and_a_smaller_learning_rate(text: Path, n_bytes: int) -> None:
    small, _ = configure(text)
    large, _ = configure(grown(text, n_bytes))
    assert large.model.config["hidden_size"] >= small.model.config["hidden_size"]
    assert large.model.config["hidden_size"] % (2 * large.model.config["num_attention_heads"]) == 0, "rotary"
    assert large.optim.lr <= small.optim.lr
    assert large.data.block_size == large.model.config["max_position_embeddings"]
    assert large.train.duration.unit == "steps"
    assert large.train.duration.value >= 100
    assert large.evaluate.prompts == ["auto"]


def test_reasons_say_what_decided(text: Path) -> None:
    (text / "a.txt").write_text("some text\n" * 100)
    _, notes = configure(text, "--data.block_size", "512")
    lines = {note.split()[0]: note for note in notes}
    assert lines["model.config"].endswith("context 512"), "a longer block is a longer context"
    assert lines["train.duration"].endswith("100 steps: about 1,638 passes over the text, at least 100 steps")
    _, notes = configure(grown(text, 10**6))
    assert any("about 4 passes over the text, at most 600 steps" in note for note in notes)


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


def test_muon_and_the_modern_architecture_are_the_default(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, notes = configure(text)
    assert (config.optim.name, config.model.type, config.model.zero_init) == ("muon", "nanochat", True)
    assert any("optim.name" in line and "muon" in line for line in notes)
    adamw, _ = configure(text, "--optim.name", "adamw")
    assert adamw.optim.lr * own_text.MUON_RATE_FACTOR == config.optim.lr
    assert adamw.model == replace(config.model, zero_init=None)
    assert configure(text, "--model.type", "gpt2")[0].optim.name == "adamw"
    by_name, reasons = configure(text, "--model.config.n_layer", "1")
    assert by_name.model.type == "gpt2"
    assert any(re.search(r"model.type +gpt2: n_layer is one of its fields", line) for line in reasons)
    assert configure(text, "--model.preset", "modern_gguf")[0].optim.name == "muon"
    assert configure(text, "--model.preset", "gpt2")[0].optim.name == "adamw"
    assert configure(text, "--engine.deepspeed", "ds_configs/zero1.json")[0].optim.name == "adamw"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert configure(text)[0].optim.name == "adamw", "Muon is refused under ZeRO"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_other_model_types_get_sizes_too(text: Path, kind: str) -> None:
    config, _ = configure(text, "--model.type", kind)
    assert config.model.config["hidden_size"] == 64
    assert config.model.type == kind
    wider, _ = configure(text, "--model.type", kind, "--model.config.hidden_size", "256")
    assert wider.model.config == {
        **config.model.config, "hidden_size": 256, "head_dim": 128, "intermediate_size": 704,
    }  # fmt: skip
    more, _ = configure(text, "--model.type", kind, "--model.config.num_attention_heads", "4")
    assert [more.model.config[name] for name in ("num_key_value_heads", "head_dim")] == [4, 16]
    own = ("--model.config.head_dim", "8", "--model.config.num_hidden_layers", "5")
    set_here, _ = configure(text, "--model.type", kind, *own)
    assert set_here.model.config == {**config.model.config, "head_dim": 8, "num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("kind", "width", "depth"),
    [
        ("gpt_neox", "hidden_size", "num_hidden_layers"),
        ("codegen", "n_embd", "n_layer"),
        ("opt", "hidden_size", "num_hidden_layers"),
    ],
)
def test_any_family_gets_the_size_of_the_text_by_its_own_names(
    text: Path, kind: str, width: str, depth: str
) -> None:
    config, notes = configure(text, "--model.type", kind)
    assert [config.model.config[name] for name in (width, depth)] == [64, 2]
    model = build_model(config, vocab_size=1_000, special_ids={}, block_size=128, weights=False)
    assert sum(p.numel() for p in model.parameters()) < 1e6, "20 billion of GPT-NeoX for 10 kB of text"
    assert any(f"{kind}, 2 layers, 64 wide" in note for note in notes)
    wider, _ = configure(text, "--model.type", kind, f"--model.config.{width}", "128")
    build_model(wider, vocab_size=1_000, special_ids={}, block_size=128, weights=False)
    deeper, _ = configure(text, "--model.type", kind, "--model.config.num_hidden_layers", "3")
    build_model(deeper, vocab_size=1_000, special_ids={}, block_size=128, weights=False)


def test_family_that_refuses_such_a_shape_keeps_its_own_and_that_is_said(text: Path) -> None:
    config, notes = configure(text, "--model.type", "gpt_neo")
    assert config.model.config == {}
    assert any("the shape that transformers gives it" in note for note in notes)


def test_pretrained_model_gets_a_fine_tuning_rate_and_keeps_its_sizes(text: Path) -> None:
    config, _ = configure(text, "--model.from_pretrained", "owner/name")
    assert config.optim.lr == own_text.FINE_TUNING_RATE
    adapters, _ = configure(text, "--model.from_pretrained", "owner/name", "--model.lora.rank", "8")
    assert adapters.optim.lr == own_text.LORA_RATE
    none, _ = configure(text, "--model.from_pretrained", "owner/name", "--model.lora.rank", "0")
    assert none.optim.lr == own_text.FINE_TUNING_RATE
    assert config.model.config == {}
    assert config.data.block_size is None


def test_passes_are_those_of_the_blocks_that_are_used(text: Path, tmp_path: Path) -> None:
    """The lines tell the passes; the block is the model's, not that of the table."""

    def passes(*argv: str) -> tuple[int, float]:
        config, notes = configure(text, *argv)
        [line] = [note for note in notes if "passes over the text" in note]
        batch = config.train.global_batch_blocks
        assert isinstance(batch, int)
        return int(config.train.duration.value) * batch, float(
            line.split("about ")[1].split()[0].replace(",", "")
        )

    tokens = own_text.text_bytes([str(text / "*.txt")], unit="line") / own_text.BYTES_PER_TOKEN
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"n_positions": 512}')
    for argv, block in (
        (["--model.preset", "gpt2"], 256),
        (["--model.preset", "gpt2", "--model.size", "124M"], 1024),
        (["--model.preset", "modern", "--model.size", "1B"], 1024),  # of a context of 2,048
        (["--model.from_pretrained", str(tmp_path / "export")], 512),
        (["--model.from_pretrained", "owner/name"], 1024),
    ):
        blocks, told = passes(*argv)
        assert told == pytest.approx(blocks * block / tokens, rel=0.06), argv  # told in two digits


@pytest.mark.parametrize(("name", "dtype"), [("a.bin", "uint16"), ("a.npy", "uint16"), ("a.npy", "uint32")])
def test_files_of_tokens_are_counted_in_tokens(tmp_path: Path, name: str, dtype: str) -> None:
    import numpy as np

    ids = np.arange(10_000).astype(dtype)
    if name.endswith(".npy"):
        np.save(tmp_path / name, ids)
    else:
        ids.tofile(tmp_path / name)
    assert own_text.text_bytes([str(tmp_path / name)], unit="line") == pytest.approx(
        own_text.BYTES_PER_TOKEN * 10_000, rel=0.01
    )


def test_missing_file_has_no_size(tmp_path: Path) -> None:
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


def test_modern_preset_takes_rate_and_batch_of_a_law_inside_its_range_only(text: Path) -> None:
    """0.0047 (N / 108M)^(-1/3), N = 12 x 8 x 320^2 + 16,000 x 320, on 164 million tokens, 11 a parameter."""
    argv = ["--model.preset", "modern", "--optim.name", "adamw"]
    config, notes = configure(grown(text, 290_000_000), *argv)
    assert config.optim.lr == pytest.approx(0.0047 * (14.95 / 108) ** (-1 / 3), rel=0.01)
    # 327,680 (N / 108M)^(2/3) tokens in blocks of 512, by eights
    assert config.train.global_batch_blocks == 168
    assert config.train.duration.value == pytest.approx(10_000 * 32 * 512 / (168 * 512), abs=1)
    assert any("Porian" in line and "inside its range" in line for line in notes)
    assert configure(text, *argv, "--optim.lr", "0.5")[0].optim.lr == 0.5
    for other in (argv[:2], argv[2:]):  # muon; a model that is not a preset
        assert not any("inside its range" in line for line in configure(text, *other)[1])
    small, notes = configure(grown(text, 900_000), *argv)
    assert small.optim.lr < 0.005
    assert not any("inside its range" in line for line in notes)


@pytest.mark.parametrize("field", ["n_positions", "max_position_embeddings"])
@pytest.mark.parametrize("context", [64, 512])
def test_blocks_are_as_long_as_the_context_that_the_user_sets(text: Path, field: str, context: int) -> None:
    config, notes = configure(text, f"--model.config.{field}", str(context))
    assert config.data.block_size == config.model.config[field] == context
    assert any(f"blocks of {context} tokens" in note for note in notes)


def test_rest_of_the_model_follows_the_width_and_heads_that_the_user_sets(text: Path) -> None:
    own = ["--model.config.hidden_size", "256", "--model.config.num_attention_heads", "4"]
    config, notes = configure(text, *own)
    assert config.model.config["hidden_size"] == 256
    assert config.model.config["intermediate_size"] == 4 * 256
    assert config.model.config["num_key_value_heads"] == 4
    assert any("the model is 256 wide" in note for note in notes)


def test_text_with_more_characters_than_the_tables_vocabulary_gets_a_larger_one(text: Path) -> None:
    """Japanese of less than 1 MB was refused with the default: SentencePiece gives each character a piece first."""
    characters = [chr(0x4E00 + number) for number in range(1_500)]
    lines = ("".join(characters[number % 100 :: 100]) + "。\n" for number in range(600))
    (text / "a.txt").write_text("".join(lines), encoding="utf-8")
    config, notes = configure(text)
    assert config.tokenizer.vocab_size == 2_000
    assert any("whose 1,501 characters need more than 1,000" in note for note in notes)
    assert (
        train_tokenizer([(text / "a.txt").read_text(encoding="utf-8")], vocab_size=2_000).vocab_size > 1_501
    )
    assert configure(text, "--tokenizer.vocab_size", "1000")[0].tokenizer.vocab_size == 1_000
    assert configure(text, "--tokenizer.character_coverage", "0.98")[0].tokenizer.vocab_size == 2_000
    assert configure(text, "--tokenizer.model_type", "char")[0].tokenizer.vocab_size == 1_000
    assert requested(["--data.train", str(text / "a.txt")]).tokenizer.vocab_size == 2_000, "lmcore size"
    (text / "a.txt").write_bytes("漢字".encode("cp932") * 1_000)
    assert configure(text)[0].tokenizer.vocab_size == 1_000, "the run says what is wrong with the text"
