"""Hostile inputs: data files, names, links, archives, configurations, and the folders of a stranger.

Each case writes its input and runs one command in a fork. The answer must come within a minute and be a result (0) or a
documented refusal (2, 70) in plain words: no traceback, no control character on the terminal, no file ``EXECUTED``, and
not one byte different in the folders outside of the one that was given.
"""

# ruff: noqa: E501  # a table of cases, one a line

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.faults.kinds import Trial

LIMIT_SECONDS = 300.0
"""On a busy machine; most answers take a second."""
ALLOWED = (0, 2, 70)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@dataclass(frozen=True, kw_only=True)
class Case:
    """``make`` writes the input below a folder and returns a command; its first word is ``train`` or one of lmcore's."""

    name: str
    make: Callable[[Path, Path], Sequence[str]]  # (folder of the trial, place of the campaign)
    codes: tuple[int, ...] = ALLOWED


CASES: list[Case] = []


def case(name: str, make: Callable[[Path, Path], Sequence[str]], codes: tuple[int, ...] = ALLOWED) -> None:
    CASES.append(Case(name=name, make=make, codes=codes))


# ---- data files: every suffix with hostile contents --------------------------------------------------------

TEXT = ("the lion runs under the river quickly 42 def \n" * 40).encode()


def zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def npy(header: str, data: bytes = b"\0" * 64) -> bytes:
    head = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def parquet(rows: list[Any]) -> bytes:
    import pyarrow as arrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table({"text": rows}), buffer)
    return buffer.getvalue()


