"""Scoring a saved model on text: loss, perplexity and bits per byte, without training.

The arithmetic is that of an evaluation during a run: every token is counted once, including tails, and sums are divided once at
the end. The text is given to the model as in its training (``data.eos``, ``data.document_mask``, ``data.unit``,
``data.block_size``). No files are left
on the disk.

Example::

    score(load_model("runs/demo"), {"valid": ["held.txt"]})["valid"].bits_per_byte
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor

from lmcore.conventions import LONGEST_DEFAULT_BLOCK_TOKENS
from lmcore.data.batches import EvalBatches
from lmcore.data.blocks import StoreBlocks
from lmcore.data.store import build
from lmcore.data.text import documents
from lmcore.disk import temporary_folder
from lmcore.errors import RequestError
from lmcore.model.config import context_length
from lmcore.model.evaluate import Evaluation, evaluate
from lmcore.model.module import ModelWithLoss
from lmcore.saved.load import Saved
from lmcore.saved.weights import device_of

TOKENS_AT_ONCE = 8192

Task = Callable[..., AbstractContextManager[Callable[..., None]]]


@final
class SingleProcess:
    """The part of an engine that :func:`lmcore.model.evaluate.evaluate` uses, for one process without training."""

    def __init__(self, module: ModelWithLoss, device: torch.device, precision: str) -> None:
        # Not moved if it is already there: layers that are read when they compute have no weights that could be moved.
        self.module = (module if device_of(module) == device else module.to(device)).eval()
        self.device = device
        self._precision = precision

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss_sum, count) of one micro-batch, both 0-d tensors."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            return self.module(**batch)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A no-op, because the module is always in evaluation mode."""
        yield

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The tensor itself, because there is only one rank."""
        return tensor


def score(
    saved: Saved,
    sets: Mapping[str, Sequence[str | dict[str, Any]]],
    *,
    block_size: int | None = None,
    blocks: int | None = None,
    precision: str = "fp32",
    text_field: str = "text",
    unit: str | None = None,
    encoding: str = "utf-8",
    on_error: str = "raise",
    task: Task = lambda *_, **__: nullcontext(lambda *_, **__: None),
) -> dict[str, Evaluation]:
    """The evaluation of each set.

    Args:
        sets: name -> entries as in ``data.train``; the sources of one set are scored together.
        block_size: number of tokens that the model sees at once; default: as in training, which is ``data.block_size`` of the
            run, or the model's context, at most 1,024. Positions beyond the blocks of the training were never trained.
        blocks: number of blocks to score of each set, spread over it; default: all.
        precision: ``fp32`` or ``bf16`` (autocast).
        unit: what one document of a plain text is; default: ``data.unit`` of the run.
        task: makes a progress bar (:meth:`lmcore.report.report.Report.task`).

    Raises:
        RequestError: a text does not exist, blocks are longer than the model's context, or the model has no tokenizer.
    """
    if saved.tokenizer is None:
        raise RequestError(
            f"{saved.path}: this run has no tokenizer (data.factory made its batches), so no text can be scored; its own "
            "validation data are scored in training"
        )
    size = _block_size(saved, block_size)
    encoder = saved.tokenizer
    device = device_of(saved.model)
    engine = SingleProcess(ModelWithLoss(saved.model), device, precision)
    pad_id = encoder.eos_id if encoder.pad_id is None else encoder.pad_id
    results: dict[str, Evaluation] = {}
    for name, entries in sets.items():
        sources = documents.resolve_sources(
            list(entries), text_field=text_field, unit=unit or saved.unit, encoding=encoding
        )
        with temporary_folder("lmcore-score-") as folder:
            stores = [
                build.build_store(
                    source,
                    encoder,
                    store_dir=folder,
                    eos=saved.eos,
                    on_error=on_error,
                    max_bad_fraction=1.0,
                )
                for source in sources
            ]
            dataset = StoreBlocks(
                stores, block_size=size, tails=True, document_mask=saved.document_mask, pad_id=pad_id
            )
            batches = EvalBatches(
                dataset, micro_batch_blocks=max(1, TOKENS_AT_ONCE // size), limit=blocks, device=device
            )
            with task(f"scoring {name}", total=len(batches)) as advance:
                results[name] = evaluate(
                    engine, batches, byte_lengths=encoder.byte_lengths(), on_micro_batch=advance
                )
    return results


def _block_size(saved: Saved, asked: int | None) -> int:
    context = context_length(saved.model)
    if asked is None:
        trained = saved.block_size or LONGEST_DEFAULT_BLOCK_TOKENS
        return min(context or trained, trained)
    if context is not None and asked > context:
        raise RequestError(f"--block_size {asked} is more than the model's context of {context} tokens")
    return asked
