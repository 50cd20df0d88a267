"""Datasets of the Hugging Face Hub as sources: ``hf://owner/name[@revision][?config=...&split=...]``, read as a stream.

The same revision gives the same documents in the same order. This needs the optional package ``datasets``.

    [source] = resolve_sources(["hf://roneneldan/TinyStories@main?split=validation"])
    for part in parts_of(source, part_bytes=2**26):
        for document in documents_of(source, part, bad=print):
            document.text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs

from lmcore.data.text import documents, formats
from lmcore.data.text.compression import Damage
from lmcore.data.text.sources import HUB
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import one_line


@lru_cache(maxsize=8)
def _open(path: str) -> tuple[Any, str]:
    """(the streaming dataset, a string that identifies its content).

    Raises:
        RequestError: ``datasets`` is not installed, or the dataset cannot be opened.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise RequestError(f"{path} needs the package datasets: pip install datasets") from None
    name, _, query = path.removeprefix(HUB).partition("?")
    name, _, revision = name.partition("@")
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    unknown = sorted(set(options) - {"config", "split"})
    if unknown:
        raise RequestError(f"{path}: unknown option {', '.join(unknown)}; choose from config, split")
    split = options.get("split", "train")
    try:
        builder = datasets.load_dataset_builder(name, options.get("config"), revision=revision or None)
        data = builder.as_streaming_dataset(split=split)
    # No network, or no such dataset, config or split: errors of many libraries, without a common type
    except Exception as error:
        raise RequestError(
            f"{path} cannot be opened: {one_line(str(error) or type(error).__name__)}"
        ) from error
    return data, f"{builder.dataset_name} {builder.config.name} {builder.hash} {split}"


def fingerprint(path: str) -> str:
    """A string that changes whenever the dataset does."""
    return _open(path)[1]


def is_hub(source: documents.Source) -> bool:
    """Whether the source is a dataset of the Hub.

    Raises:
        RequestError: it is one of several paths of the source.
    """
    found = [path.startswith(HUB) for path in source.paths]
    if any(found) and len(found) > 1:
        raise RequestError(f"{source.paths[found.index(True)]} must be a source of its own")
    return any(found)


def parts_of(source: documents.Source, *, part_bytes: int) -> list[documents.Part]:
    """The parts of any source: :func:`lmcore.data.text.documents.parts`, or one part for each shard of a dataset."""
    if not is_hub(source):
        return documents.parts(source, part_bytes=part_bytes)
    [path] = source.paths
    fixed: dict[str, Any] = {
        "path": path,
        "relative_path": path,
        "kind": "hub",
        "n_bytes": 0,
        "size_bytes": 0,
        "mtime_ns": 0,
    }
    return [
        documents.Part(index=index, pieces=(documents.Piece(**fixed, start=index, stop=index + 1),))
        for index in range(_open(path)[0].num_shards)
    ]


def documents_of(
    source: documents.Source,
    part: documents.Part,
    *,
    bad: Callable[[documents.BadRecord], None],
    empty: Callable[[str], None] | None = None,
) -> Iterator[documents.Document]:
    """The documents of a part of any source; see :func:`lmcore.data.text.documents.read`."""
    if not part.path.startswith(HUB):  # checked by part, because a source may have a million files
        return documents.read(source, part, bad=bad, empty=empty)
    return _rows(source, part, bad, empty)


def _rows(
    source: documents.Source,
    part: documents.Part,
    bad: Callable[[documents.BadRecord], None],
    empty: Callable[[str], None] | None,
) -> Iterator[documents.Document]:
    data = _open(part.path)[0]
    shard = data.shard(num_shards=data.num_shards, index=part.start) if data.num_shards > 1 else data
    for row, record in enumerate(_fetched(part.path, shard)):
        where = f"shard {part.start}, row {row}"
        value = record.get(source.text_field)
        if isinstance(value, str):
            n_bytes = len(value.encode("utf-8", "surrogatepass"))
            value = formats.checked(value, n_bytes)
        if isinstance(value, Damage):
            bad(documents.BadRecord(part.path, where, value.reason, n_bytes=n_bytes))
        elif not isinstance(value, str):
            names = ", ".join(sorted(map(str, record)))
            bad(
                documents.BadRecord(part.path, where, f"no text in {source.text_field!r} (there are {names})")
            )
        elif value.strip():
            yield documents.Document(documents.with_lf(value), f"{part.path}#{where}")
        elif empty is not None:
            empty(where)


def _fetched(path: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the rows.

    Raises:
        FaultError: a row cannot be read. This is not a bad record: skipping rows after a lost connection would lose good
            text.
    """
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # errors of httpx, fsspec, pyarrow or datasets, without a common type
            raise FaultError(
                f"{path} cannot be read further ({type(error).__name__}: {one_line(str(error))}): check the connection "
                f"and that the dataset is whole, then run the same command again"
            ) from error
        yield row