def a_tar(names: Sequence[str], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(TEXT)
            archive.addfile(info, io.BytesIO(TEXT))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def a_zip(names: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return buffer.getvalue()


def the_bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb(str(folder / "EXECUTED")))


SUFFIXES = (
    ".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt.gz", ".jsonl.gz", ".txt.zst", ".txt.xz",
    ".txt.bz2", ".npy", ".bin", ".md", ".html",
)  # fmt: skip
CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda folder: b"",
    "zeros": lambda folder: bytes(5000),
    "random bytes": lambda folder: hashlib.sha512(b"x").digest() * 60,
    "a pickle": the_bomb,
    "deep JSON": lambda folder: b"[" * 200_000,
    "escape codes": lambda folder: b"\x1b]0;owned\x07\x1b[2J\x9b31m" + TEXT,
}
EXTRA: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "one line of 3 MB": ("a.txt", lambda folder: b"word " * 600_000),
    "lone surrogates in JSON": ("a.jsonl", lambda folder: b'{"text": "\\ud800 x \\udfff"}\n' * 30),
    "numbers that are none": ("a.jsonl", lambda folder: b'{"text": NaN}\n{"text": 1e999}\n{"text": null}\n'),
    "text under many types": (
        "a.jsonl",
        lambda folder: b'{"text": [1]}\n{"text": {"a": 1}}\n[]\n3\n"x"\n{}\n',
    ),
    "keys twice": ("a.jsonl", lambda folder: b'{"text": "a", "text": "b"}\n' * 100),
    "a number of a million digits": ("a.jsonl", lambda folder: b'{"text": ' + b"9" * 10**6 + b"}\n"),
    "UTF-16": ("a.txt", lambda folder: TEXT.decode().encode("utf-16")),
    "UTF-16 without a mark": ("a.txt", lambda folder: TEXT.decode().encode("utf-16-le")),
    "Shift-JIS": ("a.txt", lambda folder: ("日本語のテスト\n" * 200).encode("shift-jis")),
    "old Mac line ends": ("a.txt", lambda folder: TEXT.replace(b"\n", b"\r")),
    "line ends of Unicode": ("a.txt", lambda folder: "a\u2028b\u2029c\x85d\x0be\x0cf\n".encode() * 300),
    "a quote that never ends": ("a.csv", lambda folder: b'text\n"' + TEXT),
    "a CSV of a million columns": ("a.csv", lambda folder: b"text," * 10**6 + b"\n1\n"),
    "a CSV without its column": ("a.csv", lambda folder: b"a,b\n1,2\n" * 50),
    "gzip: cut": ("a.txt.gz", lambda folder: gzip.compress(TEXT * 50)[:-20]),
    "gzip: wrong sum": ("a.txt.gz", lambda folder: gzip.compress(TEXT * 50)[:-8] + bytes(8)),
    "gzip: trailing garbage": ("a.txt.gz", lambda folder: gzip.compress(TEXT * 20) + b"garbage" * 9),
    "gzip: 60 MB of zeros": ("a.txt.gz", lambda folder: gzip.compress(bytes(60 << 20), 1)),
    "zstd: cut": ("a.txt.zst", lambda folder: zst(TEXT * 50)[:-9]),
    "zstd: a window of terabytes": ("a.txt.zst", lambda folder: b"\x28\xb5\x2f\xfd\x00\xff" + bytes(90)),
    "xz: a dictionary of 1.5 GiB": (
        "a.txt.xz",
        lambda folder: lzma.compress(TEXT, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])[:-30],
    ),
    "bzip2: cut": ("a.txt.bz2", lambda folder: bz2.compress(TEXT * 50)[:-9]),
    "parquet of nulls": ("a.parquet", lambda folder: parquet([None] * 50)),
    "parquet of bytes": ("a.parquet", lambda folder: parquet([b"\xff\xfe"] * 50)),
    "parquet of numbers": ("a.parquet", lambda folder: parquet([1, 2, 3])),
    "parquet with a footer of 2 GiB": (
        "a.parquet",
        lambda folder: b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1",
    ),
    "parquet: cut": ("a.parquet", lambda folder: parquet(["lion"] * 500)[:-30]),
    "npy of objects": (
        "a.npy",
        lambda folder: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", the_bomb(folder)),
    ),
    "npy of -1 tokens": (
        "a.npy",
        lambda folder: npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }"),
    ),
    "npy of terabytes": (
        "a.npy",
        lambda folder: npy("{'descr': '<u2', 'fortran_order': False, 'shape': (10**12,), }"),
    ),
    "npy with code for a header": (
        "a.npy",
        lambda folder: npy(f"__import__('os').system('touch {folder}/EXECUTED')"),
    ),
    "llm.c of -1 tokens": (
        "a.bin",
        lambda folder: struct.pack("<256i", 20240520, 1, -1, *[0] * 253) + bytes(64),
    ),
    "bin of an odd length": ("a.bin", lambda folder: b"\1\2\3"),
    "bin of ids beyond the vocabulary": ("a.bin", lambda folder: b"\xff\xff" * 5000),
    "a tar with names that lead out": (
        "a.tar",
        lambda folder: a_tar(["../../out.txt", str(folder / "EXECUTED")]),
    ),
    "a tar.gz": ("a.tar.gz", lambda folder: gzip.compress(a_tar(["../x.txt"]))),
    "a zip with names that lead out": ("a.zip", lambda folder: a_zip(["../../out.txt", "/etc/x"])),
    "a zip under the name of text": ("a.txt", lambda folder: a_zip(["a.txt"])),
    "a 7z": ("a.7z", lambda folder: b"7z\xbc\xaf\x27\x1c" + bytes(200)),
    "a rar": ("a.rar", lambda folder: b"Rar!\x1a\x07\x00" + bytes(200)),
    "a PDF": ("a.pdf", lambda folder: b"%PDF-1.7\n" + bytes(range(256)) * 9),
    "a database": ("a.db", lambda folder: b"SQLite format 3\x00" + bytes(4000)),
    "a program": ("a.txt", lambda folder: Path(sys.executable).read_bytes()[:40_000]),
}


def data_case(
    file: str, content: Callable[[Path], bytes], command: str
) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        path = folder / "work" / file
        path.write_bytes(content(folder))
        return data_command(command, str(path), place, folder)

    return make


def data_command(command: str, path: str, place: Path, folder: Path) -> list[str]:
    if command == "inspect":
        return ["inspect", "--data.train", path, "--tokenizer.path", str(place / "tokenizer")]
    return [command, *tiny(place, folder, path)]


def tiny(place: Path, folder: Path, path: str, steps: int = 2) -> list[str]:
    """A run of two steps on that data."""
    words = runs.base_arguments(place, steps=steps, every=steps)
    for name, value in (("--data.train", path), ("--data.store_dir", str(folder / "work" / "stores"))):
        words[words.index(name) + 1] = value
    return [
        *words,
        "--data.processes",
        "1",
        "--evaluate.every",
        "never",
        "--run_dir",
        str(folder / "work" / "run"),
    ]


