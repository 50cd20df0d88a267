"""What did the model see? Any position or step, decoded.

Comes in: the training blocks and positions (a step's are in ``metrics.jsonl`` and in every warning about a
step); of a stream, the cursors of its checkpoints. Goes out: for each block its source, epoch, place in the
token store, the files it came from, and its text. What always holds: it reads what training reads, by the
same code; nothing is remembered from the run.

    for one in show(dataset, range(4096, 4100), tokenizer.decode):
        print(one)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.custom import MapData
from lmcore.data.store.store import TokenStore
from lmcore.data.stream import StreamDataset
from lmcore.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One block. ``first_token`` is its place in the store; ``files`` are those of the part that it lies
    in."""

    position: int
    source: str
    epoch: int
    block: int
    first_token: int
    documents: int
    files: str
    ids: tuple[int, ...]
    text: str

    @property
    def place(self) -> str:
        """Where it comes from, in words."""
        return (
            f"position {self.position}: source {self.source}, epoch {self.epoch}, block {self.block}, tokens "
            f"{self.first_token}-{self.first_token + len(self.ids) - 1}, {self.documents} documents, {self.files}"
        )

    def __str__(self) -> str:
        return f"{self.place}\n{self.text}"


def places(
    data: Any, positions: Sequence[int], cursors: Sequence[Cursor] = ()
) -> Iterator[tuple[str, Sequence[int] | None]]:
    """(where a block comes from, its ids), for data of any kind.

    Args:
        data: the training blocks of a run.
        cursors: those of its checkpoints, oldest first; a stream is read from the one before a position on, and
            from its beginning where there is none.

    Raises:
        RequestError: the data have no positions that could be looked up.
    """
    if isinstance(data, StreamDataset):
        found = _streamed(data, positions, cursors)
        for position in positions:
            lane, block = position % data.lanes, position // data.lanes
            yield f"position {position}: lane {lane}, block {block} of it", found[position]
    elif isinstance(data, StoreBlocks):
        now = data.resumed(cursors[-1]) if cursors else data
        for one in show(now, positions, lambda ids: ""):
            yield one.place, one.ids
    elif isinstance(data, MapData):
        _, epochs, items = data.order.locate(np.array(positions))
        for position, epoch, item, value in zip(positions, epochs, items, data.read(np.array(positions))):
            ids = value.get("input_ids") if isinstance(value, dict) else None
            yield (
                f"position {position}: item {item}, epoch {epoch}",
                None if ids is None else np.asarray(ids).tolist(),
            )
    else:
        raise RequestError("an iterable dataset of your own has no positions that could be looked up")


def _streamed(
    data: StreamDataset, positions: Sequence[int], cursors: Sequence[Cursor]
) -> dict[int, list[int]]:
    """The ids at positions of a stream: their lanes are read up to them, a block at a time."""
    before = [cursor for cursor in cursors if cursor.position <= min(positions)]
    if cursors:
        start = (
            before[-1]
            if before
            else Cursor(
                fingerprint=data.fingerprint,
                seed=data.seed,
                phases=cursors[-1].phases,
                stream={"lanes": data.lanes},
            )
        )
        data = data.resumed(start)
    first = before[-1].position if before else 0
    found = {}
    for lane in sorted({position % data.lanes for position in positions}):
        wanted = {position for position in positions if position % data.lanes == lane}
        for position in range(first + lane, max(wanted) + 1, data.lanes):
            ids = data.read(np.array([position])).ids[0, :-1].tolist()
            if position in wanted:
                found[position] = ids
    return found


def show(
    dataset: StoreBlocks, positions: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> list[Shown]:
    """The blocks at these positions.

    Args:
        dataset: blocks over stores, under the cursor's mixtures (:meth:`lmcore.data.blocks.StoreBlocks.resumed`).
        decode: ids -> text.

    Raises:
        RequestError: the dataset has no order by position.
    """
    wanted = np.fromiter(positions, dtype=np.int64)
    sources, epochs, blocks = (part.tolist() for part in dataset.order.locate(wanted))
    rows = dataset.read(wanted)
    out = []
    for row, (position, source, epoch, block) in enumerate(zip(wanted.tolist(), sources, epochs, blocks)):
        store, first = dataset.stores[source], block * dataset.block_size
        ids = rows.ids[row, :-1].tolist()
        out.append(
            Shown(
                position=position,
                source=store.name,
                epoch=epoch,
                block=block,
                first_token=first,
                documents=len(store.document_ends(first, first + dataset.block_size - 1)) + 1,
                files=_files(store, first),
                ids=tuple(ids),
                text=decode(ids),
            )
        )
    return out


def _files(store: TokenStore, token: int) -> str:
    """The files of the part that holds a token."""
    for part in store.manifest.get("parts", []):
        if token < part["tokens"]:
            names = [name for name, _, _ in part["pieces"]]
            return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} files)"
        token -= part["tokens"]
    return "files of tokens"
