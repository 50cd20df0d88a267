"""What a checkpoint costs, by arithmetic: bytes, host memory and seconds, from the number of parameters and ranks.

The state is fp32 weights and Adam's two moments, 12 bytes a parameter, of which every rank writes one part of N. A rank copies
its part to host memory once; its node writes the parts of its ranks and reads them back, each byte once.

docs/strategies.md prints a table of it; tests hold the bytes to checkpoints that were written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

STATE_BYTES: Final = 12
"""Of a parameter: fp32 weight, exp_avg, exp_avg_sq."""
PIECE_BYTES: Final = 28
"""Of a piece in the manifest: three numbers in brackets."""


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """Attributes:
    total_bytes: of all tensor files.
    rank_bytes: that a rank writes, and of its host memory that the copy takes (kept from save to save).
    manifest_bytes: of the pieces in the manifest, about.
    write_seconds: until all parts are durable; the training goes on meanwhile.
    readback_seconds: until they are verified after that.
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
        tensors: of the model; each has two moments, and each of these is cut into a piece for every rank.
        node_bytes_per_second: that a node writes, and reads, as the lower of its disk and its hashing (sha256 0.7 to 1.5 GB/s
            on one core, a core for each rank).

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
