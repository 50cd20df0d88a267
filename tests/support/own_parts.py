"""A user's own model, data and loss, for tests of the three factories: a small regression."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


class Line(torch.utils.data.Dataset):
    """x -> 3 x - 1 and some noise, 64 points."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.rand(count, 1, generator=draw)
        self.y = 3 * self.x - 1 + 0.01 * torch.randn(count, 1, generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


def data(count: int) -> dict[str, Any]:
    return {"train": Line(count, 0), "valid": {"line": Line(8, 1)}}


def longer_on_rank_1(count: int) -> Any:
    return Line(count + int(os.environ.get("RANK", "0")), 0)


def broken_on_rank_1(count: int, where: str) -> Any:
    """An error on one rank only: in the factory, or in an item."""

    def fail(place: str) -> None:
        if place == where and os.environ.get("RANK") == "1":
            raise ValueError(f"no {place}:\nthe file is gone")

    class Broken(Line):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            fail("item")
            return super().__getitem__(index)

    fail("factory")
    return Broken(count, 0)


def pairs(count: int) -> dict[str, Any]:
    """The same as pairs, of which only the own ``collate`` makes a batch; it doubles the labels."""

    class Pairs(Line):
        def __getitem__(self, index: int) -> Any:
            return self.x[index], self.y[index]

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in items]), "labels": 2 * torch.stack([y for _, y in items])}

    return {"train": Pairs(count, 0), "valid": {"line": Pairs(8, 1)}, "collate": collate}


def with_a_stray_key(count: int) -> dict[str, Any]:
    """The same with a key that the model does not take."""

    class Weighed(Line):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), "z": self.x[index]}

    return {"train": Weighed(count, 0)}


def iterable(count: int) -> dict[str, Any]:
    """The same as an iterable, whose length nobody knows before it was read."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            line = Line(count, 0)
            return (line[index] for index in range(count))

    return {"train": Stream(), "valid": {"line": Line(8, 1)}}


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.register_buffer("scale", torch.ones(1))  # belongs to a checkpoint, not to the optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def model(width: int = 8) -> nn.Module:
    return Net(width)


def model_with_a_spare_layer(width: int) -> nn.Module:
    made = model(width)
    made.spare = nn.Linear(2, 2)
    return made


def squares(outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    error = (outputs - batch["labels"]).float().square()
    return error.sum(), torch.tensor(error.numel())
