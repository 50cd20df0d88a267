"""lmcore: pretraining of causal language models on your own text.

The packages, in the order in which the data flows through them::

    data (text -> tokenizer -> token store -> order -> blocks -> batches) -> model -> engine -> checkpoint

The public names below are imported on first use, so that ``import lmcore`` and ``--help`` do not import torch:

>>> from lmcore import Duration
>>> Duration.parse("10%")
Duration(value=10, unit='percent')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batches": "lmcore.data.batches",
    "BlockDataset": "lmcore.data.block_dataset",
    "Cursor": "lmcore.data.cursor",
    "Duration": "lmcore.config.durations",
    "Engine": "lmcore.engine.engine",
    "FaultError": "lmcore.errors",
    "ModelWithLoss": "lmcore.model.module",
    "Order": "lmcore.data.order",
    "RequestError": "lmcore.errors",
    "Run": "lmcore.run.trainer",
    "RunConfig": "lmcore.config.schema",
    "StoreBlocks": "lmcore.data.blocks",
    "TokenStore": "lmcore.data.store.store",
    "Tokenizer": "lmcore.data.tokenizer.tokenizer",
    "build_model": "lmcore.model.build",
    "build_optimizer": "lmcore.model.optim",
    "build_store": "lmcore.data.store.build",
    "causal_lm_loss": "lmcore.model.loss",
    "collate": "lmcore.data.block_dataset",
    "evaluate": "lmcore.model.evaluate",
    "export": "lmcore.saved.export",
    "generate": "lmcore.saved.generate",
    "learning_rate": "lmcore.model.schedules",
    "load_model": "lmcore.saved.load",
    "load_tokenizer": "lmcore.data.tokenizer.tokenizer",
    "open_checkpoint": "lmcore.checkpoint.reader",
    "parameter_groups": "lmcore.model.optim",
    "parse": "lmcore.config.parse",
    "resolve_sources": "lmcore.data.text.sources",
    "train_tokenizer": "lmcore.data.tokenizer.training",
}
"""Public name -> the module that defines it."""

__all__ = sorted([*_HOME, "__version__"])  # the table is the one list of names

if TYPE_CHECKING:
    from lmcore.checkpoint.reader import open_checkpoint as open_checkpoint
    from lmcore.config.durations import Duration as Duration
    from lmcore.config.parse import parse as parse
    from lmcore.config.schema import RunConfig as RunConfig
    from lmcore.data.batches import Batches as Batches
    from lmcore.data.block_dataset import BlockDataset as BlockDataset
    from lmcore.data.block_dataset import collate as collate
    from lmcore.data.blocks import StoreBlocks as StoreBlocks
    from lmcore.data.cursor import Cursor as Cursor
    from lmcore.data.order import Order as Order
    from lmcore.data.store.build import build_store as build_store
    from lmcore.data.store.store import TokenStore as TokenStore
    from lmcore.data.text.sources import resolve_sources as resolve_sources
    from lmcore.data.tokenizer.tokenizer import Tokenizer as Tokenizer
    from lmcore.data.tokenizer.tokenizer import load_tokenizer as load_tokenizer
    from lmcore.data.tokenizer.training import train_tokenizer as train_tokenizer
    from lmcore.engine.engine import Engine as Engine
    from lmcore.errors import FaultError as FaultError
    from lmcore.errors import RequestError as RequestError
    from lmcore.model.build import build_model as build_model
    from lmcore.model.evaluate import evaluate as evaluate
    from lmcore.model.loss import causal_lm_loss as causal_lm_loss
    from lmcore.model.module import ModelWithLoss as ModelWithLoss
    from lmcore.model.optim import build_optimizer as build_optimizer
    from lmcore.model.optim import parameter_groups as parameter_groups
    from lmcore.model.schedules import learning_rate as learning_rate
    from lmcore.run.trainer import Run as Run
    from lmcore.saved.export import export as export
    from lmcore.saved.generate import generate as generate
    from lmcore.saved.load import load_model as load_model


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'lmcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
