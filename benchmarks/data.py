"""Data: reading, resuming and tokenizing, beside what others do, in one run.

    python benchmarks/data.py                  # about 3 minutes
    python benchmarks/data.py --quick          # sizes for a test of the script itself

Corpus: the Python standard library's own source, repeated; tokenizer: SentencePiece BPE 8k trained on it. Rates are
tokens per second of one process from the page cache; every pair is run in turn (A B B A ...).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lmcore import text, tokenizer, tokens
from lmcore.batches import Batches
from lmcore.blocks import BlockDataset
from lmcore.order import Cursor, Order
from lmcore.stream import StreamDataset
from lmcore.token_store import Piece, TokenStore

BLOCK = 2048


class Slicing(IterableDataset):
    """The dataset of the tutorials: the list of ids is cut anew for each block."""

    def __init__(self, encode: Callable[[str], list[int]], texts: list[str], block: int) -> None:
        self.encode, self.texts, self.block = encode, texts, block

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        ids: list[int] = []
        for one in self.texts:
            ids.extend(self.encode(one))
            while len(ids) >= self.block + 1:
                yield {"input_ids": ids[: self.block], "labels": ids[1 : self.block + 1]}
                ids = ids[self.block :]


def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([item[key] for item in items]) for key in items[0]}


def timed(work: Callable[[], int]) -> Callable[[], float]:
    """Tokens per second of what returns a number of tokens."""

    def run() -> float:
        start = time.perf_counter()
        done = work()
        return done / (time.perf_counter() - start)

    return run


def sparse_store(path: Path, n_tokens: int) -> TokenStore:
    """A store that takes no room: holes read as zeros."""
    with open(path, "wb") as file:
        file.truncate(2 * n_tokens)
    piece = Piece(path=str(path), n_tokens=n_tokens)
    return TokenStore(name="sparse", fingerprint="0" * 16, dtype="<u2", pieces=[piece])


def reading(folder: Path, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Blocks in a full shuffle from the page cache: raw rows, and micro-batches as the model gets them."""
    path = folder / "tokens.bin"
    np.random.default_rng(1).integers(0, 2**15, n_tokens, dtype=np.uint16).tofile(path)
    store = TokenStore(
        name="x", fingerprint="0" * 16, dtype="<u2", pieces=[Piece(path=str(path), n_tokens=n_tokens)]
    )
    dataset = BlockDataset.from_stores([store], block_size=BLOCK, seed=1)
    loader_blocks = 256
    cursor = Cursor(fingerprint=dataset.fingerprint, seed=1)

    def rows() -> int:
        for start in range(0, dataset.epoch_blocks - 64, 64):
            dataset.read(np.arange(start, start + 64))
        return (dataset.epoch_blocks - 64) // 64 * 64 * BLOCK

    def batches(workers: int) -> int:
        made = Batches(
            dataset,
            cursor=cursor,
            global_batch_blocks=64,
            micro_batch_blocks=16,
            end_position=dataset.epoch_blocks // 64 * 64,
            workers=workers,
        )
        return sum(step.label_count or 0 for step in made)

    def plain() -> int:
        """A map-style dataset in torch's own loader, as most people write it."""

        class Memory(torch.utils.data.Dataset):
            def __init__(self) -> None:
                self.ids = np.memmap(path, dtype=np.uint16, mode="r")

            def __len__(self) -> int:
                return loader_blocks

            def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                run = torch.from_numpy(self.ids[index * BLOCK : (index + 1) * BLOCK + 1].astype(np.int64))
                return {"input_ids": run[:-1], "labels": run[1:]}

        loader = DataLoader(Memory(), batch_size=16, shuffle=True)
        return sum(batch["labels"].numel() for batch in loader)

    found = common.interleave(
        {
            "raw rows": timed(rows),
            "batches, thread": timed(lambda: batches(0)),
            "batches, 1 worker": timed(lambda: batches(1)),
            "torch DataLoader, map-style": timed(plain),
        },
        rounds=rounds,
    )
    return {name: common.spread(values) for name, values in found.items()}


