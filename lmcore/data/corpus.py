"""The user's corpus: text to train a tokenizer on, and the token stores of the training, validation and test sets.

With ``valid_fraction`` a part of the text is held out for validation: whole documents or, if there are few, the ends of
all documents (:func:`splits_of`). The tokenizer and the model see the training side only. A source that already consists
of token files (``.bin``, ``.idx``) is opened as it is. All ranks call :func:`open_corpus` together and share the work
through the file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sentencepiece

from lmcore.data.store import build, token_files
from lmcore.data.store.claims import create_once
from lmcore.data.store.overlap import find_overlap
from lmcore.data.store.remote import local_store_dir, read_small, share_small
from lmcore.data.store.store import TokenStore
from lmcore.data.text import documents, hub
from lmcore.data.text.sources import HUB
from lmcore.data.text.split import Split, choose, part_of
from lmcore.data.tokenizer.tokenizer import Tokenizer
from lmcore.data.tokenizer.training import RECIPE_VERSIONS
from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.humanize import amount, one_line

Entries = Sequence[str | dict[str, Any]]
Splits = Mapping[str, tuple[Split, Split]]
"""Name of a training source -> its training and validation side. A source that is not in the mapping is not split."""

STDLIB = "stdlib"
"""The builtin corpus: the Python standard library's own source code, on every machine."""
_SAMPLED_BYTES = 2**20
"""Bytes of text taken from one place of a large corpus, for the sample on which a tokenizer is trained."""
_COMPARED_CHARACTERS = 2**15
"""Characters at one place of a source that are encoded and decoded, to see what a tokenizer loses."""
_LOST_SHARE = 0.01
_MANY_SETS = 10
"""With more validation or test sets than this, probably a shell has listed the files of one."""
_SHOWN_TOKENS = 40
"""Tokens, and characters, of a document that are shown in a message."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The token stores of each set. ``weights`` are those of the training sources; ``None``: each block once per epoch."""

    train: tuple[TokenStore, ...]
    weights: tuple[float, ...] | None
    valid: dict[str, TokenStore]
    test: dict[str, TokenStore]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Defaults of how text is read, for entries that do not set them."""

    text_field: str = "text"
    unit: str = "auto"
    encoding: str = "utf-8"

    def sources(self, entries: Entries, *, join_files: bool = True) -> list[documents.Source]:
        """The entries as sources.

        Args:
            join_files: files that are named one by one form one source (training), not one set each (validation).

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
        """The same options for validation text, with the unit that was detected for the first plain training text."""
        units = [source.unit for source in sources if documents.is_plain_text(source)]
        return replace(self, unit=units[0]) if self.unit == "auto" and units else self


