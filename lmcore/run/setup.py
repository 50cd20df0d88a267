"""Builds the parts of a run from its options: data, tokenizer, model, optimizer, engine.

``train_lm.py`` and the commands of ``lmcore`` build their parts here, so that they cannot differ. Most functions only pass a
section of the options to the module that implements it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmcore.config.curves import Curve, first_value, values_of
from lmcore.config.presets import describe_preset, model_type_and_fields, zero_init
from lmcore.config.schema import RunConfig, global_batches, keys, plain
from lmcore.conventions import LONGEST_DEFAULT_BLOCK_TOKENS
from lmcore.data import corpus, custom
from lmcore.data.blocks import StoreBlocks
from lmcore.data.context import Context, check_divides
from lmcore.data.order import Phase, phases_from_options
from lmcore.data.store.inventory import record_use, stores_of, stores_trained_on
from lmcore.data.store.manifest import MANIFEST
from lmcore.data.store.remote import local_store_dir
from lmcore.data.stream import StreamDataset
from lmcore.data.text import listing
from lmcore.data.tokenizer.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from lmcore.data.tokenizer.training import train_tokenizer as train_on_texts
from lmcore.disk import refuse_unwritable
from lmcore.errors import RequestError
from lmcore.humanize import amount
from lmcore.model import build, lora, optim, schedules
from lmcore.model.config import configured_context_length
from lmcore.model.cpu_kernels import ATTENTION
from lmcore.model.module import ModelWithLoss, head_parameters, vocabulary_parameters
from lmcore.model.token_mixing import (
    attention_dropout,
    how_documents_meet,
    why_no_context_parallel,
    why_no_language_model,
    why_no_sequence_lengths,
)
from lmcore.plugins import import_path
from lmcore.run.folder import RunFolder
from lmcore.storage import is_url

if TYPE_CHECKING:  # commands that need no engine must not pay for importing accelerate
    from lmcore.engine.engine import Engine
    from lmcore.run.budget import Sizes


Task = Callable[..., AbstractContextManager[Callable[..., None]]]
Note = Callable[[str], None]


def silent_task(*_: Any, **__: Any) -> AbstractContextManager[Callable[..., None]]:
    """A task without a progress bar."""
    return nullcontext(lambda *_, **__: None)


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: training blocks, validation and test blocks by name, and the tokenizer (``None`` with ``data.factory``)."""

    train: Any
    valid: dict[str, Any]
    test: dict[str, Any]
    encoder: Tokenizer | None
    block_size: int
    phases: tuple[Phase, ...] = (Phase(),)
    collate: Callable[[list[Any]], dict[str, Any]] | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)


def block_size_of(config: RunConfig) -> int:
    """``data.block_size``, by default the model's context.

    Raises:
        RequestError: larger than the context; both numbers are named.
    """
    named = config.model
    type, fields = model_type_and_fields(config)
    context = None
    if type is not None or named.from_pretrained is not None:
        context = configured_context_length(type, fields, named.from_pretrained, named.revision)
    asked = config.data.block_size
    if asked is None:
        return min(context or LONGEST_DEFAULT_BLOCK_TOKENS, LONGEST_DEFAULT_BLOCK_TOKENS)
    if context is not None and asked > context:
        raise RequestError(
            f"data.block_size {asked} is larger than the model's context {context}: make it smaller, or give the "
            f"model a longer context in model.config"
        )
    return asked


def reading_of(config: RunConfig) -> corpus.Reading:
    """How text is read where a source does not say it itself."""
    return corpus.Reading(
        text_field=config.data.text_field, unit=config.data.unit, encoding=config.data.encoding
    )


def valid_fraction_of(config: RunConfig) -> float:
    """The fraction of the training documents that is used for validation; 0 if ``data.valid`` is given."""
    return 0.0 if config.data.valid else config.data.valid_fraction or 0.0


