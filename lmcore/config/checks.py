"""Checks of the configuration that need no data, no model and no device.

:func:`check` is called by the parser: limits of single options (``option(..., above=0)`` in the schema) and relations
between them. :func:`check_metrics` is called when the names of the validation sets are known.
"""

from __future__ import annotations

import codecs
import math
import typing
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeGuard

from lmcore.config.convert import shown
from lmcore.config.curves import Curve, values_of
from lmcore.config.durations import NEVER
from lmcore.config.presets import MODERN_PRESETS
from lmcore.config.schema import (
    DataConfig,
    Entries,
    Key,
    RunConfig,
    global_batches,
    keys,
    plain,
    ranges,
)
from lmcore.conventions import OPTIMIZERS, SOURCE_KEYS, context_in
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, multiples_near
from lmcore.plugins import check_import_path

METRICS = ("loss", "perplexity", "bits_per_byte")
"""Metrics of every evaluation, for every validation set."""
TRAIN_METRICS = ("train/loss", "train/grad_norm")
"""Training metrics that can choose the best checkpoint: those of the last logged step before a save."""
MAY_BE_EMPTY = ("evaluate.prompts",)
"""Text options for which the empty string has a meaning."""
MAY_BE_SPACE = (*MAY_BE_EMPTY, "tokenizer.user_symbols")
"""Text options for which white space has a meaning."""


def check(config: RunConfig) -> None:
    """Run every check that needs no data, no model and no device. Raises :class:`RequestError`."""
    for key in keys().values():
        given = attrgetter(key.name)(config)
        value = list(values_of(given)) if Curve in typing.get_args(key.type) else plain(given)
        for item in value if isinstance(value, list) else [value]:
            _check_limits(key, item)
    _check_data(config)
    _check_batch_and_duration(config)
    _check_intervals(config)
    _check_optimizer(config)
    _check_model(config)
    _check_tokenizer(config)
    _check_evaluation(config)
    for name in config.allow_changes:
        if name not in keys() and f"{name.split('.config.')[0]}.config" not in keys():
            raise RequestError(f"allow_changes: there is no option {shown(name)}{did_you_mean(name, keys())}")
    if config.train.profile is not None:
        ranges([config.train.profile], "train.profile")
    if config.train.deterministic and config.train.compile_mode == "max-autotune":
        raise RequestError(
            "train.deterministic and train.compile_mode max-autotune exclude each other: autotuning chooses "
            "kernels by their time"
        )


def _check_tensor_parallel(config: RunConfig) -> None:
    """Refuse options that have not been shown to work with tensor parallelism."""
    untested = "has not been tested with layers that are cut"
    for name, refused, reason in (
        ("train.context_parallel", config.train.context_parallel > 1, untested),
        ("train.param_dtype", config.train.param_dtype != "fp32", untested),
        ("train.precision", config.train.precision == "fp16", "the ranks would scale the loss differently"),
        ("engine.reduce_dtype", config.engine.reduce_dtype != "fp32", untested),
        ("model.factory", config.model.factory is not None, "it has no tensor-parallel plan of transformers"),
        ("model.lora.rank", config.model.lora.rank > 0, untested),
        ("optim.freeze", bool(config.optim.freeze), untested),
        ("optim.train_only", bool(config.optim.train_only), untested),
        ("optim.ema_decay", config.optim.ema_decay > 0, "no rank holds the weights that it averages"),
        ("optim.name", config.optim.name in ("muon", "adafactor"), "it needs whole matrices"),
    ):
        if refused:
            raise RequestError(
                f"{name} {shown(attrgetter(name)(config))} with train.tensor_parallel {config.train.tensor_parallel}: "
                f"{reason}; leave one of the two out"
            )


