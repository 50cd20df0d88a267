"""The configuration: what is written is what is read, nothing is ignored, and the newest layer wins."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from lmcore.config import schema
from lmcore.config import yaml as yaml_text
from lmcore.config.checks import check
from lmcore.config.curves import Curve
from lmcore.config.durations import NEVER, Duration, Durations
from lmcore.config.help import commented_yaml, docs, help_text
from lmcore.config.parse import parse
from lmcore.config.schema import RunConfig, flatten, keys, to_yaml
from lmcore.errors import RequestError
from lmcore.run.resume import (
    changes,
    other_data_is_allowed,
    precision_so_far,
    refuse_changes,
    skips_left_out,
)
from tests.support.intervals import is_due

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Files are written anew by every example, so one folder for all of them is right.
SHARED_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=60,
    deadline=None,
    derandomize=True,
)


def read(*argv: str) -> RunConfig:
    """Parse without the demo recipe: defaults < files < command line."""
    return parse(list(argv), default_recipe=None)


def refused(*argv: str) -> str:
    with pytest.raises(RequestError) as caught:
        read(*argv)
    return str(caught.value)


# --- the schema ---


def test_options_of_0_1_0_still_parse_and_resume_alike() -> None:
    """Saved configurations and scripts lean on them."""
    lines = (ROOT / "tests/data/options.txt").read_text().splitlines()[1:]
    now = {key.name: key.resume for key in keys().values()}
    assert {name: resume for name, resume in map(str.split, lines) if now.get(name) != resume} == {}


def test_every_option_has_help_that_is_printed_with_its_value() -> None:
    assert list(docs()) == list(keys())
    assert all(text.endswith((".", ")", "LMCORE_WEBHOOK.")) for text in docs().values())
    text = help_text()
    assert all(f"--{name} <" in text for name in keys())
    assert max(len(line) for line in text.splitlines()) <= 150


def test_help_and_configuration_need_no_torch() -> None:
    program = (
        "import sys, contextlib, io\n"
        "from lmcore.config.parse import parse\n"
        "out = io.StringIO()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):\n"
        "    parse(['--help'])\n"
        "assert '--optim.lr' in out.getvalue()\n"
        "parse(['--optim.lr', '1e-3'])\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, check=True)


def test_help_of_one_section_and_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv in (["--help", "optim"], ["--print_config", "--optim.lr", "0.5"]):
        with pytest.raises(SystemExit) as caught:
            read(*argv)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    section, printed = text[: text.index("# Folder of the run")], text[text.index("# Folder of the run") :]
    assert "--optim.lr" in section
    assert "--data.train" not in section
    (tmp_path / "printed.yaml").write_text(printed)
    assert read("--config", str(tmp_path / "printed.yaml")) == read("--optim.lr", "0.5")


# --- round trip ---

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12) | (
    st.sampled_from(
        ["null", "true", "1e-3", "off", "1:20", "{a: b}", "[x]", "- y", "# z", "~", "=", "０１", "日本"]
    )
)
DURATIONS = st.builds(
    Duration, st.integers(1, 10**12), st.sampled_from(["steps", "tokens", "epochs", "minutes"])
) | (st.builds(Duration, st.sampled_from([1, 2.5, 0.1, 33.3, 100]), st.just("percent")))
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT


def values_of(key: schema.Key) -> st.SearchStrategy[Any]:
    """Legal values of an option, by its type and its limits."""

    def of(kind: Any) -> st.SearchStrategy[Any]:
        if typing.get_origin(kind) is Literal:
            return st.sampled_from(typing.get_args(kind))
        if typing.get_origin(kind) in (list, tuple, dict) or kind in (Duration, Durations):
            special = {
                "data.skip_positions": st.lists(st.sampled_from(["7", "10-12"]), max_size=2),
                "data.phases": st.just([{"position": 5, "weights": {"a": 0.5}}]),
                "optim.betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.95, 1e-3])),
                "train.duration": DURATIONS.filter(lambda d: d.unit in ("steps", "tokens", "epochs")),
                "optim.warmup": DURATIONS.filter(lambda d: d.unit != "minutes"),
                "optim.momentum_warmup": DURATIONS.filter(lambda d: d.unit != "minutes"),
                "optim.decay": DURATIONS.filter(lambda d: d.unit != "minutes"),
            }
            entry = TEXT | st.builds(lambda path, name: {"path": path, "name": name}, TEXT, TEXT)
            names = st.text("abcdefgh_", min_size=1, max_size=5)
            general: dict[Any, st.SearchStrategy[Any]] = {
                list: st.lists(entry if key.name.startswith("data.") else TEXT, max_size=3),
                dict: st.dictionaries(names, SCALARS | st.lists(SCALARS, max_size=2), max_size=3),
                Durations: st.lists(DURATIONS, max_size=2).map(Durations.parse),
            }
            return special[key.name] if key.name in special else general[typing.get_origin(kind) or kind]
        if kind is Curve:
            text = "0: 8, 10%: 32" if key.name.startswith("train.") else "0: 0.5, 10%: 0.9"
            return st.just(Curve.parse(text))
        return {
            str: TEXT,
            bool: st.booleans(),
            int: st.integers(1, 2**40),
            float: st.floats(0.001, 0.9),
            type(None): st.none(),
        }[kind]

    parts = (
        typing.get_args(key.type) if typing.get_origin(key.type) not in (Literal, list, dict, tuple) else ()
    )
    return st.one_of([of(part) for part in parts]) if parts else of(key.type)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A few options with legal values; a dictionary, because a failing one is printed."""
    chosen = draw(st.lists(st.sampled_from(list(keys())), max_size=8, unique=True))
    return {name: draw(values_of(keys()[name])) for name in chosen}


