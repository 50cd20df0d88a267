"""Where the blocks at given positions come from, and their tokens: what the model saw at a step.

The data are read by the same code as in training; nothing needs to be recorded during the run. The positions of a step
are in ``metrics.jsonl`` and in every warning about a step.

    for place, ids in locate(data, range(4096, 4100)):
        print(place, tokenizer.decode(ids))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.custom import MapData
from lmcore.data.store.store import TokenStore
from lmcore.data.stream import StreamDataset
from lmcore.errors import RequestError
from lmcore.humanize import amount, one_line


def locate(
    data: Any, positions: Sequence[int], cursors: Sequence[Cursor] = ()
) -> Iterator[tuple[str, Sequence[int] | None]]:
    """(where the block comes from, its T ids) for each position; ``None`` for items without ``input_ids``.

    Args:
        data: the training data of a run.
        cursors: cursors of its checkpoints, oldest first. A stream is read from the last one before the positions, or
            from its beginning.

    Raises:
        RequestError: positions cannot be looked up in this data.
    """
    if isinstance(data, StreamDataset):
        data, first = _resumed_before(data, min(positions), cursors)
        found = _streamed(data, positions, first)
        for position in positions:
            lane, block = position % data.lanes, position // data.lanes
            yield f"position {position}: block {block} of lane {lane}", found[position]
    elif isinstance(data, StoreBlocks):
        yield from _stored(data.resumed(cursors[-1]) if cursors else data, positions)
    elif isinstance(data, MapData):
        _, epochs, items = data.order.locate(np.array(positions))
        for position, epoch, item, value in zip(positions, epochs, items, data.read(np.array(positions))):
            ids = value.get("input_ids") if isinstance(value, dict) else None
            yield (
                f"position {position}: item {item}, epoch {epoch}",
                None if ids is None else np.asarray(ids).tolist(),
            )
    else:
        raise RequestError("an iterable dataset (data.factory) has no positions that can be looked up")


def _stored(data: StoreBlocks, positions: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    wanted = np.array(positions, dtype=np.int64)
    sources, epochs, blocks = (part.tolist() for part in data.order.locate(wanted))
    rows = data.read(wanted)
    for row, (position, source, epoch, block) in enumerate(zip(positions, sources, epochs, blocks)):
        store, first = data.stores[source], block * data.block_size
        last = first + data.block_size - 1
        documents = len(store.document_ends(first, last)) + 1
        place = (
            f"position {position}: source {store.name}, epoch {epoch}, block {block}, tokens {first}-{last}, "
            f"{amount(documents, 'document')}, {_files(store, first)}"
        )
        yield one_line(place), rows.ids[row, :-1].tolist()


def _resumed_before(
    data: StreamDataset, position: int, cursors: Sequence[Cursor]
) -> tuple[StreamDataset, int]:
    """A stream that is read from the last cursor before a position, or from its beginning; and the position there."""
    if not cursors:
        return data, 0
    # The lanes are those with which the run began; the options may say others (train.global_batch_blocks was changed).
    newest = cursors[-1]
    start = replace(newest, position=0, stream={"lanes": newest.stream.get("lanes", data.lanes)}, skips=())
    for cursor in cursors:
        if cursor.position <= position:  # the newest cursor has every phase, also one that was added later
            start = replace(cursor, phases=newest.phases)
    return data.resumed(start), start.position


def _streamed(data: StreamDataset, positions: Sequence[int], first: int) -> dict[int, list[int]]:
    """Position -> ids of its block, for a stream: each lane is read block by block up to the positions."""
    found = {}
    for lane in sorted({position % data.lanes for position in positions}):
        wanted = {position for position in positions if position % data.lanes == lane}
        for position in range(first + lane, max(wanted) + 1, data.lanes):
            ids = data.read(np.array([position])).ids[0, :-1].tolist()
            if position in wanted:
                found[position] = ids
    return found


def _files(store: TokenStore, token: int) -> str:
    """The files of the part that contains a token of the store."""
    for part in store.manifest.get("parts", []):
        if token < part["tokens"]:
            names = [name for name, _, _ in part["pieces"]]
            return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} files)"
        token -= part["tokens"]
    return "files of tokens"
