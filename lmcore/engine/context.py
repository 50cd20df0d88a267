"""Context parallelism: the ranks of a group compute parts of the same blocks, and gather each other's keys and values.

Everything else is as in data parallelism: losses are sums over labels, and each strategy averages gradients over all
ranks. Keys and values are gathered whole in every layer (Llama 3, arXiv 2407.21783, section 3.3.2), and their gradients
are reduced to the rank that owns them. With few heads of keys and values this is cheap compared to the layer's arithmetic.

Letters: B blocks, T tokens of a block, c ranks of a group, p = T / 2c tokens of a piece, G heads of keys and values, D
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from lmcore.model.cpu_kernels import ATTENTION, attention

CONTEXT_ATTENTION = f"{ATTENTION}_context"
"""The name of the gathering attention in transformers' registries."""


def group_of(rank: int, size: int, world_size: int, timeout: timedelta) -> Any:
    """The process group of the ranks that share blocks with this one: consecutive ranks, so that they are on one node.

    Collective: all ranks create all groups.
    """
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=timeout)
        for first in range(0, world_size, size)
    ]
    return groups[rank // size]


def keys_of_queries(size: int, rank: int, gather: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function from this rank's keys, (B, G, 2p, D), to the keys that its queries see, (B x (T + p), G, D).

    For each block and both pieces of this rank (:mod:`lmcore.data.context`), these are the keys from the first token of the
    block to the end of the piece.

    Args:
        gather: all-gather, (B, 2p, G, D) to (c x B, 2p, G, D), with the ranks of the group in order.
    """
    seen = [*range(rank + 1), *range(2 * size - rank)]

    def keys(x: Tensor) -> Tensor:
        mine = x.transpose(1, 2).contiguous()
        parts = gather(mine).unflatten(0, (size, -1)).unflatten(2, (2, -1))  # (c, B, 2, p, G, D)
        pieces = [parts[i, :, 0] if i < size else parts[2 * size - 1 - i, :, 1] for i in seen]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    return keys


def share_blocks(model: Any, group: Any, size: int, rank: int) -> None:
    """Change a transformers model in place so that its attention gathers keys and values from the whole group."""
    # The first name exists from torch 2.13 on, where the second is deprecated.
    gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
    name = group.group_name
    use_attention(model, keys_of_queries(size, rank, lambda x: gather(x, 0, name)))


def use_attention(model: Any, keys: Callable[[Tensor], Tensor], *, name: str = CONTEXT_ATTENTION) -> None:
    """Change a model in place so that its attention maps keys and values by ``keys``.

    ``name`` is the name of this attention in transformers' registries."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, partial(attention, keys_of=keys))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name
