"""The cost of a checkpoint: bytes, host memory and seconds, computed from the number of parameters and ranks.

The state consists of fp32 weights and Adam's two moments, 12 bytes per parameter. Each of N ranks writes 1/N of it. A rank
copies its part to host memory once; its node writes the parts of its ranks and reads them back, each byte once.

docs/strategies.md has a table of these costs; tests compare the bytes with written checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

STATE_BYTES: Final = 12
"""Bytes per parameter: fp32 weight, exp_avg, exp_avg_sq."""
PIECE_BYTES: Final = 28
"""Bytes per piece in the manifest: three numbers in brackets."""


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """Attributes:
    total_bytes: size of all tensor files.
    rank_bytes: bytes that a rank writes, and host memory for its copy (kept from save to save).
    manifest_bytes: approximate size of the pieces in the manifest.
    write_seconds: time until all parts are durable; the training continues meanwhile.
    readback_seconds: additional time until they are verified.
    """

    total_bytes: int
    rank_bytes: int
    manifest_bytes: int
    write_seconds: float
    readback_seconds: float


def checkpoint_cost(
    *, parameters: int, tensors: int, ranks: int, ranks_per_node: int, node_bytes_per_second: float
) -> CheckpointCost:
    """The cost of one checkpoint of sharded weights and moments.

    Args:
        tensors: number of tensors in the model; each has two moments, and each of the three is split into a piece per rank.
        node_bytes_per_second: rate at which a node writes and reads: the lower of its disk and its hashing (sha256: 0.7 to
            1.5 GB/s per core, one core per rank).

    Example:
        >>> checkpoint_cost(parameters=8_000_000_000, tensors=291, ranks=8, ranks_per_node=8,
        ...                 node_bytes_per_second=2e9).write_seconds
        48.0
    """
    total = STATE_BYTES * parameters
    rank = -(-total // ranks)
    node = rank * min(ranks, ranks_per_node)
    seconds = node / node_bytes_per_second
    return CheckpointCost(
        total_bytes=total,
        rank_bytes=rank,
        manifest_bytes=3 * tensors * ranks * PIECE_BYTES,
        write_seconds=seconds,
        readback_seconds=seconds,
    )