def splits_of(config: RunConfig, run_dir: Path, *, keep: bool = True) -> corpus.Splits:
    """How the training text of a run in ``run_dir`` is split for validation. A resumed run keeps its split.

    Args:
        keep: record the split in ``data.store_dir``.
    """
    named = Path(config.resume) if config.resume not in ("auto", "never", "best") else None
    # A checkpoint of this run may be given by the name of its folder only (as in reader.find).
    begun = named.parent.parent if named is not None and (named.is_dir() or len(named.parts) > 1) else run_dir
    goes_on = config.resume != "never" and any((begun / "checkpoints").glob("step-*"))
    begun_with: set[str] | None = None
    if goes_on:
        listed = stores_of(begun) or stores_trained_on(begun, config.data.store_dir)
        begun_with = {Path(one).name for one in listed}
    return corpus.splits_of(
        reading_of(config).sources(config.data.train or [corpus.STDLIB])
        if config.data.factory is None
        else [],
        valid_fraction_of(config),
        store_dir=config.data.store_dir if keep else None,
        begun_with=begun_with,
        streamed=config.data.mode == "stream",
    )


def train_tokenizer(
    config: RunConfig,
    folder: Path | None,
    *,
    note: Note,
    task: Task = silent_task,
    splits: corpus.Splits | None = None,
) -> Tokenizer:
    """Train the tokenizer that the configuration describes, and save it to ``folder`` if that is given.

    Args:
        splits: how the text is split for validation; default: as for a new run.
    """
    if splits is None:
        splits = splits_of(replace(config, resume="never"), Path(), keep=folder is not None)
    bad: list[str] = []
    options = config.tokenizer
    with task("training the tokenizer"):
        made = train_on_texts(
            corpus.training_texts(
                config.data.train,
                reading=reading_of(config),
                splits=splits,
                max_bytes=options.sample_bytes,
                seed=config.seed,
                bad=lambda record: bad.append(str(record)),
            ),
            folder=folder,
            vocab_size=options.vocab_size or 0,
            seed=config.seed,
            model_type=options.model_type,
            character_coverage=options.character_coverage,
            split_digits=options.split_digits,
            byte_fallback=options.byte_fallback,
            normalization_rule_name=options.normalization,
            user_symbols=options.user_symbols,
            model_max_length=block_size_of(config),
            made_from=tokenizer_source_of(config, splits),
        )
    for line in made.notes:
        note(f"tokenizer: {line}")
    if bad and config.data.on_error == "raise":
        raise RequestError(f"{bad[0]}: fix the record, or skip bad records with --data.on_error skip")
    return made


def tokenizer_source_of(config: RunConfig, splits: corpus.Splits) -> dict[str, Any]:
    """Everything that determines the result of :func:`train_tokenizer`."""
    names = (
        *("vocab_size", "model_type", "character_coverage", "byte_fallback", "split_digits"),
        *("normalization", "user_symbols"),
    )
    return corpus.tokenizer_source(
        config.data.train,
        reading=reading_of(config),
        valid_fraction=valid_fraction_of(config),
        splits=splits,
        max_bytes=config.tokenizer.sample_bytes,
        seed=config.seed,
        options={name: getattr(config.tokenizer, name) for name in names},
    )


