"""What a bucket costs a step of training: uploads of checkpoints, and text and token stores behind a URL.

    python benchmarks/bucket.py saving       # checkpoints every 50 steps uploaded, against the same checkpoints without uploads
    python benchmarks/bucket.py reading      # a store and a text behind a URL, through the warm cache, against those of the disk

The store is a real S3 server (moto, as the tests have it) on the loopback interface. It is a Python program that takes far
more processor time than lmcore for a request, and a cloud's does not run on this machine: it has the other cores, and a
program that is measured has one core for everything that it does, its uploads included, and one thread of torch. So a
processor second of an upload is one that a step does not get. With one core in all the server is niced, and in the way.

``saving``: a turn is 50 steps with one save in its middle, so that its upload falls into the turn; after each turn the
manifest is looked for in the bucket; where it is late, that is counted, and it is waited for. Before ``reading``, the cache is
filled by one reading of the text, and its seconds are given.

Turns and launches as in speed.py: in turn, pair by pair, each program started anew in each launch, first and last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common  # first: it puts the root on the path
from contestants import DEFAULTS, Contestant, alternate, prepare_corpus

ROOT = Path(__file__).resolve().parent.parent
SAVE_STEPS = 50
FILES = 12
"""Files that the text is divided into."""
Case = tuple[str, str, dict[str, Any], dict[str, str]]


def serve(core: int | None) -> None:
    """The S3 server, until its input ends. Prints its addresses and, for each line of input, what it holds and was asked."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    else:
        os.nice(10)
    from tests.support.s3_server import serving

    with serving() as server:
        print(json.dumps([f"http://127.0.0.1:{server.moto_port}", server.url]), flush=True)
        for _ in sys.stdin:
            manifests = [key for key in server.objects() if key.endswith("manifest.json")]
            print(json.dumps([manifests, dict(server.requests)]), flush=True)


class Bucket:
    """The server in a process of its own.

    Attributes:
        url: without the proxy of the tests, which takes time of the server's core.
        counting_url: with it.
    """

    def __init__(self, core: int | None) -> None:
        command = [sys.executable, __file__, "serve", *([] if core is None else ["--core", str(core)])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.url, self.counting_url = self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self) -> Any:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._line()

    def manifests(self) -> list[str]:
        """Keys of all manifests in the bucket."""
        keys: list[str] = self._ask()[0]
        return keys

    def requests(self) -> Counter[str]:
        """Requests so far by method; LIST is a GET of a listing."""
        return Counter(self._ask()[1])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def bucket(cores: Sequence[int], cache: Path, *, counting: bool) -> Iterator[Bucket]:
    """A running server; the environment leads to it, with the driver's own time-outs."""
    from tests.support.s3_server import environment

    server = Bucket(cores[1] if len(cores) > 1 else None)
    try:
        found = environment(server.counting_url if counting else server.url)
        found.pop("FSSPEC_S3")
        os.environ.update(found, LMCORE_CACHE=str(cache))
        yield server
    finally:
        server.close()


def write_text(folder: Path) -> int:
    """The demo's corpus as JSON Lines in :data:`FILES` files; its bytes."""
    from lmcore.data.text import documents as text

    [source] = text.resolve_sources(["stdlib"])
    lines = [
        json.dumps({"text": document.text}) + "\n"
        for part in text.parts(source)
        for document in text.read(source, part, bad=print)
    ]
    folder.mkdir(parents=True)
    for number in range(FILES):
        (folder / f"{number:02}.jsonl").write_text("".join(lines[number::FILES]))
    return sum(path.stat().st_size for path in folder.iterdir())


# ---- the comparisons


