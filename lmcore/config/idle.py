"""Options that have no effect because of another option: a table of which, when, and what to do.

The parser calls :func:`say_idle` after :func:`lmcore.config.checks.check`. Such options get a warning and are not refused,
because a recipe is used by several commands, a sweep over optimizers gives all of them the same options, and the
``config.yaml`` of a run has every option. There is no warning for a value that is the default, ``null`` or ``never``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from lmcore.config.convert import shown
from lmcore.config.curves import Curve
from lmcore.config.durations import Duration
from lmcore.config.schema import RunConfig, keys
from lmcore.storage import is_url

When = Callable[[RunConfig], str | None]
"""Why an option has no effect in a configuration, as the words after its value; ``None`` if it has one."""


class Rule(NamedTuple):
    """Options that have no effect in a certain case."""

    options: tuple[str, ...]
    when: When
    remedy: str


def _with(name: str, *values: Any) -> When:
    """When the option ``name`` has one of ``values`` or, without ``values``, any value but its default."""

    def when(config: RunConfig) -> str | None:
        value = attrgetter(name)(config)
        there = value in values if values else value != keys()[name].default
        return f"has no effect with {name} {_shown(value)}" if there else None

    return when


def _any(*cases: When) -> When:
    return lambda config: next((words for case in cases if (words := case(config)) is not None), None)


def _if(test: Callable[[RunConfig], Any], words: str) -> When:
    return lambda config: f"has no effect {words}" if test(config) else None


def _shown(value: Any) -> str:
    if isinstance(value, (Duration, Curve)):
        return str(value)
    return shown(list(value) if isinstance(value, tuple) else value)


def _curve(name: str) -> When:
    """When the option ``name`` is a curve."""
    return lambda config: (
        f"has no effect with {name} {_shown(attrgetter(name)(config))}"
        if isinstance(attrgetter(name)(config), Curve)
        else None
    )


def _is_local(path: str | None) -> bool:
    return path is not None and Path(path).exists()


def _no_rate_floor(config: RunConfig) -> str | None:
    if config.optim.schedule == "linear_to_zero" and not config.optim.min_lr_ratio:
        return None  # this schedule does end at zero
    return _any(_with("optim.schedule", "constant", "linear_to_zero"), _curve("optim.schedule"))(config)


def _no_momentum(config: RunConfig) -> str | None:
    return _with("optim.name", "adamw", "adam", "adafactor")(config)


def _not_held_out(config: RunConfig) -> str | None:
    if not config.data.valid_fraction:
        return None  # nothing is held out, as asked
    return _any(_with("data.factory"), _with("data.mode", "stream"))(config)


def _blocks_of_a_stream(config: RunConfig) -> str | None:
    data = config.data
    if data.mode == "stream" and data.factory is None and data.shuffle == "blocks":
        return "is the same as full with data.mode 'stream'"
    return None


def _no_tokenizer_is_trained(config: RunConfig) -> str | None:
    return None if config.tokenizer.train else _with("model.from_pretrained")(config)


def _stops_never(config: RunConfig) -> bool:
    stopping = config.evaluate.early_stopping
    return stopping.patience == 0 and stopping.target is None and stopping.divergence is None


def _largest(section: str) -> When:
    return lambda config: (
        f"takes the largest {attrgetter(f'{section}.metric')(config)} for the best, which is the worst: all metrics are better "
        "when they are smaller"
        if attrgetter(f"{section}.mode")(config) == "max"
        else None
    )


ONE_OF_TWO = "leave one of the two out"
LEAVE_OUT = "leave it out"
TRAINED_TOKENIZER = (
    "tokenizer.model_type", "tokenizer.character_coverage", "tokenizer.byte_fallback", "tokenizer.split_digits",
    "tokenizer.normalization", "tokenizer.user_symbols", "tokenizer.sample_bytes",
)  # fmt: skip
"""Options of a trained tokenizer, in addition to ``tokenizer.vocab_size``."""

RULES = (
    # data
    Rule(
        ("data.train", "data.valid", "data.test", "data.mode", "data.text_field", "data.unit", "data.encoding",
         "data.phases", "data.on_error", "data.max_bad_fraction"),
        _with("data.factory"), ONE_OF_TWO,
    ),
    Rule(
        ("data.valid_fraction",), _not_held_out,
        "give validation text of its own (data.valid, or valid of the data.factory), or leave it out",
    ),
    Rule(
        ("data.shuffle_window",),
        _any(_with("data.factory"), _with("data.mode", "store"), _with("data.shuffle", "none")),
        "it is for data.mode stream with data.shuffle full; leave it out",
    ),
    Rule(
        ("data.shuffle",), _blocks_of_a_stream,
        "its blocks are shuffled in windows of data.shuffle_window; set data.mode store, or leave it out",
    ),
    Rule(
        ("data.stream_lanes",), _any(_with("data.factory"), _with("data.mode", "store")),
        "it is for data.mode stream; leave it out",
    ),
    Rule(("data.max_bad_fraction",), _with("data.on_error", "raise"), "set data.on_error skip, or leave it out"),
    # tokenizer
    Rule((*TRAINED_TOKENIZER, "tokenizer.train"), _with("tokenizer.path"), ONE_OF_TWO),
    Rule(("tokenizer.vocab_size", *TRAINED_TOKENIZER, "tokenizer.train"), _with("data.factory"), ONE_OF_TWO),
    Rule(
        ("tokenizer.vocab_size", *TRAINED_TOKENIZER), _no_tokenizer_is_trained,
        "the model brings its own tokenizer; set tokenizer.train true to train another, or leave it out",
    ),
    Rule(
        ("tokenizer.split_digits",), _with("tokenizer.model_type", "char"),
        "every character is a piece there; leave it out",
    ),
    Rule(
        ("tokenizer.revision",), _if(lambda config: config.tokenizer.path is None, "without tokenizer.path"),
        "name a tokenizer of the Hub with tokenizer.path (model.revision is also for the model's own tokenizer), or leave it out",
    ),
    Rule(
        ("tokenizer.revision",),
        lambda config: _with("tokenizer.path")(config) if _is_local(config.tokenizer.path) else None,
        "those are files of this machine; leave it out",
    ),
    # model and loss
    Rule(
        ("model.revision",),
        _if(lambda config: config.model.from_pretrained is None, "without model.from_pretrained"),
        "name a model of the Hub with model.from_pretrained, or leave it out",
    ),
    Rule(
        ("model.revision",),
        lambda config: _with("model.from_pretrained")(config) if _is_local(config.model.from_pretrained) else None,
        "those are files of this machine; leave it out",
    ),
    Rule(("model.attention",), _with("model.factory"), ONE_OF_TWO),
    Rule(
        ("model.lora.alpha", "model.lora.dropout", "model.lora.target_modules"), _with("model.lora.rank", 0),
        "set model.lora.rank, such as 8, or leave it out",
    ),
    Rule(
        ("loss.label_smoothing", "loss.z_loss", "loss.chunk"), _with("loss.factory"),
        "leave one of the two out, or compute it in your own loss",
    ),
    # optim
    Rule(("optim.betas", "optim.eps"), _with("optim.name", "sgd", "adafactor"),
         "choose optim.name adamw, adam or muon, or leave it out"),
    Rule(("optim.fused",), _with("optim.name", "adafactor"), LEAVE_OUT),
    Rule(
        ("optim.momentum", "optim.momentum_start", "optim.momentum_warmup"), _no_momentum,
        "choose optim.name muon or sgd (adam's are optim.betas), or leave it out",
    ),
    Rule(
        ("optim.momentum_warmup",),
        _any(
            _curve("optim.momentum"),
            _if(
                lambda config: config.optim.name == "sgd" and config.optim.momentum_start is None,
                "with optim.name sgd and without optim.momentum_start",
            ),
        ),
        "set optim.momentum_start and one number as optim.momentum, or leave it out",
    ),
    Rule(
        ("optim.momentum_start",),
        lambda config: None if config.optim.momentum_warmup.value else _with("optim.momentum_warmup")(config),
        ONE_OF_TWO,
    ),
    Rule(
        ("optim.min_lr_ratio",), _no_rate_floor,
        "choose optim.schedule linear, cosine, wsd or inverse_sqrt, or leave it out (a curve ends where it says)",
    ),
    Rule(("optim.warmup",), _curve("optim.schedule"), "write it into the curve, or leave it out"),
    Rule(
        ("optim.decay",),
        _any(
            _with("optim.schedule", "constant", "linear", "linear_to_zero", "cosine", "inverse_sqrt"),
            _curve("optim.schedule"),
        ),
        "choose optim.schedule wsd, or leave it out",
    ),
    # the rest
    Rule(("train.compile_mode",), _with("train.compile", False), LEAVE_OUT),
    Rule(
        ("checkpoint.keep_best.metric", "checkpoint.keep_best.mode"),
        lambda config: None if config.resume == "best" else _with("checkpoint.keep_best.k", 0)(config),
        "set checkpoint.keep_best.k, such as 1, or leave it out",
    ),
    Rule(("checkpoint.keep_best.mode",), _largest("checkpoint.keep_best"), LEAVE_OUT),
    Rule(
        ("checkpoint.on_upload_failure", "checkpoint.upload_wait_seconds"),
        _if(lambda config: not is_url(config.run_dir or ""), "with a run_dir that is no URL"),
        "nothing is uploaded; leave it out",
    ),
    Rule(
        ("evaluate.sample_tokens",), _if(lambda config: not config.evaluate.prompts, "without evaluate.prompts"),
        "give some, such as --evaluate.prompts auto, or leave it out",
    ),
    Rule(
        ("evaluate.early_stopping.metric", "evaluate.early_stopping.mode", "evaluate.early_stopping.threshold"),
        _if(_stops_never, "with evaluate.early_stopping.patience 0"), "leave one of the two out",
    ),
    Rule(("evaluate.early_stopping.mode",), _largest("evaluate.early_stopping"), LEAVE_OUT),
    Rule(
        ("report.name", "report.tags", "report.save_code"),
        _if(lambda config: "wandb" not in config.report.trackers, "without wandb in report.trackers"),
        LEAVE_OUT,
    ),
    Rule(
        ("report.expected_loss_low", "report.expected_loss_high"),
        _if(
            lambda config: None in (
                config.report.expected_loss, config.report.expected_loss_low, config.report.expected_loss_high
            ),
            "without report.expected_loss and the other end",
        ),
        "give all three, or leave it out",
    ),
    Rule(("guard.spike_sigma",), _with("guard.spike", "off"), LEAVE_OUT),
)  # fmt: skip


def idle(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Name and warning of every option that has no effect."""
    for rule in RULES:
        for name in rule.options:
            value = attrgetter(name)(config)
            is_off = value is None or (isinstance(value, Duration) and not value.value)
            if is_off or value == keys()[name].default:
                continue
            words = rule.when(config)
            if words is not None:
                yield name, f"{name} {_shown(value)} {words}: {rule.remedy}"


def say_idle(
    config: RunConfig, *, typed: Collection[str], files: Mapping[str, str], note: Callable[[str], object]
) -> None:
    """Warn about options of the command line and of files that have no effect.

    Args:
        typed: names of the options on the command line.
        files: option -> the file that set it last.
    """
    said: dict[str, str] = {}
    for name, sentence in idle(config):
        if name in typed:
            said.setdefault(name, f"warning: {sentence}")
        elif name in files:
            said.setdefault(name, f"warning: {files[name]}: {sentence}")
    for line in said.values():
        note(line)
