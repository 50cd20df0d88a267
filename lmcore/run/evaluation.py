"""Evaluation during a run: the validation loss of every set, also with the averaged weights, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np

from lmcore.config.checks import METRICS, check_metrics
from lmcore.data.batches import EvalBatches
from lmcore.engine.ranks import on_main
from lmcore.model.evaluate import evaluate
from lmcore.saved.generate import generate

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig
    from lmcore.data.context import Context
    from lmcore.engine.engine import Engine
    from lmcore.report.report import Report
    from lmcore.run.budget import Sizes
    from lmcore.run.ema import MovingAverage
    from lmcore.run.guard import Guard
    from lmcore.run.setup import Data
    from lmcore.run.state import State


AUTO_PROMPTS, AUTO_PROMPT_TOKENS = 3, 8


def prompts_of(prompts: list[str], data: Data) -> list[str]:
    """``evaluate.prompts``; for ``[auto]``, the first tokens of blocks spread over the validation text."""
    if prompts != ["auto"]:
        return prompts
    if data.encoder is None or not data.valid:
        return []
    dataset = next(iter(data.valid.values()))
    count = min(AUTO_PROMPTS, dataset.n_in_order)
    numbers = np.unique(np.linspace(0, dataset.n_in_order - 1, count).astype(np.int64))
    blocks = dataset.read_in_order(numbers)
    texts = (
        data.encoder.decode(ids[: min(AUTO_PROMPT_TOKENS, n_labels)].tolist())
        for ids, n_labels in zip(blocks.ids, blocks.n_labels)
    )
    return list(dict.fromkeys(text for text in texts if text.strip()))


@final
class Evaluator:
    """Scores the sets of a run and writes its samples. Collective: every rank calls the same methods.

    Raises:
        RequestError: early stopping or ``keep_best`` uses a metric that no set of this run has.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        data: Data,
        engine: Engine,
        sizes: Sizes,
        average: MovingAverage,
        guard: Guard,
        report: Report,
        context: Context,
    ) -> None:
        self._options, self._seed = config.evaluate, config.seed
        self._data, self._engine, self._average = data, engine, average
        self._context = context
        self._guard, self._report = guard, report
        self._micro_batch_blocks = config.evaluate.micro_batch_blocks or sizes.micro_batch_blocks
        self._byte_lengths = data.encoder.byte_lengths() if data.encoder else None
        check_metrics(config, list(data.valid), with_bytes=self._byte_lengths is not None)

    def validate(self, state: State, epoch: float) -> dict[str, float]:
        """The validation metrics as ``SET/METRIC``; those of the first set also as ``METRIC``."""
        return self.score(self._data.valid, state, epoch, blocks=self._options.blocks)

    def score(
        self, sets: Mapping[str, Any], state: State, epoch: float, *, blocks: int | None = None
    ) -> dict[str, float]:
        """The metrics of every set, also with the averaged weights (``SET-ema``); each is reported as soon as it is known.

        Args:
            blocks: how many blocks of each set to use at most.
        """
        metrics = self._score(sets, state, epoch, blocks=blocks)
        if self._average and sets:
            self._engine.copies.before_writing()  # a save just before may still be copying the weights
            with self._average.in_place():
                of_average = {f"{name}-ema": dataset for name, dataset in sets.items()}
                averaged = self._score(of_average, state, epoch, blocks=blocks)
            metrics |= {key: value for key, value in averaged.items() if "/" in key}
        return metrics

    def _score(
        self, sets: Mapping[str, Any], state: State, epoch: float, *, blocks: int | None
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, dataset in sets.items():
            batches = EvalBatches(
                dataset,
                micro_batch_blocks=self._micro_batch_blocks,
                rank=self._engine.data_rank,
                world_size=self._engine.data_world_size,
                limit=blocks,
                device=self._engine.device,
                context=self._context,
                collate=self._data.collate,
            )
            with self._report.task(f"evaluating {name}", total=len(batches)) as advance:

                def moved(advance: Callable[[], None] = advance) -> None:
                    self._guard.beat("evaluate", state.step)  # a long evaluation is not a hang
                    advance()

                result = evaluate(
                    self._engine, batches, byte_lengths=self._byte_lengths, on_micro_batch=moved
                )
            values: dict[str, Any] = {metric: getattr(result, metric) for metric in METRICS}
            self._report.evaluation(set=name, step=state.step, epoch=epoch, tokens=state.tokens, **values)
            known = {key: value for key, value in values.items() if value is not None}
            metrics = {**known, **metrics, **{f"{name}/{key}": value for key, value in known.items()}}
        return metrics

    def samples(self, step: int) -> None:
        """Generate a continuation of every prompt of ``evaluate.prompts``; rank 0 writes them."""
        prompts, encoder = prompts_of(self._options.prompts, self._data), self._data.encoder
        if not prompts or encoder is None:
            return

        def agreed(choice: Callable[[], int]) -> int:
            self._guard.beat("samples", step)
            # Ranks that share a model all have the logits, but perhaps not with the same bits: all use rank 0's token.
            return int(on_main(self._engine, choice)) if self._engine.sharded else choice()

        with self._report.pause(), self._engine.sampling() as sampling:
            if sampling is None:
                return
            model, forward = sampling
            tokens = self._options.sample_tokens
            texts = generate(model, encoder, prompts, tokens, seed=self._seed, forward=forward, agree=agreed)
            if self._engine.is_main:
                self._report.samples(step, list(zip(prompts, texts)))
