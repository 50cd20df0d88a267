"""The parts of a block that a context-parallel rank computes: each token once, equal work, and keys by sequence lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lmcore.data.blocks import position_ids_of
from lmcore.data.context import Context, sequence_lengths
from lmcore.errors import RequestError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_token_is_computed_by_one_rank(size: int) -> None:
    tokens = 48
    shares = [Context(rank=rank, size=size).pieces(tokens) for rank in range(size)]
    covered = sorted(token for pieces in shares for first, end in pieces for token in range(first, end))
    assert covered == list(range(tokens))
    # A query sees all tokens up to its own: the same number of pairs on every rank, up to the diagonals.
    pairs = [sum(token + 1 for first, end in pieces for token in range(first, end)) for pieces in shares]
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("block_size", [10, 17])
def test_indivisible_block_is_refused(block_size: int) -> None:
    with pytest.raises(RequestError, match=r"multiple of 2 x train\.context_parallel 2 = 4"):
        Context(rank=0, size=2).pieces(block_size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_queries_see_the_keys_of_their_document_and_no_others(size: int, seed: int) -> None:
    """What each query may see by the lengths equals what it may see by the documents."""
    draw = np.random.default_rng(seed)
    tokens, blocks = 32, 3
    rows = [np.sort(draw.integers(0, tokens + 1, draw.integers(0, 9))) for _ in range(blocks)]
    positions = np.stack([position_ids_of(ends, tokens) for ends in rows])
    documents = np.cumsum(positions == 0, axis=1)
    for rank in range(size):
        context = Context(rank=rank, size=size, sequence_lengths=True)
        pieces = context.pieces(tokens)
        of_q, of_k = sequence_lengths(pieces, positions)
        assert of_q.dtype == of_k.dtype == np.int32
        assert len(of_q) == len(of_k)
        # The places of the queries and of the keys in their blocks, as the attention finds them.
        queries = [
            (row, token) for row in range(blocks) for first, end in pieces for token in range(first, end)
        ]
        keys = [(row, token) for row in range(blocks) for _, end in pieces for token in range(end)]
        assert (of_q[-1], of_k[-1]) == (len(queries), len(keys))
        for (a, b), (c, d) in zip(pairwise(of_q.tolist()), pairwise(of_k.tolist())):
            for number in range(a, b):
                row, token = queries[number]
                seen = keys[c : d - (b - 1 - number)]
                same = documents[row] == documents[row, token]
                assert seen == [(row, other) for other in range(token + 1) if same[other]]


def test_lengths_have_one_shape_for_documents_of_16_tokens_on_average() -> None:
    shapes = set()
    for count in range(1, 9):
        positions = np.stack([np.arange(128) % (128 // count + 1)] * 2)
        for rank in range(2):
            context = Context(rank=rank, size=2, sequence_lengths=True)
            given = context.lengths(positions)
            assert given["max_length_q"] == 32
            assert given["max_length_k"] == 128
            shapes.add(np.shape(given["cu_seq_lens_q"]))
    assert len(shapes) == 1


def test_empty_sequences_of_a_large_micro_batch_cost_no_more_than_its_tokens() -> None:
    """FlashAttention's backward holds 128 rows for each of them: it held nine times the rows of the tokens."""
    blocks, tokens, draw = 64, 1024, np.random.default_rng(0)
    counts = set()
    for average in (150, 300, 1000):
        lengths = draw.geometric(1 / average, 4 * blocks * tokens // average)
        stream = np.concatenate([np.arange(length) for length in lengths])[: blocks * tokens]
        positions = stream.reshape(blocks, tokens).copy()
        for row in positions:  # a block begins a document
            first = int(np.argmax(row == 0)) or tokens
            row[:first] = np.arange(first)
        given = Context(sequence_lengths=True).lengths(positions)
        counts.add(np.size(given["cu_seq_lens_q"]) - 1)
    assert len(counts) == 1, "compiled layers see more than one shape"
    assert 128 * counts.pop() <= blocks * tokens