for suffix in SUFFIXES:
    for content_name, content in CONTENTS.items():
        command = "inspect" if (len(CASES) % 2) else "train"
        case(f"{content_name} in a{suffix}: {command}", data_case(f"a{suffix}", content, command))
for extra_name, (file, content) in EXTRA.items():
    for command in ("inspect", "train"):
        case(f"{extra_name}: {command}", data_case(file, content, command))

# ---- names, links ------------------------------------------------------------------------------------------

NAMES = [
    "a\nb.txt", "\x1b]0;owned\x07.txt", "-rf.txt", "--data.train.txt", "$(touch EXECUTED).txt", "`touch EXECUTED`.txt",
    "a;touch EXECUTED;.txt", "\udcff\udcfe.txt", "x" * 251 + ".txt", "*[?]{a,b}.txt", "\u202egpj.txt", "a'b\"c.txt",
    " .txt", "a\\b.txt", "costs $5_{ to $6_.txt", "[bold red]x[bold].txt", "%s%n%d.txt",
]  # fmt: skip


def name_case(name: str, command: str, whole: bool) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        inside = folder / "work" / "texts"
        inside.mkdir()
        (inside / name).write_bytes(TEXT)
        path = str(inside) if whole else str(inside / name)
        return data_command(command, path, place, folder)

    return make


for number, name in enumerate(NAMES):
    case(f"the name {name[:40]!a}: inspect its folder", name_case(name, "inspect", True))
    case(f"the name {name[:40]!a}: train", name_case(name, "train", number % 2 == 0))


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


LINKS: dict[str, Callable[[Path], object]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/random": lambda path: path.symlink_to("/dev/random"),
    "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "a link to the folder above": lambda path: path.symlink_to(".."),
    "a link to /proc": lambda path: path.symlink_to("/proc"),
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": a_socket,
    "a folder with the name of a file": lambda path: path.mkdir(),
}


def link_case(
    put: Callable[[Path], object], command: str, alone: bool
) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        inside = folder / "work" / "texts"
        inside.mkdir()
        put(inside / "hostile.txt")
        if not alone:
            (inside / "good.txt").write_bytes(TEXT)
        path = str(inside / "hostile.txt") if alone else f"{inside}/**/*.txt"
        return data_command(command, path, place, folder)

    return make


for link_name, put in LINKS.items():
    case(f"{link_name}: inspect", link_case(put, "inspect", True))
    case(f"{link_name} beside good text: train", link_case(put, "train", False))

# ---- configurations ----------------------------------------------------------------------------------------

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)
CONFIGS: dict[str, bytes] = {
    "aliases of aliases": ALIASES.encode(),
    "deep": b"[" * 5000,
    "deep mappings": b"{a: " * 3000,
    "binary": bytes(range(256)),
    "zeros": bytes(100),
    "a list": b"- a\n- b\n",
    "a number": b"3\n",
    "nothing": b"",
    "UTF-16": "run_dir: x\n".encode("utf-16"),
    "a tag that runs code": b"!!python/object/apply:os.system ['touch EXECUTED']\n",
    "a tag below": b"data: {train: !!python/object/new:os.system ['touch EXECUTED']}\n",
    "a factory of the system": b"model: {factory: 'os:system', config: {command: 'touch EXECUTED'}}\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "keys twice": b"seed: 1\nseed: 2\n",
    "unknown keys": b"zzz: 1\ndata: {zzz: 2}\n",
    "a key that is a list": b"? [a, b]\n: 1\n",
    "escape codes": b'"\\e]0;owned\\a": 1\n',
    "an integer of 5,000 digits": b"seed: " + b"9" * 5000 + b"\n",
    "sizes without end": b"model: {type: gpt2, config: {n_layer: 1000000000, n_embd: 1000000000, n_head: 1}}\n",
    "a context without end": b"data: {block_size: 1000000000000}\n",
    "a batch without end": b"train: {global_batch_blocks: 1000000000000, micro_batch_blocks: 1}\n",
    "a run folder that leads out": b"run_dir: ../../../../../proc/x\n",
    "a source that leads out": b"data: {train: [{path: '/etc/hostname', name: '../../escaped'}]}\n",
    "null everywhere": b"data: null\nmodel: null\noptim: null\ntrain: null\ncheckpoint: null\nreport: null\n",
    "text everywhere": b"data: x\nmodel: x\noptim: x\ntrain: x\n",
    "numbers that are none": b"optim: {lr: .nan, weight_decay: .inf, eps: -1}\n",
}