def _check_limits(key: Key, value: Any) -> None:
    said = value if key.name in MAY_BE_SPACE else value.strip() if isinstance(value, str) else value
    if said == "" and key.name not in MAY_BE_EMPTY:
        null = " (or null for the default)" if type(None) in typing.get_args(key.type) else ""
        raise RequestError(f"{key.name} must not be empty{null}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    tests = {
        "above": lambda limit: value > limit, "at_least": lambda limit: value >= limit,
        "at_most": lambda limit: value <= limit, "below": lambda limit: value < limit,
    }  # fmt: skip
    for name, limit in key.limits.items():
        # A comparison with NaN is false, so NaN is refused too.
        if limit is not None and not tests[name](limit):
            raise RequestError(f"{key.name} must be {name.replace('_', ' ')} {limit:,g} (got {value})")


def _check_data(config: RunConfig) -> None:
    data = config.data
    for name in ("train", "valid", "test"):
        _check_sources(f"data.{name}", getattr(data, name))
    ranges(data.skip_positions, "data.skip_positions")
    _check_encoding("data.encoding", data.encoding)
    if data.valid and data.valid_fraction:
        raise RequestError(
            f"data.valid and data.valid_fraction {data.valid_fraction} exclude each other: remove one"
        )
    if data.phases and data.mode == "stream":
        raise RequestError("data.phases needs data.mode store: the mixture of a stream is fixed")
    form = "must have the form {position: 1000, weights: {name: 1.0}}"
    for phase in data.phases:
        if not isinstance(phase, dict) or set(phase) != {"position", "weights"}:
            raise RequestError(f"data.phases {form} (got {shown(phase)})")
        position, weights = phase["position"], phase["weights"]
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 2**62:
            raise RequestError(
                f"data.phases: position must be an integer of at least 0 (got {shown(position)})"
            )
        if not isinstance(weights, dict) or not weights or not all(map(_is_share, weights.values())):
            raise RequestError(
                f"data.phases: weights must be numbers of at least 0 by name (got {shown(weights)})"
            )


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15


def _is_share(value: Any) -> bool:
    return value == 0 or _is_weight(value)


def _check_encoding(key: str, encoding: Any) -> None:
    try:
        known = isinstance(encoding, str) and codecs.lookup(encoding)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    if not known:
        examples = ["utf-8", "cp932", "shift_jis", "euc_jp", "utf-16", "latin-1"]
        raise RequestError(
            f"{key}: unknown encoding {shown(encoding)}: choose from {', '.join(examples)}, ..."
            f"{did_you_mean(encoding, examples)}"
        )


