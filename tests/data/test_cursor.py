"""The cursor: what is skipped, how mixtures change under it, and that a changed past is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcore.data.cursor import Cursor, count_positions, merge_skips, next_positions
from lmcore.data.order import Phase
from lmcore.errors import RequestError


def mixed(*weights: float) -> tuple[Phase, ...]:
    return (Phase(weights=weights),)


# ---- positions ----

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1])), max_size=5
)


@given(start=st.integers(0, 80), count=st.integers(1, 40), ranges=RANGES)
def test_skipped_positions_are_jumped_over(start: int, count: int, ranges: list[tuple[int, int]]) -> None:
    skips = merge_skips(ranges)
    allowed = [p for p in range(start, 400) if not any(a <= p < b for a, b in ranges)]
    positions, after = next_positions(start, count, skips)
    assert positions.tolist() == allowed[:count]
    assert after == allowed[count - 1] + 1
    assert count_positions(start, 300, skips) == len([p for p in allowed if p < 300])


def test_invalid_skips_raise() -> None:
    for bad in ([(5, 5)], [(7, 3)], [(-1, 3)]):
        with pytest.raises(RequestError, match=r"skip_positions"):
            merge_skips(bad)


# ---- the cursor ----


def test_cursor_round_trip_through_json() -> None:
    cursor = Cursor(fingerprint="f", seed=2**62, skips=((5, 9),)).advance(7).with_weights([0.1, 0.9])
    again = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert again == cursor
    assert cursor.position == 11  # 5 to 8 were jumped over


def test_changed_weights_append_a_phase() -> None:
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
        ({"version": 99}, ("99", "2")),
    ],
)
def test_resume_with_changed_data_seed_or_version_raises(change: dict, words: tuple[str, ...]) -> None:
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


def test_configured_phases_and_skips_hold_from_the_cursor_on() -> None:
    past = Cursor(fingerprint="f", seed=1, position=100, phases=mixed(1.0, 1.0), skips=((3, 5),))

    def now(*phases: Phase) -> Cursor:
        return past.with_phases(phases).with_skips([(200, 210)])

    same = now(Phase(weights=(1.0, 1.0)))
    assert same.phases == past.phases
    assert same.skips == ((3, 5), (200, 210))
    changed = now(Phase(weights=(3.0, 1.0)))
    assert changed.phases == (Phase(weights=(1.0, 1.0)), Phase(position=100, weights=(3.0, 1.0)))
    planned = now(Phase(weights=(1.0, 1.0)), Phase(position=150, weights=(0.0, 1.0)))
    assert planned.phases == (Phase(weights=(1.0, 1.0)), Phase(position=150, weights=(0.0, 1.0)))


def test_cursor_of_order_version_1_keeps_its_version() -> None:
    """As an older lmcore saved it: the fingerprint repeated the version."""
    saved = Cursor(fingerprint="store order=1 block_size=8 shuffle=full a:0123", seed=7, version=1).to_json()
    cursor = Cursor.from_json(json.loads(json.dumps(saved)))
    kept = cursor.check(fingerprint="store block_size=8 shuffle=full a:0123", seed=7)
    assert kept.version == 1
    assert kept.advance(5).with_weights([1, 2]).version == 1
    assert replace(cursor, version=99).check(fingerprint="x", seed=7, accept=True).version == 2


def test_allowed_change_of_the_seed_is_of_the_seed_only() -> None:
    cursor = Cursor(fingerprint="a", seed=1, position=5)
    assert cursor.check(fingerprint="a", seed=2, accept_seed=True).seed == 2
    for data, seed in (("b", 1), ("b", 2)):
        with pytest.raises(RequestError, match="trained on other data"):
            cursor.check(fingerprint=data, seed=seed, accept_seed=True)
