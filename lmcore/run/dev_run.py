"""``--fast_dev_run``: every part of the run on a sample of the text, in seconds.

Model, optimizer, strategy and precision are those of the full run; only the text, steps and intervals are shortened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmcore.config.curves import END, Curve
from lmcore.config.durations import Duration, Durations
from lmcore.config.schema import RunConfig, global_batches
from lmcore.data import corpus
from lmcore.data.store import token_files
from lmcore.data.text import hub
from lmcore.data.text.documents import BadRecord
from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.run.setup import block_size_of, reading_of

SAMPLE_BYTES = 2_000_000
"""How much of the text ``--fast_dev_run`` reads: enough for a tokenizer and a few steps, in seconds."""


def shortened(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of ``--fast_dev_run``: every part of the run, four steps on a sample of the text."""
    data = config.data
    if data.factory is None:
        sample = folder / "sample"
        tokens, text = _entries(config)
        data = replace(
            data,
            train=[*([str(sample / "train.jsonl")] if text else []), *tokens],
            valid=[str(sample / "valid.jsonl")] if text else data.valid,
            valid_fraction=None,
            test=[],
            text_field="text" if text else data.text_field,
            encoding="utf-8" if text else data.encoding,
            store_dir=str(sample / "stores"),
            phases=[],
        )
    steps = Durations.parse
    optim, train = config.optim, config.train
    return replace(
        config,
        resume="never",
        data=data,
        optim=replace(
            optim,
            warmup=_as_share(optim.warmup, config),
            decay=_as_share(optim.decay, config),
            momentum_warmup=_as_share(optim.momentum_warmup, config),
            schedule=_in_shares(optim.schedule, config),
            momentum=_in_shares(optim.momentum, config),
            weight_decay=_in_shares(optim.weight_decay, config),
        ),
        train=replace(
            train,
            duration=Duration.parse("4 steps"),
            global_batch_blocks=_in_shares(train.global_batch_blocks, config),
            global_batch_tokens=_in_shares(train.global_batch_tokens, config),
        ),
        evaluate=replace(config.evaluate, every=steps("2 steps"), blocks=2, sample_tokens=8),
        checkpoint=replace(config.checkpoint, every=steps("2 steps")),
        report=replace(config.report, every=steps("1 steps")),
    )


def _as_share(place: Duration, config: RunConfig) -> Duration:
    """A point in the full run as a percentage of its length, so that the short run has the same schedule.

    If only one of the two is in epochs, the point is returned unchanged, because the length of an epoch is not known yet.
    """
    whole = config.train.duration
    if place.unit not in ("steps", "tokens", "epochs") or not place.value:
        return place
    if place.unit == whole.unit:
        share = place.exact() / whole.exact()
    elif "epochs" in (place.unit, whole.unit):
        return place
    else:
        block_size = block_size_of(config)
        step_tokens = global_batches(config, block_size)[0] * block_size
        share = place.exact() / whole.exact()
        share = share * step_tokens if place.unit == "steps" else share / step_tokens
    return Duration(min(float(100 * share), 100.0), "percent")


def _in_shares(value: Any, config: RunConfig) -> Any:
    """A curve with all its points converted by :func:`_as_share`, without those after the end of the full run."""
    if not isinstance(value, Curve):
        return value
    points = [(_as_share(place, config), number) for place, number in value.points]
    kept = [point for point in points if point[0] != END] + [point for point in points if point[0] == END][:1]
    return replace(value, points=tuple(kept))


def _entries(config: RunConfig) -> tuple[list[Any], list[Any]]:
    """The entries of ``data.train`` that are token files, which need no sample, and the others."""
    tokens: list[Any] = []
    text: list[Any] = []
    for entry in config.data.train or [corpus.STDLIB]:
        [source] = reading_of(config).sources([entry])
        if not token_files.are_tokens(source.paths):
            text.append(entry)
        elif isinstance(entry, dict):  # the sample has no weight
            tokens.append({key: value for key, value in entry.items() if key != "weight"})
        else:
            tokens.append(entry)
    return tokens, text


def write_sample(config: RunConfig, folder: Path) -> None:
    """Write the first documents of the training text, and every tenth of them as validation text, for :func:`shortened`.

    Raises:
        RequestError: the text has no document; the message names the first bad record.
    """
    if config.data.factory is not None or not (text := _entries(config)[1]):
        return
    DISK.makedirs(folder / "sample")
    lines = list(_sample_lines(config, text))
    DISK.write_text(folder / "sample" / "train.jsonl", "".join(lines), durable=False)
    DISK.write_text(folder / "sample" / "valid.jsonl", "".join(lines[::10]), durable=False)


def _sample_lines(config: RunConfig, entries: list[Any]) -> Iterator[str]:
    written = 0
    first: BadRecord | None = None

    def on_bad(record: BadRecord) -> None:
        nonlocal first
        first = first or record

    for source in reading_of(config).sources(entries):
        for part in hub.parts_of(source, part_bytes=2**20):
            for document in hub.documents_of(source, part, bad=on_bad):
                line = json.dumps({"text": document.text}, ensure_ascii=False) + "\n"
                yield line
                written += len(line)
                if written > SAMPLE_BYTES:
                    return
    if not written:
        raise RequestError(
            f"data.train holds no text{f'; the first bad record: {first}' if first else ', only empty documents'}"
        )
