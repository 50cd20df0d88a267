"""Damage to checkpoints, token stores and tokenizers: found, or without effect on what is read; never used silently.

A trial is 25 damages of one kind of folder, each done to a fresh copy and then read as a run or a command reads it.
Nothing here knows the names of the files: the damage is done to any file below the folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import kinds, runs
from tests.faults.kinds import Trial

REPEATS = 25
DAMAGE_SECONDS = 60
TEXTS = [
    "the lion runs under the river quickly", "", " ", "  two  spaces\n\ttab", "日本語 42 def", "<s></s><unk><pad>",
    "a" * 200, "ünïcödé 😀 \u200d\ufeff", "The Quick BROWN fox!", "0123456789 3.14 1e-5", "of of of a a mouse mouse",
]  # fmt: skip


# ---- one damage --------------------------------------------------------------------------------------------


def damage(folder: Path, draw: random.Random, others: list[Path]) -> str:
    """Damage one file below ``folder`` in a random way; returns the way and the file.

    Args:
        others: files of other, good folders, to be swapped in.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = draw.choice(files)
    how = draw.choice([*DAMAGES])
    if not DAMAGES[how](path, draw, files, others):
        how = "flip"
        flip(path, draw, files, others)
    return f"{how} {path.relative_to(folder)}"


Damage = Callable[[Path, random.Random, list[Path], list[Path]], bool]
"""(file, choices, files of the folder, files of others) -> whether anything is different now."""


def flip(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    data = bytearray(path.read_bytes())
    if not data:
        path.write_bytes(b"x")
        return True
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return True


def truncate(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, size - 1, draw.randrange(size)]) if size > 1 else 0)
    return size > 0


