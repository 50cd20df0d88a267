"""Laws 1, 2, 3 and 6: the order is arithmetic, a permutation, free of cost, and a changed past is refused."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.order import (
    MIXTURE_SLOTS,
    SHUFFLES,
    Cursor,
    Order,
    Phase,
    count_positions,
    keys,
    merge_skips,
    next_positions,
    permute,
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


def test_one_call_may_hold_many_permutations() -> None:
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


def test_blocks_mix_as_well_as_the_documents_say() -> None:
    """The same for ``blocks``: 512 groups of neighbours in a window, so about 1000 (1 - e^-0.512) (1 - e^-2.5)."""
    order = Order(lengths=(10**8,), seed=3, shuffle="blocks")
    parts = (order.locate(np.arange(40_000))[2] // 10**5).reshape(-1, 1000)
    assert 320 < np.mean([len(np.unique(one)) for one in parts]) < 370
    small = Order(lengths=(100_000,), seed=3, shuffle="blocks")  # one window: as good as full
    parts = (small.locate(np.arange(40_000))[2] // 100).reshape(-1, 1000)
    assert abs(np.mean([len(np.unique(one)) for one in parts]) / 632.3 - 1) < 0.02


# ---- golden vectors: if one of these changes, ORDER_VERSION must, and every checkpoint in the world is refused ----

POSITIONS = np.array([0, 1, 2, 3, 1000, 66573, 66574, 10**6, 10**12])
GOLDEN = [
    (
        {"shuffle": "full"},
        [2, 2, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 1, 15, 15020879],
        [24443, 52955, 10507, 21381, 42846, 38104, 32353, 52309, 42303],
    ),
    (
        {"shuffle": "blocks"},
        [2, 2, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 1, 15, 15020879],
        [41040, 30321, 25040, 13394, 18225, 59962, 26646, 65255, 47954],
    ),
    (
        {"shuffle": "full", "phases": mixed(0.5, 0.2, 0.3)},
        [1, 0, 1, 1, 1, 2, 0, 0, 2],
        [0, 0, 0, 0, 5, 0, 33, 500, 4574586],
        [34, 922, 7, 31, 35, 22848, 801, 286, 12830],
    ),
]


@pytest.mark.parametrize(("options", "source", "epoch", "block"), GOLDEN)
def test_golden_vectors(options: dict, source: list[int], epoch: list[int], block: list[int]) -> None:
    found = Order(lengths=(1000, 37, 65537), seed=42, **options).locate(POSITIONS)
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
def test_the_order_is_a_pure_function_of_the_position(positions: list[int], data: st.DataObject) -> None:
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


def test_a_mixture_keeps_its_weights_in_every_window() -> None:
    order = Order(lengths=(100, 37, 500), seed=1, phases=mixed(5, 2, 3))
    counts = shares((5, 2, 3))
    for window in (0, 1, 77):
        source, _, _ = order.locate(np.arange(window * MIXTURE_SLOTS, (window + 1) * MIXTURE_SLOTS))
        assert tuple(np.bincount(source)) == counts
    assert [round(count / MIXTURE_SLOTS, 3) for count in counts] == [0.5, 0.2, 0.3]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_each_source_of_a_mixture_has_its_own_epochs(shuffle: str) -> None:
    """In the order of the positions, every source goes through one whole permutation after another."""
    order = Order(lengths=(100, 37, 500), seed=1, shuffle=shuffle, phases=mixed(5, 2, 3))
    found = places(order, 0, 8000)
    for source, length in enumerate(order.lengths):
        blocks = [block for s, _, block in found if s == source]
        epochs = [epoch for s, epoch, _ in found if s == source]
        assert epochs == [k // length for k in range(len(epochs))]
        for epoch in range(len(blocks) // length):
            assert sorted(blocks[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(change=st.integers(1, 6000), weights=st.tuples(st.integers(1, 9), st.integers(0, 9)))
@settings(max_examples=25, deadline=None)
def test_an_appended_phase_moves_nothing_and_continues_each_source(
    change: int, weights: tuple[int, int]
) -> None:
    before = Order(lengths=(300, 40), seed=1, phases=mixed(3, 1))
    after = Order(lengths=(300, 40), seed=1, phases=(*before.phases, Phase(position=change, weights=weights)))
    assert places(after, 0, change) == places(before, 0, change)
    found = places(after, 0, change + 3000)
    for source, length in enumerate(after.lengths):
        epochs = [epoch for s, epoch, _ in found if s == source]
        assert epochs == [k // length for k in range(len(epochs))]


def test_an_appended_source_leaves_the_past_alone() -> None:
    before = Order(lengths=(300, 40), seed=1, phases=mixed(3, 1))
    phases = (*before.phases, Phase(position=500, weights=(1, 1, 2)))
    after = Order(lengths=(300, 40, 70), seed=1, phases=phases)
    assert places(after, 0, 500) == places(before, 0, 500)
    assert np.bincount(after.locate(np.arange(500, 500 + MIXTURE_SLOTS))[0]).tolist() == [256, 256, 512]


def test_from_all_sources_to_a_mixture_and_back_begins_fresh_epochs() -> None:
    phases = (Phase(), Phase(position=100, weights=(1, 1)), Phase(position=3000))
    order = Order(lengths=(60, 20), seed=1, phases=phases)
    found = places(order, 100, 3000)
    assert {epoch for _, epoch, _ in found[:20]} == {2}  # 100 positions are one epoch and a part
    last = max(epoch for _, epoch, _ in found)
    after = places(order, 3000, 3080)
    assert {epoch for _, epoch, _ in after} == {last + 1}
    assert len({(s, b) for s, _, b in after}) == 80


@pytest.mark.parametrize("weights", [(), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1), (1, 1e-9)])
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(RequestError):
        shares(weights)


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
def test_impossible_orders_are_refused(options: dict) -> None:
    with pytest.raises(RequestError):
        Order(seed=1, **options)


# ---- positions ----

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1])), max_size=5
)


@given(start=st.integers(0, 80), count=st.integers(1, 40), ranges=RANGES)
def test_skipped_ranges_are_jumped_over(start: int, count: int, ranges: list[tuple[int, int]]) -> None:
    skips = merge_skips(ranges)
    allowed = [p for p in range(start, 400) if not any(a <= p < b for a, b in ranges)]
    positions, after = next_positions(start, count, skips)
    assert positions.tolist() == allowed[:count]
    assert after == allowed[count - 1] + 1
    assert count_positions(start, 300, skips) == len([p for p in allowed if p < 300])


def test_impossible_skips_are_refused() -> None:
    for bad in ([(5, 5)], [(7, 3)], [(-1, 3)]):
        with pytest.raises(RequestError, match=r"skip_positions"):
            merge_skips(bad)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_cut_the_batch_and_nothing_else(world_size: int) -> None:
    positions = np.arange(100, 148)
    assert np.concatenate([rank_slice(positions, r, world_size) for r in range(world_size)]).tolist() == (
        positions.tolist()
    )


def test_a_batch_that_does_not_divide_is_refused_with_its_numbers() -> None:
    with pytest.raises(RequestError, match=r"10 blocks .* 4 processes"):
        rank_slice(np.arange(10), 0, 4)


# ---- the cursor ----


def test_a_cursor_survives_json() -> None:
    cursor = Cursor(fingerprint="f", seed=2**62, skips=((5, 9),)).advance(7).with_weights([0.1, 0.9])
    again = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert again == cursor
    assert cursor.position == 11  # 5 to 8 were jumped over


def test_weights_append_a_phase_only_when_they_change() -> None:
    cursor = Cursor(fingerprint="f", seed=1, phases=mixed(1, 2)).advance(10)
    assert cursor.with_weights([1, 2]) is cursor
    changed = cursor.with_weights([2, 1])
    assert changed.phases == (Phase(weights=(1, 2)), Phase(position=10, weights=(2.0, 1.0)))
    again = changed.with_weights([3, 1])  # changed twice before a step was made
    assert again.phases == (Phase(weights=(1, 2)), Phase(position=10, weights=(3.0, 1.0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "new"}, ("old", "new")),
        ({"seed": 8}, ("7", "8")),
        ({"version": 99}, ("99", "1")),
    ],
)
def test_a_changed_past_is_refused_with_both_values_and_the_way_out(
    change: dict, words: tuple[str, ...]
) -> None:
    saved = {**Cursor(fingerprint="old", seed=7, position=5).to_json()}
    if "version" in change:
        saved |= change
    cursor = Cursor.from_json(saved)
    now = {"fingerprint": "old", "seed": 7} | {k: v for k, v in change.items() if k != "version"}
    with pytest.raises(RequestError) as caught:
        cursor.check(**now)
    for word in (*words, "--allow_changes"):
        assert word in str(caught.value)
    accepted = cursor.check(**now, accept=True)
    assert (accepted.position, accepted.fingerprint, accepted.seed) == (5, now["fingerprint"], now["seed"])
    assert Cursor(fingerprint="old", seed=7).check(fingerprint="old", seed=7).position == 0