@listing.remembered()
def open_data(
    config: RunConfig,
    home: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_main: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    note: Note = print,
    task: Task = silent_task,
) -> Data:
    """Text -> tokenizer -> token stores -> blocks. All ranks call it; each takes its share of the work.

    Args:
        home: folder of the run's tokenizer.
        on_main: runs a function on rank 0 and returns its result, or raises its error, on every rank.
    """
    block_size = block_size_of(config)
    RunFolder(home.parent).refuse_odd_files()  # `prepare` and `order` write there as well
    splits = splits_of(config, home.parent)
    encoder = None
    if config.data.factory is None or config.tokenizer.path is not None:
        encoder = open_tokenizer(config, home, splits, on_main=on_main, note=note, task=task)
    if config.data.factory is not None:
        return open_own_data(config, encoder, block_size)
    assert encoder is not None
    streamed = config.data.mode == "stream"
    sources = reading_of(config).sources(config.data.train or [corpus.STDLIB])
    if rank == 0:
        for line in corpus.lost_in_tokens(sources, encoder):
            note(line)
    with task("tokenizing", unit="bytes") as advance:
        sets = corpus.open_corpus(
            encoder,
            train=() if streamed else config.data.train or [corpus.STDLIB],
            valid=config.data.valid,
            test=config.data.test,
            valid_fraction=valid_fraction_of(config),
            splits={} if streamed else splits,
            reading=reading_of(config),
            store_dir=config.data.store_dir,
            eos=config.data.eos,
            processes=config.data.processes or max(1, len(os.sched_getaffinity(0)) // world_size),
            worker=rank,
            on_error=config.data.on_error,
            max_bad_fraction=config.data.max_bad_fraction,
            progress=lambda progress: advance(
                done=progress.read_bytes, total=progress.total_bytes, also=progress.words()
            ),
            note=note,
            streamed=sources if streamed else (),
        )
    on_main(partial(_record_stores, home.parent, sets))  # this also waits until every rank has all stores
    pad_id = encoder.eos_id if encoder.pad_id is None else encoder.pad_id
    blocks = partial(
        StoreBlocks,
        block_size=block_size,
        document_mask=config.data.document_mask,
        pad_id=pad_id,
    )
    rows = [("tokenizer", f"{encoder.vocab_size:,} pieces, {encoder.fingerprint[:12]}")]
    if streamed:
        phases = phases_from_options(
            config.data.phases, [s.name for s in sources], corpus.mixture_weights(sources)
        )
        train: Any = StreamDataset(
            sources,
            encoder,
            block_size=block_size,
            lanes=config.data.stream_lanes or math.gcd(*global_batches(config, block_size)),
            seed=config.seed,
            window_blocks=config.data.shuffle_window,
            shuffle=config.data.shuffle,
            phases=phases,
            eos=config.data.eos,
            document_mask=config.data.document_mask,
            on_error=config.data.on_error,
            max_bad_fraction=config.data.max_bad_fraction,
            note=note,
        )
        rows += [
            (f"text ({source.name})", f"{amount(len(source.paths), 'file')}, streamed") for source in sources
        ]
    else:
        phases = phases_from_options(config.data.phases, [store.name for store in sets.train], sets.weights)
        train = blocks(sets.train, seed=config.seed, shuffle=config.data.shuffle, phases=phases)
        rows += [(f"text ({store.name})", describe_store(store)) for store in sets.train]
        for store in sets.train:
            if not store.n_blocks(block_size):
                note(
                    f"source {store.name!r} has {store.n_tokens:,} tokens, not one block of {block_size:,} with its labels: nothing "
                    f"of it is trained on; put it into one source with other text, or give a smaller data.block_size"
                )
    rows += [(f"validation ({name})", describe_store(store)) for name, store in sets.valid.items()]
    rows += [(name, describe_store(store)) for name, store in sets.test.items()]
    return Data(
        train=train,
        valid={name: blocks([store], tails=True) for name, store in sets.valid.items()},
        test={name: blocks([store], tails=True) for name, store in sets.test.items()},
        encoder=encoder,
        block_size=block_size,
        phases=phases,
        rows=rows,
    )


def _record_stores(run_dir: Path, sets: corpus.Corpus) -> None:
    """Record which stores the run uses, for ``lmcore stores``: a store that no run names may be removed."""
    stores = [*sets.train, *sets.valid.values(), *sets.test.values()]
    # `order` and `plan` also read runs whose folder is read-only or does not exist.
    with contextlib.suppress(OSError):
        record_use(run_dir, [store.folder for store in stores if store.folder is not None])


def given_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer that is given, or that comes with pretrained weights; ``None`` if one must be trained.

    Raises:
        RequestError: ``model.from_pretrained`` comes without one.
    """
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path, revision=config.tokenizer.revision)
    weights = config.model.from_pretrained
    if weights is None or config.tokenizer.train:
        return None
    try:
        return load_tokenizer(weights, revision=config.model.revision)
    except RequestError as error:
        raise RequestError(
            f"model.from_pretrained {weights} comes without its tokenizer ({error}): give it with tokenizer.path, or "
            f"train a new one, whose ids mean other text to these weights, with --tokenizer.train true"
        ) from error


def open_tokenizer(
    config: RunConfig,
    home: Path,
    splits: corpus.Splits,
    *,
    on_main: Callable[[Callable[[], Any]], Any],
    note: Note,
    task: Task,
) -> Tokenizer:
    """The run's tokenizer: a given one (:func:`keep_tokenizer` copies it into ``home``), or one that is trained into ``home``.

    An existing trained tokenizer is used if it was made from the same text with the same options, or if there are checkpoints
    to resume from, which were trained with it. Otherwise a new one is trained, and a note says why.
    """
    resumes = config.resume != "never" and any((home.parent / "checkpoints").glob("step-*"))
    if config.tokenizer.path is not None or not (resumes and (home / "tokenizer.json").exists()):
        given = given_tokenizer(config)
        if given is not None:
            _note_origin(config, given, note)
            return given

    def make() -> None:
        if config.model.from_pretrained is not None and not config.tokenizer.train:
            return  # a copy of the weights' own tokenizer, which was not made from the text of this run
        reason = unfit_reason(config, home, splits)
        if reason and resumes and (home / "tokenizer.json").exists():
            note(
                f"tokenizer: the one of the checkpoints here is used; what it was made of has changed: {reason}"
            )
        elif reason is not None:
            if reason:
                note(f"tokenizer: the one in {home} is replaced: {reason}")
            _refuse_store_dir(config)
            train_tokenizer(config, home, note=note, task=task, splits=splits)

    on_main(make)
    return load_tokenizer(home)


def _refuse_store_dir(config: RunConfig) -> None:
    """Before minutes of training a tokenizer. Stores that are there already may be all that the run needs."""
    place = config.data.store_dir
    stored = config.data.mode != "stream" or config.data.valid or config.data.test
    if config.data.factory is None and stored and not is_url(place):
        folder = local_store_dir(place)
        if not any(folder.glob(f"*/{MANIFEST}")):
            refuse_unwritable(folder, "--data.store_dir")


def unfit_reason(config: RunConfig, home: Path, splits: corpus.Splits) -> str | None:
    """Why the tokenizer in ``home`` is not the one that the configuration would train; ``None`` if it is, and empty if there
    is none."""
    if not home.is_dir() or not any(home.iterdir()):
        return ""
    try:
        there = load_tokenizer(home)
    except RequestError as error:
        return str(error)
    made_from = there.record.get("made_from") if isinstance(there, SentencePieceTokenizer) else None
    if not isinstance(made_from, dict):
        return "what it was made of is not known"
    return corpus.source_changes(made_from, tokenizer_source_of(config, splits)) or None


def _note_origin(config: RunConfig, given: Tokenizer, note: Note) -> None:
    weights = config.model.from_pretrained
    if weights is None or config.tokenizer.train:
        return
    if config.tokenizer.path is None:
        note(f"tokenizer: that of {weights} (--tokenizer.train true trains a new one)")
    elif Path(weights).is_dir():
        with contextlib.suppress(RequestError):  # it has none to compare with
            if load_tokenizer(weights).fingerprint != given.fingerprint:
                note(
                    f"tokenizer: {config.tokenizer.path} is not the tokenizer of {weights}: the weights know other ids"
                )


def keep_tokenizer(home: Path, data: Data, *, note: Note) -> None:
    """Copy a given tokenizer to ``home``. Called after a checkpoint there has been loaded, which refuses another tokenizer."""
    if data.encoder is None:
        return
    with contextlib.suppress(RequestError):
        if home.is_dir() and load_tokenizer(home).fingerprint == data.encoder.fingerprint:
            return
    data.encoder.save(home, model_max_length=data.block_size)
    for line in data.encoder.notes:
        note(f"tokenizer: {line}")


def open_own_data(config: RunConfig, encoder: Tokenizer | None, block_size: int) -> Data:
    """The data of ``data.factory(**data.config)``, which returns a dataset, or a mapping with ``train`` and optionally ``valid``,
    ``test`` (datasets, or mappings of names to datasets) and ``collate``."""
    made = import_path(config.data.factory or "", "data.factory")(**config.data.config)
    parts = dict(made) if isinstance(made, Mapping) else {"train": made}
    unknown = sorted(parts.keys() - {"train", "valid", "test", "collate"})
    if unknown or "train" not in parts:
        raise RequestError(
            f"data.factory {config.data.factory} returned the keys {', '.join(map(str, parts))}: give train, and "
            f"optionally valid, test and collate"
        )
    wrap = partial(custom.wrap, seed=config.seed)

    def named(name: str) -> dict[str, Any]:
        sets = parts.get(name) or {}
        sets = sets if isinstance(sets, Mapping) else {name: sets}
        return {key: wrap(value) for key, value in sets.items()}

    train = wrap(parts["train"], shuffle=config.data.shuffle)
    valid, test = named("valid"), named("test")
    for dataset in [train, *valid.values(), *test.values()] if parts.get("collate") is None else []:
        custom.refuse_wrong_items(dataset)
    return Data(
        train=train,
        valid=corpus.as_held_out(valid),
        test=corpus.as_tests(test, valid),
        encoder=encoder,
        block_size=block_size,
        collate=parts.get("collate"),
        rows=[("data", config.data.factory or "")],
    )


def compare_data(data: Data, *, gather: Callable[[Any], list[Any]], note: Note = print) -> None:
    """Refuse data that are not the same on every rank: the ranks divide positions among them, which must mean the same blocks on
    each. Collective.

    Args:
        gather: returns every rank's value, in rank order, on every rank.
        note: called with a warning if the first items of the user's own datasets differ. They may be random, as with
            augmentation; but each rank may also have only a share of the data, of which only a part would be trained on.

    Raises:
        RequestError: the length, the text or the order of a set differs.
    """
    sets = {"train": data.train}
    for kind, named in (("valid", data.valid), ("test", data.test)):
        sets |= {kind if name == kind else f"{kind} {name}": dataset for name, dataset in named.items()}
    own = {name: str(getattr(dataset, "fingerprint", "")) for name, dataset in sets.items()}
    items = {n: d.hash_of_first_item() for n, d in sets.items() if isinstance(d, custom.MapData)}
    first, *others = gather((own, items))
    whole = "every rank must have the whole of the same data, and lmcore gives each rank its share of it"
    for rank, (other, _) in enumerate(others, 1):
        for name in dict.fromkeys([*first[0], *other]):
            values = [side.get(name, "missing") for side in (first[0], other)]
            if values[0] != values[1]:
                raise RequestError(
                    f"the data of rank 0 and rank {rank} differ ({name}: {values[0]}; {values[1]}): {whole}. Look for a split by "
                    "rank, numbers drawn without a seed, or another text on another machine"
                )
    for rank, (_, other) in enumerate(others, 1):
        for name, value in first[1].items():
            if value != other[name]:
                note(
                    f"warning: data.factory: the first item of {name} is another one on rank {rank} than on rank 0. That is right "
                    f"only where items are drawn anew at each reading; else {whole}"
                )
                return


def context_of(config: RunConfig, engine: Engine, module: ModelWithLoss, *, note: Note = print) -> Context:
    """Which part of each block the batches of this rank hold, and how documents are separated. Collective.

    Raises:
        RequestError: the model does not support ``train.context_parallel`` (the message says why), or
            ``data.document_mask`` would have no effect in it.
    """
    size, block_size = engine.context_parallel, block_size_of(config)
    wanted = config.data.document_mask
    attention = str(getattr(getattr(module.model, "config", None), "_attn_implementation", None))
    if size == 1 and (not wanted or attention.startswith("flash_attention")):
        # Flash attention uses position ids only in micro-batches of one block.
        return Context(sequence_lengths=wanted)
    reason = meet = None
    if engine.is_main:
        reason = (why_no_sequence_lengths if size == 1 else why_no_context_parallel)(module, block_size)
        if reason is None and engine.device.type == "cuda":
            if engine.precision == "fp32":
                reason = "the kernels of a GPU take bf16 and fp16 only (train.precision is fp32)"
            elif dropout := attention_dropout(module):
                reason = f"the kernels of a GPU drop no attention weights (the model's attention dropout is {dropout:g})"
        if size == 1:
            meet = how_documents_meet(module, sequence_lengths=reason is None)
    reason, meet = engine.broadcast_object((reason, meet))
    if size > 1:
        check_divides(block_size, size)
        refuse_context_parallel(size, reason)
    name = module.model.__class__.__name__
    if meet == "everywhere":
        raise RequestError(
            f"data.document_mask does nothing in {name}, which makes no mask of position_ids: with it or without, tokens "
            "depend on the other documents of their block. Leave it out, or take a family that keeps documents apart"
        )
    if meet == "by position":
        raise RequestError(
            f"data.document_mask gives positions that begin at 0 in each document, and {name} counts its own from another "
            "number: trained with it, the model would be used at positions that it has not learned. Leave it out, or take "
            "another family"
        )
    if meet is not None:
        note(
            f"data.document_mask: {name} keeps documents apart in attention only; tokens still depend on the document "
            "before them in another part of it (a state or a convolution over the block)"
        )
    if reason is not None and attention == ATTENTION:
        note(f"data.document_mask: by a mask of T x T numbers a block, slower and larger: {reason}")
    return Context(
        rank=engine.context_rank, size=size, sequence_lengths=size > 1 or (wanted and reason is None)
    )


def refuse_context_parallel(size: int, reason: str | None) -> None:
    """Raise ``RequestError`` if there is a reason why ranks cannot share blocks."""
    if reason is not None:
        raise RequestError(f"train.context_parallel {size} is not available for this model: {reason}")


def describe_store(store: Any) -> str:
    """The documents, bytes and tokens of a store, as far as its format records them."""
    words = [amount(store.n_tokens, "token")]
    if store.n_documents is not None:
        words.insert(0, amount(store.n_documents, "document"))
    if store.n_bytes is not None:
        mega = store.n_bytes / 1e6
        words.insert(-1, f"{mega:,.1f} MB" if mega >= 0.1 else f"{store.n_bytes / 1e3:,.1f} kB")
    return ", ".join(words)


# ----------------------------------------------------------------------------------------------------------- model


def model_name(config: RunConfig) -> str:
    """The name of the model in messages."""
    if config.model.preset is not None:
        return describe_preset(config)
    return config.model.factory or config.model.from_pretrained or config.model.type or ""


def describe_model(config: RunConfig, model: Any, counts: Mapping[str, int]) -> str:
    """Name and number of parameters for the start table; if not all are trained, also the number of trained ones."""
    words = f"{model_name(config)}, {counts['total']:,} parameters"
    if counts["trained"] != counts["total"]:
        words += f", {counts['trained']:,} trained"
    adapters = lora.describe(model)
    return f"{words} ({adapters})" if adapters else words


def open_model(config: RunConfig, data: Data, engine: Engine, *, note: Note = print) -> ModelWithLoss:
    """The model with its loss, without weights on ranks that receive their parts from rank 0. Collective."""
    encoder = data.encoder
    if config.model.factory is not None and engine.sharded:
        note("model.factory: every rank builds the whole model in host memory before it keeps its own part")
    module, refused = None, None
    try:
        module = build_model(
            config,
            vocab_size=encoder.vocab_size if encoder else None,
            special_ids=encoder.special_ids if encoder else {},
            block_size=data.block_size,
            weights=engine.needs_weights,
            note=note,
        )
    except RequestError as refusal:  # perhaps only on this rank: the others must not wait for it
        refused = refusal
    for word in engine.gather_object(refused):
        if word is not None:
            raise word
    assert module is not None
    if config.data.factory is not None and data.collate is None:
        for dataset in (data.train, *data.valid.values(), *data.test.values()):
            if (item := custom.first_item(dataset)) is not None:
                module.check_keys(item)  # now, instead of at the first step after all preparation
    if config.model.factory is None and config.loss.factory is None and config.data.factory is None:
        reason = why_no_language_model(module) if engine.needs_weights else None
        for word in engine.gather_object(reason):
            if word is not None:
                raise RequestError(f"{model_name(config)}: {word}; take another family")
    if (size := engine.tensor_parallel) > 1:
        from lmcore.engine import tensor  # lazily, as below

        reason = tensor_parallel_problem(module.model, size) if engine.is_main else None
        tensor.refuse(size, engine.broadcast_object(reason))
    return module


def tensor_parallel_problem(model: Any, size: int) -> str | None:
    """Why the layers of a model cannot be shared by ``size`` ranks; ``None`` if they can. Found by trying it."""
    from lmcore.engine import tensor  # lazily, as below

    return tensor.why_not(model, size) or tensor.why_not_equal(model, size)


def build_model(
    config: RunConfig,
    *,
    vocab_size: int | None,
    special_ids: Mapping[str, int],
    block_size: int,
    weights: bool = True,
    note: Note = print,
) -> ModelWithLoss:
    """Build the model with its loss; of the tokenizer only its numbers are needed. See :func:`open_model`."""
    type, fields = model_type_and_fields(config)
    built = build.build_model(
        type=type or "",
        config_overrides=fields,
        vocab_size=vocab_size,
        special_ids=special_ids,
        block_size=block_size,
        from_pretrained=config.model.from_pretrained,
        revision=config.model.revision,
        factory=config.model.factory,
        attention=config.model.attention,
        seed=config.seed,
        zero_init=zero_init(config),
        weights=weights,
        note=note,
    )
    adapt(config, built)
    return with_loss(config, built, note=note)


def adapt(config: RunConfig, built: torch.nn.Module, *, weights: bool = True) -> None:
    """Add low-rank adapters to the model, if ``model.lora.rank`` is set."""
    if config.model.lora.rank:
        lora.refuse_unknown_targets(built, config.model.lora.target_modules)
        lora.adapt(built, seed=config.seed, weights=weights, **vars(config.model.lora))


def with_loss(
    config: RunConfig, built: torch.nn.Module, *, probe: torch.nn.Module | None = None, note: Note = print
) -> ModelWithLoss:
    """Choose the parameters that are trained, and wrap the model with its loss; ``probe`` as in :class:`ModelWithLoss`."""
    optim.choose_trained(
        built.named_parameters(), train_only=config.optim.train_only, freeze=config.optim.freeze
    )
    own_loss: Any = None
    if config.loss.factory is not None:
        own_loss = partial(import_path(config.loss.factory, "loss.factory"), **config.loss.config)
    return ModelWithLoss(
        built,
        chunk="auto" if config.loss.chunk is None else config.loss.chunk,
        label_smoothing=config.loss.label_smoothing,
        z_loss=config.loss.z_loss,
        loss_factory=own_loss,
        probe=probe,
        note=note,
    )


def make_optimizer(
    config: RunConfig,
    module: ModelWithLoss,
    named: list[tuple[str, torch.nn.Parameter]],
    *,
    note: Callable[[str], object] = lambda line: None,
) -> torch.optim.Optimizer:
    """The optimizer for the named parameters that the engine passes.

    Args:
        note: called with a line for each option that the user's optimizer class does not accept.
    """
    groups = optim.parameter_groups(
        named,
        weight_decay=max(values_of(config.optim.weight_decay)),
        train_only=config.optim.train_only,
        freeze=config.optim.freeze,
        vocabulary=vocabulary_parameters(module.model),
        head=head_parameters(module.model),
        lr_multipliers=lr_multipliers(config),
    )
    own = ("lr", "betas", "eps", "momentum", "fused", "weight_decay", "cautious_weight_decay")
    for name in own:
        if name in config.optim.config:
            raise RequestError(f"optim.config.{name} is an option of its own: use --optim.{name}")
    # Each step sets its own. By one of 0 a resume would make no buffers to load those of the checkpoint into, and torch refuses
    # Nesterov's.
    peak = max(*values_of(config.optim.momentum), config.optim.momentum_start or 0.0)
    optimizer = optim.build_optimizer(
        config.optim.name,
        groups,
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        momentum=first_value(config.optim.momentum) if ":" in config.optim.name else peak,
        fused=config.optim.fused,
        cautious_weight_decay=config.optim.cautious_weight_decay,
        **config.optim.config,
    )
    optim.set_weight_decay(optimizer, first_value(config.optim.weight_decay))
    optim.set_momentum(optimizer, peak)
    if ":" in config.optim.name:
        for line in _without_effect(config, optimizer):
            note(line)
    return optimizer


def _without_effect(config: RunConfig, optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each option that was set but that an optimizer given by its import path does not accept."""
    names = ["betas", "eps", "fused"]
    if not any("momentum" in group for group in optimizer.param_groups):  # else every step sets it there
        names.append("momentum")
    return [
        f"optim.{name} {plain(given)} has no effect: {config.optim.name} has no argument {name}; leave it out"
        for name in names
        if (given := getattr(config.optim, name)) != keys()[f"optim.{name}"].default
        and not optim.takes_option(config.optim.name, name)
    ]


def lr_multipliers(config: RunConfig) -> dict[str, float]:
    """The learning rate of each kind of parameter as a multiple of ``optim.lr``: matrices, embedding, head, vectors."""
    return dict(vars(config.optim.lr_multipliers))


def schedules_of(
    config: RunConfig, sizes: Sizes
) -> tuple[Callable[[int], float], Callable[[int], float], Callable[[int], float]]:
    """Functions for the learning rate, momentum and weight decay: steps done -> the value of the next step.

    Raises:
        RequestError: one of them does not fit into the run.
    """
    made = learning_rates(config, sizes), momenta(config, sizes), weight_decays(config, sizes)
    for value in made:
        value(0)
    return made


def learning_rates(config: RunConfig, sizes: Sizes) -> Callable[[int], float]:
    """Steps done -> the learning rate of the next step."""
    peak = config.optim.lr
    if isinstance(config.optim.schedule, Curve):
        share = sizes.curve(config.optim.schedule)
        return lambda step: peak * share(step)
    rate = partial(
        schedules.learning_rate,
        schedule=config.optim.schedule,
        peak=peak,
        warmup_steps=sizes.length(config.optim.warmup),
        total_steps=sizes.total,
        decay_steps=sizes.length(config.optim.decay),
        min_ratio=config.optim.min_lr_ratio,
        unit="steps" if sizes.steps.is_constant else "blocks",
    )
    return lambda step: rate(sizes.done(step), step_length=sizes.done(step + 1) - sizes.done(step))


def momenta(config: RunConfig, sizes: Sizes) -> Callable[[int], float]:
    """Steps done -> the momentum of the next step (for sgd and muon; other optimizers have none)."""
    asked = config.optim.momentum
    if isinstance(asked, Curve):
        return sizes.curve(asked)
    start = config.optim.momentum_start
    if start is None:
        start = asked
        if config.optim.name.lower() == "muon":
            start = min(start, schedules.MUON_MOMENTUM_START)
    warmup = sizes.length(config.optim.momentum_warmup)
    return lambda step: schedules.momentum(sizes.done(step), start=start, end=asked, warmup_steps=warmup)


def weight_decays(config: RunConfig, sizes: Sizes) -> Callable[[int], float]:
    """Steps done -> the weight decay of the next step."""
    return sizes.curve(config.optim.weight_decay)


def describe_optimizer(config: RunConfig, sizes: Sizes) -> list[tuple[str, str]]:
    """Rows of the start table: the optimizer, its peak rates by kind of parameter, its momentum, curves."""
    asked = config.optim
    rates = {kind: asked.lr * value for kind, value in lr_multipliers(config).items()}
    if len(set(rates.values())) == 1:
        peaks = f"{asked.lr:.3g}"
    else:
        peaks = ", ".join(f"{kind} {rate:.3g}" for kind, rate in rates.items())
    rows = [
        ("optimizer", f"{asked.name.lower() if ':' not in asked.name else asked.name}, peak rate {peaks}")
    ]
    if isinstance(asked.schedule, Curve):
        rows.append(("schedule", f"{asked.schedule} (multiples of the peak rate; the whole schedule)"))
    momentum = momenta(config, sizes)
    if asked.name.lower() in ("muon", "sgd"):
        words = f"{momentum(sizes.total_steps):g}"
        if isinstance(asked.momentum, Curve):
            words = str(asked.momentum)
        # After a resume with another batch, the plan begins at that step and does not know the length of earlier steps.
        elif momentum(sizes.steps.stretches[0].step) != asked.momentum:
            words = f"{momentum(0):g} to {words} over {amount(sizes.steps_of(asked.momentum_warmup), 'step')}"
        rows.append(("momentum", words))
    if isinstance(asked.weight_decay, Curve):
        rows.append(("weight decay", str(asked.weight_decay)))
    return rows


def open_engine(config: RunConfig, *, began_in: str | None = None) -> Engine:
    """Join the processes of the run.

    Args:
        began_in: the precision of the checkpoint that will be resumed. On a CPU, ``train.precision auto`` then keeps fp32.
    """
    from lmcore.engine import launch  # lazily, as above
    from lmcore.engine.engine import Engine
    from lmcore.run.guard import wait_for_peers
    from lmcore.run.watchdog import collective_seconds

    train = config.train
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    kept = train.precision == "auto" and launched == "no" and began_in == "fp32"
    if kept and not launch.uses_cuda(os.environ):
        train = replace(train, precision="fp32")

    # The timeout is long enough for the watchdog to write the stacks of all ranks before NCCL aborts.
    limit = max(config.engine.timeout_seconds, collective_seconds(config.guard.stuck_seconds))
    wait_for_peers()
    engine = Engine(train, replace(config.engine, timeout_seconds=limit), seed=config.seed)
    if config.guard.spike == "skip" and engine.strategy.startswith("zero"):
        engine.close()
        raise RequestError(
            f"guard.spike skip is not available under {engine.strategy}: DeepSpeed itself decides which updates are "
            "applied. Use --guard.spike rewind"
        )
    if config.model.lora.rank:
        try:
            refuse_sharded_lora(engine.strategy)
        except RequestError:
            engine.close()
            raise
    return engine


def refuse_sharded_lora(strategy: str) -> None:
    """Refuse LoRA adapters (``RequestError``) under a strategy that shards weights or moments."""
    if strategy not in ("single", "ddp"):
        raise RequestError(
            f"model.lora is tested with one process and with DDP, not with {strategy}: frozen weights have "
            "neither gradients nor moments to shard; take accelerate_configs/ddp.yaml"
        )
