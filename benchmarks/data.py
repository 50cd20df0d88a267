"""Data: reading, resuming, tokenizing and shuffling, beside what others do, in one run.

    python benchmarks/data.py                  # about 6 minutes on 2 quiet cores
    python benchmarks/data.py --quick          # sizes for a test of the script itself

Corpus: the Python standard library's own source (11 MB); tokenizer: SentencePiece BPE 8k trained on it, new and
without a memory of words in each round. Rates are those of one process from the page cache, in tokens per second of
processor time (of the process, its threads and its children) and of the clock; every case is run in turn (A B B A ...).
On a shared machine only the first mean anything.

Optional: ``datasets`` and ``litdata``; where one is missing its row is left out, with a line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import sentencepiece
import torch
from torch.utils.data import DataLoader, IterableDataset

from lmcore.data import corpus
from lmcore.data.batches import Batches
from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.order import Order
from lmcore.data.store import build as tokens
from lmcore.data.store.store import Piece, TokenStore
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents as text
from lmcore.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from lmcore.data.tokenizer.training import train_tokenizer

BLOCK = 2048
ROOT = Path(__file__).resolve().parent.parent
MILLION = 1e6


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


def processor_seconds() -> float:
    """Of this process, its threads, and its children that have ended."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def rates(cases: Mapping[str, Callable[[], int]], rounds: int, warmup: int = 1) -> dict[str, dict[str, Any]]:
    """Each case returns how many tokens it has handled. {case: tokens per second of processor time and of the
    clock, with their spread, and the lists of them}."""
    clock: dict[str, list[float]] = {name: [] for name in cases}

    def run(name: str) -> float:
        start, used = time.perf_counter(), processor_seconds()
        done = cases[name]()
        clock[name].append(done / (time.perf_counter() - start))
        return done / (processor_seconds() - used)

    found = common.interleave({name: partial(run, name) for name in cases}, rounds=rounds, warmup=warmup)
    return {
        name: {
            "processor": common.spread(values),
            "clock": common.spread(clock[name][warmup:]),
            "values": values,
            "clock_values": clock[name][warmup:],
        }
        for name, values in found.items()
    }


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
    dataset = StoreBlocks([store], block_size=BLOCK, seed=1)
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

    def lit() -> int:
        """litdata's own chunks and loader, blocks of one token more, as its examples have it."""
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        data = StreamingDataset(str(chunks), item_loader=TokensLoader(block_size=BLOCK + 1), shuffle=True)
        loader = StreamingDataLoader(data, batch_size=16, num_workers=0)
        return sum(batch.shape[0] * BLOCK for batch in loader)

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

    cases: dict[str, Callable[[], int]] = {
        "rows (narrow, shuffled)": rows,
        "batches, thread": lambda: batches(0),
        "batches, 1 worker": lambda: batches(1),
        "torch DataLoader, map-style": plain,
    }
    if has("litdata"):
        chunks = folder / "litdata-reading"
        some = np.fromfile(path, dtype=np.uint16, count=min(n_tokens, 10**7))
        lit_build(chunks, partial(lit_ids, path), [(0, len(some) // 2), (len(some) // 2, len(some))], BLOCK)
        cases["litdata StreamingDataLoader"] = lit
    return rates(cases, rounds)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def lit_ids(path: Path, span: tuple[int, int]) -> Iterator[torch.Tensor]:
    """A run of tokens as litdata wants it."""
    yield torch.from_numpy(np.fromfile(path, dtype=np.uint16)[span[0] : span[1]].astype(np.int64))


def lit_encoded(model: str, texts: list[str]) -> Iterator[torch.Tensor]:
    """Texts as litdata's examples tokenize them: one tensor a document, with its end."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    for ids in processor.encode(texts, num_threads=1, return_type="numpy"):
        yield torch.from_numpy(np.append(ids, processor.eos_id()))


def lit_build(folder: Path, function: Callable[[Any], Any], inputs: list[Any], block: int) -> None:
    """litdata's ``optimize`` with one worker; its progress bars are kept away."""
    import litdata

    log = open(os.devnull, "w")  # noqa: SIM115 - for the call only
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        litdata.optimize(
            fn=function,
            inputs=inputs,
            output_dir=str(folder),
            num_workers=1,
            chunk_bytes="64MB",
            item_loader=litdata.TokensLoader(block_size=block + 1),
        )


def resuming(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the clock and of the processor from a store's description to the first batch, anywhere in the run."""
    cases = {}

    def first_batch(n_tokens: int, position: int) -> Callable[[], float]:
        store = sparse_store(folder / f"sparse-{n_tokens}.bin", n_tokens)

        def run() -> float:
            opened = pickle.loads(pickle.dumps(store))
            dataset = StoreBlocks([opened], block_size=BLOCK, seed=1)
            cursor = Cursor(fingerprint=dataset.fingerprint, seed=1, position=position)
            steps = iter(Batches(dataset, cursor=cursor, global_batch_blocks=64, micro_batch_blocks=16))
            next(steps)
            steps.close()
            return 0.0

        return run

    for n_tokens, name in ((10**9, "1e9"), (10**12, "1e12")):
        epoch = n_tokens // BLOCK
        places = {"start": 0, "middle": epoch // 2, "100 epochs on": 100 * epoch + 77}
        for place, position in places.items():
            with contextlib.suppress(OSError):  # a file system without room for a sparse file of 2 TB
                cases[f"{name} tokens, {place}"] = first_batch(n_tokens, position)
    order = Order(lengths=(10**12 // BLOCK,), seed=1)
    cases["1e12 tokens, order only"] = lambda: float(order.locate(np.arange(10**11, 10**11 + 64))[2][0])
    clock: dict[str, list[float]] = {name: [] for name in cases}

    def run(name: str) -> float:
        start, used = time.perf_counter(), time.process_time()
        cases[name]()
        clock[name].append(time.perf_counter() - start)
        return time.process_time() - used

    found = common.interleave({name: partial(run, name) for name in cases}, rounds=rounds)
    return {
        name: {"clock": statistics.median(clock[name][1:]), "processor": statistics.median(values)}
        for name, values in found.items()
    }


def tokenizing(source: text.Source, made: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """From text to training blocks in one process; the tokenizer alone is the ceiling."""
    texts = [d.text for part in text.parts(source) for d in text.read(source, part, bad=print)]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    other = folder / "transformers"  # the same vocabulary by way of the tokenizers library
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, other / name)
    few = texts[:: max(len(texts) // 30, 1)]
    number = 0

    def new() -> Tokenizer:
        return load_tokenizer(made)  # remembers no word

    def sentencepiece_alone() -> int:
        return sum(len(one) for one in sp.encode(texts, num_threads=1, return_type="numpy"))

    def ours_alone() -> int:
        return sum(len(one) for one in new().encode_batch(texts))

    def tokenizers_alone() -> int:
        encoder = load_tokenizer(other)
        return sum(len(one) for one in encoder.encode_batch(texts))

    def prepared(folder_of: Path) -> int:
        nonlocal number
        number += 1
        store = tokens.build_store(source, load_tokenizer(folder_of), store_dir=folder / f"stores-{number}")
        shutil.rmtree(folder / f"stores-{number}")
        return store.n_tokens

    def streamed() -> int:
        dataset = StreamDataset([source], new(), block_size=1024, lanes=16, seed=1)
        done, limit = 0, 2 * total
        for step in Batches(
            dataset, cursor=dataset.new_cursor(), global_batch_blocks=16, micro_batch_blocks=16
        ):
            done += step.label_count or 0
            if done >= limit:
                return done
        raise AssertionError("a stream has no end")

    def tutorial() -> int:
        dataset = Slicing(sp.encode, texts, 1024)
        return sum(
            batch["labels"].numel() for batch in DataLoader(dataset, batch_size=16, collate_fn=collate)
        )

    def lit() -> int:
        """As litdata works: chunks are written first, then read."""
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        nonlocal number
        number += 1
        built = folder / f"litdata-{number}"
        groups = [texts[at : at + 20] for at in range(0, len(texts), 20)]
        lit_build(built, partial(lit_encoded, str(made / "tokenizer.model")), groups, 1024)
        data = StreamingDataset(str(built), item_loader=TokensLoader(block_size=1025), shuffle=True)
        done = sum(b.shape[0] * 1024 for b in StreamingDataLoader(data, batch_size=16, num_workers=0))
        shutil.rmtree(built)
        return done

    total = sentencepiece_alone()
    cases: dict[str, Callable[[], int]] = {
        "SentencePiece alone (encode, a batch)": sentencepiece_alone,
        "Tokenizer.encode_batch": ours_alone,
        "prepare (token store)": lambda: prepared(made),
        "stream": streamed,
        "tokenizers library alone": tokenizers_alone,
        "prepare with the tokenizers library": lambda: prepared(other),
        "tutorial dataset in a DataLoader": tutorial,
    }
    if has("datasets"):
        cases["datasets streaming + grouping (run_clm)"] = lambda: grouped(few, sp, 1024)
    if has("litdata"):
        cases["litdata: optimize, then read"] = lit
    found = rates(cases, rounds, warmup=0)
    for name, one in found.items():
        alone = "tokenizers library alone" if "tokenizers library" in name else next(iter(cases))
        one["of the tokenizer"] = common.ratios(one["values"], found[alone]["values"])["median"]
    return found


def grouped(texts: list[str], encoder: Any, block: int) -> int:
    """Tokenize by ``map``, then concatenate and cut by ``map``, as transformers' run_clm does."""
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": one} for one in texts)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": encoder.encode(batch["text"])}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for one in batch["input_ids"] for token in one]
        length = len(joined) // block * block
        cut = [joined[i : i + block] for i in range(0, length, block)]
        return {"input_ids": cut, "labels": [list(one) for one in cut]}

    data = datasets.IterableDataset.from_generator(rows)
    data = data.map(encode, batched=True, remove_columns=["text"]).map(group, batched=True)
    loader = DataLoader(data.with_format("torch"), batch_size=16)
    return sum(batch["labels"].numel() for batch in loader)


def scaling(made: Path, folder: Path, copies: int, rounds: int) -> dict[str, Any]:
    """``prepare`` of a larger corpus (many copies of the same text, one file each) with one process and with two."""
    corpus = folder / "corpus"
    corpus.mkdir()
    [source] = text.resolve_sources(["stdlib"])
    documents = [d.text for part in text.parts(source) for d in text.read(source, part, bad=print)]
    content = "".join(json.dumps({"text": one}) + "\n" for one in documents)
    for number in range(copies):
        (corpus / f"{number}.jsonl").write_text(content)
    number = 0

    def build(processes: int) -> int:
        nonlocal number
        number += 1
        [many] = text.resolve_sources([str(corpus)])
        place = folder / f"scaling-{number}"
        store = tokens.build_store(many, load_tokenizer(made), store_dir=place, processes=processes)
        shutil.rmtree(place)
        return store.n_tokens

    found = rates({"1 process": lambda: build(1), "2 processes": lambda: build(2)}, rounds, warmup=0)
    two, one = found["2 processes"], found["1 process"]
    found["2 / 1"] = {
        key: common.ratios(two[kind], one[kind])["median"]
        for key, kind in (("clock", "clock_values"), ("processor", "values"))
    }
    return found


class Numbered:
    """A tokenizer whose ids tell which of 1,000 neighbouring parts of the corpus a document lies in."""

    vocab_size, eos_id, fingerprint = 1001, 1000, "numbered"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.full(15, int(one[:3]), dtype=np.int32) for one in texts]


def distinct(part_of: np.ndarray) -> float:
    """Of 1,000 neighbours in the order, how many of 1,000 parts of the corpus are seen; 632.3 if drawn at random."""
    windows = part_of[: len(part_of) // 1000 * 1000].reshape(-1, 1000)
    return statistics.mean(len(np.unique(one)) for one in windows)


def shuffling(folder: Path, quick: bool) -> dict[str, float]:
    """The distinct-parts statistic; the stream over 100,000 blocks, its window over all lanes together."""
    found = {}
    for shuffle in ("full", "blocks"):
        order = Order(lengths=(10**8,), seed=3, shuffle=shuffle)
        found[f"store, {shuffle}"] = distinct(order.locate(np.arange(40_000))[2] // 10**5)
    # 48 characters and an end: a document is a block of 16 tokens, a part of the corpus 100 neighbouring documents.
    path = folder / "numbered.txt"
    path.write_text("".join(f"{number // 100:03d}{number:045d}\n" for number in range(100_000)))
    [source] = text.resolve_sources([{"path": str(path), "unit": "line"}])
    for lanes, window in ((16, 1024), (64, 1024), (64, 16_384)):
        data = StreamDataset([source], Numbered(), block_size=16, lanes=lanes, seed=3, window_blocks=window)
        data = data.resumed(data.new_cursor())
        count = 2 if quick else 20
        blocks = np.concatenate(
            [data.read(np.arange(at, at + 64)).ids[:, 1] for at in range(0, 1000 * count, 64)]
        )
        found[f"stream, {lanes} lanes, window {window:,}"] = distinct(blocks)
    return found


def waiting(folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """The share of the time that a real training run waits for its data: ``data_wait`` of its own metrics."""
    out = {}
    for mode in ("store", "stream"):
        command = [
            *(sys.executable, str(ROOT / "train_lm.py"), "--config", str(ROOT / "recipes" / "demo.yaml")),
            *("--run_dir", str(folder / "runs" / mode), "--data.mode", mode),
            *("--data.store_dir", str(folder / "stores"), "--train.duration", f"{steps} steps"),
            *("--report.every", "10 steps", "--report.trackers", "[]", "--evaluate.prompts", "[]"),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = list((folder / "runs" / mode).rglob("metrics.jsonl"))
        if done.returncode or not files:
            print(f"the run in mode {mode} ended with code {done.returncode}: {done.stderr[-400:]}")
            continue
        records = [json.loads(line) for line in files[0].read_text().splitlines()]
        waits = [record["data_wait"] for record in records if record.get("kind") == "train"][1:]
        out[mode] = {"median": statistics.median(waits), "largest": max(waits), "intervals": len(waits)}
    return out


RESIDENT = """
import sys, resource
from pathlib import Path
import numpy as np, torch
from lmcore.data import corpus
from lmcore.data.batches import Batches
from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.store.store import Piece, TokenStore
def resident():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
n = int(sys.argv[2])
store = TokenStore(name="x", fingerprint="0" * 16, dtype="<u2", pieces=[Piece(path=sys.argv[1], n_tokens=n)])
before = resident()
data = StoreBlocks([store], block_size=2048, seed=1)
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
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, str(path), str(n_tokens)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    quick = options.quick
    torch.set_num_threads(1)
    for name in ("datasets", "litdata"):
        if not has(name):
            print(f"{name} is not installed: its row is left out")
    [source] = text.resolve_sources(["stdlib"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = folder / "tokenizer"
        sample = corpus.sample_texts([source], max_bytes=2_000_000, seed=1, bad=print)
        train_tokenizer(sample, vocab_size=8000, folder=made, seed=1)
        read = reading(folder, 10**7 if quick else 10**8, 1 if quick else 5)
        resumed = resuming(folder, 1 if quick else 5)
        tokenized = tokenizing(source, made, folder, 1 if quick else 3)
        scaled = scaling(made, folder, 2 if quick else 8, 1 if quick else 3)
        mixed = shuffling(folder, quick)
        added = memory(folder)
        waited = waiting(folder, 30 if quick else 60)
    header = ["Mtok/s of processor time", "10% to 90%", "Mtok/s of the clock"]

    def row(name: str, one: dict[str, Any], digits: int) -> tuple[str, ...]:
        values = one["processor"]
        low, high = (f"{values[key] / MILLION:,.{digits}f}" for key in ("p10", "p90"))
        middle = f"{values['median'] / MILLION:,.{digits}f}"
        return name, middle, f"{low} to {high}", f"{one['clock']['median'] / MILLION:,.{digits}f}"

    rows: list[Any] = [row(name, one, 1) for name, one in read.items()]
    tables = [common.table(rows, ["reading, blocks of 2,048", *header])]
    rows = [(*row(name, one, 3), f"{one['of the tokenizer']:.2f}") for name, one in tokenized.items()]
    tables.append(common.table(rows, ["text to blocks, one process", *header, "of the library alone"]))
    two = scaled.pop("2 / 1")
    rows = [row(name, one, 3) for name, one in scaled.items()]
    rows.append(("2 / 1", f"{two['processor']:.2f}", "", f"{two['clock']:.2f}"))
    tables.append(common.table(rows, ["prepare", *header]))
    rows = [(name, f"{one['clock']:.3f}", f"{one['processor']:.3f}") for name, one in resumed.items()]
    tables.append(common.table(rows, ["resume to the first batch", "seconds", "of processor time"]))
    rows = [(name, f"{value:.1f}", f"{value / 632.3:.3f}") for name, value in mixed.items()]
    tables.append(common.table(rows, ["shuffle", "distinct parts of 1,000", "of a true permutation"]))
    rows = [(name, f"{value:.1f}") for name, value in added.items()]
    tables.append(common.table(rows, ["store", "MiB of memory added by 100 steps"]))
    rows = [(name, f"{one['median']:.3%}", f"{one['largest']:.3%}") for name, one in waited.items()]
    tables.append(common.table(rows, ["training run (demo)", "data wait, median interval", "largest"]))
    result = {
        **{
            "reading": read,
            "tokenizing": tokenized,
            "scaling": {**scaled, "2 / 1": two},
            "resuming": resumed,
        },
        **{"shuffle": mixed, "memory": added, "data_wait": waited},
    }
    common.write("data", result, "\n\n".join(tables), options.out)


if __name__ == "__main__":
    main()