def append(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    with open(path, "ab") as file:
        file.write(draw.choice([b"\0", b"\n", b" ", b"x" * 8, path.read_bytes()[:64] or b"y"]))
    return True


def zero_page(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    data = bytearray(path.read_bytes())
    if not data:
        return False
    start = draw.randrange(len(data)) // 512 * 512
    page = data[start : start + 4096]
    data[start : start + 4096] = bytes(len(page))
    path.write_bytes(data)
    return any(page)


def swap_pages(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if half < 8:
        return False
    size = min(512, half)
    a, b = draw.randrange(half - size + 1), half + draw.randrange(len(data) - half - size + 1)
    before = bytes(data)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)
    return bytes(data) != before


def swap_files(path: Path, draw: random.Random, files: list[Path], _others: list[Path]) -> bool:
    other = draw.choice(files)
    content, here = other.read_bytes(), path.read_bytes()
    other.write_bytes(here)
    path.write_bytes(content)
    return content != here


def from_another(path: Path, draw: random.Random, _files: list[Path], others: list[Path]) -> bool:
    alike = [other for other in others if other.name == path.name] or others
    if not alike:
        return False
    content, here = draw.choice(alike).read_bytes(), path.read_bytes()
    path.write_bytes(content)
    return content != here


def remove(path: Path, _draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    path.unlink()
    return True


def rename(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    path.rename(
        path.with_name(draw.choice([f"{path.name}.bak", f"x{path.name}", path.name.upper(), f".{path.name}"]))
    )
    return True


def double(path: Path, draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    name = draw.choice([
        f"{path.stem}-2{path.suffix}", f"{path.stem}-00001{path.suffix}", f"copy-{path.name}", "pytorch_model.bin",
        f"{path.name}.1",
    ])  # fmt: skip
    shutil.copy2(path, path.with_name(name))
    return True


def by_a_link(path: Path, draw: random.Random, _files: list[Path], others: list[Path]) -> bool:
    """The file becomes a link: to itself elsewhere, to another's file, to nothing."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    targets = [elsewhere, Path("/nowhere"), *others[:3]]
    path.symlink_to(draw.choice(targets))
    return True


def by_a_folder(path: Path, _draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    path.unlink()
    path.mkdir()
    return True


def by_a_fifo(path: Path, _draw: random.Random, _files: list[Path], _others: list[Path]) -> bool:
    path.unlink()
    os.mkfifo(path)
    return True


def other_json(path: Path, draw: random.Random, files: list[Path], _others: list[Path]) -> bool:
    """One value of a JSON file is another one, is gone, or is of another type; the file stays valid JSON."""
    jsons = [file for file in files if file.suffix == ".json"]
    if not jsons:
        return False
    path = draw.choice(jsons)
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    places: list[tuple[Any, Any]] = []
    todo = [content]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        for key in keys:
            places.append((here, key))
            todo.append(here[key])
    if not places:
        return False
    where, key = draw.choice(places)
    old = where[key]
    if draw.random() < 0.25:
        del where[key]
    elif isinstance(old, bool) or old is None:
        where[key] = draw.choice([0, "x", not old])
    elif isinstance(old, int | float):
        where[key] = draw.choice([old + 1, -1, 10**12, 0 if old else 1, str(old), None])
    elif isinstance(old, str):
        where[key] = draw.choice(
            [f"{old}x", "", old[:-1] or "y", "../../etc/passwd", None, 3, old.swapcase()]
        )
    else:
        where[key] = draw.choice([None, [], {}, 7])
    new = json.dumps(content).encode()
    if json.loads(path.read_bytes()) == content:
        return False
    path.write_bytes(new)
    return True


DAMAGES: dict[str, Damage] = {
    "flip": flip, "another flip": flip, "truncate": truncate, "append": append, "zero page": zero_page,
    "swap pages": swap_pages, "swap files": swap_files, "from another": from_another, "remove": remove,
    "rename": rename, "double": double, "link": by_a_link, "folder": by_a_folder, "fifo": by_a_fifo,
    "other json": other_json,
}  # fmt: skip


# ---- checkpoints -------------------------------------------------------------------------------------------


def checkpoints_of(place: Path, strategy: str) -> Path:
    """The checkpoints of a finished run of that strategy."""
    from benchmarks.faults import kills

    kills.expected(place, strategy, False)
    return place / f"expected-{strategy}-{runs.code_hash()}" / "run" / "checkpoints"


def everything(opened: Any) -> str:
    """A hash over all that is read of an open checkpoint: state and every tensor."""
    import numpy as np  # not before the campaign has asked it for one thread

    digest = hashlib.sha256(json.dumps([opened.step, opened.state], sort_keys=True).encode())
    for kind in ("model", "optim", "ema"):
        for key in sorted(opened.keys(kind)):
            tensor = opened.read(kind, *key.split("/")) if "/" in key else opened.read(kind, key)
            assert tensor is not None, key
            digest.update(f"{kind} {key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(np.ascontiguousarray(tensor.detach().clone().reshape(-1).numpy()).tobytes())
    return digest.hexdigest()


def damage_checkpoint(place: Path, draw: random.Random, folder: Path, trial: Trial, strategy: str) -> None:
    """The newest of two checkpoints is damaged (sometimes both); then a run looks for one, and a command opens it."""
    from lmcore.checkpoint.reader import find, open_checkpoint
    from lmcore.errors import RequestError

    good = checkpoints_of(place, strategy)
    older, newest = sorted(good.glob("step-*"))[-2:]
    others = [path for path in sorted(checkpoints_of(place, "single").glob("step-*/*")) if path.is_file()]
    content = contents(place, strategy)
    both = draw.random() < 0.1
    for path in (older, newest):
        shutil.copytree(path, folder / path.name)
    what = [damage(folder / newest.name, draw, others)]
    what += [damage(folder / older.name, draw, others)] if both else []
    words = f"{strategy}: {what}"
    by_path = []
    for path in (newest, older) if both else (newest,):
        try:
            with open_checkpoint(folder / path.name) as opened:
                assert everything(opened) == content[path.name], (
                    f"{words}: {path.name} used silently by its path"
                )
            by_path.append(path.name)
        except RequestError:
            pass
    try:
        found = find(folder, note=lambda line: None)
    except RequestError:
        assert not set(by_path), f"{words}: refused as a whole, {by_path} open"
        assert both, f"{words}: refused, although the older one is good"
        trial.count("refused")
        return
    assert found is not None, f"{words}: a run would begin again at step 0"
    with found:
        assert everything(found) == content[found.path.name], f"{words}: used silently"
        trial.count("without effect on what is read" if found.path.name == newest.name else "older one taken")


@functools.cache
def contents(place: Path, strategy: str) -> dict[str, str]:
    """Name of a good checkpoint -> hash over all that is read of it."""
    from lmcore.checkpoint.reader import open_checkpoint

    found = {}
    for path in sorted(checkpoints_of(place, strategy).glob("step-*")):
        with open_checkpoint(path) as opened:
            found[path.name] = everything(opened)
    return found


# ---- token stores ------------------------------------------------------------------------------------------


def a_text(place: Path, name: str = "damage-text", lines: int = 400) -> Path:
    """A folder of a few text files; made once."""
    folder = place / name
    if not folder.exists():
        aside = folder.with_name(f".{name}.{os.getpid()}")
        aside.mkdir()
        for number in range(4):
            runs.write_corpus(aside / f"{number}.txt", lines + 37 * number)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside)
    return folder


def open_store(place: Path, stores: Path) -> Any:
    """As a run opens it: built if it is not there, compared with its hashes."""
    from lmcore.data.store.build import build_store
    from lmcore.data.text.documents import resolve_sources
    from lmcore.data.tokenizer.tokenizer import load_tokenizer

    [source] = resolve_sources([{"path": str(a_text(place)), "name": "texts"}])
    return build_store(source, load_tokenizer(place / "tokenizer"), store_dir=stores, part_bytes=8000)


def tokens_and_ends(store: Any) -> str:
    """A hash over all that is read of a store."""
    digest = hashlib.sha256(f"{store.name} {store.fingerprint} {store.dtype} {store.n_tokens}".encode())
    digest.update(f"{store.n_documents} {store.n_bytes} {store.bad_records}".encode())
    digest.update(store.read(0, store.n_tokens).tobytes())
    digest.update(store.document_ends(0, store.n_tokens).tobytes())
    return digest.hexdigest()


def damage_store(place: Path, draw: random.Random, folder: Path, trial: Trial) -> None:
    """A finished store is damaged, or one that a kill left unfinished (its manifest is not there yet)."""
    from lmcore.errors import FaultError, RequestError

    os.environ["LMCORE_CACHE"] = str(folder / "cache")  # what was compared before is remembered there
    good = place / "damage-stores"
    if not (good / "hash").exists():
        open_store(place, good)
        (good / f"hash.{os.getpid()}").write_text(tokens_and_ends(open_store(place, good)))
        os.replace(good / f"hash.{os.getpid()}", good / "hash")
    wanted = (good / "hash").read_text()
    [known] = (path for path in good.iterdir() if path.is_dir())
    shutil.copytree(known, folder / "stores" / known.name)
    if draw.random() < 0.5:
        open_store(place, folder / "stores")  # compared already: the damage comes after that
    unfinished = draw.random() < 0.3
    if unfinished:
        (folder / "stores" / known.name / "manifest.json").unlink()
    others = [path for path in (place / "token_stores").rglob("*") if path.is_file()]
    what = damage(folder / "stores", draw, others)
    words = f"{'unfinished: ' if unfinished else ''}{what}"
    try:
        store = open_store(place, folder / "stores")
        assert tokens_and_ends(store) == wanted, f"{words}: used silently"
    except (RequestError, FaultError):
        trial.count("refused")
    else:
        trial.count("built again" if unfinished else "without effect on what is read")


# ---- tokenizers --------------------------------------------------------------------------------------------


def reading(tokenizer: Any) -> list[Any]:
    """All that a run takes from a tokenizer."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    pieces = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
    lengths = tokenizer.byte_lengths()
    return [
        ids, [tokenizer.decode(row) for row in ids], pieces, tokenizer.vocab_size, tokenizer.special_ids,
        tokenizer.special_tokens, tokenizer.eos_id, tokenizer.pad_id, None if lengths is None else lengths.tolist(),
    ]  # fmt: skip


def damage_tokenizer(place: Path, draw: random.Random, folder: Path, trial: Trial) -> None:
    """The tokenizer of a run is damaged; a run or a command that opens it knows the checkpoint's fingerprint."""
    from lmcore.data.tokenizer.tokenizer import check_tokenizer, load_tokenizer
    from lmcore.errors import FaultError, RequestError

    good = place / "tokenizer"
    before = load_tokenizer(good)
    target = folder / "tokenizer"
    shutil.copytree(good, target)
    others = [path for path in other_tokenizer(place).iterdir() if path.is_file()]
    what = damage(target, draw, others)
    try:
        found = load_tokenizer(target)
        check_tokenizer(before.fingerprint, found, folder=target)
    except (RequestError, FaultError):
        trial.count("refused")
        return
    assert reading(found) == reading(before), f"{what}: used silently"
    try:
        found.save(folder / "saved")
    except FaultError:
        trial.count("refused")
        return
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder / "saved")
    for text in TEXTS:
        ids = again(text, add_special_tokens=False)["input_ids"]
        assert ids == before.encode(text), f"{what}: the export would have other ids for {text!r}"
    trial.count("without effect on what is read")


def other_tokenizer(place: Path) -> Path:
    """A tokenizer of another text and size; made once."""
    from lmcore.data.tokenizer.training import train_tokenizer

    folder = place / "other-tokenizer"
    if not folder.exists():
        aside = folder.with_name(f".other-tokenizer.{os.getpid()}")
        text = a_text(place) / "0.txt"
        train_tokenizer([text.read_text()], folder=aside, vocab_size=290, seed=3)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside)
    return folder


def _hangs(*_: object) -> None:
    raise TimeoutError(f"no answer after {DAMAGE_SECONDS} s")


# ---- trials ------------------------------------------------------------------------------------------------

ORDER = ("checkpoint", "checkpoint", "token store", "checkpoint", "token store", "tokenizer")


def trial(place: Path, seed: int, folder: Path, repeats: int = REPEATS) -> Trial:
    """25 damages of one kind; every one that was used silently is in the evidence."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    kind = ORDER[seed % len(ORDER)]
    strategy = [*kinds.STRATEGIES][seed // 2 % len(kinds.STRATEGIES)]
    work = {
        "checkpoint": functools.partial(damage_checkpoint, strategy=strategy),
        "token store": damage_store,
        "tokenizer": damage_tokenizer,
    }[kind]
    draw, result, silent = random.Random(seed), Trial(note=kind), []
    for number in range(repeats):
        here = folder / str(number)
        here.mkdir()
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(DAMAGE_SECONDS)
        try:
            work(place, draw, here, result)
        except Exception as error:  # also what no reader turned into a refusal
            text = (
                "".join(traceback.format_exception(error)[-3:])
                if not isinstance(error, AssertionError)
                else ""
            )
            silent.append(f"{number}: {type(error).__name__}: {str(error)[:600]} {text}")
        signal.alarm(0)
        shutil.rmtree(here)
        result.count("damages")
        result.count(f"damages of a {kind}")
    assert not silent, f"{len(silent)} of {repeats} damages of a {kind}:\n" + "\n".join(silent)
    return result
