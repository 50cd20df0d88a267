"""What is said about repeated text and published laws, and when a run stops by itself."""

from __future__ import annotations

import pytest

from lmcore.config import parse
from lmcore.config.schema import RunConfig
from lmcore.run import advice


def options(*words: str) -> RunConfig:
    return parse.parse(["--data.train", "x", *words], default_recipe=None)


@pytest.mark.parametrize(
    ("asked", "repeats", "validated", "began_with", "patience"),
    [
        (None, 1.5, True, None, 3),
        (None, 1.0, True, None, 0),
        (None, 0.2, True, None, 0),
        (None, None, True, None, 0),
        (None, 1.5, False, None, 0),
        (None, 1.5, True, 0, 0),  # a checkpoint of an older version goes on as it began
        (0, 9.0, True, None, 0),
        (7, 0.5, True, None, 7),
    ],
)
def test_early_stopping_is_on_where_text_is_repeated_and_validated(
    asked: int | None, repeats: float | None, validated: bool, began_with: int | None, patience: int
) -> None:
    found = advice.patience_of(asked, repeats=repeats, validated=validated, began_with=began_with)
    assert found == patience
    rows = advice.early_stopping_row(asked, found, repeats)
    assert bool(rows) == bool(patience)
    assert ("patience 0: off" in str(rows)) == (bool(patience) and asked is None)


def test_text_that_is_seen_many_times_is_warned_about() -> None:
    config = options()
    assert advice.passes(600, 200) == 3
    assert advice.passes(600, None) is None
    for repeats in (None, 0.5, 4.0):
        assert advice.repetition_warning(config, repeats, validated=True, patience=3) is None
    line = advice.repetition_warning(config, 20.0, validated=True, patience=0) or ""
    assert "seen 20 times" in line
    assert "29% of a new one" in line  # exp(-19 / 15.39)
    assert "early_stopping.patience 3" in line
    assert "2305.16264" in line
    assert "patience" not in (advice.repetition_warning(config, 20.0, validated=True, patience=3) or "")


def test_laws_are_shown_beside_the_rate_with_their_range() -> None:
    sizes = {"parameters": 100_000_000, "run_tokens": 2_000_000_000, "unique_tokens": None}
    ((_, words),) = advice.law_row(options(), **sizes)  # a table
    assert "0.0048 with 311k tokens a step (Porian" in words
    assert "20 tokens a parameter: inside its range" in words
    assert "Li et al. 2025" in words
    assert "100B tokens: outside its range" in words
    sizes["run_tokens"] = 10_000_000
    ((_, words),) = advice.law_row(options(), **sizes)  # a table
    assert ": inside its range" not in words
    assert advice.law_row(options("--optim.name", "muon"), **sizes) == []  # a table
    assert advice.law_row(options("--data.factory", "a:b"), **sizes) == [], "no text"


def test_positions_that_are_never_trained_are_named() -> None:
    line = advice.context_warning(options(), context=256, block_size=32) or ""
    assert "positions after 32" in line
    assert "--data.block_size 256" in line
    for context in (None, 32):
        assert advice.context_warning(options(), context=context, block_size=32) is None
    assert advice.context_warning(options("--model.from_pretrained", "x"), context=256, block_size=32) is None
