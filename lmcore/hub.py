"""Data sets of the Hugging Face Hub as sources: ``hf://owner/name``, read as a stream.

Comes in: a :class:`lmcore.text.Source` whose path is ``hf://owner/name[@revision][?config=...&split=...]``.
Goes out: its shards as parts, and the documents of a part. What always holds: the same revision gives the
same documents in the same order. Needs the optional package ``datasets``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs

from lmcore import text
from lmcore._text_files import HUB
from lmcore.errors import RequestError


@lru_cache(maxsize=8)
def load(path: str) -> Any:
    """The streaming data set behind ``hf://...``.

    Raises:
        RequestError: ``datasets`` is not installed, or the Hub does not have it.
    """
    try:
        import datasets  # optional and slow to import: only who names hf:// pays
    except ImportError:
        raise RequestError(f"{path} needs the package datasets: pip install datasets") from None
    name, _, query = path.removeprefix(HUB).partition("?")
    name, _, revision = name.partition("@")
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    unknown = set(options) - {"config", "split"}
    if unknown:
        raise RequestError(f"{path}: {sorted(unknown)} is not known; config= and split= are")
    try:
        return datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=revision or None,
            streaming=True,
        )
    except (OSError, ValueError) as error:  # no network, no such data set, no such config or split
        raise RequestError(f"{path} cannot be opened: {error}") from error


def parts(source: text.Source) -> list[text.Part]:
    """One part for each shard of the data set."""
    [path] = source.paths
    return [
        text.Part(
            index=index,
            pieces=(
                text.Piece(
                    path=path,
                    relative_path=path,
                    kind="hub",
                    start=index,
                    stop=index + 1,
                    n_bytes=0,
                    size_bytes=0,
                    mtime_ns=0,
                ),
            ),
        )
        for index in range(load(path).num_shards)
    ]


def read(
    source: text.Source, part: text.Part, *, bad: Callable[[text.BadRecord], None]
) -> Iterator[text.Document]:
    """The documents of a shard, in order; rows without a text are bad records."""
    data = load(part.path)
    shard = data.shard(num_shards=data.num_shards, index=part.start) if data.num_shards > 1 else data
    for row, record in enumerate(shard):
        where = f"{part.path}#{part.start}:{row}"
        value = record.get(source.text_field)
        if not isinstance(value, str):
            names = ", ".join(sorted(map(str, record)))
            bad(
                text.BadRecord(
                    part.path,
                    f"shard {part.start}, row {row}",
                    f"no text in the field {source.text_field!r}; there are {names}",
                )
            )
        elif value.strip():
            yield text.Document(value, where)
