"""Validation loss against a slow, obvious reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmcore.data.batches import EvalBatches
from lmcore.data.blocks import StoreBlocks
from lmcore.data.store.store import Piece, TokenStore
from lmcore.errors import FaultError
from lmcore.model.build import build_model
from lmcore.model.evaluate import Evaluation, evaluate
from lmcore.model.module import ModelWithLoss

V, T = 50, 8


class OneProcess:
    """What evaluate asks of an engine, for one process."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.module(**batch)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return tensor

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        self.module.eval()
        yield
        self.module.train()


@pytest.fixture(scope="module")
def module() -> ModelWithLoss:
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": T, "resid_pdrop": 0.5}
    return ModelWithLoss(
        build_model(type="gpt2", config_overrides=shape, vocab_size=V, block_size=T, seed=0),
        label_smoothing=0.3,
        z_loss=0.1,
    )


def store(tmp_path: Any, count: int) -> TokenStore:
    ids = np.random.default_rng(0).integers(0, V, count).astype(np.uint16)
    path = tmp_path / f"{count}.bin"
    ids.tofile(path)
    return TokenStore(
        name="held",
        fingerprint="x",
        dtype=np.dtype(np.uint16),
        pieces=[Piece(path=path, n_tokens=count, offset_bytes=0)],
    )


def reference(module: ModelWithLoss, ids: np.ndarray) -> tuple[float, int]:
    """Every block by itself, in float64, with full logits."""
    module.eval()
    nats, count = 0.0, 0
    for start in range(0, len(ids) - 1, T):
        inputs = torch.tensor(ids[start : start + T].astype(np.int64))[None]
        labels = ids[start + 1 : start + T + 1].astype(np.int64)
        inputs = inputs[:, : len(labels)]
        with torch.no_grad():
            logits = module.model(input_ids=inputs).logits[0, :, :V].double()
        nats -= float(torch.log_softmax(logits, -1)[range(len(labels)), labels].sum())
        count += len(labels)
    return nats, count


@pytest.mark.parametrize("count", [2, T, T + 1, 3 * T + 1, 5 * T + 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_evaluation_scores_every_token_once_with_the_tail(
    tmp_path: Any, module: ModelWithLoss, count: int, micro_batch: int
) -> None:
    """No smoothing, no z-loss, no dropout enters; float32 logits against float64: 1e-5 relative."""
    held = store(tmp_path, count)
    blocks = StoreBlocks([held], block_size=T, tails=True)
    lengths = np.arange(V, dtype=np.int32) % 5
    module.train()
    result = evaluate(
        OneProcess(module), EvalBatches(blocks, micro_batch_blocks=micro_batch), byte_lengths=lengths
    )
    assert module.training, "dropout is on again"
    ids = held.read(0, count)
    nats, tokens = reference(module, ids)
    assert result.tokens == tokens == count - 1
    assert math.isclose(result.nats, nats, rel_tol=1e-5)
    assert result.bytes == int(lengths[ids[1:]].sum())
    if result.bytes:
        assert math.isclose(result.bits_per_byte or 0, nats / math.log(2) / result.bytes, rel_tol=1e-5)
    assert math.isclose(result.perplexity, math.exp(nats / tokens), rel_tol=1e-5)


def test_evaluation_sums_over_ranks(tmp_path: Any, module: ModelWithLoss) -> None:
    held = store(tmp_path, 7 * T + 3)
    blocks = StoreBlocks([held], block_size=T, tails=True)
    whole = evaluate(OneProcess(module), EvalBatches(blocks, micro_batch_blocks=2))
    parts = [EvalBatches(blocks, micro_batch_blocks=2, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1, "every rank makes the same number of micro-batches"
    results = [evaluate(OneProcess(module), part) for part in parts if len(part)]
    assert sum(r.tokens for r in results) == whole.tokens
    assert math.isclose(sum(r.nats for r in results), whole.nats, rel_tol=1e-6)


def test_counts_of_an_own_loss_are_not_cut_to_whole_numbers() -> None:
    """A loss that weighs its labels: 2 micro-batches of 0.75 nats over a weight of 0.25 each."""
    weighed: Any = OneProcess(nn.Identity())
    weighed.forward = lambda batch: (torch.tensor(0.75), torch.tensor(0.25))
    result = evaluate(weighed, [{"labels": torch.zeros(1, T)}] * 2)
    assert (result.tokens, result.loss) == (0.5, 3.0)


def test_set_without_labels_is_refused_in_words() -> None:
    nothing: Any = OneProcess(nn.Identity())
    nothing.forward = lambda batch: (torch.tensor(0.0), torch.tensor(0))
    with pytest.raises(FaultError, match="no label to score"):
        evaluate(nothing, [{"labels": torch.full((1, T), -100)}])


def test_loss_that_is_no_number_is_no_perplexity_either() -> None:
    diverged = Evaluation(nats=math.nan, tokens=3, bytes=4)
    assert math.isnan(diverged.perplexity)
    assert math.isnan(Evaluation(nats=0.0, tokens=0, bytes=0).loss)
    assert Evaluation(nats=3e4, tokens=3, bytes=4).perplexity == math.inf
