"""A model whose steps take a given time, so that tests can do something to a job between two of them.

Comes in, as ``model.factory``: the arguments of :func:`build`. Goes out: the smallest model whose losses
still depend on every batch that it has seen. It can also be told to fail, on one rank, after so many steps, and
to wait for what the test does.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Paced(nn.Module):
    """Embedding and head. (B, T) ids in, (B, T, V) logits out: B blocks, T tokens, V vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        *,
        width: int,
        seconds: float,
        exit_code: int,
        exit_rank: int,
        after: int,
        hold_after: int,
        hold_seconds: float,
        told: str,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)
        self.seconds = seconds
        self.exit_code, self.exit_rank, self.left = exit_code, exit_rank, after
        self.until_held, self.hold_seconds, self.told = hold_after, hold_seconds, Path(told)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
            self.until_held -= 1
            begin = time.monotonic()
            while (
                self.until_held < 0
                and time.monotonic() - begin < self.hold_seconds
                and not self.told.exists()
            ):
                time.sleep(0.005)
            self.left -= 1
            if self.exit_code and self.left < 0 and os.environ.get("RANK", "0") == str(self.exit_rank):
                print("the cause of it all", flush=True)
                os._exit(self.exit_code)  # like a crash in native code: nobody cleans up
        return self.head(torch.tanh(self.embedding(input_ids)))


def build(
    *,
    vocab_size: int,
    width: int = 16,
    seconds: float = 0.0,
    exit_code: int = 0,
    exit_rank: int = 0,
    after: int = 0,
    hold_after: int = 0,
    hold_seconds: float = math.inf,
    told: str = "/",
) -> Paced:
    """``seconds``: length of a micro-batch. ``exit_code``: leave so on ``exit_rank``, ``after`` so many.
    ``hold_after`` so many, each waits until the file ``told`` is there, for ``hold_seconds`` at most.
    """
    return Paced(
        vocab_size,
        width=width,
        seconds=seconds,
        exit_code=exit_code,
        exit_rank=exit_rank,
        after=after,
        hold_after=hold_after,
        hold_seconds=hold_seconds,
        told=told,
    )
