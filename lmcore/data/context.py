"""Which tokens of a block a rank computes, and where the keys of its queries are: arithmetic on the host.

Under context parallelism c ranks share their blocks. A block of T tokens is cut into 2c pieces, and rank j of the group
has pieces j and 2c - 1 - j. In causal attention a late piece costs more than an early one, but these two pieces together
cost the same on every rank (Llama 3, arXiv 2407.21783, section 3.3.2). Each piece sees all keys from the start of its
block on.

Letters: B blocks, T tokens of a block, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmcore.errors import RequestError
from lmcore.humanize import multiples_near


@dataclass(frozen=True, kw_only=True)
class Context:
    """Which part of each block the batches of a rank contain.

    Attributes:
        rank, size: rank in, and size of, the group that shares the blocks; 0 and 1 if every rank has whole blocks.
        sequence_lengths: pass ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (:func:`sequence_lengths`) to the attention, which
            then separates documents without a mask; always true under context parallelism.
    """

    rank: int = 0
    size: int = 1
    sequence_lengths: bool = False

    def pieces(self, block_size: int) -> list[tuple[int, int]]:
        """The tokens of a block that this rank computes, as half-open ranges in ascending order.

        Raises:
            RequestError: the block cannot be cut into equal pieces.

        Example:
            >>> Context(rank=0, size=2).pieces(8), Context(rank=1, size=2).pieces(8)
            ([(0, 2), (6, 8)], [(2, 4), (4, 6)])
        """
        if self.size == 1:
            return [(0, block_size)]
        check_divides(block_size, self.size)
        length = block_size // (2 * self.size)
        return [(i * length, (i + 1) * length) for i in (self.rank, 2 * self.size - 1 - self.rank)]

    def cut(self, array: np.ndarray) -> np.ndarray:
        """This rank's columns of an array (B, T)."""
        if self.size == 1:
            return array
        return np.concatenate([array[:, a:b] for a, b in self.pieces(array.shape[1])], axis=1)

    def lengths(self, position_ids: np.ndarray) -> dict[str, np.ndarray | int]:
        """The extra arguments of the attention, by name, for whole blocks with these (B, T) ``position_ids``."""
        if not self.sequence_lengths:
            return {}
        block_size = position_ids.shape[1]
        pieces = self.pieces(block_size)
        of_q, of_k = sequence_lengths(pieces, position_ids)
        return {
            "cu_seq_lens_q": of_q,
            "cu_seq_lens_k": of_k,
            "max_length_q": max(end - first for first, end in pieces),
            "max_length_k": block_size,
        }


def check_divides(block_size: int, size: int) -> None:
    """Raise ``RequestError`` if a block cannot be cut into pieces of equal length."""
    if block_size % (2 * size):
        unit = 2 * size
        raise RequestError(
            f"data.block_size must be a multiple of 2 x train.context_parallel {size} = {unit} (got {block_size}); "
            f"try {multiples_near(block_size, unit)}"
        )


_EMPTY_COSTS = 128
"""Tokens that an empty sequence costs. FlashAttention's backward keeps 128 rows of float32 for each sequence beside those of the
tokens, and every kernel starts its blocks for it; many tokens need few empty sequences, because the number of documents in them
varies little."""


def sequence_lengths(
    pieces: list[tuple[int, int]], position_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the queries and the keys of each sequence begin, for :func:`lmcore.model.varlen.varlen_attention`.

    The queries of a micro-batch are ordered by block, then by piece. For each piece, the keys are all those of the
    block from its first token to the end of the piece. Keys before the document of the piece's first token form a
    sequence without queries.

    Args:
        pieces: (first token, end) of the queries in each block.
        position_ids: (B, T), 0 where a document begins.

    Returns:
        Two (S + 1,) int32 arrays. Empty sequences are appended, so that S is the same for all micro-batches whose
        documents are longer than a number of tokens on average (compiled layers then see only one shape), and a multiple
        of that for others. This number is 16 up to 4,096 tokens in the micro-batch and 128 from 32,768 on.

    Example:
        >>> sequence_lengths([(2, 4), (4, 6)], np.arange(8)[None])
        (array([0, 2, 4, 4, 4, 4], dtype=int32), array([ 0,  4, 10, 10, 10, 10], dtype=int32))
    """
    queries, keys = [0], [0]
    for row in position_ids:
        starts = np.flatnonzero(row == 0)
        for first, end in pieces:
            before = int(starts[np.searchsorted(starts, first, side="right") - 1])
            if before:
                queries.append(queries[-1])
                keys.append(keys[-1] + before)
            inside = starts[(starts > first) & (starts < end)].tolist()
            borders = [*inside, end]
            queries += [queries[-1] + border - first for border in borders]
            offset = keys[-1] - before
            keys += [offset + border for border in borders]
    size = sum(end - first for first, end in pieces)
    borders_of_pieces = 2 * len(pieces) if size < position_ids.shape[1] else 0
    tokens = len(position_ids) * size
    unit = max(tokens // _EMPTY_COSTS, min(tokens // 16, 256), len(position_ids))
    unit += len(position_ids) * borders_of_pieces
    count = -(-(len(queries) - 1) // unit) * unit + 1
    filled = [np.full(count, line[-1], dtype=np.int32) for line in (queries, keys)]
    for array, line in zip(filled, (queries, keys)):
        array[: len(line)] = line
    return filled[0], filled[1]