@SHARED_FOLDER
@given(requests())
@example({})
def test_yaml_and_print_config_round_trip(tmp_path: Path, wanted: dict[str, Any]) -> None:
    values = schema.to_dict(RunConfig(run_dir="runs/x"))
    for name, value in wanted.items():
        *path, last = name.split(".")
        inside = values
        for part in path:
            inside = inside[part]
        inside[last] = value
    config = schema.build(values)
    assume(config.run_dir is not None)  # a parsed one always has its folder
    # Nor is the home folder written as ~ in it.
    assume(not any(isinstance(value, str) and value.startswith("~") for value in wanted.values()))
    try:
        check(config)
    except RequestError:
        assume(False)
    public = dataclasses.replace(config, report=dataclasses.replace(config.report, webhook=None))
    file = tmp_path / "config.yaml"
    for text in (to_yaml(config), commented_yaml(config)):
        file.write_text(text, encoding="utf-8")
        read_again = read("--config", str(file))
        assert changes(flatten(read_again), flatten(public)) == []  # short where it fails
        assert bool(read_again == public)
    assert bool(schema.build(schema.to_dict(config)) == config)
    # Readers of YAML 1.1 see the same.
    assert bool(yaml.safe_load(to_yaml(config)) == schema.to_dict(config, secrets=False))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    )
)
def test_yaml_dump_and_load_round_trip(value: Any) -> None:
    text = yaml_text.dump({"value": value})
    assert yaml_text.load(text, "here") == {"value": value}
    assert yaml.safe_load(text) == {"value": value}


def test_yaml_numbers_and_words() -> None:
    text = "[1e-3, 1.5, 6e4, 1_000, off, no, yes, 1:20, 0123, 2026-11-20, null, true, .5, -3]"
    assert yaml_text.load(text, "here") == [
        0.001, 1.5, 60000.0, 1000, "off", "no", "yes", "1:20", "0123", "2026-11-20", None, True, 0.5, -3,
    ]  # fmt: skip


# --- layers ---


def test_precedence_defaults_files_command_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 10\noptim: {lr: 1e-2, eps: 1e-5}\nmodel: {config: {n_layer: 3, n_head: 3}}\n")
    second.write_text("optim:\n  lr: 2e-2\nmodel.config.n_head: 4\ntrain:\n")
    config = read(
        "--optim.lr", "3e-2", "--config", str(first), "--config", str(second), "--model.config.n_embd=8"
    )
    assert (config.seed, config.optim.lr, config.optim.eps, config.optim.weight_decay) == (
        10,
        0.03,
        1e-5,
        0.1,
    )
    assert config.model.config == {"n_layer": 3, "n_head": 4, "n_embd": 8}
    assert read("--config", str(first), str(second)).optim.lr == 0.02
    assert read("--config", str(second), "--config", str(first)).optim.lr == 0.01
    assert read("--config", str(first), "--config", str(second)).run_dir == "runs/second"
    assert read("--config", str(first), "--fast_dev_run").run_dir == "runs/first-fast_dev_run"
    assert read("--config", str(first), "--run_dir", "here", "--fast_dev_run").run_dir == "here"


