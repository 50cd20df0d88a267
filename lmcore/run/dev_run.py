"""``--fast_dev_run``: the same run in seconds, through every part, on a sample of the text.

Model, optimizer, strategy and precision are those of the long run; only text, steps and intervals are shortened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lmcore.config.durations import Duration, Durations
from lmcore.config.schema import RunConfig
from lmcore.data import corpus
from lmcore.data.text import documents
from lmcore.disk import DISK
from lmcore.run.setup import reading_of

SAMPLE_BYTES = 2_000_000
"""What ``--fast_dev_run`` reads of the text: enough for a tokenizer and a few steps, in seconds."""


def shortened(config: RunConfig, folder: Path) -> RunConfig:
    """The same run in seconds (``--fast_dev_run``): every part of it, over a sample of the text, four steps long."""
    data = config.data
    if data.factory is None:
        sample = folder / "sample"
        data = replace(
            data,
            train=[str(sample / "train.jsonl")],
            valid=[str(sample / "valid.jsonl")],
            test=[],
            text_field="text",
            store_dir=str(sample / "stores"),
            phases=[],
        )
    steps = Durations.parse
    return replace(
        config,
        resume="never",
        data=data,
        train=replace(config.train, duration=Duration.parse("4 steps")),
        evaluate=replace(config.evaluate, every=steps("2 steps"), blocks=2, sample_tokens=8),
        checkpoint=replace(config.checkpoint, every=steps("2 steps")),
        report=replace(config.report, every=steps("1 steps")),
    )


def write_sample(config: RunConfig, folder: Path) -> None:
    """The first documents of the training text, every tenth of them to evaluate on, for :func:`shortened`."""
    if config.data.factory is not None:
        return
    DISK.makedirs(folder / "sample")
    lines = list(_sample_lines(config))
    DISK.write_text(folder / "sample" / "train.jsonl", "".join(lines), durable=False)
    DISK.write_text(folder / "sample" / "valid.jsonl", "".join(lines[::10]), durable=False)


def _sample_lines(config: RunConfig) -> Iterator[str]:
    written = 0
    for source in reading_of(config).sources(config.data.train or [corpus.STDLIB]):
        for part in documents.parts(source, part_bytes=2**20):
            for document in documents.read(source, part, bad=lambda record: None):
                line = json.dumps({"text": document.text}, ensure_ascii=False) + "\n"
                yield line
                written += len(line)
                if written > SAMPLE_BYTES:
                    return