def config_case(content: bytes) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        (folder / "work" / "c.yaml").write_bytes(content)
        (folder / "work" / "a.txt").write_bytes(TEXT)
        words = tiny(place, folder, str(folder / "work" / "a.txt"))
        dropped = {  # what the file says must count
            "a run folder that leads out": "--run_dir",
            "a source that leads out": "--data.train",
        }
        known = next((option for name, option in dropped.items() if CONFIGS[name] == content), None)
        if known in words:
            cut = words.index(known)
            del words[cut : cut + 2]
        if b"n_layer" in content:
            cut = words.index("--model.config")
            del words[cut : cut + 2]
        for option in ("--data.block_size", "--train.global_batch_blocks", "--optim.lr"):
            if option.rpartition(".")[2].encode() in content:
                cut = words.index(option)
                del words[cut : cut + 2]
        return ["train", "--config", str(folder / "work" / "c.yaml"), *words]

    return make


for config_name, config in CONFIGS.items():
    case(f"config file: {config_name}", config_case(config))

# ---- folders of a stranger ---------------------------------------------------------------------------------


def stranger(place: Path) -> Path:
    """A finished run with its export, token stores and report; made once."""
    import fcntl

    with open(place / "stranger.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        base = place / "stranger"
        if not (base / "ready").exists():
            shutil.rmtree(base, ignore_errors=True)
            base.mkdir()
            (base / "a.txt").write_bytes(TEXT * 5)
            run = runs.start(stranger_words(base, base), logs=base / "logs")
            assert run.wait(300), run.output()
            assert run.codes == {0: 0}, run.output()
            (base / "ready").touch()
    return base


def stranger_words(base: Path, here: Path, steps: int = 4) -> list[str]:
    words = runs.base_arguments(base, steps=steps, every=2)
    cut = words.index("--tokenizer.path")
    words[cut : cut + 2] = ["--tokenizer.vocab_size", "290"]
    words[words.index("--data.train") + 1] = str(base / "a.txt")
    words[words.index("--data.store_dir") + 1] = str(here / "stores")
    return [*words, "--data.processes", "1", "--evaluate.every", "2", "--run_dir", str(here / "run")]


def copied(folder: Path, place: Path) -> tuple[Path, Path]:
    """(the run folder of the stranger, copied; the text that it was trained on)."""
    base = stranger(place)
    shutil.copytree(base / "run", folder / "work" / "run", symlinks=True)
    shutil.copytree(base / "stores", folder / "work" / "stores")
    return folder / "work" / "run", base / "a.txt"


def commands_on(run: Path, base: Path, name: str) -> list[str]:
    """A command on the stranger's run folder."""
    words = {
        "resume": ["train", *stranger_words(base, run.parent, steps=8)],
        "generate": ["generate", str(run), "--prompt", "the", "--max_tokens", "3"],
        "export": ["export", str(run)],
        "evaluate": ["evaluate", str(run), "--data", str(base / "a.txt")],
        "report": ["report", str(run)],
        "checkpoints": ["checkpoints", str(run), "--verify"],
        "order": ["order", str(run), "--step", "1"],
        "generate from the export": ["generate", str(run / "export"), "--prompt", "the", "--max_tokens", "3"],
    }
    return words[name]


def put_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file outside": lambda path, outside: path.symlink_to(outside / "precious"),
    "a link to a folder outside": lambda path, outside: path.symlink_to(outside),
    "a FIFO": lambda path, outside: os.mkfifo(path),
    "a folder": lambda path, outside: (path.mkdir(), (path / "x").write_text("x")),
    "garbage": lambda path, outside: path.write_bytes(b"\x1b]0;owned\x07" + bytes(range(256)) * 20),
}
FILES_OF_A_RUN = (
    ".lock", "config.yaml", "train.log", "metrics.jsonl", "status.json", "report.html", "logs", "tokenizer",
    "tokenizer/tokenizer.model", "tokenizer/tokenizer.json", "checkpoints", "checkpoints/best", "export",
    "export/config.json", "STOP", "SAVE",
)  # fmt: skip


