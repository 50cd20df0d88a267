"""The training order: position -> (source, epoch, block), by arithmetic alone.

A position counts blocks from the start of the run. The order is a pure function of the number of blocks per source,
the seed and the position. It needs no state, no file and no array that grows with the corpus, so that resuming costs
nothing, and ranks, loader workers and gradient accumulation only slice the positions. Within an epoch every block
occurs exactly once.

    >>> order = Order(lengths=(3, 2), seed=1)
    >>> source, epoch, block = order.locate(np.arange(10))       # two epochs of five blocks
    >>> sorted(zip(source[:5].tolist(), block[:5].tolist()))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]

The shuffle is a keyed Feistel network over the smallest power of two that covers the blocks, with cycle walking
(M. Luby and C. Rackoff, SIAM J. Comput. 17(2), 1988; J. Black and P. Rogaway, CT-RSA 2002, section 4): a value
outside the range is passed through the network again until it lies inside, which is again a permutation.

Weighted sources are interleaved by a binary tree of sources (:class:`_Mixture`): every node passes a fixed fraction
of its draws to its first child, rounded to the nearest whole number.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from lmcore.errors import RequestError

ORDER_VERSION = 2
"""The order version of new runs. Every cursor stores the version with which its run began, so that a change of the order
never changes the data of a run that has started. The versions differ in mixtures only: version 1 rounds each weight to
1/1024 and shuffles windows of 1,024 positions; version 2 follows the weights exactly."""

ORDER_VERSIONS = (1, 2)

SHUFFLES = ("full", "blocks", "none")

MAX_POSITION = 2**53
"""No corpus and no run has this many blocks; larger numbers in the options are typos."""

GROUP_BLOCKS = 256
"""``shuffle="blocks"``: this many neighbouring blocks stay close together, so that disks read long sequential runs."""
WINDOW_BLOCKS = 512 * GROUP_BLOCKS
"""``shuffle="blocks"``: blocks are permuted freely inside a window of this many blocks."""
MIXTURE_SLOTS = 1024
"""Order version 1: in each window of this many positions a mixture draws from each source its rounded share."""

# As many as one 64-byte blake2b digest has keys for; 4 rounds are provably strong, the others are a margin for tiny domains.
_ROUNDS = 8
# A two-bit Feistel network reaches only part of the permutations of three or four blocks.
_SMALLEST_DOMAIN_BITS = 6
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_SEARCHED_SOURCES = 10  # 3^10 pairs of halves: some hundredths of a second, once
_32 = np.uint64(32)
_LOW_32 = np.uint64(2**32 - 1)


@lru_cache(maxsize=4096)
def keys(seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """The (_ROUNDS,) round keys of one permutation.

    blake2b is used because its output is fixed by its specification. The prefix is the same in all order versions, so
    that their permutations are equal.
    """
    text = f"lmcore order 1\0{seed}\0{purpose}\0" + "\0".join(map(str, numbers))
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _keys_of_each(seed: int, purpose: str, *columns: np.ndarray) -> np.ndarray:
    """(_ROUNDS, n) round keys, one permutation per row of ``columns`` (each (n,) integers)."""
    table = np.stack(columns, axis=1)
    if (table == table[0]).all():
        return keys(seed, purpose, *table[0].tolist())[:, None]
    unique, inverse = np.unique(table, axis=0, return_inverse=True)
    columns_of = np.stack([keys(seed, purpose, *row) for row in unique.tolist()], axis=1)
    return columns_of[:, inverse.reshape(-1)]


def _feistel(
    value: np.ndarray, keys: np.ndarray, left_bits: np.ndarray, right_bits: np.ndarray
) -> np.ndarray:
    """One pass of the network over ``value`` (n,) uint64 of ``left_bits + right_bits`` bits; a bijection."""
    one, word = np.uint64(1), np.uint64(64)
    right = value & ((one << right_bits) - one)
    left = value >> right_bits
    for number in range(_ROUNDS):
        # The halves may differ by one bit; XOR with a function of the other half is still a bijection.
        source, bits = (right, left_bits) if number % 2 == 0 else (left, right_bits)
        mixed = (source ^ keys[number]) * _MULTIPLIERS[0]
        mixed = (mixed ^ (mixed >> _32)) * _MULTIPLIERS[1]
        mixed = mixed >> (word - bits)  # the high bits are the well-mixed ones
        if number % 2 == 0:
            left = left ^ mixed
        else:
            right = right ^ mixed
    return (left << right_bits) | right


def permute(index: np.ndarray, length: np.ndarray | int, round_keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of ``range(length)``, evaluated at ``index`` only.

    Args:
        index: (n,) int64, each in ``[0, length)``.
        length: the size of the domain, an int for all or (n,) int64.
        round_keys: (R,) or (R, n) uint64 from :func:`keys`; elements with equal keys and length share one
            permutation.

    Returns:
        (n,) int64, in ``[0, length)``.
    """
    lengths = np.broadcast_to(np.asarray(length, dtype=np.int64), index.shape)
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    each = np.broadcast_to(round_keys.reshape(_ROUNDS, -1), (_ROUNDS, index.size))
    # frexp of a double is exact up to 2^53, and no corpus has 2^53 blocks.
    bits = np.maximum(np.frexp((lengths - 1).astype(np.float64))[1], _SMALLEST_DOMAIN_BITS).astype(np.uint64)
    left_bits = bits >> np.uint64(1)
    right_bits = bits - left_bits
    limit = lengths.astype(np.uint64)
    out = _feistel(index.astype(np.uint64), each, left_bits, right_bits)
    outside = np.flatnonzero(out >= limit)
    while outside.size:
        out[outside] = _feistel(out[outside], each[:, outside], left_bits[outside], right_bits[outside])
        outside = outside[out[outside] >= limit[outside]]
    return out.astype(np.int64)


