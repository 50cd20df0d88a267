"""The relations between options that need no data, no model and no device: :func:`check`.

Comes in: a :class:`~lmcore.config.schema.RunConfig` whose types are right. Goes out: nothing, or a
:class:`~lmcore.errors.RequestError` of one line with the numbers and the remedy. Limits of single fields
stand at the fields (``option(..., above=0)``) and are checked here too. :func:`check_metrics` comes later,
when the held-out sets have names.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from lmcore.config.durations import NEVER
from lmcore.config.schema import Entries, Key, RunConfig, global_batch_blocks, keys, ranges, to_dict
from lmcore.conventions import OPTIMIZERS
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean

METRICS = ("loss", "perplexity", "bits_per_byte")
"""What every evaluation gives for every held-out set."""
TRAIN_METRICS = ("train/loss", "train/grad_norm")
"""Of the last line about training before a save."""
SOURCE_KEYS = ("path", "paths", "weight", "name", "text_field", "unit", "encoding")


def check(config: RunConfig) -> None:
    """Every relation that needs no data, no model and no device. Raises :class:`RequestError`."""
    flat = to_dict(config)
    for key in keys().values():
        value: Any = flat
        for part in key.name.split("."):
            value = value[part]
        for number in value if isinstance(value, list) else [value]:
            _check_limits(key, number)
    data, train, optim = config.data, config.train, config.optim
    for name in ("train", "valid", "test"):
        _check_sources(f"data.{name}", getattr(data, name))
    ranges(data.skip_positions, "data.skip_positions")
    if train.profile is not None:
        ranges([train.profile], "train.profile")

    _one_of(
        "train.global_batch_blocks",
        train.global_batch_blocks,
        "train.global_batch_tokens",
        train.global_batch_tokens,
    )
    if train.global_batch_tokens is not None and data.block_size is not None:
        global_batch_blocks(config, data.block_size)
    blocks, micro = train.global_batch_blocks, train.micro_batch_blocks
    if blocks is not None and isinstance(micro, int) and blocks % micro:
        near = dict.fromkeys((max(1, blocks // micro) * micro, (blocks // micro + 1) * micro))
        raise RequestError(
            f"train.global_batch_blocks {blocks} is not a multiple of train.micro_batch_blocks {micro}: "
            f"take {' or '.join(map(str, near))} blocks"
        )
    if train.duration.unit not in ("steps", "tokens", "epochs"):
        raise RequestError(
            f"train.duration {train.duration} is not a horizon: give steps, tokens or epochs "
            "(schedules are functions of the step; train.max_minutes limits the time)"
        )
    for name in ("warmup", "decay", "momentum_warmup"):
        length = getattr(optim, name)
        if length.unit == "minutes" or (length.unit == "percent" and length.value > 100):
            raise RequestError(
                f"optim.{name} {length} is no part of the run: give steps, tokens, epochs or 0-100%"
            )
    if ":" not in optim.name and optim.name.lower() not in OPTIMIZERS:  # not after hours of preparing text
        raise RequestError(
            f"unknown optim.name {optim.name!r}; choose from {', '.join(OPTIMIZERS)}, or give package.module:Class"
            f"{did_you_mean(optim.name, OPTIMIZERS)}"
        )
    if optim.state_dtype != "fp32":
        raise RequestError(
            f"optim.state_dtype {optim.state_dtype} is no longer offered: take an optimizer with small state, such as "
            "--optim.name torchao.optim:AdamW8bit (pip install torchao) or --optim.name adafactor"
        )
    if optim.schedule == "wsd":
        if optim.decay == NEVER:
            raise RequestError("optim.schedule wsd needs optim.decay, such as 20%")
        both = sum(d.value for d in (optim.warmup, optim.decay) if d.unit == "percent")
        if both > 100:
            raise RequestError(
                f"optim.warmup {optim.warmup} and optim.decay {optim.decay} are more than the run"
            )
    if optim.train_only and optim.freeze:
        raise RequestError("optim.train_only and optim.freeze exclude each other: keep one of them")
    if train.deterministic and train.compile_mode == "max-autotune":
        raise RequestError("train.deterministic and train.compile_mode max-autotune exclude each other")

    starts = {
        "type": config.model.type,
        "from_pretrained": config.model.from_pretrained,
        "factory": config.model.factory,
        "preset": config.model.preset,
    }
    given = [f"model.{name} {value}" for name, value in starts.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            "give one of model.type, model.preset, model.from_pretrained and model.factory, not "
            f"{' and '.join(given) or 'none'}"
        )
    if config.model.size is not None and config.model.preset is None:
        raise RequestError(
            f"model.size {config.model.size} is the size of a model.preset: give one of gpt2, modern, modern_gguf"
        )
    if config.model.zero_init and (config.model.from_pretrained or config.model.factory):
        raise RequestError("model.zero_init is for a model that starts from scratch: leave it out")
    if optim.cautious_weight_decay and optim.name.lower() != "muon":
        raise RequestError(f"optim.cautious_weight_decay is for optim.name muon, not for {optim.name}")
    if config.model.lora.rank and config.model.from_pretrained is None:
        raise RequestError(
            f"model.lora.rank {config.model.lora.rank} trains adapters on weights that stand still: give "
            "model.from_pretrained"
        )
    for name in ("data", "model", "loss"):
        factory = getattr(config, name).factory
        if (factory is not None and not all(_is_dotted(part) for part in factory.split(":"))) or (
            factory and factory.count(":") != 1
        ):
            raise RequestError(
                f"{name}.factory {factory!r} is not an import path: write package.module:function"
            )
        if name != "model" and factory is None and getattr(config, name).config:
            raise RequestError(f"{name}.config is for {name}.factory, which is not given")
    if data.factory is None and config.tokenizer.path is None and config.tokenizer.vocab_size is None:
        raise RequestError("give tokenizer.path (one to use) or tokenizer.vocab_size (one to train)")
    if config.tokenizer.path is not None and config.tokenizer.vocab_size is not None:
        raise RequestError(
            f"tokenizer.path {config.tokenizer.path} brings its own size: leave out tokenizer.vocab_size "
            f"{config.tokenizer.vocab_size} (or set it to null)"
        )
    if data.valid and data.valid_fraction:
        raise RequestError(
            f"data.valid and data.valid_fraction {data.valid_fraction} exclude each other: keep one"
        )
    _check_evaluation(config)
    if data.phases and data.mode == "stream":
        raise RequestError("data.phases needs data.mode store: a stream's mixture is fixed")
    for phase in data.phases:
        fields = set(phase) if isinstance(phase, dict) else set()
        if fields != {"position", "weights"} or not isinstance(phase["weights"], dict):
            raise RequestError(
                f"data.phases: {phase} is not of the form {{position: 1000, weights: {{name: 1.0}}}}"
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
    needs = next((f"{name} {value}" for name, value in wanted.items() if value), None)
    if needs and not (config.data.valid or config.data.valid_fraction or config.data.factory):
        raise RequestError(f"{needs} needs held-out text: give data.valid or data.valid_fraction")
    if needs and not evaluate.every:
        raise RequestError(f"{needs} needs evaluations during the run: give evaluate.every, such as 10%")
    if config.checkpoint.export == "best" and not best.k:
        raise RequestError("checkpoint.export best needs checkpoint.keep_best.k of at least 1")
    if len(config.checkpoint.keep_every) > 1:
        raise RequestError(
            f"checkpoint.keep_every {config.checkpoint.keep_every.plain()} are several: give one"
        )
    for name, metric in _metrics(config).items():
        if metric.rpartition("/")[2] not in METRICS and not _is_of_training(name, metric):
            raise _no_metric(name, metric, METRICS)


def check_metrics(config: RunConfig, sets: list[str], *, with_bytes: bool) -> None:
    """Whether the metrics that choose the best and stop a run will be there. Raises :class:`RequestError`.

    ``sets``: the names of the held-out sets; ``with_bytes``: whether their bytes are known.
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
    near = get_close_matches(metric, known, 1, cutoff=0.4)
    there = f"there are {', '.join(known)}" if known else "there is no held-out set"
    hint = f"did you mean {near[0]}? " if near else ""
    return RequestError(f"{name} {metric!r} is no metric of an evaluation: {hint}{there}")


