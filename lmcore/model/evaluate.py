"""Validation loss: the plain cross-entropy of every token of a validation set, exact for any number of ranks.

The last, partial block is scored too: its missing labels are ignored, and nothing is repeated. Label smoothing,
z-loss and dropout are off. Ranks exchange sums, and the only division comes last.

Bits per byte = nats / ln 2 / UTF-8 bytes of the scored text; the nats include end-of-document tokens. It does not
depend on the tokenizer, so that models with different vocabularies can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcore.conventions import IGNORED_LABEL
from lmcore.errors import FaultError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on one validation set.

    ``nats`` is the sum of -ln p over the ``tokens`` scored labels; ``bytes`` is the number of UTF-8 bytes of those labels,
    or ``None`` if the tokenizer does not know it exactly. With ``loss.factory``, ``tokens`` is the sum of its counts,
    which need not be a whole number.
    """

    nats: float
    tokens: float
    bytes: int | None

    @property
    def loss(self) -> float:
        """Mean nats per token; NaN if there are no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if it overflows a float, NaN if the loss is NaN."""
        return math.inf if self.loss > 709 else math.exp(self.loss)  # exp(709.8) is the largest double

    @property
    def bits_per_byte(self) -> float | None:
        """nats / ln 2 / bytes; ``None`` if the number of bytes is not known exactly."""
        return None if not self.bytes else self.nats / math.log(2) / self.bytes


def evaluate(
    engine: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    byte_lengths: np.ndarray | None = None,
    on_micro_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Score a validation set. Collective: every rank calls it, with the same number of micro-batches.

    Example::

        result = evaluate(engine, EvalBatches(blocks, micro_batch_blocks=8))
        result.loss, result.perplexity

    Args:
        engine: :class:`lmcore.engine.engine.Engine`, prepared.
        batches: micro-batches of this rank on the device; ``labels`` (B, T) are -100 where nothing is scored.
        byte_lengths: (V,) UTF-8 bytes of each token id, or ``None`` if unknown.
        on_micro_batch: called after each micro-batch, to move a progress bar.

    Raises:
        FaultError: on every rank, if there is no label to score.
    """
    device = engine.device
    lengths = (
        None if byte_lengths is None else torch.as_tensor(byte_lengths, dtype=torch.int64, device=device)
    )
    # float64, so that the sum over a large set keeps the digits by which two runs are compared.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with engine.evaluation(), torch.no_grad():
        for batch in batches:
            loss_sum, count = engine.forward(batch)
            sums[0] += loss_sum.double()
            sums[1] += count.double()
            if lengths is not None:
                labels = batch["labels"]
                # No boolean index: the host would have to wait for its size.
                sums[2] += (lengths[labels.clamp_min(0)] * (labels != IGNORED_LABEL)).sum().double()
            if on_micro_batch is not None:
                on_micro_batch()
    nats, tokens, scored_bytes = engine.sum_over_ranks(sums).tolist()
    if not tokens:
        raise FaultError(
            "a validation or test set has no label to score: all of its labels are -100, or loss.factory counts 0; give "
            "labels, or leave the set out"
        )
    # The user's loss may weight its labels: truncating a fractional count would change the loss.
    whole = int(tokens) if tokens.is_integer() else tokens
    return Evaluation(nats=nats, tokens=whole, bytes=int(scored_bytes) if lengths is not None else None)