# ------------------------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How sources are mixed from ``position`` on.

    Attributes:
        position: the first position of the phase.
        weights: one for each source, on any positive scale; ``None``: no weights, every block of every source occurs
            once per epoch. A source that was appended to the list later has weight 0 in earlier phases.
    """

    position: int = 0
    weights: tuple[float, ...] | None = None


def phases_from_options(
    options: Sequence[Mapping[str, Any]], names: Sequence[str], weights: tuple[float, ...] | None
) -> tuple[Phase, ...]:
    """The phases of a run: the sources' own weights from position 0, then the entries of ``data.phases``.

    Args:
        options: ``[{"position": 1000, "weights": {"web": 3, "books": 1}}, ...]``; a source that is not named has
            weight 0, and ``"weights": None`` ends the weighting.
        names: names of the sources, in order.
        weights: weights of the sources at the beginning.

    Raises:
        RequestError: an entry of another form, an unknown source, or an invalid number.
    """
    phases = [Phase(weights=weights)]
    for item in options:
        form = "{position: 1000, weights: {NAME: 2.0, ...}}"
        if not isinstance(item, Mapping) or set(item) != {"position", "weights"}:
            raise RequestError(f"data.phases: {item!r} is not of the form {form}")
        position, given = item["position"], item["weights"]
        if isinstance(position, bool) or not isinstance(position, int) or not 0 < position < MAX_POSITION:
            raise RequestError(f"data.phases: position {position!r} must be a whole number of blocks above 0")
        if given is not None and not (isinstance(given, Mapping) and given):
            raise RequestError(f"data.phases: weights {given!r} must be of the form {form}, or null")
        for name, weight in (given or {}).items():
            if name not in names:
                raise RequestError(f"data.phases: no source {name!r}; the sources are {', '.join(names)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise RequestError(f"data.phases: weight {weight!r} of source {name!r} is not a number")
        mixed = None if given is None else tuple(_as_float(given.get(name, 0.0)) for name in names)
        if mixed is not None:
            _check_weights(mixed)
        phases.append(Phase(position=position, weights=mixed))
    return tuple(phases)


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond the range of doubles
        return math.inf


def _check_weights(weights: Sequence[float]) -> None:
    array = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any() or not (array > 0).any():
        raise RequestError(
            f"source weights {tuple(weights)}: they must be finite and not negative, and one must be above 0"
        )


class _Mixture:
    """Order version 2: which source a position draws from, for fixed weights.

    The sources are the leaves of a binary tree. Of the first q draws of a node, its first child gets
    floor(q f + 1/2), where f is the child's share of the node's weight, and the second child gets the rest. Both counts
    grow by 0 or 1 with each draw. So the source of a position is found by descending from the root to a leaf, and the
    number of draws from a source before any position is computed without history.

    Rounding at one node is off by at most 1/2, and a node passes its own error on in proportion to the weights. A leaf
    of weight w is therefore off by at most 1/2 (1 + sum of w / W over the nodes of weight W between the root and it).
    :attr:`bound` is the largest of these values, in blocks. For up to ten sources the tree with the smallest bound is
    used, which is at most 1 except for a few sets of weights; for more sources it is Huffman's tree.

    Fractions are 64-bit fixed-point numbers: after 10^12 draws a count is off by less than 10^-7 of a block.
    """

    def __init__(self, weights: tuple[float, ...]) -> None:
        exact = {number: Fraction(weight) for number, weight in enumerate(weights) if weight > 0}
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        leaves = [(int(weight * scale), number) for number, weight in exact.items()]
        # A node is ~source if it is a leaf, else its row in the tables below, in which children come before parents.
        children: list[tuple[int, int]] = []
        fractions: list[int] = []
        totals: list[int] = []

        def join(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
            total = one[0] + other[0]
            children.append((one[1], other[1]))
            fractions.append(min(((one[0] << 65) // total + 1) >> 1, 2**64 - 1))
            totals.append(total)
            return total, len(children) - 1

        plan = _best_tree if len(leaves) <= _SEARCHED_SOURCES else _huffman_tree
        self._root = plan([(weight, ~number) for weight, number in leaves], join)[1]
        self._n_sources = len(weights)
        self._children = np.array(children, dtype=np.int64).reshape(-1, 2)
        self._fractions = np.array(fractions, dtype=np.uint64)
        inverse = [0.0] * len(totals)  # the sum of 1 / W over the nodes from below the root down to each node
        self.bound = 0.0
        weight_of = {~number: weight for weight, number in leaves}
        for node in reversed(range(len(totals))):
            if node != self._root:
                inverse[node] += 1 / totals[node]
            for child in children[node]:
                if child >= 0:
                    inverse[child] = inverse[node]
                else:
                    self.bound = max(self.bound, 0.5 + 0.5 * weight_of[child] * inverse[node])

    def locate(self, offset: np.ndarray, lane: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions in the phase -> (n,) source, (n,) number of its earlier draws in the phase; int64."""
        offsets = _offsets(len(self._fractions), lane, lanes)
        node = np.full(offset.shape, self._root, dtype=np.int64)
        draw = offset.astype(np.uint64)
        inner = np.flatnonzero(node >= 0)
        while inner.size:
            at, index = node[inner], draw[inner]
            before = _share(index, self._fractions[at], offsets[at])
            left = _share(index + np.uint64(1), self._fractions[at], offsets[at]) > before
            draw[inner] = np.where(left, before, index - before)
            node[inner] = np.where(left, self._children[at, 0], self._children[at, 1])
            inner = inner[node[inner] >= 0]
        return ~node, draw.astype(np.int64)

    def counts(self, positions: int, lane: int, lanes: int) -> tuple[int, ...]:
        """The draws from each source in the first ``positions`` positions of the phase."""
        offsets = _offsets(len(self._fractions), lane, lanes)
        found = [0] * self._n_sources
        todo = [(self._root, positions)]
        while todo:
            node, draws = todo.pop()
            if node < 0:
                found[~node] = draws
            else:
                left = (draws * int(self._fractions[node]) + int(offsets[node])) >> 64
                one, other = self._children[node].tolist()
                todo += [(one, left), (other, draws - left)]
        return tuple(found)


