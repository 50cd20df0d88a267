"""Laws 1, 2, 3 and 6: the order is arithmetic, a permutation, free of cost, and a changed past is refused."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.cursor import Cursor, next_positions
from lmcore.data.order import (
    MIXTURE_SLOTS,
    ORDER_VERSIONS,
    SHUFFLES,
    Order,
    Phase,
    keys,
    mixture_error_bound,
    permute,
    phases_from_options,
    rank_slice,
    shares,
)
from lmcore.errors import RequestError

SIZES = [*range(1, 70), *(2**k + d for k in range(7, 13) for d in (-1, 0, 1))]


def mixed(*weights: float) -> tuple[Phase, ...]:
    return (Phase(weights=weights),)


def places(order: Order, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in order.locate(np.arange(start, stop)))))


# ---- the permutation ----


@pytest.mark.parametrize("size", [*SIZES, 65536, 65537, 262145])
def test_every_size_is_a_bijection(size: int) -> None:
    """65,537 and 262,145 = 2^2k + 1 are where another library's permutation misses one element."""
    out = permute(np.arange(size), size, keys(1, "test", size))
    assert np.array_equal(np.sort(out), np.arange(size))


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_any_size_and_seed_is_a_bijection(size: int, seed: int) -> None:
    assert len(set(permute(np.arange(size), size, keys(seed, "test")).tolist())) == size


