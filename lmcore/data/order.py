"""position -> (source, epoch, block): the order of the training data, by arithmetic alone.

Comes in: how many blocks each source has, a seed, and positions (integers that count blocks from the start of
the run). Goes out: for every position the source, the epoch of that source and the block in it. What always
holds:

* It is a pure function: no state, no file, no array that grows with the corpus. Resuming costs nothing.
* Every epoch is a permutation: each block exactly once. Epochs differ in their order.
* Ranks, workers, micro-batches and accumulation only slice the positions (:func:`rank_slice`).
* The same version of this file gives the same order for ever; :data:`ORDER_VERSION` is stored in every
  :class:`Cursor`, and golden vectors in the tests hold it fast.

The permutation is a keyed Feistel network over the smallest power of two that holds the blocks, with cycle
walking (M. Luby and C. Rackoff, SIAM J. Comput. 17(2), 1988; J. Black and P. Rogaway, CT-RSA 2002, section
4): values that fall outside are sent through again until they land inside, which is again a permutation, for
every size.

    >>> order = Order(lengths=(3, 2), seed=1)
    >>> source, epoch, block = order.locate(np.arange(10))       # two epochs of five blocks
    >>> sorted(zip(source[:5].tolist(), block[:5].tolist()))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from lmcore.errors import RequestError

ORDER_VERSION = 1
"""Raised whenever a change makes any position mean another block; a checkpoint of another version is
refused."""

SHUFFLES = ("full", "blocks", "none")

GROUP_BLOCKS = 256
"""shuffle="blocks": so many neighbouring blocks stay near one another, so that a cold disk reads long
runs."""
WINDOW_BLOCKS = 512 * GROUP_BLOCKS
"""shuffle="blocks": blocks are permuted freely inside a window of so many."""
MIXTURE_SLOTS = 1024
"""A mixture gives every source its exact share in each window of so many positions."""

_ROUNDS = (
    8  # 64 bytes of one blake2b digest; 4 rounds are provably strong, the rest is margin for tiny domains
)
_SMALLEST_DOMAIN_BITS = (
    6  # a two-bit Feistel network reaches only part of the permutations of three or four blocks
)
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_32 = np.uint64(32)


@lru_cache(maxsize=4096)
def keys(seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """The (_ROUNDS,) round keys of one permutation. blake2b, because its output is fixed by its
    specification."""
    text = f"lmcore order {ORDER_VERSION}\0{seed}\0{purpose}\0" + "\0".join(map(str, numbers))
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
        # The halves may differ by one bit; XOR of a function of the other half is a bijection all the same.
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
        length: the size of the domain, one for all or (n,) int64.
        round_keys: (R,) or (R, n) uint64 round keys; elements with equal keys and length share one
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


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From ``position`` on, sources are mixed by ``weights`` (any positive scale), or, with ``None``, every
    block of
    every source comes once per epoch. A source appended later has weight 0 in earlier phases."""

    position: int = 0
    weights: tuple[float, ...] | None = None


def shares(weights: Sequence[float], slots: int = MIXTURE_SLOTS) -> tuple[int, ...]:
    """How many of ``slots`` consecutive positions each source gets: largest remainders, ties to the first
    source.

    Raises:
        RequestError: a negative or non-finite weight, no positive weight, or a weight too small for one slot.
    """
    array = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any() or not (array > 0).any():
        raise RequestError(
            f"source weights {tuple(weights)}: they must be finite, not negative, and not all zero"
        )
    exact = array * (slots / array.sum())
    counts = np.floor(exact).astype(np.int64)
    missing = slots - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for number, (weight, count) in enumerate(zip(array.tolist(), counts.tolist())):
        if weight > 0 and count == 0:
            total = float(array.sum())
            raise RequestError(
                f"source {number} has weight {weight} of {total}, less than one of {slots} positions: it "
                f"would never be drawn; raise it to {total / slots:.3g} or leave the source out"
            )
    return tuple(counts.tolist())