def _check_sources(key: str, entries: Entries) -> None:
    units = typing.get_args(typing.get_type_hints(DataConfig)["unit"])
    for entry in entries:
        if isinstance(entry, str):
            if not entry.strip():
                raise RequestError(f"{key}: empty path")
            continue
        for name in entry:
            if name not in SOURCE_KEYS:
                raise RequestError(
                    f"{key}: unknown key {shown(name)} of a source: choose from {', '.join(SOURCE_KEYS)}"
                    f"{did_you_mean(name, SOURCE_KEYS)}"
                )
        if ("path" in entry) == ("paths" in entry):
            raise RequestError(f"{key}: a source needs path (one) or paths (a list) (got {shown(entry)})")
        paths = entry.get("paths", [entry.get("path")])
        if not isinstance(paths, list) or not paths or not all(_is_name(path) for path in paths):
            raise RequestError(f"{key}: path must be text, paths a list of texts (got {shown(entry)})")
        if entry.get("weight") is not None and not _is_weight(entry["weight"]):
            raise RequestError(
                f"{key}: the weight of {paths[0]} must be a number above 0 and below 1e15 (got {shown(entry['weight'])})"
            )
        for name in ("name", "text_field"):
            if entry.get(name) is not None and not _is_name(entry[name]):
                raise RequestError(f"{key}: {name} of {paths[0]} must be text (got {shown(entry[name])})")
        if entry.get("unit") is not None and entry["unit"] not in units:
            raise RequestError(
                f"{key}: unit of {paths[0]} must be one of {', '.join(units)} (got {shown(entry['unit'])})"
            )
        if entry.get("encoding") is not None:
            _check_encoding(f"{key}: encoding of {paths[0]}", entry["encoding"])
    weighted = [isinstance(entry, dict) and entry.get("weight") is not None for entry in entries]
    if any(weighted) and not all(weighted):
        raise RequestError(
            f"{key}: {sum(weighted)} of {len(entries)} sources have a weight; set it for all or for none"
        )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _check_batch_and_duration(config: RunConfig) -> None:
    train, data = config.train, config.data
    blocks, tokens = train.global_batch_blocks, train.global_batch_tokens
    if (blocks is None) == (tokens is None):
        state = "are both given" if blocks is not None else "are both null"
        raise RequestError(f"train.global_batch_blocks and train.global_batch_tokens {state}: set one")
    micro = train.micro_batch_blocks
    if train.micro_batch_exact and not isinstance(micro, int):
        raise RequestError("train.micro_batch_exact needs a number for train.micro_batch_blocks (got auto)")
    known = tokens is None or data.block_size is not None
    for batch in global_batches(config, data.block_size or 1) if known else []:
        if train.micro_batch_exact and isinstance(micro, int) and batch % micro:
            raise RequestError(
                f"train.global_batch_blocks must be a multiple of train.micro_batch_blocks {micro} (got {batch}); try "
                f"{multiples_near(batch, micro)}, or leave out train.micro_batch_exact"
            )
    if train.duration.unit not in ("steps", "tokens", "epochs"):
        raise RequestError(
            f"train.duration must be in steps, tokens or epochs (got {train.duration}): the schedule is a function "
            "of the step; train.max_minutes limits the time"
        )
    if train.duration.unit == "epochs" and data.mode == "stream" and data.factory is None:
        raise RequestError(
            f"train.duration {train.duration}: the length of an epoch of a stream is not known; give steps or tokens"
        )


def _check_intervals(config: RunConfig) -> None:
    """Refuse intervals that would never be reached, or that would end the run at its first step."""
    in_minutes = {"checkpoint.every": True, "evaluate.every": True, "report.every": True}
    streamed = config.data.mode == "stream" and config.data.factory is None
    for name, minutes in (in_minutes | {"checkpoint.keep_every": False, "guard.hash_every": False}).items():
        for interval in attrgetter(name)(config):
            others = f"{'' if streamed else ', epochs'}{', minutes' if minutes else ''}"
            units = f"give steps, tokens{others} or a share such as 10%"
            if interval.unit == "minutes" and not minutes:
                # Whether a step is due must follow from its number, so that it is the same after a resume.
                raise RequestError(f"{name} {interval} cannot be a time: {units}")
            if interval.unit == "epochs" and streamed:
                raise RequestError(
                    f"{name} {interval}: the length of an epoch of a stream is not known; {units}"
                )


def _check_optimizer(config: RunConfig) -> None:
    optim = config.optim
    for name in ("warmup", "decay", "momentum_warmup"):
        length = getattr(optim, name)
        if length.unit == "minutes" or (length.unit == "percent" and length.value > 100):
            raise RequestError(f"optim.{name} must be in steps, tokens, epochs or 0-100% (got {length})")
    if ":" not in optim.name and optim.name not in OPTIMIZERS:
        raise RequestError(
            f"optim.name: unknown optimizer {shown(optim.name)}: choose from {', '.join(OPTIMIZERS)}, or give "
            f"package.module:Class{did_you_mean(optim.name, OPTIMIZERS)}"
        )
    if ":" in optim.name:
        check_import_path(optim.name, "optim.name")
    if optim.state_dtype != "fp32":
        raise RequestError(
            f"optim.state_dtype {optim.state_dtype} was removed: use an optimizer with small state, such as "
            "--optim.name torchao.optim:AdamW8bit (pip install torchao) or --optim.name adafactor"
        )
    if optim.schedule == "wsd":
        if optim.decay == NEVER:
            raise RequestError("optim.schedule wsd needs optim.decay, such as 20%")
        both = sum(length.value for length in (optim.warmup, optim.decay) if length.unit == "percent")
        if both > 100:
            raise RequestError(
                f"optim.warmup {optim.warmup} and optim.decay {optim.decay} are more than 100% together"
            )
    lengths = [optim.warmup, optim.decay] if optim.schedule == "wsd" else [optim.warmup]
    if isinstance(optim.schedule, Curve):  # the curve is the whole schedule
        lengths = []
    steps = sum(length.value for length in lengths if length.unit == "steps")
    if config.train.duration.unit == "steps" and steps > config.train.duration.value:
        names = "optim.warmup and optim.decay" if len(lengths) > 1 else "optim.warmup"
        raise RequestError(
            f"{names} of {steps:,.0f} steps do not fit into train.duration {config.train.duration}; a share such "
            "as 2% always fits"
        )
    if isinstance(optim.momentum, Curve) and optim.momentum_start is not None:
        raise RequestError(
            f"optim.momentum {optim.momentum} and optim.momentum_start exclude each other: the curve has its own start"
        )
    if optim.cautious_weight_decay and optim.name != "muon":
        raise RequestError(f"optim.cautious_weight_decay needs optim.name muon (got {optim.name})")
    if optim.train_only and optim.freeze:
        raise RequestError("optim.train_only and optim.freeze exclude each other: remove one")


