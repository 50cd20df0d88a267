"""Options that another one leaves without effect are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcore.config.idle import RULES, idle
from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig, keys, plain, to_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OWN = "--model.type null --model.factory a:b"
CURVE = "--optim.schedule 0:0,10%:1,100%:0"

# The options that do nothing, the other ones, and what the message names of these.
IDLE = [
    ("--loss.label_smoothing 0.1", "--loss.factory a:b", "loss.factory 'a:b'"),
    ("--loss.z_loss 1e-4", "--loss.factory a:b", "loss.factory 'a:b'"),
    ("--loss.chunk 64", "--loss.factory a:b", "loss.factory 'a:b'"),
    ("--data.train text.txt", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--data.valid text.txt", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--data.valid_fraction 0.5", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--data.mode stream", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--tokenizer.vocab_size 500", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--tokenizer.model_type char", f"{OWN} --data.factory a:b", "data.factory 'a:b'"),
    ("--tokenizer.model_type char", "--tokenizer.path mine", "tokenizer.path 'mine'"),
    ("--tokenizer.user_symbols <x>", "--tokenizer.path mine", "tokenizer.path 'mine'"),
    ("--tokenizer.train", "--tokenizer.path mine", "tokenizer.path 'mine'"),
    ("--tokenizer.model_type char", "--model.from_pretrained mine", "model.from_pretrained 'mine'"),
    ("--tokenizer.split_digits false", "--tokenizer.model_type char", "tokenizer.model_type 'char'"),
    ("--tokenizer.revision main", "", "without tokenizer.path"),
    ("--tokenizer.revision main", f"--tokenizer.path {ROOT}", "tokenizer.path "),
    ("--model.revision main", "", "without model.from_pretrained"),
    ("--model.revision main", f"--model.from_pretrained {ROOT}", "model.from_pretrained "),
    ("--model.attention eager", OWN, "model.factory 'a:b'"),
    ("--model.lora.alpha 16", "--model.from_pretrained mine", "model.lora.rank 0"),
    ("--model.lora.dropout 0.1", "--model.from_pretrained mine", "model.lora.rank 0"),
    ("--model.lora.target_modules q_proj", "--model.from_pretrained mine", "model.lora.rank 0"),
    ("--data.stream_lanes 4", "", "data.mode 'store'"),
    ("--data.shuffle_window 64", "", "data.mode 'store'"),
    ("--data.shuffle_window 64", "--data.mode stream --data.shuffle none --train.duration 9", "data.shuffle 'none'"),
    ("--data.shuffle blocks", "--data.mode stream --train.duration 9", "data.mode 'stream'"),
    ("--data.valid_fraction 0.5", "--data.mode stream --train.duration 9", "data.mode 'stream'"),
    ("--data.max_bad_fraction 0.5", "", "data.on_error 'raise'"),
    ("--optim.betas 0.9 0.99", "--optim.name sgd", "optim.name 'sgd'"),
    ("--optim.eps 1e-6", "--optim.name adafactor", "optim.name 'adafactor'"),
    ("--optim.fused false", "--optim.name adafactor", "optim.name 'adafactor'"),
    ("--optim.momentum 0.9", "", "optim.name 'adamw'"),
    ("--optim.momentum_start 0.5", "--optim.name adam", "optim.name 'adam'"),
    ("--optim.momentum_warmup 5%", "", "optim.name 'adamw'"),
    ("--optim.momentum_warmup 5%", "--optim.name sgd", "without optim.momentum_start"),
    ("--optim.momentum_warmup 5%", "--optim.name muon --optim.momentum 0:0.5,10%:0.9", "optim.momentum 0: 0.5"),
    ("--optim.momentum_start 0.5", "--optim.name muon --optim.momentum_warmup never", "optim.momentum_warmup never"),
    ("--optim.warmup 5%", CURVE, "optim.schedule 0: 0"),
    ("--optim.min_lr_ratio 0.5", CURVE, "optim.schedule 0: 0"),
    ("--optim.min_lr_ratio 0.5", "--optim.schedule constant", "optim.schedule 'constant'"),
    ("--optim.min_lr_ratio 0.5", "--optim.schedule linear_to_zero", "optim.schedule 'linear_to_zero'"),
    ("--optim.decay 30%", "", "optim.schedule 'cosine'"),
    ("--optim.decay 30%", "--optim.schedule constant", "optim.schedule 'constant'"),
    ("--optim.decay 60%", "--optim.warmup 60%", "optim.schedule 'cosine'"),
    ("--optim.decay 30%", CURVE, "optim.schedule 0: 0"),
    ("--checkpoint.on_upload_failure stop", "", "run_dir"),
    ("--evaluate.sample_tokens 50", "", "without evaluate.prompts"),
    ("--evaluate.early_stopping.mode max", "--evaluate.early_stopping.patience 2", "takes the largest loss"),
    ("--report.expected_loss_low 2", "--report.expected_loss 3", "report.expected_loss"),
]  # fmt: skip


@pytest.mark.parametrize(("useless", "others", "words"), IDLE)
def test_option_without_effect_is_said_with_the_one_that_takes_it(
    useless: str, others: str, words: str
) -> None:
    name = useless.split()[0].removeprefix("--")
    notes: list[str] = []
    parse([*useless.split(), *others.split()], default_recipe=None, note=notes.append)
    [said] = [line for line in notes if line.startswith(f"warning: {name} ")]
    assert words in said
    assert "leave" in said
    without: list[str] = []
    if name != "data.train":  # without it there is nothing to say of the others
        parse(others.split(), default_recipe=None, note=without.append)
    assert not [line for line in without if line.startswith(f"warning: {name} ")]


@pytest.mark.parametrize(("useless", "others", "words"), IDLE)
def test_option_without_effect_in_a_file_is_said(
    tmp_path: Path, useless: str, others: str, words: str
) -> None:
    """A recipe serves several commands; and the configuration of a run, which names every option, must be read again."""
    name, *value = useless.removeprefix("--").split()
    text = ", ".join(value) or "true"
    (tmp_path / "mine.yaml").write_text(
        f"{name}: {f'[{text}]' if keys()[name].is_list or len(value) > 1 else text}\n"
    )
    notes: list[str] = []
    words_of_user = ["--config", str(tmp_path / "mine.yaml"), *others.split()]
    config = parse(words_of_user, default_recipe=None, note=notes.append)
    [said] = [line for line in notes if line.startswith(f"warning: {tmp_path / 'mine.yaml'}: {name} ")]
    assert words in said
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "config.yaml")], default_recipe=None) == config


def test_value_that_is_the_default_is_not_said() -> None:
    """A command that another program has written may name every option."""
    assert list(idle(RunConfig())) == []
    words = [
        f"--{name}={plain(keys()[name].default)}"
        for name in dict.fromkeys(name for rule in RULES for name in rule.options)
        if keys()[name].default is not None and not keys()[name].is_list and name != "optim.betas"
    ]
    for others in ("", "--optim.name sgd", "--tokenizer.path mine", CURVE, "--loss.factory a:b"):
        left = [word for word in words if word.split("=")[0] not in others and "vocab_size" not in word]
        notes: list[str] = []
        parse([*left, *others.split()], default_recipe=None, note=notes.append)
        assert not [line for line in notes if "no effect" in line]


@pytest.mark.parametrize(
    "argv",
    [
        "--optim.min_lr_ratio 0 --optim.schedule linear_to_zero",
        f"--optim.warmup never --optim.decay never {CURVE}",
        "--data.mode stream --data.valid_fraction 0 --train.duration 9",
        "--optim.name muon --optim.betas 0.9 0.99 --optim.momentum 0.9",
        "--optim.name a.b:C --optim.betas 0.9 0.99 --optim.momentum 0.9",
        "--model.from_pretrained mine --tokenizer.train --tokenizer.vocab_size 500",
        "--model.from_pretrained owner/name --model.revision main",
        "--evaluate.sample_tokens 50 --evaluate.prompts auto",
        "--run_dir s3://bucket/run --checkpoint.on_upload_failure stop",
    ],
)
def test_option_with_effect_is_accepted(argv: str) -> None:
    notes: list[str] = []
    parse(argv.split(), default_recipe=None, note=notes.append)
    assert not [line for line in notes if "no effect" in line]


@pytest.mark.parametrize(
    "argv",
    [
        "--checkpoint.keep_best.k 1 --checkpoint.keep_best.mode max",
        "--checkpoint.keep_best.metric perplexity",
        "--evaluate.early_stopping.patience 0 --evaluate.early_stopping.threshold 0.5",
        "--report.tags a --report.trackers []",
        "--guard.spike off --guard.spike_sigma 5",
        "--model.from_pretrained mine --tokenizer.vocab_size 500",
        "--train.compile false --train.compile_mode max-autotune",
    ],
)
def test_option_beside_a_switch_that_is_off_is_said(argv: str) -> None:
    notes: list[str] = []
    parse(argv.split(), default_recipe=RECIPES[0], note=notes.append)
    assert len([line for line in notes if "no effect" in line or "the worst" in line]) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_set_nothing_without_effect(recipe: Path) -> None:
    notes: list[str] = []
    parse(["--config", str(recipe)], note=notes.append)
    assert not [line for line in notes if "no effect" in line]


def test_tokenizer_command_trains_whatever_the_run_would_use() -> None:
    words = ["--model.from_pretrained", "mine", "--tokenizer.model_type", "char"]
    assert parse(words, default_recipe=None, allow_idle=True).tokenizer.model_type == "char"


@pytest.mark.parametrize("name", ["model.zero_init", "optim.fused", "data.pin_memory", "train.compile"])
def test_switch_that_may_be_null_or_auto_needs_no_value(name: str) -> None:
    config: object = parse([f"--{name}", "--seed", "1"], default_recipe=None)
    for part in name.split("."):
        config = getattr(config, part)
    assert config is True