def _check_limits(key: Key, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    tests = {
        "above": lambda limit: value > limit, "at_least": lambda limit: value >= limit,
        "at_most": lambda limit: value <= limit, "below": lambda limit: value < limit,
    }  # fmt: skip
    for name, limit in key.limits.items():
        if limit is not None and not tests[name](
            limit
        ):  # a comparison with NaN is false, so NaN is refused too
            raise RequestError(f"{key.name} {value} must be {name.replace('_', ' ')} {limit:g}")


def _check_sources(key: str, entries: Entries) -> None:
    for entry in entries:
        if isinstance(entry, str):
            if not entry.strip():
                raise RequestError(f"{key}: an empty path")
            continue
        for name in entry:
            if name not in SOURCE_KEYS:
                near = get_close_matches(str(name), SOURCE_KEYS, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SOURCE_KEYS)}"
                raise RequestError(f"{key}: a source has no {name!r}; {hint}")
        if ("path" in entry) == ("paths" in entry):
            raise RequestError(f"{key}: the source {entry} needs path (one) or paths (a list)")
        weight = entry.get("weight")
        if weight is not None and not (isinstance(weight, (int, float)) and 0 < weight < float("inf")):
            raise RequestError(
                f"{key}: weight {weight!r} of {entry.get('path', entry.get('paths'))} must be above 0"
            )
    weighted = [isinstance(entry, dict) and entry.get("weight") is not None for entry in entries]
    if any(weighted) and not all(weighted):
        raise RequestError(
            f"{key}: {sum(weighted)} of {len(entries)} sources have a weight: give it to all or to none"
        )


def _one_of(name: str, value: Any, other: str, other_value: Any) -> None:
    if (value is None) == (other_value is None):
        state = "both are given" if value is not None else "neither is given"
        raise RequestError(f"{name} and {other}: {state}, give one")


def _is_dotted(text: str) -> bool:
    return bool(text) and all(part.isidentifier() for part in text.split("."))