def mixture_weights(sources: Sequence[documents.Source]) -> tuple[float, ...] | None:
    """The weights of the sources, or ``None`` if none has one.

    Raises:
        RequestError: only some have a weight: the share of the others would be a guess.
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


def splits_of(
    sources: Sequence[documents.Source],
    valid_fraction: float,
    *,
    store_dir: str | None = None,
    begun_with: Collection[str] | None = None,
    streamed: bool = False,
) -> Splits:
    """How each source of text is split into training and validation text (:func:`lmcore.data.text.split.choose`).

    Args:
        store_dir: where the answer is saved. Finding it may require reading all of the text, which a resume must not do.
        begun_with: names of the token store folders of a run that is resumed. It keeps its split: in earlier versions,
            in which a small corpus did not always get a validation set, that was the split by documents.
        streamed: the text is used only to train a tokenizer, and is not read to choose a split; a stream has no
            validation side.
    """
    found: dict[str, tuple[Split, Split]] = {}
    by_documents: tuple[Split, Split] = (("train", valid_fraction), ("valid", valid_fraction))
    for source in sources:
        if not valid_fraction or token_files.are_tokens(source.paths):
            continue
        sides = by_documents if streamed else _chosen(source, valid_fraction, store_dir)
        if begun_with is not None and sides != by_documents:
            prefix = build.folder_prefix(source.name, sides[1])
            if not any(name.startswith(prefix) for name in begun_with):
                sides = by_documents
        found[source.name] = sides
    return found


def _chosen(source: documents.Source, fraction: float, store_dir: str | None) -> tuple[Split, Split]:
    """The split of one source, read from the file in which it was saved if that exists."""
    options = [source.text_field, source.unit, source.encoding, fraction, build.files_of(source)]
    path = None
    if store_dir is not None:
        digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
        path = local_store_dir(store_dir) / f"split-{digest}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            kept = json.loads(read_small(store_dir, path.name))
            kind, value = kept["train"], kept["fraction"]
            if kind in ("train", "head") and isinstance(value, float) and 0 < value < 1:
                return (kind, value), ("valid" if kind == "train" else "tail", value)
    texts = (
        document.text
        for part in hub.parts_of(source, part_bytes=2**24)
        for document in hub.documents_of(source, part, bad=lambda record: None)  # reported when it is used
    )
    sides = choose(texts, fraction)
    if path is not None and store_dir is not None:
        answer = (json.dumps({"train": sides[0][0], "fraction": sides[0][1]}) + "\n").encode()
        share_small(store_dir, path.name, answer)
        with contextlib.suppress(OSError):  # another process wrote it, or nothing can be written here
            DISK.makedirs(path.parent)
            create_once(path, answer)
    return sides


def _describe_split(name: str, sides: tuple[Split, Split], fraction: float) -> str | None:
    """A line about a split that is not the usual one by documents; ``None`` if it is."""
    kind, used = sides[0]
    if kind == "head":
        return (
            f"data.valid_fraction {fraction:g} selects no document of {name!r}, or most of its text: the last {used:.2g} of each "
            f"document is validation text instead; to choose it yourself, give --data.valid"
        )
    if used != fraction:
        return (
            f"data.valid_fraction {fraction:g} selects no document of {name!r}, or most of its text: one document is "
            f"validation text instead; to choose it yourself, give --data.valid"
        )
    return None


def sample_texts(
    sources: Sequence[documents.Source],
    *,
    max_bytes: int = 256 * 2**20,
    seed: int = 0,
    bad: Callable[[documents.BadRecord], None],
    splits: Splits | None = None,
) -> Iterator[str]:
    """Texts to train a tokenizer on, of the training side only.

    A small corpus is used whole. Of a larger one, parts of 1 MiB are read in seeded random order until ``max_bytes`` of text
    are reached. The amount of text in a part is unknown if it cannot be cut (compressed files, shards of the Hub). So each
    part first contributes its beginning, an equal share of ``max_bytes``; if the parts together have less, further text of
    the longer parts is added. Otherwise the sample could come from a single large file.
    """
    whole: Split = ("all", 0.0)
    splits = splits or {}
    total = 0
    work = [(source, part) for source in sources for part in hub.parts_of(source, part_bytes=_SAMPLED_BYTES)]
    if max(sum(part.n_bytes for _, part in work), len(work) * _SAMPLED_BYTES) > max_bytes:
        random.Random(f"{seed} tokenizer").shuffle(work)
    start, stop = 0, max(max_bytes // max(len(work), 1), _SAMPLED_BYTES)
    while work:
        longer = []
        for source, part in work:
            for text in _stretch(source, part, start, stop, bad):
                if text is None:
                    longer.append((source, part))
                    break
                left, encoded, length = max_bytes - total, text.encode(), len(text)
                if len(encoded) > left + 2**20:  # one enormous document must not make the sample enormous
                    encoded = encoded[:left]
                    length = len(encoded.decode(errors="ignore"))
                total += len(encoded)
                kept = part_of(text, splits.get(source.name, (whole, whole))[0])
                if kept is not None:
                    yield kept[:length]
                if total >= max_bytes:
                    return
        work, start, stop = longer, stop, 2 * stop


def _stretch(
    source: documents.Source,
    part: documents.Part,
    start: int,
    stop: int,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str | None]:
    """The texts of a part that begin in the bytes ``[start, stop)`` of its text, then ``None`` if there are more."""
    at = 0

    def on_bad(record: documents.BadRecord) -> None:
        if at >= start:  # earlier ones were reported before
            bad(record)

    for document in hub.documents_of(source, part, bad=on_bad):
        if at >= stop:
            yield None
            return
        if at >= start:
            yield document.text
        at += len(document.text.encode())


def lost_in_tokens(sources: Sequence[documents.Source], encoder: Tokenizer) -> Iterator[str]:
    """A warning for each source in which a given tokenizer loses more than 1% of the characters.

    It replaces or drops characters that it does not know, and the model would never see them. Text at the beginning and in
    the middle of a source is tested. White space, case, accents and variants of a character, which tokenizers normalize on
    purpose, are not compared.
    """
    if encoder.byte_lengths() is not None:  # the tokenizer is lossless
        return
    for source in sources:
        if token_files.are_tokens(source.paths) or source.paths[0].startswith(HUB):
            continue
        parts = hub.parts_of(source, part_bytes=_SAMPLED_BYTES)
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for part in (parts[index] for index in sorted({0, len(parts) // 2}) if parts):
            left = _COMPARED_CHARACTERS
            for document in hub.documents_of(source, part, bad=lambda record: None):
                text = document.text[:left]
                before.update(_plain_characters(text))
                after.update(_plain_characters(encoder.decode(encoder.encode(text))))
                left -= len(text)
                if left <= 0:
                    break
        lost = (before - after).total() / max(before.total(), 1)
        if lost > _LOST_SHARE:
            yield (
                f"warning: the tokenizer does not know {lost:.1%} of the characters of {source.name!r} (in a sample), which are "
                f"lost: give another one with --tokenizer.path, or none, so that one is trained on the text"
            )


def _plain_characters(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return [one for one in plain if not (one.isspace() or unicodedata.combining(one))]


def _text_sources(entries: Entries, reading: Reading) -> list[documents.Source]:
    sources = [s for s in reading.sources(entries or [STDLIB]) if not token_files.are_tokens(s.paths)]
    if not sources:
        raise RequestError("data.train holds token files only: give their tokenizer with tokenizer.path")
    return sources


def training_texts(
    entries: Entries,
    *,
    reading: Reading,
    splits: Splits,
    max_bytes: int,
    seed: int,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str]:
    """Texts to train a tokenizer on, of the training side only, at most about ``max_bytes``.

    If a split leaves no text for training (in a run that began before :func:`splits_of` prevented this), all of the text is
    used, as in :func:`open_corpus`.
    """
    sources = _text_sources(entries, reading)
    empty = True
    first: documents.BadRecord | None = None

    def on_bad(record: documents.BadRecord) -> None:
        nonlocal first
        first = first or record
        bad(record)

    for text in sample_texts(sources, max_bytes=max_bytes, seed=seed, bad=on_bad, splits=splits):
        empty = False
        yield text
    if empty and splits:
        for text in sample_texts(sources, max_bytes=max_bytes, seed=seed, bad=lambda record: None):
            empty = False
            yield text
    if empty:
        named = ", ".join(repr(source.name) for source in sources)
        raise RequestError(
            f"there is no text to train a tokenizer on: source {named} "
            f"({amount(sum(len(s.paths) for s in sources), 'file')}) holds none; "
            f"{f'the first bad record: {first}' if first else 'give data.train more text'}"
        )


def tokenizer_source(
    entries: Entries,
    *,
    reading: Reading,
    valid_fraction: float,
    splits: Splits,
    max_bytes: int,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that determines a tokenizer trained on :func:`training_texts`.

    It is stored in the record of the tokenizer, and a tokenizer with another record is not used.

    Args:
        options: options of the training, by their names in the configuration.
    """
    files = [
        [source.text_field, source.unit, source.encoding, *build.files_of(source)]
        for source in _text_sources(entries, reading)
    ]
    by_documents = (("train", valid_fraction), ("valid", valid_fraction))
    held_out = {name: list(sides[1]) for name, sides in splits.items() if sides != by_documents}
    return {
        "version": RECIPE_VERSIONS.get(str(options.get("model_type")), 1),
        "sentencepiece": sentencepiece.__version__,
        **{f"tokenizer.{name}": value for name, value in options.items()},
        "seed": seed,
        "data.valid_fraction": valid_fraction,
        **({"data.held_out": held_out} if held_out else {}),
        "tokenizer.sample_bytes": max_bytes,
        "text": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32],
    }


