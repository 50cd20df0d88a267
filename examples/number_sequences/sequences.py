"""Pairs of numbers -> the run of numbers between them; and the loss that knows the padding.

Holds the functions of ``data.factory`` and ``loss.factory``. The target of (a, b) is a, ..., b in steps of one, both ends
included, ascending, descending or a single number. It begins with START, ends with END, and is filled up with PADDING,
which the loss ignores.

    (3, 6) -> 11 3 4 5 6 12 13 13 ...      (2, 0) -> 11 2 1 0 12 13 ...      (7, 7) -> 11 7 12 13 ...

The ids 11, 12 and 13 are taken by START, END and PADDING; so the number n is the id n up to 10, and n + 3 from 11 on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

START, END, PADDING = 11, 12, 13
IGNORED_LABEL = -100
"""The label that lmcore gives the examples that fill up the last step."""


def to_id(number: int) -> int:
    """The id of a number."""
    return number if number < START else number + 3


def to_text(ids: Sequence[int]) -> str:
    """Ids as a person reads them; START, END and PADDING are ``<``, ``>`` and ``.``."""
    marks = {START: "<", END: ">", PADDING: "."}
    return " ".join(marks.get(one, str(one if one < START else one - 3)) for one in ids)


def vocab_size(numbers: int) -> int:
    """Ids for the numbers 0 to ``numbers`` - 1 and the three marks."""
    return max(numbers, START) + 3


def run_of(first: int, last: int) -> list[int]:
    """The ids from ``first`` to ``last``, both included."""
    step = 1 if first <= last else -1
    return [to_id(number) for number in range(first, last + step, step)]


class Sequences:
    """A map-style dataset of pairs.

    Each item is ``source`` (2,), ``target`` (L,): START and the run, and ``labels`` (L,): the run and END, that is, the
    target one id later; L = ``numbers`` + 1 for all, filled up with PADDING.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], numbers: int) -> None:
        self.pairs = list(pairs)
        self.length = numbers + 1

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, last = self.pairs[index]
        run = run_of(first, last)
        return {
            "source": torch.tensor([to_id(first), to_id(last)]),
            "target": self._filled([START, *run]),
            "labels": self._filled([*run, END]),
        }

    def _filled(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids + [PADDING] * (self.length - len(ids)))


def random_draws(*, pairs: int = 10_000, numbers: int = 11, seed: int = 0) -> dict[str, Sequences]:
    """``data.factory``: train, valid and test are drawn at random, as tutorials do. With 10,000 draws from 121 pairs
    nearly every pair of the test set has been seen in training: this shows that the model learns, not that it
    generalizes."""
    draw = random.Random(f"{seed} random draws")
    sizes = {"train": pairs, "valid": max(1, pairs // 10), "test": max(1, pairs // 10)}
    return {
        name: Sequences([(draw.randrange(numbers), draw.randrange(numbers)) for _ in range(size)], numbers)
        for name, size in sizes.items()
    }


def unseen_pairs(*, numbers: int = 40, held_out: float = 0.2, seed: int = 0) -> dict[str, Sequences]:
    """``data.factory``: every pair of a larger range exists once, and is in one of the three sets only: the test set
    (and the validation set) holds pairs that training has never seen."""
    every = [(first, last) for first in range(numbers) for last in range(numbers)]
    random.Random(f"{seed} unseen pairs").shuffle(every)
    test = round(len(every) * held_out / 2)
    return {
        "train": Sequences(every[2 * test :], numbers),
        "valid": Sequences(every[test : 2 * test], numbers),
        "test": Sequences(every[:test], numbers),
    }


def loss_without_padding(outputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``loss.factory``: (sum of the cross-entropies, their count) over all labels that are not padding.

    ``outputs`` (B, L, V) logits, ``batch["labels"]`` (B, L).
    """
    labels = batch["labels"].masked_fill(batch["labels"] == PADDING, IGNORED_LABEL)
    losses = cross_entropy(
        outputs.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return losses, (labels != IGNORED_LABEL).sum()


def loss_per_run(outputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``loss.factory``: as above, but the sum of the runs' means and the number of runs: a short run counts as much as
    a long one. Where to stop is learned once in each run, and it is short runs of unseen pairs that fail."""
    labels = batch["labels"].masked_fill(batch["labels"] == PADDING, IGNORED_LABEL)
    losses = cross_entropy(
        outputs.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    lengths = (labels != IGNORED_LABEL).sum(dim=1)
    return (losses.sum(dim=1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
