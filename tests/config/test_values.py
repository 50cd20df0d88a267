"""Every value that YAML or the command line can say is accepted with its type, or refused in one line."""

from __future__ import annotations

import math
import re
import sys
import time
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmcore.config import yaml
from lmcore.config.durations import Duration, Durations
from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig, build, flatten, keys, to_dict
from lmcore.errors import RequestError

ONE_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
OPTIONS = [name for name, key in keys().items() if not key.is_free_form]
ODD_TEXT = [
    "", " ", "null", "None", "~", "inf", "-inf", ".inf", "nan", ".nan", "true", "yes", "1e3", "1e999", "-1", "0", "-0",
    "0x10", "010", "1_000", "9" * 30, "9" * 5_000, "1e-400", "[]", "{}", "[", "{a: b}", "10%", "-5%", "1e99 steps",
    "1e999999999 steps", "5 parsecs", "never", "1,2", "日本", "a\0b", "\n", "\ud800", "--x", "1" * 400 + " tokens", "1-", "5-3",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3.7, -2.5, 10**30, -(10**30), 10**5_000, math.inf, -math.inf, math.nan, 5e-324, 1e308,
    [], [None], [[]], [1, "a"], {}, {"a": None}, {"path": None}, {"path": "a", "weight": math.nan}, {"path": ["a"]},
    [{"position": -1, "weights": {}}], [{"position": 1, "weights": {"a": "b"}}], [{"paths": []}], [{"path": "a", "unit": 3}],
]  # fmt: skip
VALUES = (
    st.sampled_from(ODD_TEXT + ODD_VALUES)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.sampled_from(ODD_TEXT) | st.integers(), max_size=3)
)


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a parsed value has the type that the schema declares."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(is_of_type(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(is_of_type, value, parts))
    if kind is Durations:
        return isinstance(value, Durations) and all(isinstance(item, Duration) for item in value)
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, origin or kind)


def outcome(argv: list[str]) -> RunConfig | str:
    """The configuration, whose values have the declared types, or the error message, which is one line."""
    try:
        config = parse(argv, default_recipe=None)
    except RequestError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert len(message) < 2_000
        return message
    for name, key in keys().items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        assert is_of_type(value, key.type), f"{name} = {value!r}"
    assert build(to_dict(config)) == config
    return config


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=ONE_FOLDER)
@given(st.sampled_from(OPTIONS), VALUES)
def test_any_value_in_a_file_is_accepted_with_its_type_or_refused_in_one_line(
    tmp_path: Path, name: str, value: Any
) -> None:
    sys.set_int_max_str_digits(0)
    file = tmp_path / "any.yaml"
    try:
        text = yaml.dump({name: value})
        file.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    finally:
        sys.set_int_max_str_digits(4_300)
    got = outcome(["--config", str(file)])
    if isinstance(got, RunConfig):  # what is written is what is read
        file.write_text(yaml.dump(to_dict(got)), encoding="utf-8")
        assert flatten(parse(["--config", str(file)], default_recipe=None)) == flatten(got)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(OPTIONS), st.sampled_from(ODD_TEXT) | st.text(max_size=8) | st.floats().map(str))
@example("optim.lr", "inf")
def test_any_value_on_the_command_line_is_accepted_with_its_type_or_refused_in_one_line(
    name: str, value: str
) -> None:
    outcome([f"--{name}={value}"])