def test_demo_recipe_is_used_only_without_config_and_without_text(tmp_path: Path) -> None:
    demo = tmp_path / "demo.yaml"
    demo.write_text("tokenizer.vocab_size: 77\n")
    said: list[str] = []
    config = parse([], note=said.append, default_recipe=demo)
    assert (config.tokenizer.vocab_size, config.run_dir) == (77, "runs/demo")
    assert "demo" in said[0]
    assert parse(["--config", str(demo)], note=said.append).run_dir == "runs/demo"
    assert parse(["--data.train", "my/own*.txt"], note=said.append).tokenizer.vocab_size == 32_000
    assert len(said) == 1


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        (["mytext/*.txt"], "mytext"),
        (["a/b/corpus.jsonl.zst", "c"], "corpus"),
        (["hf://owner/name"], "name"),
        (["{path: x/y.txt, name: 日本語}"], "日本語"),
        (["*.txt"], "own_text"),
        (["../.."], "own_text"),
        (["a b;c"], "a_b_c"),
    ],
)
def test_run_folder_is_named_after_the_text(entries: list[str], name: str) -> None:
    assert parse(["--data.train", *entries]).run_dir == f"runs/{name}"


def test_run_dir_of_a_saved_configuration_follows_its_folder(tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    (old / "config.yaml").write_text(to_yaml(read("--run_dir", str(old))))
    assert read("--config", str(old / "config.yaml")).run_dir == str(old)
    old.rename(tmp_path / "new")
    assert read("--config", str(tmp_path / "new" / "config.yaml")).run_dir == str(tmp_path / "new")
    assert read("--config", str(tmp_path / "new" / "config.yaml"), "--run_dir", "other").run_dir == "other"


@pytest.mark.parametrize(
    "name", ["run_dir", "local_dir", "resume", "model.from_pretrained", "engine.deepspeed"]
)
def test_home_folder_in_a_file_is_that_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No shell has replaced it: the run would write into a folder named ~, or find nothing there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(yaml.dump({name: "~/x", "data.train": ["a"], "model.type": None}))
    more = ["--model.type", "gpt2"] if name != "model.from_pretrained" else []
    config = flatten(parse(["--config", str(tmp_path / "mine.yaml"), *more], default_recipe=None))
    assert config[name] == str(tmp_path / "x")


def test_recipe_of_the_package_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for name in ("gpt2_small", "recipes/gpt2_small.yaml"):
        assert parse(["--config", name], note=said.append).run_dir == "runs/gpt2_small"
    assert len(said) == 2
    assert "recipes/gpt2_small.yaml" in refused("--config", "elsewhere/gpt2_small.yaml")
    (tmp_path / "gpt2_small.yaml").write_text("seed: 5\n")
    assert parse(["--config", "gpt2_small.yaml"]).seed == 5


@pytest.mark.parametrize(
    "argv",
    [
        ["--data.train", "a.txt", "b c.txt"],
        ["--data.train", "a.txt", "--seed", "1", "--data.train", "b c.txt"],
        ["--data.train", "[a.txt, b c.txt]"],
        ["--data.train=a.txt", "--data.train=b c.txt"],
    ],
)
def test_lists_can_be_written_in_four_ways(argv: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  train: other.txt\n")
    assert read("--config", str(file)).data.train == ["other.txt"]
    assert read(*argv, "--config", str(file)).data.train == ["a.txt", "b c.txt"]


def test_command_line_values_are_converted() -> None:
    config = read(
        "--dry_run", "--train.compile", "false", "--optim.betas", "0.8", "0.9", "--report.name", "2026",
        "--data.train", "{path: a.txt, weight: 2}", "{paths: [b, c], weight: 1}", "--report.trackers", "[]",
        "--checkpoint.every", "500", "30 min", "--report.every", "never",
        "--data.skip_positions", "7", "10-12",
        "--model.config.rope_parameters.rope_theta", "1e4", "--train.global_batch_tokens", "5.12e5",
        "--checkpoint.background=false", "--evaluate.early_stopping.target", "-3", "--dry_run",
        "--train.micro_batch_blocks", "auto", "--evaluate.prompts", "def f(", "null",
        "--data.block_size", "null", "--guard.spike", "off",
    )  # fmt: skip
    assert config.dry_run
    assert not config.train.compile
    assert not config.checkpoint.background
    assert config.optim.betas == (0.8, 0.9)
    assert config.report.name == "2026"
    assert config.report.trackers == []
    assert config.data.train == [{"path": "a.txt", "weight": 2}, {"paths": ["b", "c"], "weight": 1}]
    assert config.checkpoint.every == (Duration(500, "steps"), Duration(30, "minutes"))
    assert config.report.every == ()
    assert schema.ranges(config.data.skip_positions, "") == [(7, 8), (10, 13)]
    assert config.model.config == {"rope_parameters": {"rope_theta": 10_000.0}}
    assert schema.global_batches(config, 1_024) == [500]
    assert config.evaluate.early_stopping.target == -3
    assert config.evaluate.prompts == ["def f(", "null"]
    assert config.data.block_size is None
    assert config.guard.spike == "off"


def test_exclusive_options_take_the_later_layer(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "tokenizer: {vocab_size: 800}\nmodel: {config: {n_layer: 2}}\ntrain: {global_batch_blocks: 8}\n"
    )
    said: list[str] = []
    config = parse(
        ["--config", str(file), "--tokenizer.path", "t.model", "--train.global_batch_tokens", "4096",
         "--model.type", "llama", "--data.valid", "v.txt"],
        note=said.append,
    )  # fmt: skip
    assert (config.tokenizer.path, config.tokenizer.vocab_size) == ("t.model", None)
    assert (config.train.global_batch_blocks, config.train.global_batch_tokens) == (None, 4096)
    assert (config.data.valid, config.data.valid_fraction) == (["v.txt"], None)
    assert config.model.config == {}
    # What a file had asked for and did not get; a default that gives way is not worth a word
    assert len(said) == 3
    both = tmp_path / "both.yaml"
    both.write_text("tokenizer: {vocab_size: 800, path: t.model}\n")
    assert "remove tokenizer.vocab_size 800" in refused("--config", str(both))


# --- nothing is ignored ---


def test_mistyped_option_suggests_the_right_name(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    for name, key in keys().items():
        if key.is_free_form:
            continue
        *path, last = name.split(".")
        typo = ".".join([*path, last[:-2] + last[-1:] + last[-2:-1] + "x" if len(last) > 1 else "kk"])
        assert f"--{name}" in refused(f"--{typo}", "1").replace("?", " ").split(), typo
        file.write_text(
            yaml.safe_dump({typo: 1}) if not path else f"{path[0]}:\n  {typo.partition('.')[2]}: 1\n"
        )
        message = refused("--config", str(file))
        assert str(file) in message
        assert name in message


def test_switch_needs_no_value() -> None:
    assert parse(["--train.deterministic", "--seed", "3"]).train.deterministic is True
    assert parse(["--train.activation_checkpointing", "--seed", "3"]).train.activation_checkpointing is True
    assert parse(["--train.activation_checkpointing", "2"]).train.activation_checkpointing == 2
    assert "at least 0" in refused("--train.activation_checkpointing", "-1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "1"], ["here it is --optim.lr"]),  # the last part alone is not enough, and never guessed
        (["--see", "3"], ["unknown option --see", "--seed"]),  # no abbreviations
        (["--data.trian", "x"], ["--data.train"]),
        (["--qqqqqq", "3"], ["unknown option", "--help"]),
        (["a.txt"], ["unexpected 'a.txt'", "--data.train a.txt"]),
        (["--"], ["unexpected '--'"]),
        (["--data.train", "a", "-lr", "3"], ["unexpected '-lr'", "--optim.lr"]),
        (["--data.train", "a", "-dry_run"], ["unexpected '-dry_run'", "--dry_run"]),
        (["--train.duration", "2", "epochs"], ["unexpected 'epochs'", "--train.duration '2 epochs'"]),
        (["--report.name", "my", "first", "run"], ["unexpected 'first'", "--report.name 'my first run'"]),
        (["--evaluate.every", "30", "min"], ["unexpected 'min'", "--evaluate.every '30 min'"]),
        (["--optim"], ["section", "--optim.lr"]),
        (["--seed"], ["--seed needs a value"]),
        (["--model.config."], ["unknown option"]),
        (["--model.config", "7"], ["--model.config", "7"]),
        (["--seed", "x"], ["--seed", "'x'", "an integer"]),
        (["--optim.schedule", "cosin"], ["cosine"]),
        (["--optim.warmup", "2 parsecs"], ["--optim.warmup", "parsecs", "epochs"]),
        (["--dry_run", "perhaps"], ["--dry_run", "true or false"]),
        (["--optim.betas", "0.9"], ["--optim.betas", "2 numbers"]),
        (["--data.train", "{path: [}"], ["--data.train", "YAML"]),
        (["--evaluate.prompts", "[犬]と[猫]"], ["YAML", """quote it inside of a list: '["[犬]と[猫]"]'"""]),
        (["-data.train", "utf8"], ["options are written", "(for example --data.train utf8)"]),
        (["-data.train"], ["(for example --data.train VALUE)"]),
        (["--optim.name", "LION"], ["unknown optimizer 'LION'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--config"], ["--config needs a value"]),
        (["--help", "optimizer"], ["optimizer", "optim"]),
    ],
)
def test_wrong_command_line_is_refused_in_one_line(argv: list[str], words: list[str]) -> None:
    message = refused(*argv)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_text_in_brackets_is_quoted_as_the_message_says() -> None:
    assert read("--evaluate.prompts", '["[犬]と[猫]"]').evaluate.prompts == ["[犬]と[猫]"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  lr: x\n", ["optim.lr", "'x'", "a number"]),
        ("optim: 3\n", ["optim is a section"]),
        ("- a\n", ["got a list"]),
        ("seed: 1\nseed: 2\n", ["duplicate key 'seed'", "line 2"]),
        ("a: [\n", ["not valid YAML", "line 2"]),
        ("data:\n  train: *.txt\n", ["line 2", "in quotes"]),
        ("data:\n  train: *mine\n", ["line 2", "in quotes"]),
        ("data:\n  train: @mine\n", ["line 2", "in quotes"]),
        ("data:\n\ttrain: mine\n", ["line 2", "spaces"]),
        ('data:\n  train: "C:\\x"\n', ["line 2", "single quotes"]),
        ("report:\n  name: a: b\n", ["line 2", "in quotes"]),
        ("report:\n  tags: [a, 1.10]\n", ["report.tags", "in quotes"]),  # not the tag 1.1
        ("seed\uff1a3\n", ["'seed\uff1a3'", "colon"]),
        ("model:\n  config: 3\n", ["model.config", "3"]),
        ("optim:\n  learning_rate: 3\n", ["optim.learning_rate"]),
        ("1: 2\n", ["unknown option 1"]),
        ("seed: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
        ("data:\n  train: [null]\n", ["data.train"]),
    ],
)
def test_wrong_file_is_refused_with_its_name(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    message = refused("--config", str(file))
    assert "\n" not in message
    assert all(word in message for word in [str(file), *words]), message


@pytest.mark.parametrize("text", ["3 days", "1,000", "0", "long"])
def test_message_about_a_length_of_a_run_names_only_what_is_allowed(text: str) -> None:
    message = refused("--train.duration", text)
    assert all(word not in message for word in ("'10%'", "'30 min'", "'never'")), message


def test_config_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("--config", str(tmp_path / "x.yaml"))
    assert "directory" in refused("--config", str(tmp_path))


WORDS = st.sampled_from(
    [f"--{name}" for name in keys()] + ["--model.config.n", "--x", "[", "{}", "[a", "-1", "&a", "*a"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(WORDS | TEXT | st.integers().map(str), max_size=6))
def test_no_command_line_ends_in_a_traceback(argv: list[str]) -> None:
    try:
        read(*(word for word in argv if "config" not in word.split("=")[0] or "." in word))
    except RequestError as error:
        assert "\n" not in str(error).strip()  # noqa: PT017  # any of the two outcomes is right


@SHARED_FOLDER
@given(
    st.dictionaries(st.sampled_from(list(keys())), st.recursive(SCALARS, st.lists, max_leaves=3), max_size=2)
)
def test_no_file_ends_in_a_traceback(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "any.yaml"
    file.write_text(yaml_text.dump(values), encoding="utf-8")
    try:
        read("--config", str(file))
    except RequestError as error:
        assert str(error)  # noqa: PT017  # any of the two outcomes is right


# --- relations ---


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--optim.lr 0", ["optim.lr must be above 0", "got 0"]),
        ("--optim.lr nan", ["optim.lr"]),
        ("--data.valid_fraction 1", ["below 1"]),
        ("--optim.betas 0.9 1", ["optim.betas", "below 1"]),
        ("--seed -1", ["seed must be at least 0", "got -1"]),
        (
            "--train.global_batch_blocks 10 --train.micro_batch_blocks 4 --train.micro_batch_exact",
            ["10", "4", "8 or 12"],
        ),
        (
            "--train.global_batch_blocks 3 --train.micro_batch_blocks 4 --train.micro_batch_exact",
            ["try 4"],
        ),
        ("--train.micro_batch_exact", ["got auto"]),
        ("--train.global_batch_tokens 1000 --data.block_size 512", ["1000", "512", "512 or 1024"]),
        ("--train.global_batch_tokens 100 --data.block_size 512", ["try 512"]),
        ("--train.global_batch_tokens 512 --train.global_batch_blocks 1", ["are both given"]),
        ("--train.global_batch_blocks null", ["are both null"]),
        ("--train.duration 30min", ["train.duration", "got 30 min", "max_minutes"]),
        ("--train.duration 10%", ["10%"]),
        ("--train.duration never", ["never"]),
        ("--optim.warmup 5min", ["optim.warmup"]),
        ("--optim.warmup 101%", ["101%"]),
        ("--optim.schedule wsd --optim.warmup 50% --optim.decay 60%", ["50%", "60%"]),
        ("--optim.schedule wsd --optim.decay never", ["optim.decay"]),
        ("--optim.freeze a --optim.train_only b", ["exclude"]),
        ("--optim.name mun", ["'mun'", "adafactor", "mean 'muon'"]),
        ("--model.type gpt2 --model.factory a.b:c", ["one of model.type", "a.b:c"]),
        ("--model.type null", ["none"]),
        ("--model.factory a.b", ["package.module:function"]),
        ("--data.factory a/b.py:c", ["package.module:function"]),
        ("--loss.config.x 1", ["loss.factory"]),
        ("--tokenizer.vocab_size null", ["tokenizer.path"]),
        ("--data.valid a --data.valid_fraction 0.1", ["exclude"]),
        ("--data.train {pth:a}", ["data.train"]),
        ("--data.train {path:,weight:0}", ["data.train"]),
        ("--data.skip_positions 5-3", ["5-3"]),
        ("--data.skip_positions x", ["'x'"]),
        ("--train.profile 3-", ["train.profile"]),
        ("--checkpoint.export best", ["keep_best.k"]),
        ("--checkpoint.keep_best.k 1 --data.valid_fraction 0", ["validation text"]),
        (
            "--checkpoint.keep_best.k 1 --data.mode stream --train.duration 9",
            ["set data.valid, because data.mode stream"],
        ),
        ("--checkpoint.keep_best.metric valid/los", ["keep_best.metric", "'valid/los'", "mean 'loss'"]),
        ("--evaluate.early_stopping.metric accuracy", ["early_stopping.metric", "loss, perplexity"]),
        ("--evaluate.early_stopping.metric train/grad_norm", ["early_stopping.metric", "loss, perplexity"]),
        ("--checkpoint.keep_every [10,50%]", ["keep_every", "takes one"]),
        ("--checkpoint.keep_every 30min", ["keep_every 30 min", "cannot be a time", "10%"]),
        ("--guard.hash_every [100,2h]", ["hash_every 120 min", "cannot be a time"]),
        ("--checkpoint.every 1,500", ["checkpoint.every", "'1,500'", "write 1500", "[1,500]"]),
        ("--evaluate.every 1,000,000tokens", ["write 1000000"]),
        (
            "--evaluate.every 2epochs --data.mode stream --train.duration 9",
            ["evaluate.every 2 epochs", "of a stream", "minutes"],
        ),
        (
            "--checkpoint.keep_every 1epochs --data.mode stream --train.duration 9",
            ["keep_every 1 epochs", "of a stream"],
        ),
        ("--evaluate.early_stopping.patience 3 --evaluate.every never", ["evaluate.every"]),
    ],
)
def test_conflicting_options_are_refused_with_their_values(argv: str, words: list[str]) -> None:
    message = refused(*argv.split())
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[{path: a, wieght: 2}]", ["wieght", "weight"]),
        ("[{weight: 2}]", ["path"]),
        ("[{path: a, paths: [b]}]", ["path (one) or paths"]),
        ("[{path: a, weight: 2}, b]", ["1 of 2"]),
        ("[{path: a, weight: -1}]", ["above 0"]),
        ("['']", ["empty"]),
    ],
)
def test_wrong_sources_are_refused(sources: str, words: list[str]) -> None:
    message = refused("--data.train", sources)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lr: 1}\noptim.lr: 2\n",
        "model:\n  config: {n_layer: 2}\n  config.n_layer: 4\n",
        "model.config.rope: {theta: 1}\nmodel: {config: {rope: {theta: 2}}}\n",
        "data.train: [a]\ndata: {train: [b]}\n",
    ],
)
def test_file_that_sets_an_option_in_two_ways_is_refused(tmp_path: Path, text: str) -> None:
    """As a duplicate key is: which of the two is meant?"""
    file = tmp_path / "two.yaml"
    file.write_text(text)
    message = refused("--config", str(file))
    assert "two.yaml: " in message
    assert " is given twice" in message


