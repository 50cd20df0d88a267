"""The corpus that the user named: text to train a tokenizer on, and the token stores of each set.

With ``valid_fraction`` a document is held out by a hash of its content, so that its copies are on the same side whatever
file they are in; the tokenizer and the model see the training side only. A source that is token files already (``.bin``,
``.idx``) is opened as it is. All ranks call :func:`open_corpus` together and share the work through the file system.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sentencepiece

from lmcore.data.store import build, token_files
from lmcore.data.store.store import TokenStore
from lmcore.data.text import documents, hub
from lmcore.data.tokenizer.tokenizer import Tokenizer
from lmcore.data.tokenizer.training import RECIPE_VERSION
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
            RequestError: see :func:`lmcore.data.text.documents.resolve_sources`.
        """
        return documents.resolve_sources(
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


def sample_texts(
    sources: Sequence[documents.Source],
    *,
    max_bytes: int = 256 * 2**20,
    seed: int = 0,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str]:
    """Texts to train a tokenizer on: all of a small corpus in its order; of a larger one, 1 MiB parts in seeded random
    order until ``max_bytes`` are reached. (A compressed file is one part: of a single huge one this is its head, and so
    it is of a data set of the Hub.)"""
    total = 0
    work = [(source, part) for source in sources for part in hub.parts_of(source, part_bytes=2**20)]
    if sum(part.n_bytes for _, part in work) > max_bytes:
        random.Random(f"{seed} tokenizer").shuffle(work)
    for source, part in work:
        for document in hub.documents_of(source, part, bad=bad):
            text, left = document.text, max_bytes - total
            if len(text) > left + 2**20:  # one enormous document must not make the sample enormous
                text = text[:left]
            total += len(text.encode())
            yield text
            if total >= max_bytes:
                return


def _text_sources(entries: Entries, reading: Reading) -> list[documents.Source]:
    sources = [s for s in reading.sources(entries or [STDLIB]) if not token_files.are_tokens(s.paths)]
    if not sources:
        raise RequestError("data.train holds token files only: give their tokenizer with tokenizer.path")
    return sources


def training_texts(
    entries: Entries,
    *,
    reading: Reading,
    valid_fraction: float,
    max_bytes: int,
    seed: int,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str]:
    """Texts to train a tokenizer on: of the training side only, at most about ``max_bytes`` of them.

    Where the split holds every document out, as it can with a single one, all of them are training text
    (:func:`open_corpus` does the same).
    """
    sources = _text_sources(entries, reading)
    empty = True
    first: documents.BadRecord | None = None

    def on_bad(record: documents.BadRecord) -> None:
        nonlocal first
        first = first or record
        bad(record)

    held_out = False
    for document in sample_texts(sources, max_bytes=max_bytes, seed=seed, bad=on_bad):
        if documents.side(document, valid_fraction) == "train":
            empty = False
            yield document
        else:
            held_out = True
    if empty and held_out:
        yield from sample_texts(sources, max_bytes=max_bytes, seed=seed, bad=lambda record: None)
    elif empty:
        named = ", ".join(repr(source.name) for source in sources)
        raise RequestError(
            f"there is no text to train a tokenizer on: source {named} ({sum(len(s.paths) for s in sources):,} "
            f"files) holds none; {f'the first bad record: {first}' if first else 'give data.train more text'}"
        )


def tokenizer_source(
    entries: Entries,
    *,
    reading: Reading,
    valid_fraction: float,
    max_bytes: int,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides a tokenizer trained on :func:`training_texts`: its record keeps it, and a tokenizer with
    another record is not used.

    Args:
        options: of the training, by their names in the configuration.
    """
    files = [
        [source.text_field, source.unit, source.encoding, *build.files_of(source)]
        for source in _text_sources(entries, reading)
    ]
    return {
        "version": RECIPE_VERSION,
        "sentencepiece": sentencepiece.__version__,
        **{f"tokenizer.{name}": value for name, value in options.items()},
        "seed": seed,
        "data.valid_fraction": valid_fraction,
        "tokenizer.sample_bytes": max_bytes,
        "text": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32],
    }


def source_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two results of :func:`tokenizer_source`, for a person; empty if nothing does."""
    return ", ".join(
        "other text" if key == "text" else f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )


def open_corpus(
    encoder: Tokenizer,
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
    """Build or open every store. ``processes`` tokenize on this rank; ``worker`` is the rank. An empty set has none.

    Raises:
        RequestError, FaultError: see :func:`resolve_sources` and :func:`build_store`.
    """

    def store(source: documents.Source, split: tuple[str, float]) -> TokenStore:
        return build.build_store(
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

    sources = reading.sources(train)
    fraction = 0.0 if valid else valid_fraction
    every = [*sources, *streamed]
    valid_sources = reading.like(every).sources(valid, join_files=False)
    test_sources = reading.like(every).sources(test, join_files=False)
    if note is not None:
        for line in dict.fromkeys(line for source in every for line in source.notes):
            note(line)
        for option, sets in (("data.valid", valid_sources), ("data.test", test_sources)):
            for line in _training_files_in(option, sets, every):
                note(line)
    whole: set[str] = set()

    def training_store(source: documents.Source) -> TokenStore:
        if not fraction or token_files.are_tokens(source.paths):
            return store(source, ("all", 0.0))
        try:
            return store(source, ("train", fraction))
        except build.NoText:  # each document fell on the validation side, as a single one can
            opened = store(source, ("all", 0.0))
            whole.add(source.name)
            if note is not None:
                note(
                    f"data.valid_fraction {fraction:g} would hold all of {source.name!r} out: training on all of it, "
                    f"without a validation set of it; give one with --data.valid"
                )
            return opened

    training = tuple(training_store(source) for source in sources)
    if valid:
        held_out = {source.name: store(source, ("all", 0.0)) for source in valid_sources}
    elif fraction:
        held_out = {}
        for source in sources:
            if source.name in whole or token_files.are_tokens(source.paths):
                continue
            # One source: its held-out side is simply "valid"; of several, each is a set under its own name.
            try:
                held_out["valid" if len(sources) == 1 else source.name] = store(source, ("valid", fraction))
            except build.NoText:
                if note is not None:
                    note(
                        f"data.valid_fraction {fraction} selects no document of {source.name} for validation: it has too few; "
                        f"give validation text with --data.valid"
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
                f"{option} {source.name!r} overlaps with the training text: {len(found):,} of its {len(source.paths):,} "
                f"files ({found[0]}) also belong to the training source {owner!r}, so that the loss says nothing about "
                f"unseen text; remove them from data.train, or use data.valid_fraction instead"
            )


def as_tests(sets: dict[str, Any]) -> dict[str, Any]:
    """Test sets under names that no held-out set has: ``test``, or ``test/NAME`` where there are several."""
    return {"test" if len(sets) == 1 else f"test/{name}": one for name, one in sets.items()}
