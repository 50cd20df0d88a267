"""Token stores: nothing is lost, no process waits for ever, bad input costs only itself, damage is found."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.cli.main import main
from lmcore.data.store import build, claims, edits, verification
from lmcore.data.store.build import Progress, build_store
from lmcore.data.store.inventory import list_stores, record_use, remove_store
from lmcore.data.store.manifest import HASH, sealed
from lmcore.data.store.store import MANIFEST, TokenStore
from lmcore.data.text import documents as text
from lmcore.disk import DISK, Call
from lmcore.errors import FaultError, RequestError
from lmcore.process import is_alive
from tests.support.data import Bytes, counting_store
from tests.support.disk_faults import Counter, KillAt, forked

ROOT = Path(__file__).resolve().parents[2]


def corpus(folder: Path, n: int = 12, size: int = 900) -> text.Source:
    """n files of one document each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        words = " ".join(f"{number}.{place} 文" for place in range(size // 8))
        (folder / f"{number:03}.txt").write_text(words)
    return text.resolve_sources([{"path": str(folder), "unit": "file", "name": "small"}])[0]


def contents(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(source: text.Source) -> list[str]:
    return [Path(path).read_text() for path in source.paths]


@final
class Counting:
    """Bytes, and how many texts it has encoded."""

    vocab_size, eos_id, fingerprint = 257, 256, "bytes"

    def __init__(self) -> None:
        self.texts = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.texts += len(texts)
        return Bytes().encode_batch(texts)


# ---- what a store holds ----


def test_store_holds_the_documents_with_their_eos(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text")
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    expected, ends = [], []
    for document in documents(source):
        expected += [*document.encode(), 256]
        ends.append(len(expected))
    assert store.read(0, store.n_tokens).tolist() == expected
    assert store.document_ends(0, store.n_tokens).tolist() == ends
    assert store.n_documents == 12
    assert store.n_bytes == len(expected) - 12
    assert store.dtype == np.uint16
    assert len(store.manifest["parts"]) > 4
    store.verify()


def test_without_eos_and_with_a_large_vocabulary(tmp_path: Path) -> None:
    @final
    class Large:
        vocab_size, eos_id, fingerprint = 70_000, 0, "large"

        def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            return [ids + 69_000 for ids in Bytes().encode_batch(texts)]

    source = corpus(tmp_path / "text", 3)
    store = build_store(source, Large(), store_dir=tmp_path / "stores", eos=False)
    assert store.dtype == np.uint32
    assert (store.read(0, store.n_tokens) - 69_000).tolist() == list("".join(documents(source)).encode())
    assert store.document_ends(0, store.n_tokens)[-1] == store.n_tokens


def test_both_sides_of_a_split_are_the_whole(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 60)
    sides = [
        build_store(source, Bytes(), store_dir=tmp_path / "stores", split=(side, 0.3))
        for side in ("train", "valid")
    ]
    found: list[str] = []
    for store in sides:
        whole = Bytes().decode([one if one < 256 else 0 for one in store.read(0, store.n_tokens).tolist()])
        found += whole.split("\0")[:-1]
    assert sorted(found) == sorted(documents(source))
    assert all(store.n_documents for store in sides)
    assert sides[0].folder != sides[1].folder


@pytest.mark.parametrize("processes", [2, 3])
def test_number_of_processes_changes_no_byte(tmp_path: Path, processes: int) -> None:
    source = corpus(tmp_path / "text")
    (tmp_path / "text" / "004.txt").write_bytes(b"broken \xff\xfe here")
    [source] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])
    options = {"part_bytes": 2000, "on_error": "skip", "max_bad_fraction": 0.5}
    one = build_store(source, Bytes(), store_dir=tmp_path / "one", **options)
    seen: list[Progress] = []
    many = build_store(
        source, Bytes(), store_dir=tmp_path / "many", processes=processes, progress=seen.append, **options
    )
    assert contents(one.folder) == contents(many.folder)
    assert many.bad_records == 1
    assert seen
    assert seen[-1].total_parts == len(many.manifest["parts"])


def test_unchanged_corpus_is_not_tokenized_again(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text")
    first = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    before = contents(first.folder)
    tokenizer = Counting()
    again = build_store(source, tokenizer, store_dir=tmp_path / "stores")
    assert tokenizer.texts == 0
    assert contents(again.folder) == before


def test_appended_files_only_add_parts_and_the_change_is_said(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 12)
    first = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    (tmp_path / "text" / "zzz.txt").write_text("new " * 600)
    [grown] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])
    tokenizer, notes = Counting(), []
    second = build_store(grown, tokenizer, store_dir=tmp_path / "stores", note=notes.append)
    assert tokenizer.texts == 1
    assert "1 file added (zzz.txt)" in notes[0]
    assert second.folder != first.folder
    assert second.fingerprint != first.fingerprint
    assert second.n_tokens == first.n_tokens + 2400 + 1
    clean = build_store(grown, Bytes(), store_dir=tmp_path / "clean", part_bytes=2000)
    assert contents(second.folder) == contents(clean.folder)


def test_every_change_gives_another_fingerprint(tmp_path: Path) -> None:
    """A fingerprint for each: content, tokenizer, options. Two corpora never share a folder."""
    source = corpus(tmp_path / "text")

    @final
    class Other(Counting):
        fingerprint = "other"

    fingerprints = {build_store(source, Bytes(), store_dir=tmp_path / "stores").fingerprint}
    notes: list[str] = []
    fingerprints.add(
        build_store(source, Other(), store_dir=tmp_path / "stores", note=notes.append).fingerprint
    )
    assert "another tokenizer" in notes[-1]
    fingerprints.add(
        build_store(source, Bytes(), store_dir=tmp_path / "stores", eos=False, note=notes.append).fingerprint
    )
    assert "eos True -> False" in notes[-1] or "tokenizer" in notes[-1]
    path = Path(source.paths[5])
    path.write_text(path.read_text().replace("5.3", "5.4"))  # the same size
    changed = build_store(source, Bytes(), store_dir=tmp_path / "stores", note=notes.append)
    fingerprints.add(changed.fingerprint)
    assert "1 file changed (005.txt)" in notes[-1]
    moved = tmp_path / "moved"
    (tmp_path / "text").rename(moved)
    [again] = text.resolve_sources([{"path": str(moved), "unit": "file", "name": "small"}])
    fingerprints.add(build_store(again, Bytes(), store_dir=tmp_path / "stores").fingerprint)
    assert len(fingerprints) == 4  # a moved corpus is the same corpus


# ---- kills, peers, failures ----

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from lmcore.data.text import documents as text
from lmcore.data.store import build as tokens
from lmcore.disk import DISK
from tests.support.data import SlowBytes
from tests.support.disk_faults import KillAt

DISK.before = KillAt({kill_at}, torn=True)
[source] = text.resolve_sources([{{"path": {path!r}, "unit": "file", "name": "small"}}])
tokens.build_store(
    source, SlowBytes({delay}), store_dir={stores!r}, part_bytes=2000, worker={worker}, processes={processes}
)
print("done")
"""


def start(
    path: Path, stores: Path, *, delay: float = 0.0, worker: int = 0, processes: int = 1, kill_at: int = -1
) -> subprocess.Popen[str]:
    """``prepare`` in a process of its own; ``delay``: seconds of each call of its tokenizer; ``kill_at``: the call to
    the disk before which it kills itself."""
    script = SCRIPT.format(
        root=str(ROOT),
        path=str(path),
        stores=str(stores),
        delay=delay,
        worker=worker,
        processes=processes,
        kill_at=kill_at,
    )
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


FOR_EVER = 600.0
"""Seconds of a call of the tokenizer that only a kill ends."""


def test_ten_kills_lose_at_most_a_part_each(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 80)
    counter = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DISK, "before", counter)
        whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)
    parts, per_part = len(whole.manifest["parts"]), len(counter.calls) // len(whole.manifest["parts"])
    assert parts >= 20
    stores = tmp_path / "killed"
    draw = random.Random(1)
    built = 0
    for _ in range(10):
        # Before one of the calls of the next two parts (the first few are those of the store itself).
        process = start(tmp_path / "text", stores, kill_at=draw.randrange(2 * per_part + 6))
        assert process.wait(timeout=120) == -signal.SIGKILL
        process.communicate()
        done = len(list(stores.glob("*/part-*.json")))
        assert done >= built  # what was finished stays
        built = done
    assert 0 < built < parts
    tokenizer = Counting()
    finished = build_store(source, tokenizer, store_dir=stores, part_bytes=2000)
    assert tokenizer.texts == 80 * (parts - built) // parts  # and is not made again
    assert contents(finished.folder) == contents(whole.folder)
    finished.verify()


def test_kill_while_finishing_leaves_no_files(tmp_path: Path) -> None:
    """Also one that comes when the manifest is there and what earlier kills have left is not yet taken away."""
    source = corpus(tmp_path / "text", 3)
    whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)

    def build(stores: Path, hook: Callable[[Call], None]) -> None:
        DISK.before = hook
        build_store(source, Bytes(), store_dir=stores, part_bytes=2000)

    counter = Counter()
    assert whole.folder is not None
    begun = tmp_path / "begun"
    assert forked(lambda: build(begun, KillAt(13, torn=True))) == -signal.SIGKILL
    left = {name for name in contents(next(begun.iterdir())) if name.startswith(".") or "claim" in name}
    assert left, "a claim, and a part that is not whole"
    shutil.copytree(begun, tmp_path / "count")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DISK, "before", counter)
        build_store(source, Bytes(), store_dir=tmp_path / "count", part_bytes=2000)
    for number in range(len(counter.calls) - 5, len(counter.calls)):
        stores = tmp_path / f"killed-{number}"
        shutil.copytree(begun, stores)
        assert forked(lambda s=stores, n=number: build(s, KillAt(n))) == -signal.SIGKILL
        finished = build_store(source, Bytes(), store_dir=stores, part_bytes=2000)
        assert contents(finished.folder) == contents(whole.folder)


def test_tokenizing_processes_end_with_their_parent(tmp_path: Path) -> None:
    corpus(tmp_path / "text", 40)
    stores = tmp_path / "stores"
    process = start(tmp_path / "text", stores, delay=FOR_EVER, processes=2)
    wait_for(lambda: len(list(stores.glob("*/part-*.claim"))) == 2)
    pids = [json.loads(path.read_text())["pid"] for path in stores.glob("*/part-*.claim")]
    assert process.pid not in pids
    process.kill()
    process.communicate(timeout=120)  # also the pipes of the children are closed
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    assert (
        build_store(
            text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])[0],
            Bytes(),
            store_dir=stores,
        ).n_documents
        == 40
    )


def test_ranks_share_the_work_and_survive_a_killed_rank(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 24)
    whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)
    stores = tmp_path / "shared"
    ranks = {1: start(tmp_path / "text", stores, delay=FOR_EVER, worker=1)}
    wait_for(lambda: list(stores.glob("*/part-*.claim")))  # it has a part, and will never be done with it
    ranks |= {rank: start(tmp_path / "text", stores, worker=rank) for rank in (0, 2)}
    others = len(whole.manifest["parts"]) - 1
    wait_for(lambda: len(list(stores.glob("*/part-*.json"))) == others)
    assert [ranks[rank].poll() for rank in (0, 1, 2)] == [None] * 3, "they wait for the last part"
    ranks[1].kill()
    for rank in (0, 2):
        out, err = ranks[rank].communicate(timeout=120)
        assert "done" in out, err
    ranks[1].communicate()
    assert contents(next(stores.iterdir())) == contents(whole.folder)


def test_failure_ends_all_ranks_with_the_same_message(tmp_path: Path) -> None:
    corpus(tmp_path / "text", 30)
    (tmp_path / "text" / "017.txt").write_bytes(b"broken \xff here")
    [source] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])
    with pytest.raises(FaultError, match=r"017\.txt, byte .*data\.on_error skip"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores", processes=2, part_bytes=2000)
    # Mended, it goes on; the old failure is forgotten.
    (tmp_path / "text" / "017.txt").write_text("mended")
    [source] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])
    assert build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000).n_documents == 30


def test_stale_claim_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 3600.0)  # two claims of one process share a file aside
    path = tmp_path / "x.claim"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    path.write_text(json.dumps({"host": host, "pid": gone.pid}))
    with claims.claimed(path) as mine:
        assert mine is not None
        with claims.claimed(path) as other:
            assert other is None  # this process lives
    assert not path.exists()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: " Z " in Path(f"/proc/{zombie.pid}/stat").read_text())
    path.write_text(json.dumps({"host": host, "pid": zombie.pid}))
    with claims.claimed(path) as mine:
        assert mine is not None  # killed, but not yet waited for
    zombie.wait()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with claims.claimed(path) as mine:
        assert mine is None
    monkeypatch.setattr(claims, "STALE_SECONDS", -1.0)
    with claims.claimed(path) as mine:
        assert mine is not None  # no heartbeat from elsewhere


def test_full_disk_keeps_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path / "text")
    calls = 0

    def full(call: Call) -> None:
        nonlocal calls
        calls += call.operation == "write" and call.path.endswith(".tmp") and ".bin." in call.path
        if calls > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(DISK, "before", full)
        with pytest.raises(RequestError, match=r"No space left.*data\.store_dir"):
            build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    tokenizer = Counting()
    store = build_store(source, tokenizer, store_dir=tmp_path / "stores", part_bytes=2000)
    assert 0 < tokenizer.texts < 12
    whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)
    assert contents(store.folder) == contents(whole.folder)


def test_unwritable_store_dir_raises(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot be written"):
        build_store(source, Bytes(), store_dir=tmp_path / "file" / "stores")


# ---- bad input ----


def test_store_of_another_user_who_keeps_it_to_himself_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared data.store_dir and an umask of 077: a traceback, also of the list of stores."""
    source = corpus(tmp_path / "text", 2)
    build_store(source, Bytes(), store_dir=tmp_path / "stores")
    [folder] = (tmp_path / "stores").iterdir()
    stat = os.stat

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(f"{folder}/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(RequestError, match=f"{folder.name} cannot be (read|written) .Permission denied"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores")
    assert list_stores(tmp_path / "stores", runs=[]) == []


def test_bad_records_are_counted_and_located_and_cost_no_good_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"good {number}"}) for number in range(50)]
    lines[7], lines[20], lines[33] = "{broken", json.dumps({"text": 5}), json.dumps({"other": "x"})
    path.write_text("\n".join(lines))
    [source] = text.resolve_sources([str(path)])
    with pytest.raises(FaultError, match=r"a\.jsonl, byte \d+: .*skip"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores")
    with pytest.raises(
        FaultError,
        match=r"3 of 50 documents of a are bad or lost, about \d\.\d+% of the text, more than data\.max_bad_fraction",
    ):
        build_store(source, Bytes(), store_dir=tmp_path / "stores", on_error="skip", max_bad_fraction=0.05)
    store = build_store(
        source, Bytes(), store_dir=tmp_path / "stores", on_error="skip", max_bad_fraction=0.06
    )
    assert (store.n_documents, store.bad_records) == (47, 3)
    [part] = store.manifest["parts"]
    offsets = [int(record["where"].split()[1]) for record in part["bad_records"]]
    assert [path.read_bytes()[at:].split(b"\n")[0].decode() for at in offsets] == [
        lines[7],
        lines[20],
        lines[33],
    ]
    with pytest.raises(FaultError, match=r"3 of 50 documents"):  # the policy is asked each time
        build_store(source, Bytes(), store_dir=tmp_path / "stores")


def test_empty_corpus_raises(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    [source] = text.resolve_sources([str(tmp_path / "empty.txt")])
    with pytest.raises(RequestError, match=r"no text at all"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores")


def test_ids_beyond_the_vocabulary_raise_while_building(tmp_path: Path) -> None:
    @final
    class Liar:
        vocab_size, eos_id, fingerprint = 100, 1, "liar"

        def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            return Bytes().encode_batch(texts)

    with pytest.raises(FaultError, match=r"gave the id \d+ .* 100 ids"):
        build_store(corpus(tmp_path / "text", 2), Liar(), store_dir=tmp_path / "stores")


# ---- reading ----


@given(data=st.data(), total=st.integers(1, 300), pieces=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_reads_cross_pieces(data: st.DataObject, total: int, pieces: int, tmp_path_factory) -> None:
    store = counting_store(tmp_path_factory.mktemp("store"), total, pieces=pieces, documents=7)
    cuts = np.linspace(0, total, pieces + 1).astype(int)
    ends = sorted({e for a, b in pairwise(cuts) for e in [*range(a + 7, b, 7), b] if b > a})
    for _ in range(5):
        start = data.draw(st.integers(0, total - 1))
        count = data.draw(st.integers(0, total - start))
        assert store.read(start, count).tolist() == list(range(start, start + count))
        found = store.document_ends(start, start + count).tolist()
        assert found == [end for end in ends if start < end <= start + count]
    with pytest.raises(IndexError):
        store.read(total, 1)


def test_damaged_store_is_refused(tmp_path: Path) -> None:
    store = build_store(corpus(tmp_path / "text"), Bytes(), store_dir=tmp_path / "stores")
    folder = store.folder
    assert folder is not None
    with pytest.raises(RequestError, match=r"no finished token store"):
        TokenStore.open(tmp_path)
    path = folder / "part-000000.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(RequestError, match=r"has only \d+ bytes"):
        TokenStore.open(folder)
    path.unlink()
    with pytest.raises(RequestError, match=r"is missing"):
        TokenStore.open(folder)
    path.write_bytes(good)
    manifest = json.loads((folder / MANIFEST).read_text())
    part = manifest["parts"][0]
    for change, words in {
        "version": ({"version": 99}, "version 99"),
        "half the tokens": ({"tokens": manifest["tokens"] // 2}, "damaged"),
        "another type": ({"dtype": "|u1"}, "damaged"),
        "no fields": (dict.fromkeys(manifest), "version"),
        "negative": ({"documents": -1}, "damaged"),
        "another corpus": ({"identity": {**manifest["identity"], "eos": False}}, "damaged"),
        "a file outside": ({"parts": [{**part, "file": "../outside"}]}, "cannot be a name"),
        "an absolute path": ({"parts": [{**part, "file": "/etc/passwd"}]}, "cannot be a name"),
        "a number": ({"parts": [{**part, "file": 5}]}, "damaged"),
        "a list": ({"parts": [[]]}, "damaged"),
        "no parts": ({"parts": {}}, "damaged"),
        "another number of bytes": ({"bytes": manifest["bytes"] + 1}, "damaged"),
        "bad records that no part has": ({"bad": 3}, "damaged"),
    }.values():
        (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, **change})))
        with pytest.raises(RequestError, match=words) as caught:
            TokenStore.open(folder)
        assert "\n" not in str(caught.value)
    for text_of_it in ("", "{", "{}", "[]", "[" * 100_000, '{"version": NaN}', "\xff"):
        (folder / MANIFEST).write_text(text_of_it, encoding="latin-1")
        with pytest.raises(RequestError, match=r"damaged|version"):
            TokenStore.open(folder)


# ---- verification: nothing is trusted because it exists ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts whose bytes were read and compared."""
    names: list[str] = []
    read = verification._read

    def counting(folder: Path, part: verification.Part, dtype: str) -> object:
        names.append(part["file"])
        return read(folder, part, dtype)

    monkeypatch.setattr(verification, "_read", counting)
    return names


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("cache")
def test_store_is_verified_once_and_again_after_a_change(tmp_path: Path, compared: list[str]) -> None:
    source = corpus(tmp_path / "text")

    def again() -> TokenStore:
        compared.clear()
        return build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)

    folder = again().folder
    parts = len(compared)
    assert folder is not None
    assert parts > 4
    again()
    assert compared == []
    (folder / "part-000002.bin").touch()
    again()
    assert compared == ["part-000002"]
    whole = (folder / "part-000003.bin").read_bytes()
    flip(folder / "part-000003.bin")
    with pytest.raises(FaultError, match=r"part-000003\.bin.*the hash of \.bin differs; 1 of \d+ parts"):
        again()
    with pytest.raises(FaultError, match="differs"):  # and is not forgotten
        again()
    (folder / "part-000003.bin").write_bytes(whole)
    again()
    ends = folder / "part-000001.ends"
    ends.write_bytes(bytes(len(ends.read_bytes())))
    with pytest.raises(FaultError, match=r"the hash of \.ends differs"):
        again()


@pytest.mark.usefixtures("cache")
def test_edit_of_equal_length_is_found_and_a_touched_file_is_the_same(tmp_path: Path) -> None:
    """The fingerprint has samples of a large file only."""
    path = tmp_path / "large.txt"
    path.write_text("".join(f"line {n} of the text\n" for n in range(200_000)))
    notes: list[str] = []

    def again() -> TokenStore:
        [source] = text.resolve_sources([str(path)], unit="line")
        return build_store(source, Bytes(), store_dir=tmp_path / "stores", note=notes.append)

    folder = again().folder
    assert folder is not None
    path.touch()
    assert again().folder == folder
    path.rename(tmp_path / "aside")
    path.write_bytes((tmp_path / "aside").read_bytes())
    assert again().folder == folder
    whole, times = path.read_bytes(), path.stat()
    place = len(whole) // 30  # between two samples
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(RequestError, match=r"large\.txt was edited since its token store .* was built"):
            again()
    path.write_bytes(whole)
    assert again().folder == folder
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    shutil.rmtree(folder)
    built = again()
    assert ord("X") in built.read(0, built.n_tokens)
    assert not notes


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("size", [1, 2**17])
def test_edit_is_found_where_two_folders_have_files_of_one_name(tmp_path: Path, size: int) -> None:
    """Their relative paths are equal: the parts of one must not be taken for those of the other."""
    paths = [tmp_path / folder / "x.txt" for folder in ("first", "second")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"{path.parent.name} is a text of its own\n" * size)
    notes: list[str] = []

    def tokens() -> bytes:
        [source] = text.resolve_sources([{"paths": list(map(str, paths)), "name": "both", "unit": "file"}])
        store = build_store(source, Bytes(), store_dir=tmp_path / "stores", note=notes.append, eos=False)
        return store.read(0, store.n_tokens).astype(np.uint8).tobytes()

    assert tokens() == b"".join(path.read_bytes() for path in paths)
    whole = paths[0].read_bytes()
    place = len(whole) // 30  # of the large file: between two samples
    paths[0].write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    if size > 1:
        with pytest.raises(RequestError, match=r"first/x\.txt was edited since its token store"):
            tokens()
    paths[0].write_bytes(b"another " + whole)
    assert tokens() == b"".join(path.read_bytes() for path in paths)
    assert notes == ["token store both: 1 file changed (x.txt)"]


@pytest.mark.usefixtures("cache")
def test_edited_text_is_not_taken_over_from_an_older_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside it makes another store, for which the unchanged parts of the first are taken."""
    folder = tmp_path / "text"
    folder.mkdir()
    path = folder / "large.txt"
    path.write_text("".join(f"line {n} of the text\n" for n in range(70_000)))
    (folder / "same.txt").write_text("".join(f"line {n} of the same\n" for n in range(70_000)))

    def built() -> tuple[bytes, int]:
        """The text of the store, and the bytes that were tokenized for it."""
        tokenizer = Bytes()
        seen = 0

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            nonlocal seen
            seen += sum(map(len, texts))
            return Bytes().encode_batch(texts)

        monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
        [source] = text.resolve_sources([{"path": str(folder), "unit": "line", "name": "n"}])
        store = build_store(source, tokenizer, store_dir=tmp_path / "stores")
        ids = store.read(0, store.n_tokens)
        return ids[ids != Bytes.eos_id].astype(np.uint8).tobytes(), seen

    built()
    whole = path.read_bytes()
    place = 2**16 + 2**13  # between two samples
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    (folder / "new.txt").write_text("new\n")
    tokens, seen = built()
    assert tokens.count(b"X") == 1
    assert seen < len(whole) + 2**20  # the other file is not tokenized again
    (folder / "newer.txt").write_text("newer\n")
    path.touch()
    tokens, seen = built()
    assert tokens.count(b"X") == 1
    assert seen < 2**20  # it was only touched


def test_file_names_that_are_made_unique_are_unique() -> None:
    assert edits.unique_names(["a", "a", "a (2)", "a", "a (2)", "b"]) == [
        *("a", "a (2)", "a (2) (2)", "a (3)", "a (2) (3)", "b"),
    ]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("why", ["not built here", "too large"])
def test_text_that_is_not_compared_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(f"line {n} of the text\n" for n in range(60_000)))
    [source] = text.resolve_sources([str(path)], unit="line")
    folder = build_store(source, Bytes(), store_dir=tmp_path / "stores").folder
    assert folder is not None
    if why == "not built here":
        monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "of another machine"))
    most_bytes = 10 if why == "too large" else 2**30
    notes: list[str] = []
    for _ in range(2):
        edits.refuse_edited_text(folder, source, built=False, note=notes.append, most_bytes=most_bytes)
    assert not notes
    path.touch()
    for _ in range(2):
        edits.refuse_edited_text(folder, source, built=False, note=notes.append, most_bytes=most_bytes)
    assert len(notes) == 1
    assert "large.txt of the token store" in notes[0]


@pytest.mark.usefixtures("cache")
def test_store_is_verified_on_each_machine(
    tmp_path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path / "text")
    build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    for place in (tmp_path / "other", Path("/proc/nowhere")):  # the second cannot remember anything
        monkeypatch.setenv("LMCORE_CACHE", str(place))
        compared.clear()
        build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
        assert len(compared) > 4


@pytest.mark.parametrize("key", ["bytes", "documents", "records", "empty", "bad_bytes", "part_bytes", "name"])
def test_changed_value_in_a_manifest_is_found(tmp_path: Path, key: str) -> None:
    """Counts too: bits per byte are computed from them."""
    folder = build_store(corpus(tmp_path / "texts"), Bytes(), store_dir=tmp_path / "stores").folder
    assert folder is not None
    manifest = json.loads((folder / MANIFEST).read_text())
    changed = {**manifest, key: f"{manifest[key]}x" if key == "name" else manifest[key] + 1}
    (folder / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(RequestError, match="damaged"):
        TokenStore.open(folder)
    del manifest[HASH]  # a store of an earlier version
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert TokenStore.open(folder).n_bytes == manifest["bytes"]


@pytest.mark.parametrize("change", [{"bytes": 1}, {"bad_places": "x"}, {"record_bytes": None}, {"empty": -1}])
@pytest.mark.parametrize("seal", [True, False])
def test_changed_part_of_an_unfinished_store_is_built_again(
    tmp_path: Path, change: dict[str, Any], seal: bool
) -> None:
    source = corpus(tmp_path / "texts")
    folder = build_store(source, Bytes(), store_dir=tmp_path / "stores").folder
    assert folder is not None
    before = contents(folder)
    (folder / MANIFEST).unlink()
    part = json.loads((folder / "part-000000.json").read_text()) | change
    if seal and change != {"bytes": 1}:  # a number that may be right cannot be told from the right one
        part = sealed(part)
    (folder / "part-000000.json").write_text(json.dumps(part))
    assert contents(build_store(source, Bytes(), store_dir=tmp_path / "stores").folder) == before


@pytest.mark.usefixtures("cache")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "name", [MANIFEST, "part-000000.json", "part-000000.bin", "part-000000.ends", "plan.json"]
)
def test_fifo_in_a_store_is_refused_and_blocks_nobody(tmp_path: Path, name: str, finished: bool) -> None:
    source = corpus(tmp_path / "texts")
    folder = build_store(source, Bytes(), store_dir=tmp_path / "stores").folder
    assert folder is not None
    if not finished:
        (folder / MANIFEST).unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(RequestError, match=f"{name} is neither a file nor a folder: remove it"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores")
    if finished:
        with pytest.raises(RequestError, match=f"{name} is neither a file nor a folder"):
            TokenStore.open(folder)


def test_damaged_parts_of_an_unfinished_store_are_built_again(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text")
    whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    assert store.folder is not None
    (store.folder / MANIFEST).unlink()
    flip(store.folder / "part-000001.bin", at=4)
    (store.folder / "part-000002.json").write_text("{")
    (store.folder / "part-000003.json").write_bytes((store.folder / "part-000004.json").read_bytes())
    notes: list[str] = []
    again = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000, note=notes.append)
    assert contents(again.folder) == contents(whole.folder)
    assert sum("is built again" in line for line in notes) == 3


@pytest.mark.usefixtures("cache")
def test_ids_beyond_the_vocabulary_are_refused_also_where_the_hashes_agree(tmp_path: Path) -> None:
    store = build_store(corpus(tmp_path / "text"), Bytes(), store_dir=tmp_path / "stores")
    assert store.folder is not None
    tokens = store.read(0, store.n_tokens)
    tokens[5] = 257
    tokens.tofile(store.folder / "part-000000.bin")
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()
    manifest = json.loads((store.folder / MANIFEST).read_text())
    manifest["parts"][0]["bin_hash"] = digest
    (store.folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(FaultError, match="holds the token 257, but the tokenizer has only 257 ids"):
        build_store(corpus(tmp_path / "text"), Bytes(), store_dir=tmp_path / "stores")
    with pytest.raises(FaultError, match="holds the token 257"):
        opened(store.folder)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("state", ["finished", "unfinished", "large"])
def test_part_that_this_user_may_not_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    source = corpus(tmp_path / "text")
    folder = build_store(source, Bytes(), store_dir=tmp_path / "stores").folder
    assert folder is not None
    if state == "unfinished":
        (folder / MANIFEST).unlink()
    before = contents(folder)
    (folder / "part-000000.bin").touch()

    def refused(path: Any, *rest: Any) -> Any:  # root may read whatever its mode is
        if str(path).endswith("part-000000.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *rest)

    monkeypatch.setattr(verification, "open", refused, raising=False)
    if state == "large":
        monkeypatch.setattr(verification, "BACKGROUND_BYTES", 10)
        store = build_store(source, Bytes(), store_dir=tmp_path / "stores")
        for thread in threading.enumerate():
            if thread.name == verification.THREAD:
                thread.join()
        with pytest.raises(FaultError, match=r"part-000000\.bin cannot be read: Permission denied"):
            store.read(0, 5)
    else:
        with pytest.raises(RequestError, match=r"part-000000\.bin cannot be read: Permission denied"):
            build_store(source, Bytes(), store_dir=tmp_path / "stores")
    assert contents(folder) == before


@pytest.mark.usefixtures("cache")
def test_damage_found_in_the_background_ends_the_next_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path / "text")
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    monkeypatch.setattr(verification, "BACKGROUND_BYTES", 10)
    assert store.folder is not None
    (store.folder / "part-000000.bin").touch()
    notes: list[str] = []
    good = build_store(source, Bytes(), store_dir=tmp_path / "stores", note=notes.append)
    assert "in the background" in notes[0]
    for thread in threading.enumerate():  # it may have ended already
        if thread.name == verification.THREAD:
            thread.join()
    assert good.read(0, 5).tolist()
    flip(store.folder / "part-000000.bin")
    bad = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    elsewhere = pickle.loads(pickle.dumps(bad))  # in a worker of the data loader
    assert bad._alarm is not None
    wait_for(bad._alarm.exists)
    for one in (bad, elsewhere):
        with pytest.raises(FaultError, match="differs"):
            one.read(0, 5)


def test_two_processes_compare_a_store_once(tmp_path: Path, cache: Path) -> None:
    corpus(tmp_path / "text", 30)
    stores = tmp_path / "stores"
    ranks = [start(tmp_path / "text", stores, worker=rank) for rank in range(2)]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert "done" in out, err
    [memory] = (cache / "stores").glob("*.json")
    assert len(json.loads(memory.read_text())) == len(list(stores.glob("*/part-*.json")))


# ---- names and file systems ----


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".hidden", "..", "a\0b", "a\x1b[31m", "/tmp/x"])
def test_source_name_cannot_leave_the_store_folder(tmp_path: Path, name: str) -> None:
    source = dataclasses.replace(corpus(tmp_path / "text", 2), name=name)
    with pytest.raises(RequestError, match="a source cannot be called"):
        build_store(source, Bytes(), store_dir=tmp_path / "in" / "stores")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


@pytest.mark.parametrize("name", ["日本語 [1] (a)*", "x" * 240, "猫" * 85, "a?b"])
def test_unusual_names_of_sources_are_names_of_stores(tmp_path: Path, name: str) -> None:
    source = dataclasses.replace(corpus(tmp_path / "text", 2), name=name)
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    assert store.name == name
    (tmp_path / "text" / "more.txt").write_text("more")
    [grown] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file"}])
    notes: list[str] = []
    build_store(
        dataclasses.replace(grown, name=name), Bytes(), store_dir=tmp_path / "stores", note=notes.append
    )
    assert "1 file added" in notes[0]


def test_file_system_without_hard_links_gives_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path / "text", 12)
    whole = build_store(source, Bytes(), store_dir=tmp_path / "whole", part_bytes=2000)

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = build_store(source, Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    assert contents(store.folder) == contents(whole.folder)
    (tmp_path / "text" / "zzz.txt").write_text("new " * 600)
    [grown] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])
    tokenizer = Counting()
    build_store(grown, tokenizer, store_dir=tmp_path / "stores")
    assert tokenizer.texts == 1  # the unchanged parts are copied


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"part_bytes": "x"}', b'{"part_bytes": -5}'])
def test_store_plan_left_by_a_kill_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    monkeypatch.setattr(build, "_PLAN_SECONDS", 0.1)
    source = corpus(tmp_path / "text", 2)
    store = build_store(source, Bytes(), store_dir=tmp_path / "whole")
    folder = tmp_path / "stores" / (store.folder.name if store.folder else "")
    folder.mkdir(parents=True)
    (folder / "plan.json").write_bytes(left)
    again = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    assert contents(again.folder) == contents(store.folder)


def test_store_of_a_former_tokenizer_fingerprint_opens(tmp_path: Path) -> None:
    @final
    class Renamed(Counting):
        fingerprint = "new"
        former_fingerprints = ("bytes",)

    source = corpus(tmp_path / "text", 3)
    old = build_store(source, Bytes(), store_dir=tmp_path / "stores")
    tokenizer = Renamed()
    store = build_store(source, tokenizer, store_dir=tmp_path / "stores")
    assert (store.folder, store.fingerprint, tokenizer.texts) == (old.folder, old.fingerprint, 0)


# ---- token files of other programs ----


def opened(path: Path | str, **options: object) -> TokenStore:
    [source] = text.resolve_sources([str(path)])
    tokenizer = Bytes()
    if options:
        tokenizer.__dict__.update(options)
    return build_store(source, tokenizer, store_dir="never-made")


TOKENS = np.array([5, 6, 256, 7, 256, 8, 9, 10, 256])


def test_nanogpt_and_llmc_files(tmp_path: Path) -> None:
    TOKENS.astype("<u2").tofile(tmp_path / "nano.bin")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(TOKENS)
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + TOKENS.astype("<u2").tobytes())
    header[:3] = 20240801, 7, len(TOKENS)
    (tmp_path / "llama3.bin").write_bytes(header.tobytes() + TOKENS.astype("<u4").tobytes())
    TOKENS.astype("<u4").tofile(tmp_path / "wide.bin")
    np.save(tmp_path / "numpy.npy", TOKENS.astype("<u2"))
    TOKENS.astype("<u2").tofile(tmp_path / "olmo.npy")
    for name in ("nano.bin", "llmc.bin", "llama3.bin", "numpy.npy", "olmo.npy"):
        store = opened(tmp_path / name)
        assert store.read(0, store.n_tokens).tolist() == TOKENS.tolist(), name
        assert store.document_ends(0, 9).tolist() == [3, 5, 9]
        assert store.document_ends(3, 8).tolist() == [5]
    assert opened(tmp_path / "wide.bin", vocab_size=70_000).read(0, 9).tolist() == TOKENS.tolist()


def write_megatron(path: Path, lengths: list[int], code: int, dtype: str, documents: list[int]) -> None:
    TOKENS.astype(dtype).tofile(path.with_suffix(".bin"))
    width = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * width
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    path.write_bytes(
        head
        + np.array(lengths, dtype="<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(documents, dtype="<i8").tobytes()
    )


def test_megatron_and_datatrove_files_know_their_documents(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m.idx", [3, 2, 4], 8, "<u2", [0, 1, 2, 3])
    write_megatron(tmp_path / "n.idx", [2, 3, 4], 4, "<i4", [0, 1, 2, 3])
    store = opened(tmp_path / "m.bin")
    assert store.read(0, 9).tolist() == TOKENS.tolist()
    assert store.document_ends(0, 9).tolist() == [3, 5, 9]
    both = opened(tmp_path / "m.*")
    assert both.fingerprint != store.fingerprint or both.n_tokens == store.n_tokens
    assert opened(tmp_path / "n.bin").document_ends(0, 9).tolist() == [2, 5, 9]  # the index, not the tokens
    write_megatron(tmp_path / "parts.idx", [1, 2, 2, 4], 8, "<u2", [0, 2, 3, 4])
    assert opened(tmp_path / "parts.bin").document_ends(0, 9).tolist() == [3, 5, 9]
    TOKENS.astype("<u2").tofile(tmp_path / "d.ds")
    np.array([4, 9], dtype="<u8").tofile(tmp_path / "d.ds.index")
    assert opened(tmp_path / "d.ds").document_ends(0, 9).tolist() == [4, 9]


def test_token_store_is_a_source(tmp_path: Path) -> None:
    store = build_store(corpus(tmp_path / "text"), Bytes(), store_dir=tmp_path / "stores", part_bytes=2000)
    again = opened(f"{store.folder}/*.bin")
    assert again.fingerprint == store.fingerprint
    with pytest.raises(RequestError, match=r"tokenizer\.path"):
        opened(f"{store.folder}/*.bin", fingerprint="other")


def test_damaged_and_mixed_token_files_are_refused(tmp_path: Path) -> None:
    TOKENS.astype("<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype="<u2"))
    np.save(tmp_path / "wide.npy", TOKENS.astype("<u4"))
    (tmp_path / "bad.bin").write_bytes(b"12")
    (tmp_path / "bad.idx").write_bytes(b"nonsense")
    write_megatron(tmp_path / "torn.idx", [3, 2, 4], 8, "<u2", [0, 1, 2, 3])
    (tmp_path / "torn.idx").write_bytes((tmp_path / "torn.idx").read_bytes()[:50])
    write_megatron(tmp_path / "float.idx", [3, 2, 4], 6, "<u2", [0, 1, 2, 3])
    (tmp_path / "alone.idx").write_bytes(b"")
    TOKENS.astype("<u2").tofile(tmp_path / "d.ds")
    (tmp_path / "empty.bin").write_bytes(b"")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, -1
    (tmp_path / "minus.bin").write_bytes(header.tobytes() + TOKENS.astype("<u2").tobytes())
    header[2] = 99
    (tmp_path / "more.bin").write_bytes(header.tobytes() + TOKENS.astype("<u2").tobytes())
    write_megatron(tmp_path / "negative.idx", [9, 4, -4], 8, "<u2", [0, 1, 2, 3])
    write_megatron(tmp_path / "less.idx", [3, 2, 4], 8, "<u2", [0, 1, 2, 3])
    (tmp_path / "less.bin").write_bytes(b"12")
    np.save(tmp_path / "cut.npy", TOKENS.astype("<u2"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-4])
    (tmp_path / "head.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:20])
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "zero.npy", np.array(5, dtype="<u2"))
    for name, words in {
        "odd.bin": "whole number",
        "square.npy": "one row",
        "bad.bin": "MMIDIDX",
        "torn.bin": "shorter",
        "float.bin": "type 6",
        "alone.idx": "missing",
        "d.ds": "beside",
        "empty.bin": "no tokens",
        "minus.bin": "says -1 tokens, but the file holds 9",
        "more.bin": "says 99 tokens",
        "negative.bin": "a sequence of -4 tokens",
        "less.bin": "2 bytes for the 9 tokens",
        "cut.npy": "not a numpy array",
        "head.npy": "not a numpy array",
        "objects.npy": "not a numpy array",
        "zero.npy": "one row",
        "[aw]*[ie].[bn]*": "",
    }.items():
        if words:
            with pytest.raises(RequestError, match=words):
                opened(tmp_path / name)
    [source] = text.resolve_sources([{"paths": [str(tmp_path / "a.bin"), str(tmp_path / "wide.npy")]}])
    with pytest.raises(RequestError, match=r"different widths"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores")
    [source] = text.resolve_sources([str(tmp_path / "a.bin")])
    with pytest.raises(RequestError, match=r"cannot be split"):
        build_store(source, Bytes(), store_dir=tmp_path / "stores", split=("train", 0.1))
    (tmp_path / "b.txt").write_text("text")
    mixed = dataclasses.replace(source, paths=(*source.paths, str(tmp_path / "b.txt")))
    with pytest.raises(RequestError, match=r"two sources"):
        build_store(mixed, Bytes(), store_dir=tmp_path / "stores")


def test_foreign_tokens_beyond_the_vocabulary_are_a_fault(tmp_path: Path) -> None:
    np.array([1, 2, 300, 4], dtype="<u2").tofile(tmp_path / "a.bin")
    store = opened(tmp_path / "a.bin")
    assert store.read(0, 2).tolist() == [1, 2]
    with pytest.raises(FaultError, match=r"token 300 .* another tokenizer"):
        store.read(1, 3)
    np.save(tmp_path / "b.npy", np.array([1, -2, 3], dtype="<i4"))
    with pytest.raises(FaultError, match=r"token -2 .* another tokenizer"):
        opened(tmp_path / "b.npy").read(0, 3)


def test_store_finished_by_one_rank_under_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks write the same manifest; the first to be done takes the other's file from under it."""
    source = corpus(tmp_path / "text", 4)
    stores = tmp_path / "stores"
    commit, rival = build.commit, []

    def robbed(path: Path, data: bytes) -> None:
        if path.name == "manifest.json" and not rival:
            rival.append(path)
            commit(path, data)  # the other rank is quicker, and removes what this one had laid aside
            raise FileNotFoundError(2, "No such file or directory", str(path))
        commit(path, data)

    monkeypatch.setattr(build, "commit", robbed)
    store = build_store(source, Bytes(), store_dir=stores, part_bytes=2000)
    assert rival
    assert store.n_documents == 4


# ---- which stores are there, and which are used ----


def test_stores_that_no_run_uses_are_listed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = tmp_path / "stores"
    source = corpus(tmp_path / "text")
    used = build_store(source, Bytes(), store_dir=stores)
    former = build_store(source, Bytes(), store_dir=stores, eos=False)
    unused = build_store(source, Bytes(), store_dir=stores, split=("train", 0.5))
    assert used.folder is not None
    assert unused.folder is not None
    (tmp_path / "runs" / "a").mkdir(parents=True)
    record_use(tmp_path / "runs" / "a", [used.folder])
    # A run of version 0.1.0: its checkpoint names the training stores by name and fingerprint.
    state = tmp_path / "runs" / "old" / "checkpoints" / "step-00000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"cursor": {"fingerprint": f"[{former.name}:{former.fingerprint[:16]}]"}}))
    (stores / "something else").mkdir()
    unfinished = stores / "b-0123"
    unfinished.mkdir()
    (unfinished / "plan.json").write_text("{}")
    building = stores / "c-0123"
    building.mkdir()
    (building / "plan.json").write_text("{}")
    (building / "part-000000.claim").write_text("{}")

    found = {store.folder: store for store in list_stores(stores, runs=[tmp_path / "runs"])}
    assert set(found) == {used.folder, former.folder, unused.folder, unfinished, building}
    assert found[used.folder].used_by == (tmp_path / "runs" / "a",)
    assert former.folder is not None
    assert found[former.folder].used_by == (tmp_path / "runs" / "old",)
    assert found[unused.folder].used_by == ()
    assert found[used.folder].n_tokens == used.n_tokens
    assert (found[unfinished].n_tokens, found[unfinished].reason) == (None, "not finished")
    with pytest.raises(RequestError, match="is being built"):
        remove_store(found[building])

    words = ["stores", "--store_dir", str(stores), "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "unused" in listed[unused.folder.name]
    assert "old" in listed[former.folder.name]
    assert main([*words, "--remove", unused.folder.name[:-1]]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main([*words, "--remove", "unused"]) == 0
    assert sorted(path for path in stores.iterdir()) == sorted(
        [used.folder, former.folder, building, stores / "something else"]
    )
    assert main([*words, "--remove", "unused"]) == 0
    assert "every store is used" in capsys.readouterr().out