@pytest.mark.parametrize(
    "value", ["null", "[]", "{}", ".inf", "-.nan", "-1", "''", "true", "1e400", "[null]", "[[]]"]
)
def test_every_option_with_each_unusual_value(value: str, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    for name in OPTIONS:
        file.write_text(f"{name}: {value}\n")
        outcome(["--config", str(file)])
        outcome([f"--{name}", value])


@pytest.mark.parametrize("value", ["[" + "y" * 5_000, "a.b:" + "c " * 3_000])
def test_long_value_is_cut_in_the_message(value: str) -> None:
    for name in OPTIONS:
        outcome([f"--{name}={value}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lr: null}", "optim.lr must be a number (got null)"),
        ("optim: {lr: .inf}", "optim.lr must be a finite number (got inf)"),
        ("optim: {weight_decay: null}", "optim.weight_decay must be a number or a curve"),
        ("data: {eos: null}", "data.eos must be true or false (got null)"),
        ("seed: true", "seed must be an integer (got true)"),
        ("seed: 9223372036854775808", "seed must fit in 64 bits"),
        ("train: {precision: bf17}", "did you mean 'bf16'"),
        ("run_dir: ''", "run_dir must not be empty"),
        ("guard: {stuck_seconds: 1e299}", "guard.stuck_seconds must be at most 1e+08"),
        (
            "evaluate: {micro_batch_blocks: 4611686018427387904}",
            "evaluate.micro_batch_blocks must be at most",
        ),
        ("tokenizer: {character_coverage: 0.5}", "tokenizer.character_coverage must be at least 0.98"),
        ("optim: {betas: 0.9}", "optim.betas must be 2 numbers"),
        ("report: {trackers: [1, null]}", "report.trackers must be text (got null)"),
        (
            "data: {train: [{path: a, weight: .nan}]}",
            "weight of a must be a number above 0 and below 1e15 (got nan)",
        ),
        ("data: {train: [{path: a, encoding: utf9}]}", "unknown encoding 'utf9'"),
        ('data: {train: ["a\\0b"]}', "zero byte"),
        ("model: {config: {n_layer: .nan}}", "model.config.n_layer must be finite"),
        ("train: {duration: 1e30 steps}", "at most 1e+18"),
        ("report: {webhook: [secret-canary]}", "its value is secret"),
        ("a: &a [x, x]\nb: &b [*a, *a]", "unknown option a"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    got = outcome(["--config", str(file)])
    assert isinstance(got, str)
    assert words in got
    assert "canary" not in got


def test_aliases_that_expand_to_billions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    file = tmp_path / "bomb.yaml"
    for text in ("\n".join(lines), "model: {config: {x: &x [*x]}}", "[" * 5_000, "x: !!binary aGk="):
        file.write_text(text)
        start = time.process_time()  # not the clock: the machine may be busy with something else
        got = outcome(["--config", str(file)])
        assert isinstance(got, str)
        assert "not valid YAML" in got
        assert time.process_time() - start < 5


def test_large_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("#" * 10_000_001)
    assert "larger than" in str(outcome(["--config", str(tmp_path / "big.yaml")]))
    assert "larger than" in str(outcome(["--config", "/dev/zero"]))
    assert "is a directory" in str(outcome(["--config", str(tmp_path)])).lower()


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--optim.name", "AdamW"], {"optim.name": "adamw"}),
        (["--train.precision", "BF16"], {"train.precision": "bf16"}),
        (["--optim.betas", "0.9,0.99"], {"optim.betas": [0.9, 0.99]}),
        (["--report.every", "null"], {"report.every": "never"}),
        (["--report.every", "10 s"], {"report.every": "10 s"}),
        (["--seed", "1e3"], {"seed": 1000}),
        (["--data.block_size", "null"], {"data.block_size": None}),
        (["--report.trackers", "null"], {"report.trackers": []}),
        (["--data.valid=None"], {"data.valid": []}),
        (["--evaluate.prompts", "null", "b"], {"evaluate.prompts": ["null", "b"]}),
    ],
)
def test_usual_spellings_are_accepted(argv: list[str], values: dict[str, Any]) -> None:
    got = outcome(argv)
    assert isinstance(got, RunConfig)
    assert {name: flatten(got)[name] for name in values} == values


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("--learning_rate", "--optim.lr"),
        ("--per_device_train_batch_size", "--train.micro_batch_blocks"),
        ("--num_train_epochs", "--train.duration 'N epochs'"),
        ("--max_iters", "--train.duration"),
        ("--batch_size=12", "--train.micro_batch_blocks"),
        ("--accumulate_grad_batches", "--train.global_batch_blocks"),
        ("--gradient-clip-val", "--optim.clip_norm"),
        ("--devices", "launcher"),
        ("--dropout", "--model.config.attn_pdrop"),
        ("--optim.learning_rate", "here it is --optim.lr"),  # in a section of ours
        ("--model.n_layer", "here it is --model.config.n_layer"),
        ("--model.hidden_size", "here it is --model.config.hidden_size"),
        ("--n_positions", "here it is --model.config.n_positions"),  # not --data.skip_positions
        ("--model.layers", "here it is --model.config.num_hidden_layers"),
        ("--model.context", "here it is --data.block_size"),
        ("--model.preset=llama", "given as model.type"),
        ("--model.type=modern", "give model.preset modern"),
        ("--model.preset=modrn", "did you mean 'modern'"),
        ("--checkpoint.save_total_limit", "here it is --checkpoint.keep"),
        ("--tokeniser.model_type", "did you mean --tokenizer.model_type"),  # not --model.type
        ("--train.lr", "--optim.lr"),  # in the wrong section
        ("--train.seed", "did you mean --seed"),
        ("--batch", "here it is --train.global_batch_blocks"),  # not --tokenizer.path
        ("--out", "here it is --run_dir"),  # not --model.lora.dropout
        ("--epsilon", "here it is --optim.eps"),  # not --tokenizer.revision
        ("--optimizer", "here it is --optim.name"),  # not --optim.freeze
        ("--train_data", "here it is --data.train"),  # not --train.duration
        ("--num_epochs", "here it is --train.duration 'N epochs'"),
        ("--num_steps", "here it is --train.duration"),
        ("--mixed_precision", "here it is --train.precision"),  # not --model.revision
        ("--config_file", "launcher"),  # not --config
        ("--num_processes", "launcher"),  # not --data.processes
    ],
)
def test_options_of_other_programs_get_a_hint(word: str, option: str) -> None:
    got = outcome([word] if "=" in word else [word, "1"])
    assert isinstance(got, str)
    assert option in got


