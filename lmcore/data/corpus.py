"""Corpus: what the user named -> the token stores of the training, validation and test sets.

Comes in: the entries of ``data.train``, ``data.valid`` and ``data.test``, and a tokenizer. Goes out: one store for
each source. What always holds: with ``valid_fraction`` a document is held out by a hash of its content, so that its
copies stay on its side, whatever file they stand in; training text never meets the held-out side; a source that is
token files already (``.bin``, ``.idx``) is opened as it is.

All ranks call :func:`open_corpus` together; they share the work through the file system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcore.data.store import build
from lmcore.data.store.store import TokenStore
from lmcore.data.text import documents
from lmcore.data.tokenizer import tokenizer
from lmcore.errors import RequestError

Entries = Sequence[str | dict[str, Any]]

STDLIB = "stdlib"
"""The builtin corpus: the Python standard library's own source code, on every machine."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Stores by set. ``weights`` are those of the training sources, or ``None``: each block once per epoch."""

    train: tuple[TokenStore, ...]
    weights: tuple[float, ...] | None
    valid: dict[str, TokenStore]
    test: dict[str, TokenStore]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How text is read where an entry does not say it itself."""

    text_field: str = "text"
    unit: str = "auto"
    encoding: str = "utf-8"

    def sources(self, entries: Entries, *, join_files: bool = True) -> list[documents.Source]:
        """The entries as sources.

        Args:
            join_files: files that are named one by one are one source (training text), not a set each (validation).

        Raises:
            RequestError: see :func:`lmcore.data.text.documents.resolve`.
        """
        return documents.resolve(
            list(entries),
            text_field=self.text_field,
            unit=self.unit,
            encoding=self.encoding,
            join_files=join_files,
        )

    def like(self, sources: Sequence[documents.Source]) -> Reading:
        """For validation text: the same, with the unit that was found for the (first) plain training text."""
        units = [source.unit for source in sources if documents.is_plain_text(source)]
        return replace(self, unit=units[0]) if self.unit == "auto" and units else self


def mixture_weights(sources: Sequence[documents.Source]) -> tuple[float, ...] | None:
    """The weights of the sources, or ``None`` if none has one.

    Raises:
        RequestError: some have a weight and some have not: the share of the others would be a guess.
    """
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return None
    missing = [source.name for source in sources if source.weight is None]
    if missing:
        raise RequestError(
            f"data.train: {', '.join(missing)} has no weight, but other sources have: give all or none"
        )
    return tuple(float(weight) for weight in weights if weight is not None)


def training_texts(
    entries: Entries,
    *,
    reading: Reading,
    valid_fraction: float,
    max_bytes: int,
    seed: int,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str]:
    """Texts to train a tokenizer on: of the training side only, at most about ``max_bytes`` of them."""
    sources = [s for s in reading.sources(entries or [STDLIB]) if not _is_token_file(s)]
    if not sources:
        raise RequestError("data.train holds token files only: give their tokenizer with tokenizer.path")
    empty = True
    first: documents.BadRecord | None = None

    def on_bad(record: documents.BadRecord) -> None:
        nonlocal first
        first = first or record
        bad(record)

    for document in tokenizer.sample_texts(sources, max_bytes=max_bytes, seed=seed, bad=on_bad):
        if documents.side(document, valid_fraction) == "train":
            empty = False
            yield document
    if empty:
        named = ", ".join(repr(source.name) for source in sources)
        held = f" that data.valid_fraction {valid_fraction:g} does not hold out" if valid_fraction else ""
        raise RequestError(
            f"there is no text to train a tokenizer on: source {named} ({sum(len(s.paths) for s in sources):,} "
            f"files) holds none{held}; {f'the first bad record: {first}' if first else 'give data.train more text'}"
        )


def open_corpus(
    encoder: tokenizer.Tokenizer,
    *,
    train: Entries,
    valid: Entries,
    test: Entries,
    valid_fraction: float,
    reading: Reading,
    store_dir: str,
    eos: bool,
    processes: int,
    worker: int,
    on_error: str,
    max_bad_fraction: float,
    progress: Callable[[build.Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
    streamed: Sequence[documents.Source] = (),
) -> Corpus:
    """Build or open every store. ``processes`` tokenize on this rank; ``worker`` is the rank.

    Raises:
        RequestError, FaultError: see :func:`lmcore.data.text.documents.resolve` and :func:`lmcore.data.store.build.prepare`.
    """

    def store(source: documents.Source, split: tuple[str, float]) -> TokenStore:
        return build.prepare(
            source,
            encoder,
            store_dir=store_dir,
            split=split,
            eos=eos,
            processes=processes,
            worker=worker,
            on_error=on_error,
            max_bad_fraction=max_bad_fraction,
            progress=progress,
            note=note,
        )

    sources = reading.sources(train or [STDLIB])
    fraction = 0.0 if valid else valid_fraction
    split = ("train", fraction) if fraction else ("all", 0.0)
    every = [*sources, *streamed]
    valid_sources = reading.like(every).sources(valid, join_files=False)
    test_sources = reading.like(every).sources(test, join_files=False)
    if note is not None:
        for line in dict.fromkeys(line for source in every for line in source.notes):
            note(line)
        for option, sets in (("data.valid", valid_sources), ("data.test", test_sources)):
            for line in _training_files_in(option, sets, every):
                note(line)
    training = tuple(store(source, ("all", 0.0) if _is_token_file(source) else split) for source in sources)
    if valid:
        held_out = {source.name: store(source, ("all", 0.0)) for source in valid_sources}
    elif fraction:
        held_out = {}
        for source in sources:
            if _is_token_file(source):
                continue
            # One source: its held-out side is simply "valid"; of several, each is a set under its own name.
            try:
                held_out["valid" if len(sources) == 1 else source.name] = store(source, ("valid", fraction))
            except build.NoText:
                if note is not None:
                    note(
                        f"data.valid_fraction {fraction} holds no document of {source.name} out: it has too few; "
                        f"name held-out text with data.valid"
                    )
    else:
        held_out = {}
    return Corpus(
        train=training,
        weights=mixture_weights(sources),
        valid=held_out,
        test=as_tests({source.name: store(source, ("all", 0.0)) for source in test_sources}),
    )


def _training_files_in(
    option: str, sets: Sequence[documents.Source], training: Sequence[documents.Source]
) -> Iterator[str]:
    """A line for each validation or test set that reads files of the training text, by device and inode."""
    owners = {documents.file_identity(path): source.name for source in training for path in source.paths}
    owners.pop(None, None)
    for source in sets:
        found = [path for path in source.paths if documents.file_identity(path) in owners]
        if found:
            owner = owners[documents.file_identity(found[0])]
            yield (
                f"{option} {source.name!r} reads training text: {len(found):,} of its {len(source.paths):,} files "
                f"({found[0]}) are in the training source {owner!r} too, so that its loss says nothing about unseen "
                f"text; leave them out of data.train, or hold text out with data.valid_fraction instead"
            )


def as_tests(sets: dict[str, Any]) -> dict[str, Any]:
    """Test sets under names that no held-out set has: ``test``, or ``test/NAME`` where there are several."""
    return {"test" if len(sets) == 1 else f"test/{name}": one for name, one in sets.items()}


def _is_token_file(source: documents.Source) -> bool:
    return any(path.endswith((".bin", ".idx", ".npy", ".ds")) for path in source.paths)
