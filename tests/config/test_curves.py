"""Values that change in a run: what is read, how it is written again, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcore.config import parse, schema, yaml
from lmcore.config.curves import Curve
from lmcore.config.durations import Duration
from lmcore.errors import RequestError


def options(*words: str) -> schema.RunConfig:
    return parse.parse(["--data.train", "x", *words], default_recipe=None)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0: 32, 10%: 128, 1e9 tokens: 512", "0: 32, 10%: 128, 1000000000 tokens: 512"),
        ("0:0,2 %:1,100%:0", "0: 0, 2%: 1, 100%: 0"),
        ("{0: 0.1, 2 epochs: 2.5e-3}", "0: 0.1, 2 epochs: 0.0025"),
        ("0: 32K, 500: 1M", "0: 32000, 500 steps: 1000000"),
        ("linear 0.1 0", "linear 0.1 0"),
        ("cosine 0.95 0.85", "cosine 0.95 0.85"),
    ],
)
def test_curves_are_written_as_they_are_read(text: str, written: str) -> None:
    curve = Curve.parse(text)
    assert str(curve) == written
    assert Curve.parse(written) == curve


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10%: 1", "first point must be at 0"),
        ("0: 1, 10%", "is not a number"),
        ("0: 1, 10 min: 2", "would be another position"),
        ("0: 1, never: 2", "0-100%"),
        ("0: 1, 120%: 2", "0-100%"),
        ("0: 1, 50%: 2, 20%: 3", "20% must come after 50%"),
        ("0: 1, 5 epoks: 2", "epochs"),
        ("0 bananas: 1", "'0 bananas': unknown unit 'bananas'"),
        ("0 epoks: 1, 2 epochs: 2", "epochs"),
        ("linear 1", "takes two values"),
        ("constant 1", "'constant 1' is not a curve: write '0: 1, 20%: 1, 100%: 0'"),
        ("linear a b", "is not a number"),
        ("0: 1, 1e3 tokens: 1e30", "1e18"),
    ],
)
def test_invalid_curves_raise(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Curve.parse(text)


def test_options_take_numbers_names_and_curves(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "train:\n  global_batch_blocks:\n    0: 8\n    10%: 32\n"
        "optim:\n  weight_decay: linear 0.1 0\n  momentum: '0: 0.85, 300: 0.95'\n  schedule: '0: 0, 2%: 1, 100%: 0'\n"
    )
    config = options("--config", str(file))
    assert config.train.global_batch_blocks == Curve.parse("0: 8, 10%: 32")
    assert str(config.optim.weight_decay) == "linear 0.1 0"
    again = schema.build(yaml.load(schema.to_yaml(config), "config"))
    assert again == config
    assert schema.flatten(config)["train.global_batch_blocks"] == "0: 8, 10%: 32"
    assert options().optim.weight_decay == 0.1
    assert options("--optim.schedule", "WSD").optim.schedule == "wsd"
    assert options("--train.global_batch_blocks", "32").train.global_batch_blocks == 32


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.global_batch_blocks", "0: 8, 10%: 0"], "at least 1"),
        (["--train.global_batch_blocks", "0: 8, 10%: 8.5"], "whole number"),
        (["--train.global_batch_blocks", "linear 8 12"], "multiple of it"),
        (["--train.global_batch_blocks", "cosine 8 16"], "multiple of it"),
        (["--train.global_batch_tokens", "0: 1024, 10%: 1000", "--data.block_size", "64"], "try 960 or 1024"),
        (["--optim.momentum", "0: 0.5, 10%: 1"], "below 1"),
        (["--optim.momentum", "0: 0.5, 10%: 0.9", "--optim.momentum_start", "0.3"], "exclude each other"),
        (["--optim.weight_decay", "linear 0.1 -1"], "at least 0"),
        (["--optim.schedule", "cosin"], "did you mean 'cosine'"),
        (["--optim.lr", "linear 1 0"], "must be a number"),
        (
            [
                "--train.micro_batch_exact",
                "--train.micro_batch_blocks",
                "8",
                "--train.global_batch_blocks",
                "0: 8, 5%: 12",
            ],
            "got 12",
        ),
    ],
)
def test_impossible_curves_are_refused_at_once(argv: list[str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        options(*argv)


def test_batches_that_grow_in_multiples() -> None:
    points = schema.batch_points(options("--train.global_batch_blocks", "linear 8 32"), 64)
    assert points == [
        (Duration(0), 8),
        (Duration(25, "percent"), 16),
        (Duration(50, "percent"), 24),
        (Duration(75, "percent"), 32),
    ]
    shrinking = schema.batch_points(options("--train.global_batch_tokens", "linear 192 64"), 64)
    assert [batch for _, batch in shrinking] == [3, 2, 1]