def _check_model(config: RunConfig) -> None:
    model = config.model
    starts = {
        "type": model.type, "preset": model.preset, "from_pretrained": model.from_pretrained, "factory": model.factory,
    }  # fmt: skip
    given = [f"model.{name} {value}" for name, value in starts.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            "give one of model.type, model.preset, model.from_pretrained and model.factory "
            f"(got {' and '.join(given) or 'none'})"
        )
    if model.type in MODERN_PRESETS:
        raise RequestError(
            f"model.type {model.type} is not a model of transformers but a preset: give model.preset {model.type}"
        )
    if model.size is not None and model.preset is None:
        raise RequestError(
            f"model.size {model.size} needs model.preset: one of gpt2, modern, modern_gguf, modern_conv"
        )
    if model.zero_init and (model.from_pretrained or model.factory):
        raise RequestError("model.zero_init is for a model that is trained from scratch: remove it")
    if model.lora.rank and model.from_pretrained is None:
        raise RequestError(
            f"model.lora.rank {model.lora.rank} needs model.from_pretrained: LoRA trains adapters on frozen weights"
        )
    if config.train.tensor_parallel > 1:
        _check_tensor_parallel(config)
    for name in ("data", "model", "loss"):
        if config.train.context_parallel > 1 and getattr(config, name).factory is not None:
            raise RequestError(
                f"train.context_parallel {config.train.context_parallel} cuts blocks of text, and only {name}.factory "
                f"{getattr(config, name).factory} knows what its own code would make of the parts: use 1"
            )
        factory = getattr(config, name).factory
        if factory is not None:
            check_import_path(factory, f"{name}.factory")
        elif name != "model" and getattr(config, name).config:
            raise RequestError(f"{name}.config needs {name}.factory, which is not given")
    _check_architecture(config)


def _check_architecture(config: RunConfig) -> None:
    """Refuse what transformers would refuse later, after its import, for the fields that most models have."""
    fields, model = config.model.config, config.model
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"model.config.{name} must be finite (got {value})")
    if model.type is None:
        return
    context, block_size = context_in(fields), config.data.block_size
    if context is not None and block_size is not None and block_size > context:
        raise RequestError(
            f"data.block_size {block_size} is larger than the model's context {context}: reduce it, or set a longer "
            "context in model.config"
        )
    for wide, heads in (("n_embd", "n_head"), ("hidden_size", "num_attention_heads")):
        width, count = fields.get(wide), fields.get(heads)
        if "head_dim" not in fields and _is_integer(width) and _is_integer(count):
            for name, number in ((wide, width), (heads, count)):
                if number < 1:
                    raise RequestError(f"model.config.{name} {number} must be at least 1")
            if width % count:
                raise RequestError(
                    f"model.config.{wide} must be a multiple of model.config.{heads} {count} (got {width}); try "
                    f"{multiples_near(width, count)}"
                )


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_tokenizer(config: RunConfig) -> None:
    path, size = config.tokenizer.path, config.tokenizer.vocab_size
    if config.data.factory is None and path is None and size is None and not config.model.from_pretrained:
        raise RequestError(
            "give tokenizer.path (an existing tokenizer) or tokenizer.vocab_size (to train one)"
        )
    if path is not None and size is not None:
        raise RequestError(
            f"tokenizer.path {path} has its own size: remove tokenizer.vocab_size {size}, or set it to null"
        )