_mixture = lru_cache(maxsize=64)(_Mixture)


def mixture_error_bound(weights: Sequence[float]) -> float:
    """The largest deviation, in blocks, of the number of draws from any source from its weight, at any position.

    Example:
        >>> mixture_error_bound((3, 1)), round(mixture_error_bound((0.5, 0.3, 0.2)), 2)
        (0.5, 0.8)
    """
    _check_weights(weights)
    return _mixture(tuple(map(float, weights))).bound


_Node = tuple[int, int]
"""The weight of a node of a mixture's tree, and its number."""


def _huffman_tree(nodes: list[_Node], join: Callable[[_Node, _Node], _Node]) -> _Node:
    """Join the two lightest nodes until one is left; among equal weights the older node comes first."""
    heap = [(weight, age, number) for age, (weight, number) in enumerate(nodes)]
    heapq.heapify(heap)
    for age in range(len(nodes), 2 * len(nodes) - 1):
        light, heavy = heapq.heappop(heap), heapq.heappop(heap)
        weight, number = join((light[0], light[2]), (heavy[0], heavy[2]))
        heapq.heappush(heap, (weight, age, number))
    return heap[0][0], heap[0][2]


def _best_tree(nodes: list[_Node], join: Callable[[_Node, _Node], _Node]) -> _Node:
    """The tree with the smallest bound (:class:`_Mixture`), by exhaustive search.

    ``margin`` is the largest sum of 1 / W over the ancestors of a subtree for which none of its leaves is off by more than
    one block. A leaf has margin 1 / w. A node of weight W has the smaller margin of its two subtrees, minus 1 / W. So the
    best tree of a set of leaves consists of the best trees of two parts of the set. Sets are bit masks.
    """
    total = sum(weight for weight, _ in nodes)
    weights = [0.0] * (1 << len(nodes))
    margins = [0.0] * (1 << len(nodes))
    halves = [0] * (1 << len(nodes))
    for chosen in range(1, 1 << len(nodes)):
        rest = chosen & (chosen - 1)
        lowest = chosen ^ rest
        weights[chosen] = weights[rest] + nodes[lowest.bit_length() - 1][0] / total
        if not rest:
            margins[chosen] = 1 / weights[chosen]
            continue
        best, part = -math.inf, rest
        while part:
            part = (part - 1) & rest
            margin = min(margins[lowest | part], margins[rest ^ part])
            if margin > best:
                best, halves[chosen] = margin, lowest | part
        margins[chosen] = best - 1 / weights[chosen]

    def build(chosen: int) -> _Node:
        if not chosen & (chosen - 1):
            return nodes[chosen.bit_length() - 1]
        return join(build(halves[chosen]), build(chosen ^ halves[chosen]))

    return build((1 << len(nodes)) - 1)


