"""Random draws: seeds by purpose and place, and what ranks that share layers draw each for itself."""

from __future__ import annotations

import hashlib
from typing import Any, final

import torch
from torch import nn


def keyed_seed(seed: int, purpose: str, key: int) -> int:
    """63 bits that depend on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def drops(model: Any) -> bool:
    """Whether a transformers model has dropout of any kind in training."""
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    fields = model.config.get_text_config().to_dict()
    return any(
        isinstance(value, int | float) and value > 0
        for name, value in fields.items()
        if "drop" in name and not name.startswith(("classifier", "summary"))
    )


@final
class RankDraws:
    """Draws of one of the ranks that share layers.

    Where every rank has the same numbers (the residual stream), all must drop the same; where each has its own (attention
    weights of its heads), the same masks on each would drop the same places in different heads. So between the two cuts of
    a pair of layers a rank draws from a generator state of its own: a function of the common state, which goes on after it
    as if one number had been drawn. A recomputation, which begins with the common state, draws the same again.

    As DTensor's tracker of random numbers does, which moves the offset of a CUDA generator by the shard.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._own = 0
        self._common: torch.Tensor | None = None

    def enter(self) -> None:
        """From here on numbers are the rank's own. Called again inside it does nothing."""
        generator = self._generator()
        if self._common is not None and generator.initial_seed() == self._own:
            return
        if generator.device.type == "cuda":  # on the host: no device is waited for
            drawn = keyed_seed(generator.initial_seed(), "offset", offset := generator.get_offset())
            generator.set_offset(offset + 4)
        else:
            drawn = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        self._common = generator.get_state()
        self._own = keyed_seed(drawn, "rank", self._rank)
        generator.manual_seed(self._own)

    def leave(self) -> None:
        """From here on numbers are common again. Outside it does nothing, as where a recomputation was stopped inside."""
        generator = self._generator()
        if self._common is not None and generator.initial_seed() == self._own:
            generator.set_state(self._common)
        self._common = None

    def _generator(self) -> torch.Generator:
        if self._device.type == "cuda":
            return torch.cuda.default_generators[self._device.index or 0]
        return torch.default_generator
