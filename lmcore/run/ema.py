"""An exponential moving average of the weights: updated after every step, evaluated, saved, exported.

A checkpoint stores the average as float32 tensors of kind ``ema``. Only for strategies that do not shard the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from lmcore.checkpoint.pieces import Held, held_whole
from lmcore.errors import RequestError

Weights = Callable[[], list[tuple[str, Tensor]]]


@final
class MovingAverage:
    """``average <- decay * average + (1 - decay) * weights``. With ``decay`` 0 it is empty and costs nothing.

    Raises:
        RequestError: the strategy shards the weights.
    """

    def __init__(self, weights: Weights, *, decay: float, strategy: str) -> None:
        if decay and strategy not in ("single", "ddp"):
            raise RequestError(
                f"optim.ema_decay keeps a whole copy of the weights, which {strategy} shards: use ddp, or set it to 0"
            )
        self._weights, self._decay = weights, decay
        self._average = start_average(weights()) if decay else {}

    def __bool__(self) -> bool:
        return bool(self._average)

    def update(self) -> None:
        """Call after every update."""
        if self._average:
            update_average(self._average, self._weights(), self._decay)

    def parts(self, rank: int, world_size: int) -> list[Held]:
        """What this rank holds of the average, for a checkpoint. Every rank holds all of it."""
        return [
            held_whole("ema", name, None, tensor, (rank, world_size))
            for name, tensor in self._average.items()
        ]

    def load(self, read: Callable[[str, str, str], Tensor | None]) -> None:
        """Restore from a checkpoint. If the checkpoint has no average, start from its weights."""
        for name, weight in self._weights() if self._average else []:
            stored = read("ema", name, "")
            self._average[name].copy_(weight.detach() if stored is None else stored)

    @contextmanager
    def in_place(self) -> Iterator[Any]:
        """In this context the model's weights are the average; afterwards its own weights are restored."""
        own = [tensor.detach().clone() for _, tensor in self._weights()]
        with torch.no_grad():
            for name, tensor in self._weights():
                tensor.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, tensor), kept in zip(self._weights(), own):
                    tensor.copy_(kept)


def start_average(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Float32 copies by name: the exponential moving average of the weights before the first update."""
    return {name: tensor.detach().float().clone() for name, tensor in named_tensors}


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], named_tensors: Iterable[tuple[str, Tensor]], decay: float
) -> None:
    """``average <- decay * average + (1 - decay) * tensor``, by name, in place."""
    pairs = [(average[name], tensor.detach().float()) for name, tensor in named_tensors]
    if pairs:
        torch._foreach_lerp_([a for a, _ in pairs], [t for _, t in pairs], 1 - decay)
