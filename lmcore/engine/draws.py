"""Random numbers: seeds derived by purpose and key, and separate draws on ranks that share layers."""

from __future__ import annotations

import hashlib
from typing import Any, final

import torch
from torch import nn


def keyed_seed(seed: int, purpose: str, key: int) -> int:
    """A 63-bit seed that depends on these three values and on nothing else."""
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
    """Random numbers of one of the ranks that share layers.

    Where all ranks hold the same values (the residual stream), they must use the same dropout masks. Where each holds its
    own values (the attention weights of its heads), equal masks would drop the same places in different heads. So between
    the two layers of a cut pair a rank draws from its own generator state, which is a function of the common state. The
    common state then continues as if one number had been drawn. A recomputation starts from the common state, and so
    draws the same numbers again.

    DTensor's random number tracker does the same by moving the offset of a CUDA generator by the shard.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._own = 0
        self._common: torch.Tensor | None = None

    def enter(self) -> None:
        """Switch to this rank's own random numbers. A no-op if already switched."""
        generator = self._generator()
        if self._common is not None and generator.initial_seed() == self._own:
            return
        if generator.device.type == "cuda":  # on the host, without waiting for the device
            drawn = keyed_seed(generator.initial_seed(), "offset", offset := generator.get_offset())
            generator.set_offset(offset + 4)
        else:
            drawn = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        self._common = generator.get_state()
        self._own = keyed_seed(drawn, "rank", self._rank)
        generator.manual_seed(self._own)

    def leave(self) -> None:
        """Switch back to the common random numbers. A no-op outside, as after a recomputation that was stopped inside."""
        generator = self._generator()
        if self._common is not None and generator.initial_seed() == self._own:
            generator.set_state(self._common)
        self._common = None

    def _generator(self) -> torch.Generator:
        if self._device.type == "cuda":
            return torch.cuda.default_generators[self._device.index or 0]
        return torch.default_generator