def test_many_permutations_in_one_call() -> None:
    sizes = np.array(SIZES)
    each = [permute(np.array([size // 2]), size, keys(7, "test", size))[0] for size in SIZES]
    together = permute(sizes // 2, sizes, np.stack([keys(7, "test", size) for size in SIZES], axis=1))
    assert together.tolist() == each


@pytest.mark.parametrize("size", [3, 4, 5])
def test_small_permutations_are_all_reached_evenly(size: int) -> None:
    seeds = 6000
    columns = np.stack([keys(seed, "test") for seed in range(seeds)], axis=1)
    out = permute(np.tile(np.arange(size), seeds), size, np.repeat(columns, size, axis=1))
    seen = Counter(map(tuple, out.reshape(seeds, size).tolist()))
    expected = seeds / math.factorial(size)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    freedom = math.factorial(size) - 1
    assert len(seen) == freedom + 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_full_shuffle_mixes_like_a_true_permutation() -> None:
    """Of 1,000 neighbours, how many of 1,000 parts of the corpus are seen: 632.3 for a random permutation."""
    order = Order(lengths=(10**9,), seed=3)
    distinct = [
        len(np.unique(order.locate(np.arange(s, s + 1000))[2] // 10**6)) for s in range(0, 40_000, 1000)
    ]
    assert abs(np.mean(distinct) / 632.3 - 1) < 0.02
    assert np.std(distinct) < 20


def test_block_shuffle_mixes_as_documented() -> None:
    """The same for ``blocks``: 512 groups of neighbours in a window, so about 1000 (1 - e^-0.512) (1 - e^-2.5)."""
    order = Order(lengths=(10**8,), seed=3, shuffle="blocks")
    parts = (order.locate(np.arange(40_000))[2] // 10**5).reshape(-1, 1000)
    assert 320 < np.mean([len(np.unique(one)) for one in parts]) < 370
    small = Order(lengths=(100_000,), seed=3, shuffle="blocks")  # one window: as good as full
    parts = (small.locate(np.arange(40_000))[2] // 100).reshape(-1, 1000)
    assert abs(np.mean([len(np.unique(one)) for one in parts]) / 632.3 - 1) < 0.02


# ---- golden vectors: if one of these changes, ORDER_VERSION must rise, and the old version must stay ----

POSITIONS = np.array([0, 1, 2, 3, 1000, 66573, 66574, 10**6, 10**12])
LENGTHS = (1000, 37, 65537)
GOLDEN_EPOCHS = [
    (
        "full",
        [2, 2, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 1, 15, 15020879],
        [24443, 52955, 10507, 21381, 42846, 38104, 32353, 52309, 42303],
    ),
    (
        "blocks",
        [2, 2, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 1, 15, 15020879],
        [41040, 30321, 25040, 13394, 18225, 59962, 26646, 65255, 47954],
    ),
]
ZIPF = tuple(1 / number for number in range(1, 1001))
GOLDEN_MIXTURES: list[tuple[dict[str, Any], list[int], list[int], list[int]]] = [
    (
        {"lengths": LENGTHS, "phases": mixed(0.5, 0.2, 0.3), "version": 1},
        [1, 0, 1, 1, 1, 2, 0, 0, 2],
        [0, 0, 0, 0, 5, 0, 33, 500, 4574586],
        [34, 922, 7, 31, 35, 22848, 801, 286, 12830],
    ),
    (
        {"lengths": LENGTHS, "phases": mixed(0.5, 0.2, 0.3)},
        [0, 2, 0, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 359, 33, 500, 500000000],
        [922, 52225, 578, 34, 299, 18, 720, 46, 359],
    ),
    (
        {"lengths": (10**9,) * 1000, "phases": mixed(*ZIPF)},
        [5, 64, 0, 80, 5, 609, 3, 634, 460],
        [0] * 9,
        [282559624, 661656781, 706544172, 306758980, 467924126, 546989995, 712645276, 282870550, 428000562],
    ),
    (
        {
            "lengths": (10**9,) * 3,
            "phases": mixed(0.5, 0.2, 0.3),
            "shuffle": "none",
            "lane": 5,
            "lanes": 8,
        },
        [1, 0, 2, 0, 1, 0, 2, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 200],
        [0, 0, 0, 1, 200, 33286, 19972, 200000, 0],
    ),
]


@pytest.mark.parametrize("version", ORDER_VERSIONS)
@pytest.mark.parametrize(("shuffle", "source", "epoch", "block"), GOLDEN_EPOCHS)
def test_golden_vectors(
    version: int, shuffle: str, source: list[int], epoch: list[int], block: list[int]
) -> None:
    found = Order(lengths=LENGTHS, seed=42, shuffle=shuffle, version=version).locate(POSITIONS)
    assert [part.tolist() for part in found] == [source, epoch, block]


@pytest.mark.parametrize(("options", "source", "epoch", "block"), GOLDEN_MIXTURES)
def test_golden_vectors_of_mixtures(
    options: dict[str, Any], source: list[int], epoch: list[int], block: list[int]
) -> None:
    found = Order(seed=42, **options).locate(POSITIONS)
    assert [part.tolist() for part in found] == [source, epoch, block]


# ---- epochs ----


@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 2**32),
    shuffle=st.sampled_from(SHUFFLES),
)
@settings(max_examples=50, deadline=None)
def test_every_block_of_every_source_once_per_epoch(lengths: list[int], seed: int, shuffle: str) -> None:
    order = Order(lengths=tuple(lengths), seed=seed, shuffle=shuffle)
    everything = [(source, block) for source, length in enumerate(lengths) for block in range(length)]
    for epoch in (0, 1, 5):
        found = places(order, epoch * order.epoch_blocks, (epoch + 1) * order.epoch_blocks)
        assert {number for _, number, _ in found} == {epoch}
        assert sorted((source, block) for source, _, block in found) == everything


@pytest.mark.parametrize("length", [255, 256, 257, 1000, 131072, 131073, 300_001])
def test_block_shuffle_is_a_bijection_at_its_borders(length: int) -> None:
    order = Order(lengths=(length,), seed=5, shuffle="blocks")
    assert np.array_equal(np.sort(order.locate(np.arange(length))[2]), np.arange(length))


def test_block_shuffle_reads_long_runs() -> None:
    """What a cold disk sees: 1,000 positions inside a window of 512 groups touch few places of a large corpus."""
    order = Order(lengths=(10**8,), seed=5, shuffle="blocks")
    block = order.locate(np.arange(131072))[2]
    assert len(np.unique(block // 256)) == 512
    full = Order(lengths=(10**8,), seed=5).locate(np.arange(131072))[2]
    assert len(np.unique(full // 256)) > 100_000


def test_epochs_and_seeds_differ_in_their_order() -> None:
    order = Order(lengths=(100,), seed=1)
    orders = {tuple(order.locate(np.arange(e * 100, e * 100 + 100))[2].tolist()) for e in range(20)}
    orders |= {tuple(Order(lengths=(100,), seed=s).locate(np.arange(100))[2].tolist()) for s in range(2, 20)}
    assert len(orders) == 38


@given(positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=20), data=st.data())
@settings(max_examples=30, deadline=None)
def test_order_is_a_pure_function_of_the_position(positions: list[int], data: st.DataObject) -> None:
    phases = data.draw(
        st.sampled_from([(Phase(),), mixed(1, 2), (Phase(), Phase(position=999, weights=(3, 1)))])
    )
    order = Order(lengths=(70, 9), seed=3, phases=phases)
    together = list(zip(*(part.tolist() for part in order.locate(np.array(positions)))))
    fresh = Order(lengths=(70, 9), seed=3, phases=phases)
    assert together == [tuple(int(part[0]) for part in fresh.locate(np.array([p]))) for p in positions]


def test_resume_costs_nothing_at_a_trillion_tokens() -> None:
    """As much work as at the beginning of a small run, counted in calls; the memory of a few blocks."""

    def resume(n_blocks: int, position: int) -> tuple[int, int]:
        calls = [0]
        tracemalloc.start()
        sys.setprofile(
            lambda _frame, event, _arg: calls.__setitem__(0, calls[0] + (event in ("call", "c_call")))
        )
        try:
            order = Order(lengths=(n_blocks,), seed=1)
            cursor = Cursor(fingerprint="x" * 500, seed=1, position=position)
            order.locate(next_positions(cursor.position, 512, cursor.skips)[0])
        finally:
            sys.setprofile(None)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert len(json.dumps(cursor.to_json())) < 1024
        return calls[0], most

    resume(1000, 0)  # what is done once in a process
    (few, _), (many, most) = resume(1000, 0), resume(10**12 // 1024, 10**9)
    assert 0 < many < 3 * few
    assert most < 1e6


# ---- mixtures ----


def largest_error(weights: Sequence[float], positions: int) -> float:
    """How many blocks a source is off its weight, at the worst position and source."""
    order = Order(lengths=(10**9,) * len(weights), seed=1, shuffle="none", phases=mixed(*weights))
    source, _, block = order.locate(np.arange(positions))
    share = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
    worst = 0.0
    for number, exact in enumerate(share.tolist()):
        at = np.flatnonzero(source == number)
        draws = np.arange(len(at) + 1)
        assert block[at].tolist() == draws[:-1].tolist()  # the draws of a source are numbered without gaps
        worst = max(worst, (draws[1:] - exact * (at + 1)).max(initial=0))  # right after a draw
        worst = max(worst, (exact * np.append(at, positions) - draws).max())  # right before the next
    assert order.drawn_before(positions) == tuple(np.bincount(source, minlength=len(weights)).tolist())
    return worst


@pytest.mark.parametrize(
    "weights",
    [
        (3, 1),
        (0.9985, 0.0015),  # 0.15% is not rounded to 1/1024
        (1, 1, 1),
        (0.3, 0.3, 0.2, 0.15, 0.05),
        (5, 0, 2, 3),
        (1, 1e-9),
        tuple(1 / number for number in range(1, 1001)),
        (1,) * 2000,
        (1000, *(1,) * 1000),
    ],
    ids=lambda weights: f"{len(weights)} sources",
)
def test_no_source_of_a_mixture_is_more_than_one_block_off(weights: tuple[float, ...]) -> None:
    assert largest_error(weights, 40_000) <= 1


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
@settings(max_examples=25, deadline=None)
def test_small_random_mixtures_are_about_one_block_off_at_most(weights: list[float]) -> None:
    assert largest_error(weights, 4000) <= 1 + 0.1


@given(weights=st.lists(st.floats(1e-4, 1e4), min_size=9, max_size=60))
@settings(max_examples=15, deadline=None)
def test_error_of_a_mixture_stays_below_its_bound(weights: list[float]) -> None:
    assert largest_error(weights, 4000) <= mixture_error_bound(weights) + 1e-6 < 2


def test_mixture_weights_hold_at_a_trillion_positions() -> None:
    weights = tuple(1 / number for number in range(1, 2001))
    order = Order(lengths=(10**9,) * 2000, seed=1, phases=mixed(*weights))
    counts = np.array(order.drawn_before(10**12))
    assert counts.sum() == 10**12
    total = sum(Fraction(weight) for weight in weights)
    exact = [float(10**12 * Fraction(weight) / total - int(n)) for weight, n in zip(weights, counts)]
    assert max(map(abs, exact)) < 1.01


def test_lanes_of_a_mixture_complement_one_another() -> None:
    """All lanes of a stream together hold the weights in each step, not only each by itself over time."""
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    lanes = [
        Order(lengths=(10**9,) * 4, seed=1, shuffle="none", phases=mixed(*weights), lane=lane, lanes=64)
        for lane in range(64)
    ]
    source = np.stack([order.locate(np.arange(300))[0] for order in lanes])
    counts = np.stack([(source == number).sum(axis=0) for number in range(4)])  # of each step
    assert np.abs(counts - 64 * weights[:, None]).max() < 8
    assert np.abs(counts.cumsum(axis=1) - 64 * weights[:, None] * np.arange(1, 301)).max() < 8
    for order, lane in zip(lanes, source):
        assert order.drawn_before(300) == tuple(np.bincount(lane, minlength=4).tolist())


def test_version_1_keeps_its_rounded_weights_in_every_window() -> None:
    order = Order(lengths=(100, 37, 500), seed=1, phases=mixed(5, 2, 3), version=1)
    counts = shares((5, 2, 3))
    for window in (0, 1, 77):
        source, _, _ = order.locate(np.arange(window * MIXTURE_SLOTS, (window + 1) * MIXTURE_SLOTS))
        assert tuple(np.bincount(source)) == counts
    assert [round(count / MIXTURE_SLOTS, 3) for count in counts] == [0.5, 0.2, 0.3]


@pytest.mark.parametrize("version", ORDER_VERSIONS)
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_each_source_of_a_mixture_has_its_own_epochs(shuffle: str, version: int) -> None:
    """In the order of the positions, every source goes through one whole permutation after another."""
    order = Order(lengths=(100, 37, 500), seed=1, shuffle=shuffle, phases=mixed(5, 2, 3), version=version)
    found = places(order, 0, 8000)
    for source, length in enumerate(order.lengths):
        blocks = [block for s, _, block in found if s == source]
        epochs = [epoch for s, epoch, _ in found if s == source]
        assert epochs == [k // length for k in range(len(epochs))]
        for epoch in range(len(blocks) // length):
            assert sorted(blocks[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(
    change=st.integers(1, 6000),
    weights=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    version=st.sampled_from(ORDER_VERSIONS),
)
@settings(max_examples=30, deadline=None)
def test_appended_phase_moves_no_earlier_position(
    change: int, weights: tuple[int, int], version: int
) -> None:
    before = Order(lengths=(300, 40), seed=1, phases=mixed(3, 1), version=version)
    after = replace(before, phases=(*before.phases, Phase(position=change, weights=weights)))
    assert places(after, 0, change) == places(before, 0, change)
    found = places(after, 0, change + 3000)
    for source, length in enumerate(after.lengths):
        epochs = [epoch for s, epoch, _ in found if s == source]
        assert epochs == [k // length for k in range(len(epochs))]


def test_appended_source_moves_no_earlier_position() -> None:
    before = Order(lengths=(300, 40), seed=1, phases=mixed(3, 1))
    phases = (*before.phases, Phase(position=500, weights=(1, 1, 2)))
    after = Order(lengths=(300, 40, 70), seed=1, phases=phases)
    assert places(after, 0, 500) == places(before, 0, 500)
    assert np.bincount(after.locate(np.arange(500, 900))[0]).tolist() == [100, 100, 200]


def test_weights_that_begin_or_end_start_fresh_epochs() -> None:
    phases = (Phase(), Phase(position=100, weights=(1, 1)), Phase(position=3000))
    order = Order(lengths=(60, 20), seed=1, phases=phases)
    found = places(order, 100, 3000)
    assert {epoch for _, epoch, _ in found[:20]} == {2}  # 100 positions are one epoch and a part
    last = max(epoch for _, epoch, _ in found)
    after = places(order, 3000, 3080)
    assert {epoch for _, epoch, _ in after} == {last + 1}
    assert len({(s, b) for s, _, b in after}) == 80


@pytest.mark.parametrize("weights", [(), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)])
@pytest.mark.parametrize("version", ORDER_VERSIONS)
def test_invalid_weights_raise(weights: tuple[float, ...], version: int) -> None:
    with pytest.raises(RequestError, match="source weights"):
        Order(lengths=(5, 5), seed=1, phases=mixed(*weights), version=version)


def test_version_1_refuses_weights_below_one_slot() -> None:
    with pytest.raises(RequestError, match="order version 1"):
        Order(lengths=(5, 5), seed=1, phases=mixed(1, 1e-9), version=1)


@pytest.mark.parametrize(
    "item",
    [
        None,
        5,
        {},
        {"position": 5},
        {"position": 5, "weights": {}},
        {"position": 5, "weights": [1, 2]},
        {"position": 5, "weights": {"a": 0, "b": 0}},
        *({"position": 5, "weights": {"a": w}} for w in (None, "x", True, -1, math.nan, math.inf, 10**400)),
        *({"position": p, "weights": {"a": 1}} for p in (None, "5", 1.5, True, -1, 0, 10**30, math.nan)),
        {"position": 5, "weights": {"nobody": 1}},
        {"position": 5, "weights": {"a": 1}, "more": 1},
    ],
)
def test_invalid_phases_raise(item: Any) -> None:
    with pytest.raises(RequestError, match=r"data\.phases|source weights"):
        phases_from_options([item], ["a", "b"], None)


def test_phases_are_given_by_source_name() -> None:
    options = [{"position": 10, "weights": {"b": 2}}, {"position": 20, "weights": None}]
    assert phases_from_options(options, ["a", "b"], (1.0, 1.0)) == (
        Phase(weights=(1.0, 1.0)),
        Phase(position=10, weights=(0.0, 2.0)),
        Phase(position=20),
    )


@given(st.lists(st.floats(1, 50), min_size=1, max_size=12))
def test_shares_fill_the_window(weights: list[float]) -> None:
    counts = shares(weights)
    assert sum(counts) == MIXTURE_SLOTS
    exact = [w / sum(weights) * MIXTURE_SLOTS for w in weights]
    assert all(abs(count - want) < 1 for count, want in zip(counts, exact))


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": (0, 0)},
        {"lengths": (5,), "shuffle": "some"},
        {"lengths": (5,), "phases": ()},
        {"lengths": (5,), "phases": (Phase(position=3),)},
        {"lengths": (5,), "phases": (Phase(), Phase())},
        {"lengths": (5,), "phases": mixed(1, 1)},
        {"lengths": (5, 0), "phases": mixed(1, 1)},
    ],
)
def test_invalid_order_raises(options: dict) -> None:
    with pytest.raises(RequestError):
        Order(seed=1, **options)


# ---- ranks ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_slice_the_batch(world_size: int) -> None:
    positions = np.arange(100, 148)
    assert np.concatenate([rank_slice(positions, r, world_size) for r in range(world_size)]).tolist() == (
        positions.tolist()
    )


def test_indivisible_batch_raises() -> None:
    with pytest.raises(RequestError, match=r"10 blocks .* 4 processes"):
        rank_slice(np.arange(10), 0, 4)
