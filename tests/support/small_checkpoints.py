"""Checkpoints of a few numbers, and a kill at any request to a store."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.checkpoint.manifest import step_name
from lmcore.storage import Store
from tests.support.checkpoints import checkpoints, whole

SHAPES = {"wte.weight": (7, 4), "h.0.weight": (4, 3)}


class Killed(BaseException):
    """The process has gone."""


def expected_weights(step: int, branch: int = 0) -> dict[str, torch.Tensor]:
    """What the checkpoint of a step holds."""
    generator = torch.Generator().manual_seed(1000 * branch + step)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def save(folder: Path, step: int, *, branch: int = 0, keep: int = 9, **options: Any) -> Path:
    """A checkpoint of this step; those of two branches differ in every file."""
    saves = checkpoints(folder, keep=keep, background=False)
    weights = expected_weights(step, branch)
    tensors = [("model", name, None, tensor) for name, tensor in weights.items()]
    saves.save(step, tensors=whole(tensors), state={"branch": branch}, **options)
    saves.wait(final=True)
    return folder / step_name(step)


def same(one: Path, other: Path) -> bool:
    return {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Callable[[], int]:
    """Kill at this call of any store (from 0) by the present thread, before or after it is carried out; the number of calls so far."""
    counter, real, thread = itertools.count(), Store._try, threading.get_ident()
    calls = 0

    def attempt(self: Store, what: str, call: Callable[[], Any], **options: Any) -> Any:
        nonlocal calls
        if threading.get_ident() != thread:  # of another run
            return real(self, what, call, **options)
        here = next(counter)
        calls = here + 1
        if here == number:
            if after:
                with contextlib.suppress(FileNotFoundError):  # an answer, too
                    real(self, what, call, **options)
            raise Killed
        return real(self, what, call, **options)

    monkeypatch.setattr(Store, "_try", attempt)
    return lambda: calls