def source_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A description of the differences between two results of :func:`tokenizer_source`; empty if there are none."""
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
    splits: Splits,
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
    """Build or open every token store; a set without entries has none. Called by all ranks together.

    Args:
        splits: splits of the training sources (:func:`splits_of`, made with ``valid_fraction``); empty with ``valid``.
        processes: number of tokenizing processes of this rank.
        worker: this rank.

    Raises:
        RequestError, FaultError: see :func:`resolve_sources` and :func:`build_store`.
    """

    def store(source: documents.Source, split: Split) -> TokenStore:
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
    every = [*sources, *streamed]
    valid_sources = reading.like(every).sources(valid, join_files=False)
    test_sources = reading.like(every).sources(test, join_files=False)
    said: set[str] = set()  # sets already reported because they share files with the training text
    if note is not None:
        for line in dict.fromkeys(line for source in every for line in source.notes):
            note(line)
        for option, sets in (("data.valid", valid_sources), ("data.test", test_sources)):
            if len(sets) > _MANY_SETS:
                note(
                    f"{option} gives {len(sets):,} sets, each with a loss of its own and a last block that is padded; for one set "
                    f"of many files put the glob in quotes: --{option} 'FOLDER/*.txt'"
                )
            for source, line in _training_files_in(option, sets, every):
                note(line)
                said.add(f"{option} {source.name}")
    whole: set[str] = set()

    def training_store(source: documents.Source) -> TokenStore:
        if source.name not in splits:
            if valid_fraction and note is not None and token_files.are_tokens(source.paths):
                note(
                    f"source {source.name!r} is tokens, of which data.valid_fraction {valid_fraction:g} holds nothing out: give "
                    f"validation text with --data.valid, or set data.valid_fraction 0"
                )
            return store(source, ("all", 0.0))
        line = _describe_split(source.name, splits[source.name], valid_fraction)
        if line is not None and note is not None:
            note(line)
        try:
            return store(source, splits[source.name][0])
        except build.NoText:  # all documents are validation text, as a single one was in older runs
            opened = store(source, ("all", 0.0))
            whole.add(source.name)
            if note is not None:
                note(
                    f"data.valid_fraction {valid_fraction:g} would hold all of {source.name!r} out: training on all of it, "
                    f"without a validation set of it; give one with --data.valid"
                )
            return opened

    def given_sets(option: str, given: Sequence[documents.Source]) -> dict[str, TokenStore]:
        try:
            return {source.name: store(source, ("all", 0.0)) for source in given}
        except build.NoText as error:
            raise build.NoText(f"{option}: {error}") from None

    # The given sets first, which are small, so that their errors come before the training text is tokenized.
    held_out = given_sets("data.valid", valid_sources)
    tests = given_sets("data.test", test_sources)
    training = tuple(training_store(source) for source in sources)
    if not valid:
        for source in sources:
            if source.name in whole or source.name not in splits:
                continue
            # The validation side of a single source is called "valid"; of several, each is a set named like its source.
            try:
                held_out["valid" if len(sources) == 1 else source.name] = store(
                    source, splits[source.name][1]
                )
            except build.NoText:
                if note is not None:
                    note(
                        f"data.valid_fraction {valid_fraction:g} selects no text of {source.name!r}: it has too little; "
                        f"give validation text with --data.valid"
                    )
    if note is not None and worker == 0:
        for option, given in (("data.valid", held_out if valid else {}), ("data.test", tests)):
            for name, opened in given.items():
                if f"{option} {name}" not in said:
                    for line in _training_documents_in(option, opened, training, encoder):
                        note(line)
    return Corpus(
        train=training,
        weights=mixture_weights(sources),
        valid=as_held_out(held_out),
        test=as_tests(tests, held_out),
    )


def _training_files_in(
    option: str, sets: Sequence[documents.Source], training: Sequence[documents.Source]
) -> Iterator[tuple[documents.Source, str]]:
    """Each validation or test set that shares files (by device and inode) with the training text, with a warning."""
    owners = {documents.file_identity(path): source.name for source in training for path in source.paths}
    owners.pop(None, None)
    for source in sets:
        found = [path for path in source.paths if documents.file_identity(path) in owners]
        if found:
            owner = owners[documents.file_identity(found[0])]
            yield (
                source,
                f"{option} {source.name!r} overlaps with the training text: {len(found):,} of its {len(source.paths):,} "
                f"files ({found[0]}) also belong to the training source {owner!r}, so that the loss says nothing about "
                f"unseen text; remove them from data.train, or use data.valid_fraction instead",
            )


def _training_documents_in(
    option: str, held_out: TokenStore, training: Sequence[TokenStore], encoder: Tokenizer
) -> Iterator[str]:
    """A warning if documents of a validation or test set also occur in the training text, word for word."""
    found = find_overlap(held_out, training)
    if found is None:
        return
    ids = held_out.read(found.start, min(found.stop - found.start, _SHOWN_TOKENS))
    yield (
        f"{option} {held_out.name!r} overlaps with the training text: {found.documents:,} of its "
        f"{found.of_documents:,} documents ({found.tokens / found.of_tokens:.1%} of its tokens) also stand in it, the "
        f"first in the training source {found.source!r} ({one_line(encoder.decode(ids.tolist()))[:_SHOWN_TOKENS]!r}), "
        f"so that the loss says less about unseen text; remove them from one of the two, or use data.valid_fraction "
        f"instead"
    )


def as_held_out(sets: dict[str, Any]) -> dict[str, Any]:
    """Rename a validation set called ``train``, because ``train/loss`` is the training loss."""
    return {"valid/train" if name == "train" else name: one for name, one in sets.items()}


def as_tests(sets: dict[str, Any], held_out: Collection[str]) -> dict[str, Any]:
    """Name test sets differently from all validation sets.

    A single one is called ``test``. If there are several, or a validation set is itself called ``test``, they are called
    ``test/NAME`` (names of sources contain no slash)."""
    alone = len(sets) == 1 and "test" not in held_out
    return {"test" if alone else f"test/{name}": one for name, one in sets.items()}
