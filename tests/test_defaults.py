"""Whoever uses a class of lmcore as a library gets the same defaults as a run: those of the schema."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lmcore.config.schema import keys
from lmcore.data.batches import Batches
from lmcore.data.order import Order
from lmcore.data.store.build import build_store
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.model.module import ModelWithLoss
from lmcore.model.optim import build_optimizer
from lmcore.model.schedules import learning_rate
from lmcore.run.anomalies import Policy
from lmcore.run.early_stopping import EarlyStopping

SAME: list[tuple[Any, dict[str, str]]] = [
    (Policy, {"max_skips": "guard.max_skips", "max_rewinds": "guard.max_rewinds", "spike": "guard.spike",
              "window": "guard.spike_window", "sigma": "guard.spike_sigma"}),
    (EarlyStopping, {name: f"evaluate.early_stopping.{name}" for name in
                     ("metric", "patience", "threshold", "mode", "target", "divergence")}),
    (Batches, {"workers": "data.workers", "prefetch": "data.prefetch", "pin_memory": "data.pin_memory"}),
    (Order, {"shuffle": "data.shuffle"}),
    (build_store, {"on_error": "data.on_error", "max_bad_fraction": "data.max_bad_fraction", "eos": "data.eos"}),
    (train_tokenizer, {"model_type": "tokenizer.model_type", "character_coverage": "tokenizer.character_coverage",
                       "split_digits": "tokenizer.split_digits"}),
    (ModelWithLoss, {"label_smoothing": "loss.label_smoothing", "z_loss": "loss.z_loss"}),
    (build_optimizer, {"betas": "optim.betas", "eps": "optim.eps", "momentum": "optim.momentum",
                       "fused": "optim.fused"}),
    (learning_rate, {"min_ratio": "optim.min_lr_ratio"}),
]  # fmt: skip


@pytest.mark.parametrize(("made", "options"), SAME, ids=lambda value: getattr(value, "__name__", ""))
def test_defaults_of_the_library_are_those_of_a_run(made: Any, options: dict[str, str]) -> None:
    parameters = inspect.signature(made).parameters
    schema = keys()
    found = {name: parameters[name].default for name in options}
    assert found == {name: schema[option].default for name, option in options.items()}