@lru_cache(maxsize=512)
def _mixture_window(
    seed: int, start: int, counts: tuple[int, ...], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sources (S,) of one window's slots, and (S,) how many earlier slots of the window have the same
    source."""
    slots = sum(counts)
    shuffled = permute(np.arange(slots), slots, keys(seed, "mixture", start, window))
    source = np.repeat(np.arange(len(counts)), counts)[shuffled]
    by_source = np.argsort(source, kind="stable")
    rank = np.empty(slots, dtype=np.int64)
    rank[by_source] = np.arange(slots) - np.repeat(np.cumsum(counts) - counts, counts)
    return source, rank


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all blocks of all sources; immutable, and cheap to make anew.

    Args:
        lengths: blocks per source.
        seed: of the run; another seed is another order.
        shuffle: ``full`` any block anywhere in its epoch; ``blocks`` groups of :data:`GROUP_BLOCKS`
            neighbours are permuted, then blocks inside windows of :data:`WINDOW_BLOCKS`, for disks
            that must read long runs; ``none`` as they stand in the sources.
        phases: the mixtures, by rising position, the first at 0. Append-only: what lies before never moves.

    Raises:
        RequestError: no blocks at all, an unknown shuffle, or weights that fit no source.
    """

    lengths: tuple[int, ...]
    seed: int
    shuffle: str = "full"
    phases: tuple[Phase, ...] = (Phase(),)

    def __post_init__(self) -> None:
        if self.shuffle not in SHUFFLES:
            raise RequestError(f"data.shuffle {self.shuffle!r} is none of {', '.join(SHUFFLES)}")
        if self.epoch_blocks == 0:
            raise RequestError(
                "the sources hold no block at all: give more text, or a smaller data.block_size"
            )
        starts = [phase.position for phase in self.phases]
        if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise RequestError(f"phases start at positions {starts}: they must rise from 0")
        for phase in self.phases:
            if phase.weights is None:
                continue
            if len(phase.weights) > len(self.lengths):
                raise RequestError(f"{len(phase.weights)} weights for {len(self.lengths)} sources")
            for number, (count, length) in enumerate(zip(shares(phase.weights), self.lengths)):
                if count and not length:
                    raise RequestError(f"source {number} has a weight, but not one whole block of text")

    @property
    def epoch_blocks(self) -> int:
        """Blocks of all sources together: the positions of one epoch where there are no weights."""
        return sum(self.lengths)

    def epoch_at(self, position: int) -> float:
        """Epochs before ``position``, in units of :attr:`epoch_blocks`."""
        return position / self.epoch_blocks

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        counts = self._counts(phase)
        window, slot = offset // MIXTURE_SLOTS, offset % MIXTURE_SLOTS
        source, rank = np.empty_like(offset), np.empty_like(offset)
        for number in np.unique(window).tolist():
            here = window == number
            sources, ranks = _mixture_window(self.seed, self.phases[phase].position, counts, number)
            source[here], rank[here] = sources[slot[here]], ranks[slot[here]]
        draw = np.asarray(self._drawn[phase])[source] + window * np.asarray(counts)[source] + rank
        length = np.asarray(self.lengths, dtype=np.int64)[source]
        epoch = draw // length
        return source, epoch, self._shuffled(draw % length, length, source, epoch)

    def _counts(self, phase: int) -> tuple[int, ...]:
        weights = self.phases[phase].weights or ()
        return shares(weights + (0.0,) * (len(self.lengths) - len(weights)))

    @cached_property
    def _drawn(self) -> list[tuple[int, ...]]:
        """For each phase, the blocks drawn from each source before it."""
        drawn: list[tuple[int, ...]] = [(0,) * len(self.lengths)]
        for number, following in enumerate(self.phases[1:]):
            drawn.append(self._drawn_after(number, drawn[-1], following.position))
        return drawn

    def drawn_before(self, position: int) -> tuple[int, ...]:
        """The blocks drawn from each source before ``position``, which lies in a mixture."""
        number = sum(phase.position <= position for phase in self.phases) - 1
        return self._drawn_after(number, self._drawn[number], position)

    def _drawn_after(self, number: int, drawn: tuple[int, ...], position: int) -> tuple[int, ...]:
        """The blocks drawn from each source when phase ``number``, begun with ``drawn``, has come to
        ``position``.

        Where the kind of order changes, the next phase starts every source with a fresh epoch: which blocks
        an unfinished one has left is not arithmetic.
        """
        phase = self.phases[number]
        passed = position - phase.position
        if phase.weights is None:
            lengths = [max(length, 1) for length in self.lengths]
            begun = max(-(-count // length) for count, length in zip(drawn, lengths))
            return tuple((begun + -(-passed // self.epoch_blocks)) * length for length in lengths)
        counts = self._counts(number)
        windows, slots = divmod(passed, MIXTURE_SLOTS)
        source, _ = _mixture_window(self.seed, phase.position, counts, windows)
        rest = np.bincount(source[:slots], minlength=len(counts)).tolist()
        return tuple(a + windows * b + c for a, b, c in zip(drawn, counts, rest))

    def _shuffled(
        self, index: np.ndarray, length: np.ndarray, source: np.ndarray, epoch: np.ndarray
    ) -> np.ndarray:
        """The block at place ``index`` of an epoch of ``length`` blocks; source -1 stands for all sources."""
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
        whole = group < groups  # the last, partial group keeps its place; its window shuffles it among others
        if whole.any():
            moved = permute(
                group[whole], groups[whole], _keys_of_each(self.seed, "group", source[whole], epoch[whole])
            )
            place[whole] = moved * GROUP_BLOCKS + place[whole] % GROUP_BLOCKS
        return place


Skips = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of positions that are never trained on."""


def merge_skips(*many: Iterable[Sequence[int]]) -> Skips:
    """Union of ranges, sorted, touching ones joined.

    Raises:
        RequestError: a range that is no range.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for ranges in many for a, b in ranges):
        if start < 0 or stop <= start:
            raise RequestError(f"data.skip_positions [{start}, {stop}]: give start < stop, both from 0 on")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def next_positions(position: int, count: int, skips: Skips = ()) -> tuple[np.ndarray, int]:
    """The next ``count`` positions from ``position`` on, jumping over ``skips``; and where to go on after
    them."""
    runs, missing = [], count
    for start, stop in skips:
        if stop <= position:
            continue
        if position + missing <= start:
            break
        if position < start:
            runs.append(np.arange(position, start))
            missing -= start - position
        position = stop
    runs.append(np.arange(position, position + missing))
    return np.concatenate(runs), position + missing


def count_positions(start: int, stop: int, skips: Skips = ()) -> int:
    """Positions in [start, stop) that are not skipped."""
    return max(stop - start, 0) - sum(max(min(b, stop) - max(a, start), 0) for a, b in skips)


def rank_slice(positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous share of one rank.

    Raises:
        RequestError: the global batch does not divide.
    """
    if len(positions) % world_size:
        raise RequestError(
            f"a global batch of {len(positions)} blocks cannot be split over {world_size} processes: "
            f"make train.global_batch_blocks a multiple of {world_size}"
        )
    share = len(positions) // world_size
    return positions[rank * share : (rank + 1) * share]


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands in its data: all that a checkpoint keeps of it, the same for every rank.

    ``stream`` is empty for token stores; in mode stream it holds where each lane's window began
    (:mod:`lmcore.data.stream`).
    """

    fingerprint: str
    seed: int
    position: int = 0
    phases: tuple[Phase, ...] = (Phase(),)
    skips: Skips = ()
    stream: Mapping[str, Any] = field(default_factory=dict)
    version: int = ORDER_VERSION

    def advance(self, count: int) -> Cursor:
        """The cursor after ``count`` more positions; skipped ones do not count."""
        return replace(self, position=next_positions(self.position, count, self.skips)[1])

    def with_skips(self, ranges: Iterable[Sequence[int]]) -> Cursor:
        """Never train on these ranges [start, stop) of positions."""
        return replace(self, skips=merge_skips(self.skips, ranges))

    def with_weights(self, weights: Sequence[float] | None) -> Cursor:
        """From here on, mix by ``weights``. Unchanged weights change nothing; what lies behind never
        moves."""
        new = None if weights is None else tuple(float(weight) for weight in weights)
        if new == self.phases[-1].weights:
            return self
        kept = tuple(phase for phase in self.phases if phase.position < self.position)
        return replace(self, phases=(*kept, Phase(position=self.position, weights=new)))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, well under a kilobyte for token stores."""
        phases = [[phase.position, phase.weights and list(phase.weights)] for phase in self.phases]
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "position": self.position,
            "phases": phases,
            "skips": [list(skip) for skip in self.skips],
            "stream": dict(self.stream),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Cursor:
        """The inverse of :meth:`to_json`; also opens cursors of other versions, which :meth:`check`
        refuses."""
        phases = tuple(
            Phase(position=position, weights=None if weights is None else tuple(weights))
            for position, weights in data["phases"]
        )
        return Cursor(
            version=data["version"],
            fingerprint=data["fingerprint"],
            seed=data["seed"],
            position=data["position"],
            phases=phases,
            skips=tuple((start, stop) for start, stop in data["skips"]),
            stream=data["stream"],
        )

    def check(
        self,
        *,
        fingerprint: str,
        seed: int,
        accept: bool = False,
        override: str = "--allow_changes data.train",
    ) -> Cursor:
        """The cursor to go on with, over data with this fingerprint and seed.

        Args:
            fingerprint: of the dataset that is there now.
            seed: of the run as it is configured now.
            accept: go on all the same: the position stays, but it now means other blocks.
            override: how the user says so; shown in the message.

        Raises:
            RequestError: something differs from what the checkpoint was trained on; both values are shown.
        """
        pairs = {
            "order version": (self.version, ORDER_VERSION),
            "data": (self.fingerprint, fingerprint),
            "seed": (self.seed, seed),
        }
        changed = [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
        if changed and not accept:
            raise RequestError(
                f"the checkpoint was trained on other data up to position {self.position}: "
                f"{'; '.join(changed)}; some samples would come twice, others never: "
                f"restore what changed, or insist with {override}"
            )
        return replace(self, version=ORDER_VERSION, fingerprint=fingerprint, seed=seed)