def test_merged_keys_may_be_replaced_at_each_level(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text(
        "model: {config: {x: &b {<<: {a: 1, b: 1}, b: 2}, y: {<<: *b, a: 3}, z: {<<: [*b, {a: 5, c: 6}], c: 7},\n"
        "  first: {<<: [{long: 1}, {long: 2}]}}}\n"
    )
    assert read("--config", str(file)).model.config == {
        "x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}, "z": {"a": 1, "b": 2, "c": 7}, "first": {"long": 1},
    }  # fmt: skip


def test_file_that_sets_fields_of_one_dictionary_in_two_ways_is_read(tmp_path: Path) -> None:
    file = tmp_path / "fields.yaml"
    file.write_text("model: {config: {n_layer: 2}}\nmodel.config.n_head: 4\n")
    assert read("--config", str(file)).model.config == {"n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("text", ["", "# optim: {lr: 1}\n", "{}\n", "optim:\n  # lr: 1\n", "null\n"])
def test_file_without_an_option_is_refused(tmp_path: Path, text: str) -> None:
    """The defaults alone would train on the demo's text."""
    file = tmp_path / "nothing.yaml"
    file.write_text(text)
    message = refused("--config", str(file))
    assert "nothing.yaml: sets no option" in message
    assert "leave out this --config" in message


# --- secrets, and what may change at a resume ---


def test_secrets_are_never_written() -> None:
    config = read("--report.webhook", "https://hooks/canary")
    assert config.report.webhook == "https://hooks/canary"
    assert "canary" not in to_yaml(config) + commented_yaml(config) + str(flatten(config))


def test_resume_refuses_changed_options_by_their_class() -> None:
    old = flatten(read("--data.train", "a.txt", "--model.config.n_layer", "2"))
    new = flatten(
        read(
            "--data.train",
            "b.txt",
            "--model.config.n_layer",
            "3",
            "--optim.lr",
            "1e-5",
            "--report.every",
            "1",
        )
    )
    found = changes(old, new)
    assert [(change.key, change.resume) for change in found] == [
        ("data.train", "refuse"),
        ("model.config.n_layer", "refuse"),
        ("optim.lr", "warn"),
        ("run_dir", "free"),
        ("report.every", "free"),
    ]
    with pytest.raises(RequestError) as caught:
        refuse_changes(found, ["model.config.n_layer"])
    assert all(word in str(caught.value) for word in ["a.txt", "b.txt", "--allow_changes data.train"])
    said = refuse_changes(found, ["data.train", "model.config.n_layer"])
    assert [change.key for change in said] == ["data.train", "model.config.n_layer", "optim.lr"]
    assert changes(old | {"gone.option": 1}, old)[0].resume == "free"


# --- durations ---


@pytest.mark.parametrize(
    ("text", "value", "unit", "written"),
    [
        (500, 500, "steps", "500 steps"),
        ("500", 500, "steps", "500 steps"),
        ("1_000 steps", 1000, "steps", "1000 steps"),
        ("1 step", 1, "steps", "1 steps"),
        (1e3, 1000, "steps", "1000 steps"),
        ("1e9 tokens", 10**9, "tokens", "1000000000 tokens"),
        ("2.5B tokens", 25 * 10**8, "tokens", "2500000000 tokens"),
        ("300M tokens", 3 * 10**8, "tokens", "300000000 tokens"),
        ("2 epochs", 2, "epochs", "2 epochs"),
        ("0.5 epochs", 0.5, "epochs", "0.5 epochs"),
        ("10%", 10, "percent", "10%"),
        ("0.1 percent", 0.1, "percent", "0.1%"),
        ("30 min", 30, "minutes", "30 min"),
        ("2h", 120, "minutes", "120 min"),
        ("90 s", 1.5, "minutes", "1.5 min"),
        ("never", 0, "never", "never"),
        (None, 0, "never", "never"),
        (False, 0, "never", "never"),
    ],
)
def test_durations(text: Any, value: float, unit: str, written: str) -> None:
    duration = Duration.parse(text)
    assert duration == (value, unit)
    assert str(duration) == written
    assert Duration.parse(written) == duration


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "0%", "1.5 steps", "0.5", "5 parsecs", "ten", True, "1e400 x", "1 2", [1]]
)
def test_invalid_duration_is_refused(text: Any) -> None:
    with pytest.raises(RequestError):
        Duration.parse(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    total=st.integers(1, 300),
    value=st.sampled_from([1, 3, 7, 10, 12.5, 33.3, 0.7, 0.1]),
    unit=st.sampled_from(["steps", "tokens", "epochs", "percent"]),
    tokens_per_step=st.integers(1, 50),
    epoch=st.fractions(Fraction(1, 3), 60, max_denominator=7),
)
def test_interval_is_due_at_the_first_step_of_each_multiple(
    total: int, value: float, unit: str, tokens_per_step: int, epoch: Fraction
) -> None:
    assume(unit not in ("steps", "tokens") or value == int(value))
    every = [Duration(value, unit)]
    known = {"tokens_per_step": tokens_per_step, "steps_per_epoch": epoch, "total_steps": total}
    due = [step for step in range(1, total + 1) if is_due(step, every, **known)]
    interval = {
        "steps": Fraction(1), "tokens": Fraction(1, tokens_per_step), "epochs": epoch, "percent":
        Fraction(total, 100),
    }[unit] * Fraction(str(value))  # fmt: skip
    expected = {int(-((-interval * n) // 1)) for n in range(1, int(total / interval) + 1)}
    assert set(due) == {step for step in expected if step <= total}


def test_several_intervals_and_time() -> None:
    every = Durations.parse("[4, 10 min]")
    assert every == Durations.parse([4, "10 min"]) == Durations.parse("4, 10 min")
    assert Durations.parse("[100,200]") == Durations.parse("100, 200") == Durations.parse([100, 200])
    assert str(Durations.parse([])) == str(Durations.parse("never")) == "never"
    assert is_due(4, every)
    assert not is_due(5, every)  # minutes are asked of a clock: lmcore.run.intervals
    assert not is_due(5, [NEVER])


# --- recipes ---


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_has_a_complete_header(recipe: Path) -> None:
    config = parse(["--config", str(recipe)])
    assert config.run_dir == f"runs/{recipe.stem}"
    lines = recipe.read_text(encoding="utf-8").splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for word in ("command", "hardware", "time", "result"):
        assert word in header, f"{recipe.name}: the header has no {word}"
    assert f"recipes/{recipe.name}" in header or recipe.stem == "demo"


@pytest.mark.parametrize(
    "text", ["0.001 s", "1 s", "10 s", "90 s", "0.5 min", "1 h", "7 steps", "12.5%", "0.1 epochs"]
)
def test_durations_are_written_as_they_are_read(text: str) -> None:
    """A saved configuration holds them as text."""
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


@pytest.mark.parametrize(
    ("values", "option", "again"),
    [
        ("data: {train: ['hf://user:<hidden>@host/x']}", "data.train", ["--data.train", "mine.txt"]),
        ("report: {name: <hidden>}", "report.name", ["--report.name", "mine"]),
        ("evaluate: {prompts: [a, say <hidden>]}", "evaluate.prompts", ["--evaluate.prompts", "[a]"]),
        (
            "data: {factory: 'm:f', config: {a: [{db_pass: <hidden>}]}}",
            "data.config",
            ["--data.config.a", "[]"],
        ),
        (
            "data: {factory: 'm:f', config: {db_pass: <hidden>, n: 1}}",
            "data.config",
            ["--data.config.db_pass", "x"],
        ),
        ("tokenizer: {path: <hidden>}", "tokenizer.path", ["--tokenizer.path", "mine"]),
    ],
)
def test_place_of_a_hidden_secret_is_never_its_value(
    values: str, option: str, again: list[str], tmp_path: Path
) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(values)
    words = ["--config", "demo.yaml", "--config", str(saved)]
    with pytest.raises(RequestError, match=rf"config\.yaml: {option} holds <hidden>.*again with --{option}"):
        parse(words)
    parse(words, allow_hidden=True)
    parse([*words, *again])


def test_symbol_of_a_tokenizer_may_look_like_a_hidden_secret() -> None:
    assert parse(["--tokenizer.user_symbols", "<hidden>"]).tokenizer.user_symbols == ["<hidden>"]


def test_skips_that_are_left_out_at_a_resume_are_named() -> None:
    assert skips_left_out(["12-19", "7"], ()) == ["12-19", "7"]
    assert skips_left_out(["12-19", "7"], ((7, 8),)) == ["12-19"]
    assert skips_left_out(["12-19"], ((0, 100),)) == []
    assert skips_left_out(None, ()) == []


@pytest.mark.parametrize(
    ("allowed", "options", "expected"),
    [
        ([], {}, False),
        (["data.train"], {}, True),
        (["data.shuffle"], {"data.shuffle": "blocks"}, True),
        (["data.shuffle"], {}, False),  # it is as it was: other data for another reason
        (["optim.lr"], {"optim.lr": "1.0"}, False),
        (["data.workers"], {"data.workers": "4"}, False),  # decides nothing about the blocks
    ],
)
def test_other_data_needs_an_allowed_change_of_the_data(
    allowed: list[str], options: dict[str, str], expected: bool
) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    before = flatten(read())
    config = read(*words, *(["--allow_changes", *allowed] if allowed else []))
    assert other_data_is_allowed(before, config) is expected


def test_allowed_changes_are_names_of_options() -> None:
    with pytest.raises(RequestError, match=r"allow_changes: there is no option 'optim\.lrr'.*optim\.lr"):
        read("--allow_changes", "optim.lrr")
    assert read("--allow_changes", "model.config.n_layer").allow_changes == ["model.config.n_layer"]


@pytest.mark.parametrize("named", ["auto", "best", "step-00000003", "PATH"])
def test_precision_of_the_checkpoint_that_is_resumed_is_found(named: str, tmp_path: Path) -> None:
    """Also of one that is named without its folder, and in the local folder of a run in a bucket."""
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"topology": {"precision": "fp32"}}')
    (step / "manifest.json").write_text("{}")
    asked = str(step) if named == "PATH" else named
    assert precision_so_far(read("--run_dir", str(tmp_path / "run"), "--resume", asked)) == "fp32"
    words = ["--run_dir", "s3://bucket/run", "--local_dir", str(tmp_path / "run"), "--resume", asked]
    assert precision_so_far(read(*words)) == "fp32"
    assert precision_so_far(read("--run_dir", str(tmp_path / "other"), "--resume", "auto")) is None