def rows_of_pages() -> dict[str, str]:
    """What the pages for users of other programs say about each of their options (of two rows: both)."""
    rows: dict[str, str] = {}
    for page in (Path(__file__).resolve().parents[2] / "docs").glob("from_*.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            left, _, right = line.partition(" | ")
            for name in re.findall(r"`([a-z_0-9]+)`", left) if left.startswith("| ") else ():
                rows[name] = rows.get(name, "") + right
    return rows


def test_hint_for_an_option_of_another_program_is_what_its_page_says() -> None:
    wrong, rows = [], rows_of_pages()
    for name, row in rows.items():
        hint = outcome([f"--{name}", "1"])
        option = re.search(r"(?:here it is|did you mean) --([\w.]+)", hint) if isinstance(hint, str) else None
        named = option[1] if option else ""
        forms = (named, f"`.{named.rpartition('.')[2]}`", f"{named.rpartition('.')[0]}.*")
        if not any(form in row for form in forms):
            wrong.append(f"{hint}, but the page says: {row}")
    assert len(rows) > 150
    assert not wrong, "\n".join(wrong)


def test_size_is_not_guessed_by_its_spelling() -> None:
    assert str(outcome(["--model.size", "3M"])).endswith("350M, 1B or null (got '3M')")


def test_option_that_is_elsewhere_is_no_guess() -> None:
    assert "checkpoint is named" not in str(outcome(["--data.filename", "a.txt"]))
    assert "lmcore evaluate" in str(outcome(["--eval_only", "1"]))
    assert "launcher" in str(outcome(["--fsdp", "full_shard"]))
    assert "not finite" in str(outcome(["--detect_anomaly"]))
