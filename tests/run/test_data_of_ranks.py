"""Every rank must read the same data: the ranks share out positions, which would mean other blocks to each of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcore.data import custom
from lmcore.errors import RequestError
from lmcore.run.setup import Data, compare_data


def items(count: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [{"x": torch.tensor([n]), "labels": [n], **more} for n in range(first, first + count)]


def data(train: Any, **valid: Any) -> Data:
    sets = {name: custom.wrap(dataset, seed=1) for name, dataset in valid.items()}
    return Data(train=custom.wrap(train, seed=1), valid=sets, test={}, encoder=None, block_size=8)


def compare(*ranks: Data) -> list[str]:
    """What rank 0 says of the data of these ranks."""
    told: list[Any] = []
    notes: list[str] = []
    for rank in ranks:
        compare_data(rank, gather=lambda own: [told.append(own), own][1:])
    compare_data(ranks[0], gather=lambda own: told, note=notes.append)
    return notes


def test_same_data_are_taken_without_a_word() -> None:
    assert compare(*[data(items(5), valid=items(3)) for _ in range(3)]) == []
    assert compare(*[data(items(5, note="text")) for _ in range(2)]) == []  # not compared: no numbers


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (data(items(6), valid=items(3)), "train: own shuffle=full builtins.list of 5 items; "),
        (data(items(5), valid=items(4)), "valid: own shuffle=full builtins.list of 3 items; "),
        (data(items(5)), "valid: own shuffle=full builtins.list of 3 items; missing"),
        (data(items(5), valid=items(3), more=items(3)), "valid more: missing; "),
        (data(iter(items(5)), valid=items(3)), "own iterable"),
    ],
)
def test_data_of_another_kind_or_length_are_refused(other: Data, said: str) -> None:
    first = data(items(5), valid=items(3))
    with pytest.raises(RequestError, match="the data of rank 0 and rank 2 differ") as refused:
        compare(first, first, other)
    assert said in str(refused.value)


def test_share_of_each_rank_is_said() -> None:
    [note] = compare(data(items(4)), data(items(4, first=4)))
    assert "the first item of train is another one on rank 1" in note
    assert "every rank must have the whole" in note


def test_text_that_differs_is_refused() -> None:
    """A stream of files of which one rank has found one more, or other ones."""
    ranks = [
        Data(train=SimpleNamespace(fingerprint=f), valid={}, test={}, encoder=None, block_size=8)
        for f in ("ab", "cd")
    ]
    with pytest.raises(RequestError, match="train: ab; cd"):
        compare(*ranks)