@lru_cache(maxsize=4096)
def _offsets(nodes: int, lane: int, lanes: int) -> np.ndarray:
    """(nodes,) uint64: what is added to q f 2^64 before rounding down; it stands for 1/2 if there is one lane.

    The lanes of a stream draw in parallel. At each node their offsets are spread evenly over [0, 1), in a different order
    at each node, so that all lanes together draw from a child about its share.
    """
    if not nodes:
        return np.zeros(0, dtype=np.uint64)
    round_keys = np.stack([keys(0, "mixture lanes", node) for node in range(nodes)], axis=1)
    places = permute(np.full(nodes, lane), lanes, round_keys).tolist()
    return np.array([((2 * place + 1) << 63) // lanes for place in places], dtype=np.uint64)


def _share(draws: np.ndarray, fractions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """floor((draws * fractions + offsets) / 2^64) for (n,) uint64, in 32-bit halves: numpy has no 128-bit product."""
    low, high = draws & _LOW_32, draws >> _32
    f_low, f_high = fractions & _LOW_32, fractions >> _32
    a, b, c = low * f_low, low * f_high, high * f_low
    middle = (a >> _32) + (b & _LOW_32) + (c & _LOW_32)
    whole = high * f_high + (b >> _32) + (c >> _32) + (middle >> _32)
    rest = (middle << _32) | (a & _LOW_32)
    return whole + (rest + offsets < rest)  # the sum wraps around if it carries


def shares(weights: Sequence[float], slots: int = MIXTURE_SLOTS) -> tuple[int, ...]:
    """Order version 1: how many of ``slots`` consecutive positions each source gets, by the largest remainder method.
    Ties go to the first source.

    Raises:
        RequestError: a negative or non-finite weight, no positive weight, or a weight too small for one slot.
    """
    _check_weights(weights)
    array = np.asarray(weights, dtype=np.float64)
    exact = array * (slots / array.sum())
    counts = np.floor(exact).astype(np.int64)
    missing = slots - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for number, (weight, count) in enumerate(zip(array.tolist(), counts.tolist())):
        if weight > 0 and count == 0:
            total = float(array.sum())
            raise RequestError(
                f"source {number} has weight {weight} of {total}, less than one of {slots} positions, and this run "
                f"began with order version 1, which would never draw it: raise it to {total / slots:.3g}, leave the "
                f"source out, or start a new run"
            )
    return tuple(counts.tolist())


@lru_cache(maxsize=512)
def _mixture_window(
    seed: int, start: int, counts: tuple[int, ...], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order version 1: the sources (S,) of the slots of one window, and for each slot (S,) the number of earlier slots of
    the window with the same source."""
    slots = sum(counts)
    shuffled = permute(np.arange(slots), slots, keys(seed, "mixture", start, window))
    source = np.repeat(np.arange(len(counts)), counts)[shuffled]
    by_source = np.argsort(source, kind="stable")
    rank = np.empty(slots, dtype=np.int64)
    rank[by_source] = np.arange(slots) - np.repeat(np.cumsum(counts) - counts, counts)
    return source, rank


# ---------------------------------------------------------------------------------------------------------- order


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all blocks of all sources; immutable and cheap to create.

    Args:
        lengths: blocks per source.
        seed: seed of the run; another seed gives another order.
        shuffle: ``full``: any block anywhere in its epoch; ``blocks``: groups of :data:`GROUP_BLOCKS` neighbours are
            permuted, then blocks inside windows of :data:`WINDOW_BLOCKS`, for disks that must read long sequential runs;
            ``none``: the order of the sources.
        phases: the mixtures by ascending position, the first at 0. Append-only: appending one changes no earlier position.
        version: 1 for runs that began with order version 1 (:data:`ORDER_VERSION`).
        lane, lanes: index of this order among the ``lanes`` orders that draw from the same mixture in parallel
            (``data.mode stream``).

    Raises:
        RequestError: no blocks at all, an unknown shuffle or version, or weights that do not fit the sources.

    Example:
        >>> order = Order(lengths=(1000, 50), seed=1, phases=(Phase(weights=(3, 1)),))
        >>> source, epoch, block = order.locate(np.arange(400))
        >>> np.bincount(source).tolist(), epoch[source == 1].max().item()
        ([300, 100], 1)
    """

    lengths: tuple[int, ...]
    seed: int
    shuffle: str = "full"
    phases: tuple[Phase, ...] = (Phase(),)
    version: int = ORDER_VERSION
    lane: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.version not in ORDER_VERSIONS:
            raise RequestError(f"order version {self.version} is unknown; known are {ORDER_VERSIONS}")
        if self.shuffle not in SHUFFLES:
            raise RequestError(f"unknown data.shuffle {self.shuffle!r}; choose from {', '.join(SHUFFLES)}")
        if self.epoch_blocks == 0:
            raise RequestError(
                "the sources do not fill a single block: give more text, or a smaller data.block_size"
            )
        starts = [phase.position for phase in self.phases]
        if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise RequestError(f"phases start at positions {starts}: the first must be 0, and they must rise")
        for phase in self.phases:
            if phase.weights is None:
                continue
            if len(phase.weights) > len(self.lengths):
                raise RequestError(f"{len(phase.weights)} weights for {len(self.lengths)} sources")
            _check_weights(phase.weights)
            if self.version == 1:
                shares(phase.weights)
            for number, (weight, length) in enumerate(zip(phase.weights, self.lengths)):
                if weight and not length:
                    raise RequestError(
                        f"source {number} has a weight, but its text does not fill one block: give it weight 0, or "
                        f"a smaller data.block_size"
                    )

    @property
    def epoch_blocks(self) -> int:
        """Blocks of all sources together: the number of positions of one epoch without weights."""
        return sum(self.lengths)

    def epoch_at(self, position: int) -> float:
        """Epochs before ``position``, in units of :attr:`epoch_blocks`."""
        return position / self.epoch_blocks

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) source, (n,) epoch of that source, (n,) block in it; all int64."""
        positions = np.asarray(positions, dtype=np.int64)
        source, epoch, block = (np.zeros(positions.shape, dtype=np.int64) for _ in range(3))
        starts = np.array([phase.position for phase in self.phases])
        phase_of = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(phase_of):
            here = phase_of == number
            locate = self._locate_all if self.phases[number].weights is None else self._locate_mixed
            source[here], epoch[here], block[here] = locate(int(number), positions[here] - starts[number])
        return source, epoch, block

    def _locate_all(self, phase: int, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = self.epoch_blocks
        epoch = offset // total + max(
            -(-drawn // max(n, 1)) for drawn, n in zip(self._drawn[phase], self.lengths)
        )
        index = self._shuffled(offset % total, np.full_like(offset, total), np.full_like(offset, -1), epoch)
        ends = np.cumsum(self.lengths)
        source = np.searchsorted(ends, index, side="right")
        return source, epoch, index - (ends - np.asarray(self.lengths))[source]

    def _locate_mixed(self, phase: int, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.version == 1:
            source, draw = self._locate_windows(phase, offset)
        else:
            source, draw = _mixture(self._weights(phase)).locate(offset, self.lane, self.lanes)
        draw = draw + np.asarray(self._drawn[phase])[source]
        length = np.asarray(self.lengths, dtype=np.int64)[source]
        epoch = draw // length
        return source, epoch, self._shuffled(draw % length, length, source, epoch)

    def _locate_windows(self, phase: int, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = shares(self._weights(phase))
        window, slot = offset // MIXTURE_SLOTS, offset % MIXTURE_SLOTS
        source, rank = np.empty_like(offset), np.empty_like(offset)
        for number in np.unique(window).tolist():
            here = window == number
            sources, ranks = _mixture_window(self.seed, self.phases[phase].position, counts, number)
            source[here], rank[here] = sources[slot[here]], ranks[slot[here]]
        return source, window * np.asarray(counts)[source] + rank

    def _weights(self, phase: int) -> tuple[float, ...]:
        weights = self.phases[phase].weights or ()
        return weights + (0.0,) * (len(self.lengths) - len(weights))

    @cached_property
    def _drawn(self) -> list[tuple[int, ...]]:
        """For each phase, the blocks drawn from each source before it."""
        drawn: list[tuple[int, ...]] = [(0,) * len(self.lengths)]
        for number, following in enumerate(self.phases[1:]):
            drawn.append(self._drawn_after(number, drawn[-1], following.position))
        return drawn

    def drawn_before(self, position: int) -> tuple[int, ...]:
        """The blocks drawn from each source before ``position``, which must lie in a weighted phase."""
        number = sum(phase.position <= position for phase in self.phases) - 1
        return self._drawn_after(number, self._drawn[number], position)

    def _drawn_after(self, number: int, drawn: tuple[int, ...], position: int) -> tuple[int, ...]:
        """The blocks drawn from each source when phase ``number``, which began with ``drawn``, has reached ``position``.

        Where weights begin or end, the next phase starts a new epoch of every source, because the remaining blocks of an
        unfinished epoch cannot be computed by arithmetic.
        """
        phase = self.phases[number]
        passed = position - phase.position
        if phase.weights is None:
            lengths = [max(length, 1) for length in self.lengths]
            begun = max(-(-count // length) for count, length in zip(drawn, lengths))
            return tuple((begun + -(-passed // self.epoch_blocks)) * length for length in lengths)
        if self.version == 1:
            counts = shares(self._weights(number))
            windows, slots = divmod(passed, MIXTURE_SLOTS)
            source, _ = _mixture_window(self.seed, phase.position, counts, windows)
            rest = np.bincount(source[:slots], minlength=len(counts)).tolist()
            here = tuple(windows * count + more for count, more in zip(counts, rest))
        else:
            here = _mixture(self._weights(number)).counts(passed, self.lane, self.lanes)
        return tuple(before + count for before, count in zip(drawn, here))

    def _shuffled(
        self, index: np.ndarray, length: np.ndarray, source: np.ndarray, epoch: np.ndarray
    ) -> np.ndarray:
        """The block at index ``index`` of an epoch of ``length`` blocks; source -1 stands for all sources."""
        if self.shuffle == "none" or not index.size:
            return index
        if self.shuffle == "full":
            return permute(index, length, _keys_of_each(self.seed, "full", source, epoch))
        window = index // WINDOW_BLOCKS
        first = window * WINDOW_BLOCKS
        inside = permute(
            index - first,
            np.minimum(length - first, WINDOW_BLOCKS),
            _keys_of_each(self.seed, "window", source, epoch, window),
        )
        place = first + inside
        group, groups = place // GROUP_BLOCKS, length // GROUP_BLOCKS
        whole = group < groups  # a partial last group keeps its place; only the window shuffles its blocks
        if whole.any():
            moved = permute(
                group[whole], groups[whole], _keys_of_each(self.seed, "group", source[whole], epoch[whole])
            )
            place[whole] = moved * GROUP_BLOCKS + place[whole] % GROUP_BLOCKS
        return place


def rank_slice(positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous slice of the (n,) positions of a step that belongs to one rank.

    Raises:
        RequestError: the number of positions is not a multiple of the number of ranks.
    """
    if len(positions) % world_size:
        raise RequestError(
            f"a global batch of {len(positions)} blocks cannot be split over {world_size} processes: "
            f"make train.global_batch_blocks a multiple of {world_size}"
        )
    share = len(positions) // world_size
    return positions[rank * share : (rank + 1) * share]