def file_case(
    name: str, put: Callable[[Path, Path], object], command: str
) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        run, text = copied(folder, place)
        put_away(run / name)
        put(run / name, folder / "outside")
        return commands_on(run, text.parent, command)

    return make


ROUND = ("resume", "generate", "report", "export", "checkpoints", "order", "evaluate")
for number, name in enumerate(FILES_OF_A_RUN):
    for other, (put_name, put_it) in enumerate(OUTSIDE.items()):
        command = "resume" if other < 2 else ROUND[(number + other) % len(ROUND)]
        codes = (*ALLOWED, 75) if name == "STOP" else ALLOWED
        case(f"a stranger's run: {name} is {put_name}: {command}", file_case(name, put_it, command), codes)


def edited(file: str, change: Callable[[Any], Any]) -> Callable[[Path, Path], object]:
    """A JSON file of the run is changed; a checkpoint gets the fitting hashes."""

    def put(run: Path, _folder: Path) -> None:
        for path in sorted(run.glob(file)):
            content = json.loads(path.read_bytes())
            changed = change(content)
            data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
            path.write_bytes(data)
            if "checkpoints" in file:
                seal(path.parent)

    return put


def seal(checkpoint: Path) -> None:
    """A manifest with the hashes of what lies there now, as an attacker would write it."""
    from lmcore.checkpoint.manifest import manifest_bytes

    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_bytes(manifest_bytes(manifest))


def of_yaml(text: str) -> Callable[[Path, Path], object]:
    return lambda run, folder: (run / "config.yaml").write_text(
        text.replace("MARK", str(folder / "EXECUTED"))
    )


def of_metrics(line: str) -> Callable[[Path, Path], object]:
    def put(run: Path, _folder: Path) -> None:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(line + "\n")

    return put


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


STRANGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "config.yaml names code for data": (of_yaml("data: {factory: 'os:system', config: {command: 'touch MARK'}}\n"), "order"),
    "config.yaml names code for the model": (of_yaml("data: {train: [a]}\nmodel: {factory: 'os:system', config: {command: 'touch MARK'}}\n"), "evaluate"),
    "config.yaml with aliases": (of_yaml(ALIASES), "report"),
    "config.yaml with a tag": (of_yaml("!!python/object/apply:os.system ['touch MARK']"), "order"),
    "state.json names code": (
        edited("checkpoints/step-*/state.json", lambda s: s | {"model": {"kind": "factory", "factory": "os:system", "arguments": {"command": "touch EXECUTED"}}}),
        "generate"),
    "state.json: a billion layers": (
        edited("checkpoints/step-*/state.json", lambda s: s | {"model": s["model"] | {"config": s["model"]["config"] | {"n_layer": 10**9}}}),
        "export"),
    "state.json: a cursor of -5": (edited("checkpoints/step-*/state.json", lambda s: s | {"cursor": s["cursor"] | {"position": -5}}), "resume"),
    "state.json: a cursor of text": (edited("checkpoints/step-*/state.json", lambda s: s | {"cursor": "x"}), "resume"),
    "state.json: a step of 10^12": (edited("checkpoints/step-*/state.json", lambda s: s | {"step": 10**12}), "resume"),
    "state.json: no guard": (edited("checkpoints/step-*/state.json", lambda s: {k: v for k, v in s.items() if k != "guard"}), "resume"),
    "state.json: guard is a list": (edited("checkpoints/step-*/state.json", lambda s: s | {"guard": [1]}), "resume"),
    "state.json: tokens are text": (edited("checkpoints/step-*/state.json", lambda s: s | {"tokens": "many"}), "resume"),
    "state.json: topology is null": (edited("checkpoints/step-*/state.json", lambda s: s | {"topology": None}), "resume"),
    "state.json: nothing": (edited("checkpoints/step-*/state.json", lambda s: {}), "resume"),
    "state.json: deep": (edited("checkpoints/step-*/state.json", lambda s: nested(100_000)), "resume"),
    "manifest.json names a file outside": (
        edited("checkpoints/step-*/manifest.json", lambda m: m | {"files": m["files"] | {"../../../../outside/precious": {"bytes": 8, "sha256": ""}}}), "checkpoints"),
    "store manifest: a part outside": (
        lambda run, folder: edited("stores/*/manifest.json", lambda m: m | {"parts": [p | {"file": "../../../outside/precious"} for p in m["parts"]]})(run.parent, folder),
        "resume"),
    "store manifest: an absolute part": (
        lambda run, folder: edited("stores/*/manifest.json", lambda m: m | {"parts": [p | {"file": "/etc/hostname"} for p in m["parts"]]})(run.parent, folder), "resume"),
    "store manifest: nothing": (lambda run, folder: edited("stores/*/manifest.json", lambda m: {})(run.parent, folder), "resume"),
    "store manifest: deep": (lambda run, folder: edited("stores/*/manifest.json", lambda m: nested(100_000))(run.parent, folder), "resume"),
    "store manifest: -1 tokens": (
        lambda run, folder: edited("stores/*/manifest.json", lambda m: m | {"tokens": -1, "parts": [p | {"tokens": -1} for p in m["parts"]]})(run.parent, folder), "resume"),
    "store manifest: another dtype": (lambda run, folder: edited("stores/*/manifest.json", lambda m: m | {"dtype": "|O"})(run.parent, folder), "resume"),
    "metrics.jsonl: HTML and escape codes": (
        of_metrics(json.dumps({"kind": "event", "event": "<img src=x onerror=alert(1)>", "step": "<script>alert(1)</script>", "reason": "\x1b]0;owned\x07$a_{$"})), "report"),
    "metrics.jsonl: text for numbers": (of_metrics('{"kind": "train", "step": "x", "loss": "<b>", "tokens": []}'), "report"),
    "metrics.jsonl: numbers without end": (of_metrics('{"kind": "train", "step": 1e400, "loss": 1e400, "tokens": -1e400}'), "report"),
    "metrics.jsonl: deep": (of_metrics("[" * 100_000), "report"),
    "metrics.jsonl: hostile, then trained on": (of_metrics('{"kind": "train", "step": "x", "loss": {}}'), "resume"),
    "status.json: deep": (lambda run, _: (run / "status.json").write_bytes(nested(100_000)), "report"),
    "export: code in auto_map": (
        edited("export/config.json", lambda c: c | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}), "generate from the export"),
    "export: a billion layers": (edited("export/config.json", lambda c: c | {"n_layer": 10**9}), "generate from the export"),
    "export: no heads": (edited("export/config.json", lambda c: c | {"n_head": 0}), "generate from the export"),
    "export: a list": (edited("export/config.json", lambda c: []), "generate from the export"),
    "export: deep": (edited("export/config.json", lambda c: nested(100_000)), "generate from the export"),
    "export: quantization": (edited("export/config.json", lambda c: c | {"quantization_config": {"quant_method": "evil"}}), "generate from the export"),
    "export: weights are a pickle": (
        lambda run, folder: (run / "export" / "model.safetensors").write_bytes(the_bomb(folder)), "generate from the export"),
    "export: a pickle beside": (
        lambda run, folder: ((run / "export" / "model.safetensors").unlink(), (run / "export" / "pytorch_model.bin").write_bytes(the_bomb(folder))),
        "generate from the export"),
    "export: an adapter beside": (lambda run, _: (run / "export" / "adapter_config.json").write_text("{}"), "generate from the export"),
    "export: a header of 2^60 bytes": (
        lambda run, _: (run / "export" / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x0f" + b"{}"), "generate from the export"),
    "export: tokenizer of a class of its own": (
        edited("export/tokenizer_config.json", lambda c: c | {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.E", None]}}),
        "generate from the export"),
    "export: tokenizer opens itself": (edited("export/tokenizer_config.json", lambda c: {"tokenizer_class": "AutoTokenizer"}), "generate from the export"),
    "export: tokenizer is deep": (edited("export/tokenizer.json", lambda c: nested(100_000)), "generate from the export"),
    "export: a template that runs code": (
        edited("export/tokenizer_config.json", lambda c: c | {"chat_template": "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}"}),
        "generate from the export"),
    "a module beside, imported by nobody": (
        lambda run, folder: [(run / f"{name}.py").write_text(f"open({str(folder / 'EXECUTED')!r}, 'w')") for name in ("json", "torch", "numpy", "sitecustomize")],
        "resume"),
    "a checkpoint of 10^14 steps": (
        lambda run, _: shutil.copytree(sorted(run.glob("checkpoints/step-*"))[-1], run / "checkpoints" / "step-99999999999999"), "resume"),
    "checkpoints that are links to outside": (
        lambda run, folder: [(shutil.rmtree(path), path.symlink_to(folder / "outside")) for path in sorted(run.glob("checkpoints/step-*"))], "resume"),
    "a temporary folder that is a link": (
        lambda run, folder: (run / "checkpoints" / ".step-00000009.tmp").symlink_to(folder / "outside"), "resume"),
    "an old export that is a link": (lambda run, folder: (run / ".export.old").symlink_to(folder / "outside"), "export"),
}  # fmt: skip


def strange_case(put: Callable[[Path, Path], object], command: str) -> Callable[[Path, Path], Sequence[str]]:
    def make(folder: Path, place: Path) -> Sequence[str]:
        run, text = copied(folder, place)
        put(run, folder)
        (run / "evil.py").write_text(f"open({str(folder / 'EXECUTED')!r}, 'w')\n")
        return commands_on(run, text.parent, command)

    return make


for strange_name, (put_it, command) in STRANGE.items():
    case(f"a stranger's run: {strange_name}: {command}", strange_case(put_it, command))


# ---- one trial ---------------------------------------------------------------------------------------------


def trial(place: Path, number: int, folder: Path) -> Trial:
    """Case ``number``: its input, one command, and what it did."""
    asked = CASES[number]
    for name in ("work", "outside", "home"):
        (folder / name).mkdir()
    (folder / "outside" / "precious").write_text("precious")
    (folder / "outside" / "more").mkdir()
    (folder / "outside" / "more" / "file").write_text("more")
    words = [*asked.make(folder, place)]
    before = snapshot(folder)
    begin = time.monotonic()
    environment = {
        "HOME": str(folder / "home"),
        "LMCORE_CACHE": str(folder / "work" / ".cache"),
        "HF_HUB_OFFLINE": "1",
    }
    here = os.getcwd()
    os.chdir(folder / "work")
    if words[0] == "train":
        run = runs.start(words[1:], logs=folder / "logs", environment=environment)
    else:
        run = start_command(words, folder / "logs", environment)
    os.chdir(here)
    ended = run.wait(LIMIT_SECONDS)
    output = run.output(10**6)
    said = f"{asked.name}: exit code {run.codes.get(0)} after {time.monotonic() - begin:.0f} s: {output[-2500:]!r}"
    assert ended, f"hangs: {said}"
    assert not [*folder.rglob("EXECUTED")], f"code was run: {said}"
    assert run.codes[0] in asked.codes, said
    assert "Traceback (most recent call last)" not in output, said
    control = [character for character in output if character < " " and character not in "\n\t\r"]
    assert not control, f"control characters {control[:5]}: {said}"
    after = snapshot(folder)
    assert after == before, f"changed outside: {sorted(before.items() ^ after.items())}: {said}"
    page = folder / "work" / "run" / "report.html"
    if "report" in words and page.is_file():
        text = page.read_text(errors="replace").lower()
        assert not re.search("<img src=x|<script>alert", text), f"HTML of the stranger: {said}"
    if run.codes[0] != 0:
        assert output.strip(), f"no word: {said}"
    result = "a result" if run.codes[0] == 0 else f"refused with {run.codes[0]}"
    return Trial(note=asked.name, counts={"hostile inputs": 1, result: 1})


def snapshot(folder: Path) -> dict[str, str]:
    """Everything that is not the command's to change."""
    found = {}
    for top in ("outside", "home"):
        for path in sorted((folder / top).rglob("*")):
            content = path.read_bytes() if path.is_file() else b"folder"
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def start_command(words: Sequence[str], logs: Path, environment: dict[str, str]) -> runs.Run:
    """One command of lmcore in a fork, as ``runs.start`` does with ``train_lm.py``."""
    code = compile("import sys\nfrom lmcore.cli.main import main\nsys.exit(main())", "lmcore", "exec")
    script, runs._script = runs._script, lambda: code
    try:
        return runs.start(words, logs=logs, environment=environment)
    finally:
        runs._script = script
