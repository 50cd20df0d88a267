"""The configuration -> the arguments of the rooms: data, model, optimizer, and what the budget means in steps.

Comes in: a :class:`lmcore.config.RunConfig`. Goes out: blocks, a model with its loss, an optimizer, and
:class:`Sizes`. This is the only room beside the command line that knows the configuration: ``train_lm.py`` and the
verbs of ``python -m lmcore`` both build their parts here, so that they cannot differ. Nothing here decides anything:
each function hands plain values to the room that does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from lmcore import corpus, model, optim, tokenizer
from lmcore.blocks import BlockDataset
from lmcore.config import RunConfig, global_batch_blocks
from lmcore.duration import Duration
from lmcore.errors import RequestError
from lmcore.model import ModelWithLoss
from lmcore.order import Phase
from lmcore.tokenizer import Tokenizer

LONGEST_DEFAULT_BLOCK_TOKENS = 1024
"""A block is the model's context by default, but no longer than this: attention grows with the square."""

Task = Callable[..., AbstractContextManager[Callable[..., None]]]
Note = Callable[[str], None]


def silent_task(*_: Any, **__: Any) -> AbstractContextManager[Callable[..., None]]:
    """A task that nobody watches."""
    return nullcontext(lambda *_, **__: None)


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: training blocks, held-out blocks by name, the tokenizer (none with ``data.factory``)."""

    train: Any
    valid: dict[str, Any]
    test: dict[str, Any]
    encoder: Tokenizer | None
    block_size: int
    weights: tuple[float, ...] | None = None
    phases: tuple[Phase, ...] = (Phase(),)
    rows: list[tuple[str, str]] = field(default_factory=list)


def block_size_of(config: RunConfig) -> int:
    """``data.block_size``, by default the model's context.

    Raises:
        RequestError: larger than the context; both numbers are named.
    """
    context = model.context_length(config.model.type, config.model.config) if config.model.type else None
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
    """The share of the training documents that is held out: none where ``data.valid`` is given."""
    return 0.0 if config.data.valid else config.data.valid_fraction or 0.0


def train_tokenizer(config: RunConfig, folder: Path, *, note: Note, task: Task = silent_task) -> None:
    """Train the tokenizer that the configuration describes into ``folder``."""
    bad: list[str] = []
    with task("training the tokenizer"):
        made = tokenizer.train(
            corpus.training_texts(
                config.data.train,
                reading=reading_of(config),
                valid_fraction=valid_fraction_of(config),
                max_bytes=config.tokenizer.sample_bytes,
                seed=config.seed,
                bad=lambda record: bad.append(str(record)),
            ),
            folder=folder,
            vocab_size=config.tokenizer.vocab_size or 0,
            seed=config.seed,
            model_type=config.tokenizer.model_type,
            character_coverage=config.tokenizer.character_coverage,
            split_digits=config.tokenizer.split_digits,
            byte_fallback=config.tokenizer.byte_fallback,
            normalization_rule_name=config.tokenizer.normalization,
            user_defined_symbols=list(config.tokenizer.user_symbols),
            model_max_length=block_size_of(config),
        )
    for line in made.notes:
        note(f"tokenizer: {line}")
    if bad and config.data.on_error == "raise":
        raise RequestError(f"{bad[0]}: mend it, or let --data.on_error skip leave such records out")


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
        on_main: runs something on rank 0 and gives every rank its result or its refusal.
    """
    data, block_size = config.data, block_size_of(config)
    fraction = valid_fraction_of(config)
    if config.tokenizer.path is None:
        on_main(
            lambda: (home / "tokenizer.json").exists() or train_tokenizer(config, home, note=note, task=task)
        )
        encoder = tokenizer.load(home)
    else:
        encoder = tokenizer.load(config.tokenizer.path, revision=config.tokenizer.revision)
        on_main(lambda: encoder.save(home, model_max_length=block_size))
    with task("tokenizing", unit="bytes") as advance:
        sets = corpus.open_corpus(
            encoder,
            train=data.train,
            valid=data.valid,
            test=data.test,
            valid_fraction=fraction,
            reading=reading_of(config),
            store_dir=data.store_dir,
            eos=data.eos,
            processes=data.processes or max(1, len(os.sched_getaffinity(0)) // world_size),
            worker=rank,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction,
            progress=lambda progress: advance(done=progress.read_bytes),
            note=note,
        )
    on_main(lambda: None)  # nobody goes on before every rank has all stores

    def blocks(stores: Any, **options: Any) -> BlockDataset:
        pad_id = encoder.eos_id if encoder.pad_id is None else encoder.pad_id
        return BlockDataset.from_stores(
            stores, block_size=block_size, document_mask=data.document_mask, pad_id=pad_id, **options
        )

    phases = (Phase(weights=sets.weights),)
    return Data(
        train=blocks(sets.train, seed=config.seed, shuffle=data.shuffle, phases=phases),
        valid={name: blocks([store], drop_last=False) for name, store in sets.valid.items()},
        test={name: blocks([store], drop_last=False) for name, store in sets.test.items()},
        encoder=encoder,
        block_size=block_size,
        weights=sets.weights,
        phases=phases,
        rows=[
            ("tokenizer", f"{encoder.vocab_size:,} pieces, {encoder.fingerprint[:12]}"),
            *((f"text ({store.name})", describe_store(store)) for store in sets.train),
            *((f"held out ({name})", describe_store(store)) for name, store in sets.valid.items()),
        ],
    )


def describe_store(store: Any) -> str:
    """Documents, bytes and tokens of a store, as far as its format says."""
    words = [f"{store.n_tokens:,} tokens"]
    if store.n_documents is not None:
        words.insert(0, f"{store.n_documents:,} documents")
    if store.n_bytes is not None:
        words.insert(-1, f"{store.n_bytes / 1e6:,.1f} MB")
    return ", ".join(words)


# ----------------------------------------------------------------------------------------------------------- model


def model_name(config: RunConfig) -> str:
    """What the user called the model."""
    return config.model.factory or config.model.from_pretrained or config.model.type or ""


def open_model(config: RunConfig, data: Data, *, note: Note = print) -> ModelWithLoss:
    """The model with its loss; the same weights on every rank and under every strategy."""
    built = model.build(
        type=config.model.type,
        config_overrides=config.model.config,
        vocab_size=data.encoder.vocab_size if data.encoder else None,
        special_ids=data.encoder.special_ids if data.encoder else {},
        block_size=data.block_size,
        from_pretrained=config.model.from_pretrained,
        revision=config.model.revision,
        factory=config.model.factory,
        attention=config.model.attention,
        seed=config.seed,
        note=note,
    )
    optim.choose_trained(
        built.named_parameters(), train_only=config.optim.train_only, freeze=config.optim.freeze
    )
    return ModelWithLoss(
        built,
        chunk="auto" if config.loss.chunk is None else config.loss.chunk,
        label_smoothing=config.loss.label_smoothing,
        z_loss=config.loss.z_loss,
        loss_factory=config.loss.factory,
        note=note,
    )


def make_optimizer(
    config: RunConfig, module: ModelWithLoss, named: list[tuple[str, torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer over the named parameters that the engine hands out."""
    groups = optim.parameter_groups(
        named,
        weight_decay=config.optim.weight_decay,
        train_only=config.optim.train_only,
        freeze=config.optim.freeze,
        vocabulary=model.vocabulary_parameters(module.model),
    )
    return optim.build(
        config.optim.name,
        groups,
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        momentum=config.optim.momentum,
        fused=config.optim.fused,
        state_dtype="bfloat16" if config.optim.state_dtype == "bf16" else None,
        **config.optim.config,
    )


# ---------------------------------------------------------------------------------------------------------- budget


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the budget means here. ``end_position`` is ``None`` unless the horizon is a number of epochs."""

    global_batch_blocks: int
    micro_batch_blocks: int
    accumulation: int
    block_size: int
    steps_per_epoch: Fraction
    total_steps: int
    end_position: int | None

    @property
    def tokens_per_step(self) -> int:
        """Labels of a full step."""
        return self.global_batch_blocks * self.block_size

    def rows(self, config: RunConfig, world_size: int) -> list[tuple[str, str]]:
        """The arithmetic, for the start table."""
        epochs = float(self.total_steps / self.steps_per_epoch)
        return [
            (
                "epoch",
                f"{int(self.steps_per_epoch * self.global_batch_blocks):,} blocks of {self.block_size:,} tokens",
            ),
            (
                "global batch",
                f"{world_size} x {self.accumulation} x {self.micro_batch_blocks} (processes x accumulation x "
                f"micro-batch) = {self.global_batch_blocks} blocks = {self.tokens_per_step:,} tokens",
            ),
            (
                "budget",
                f"{config.train.duration} = {self.total_steps:,} steps = "
                f"{self.total_steps * self.tokens_per_step:,} tokens = {epochs:.2f} epochs",
            ),
        ]

    def steps_of(self, duration: Duration) -> int:
        """A duration of the configuration in whole steps; 0 for never."""
        steps = duration.to_steps(
            tokens_per_step=self.tokens_per_step,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        return steps or 0


def horizon(
    config: RunConfig, data: Data, *, world_size: int, micro_batch_blocks: int | None = None
) -> Sizes:
    """Global batch, accumulation and steps, from the configuration, the data and the number of ranks.

    Args:
        micro_batch_blocks: what ``auto`` was resolved to before (a checkpoint remembers it).

    Raises:
        RequestError: the global batch does not divide; the numbers are named.
    """
    blocks = global_batch_blocks(config, data.block_size)
    if blocks % world_size:
        raise RequestError(
            f"train.global_batch_blocks {blocks} is not a multiple of the {world_size} processes: make it "
            f"{blocks // world_size * world_size or world_size}, or start another number of processes"
        )
    share = blocks // world_size
    asked = config.train.micro_batch_blocks
    micro = asked if isinstance(asked, int) else micro_batch_blocks or largest_share(share, data.block_size)
    if share % micro and isinstance(asked, int):
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise RequestError(
            f"train.global_batch_blocks {blocks} over {world_size} processes is {share} blocks each, which "
            f"train.micro_batch_blocks {micro} does not divide: take one of {', '.join(map(str, divisors))}"
        )
    if share % micro:  # what a checkpoint remembers of another number of ranks
        micro = largest_share(share, data.block_size, at_most=micro)
    duration, epoch_blocks = config.train.duration, data.train.epoch_blocks
    steps_per_epoch = Fraction(epoch_blocks, blocks)
    total = duration.to_steps(tokens_per_step=blocks * data.block_size, steps_per_epoch=steps_per_epoch)
    if total is None or total < 1:
        raise RequestError(f"train.duration {duration} is not one step: a step has {blocks} blocks")
    end = None
    if duration.unit == "epochs":
        # N epochs end with their last block; the last step is filled up with blocks without labels.
        end = int(duration.exact() * epoch_blocks)
    return Sizes(
        global_batch_blocks=blocks,
        micro_batch_blocks=micro,
        accumulation=share // micro,
        block_size=data.block_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        end_position=end,
    )


AUTO_MICRO_BATCH_TOKENS = 8192
"""Without a measured limit ``auto`` takes at most so many tokens per forward pass: enough to fill the matrix units of
a CPU core or a GPU for small models, and little enough to fit (docs/log.md)."""


def largest_share(share: int, block_size: int, at_most: int | None = None) -> int:
    """The largest divisor of ``share`` whose tokens stay within :data:`AUTO_MICRO_BATCH_TOKENS`."""
    limit = at_most or max(1, AUTO_MICRO_BATCH_TOKENS // block_size)
    return max(divisor for divisor in range(1, min(share, limit) + 1) if share % divisor == 0)
