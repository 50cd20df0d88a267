"""What did the model see? Any position or step, decoded.

Comes in: the training blocks and positions (a step's are in ``metrics.jsonl`` and in every warning about a
step). Goes out: for each block its source, epoch, place in the token store, the files it came from, and its
text. What always holds: it reads what training reads, by the same code; nothing is remembered from the run.

    for one in show(dataset, range(4096, 4100), tokenizer.decode):
        print(one)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmcore.blocks import BlockDataset
from lmcore.token_store import TokenStore


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

    def __str__(self) -> str:
        return (
            f"position {self.position}: source {self.source}, epoch {self.epoch}, block {self.block}, tokens "
            f"{self.first_token}-{self.first_token + len(self.ids) - 1}, {self.documents} documents, {self.files}\n"
            f"{self.text}"
        )


def show(
    dataset: BlockDataset, positions: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> list[Shown]:
    """The blocks at these positions.

    Args:
        dataset: blocks over stores, under the cursor's mixtures (:meth:`lmcore.blocks.BlockDataset.resumed`).
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