def saving(server: Bucket, settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """With uploads, and without."""
    late: list[str] = []
    uploads = {"options": {"run_dir": "s3://bucket/saving-{launch}", "local_dir": "run"}}
    cases: list[Case] = [
        ("uploads every 50 steps", "train_lm", {"save_every": f"{SAVE_STEPS} steps", **uploads}, {}),
        ("the same without uploads", "train_lm", {"save_every": f"{SAVE_STEPS} steps"}, {}),
    ]
    uploaded = Counter[int]()

    def look(label: str, launch: int) -> None:
        if label != cases[0][0]:
            return
        uploaded[launch] += 1
        name = f"saving-{launch}/checkpoints/step-{uploaded[launch] * SAVE_STEPS:08d}/manifest.json"
        if name in server.manifests():
            return
        late.append(name)
        until = time.monotonic() + 60
        while name not in server.manifests():  # so that it is not in the way of the other program
            assert time.monotonic() < until, f"{name} was not uploaded"
            time.sleep(0.1)

    turns = alternate(
        cases,
        settings,
        launches=sizes["launches"],
        rounds=sizes["saves"],
        steps=SAVE_STEPS,
        warmup=SAVE_STEPS // 2,
        after_turn=look,
    )
    return {
        "uploads every 50 steps / none": pair(turns, SAVE_STEPS * tokens_of(settings)),
        "uploaded": uploaded.total(),
        "late": len(late),
    }


def reading(server: Bucket, settings: dict[str, Any], sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """From a URL, and from the disk: a token store and a text that are trained on, and the reading of the text alone."""
    from lmcore.storage import Store

    n_bytes = write_text(folder / "text")
    store = Store("s3://bucket/text")
    for path in (folder / "text").iterdir():
        store.upload(path, path.name)
    here, there = str(folder / "text"), "s3://bucket/text"

    def options(text: str, stores: str, mode: str) -> dict[str, Any]:
        return {"options": {"data.train": text, "data.store_dir": stores, "data.mode": mode}}

    kinds = {
        "training from a store": [
            ("train_lm", options(there, "s3://bucket/stores", "store")),
            ("train_lm", options(here, str(folder / "stores"), "store")),
        ],
        "training from text": [
            ("train_lm", options(there, str(folder / "unused"), "stream")),
            ("train_lm", options(here, str(folder / "unused"), "stream")),
        ],
        "reading and tokenizing": [("blocks", {"text": there}), ("blocks", {"text": here})],
        "reading": [("documents", {"text": there}), ("documents", {"text": here})],
    }
    found: dict[str, Any] = {"megabytes": n_bytes / 1e6, "first_seconds": {}}
    first = {}
    for label, text in (("bucket", there), ("disk", here)):
        alone = Contestant("documents", settings | {"text": text})
        first[label] = alone.run(1)["seconds"]
        alone.close()
    found["first_seconds"] = first
    for what, sides in kinds.items():
        before = server.requests()
        cases: list[Case] = [
            (label, name, own, {}) for label, (name, own) in zip(("bucket", "disk"), sides, strict=True)
        ]
        steps = {"documents": 1, "blocks": sizes["blocks_steps"]}.get(sides[0][0], sizes["steps"])
        turns = alternate(
            cases,
            settings,
            launches=sizes["launches"],
            rounds=sizes["rounds"],
            steps=steps,
            warmup=steps if sides[0][0] != "train_lm" else sizes["warmup"],
        )
        handled = n_bytes if sides[0][0] == "documents" else steps * tokens_of(settings)
        found[what] = pair(turns, handled) | {"requests": server.requests() - before}
    return found


def tokens_of(settings: dict[str, Any]) -> int:
    """Tokens of one step."""
    return int(settings["blocks"] * settings["tokens"])


def pair(turns: dict[str, list[dict[str, float]]], handled: int) -> dict[str, Any]:
    """Ratios of the first program's speed to that of the second, turn by turn."""
    first, second = turns.values()
    found: dict[str, Any] = {"turns": turns}
    for key, name in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        found[name] = common.ratios([turn[key] for turn in second], [turn[key] for turn in first])
    sides = (first, second)
    found["rates"] = [handled / statistics.median(turn["seconds"] for turn in side) for side in sides]
    found["cpu_seconds"] = [statistics.median(turn["cpu_seconds"] for turn in side) for side in sides]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=["saving", "reading", "serve"])
    parser.add_argument("--model", default=DEFAULTS["model"])
    parser.add_argument("--saves", type=int, default=10, help="turns of 50 steps (saving)")
    parser.add_argument("--rounds", type=int, default=20, help="turns (reading)")
    parser.add_argument("--steps", type=int, default=5, help="steps of one turn (reading)")
    parser.add_argument("--launches", type=int, default=2, help="how often every program is started anew")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the script itself")
    parser.add_argument("--core", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.comparison == "serve":
        serve(options.core)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    settings = DEFAULTS | {"model": options.model, "core": cores[0]}
    sizes = {key: getattr(options, key) for key in ("saves", "rounds", "steps", "launches")}
    sizes |= {"warmup": 3, "blocks_steps": 500}
    if options.tiny:
        settings |= {"model": "tiny", "blocks": 2, "tokens": 64}
        sizes = {"saves": 2, "rounds": 2, "steps": 2, "launches": 1, "warmup": 1, "blocks_steps": 2}
    prepare_corpus(settings["vocab"])
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as name,
        bucket(cores, Path(name) / "cache", counting=options.comparison == "reading") as server,
    ):
        if options.comparison == "saving":
            found = saving(server, settings, sizes)
        else:
            found = reading(server, settings, sizes, Path(name))
    write(options, settings, sizes, found, time.monotonic() - begin)


def write(
    options: argparse.Namespace,
    settings: dict[str, Any],
    sizes: dict[str, int],
    found: dict[str, Any],
    seconds: float,
) -> None:
    rows = []
    for what, one in found.items():
        if isinstance(one, dict) and "ratio" in one:
            unit = "MB/s" if what == "reading" else "tokens/s"
            scale = 1e6 if what == "reading" else 1
            rates = " / ".join(
                f"{rate / scale:,.1f}" if scale > 1 else f"{rate:,.0f}" for rate in one["rates"]
            )
            ratio = one["ratio"]
            cpu = " / ".join(f"{value:.2f}" for value in one["cpu_seconds"])
            by_the_clock = f"{ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})"
            rows.append((what, f"{rates} {unit}", by_the_clock, f"{one['cpu_ratio']['median']:.3f}", cpu))
    setting = (
        f"{options.comparison}: GPT-2 {settings['model']}, {settings['blocks']} x {settings['tokens']} tokens, "
        f"{settings['precision']}, one thread on one core; {sizes}; {seconds:.0f} s"
    )
    extra = ""
    if options.comparison == "saving":
        extra = f"\n\n{found['late']} of {found['uploaded']} uploads were not done when their turn was."
    else:
        first = found["first_seconds"]
        extra = (
            f"\n\nFirst reading of the {found['megabytes']:.1f} MB, with an empty cache: {first['bucket']:.2f} s from the "
            f"bucket, {first['disk']:.2f} s from the disk. Requests of all turns with the warm cache: reading and tokenizing "
            f"{dict(found['reading and tokenizing']['requests'])}, reading {dict(found['reading']['requests'])}."
        )
    header = ["bucket / disk", "speed", "ratio by the clock", "by processor time", "processor seconds a turn"]
    text = setting + "\n\n" + common.table(rows, header) + extra
    name = f"bucket-{options.comparison}" + ("-tiny" if options.tiny else "")
    common.write(name, {"setting": setting, "found": found}, text, options.out)


if __name__ == "__main__":
    main()
