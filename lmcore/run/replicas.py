"""Checks that all ranks hold the same weights (``guard.hash_every``): one 63-bit hash for each rank.

Silent data corruption does not change the loss enough to be noticed at once: it caused six of the interruptions in 54 days of
Llama 3's training (arXiv 2407.21783, table 5). Comparing the replicas detects it at the next comparison.

Example::

    hashes = engine.gather_object(parameter_hash(module.named_parameters()))
    wrong = odd_ranks(hashes)                          # [] or the ranks to look at
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def parameter_hash(named: Iterable[tuple[str, Tensor]]) -> int:
    """A 63-bit hash of every bit of the given tensors, computed on their device; one number is copied to the host.

    Equal weights give equal hashes on every rank and device. Any single flipped bit changes the hash, because each word
    is added once as it is and once multiplied by a number that depends on its index. Only for weights that are not sharded.
    """
    total: Tensor | None = None
    for number, (_, tensor) in enumerate(named, 1):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = raw[: len(raw) // 4 * 4].view(torch.int32)
        for start in range(0, len(words), 1 << 22):  # in pieces, to bound the memory for 64-bit copies
            piece = words[start : start + (1 << 22)].long()
            place = torch.arange(start + 1, start + 1 + len(piece), device=piece.device)
            part = (piece * (place * 2654435761 % 2147483647 * 2 + 1)).sum() * (2 * number + 1) + piece.sum()
            total = part if total is None else total * 31 + part.to(total.device)
        if tail := len(raw) % 4:
            part = raw[-tail:].long().sum() * (2 * number + 1)
            total = part if total is None else total * 31 + part.to(total.device)
    return 0 if total is None else int(total.item()) & (2**63 - 1)


def odd_ranks(hashes: Sequence[int]) -> list[int]:
    """The ranks whose hash differs from the most frequent one (of equally frequent ones, the lowest rank's)."""
    common = max(hashes, key=lambda value: (hashes.count(value), -hashes.index(value)))
    return [rank for rank, value in enumerate(hashes) if value != common]