def resuming(folder: Path) -> dict[str, float]:
    """Seconds from nothing to the first batch, anywhere in the run."""
    store = sparse_store(folder / "sparse.bin", 10**9)
    out = {}
    for name, position in (("start", 0), ("middle", 240_000), ("100 epochs on", 100 * 488_281 + 77)):
        start = time.perf_counter()
        dataset = BlockDataset.from_stores([store], block_size=BLOCK, seed=1)
        cursor = Cursor(fingerprint=dataset.fingerprint, seed=1, position=position)
        steps = iter(Batches(dataset, cursor=cursor, global_batch_blocks=64, micro_batch_blocks=16))
        next(steps)
        out[f"1e9 tokens, {name}"] = time.perf_counter() - start
        steps.close()  # type: ignore[attr-defined]  # a generator
    start = time.perf_counter()
    Order(lengths=(10**12 // BLOCK,), seed=1).locate(np.arange(10**11, 10**11 + 64))
    out["1e12 tokens, order only"] = time.perf_counter() - start
    return out


def tokenizing(
    source: text.Source, encoder: tokenizer.Tokenizer, folder: Path, rounds: int
) -> dict[str, Any]:
    """From text to training blocks in one process; the tokenizer alone is the ceiling."""
    texts = [d.text for part in text.parts(source) for d in text.read(source, part, bad=print)]
    total = sum(len(one) + 1 for one in encoder.encode_batch(texts))
    limit = total * 3 // 4
    number = 0

    def alone() -> int:
        return sum(len(one) for one in encoder.encode_batch(texts))

    def prepared() -> int:
        nonlocal number
        number += 1
        return tokens.prepare(source, encoder, store_dir=folder / f"stores-{number}").n_tokens

    def streamed() -> int:
        dataset = StreamDataset([source], encoder, block_size=1024, lanes=16, seed=1)
        done = 0
        for step in Batches(
            dataset, cursor=dataset.new_cursor(), global_batch_blocks=16, micro_batch_blocks=16
        ):
            done += step.label_count or 0
            if done >= limit:
                return done
        raise AssertionError("a stream has no end")

    def tutorial() -> int:
        dataset = Slicing(encoder.encode, texts, 1024)
        return sum(
            batch["labels"].numel() for batch in DataLoader(dataset, batch_size=16, collate_fn=collate)
        )

    cases = {
        "tokenizer alone": timed(alone),
        "prepare (token store)": timed(prepared),
        "stream": timed(streamed),
        "tutorial dataset in a DataLoader": timed(tutorial),
    }
    try:
        import datasets  # optional: without it there is one row less
    except ImportError:
        pass
    else:
        cases["datasets streaming + grouping (run_clm)"] = timed(
            lambda: grouped(datasets, texts, encoder, 1024)
        )
    found = common.interleave(cases, rounds=rounds, warmup=0)
    ceiling = found["tokenizer alone"]
    return {
        name: {**common.spread(values), "of the tokenizer": common.ratios(values, ceiling)["median"]}
        for name, values in found.items()
    }


def grouped(datasets: Any, texts: list[str], encoder: tokenizer.Tokenizer, block: int) -> int:
    """Tokenize by ``map``, then concatenate and cut by ``map``, as transformers' run_clm does."""

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": one} for one in texts)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [one.tolist() for one in encoder.encode_batch(batch["text"])]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for one in batch["input_ids"] for token in one]
        length = len(joined) // block * block
        cut = [joined[i : i + block] for i in range(0, length, block)]
        return {"input_ids": cut, "labels": [list(one) for one in cut]}

    data = datasets.IterableDataset.from_generator(rows)
    data = data.map(encode, batched=True, remove_columns=["text"]).map(group, batched=True)
    loader = DataLoader(data.with_format("torch"), batch_size=16)
    return sum(batch["labels"].numel() for batch in loader)


RESIDENT = """
import sys, resource
from pathlib import Path
import numpy as np, torch
from lmcore.batches import Batches
from lmcore.blocks import BlockDataset
from lmcore.order import Cursor
from lmcore.token_store import Piece, TokenStore
def resident():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
n = int(sys.argv[2])
store = TokenStore(name="x", fingerprint="0" * 16, dtype="<u2", pieces=[Piece(path=sys.argv[1], n_tokens=n)])
before = resident()
data = BlockDataset.from_stores([store], block_size=2048, seed=1)
steps = iter(Batches(data, cursor=Cursor(fingerprint="", seed=1), global_batch_blocks=16, micro_batch_blocks=16))
for _ in range(100):
    next(steps)
print(resident() - before)
"""


def memory(folder: Path) -> dict[str, float]:
    """MiB of anonymous memory that 100 steps add to a process, for stores of 10 MB and of 10 GB."""
    out = {}
    for name, n_tokens in (("10 MB", 5 * 10**6), ("10 GB", 5 * 10**9)):
        path = folder / f"sparse-{n_tokens}.bin"
        sparse_store(path, n_tokens)
        root = str(Path(__file__).resolve().parent.parent)
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, str(path), str(n_tokens)],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        )
        out[name] = float(done.stdout)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if options.quick else 5
    [source] = text.resolve(["stdlib"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = tokenizer.sample_texts([source], max_bytes=2_000_000, seed=1, bad=print)
        encoder = tokenizer.train(sample, vocab_size=8000, folder=folder / "tokenizer", seed=1)
        read = reading(folder, 10**7 if options.quick else 10**8, rounds)
        resumed = resuming(folder)
        tokenized = tokenizing(source, encoder, folder, 1 if options.quick else 3)
        added = memory(folder)
    million = 1e6
    rows = [
        (name, f"{one['median'] / million:,.1f}", f"{one['p10'] / million:,.1f}-{one['p90'] / million:,.1f}")
        for name, one in read.items()
    ]
    report = common.table(rows, ["reading, blocks of 2,048", "Mtok/s", "p10-p90"])
    rows = [
        (name, f"{one['median'] / million:,.3f}", f"{one['of the tokenizer']:.2f}")
        for name, one in tokenized.items()
    ]
    report += "\n\n" + common.table(rows, ["text to blocks, one process", "Mtok/s", "of the tokenizer alone"])
    seconds = [(name, f"{value:.3f}") for name, value in resumed.items()]
    report += "\n\n" + common.table(seconds, ["resume to the first batch", "seconds"])
    mebibytes = [(name, f"{value:.1f}") for name, value in added.items()]
    report += "\n\n" + common.table(mebibytes, ["store", "MiB of memory added by 100 steps"])
    result = {"reading": read, "tokenizing": tokenized, "resuming": resumed, "memory": added}
    common.write("data", result, report, options.out)


if __name__ == "__main__":
    main()