def _check_evaluation(config: RunConfig) -> None:
    evaluate, best = config.evaluate, config.checkpoint.keep_best
    stopping = evaluate.early_stopping
    wanted = {
        "checkpoint.keep_best.k": best.k if best.metric not in TRAIN_METRICS else 0,
        "evaluate.early_stopping.patience": stopping.patience,
        "evaluate.early_stopping.target": stopping.target,
        "evaluate.early_stopping.divergence": stopping.divergence,
    }
    off = {"checkpoint.keep_best.k": 0, "evaluate.early_stopping.patience": 0}
    needs = next(
        (f"{name} {value}" for name, value in wanted.items() if value not in (None, off.get(name))), None
    )
    streamed = config.data.mode == "stream"
    held_out = config.data.valid_fraction and not streamed
    if needs and not (config.data.valid or held_out or config.data.factory):
        raise RequestError(
            f"{needs} needs validation text: set data.valid"
            + (", because data.mode stream holds none out" if streamed else " or data.valid_fraction")
        )
    if needs and not evaluate.every:
        raise RequestError(f"{needs} needs evaluations during the run: set evaluate.every, such as 10%")
    if config.checkpoint.export == "best" and not best.k:
        raise RequestError("checkpoint.export best needs checkpoint.keep_best.k of at least 1")
    if len(config.checkpoint.keep_every) > 1:
        raise RequestError(
            f"checkpoint.keep_every takes one interval (got {config.checkpoint.keep_every.plain()})"
        )
    for name, metric in _metrics(config).items():
        if metric.rpartition("/")[2] not in METRICS and not _is_of_training(name, metric):
            raise _no_metric(name, metric, METRICS)


def check_metrics(config: RunConfig, sets: list[str], *, with_bytes: bool) -> None:
    """Check that the metrics for the best checkpoint and for early stopping exist. Raises :class:`RequestError`.

    Args:
        sets: the names of the validation sets.
        with_bytes: whether the number of bytes of the validation sets is known.
    """
    given = METRICS if with_bytes else METRICS[:2]
    averaged = [f"{name}-ema" for name in sets if config.optim.ema_decay]
    known = [*given, *(f"{name}/{metric}" for name in [*sets, *averaged] for metric in given)] if sets else []
    best, stopping = config.checkpoint.keep_best, config.evaluate.early_stopping
    stops = bool(stopping.patience) or stopping.target is not None or stopping.divergence is not None
    for (name, metric), wanted in zip(_metrics(config).items(), (best.k > 0, stops)):
        if (sets or wanted) and metric not in known and not _is_of_training(name, metric):
            raise _no_metric(name, metric, known)


def _metrics(config: RunConfig) -> dict[str, str]:
    return {
        "checkpoint.keep_best.metric": config.checkpoint.keep_best.metric,
        "evaluate.early_stopping.metric": config.evaluate.early_stopping.metric,
    }


def _is_of_training(name: str, metric: str) -> bool:
    return name == "checkpoint.keep_best.metric" and metric in TRAIN_METRICS


def _no_metric(name: str, metric: str, known: Sequence[str]) -> RequestError:
    there = f"choose from {', '.join(known)}" if known else "there is no validation set"
    return RequestError(
        f"{name}: unknown metric {shown(metric)}: {there}{did_you_mean(metric, known, cutoff=0.4)}"
    )
