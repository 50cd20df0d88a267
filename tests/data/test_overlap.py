"""Validation documents that also stand in the training text are found by their tokens, and said with their number."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from lmcore.data.store import overlap
from lmcore.data.store.overlap import Overlap, find_overlap
from lmcore.data.store.store import Piece, TokenStore


def store_of(
    folder: Path, name: str, documents: list[list[int]], *, cut: int = 0, dtype: str = "<u2"
) -> TokenStore:
    """A store of two pieces, the second one from document ``cut`` on."""
    folder.mkdir(exist_ok=True)
    pieces = []
    for number, part in enumerate((documents[:cut], documents[cut:])):
        np.array([token for one in part for token in one], dtype).tofile(folder / f"{name}{number}.bin")
        np.cumsum([len(one) for one in part]).astype("<u4").tofile(folder / f"{name}{number}.ends")
        pieces.append(
            Piece(
                path=str(folder / f"{name}{number}.bin"),
                n_tokens=sum(map(len, part)),
                ends=str(folder / f"{name}{number}.ends"),
                ends_dtype="<u4",
                n_ends=len(part),
            )
        )
    fingerprint = f"{name}{hash(str(documents))}"
    return TokenStore(name=name, fingerprint=fingerprint, dtype=dtype, pieces=pieces)


def slow_overlap(held_out: list[list[int]], training: dict[str, list[list[int]]]) -> Overlap | None:
    """Every document against every other one."""
    found, at = [], 0
    for one in held_out:
        owner = next((name for name, documents in training.items() if one in documents), None)
        if owner is not None:
            found.append((at, at + len(one), owner))
        at += len(one)
    if not found:
        return None
    tokens = sum(stop - start for start, stop, _ in found)
    start, stop, owner = found[0]
    return Overlap(len(found), len(held_out), tokens, at, owner, start, stop)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stretch", [8, 2**22])
def test_overlap_is_that_of_a_comparison_of_all_with_all(
    seed: int, stretch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_STRETCH_TOKENS", stretch)  # documents longer than a stretch too
    draw = Random(seed)

    def documents(count: int) -> list[list[int]]:
        return [[*(draw.randrange(1, 3) for _ in range(draw.randrange(0, 40))), 0] for _ in range(count)]

    training = {"a": documents(60), "b": documents(30)}
    held_out = documents(25) + draw.sample(training["a"] + training["b"], draw.randrange(3))
    draw.shuffle(held_out)
    stores = [store_of(tmp_path, name, texts, cut=7, dtype="<u4") for name, texts in training.items()]
    found = find_overlap(store_of(tmp_path, "valid", held_out, cut=3), stores)
    assert found == slow_overlap(held_out, training)


def test_document_inside_a_longer_one_is_another_document(tmp_path: Path) -> None:
    training = store_of(tmp_path, "train", [[1, 2, 3, 4, 0], [5, 6, 0]])
    assert find_overlap(store_of(tmp_path, "valid", [[2, 3, 4, 0], [5, 6, 0, 0], [6, 0]]), [training]) is None


def test_overlap_of_large_stores_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "REMEMBERED_FROM_TOKENS", 1)
    training = store_of(tmp_path, "train", [[1, 2, 0], [3, 4, 0]])
    valid, other = store_of(tmp_path, "v", [[3, 4, 0]]), store_of(tmp_path, "w", [[4, 0]])
    first = find_overlap(valid, [training]), find_overlap(other, [training])
    assert first == (Overlap(1, 1, 3, 3, "train", 0, 3), None)

    def never(*_: Any) -> None:
        raise AssertionError("compared again")

    with monkeypatch.context() as patched:
        patched.setattr(overlap, "_compare", never)
        assert (find_overlap(valid, [training]), find_overlap(other, [training])) == first
    memory = overlap._memory_file(valid, [training])
    assert memory is not None
    for damage in ("", "[]", '{"documents": 3}', "null"):
        memory.write_text(damage)
        assert find_overlap(valid, [training]) == first[0]
