"""What published results say about a run's learning rate, batch and number of passes over its text: rows and warnings.

Apart from the default patience of early stopping, nothing here changes a run. A number from a paper is shown with its source,
the range in which it was measured, and whether the run is inside that range.
"""

from __future__ import annotations

from lmcore.config.schema import RunConfig
from lmcore.humanize import amount, short
from lmcore.plan.scaling import published, worth_of_epoch

GOOD_PASSES = 4
"""Up to this many passes repeated text is worth nearly as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""
DEFAULT_PATIENCE = 3
"""Evaluations without an improvement after which a run over repeated text stops by itself."""


def passes(run_tokens: int, epoch_tokens: int | None) -> float | None:
    """How many times the run sees the text; ``None`` if the length of the text is not known."""
    return None if not epoch_tokens else run_tokens / epoch_tokens


def patience_of(asked: int | None, *, repeats: float | None, validated: bool, began_with: int | None) -> int:
    """``evaluate.early_stopping.patience``; if it is not given, :data:`DEFAULT_PATIENCE` for text that is seen more than once.

    Args:
        validated: whether the run evaluates a validation set at intervals.
        began_with: the patience that the resumed checkpoint was trained with: a run that began without early stopping
            continues without it.
    """
    if asked is not None:
        return asked
    return DEFAULT_PATIENCE if repeats is not None and repeats > 1 and validated and began_with != 0 else 0


def early_stopping_row(asked: int | None, patience: int, repeats: float | None) -> list[tuple[str, str]]:
    """The row of the start table if early stopping is on; otherwise none."""
    if not patience:
        return []
    words = f"after {amount(patience, 'evaluation')} without improvement"
    if asked is None:
        words += f", because the text is seen {repeats:.3g} times (--evaluate.early_stopping.patience 0: off)"
    return [("early stopping", words)]


def law_row(
    config: RunConfig, *, parameters: int, run_tokens: int, unique_tokens: int | None
) -> list[tuple[str, str]]:
    """A row with the learning rates and batches of published laws, for adamw and adam. None for fine-tuning and for
    ``data.factory``.

    Args:
        parameters: the number of parameters that take part in a matrix product (an embedding that is only looked up does not).
    """
    if config.optim.name.lower() not in ("adamw", "adam"):
        return []
    if config.model.from_pretrained is not None or config.data.factory is not None:
        return []
    laws = published([parameters], lambda _: run_tokens, unique_tokens or run_tokens)
    words = [
        f"{law.learning_rate:.2g} with {short(round(law.batch_tokens))} tokens a step ({law.source}; "
        f"{law.measured}: {'inside' if law.inside else 'outside'} its range)"
        for law in laws
        if law.learning_rate is not None and law.batch_tokens is not None
    ]
    return [("rates of published laws", "; ".join(words))]


def repetition_warning(
    config: RunConfig, repeats: float | None, *, validated: bool, patience: int
) -> str | None:
    """What to expect of text that is seen many times, and what to do; ``None`` for other runs."""
    if repeats is None or repeats <= GOOD_PASSES or config.fast_dev_run:
        return None
    remedy = "give more text, a shorter train.duration, dropout or a larger optim.weight_decay"
    if not patience:
        remedy += ", or --evaluate.early_stopping.patience 3" if validated else ", or a validation text"
    return (
        f"the text is seen {repeats:.3g} times: a token of the last pass is worth {worth_of_epoch(repeats):.0%} of a new "
        f"one (Muennighoff et al. 2023, arXiv 2305.16264: hardly less up to {GOOD_PASSES} passes; 7M to 9B parameters), and "
        f"the model may learn it by heart: {remedy}"
    )


def context_warning(config: RunConfig, *, context: int | None, block_size: int) -> str | None:
    """What the positions after the first ``block_size`` of a new model are worth; ``None`` if there are none.

    Args:
        context: the context length of the model; ``None`` if it has no limit.
    """
    named = config.model
    if context is None or context <= block_size or config.fast_dev_run:
        return None
    if named.from_pretrained is not None or named.factory is not None or config.data.factory is not None:
        return None
    return (
        f"blocks of {block_size:,} tokens never train the model's positions after {block_size:,}, although its context is "
        f"{context:,}: longer text is continued badly. Give --data.block_size {context}, or a model with a context of "
        f"{block_size:,} (--model.config.max_position_embeddings {block_size})"
    )
