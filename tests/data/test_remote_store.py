"""Token stores in a bucket: built once, by many machines, and read on others through verified copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lmcore.cli.main import main
from lmcore.data.store import remote
from lmcore.data.store.build import build_store
from lmcore.data.store.manifest import sealed
from lmcore.data.store.remote import RemoteFolder, local_store_dir
from lmcore.data.store.store import MANIFEST, TokenStore
from lmcore.data.text import documents as text
from lmcore.errors import FaultError, RequestError
from lmcore.storage import Store, StoreError
from tests.support.data import Bytes
from tests.support.s3_server import Faults, Server, serving

ROOT = Path(__file__).resolve().parents[2]
PART_BYTES = 2000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(params=["memory", "s3"])
def url(request: Any, tmp_path: Path) -> Iterator[str]:
    """``data.store_dir``: an empty one for each test."""
    if request.param == "s3":
        request.getfixturevalue("server")
        yield f"s3://bucket/{tmp_path.name}/stores"
        return
    yield f"memory://{tmp_path.name}/stores"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on this is the machine of that name: its cache is its disk."""

    def be(name: str) -> None:
        monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "machines" / name))

    be("one")
    return be


@pytest.fixture
def source(tmp_path: Path) -> text.Source:
    """Twelve files of one document each."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:03}.txt").write_text(" ".join(f"{number}.{place} 文" for place in range(110)))
    return text.resolve_sources([{"path": str(folder), "unit": "file", "name": "small"}])[0]


class Refusing(Bytes):
    """Fails at the first text: nothing may be tokenized."""

    def encode_batch(self, texts):
        raise AssertionError(f"{len(texts)} texts are tokenized")


def build(source: text.Source, store_dir: str | Path, tokenizer: Any = None, **options: Any) -> TokenStore:
    return build_store(source, tokenizer or Bytes(), store_dir=store_dir, part_bytes=PART_BYTES, **options)


def files_of(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def objects_of(url: str, folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    store = Store(f"{url}/{folder.name}")
    return {name: store.read(name) for name in store.names()}


def tokens(store: TokenStore) -> list[int]:
    return store.read(0, store.n_tokens).tolist()


def test_store_in_a_bucket_is_that_of_the_disk(
    url: str, machine: Callable[[str], None], source: text.Source, tmp_path: Path
) -> None:
    # Memory is of one process; the bucket is filled by tokenizing processes.
    here, there = build(source, tmp_path / "stores"), build(source, url, processes=1 + url.startswith("s3"))
    assert len(here.manifest["parts"]) > 4
    assert files_of(there.folder) == files_of(here.folder) == objects_of(url, there.folder)
    assert there.folder is not None
    assert there.folder.is_relative_to(tmp_path / "machines" / "one")


def test_machine_with_an_empty_disk_tokenizes_nothing(
    url: str, machine: Callable[[str], None], source: text.Source
) -> None:
    first = build(source, url)
    machine("two")
    notes: list[str] = []
    second = build(source, url, Refusing(), note=notes.append)
    assert second.folder != first.folder
    assert tokens(second) == tokens(first)
    assert any("downloaded" in line for line in notes)
    whole = files_of(first.folder)
    del whole["plan.json"]
    assert files_of(second.folder) == whole


def test_copy_that_is_there_is_not_read_again(
    url: str, machine: Callable[[str], None], source: text.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, url)
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(Store, "upload", lambda *_: pytest.fail("written again"))
    build(source, url, Refusing(), worker=0)
    build(source, url, Refusing(), worker=1)


def test_copy_does_without_a_bucket_that_does_not_answer(
    url: str, machine: Callable[[str], None], source: text.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, url)

    def refuse(*_: object) -> None:
        raise StoreError("SlowDown")

    monkeypatch.setattr(Store, "info", refuse)
    monkeypatch.setattr(Store, "read", refuse)
    notes: list[str] = []
    build(source, url, Refusing(), note=notes.append)
    assert "SlowDown" in notes[0]
    machine("two")
    with pytest.raises(FaultError, match="SlowDown"):
        build(source, url, Refusing())


@pytest.mark.parametrize("suffix", [".bin", ".ends"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "missing"])
def test_damaged_object_is_refused_by_its_name_and_can_be_built_again(
    machine: Callable[[str], None], source: text.Source, tmp_path: Path, damage: str, suffix: str
) -> None:
    url = f"memory://{tmp_path.name}/stores"
    first = build(source, url)
    before = objects_of(url, first.folder)
    assert first.folder is not None
    store, name = Store(f"{url}/{first.folder.name}"), f"part-000002{suffix}"
    data = store.read(name)
    if damage == "flipped":
        store.write(name, data[:3] + bytes([data[3] ^ 1]) + data[4:])
    elif damage == "cut off":
        store.write(name, data[:-2])
    else:
        store.remove(name)
    machine("two")
    for _ in range(2):
        with pytest.raises(FaultError, match=rf"{store.url}/part-000002\{suffix} is (damaged|missing)"):
            build(source, url, Refusing())
    for name in ("part-000002.json", MANIFEST):  # as the message says
        store.remove(name)
    assert tokens(build(source, url)) == tokens(first)
    assert objects_of(url, first.folder) == before


@pytest.mark.parametrize("change", ["a bit", "another store", "a file outside"])
def test_damaged_manifest_is_refused_by_its_name(
    machine: Callable[[str], None], source: text.Source, tmp_path: Path, change: str
) -> None:
    url = f"memory://{tmp_path.name}/stores"
    folder = build(source, url).folder
    assert folder is not None
    store = Store(f"{url}/{folder.name}")
    data = store.read(MANIFEST)
    if change == "a bit":
        data = data.replace(b'"tokens": ', b'"tokens": 1', 1)
    elif change == "another store":
        other = build(source, tmp_path / "other", eos=False).folder
        assert other is not None
        data = (other / MANIFEST).read_bytes()
    else:
        manifest = json.loads(data)
        manifest["parts"][0]["file"] = "../part-000000"
        data = json.dumps(sealed(manifest)).encode()
    store.write(MANIFEST, data)
    machine("two")
    with pytest.raises(RequestError, match=r"manifest\.json|cannot be a name"):
        build(source, url, Refusing())
    assert not list((tmp_path / "machines" / "two").rglob("part-*.bin"))


def test_wiped_cache_is_filled_again_and_an_emptied_bucket_too(
    url: str, machine: Callable[[str], None], source: text.Source
) -> None:
    first = build(source, url)
    expected, objects = tokens(first), objects_of(url, first.folder)
    assert first.folder is not None
    shutil.rmtree(local_store_dir(url))
    assert tokens(build(source, url, Refusing())) == expected
    store = Store(f"{url}/{first.folder.name}")
    for name in store.names():
        store.remove(name)
    notes: list[str] = []
    build(source, url, Refusing(), note=notes.append)
    assert any("it is uploaded" in line for line in notes)
    del objects["plan.json"]  # that of a build
    assert objects_of(url, first.folder) == objects


def test_changed_text_gives_another_store_and_unchanged_parts_are_taken_over(
    url: str, machine: Callable[[str], None], source: text.Source, tmp_path: Path
) -> None:
    first = build(source, url)
    (tmp_path / "text" / "012.txt").write_text("something more")
    [grown] = text.resolve_sources([{"path": str(tmp_path / "text"), "unit": "file", "name": "small"}])

    class Counting(Bytes):
        texts = 0

        def encode_batch(self, texts):
            self.texts += len(texts)
            return super().encode_batch(texts)

    tokenizer = Counting()
    second = build(grown, url, tokenizer)
    assert tokenizer.texts < 12
    assert tokens(second)[: first.n_tokens - 300] == tokens(first)[:-300]
    assert objects_of(url, second.folder) == files_of(second.folder)
    machine("two")
    assert tokens(build(grown, url, Refusing())) == tokens(second)


def worker(folder: Path, url: str, cache: Path, number: int, seconds: float) -> subprocess.Popen[str]:
    """A machine that builds the store, at so many seconds for each text."""
    code = f"""
        from lmcore.data.store import remote
        from lmcore.data.store.build import build_store
        from lmcore.data.text import documents
        from tests.support.data import SlowBytes
        remote.LOOK_SECONDS, remote.BEAT_SECONDS, remote.STALE_SECONDS = 0.2, 0.3, 2.0
        remote._is_of_dead_process = lambda claim: False  # it is another machine's
        [source] = documents.resolve_sources([{{"path": {str(folder)!r}, "unit": "file", "name": "small"}}])
        built = build_store(source, SlowBytes({seconds}), store_dir={url!r}, part_bytes={PART_BYTES}, worker={number})
        print(built.folder)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LMCORE_CACHE": str(cache)},
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_machines_share_the_work_and_survive_one_that_vanishes(
    server: Server, source: text.Source, tmp_path: Path
) -> None:
    whole = build(source, tmp_path / "whole")
    assert whole.folder is not None
    url = f"s3://bucket/{tmp_path.name}/stores"
    store = Store(f"{url}/{whole.folder.name}")
    vanishing = worker(tmp_path / "text", url, tmp_path / "machines" / "0", 0, 600.0)
    wait_for(lambda: any(name.endswith(".claim") for name in store.names()))
    vanishing.kill()
    vanishing.communicate()
    others = [worker(tmp_path / "text", url, tmp_path / "machines" / f"{n}", n, 0.2) for n in (1, 2)]
    folders = []
    for process in others:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        folders.append(Path(out.strip()))
    for folder in folders:
        assert files_of(folder) == files_of(whole.folder)
    assert objects_of(url, whole.folder) == files_of(whole.folder)


def test_two_processes_of_a_machine_download_once(
    server: Server, source: text.Source, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}/stores"
    first = worker(tmp_path / "text", url, tmp_path / "machines" / "0", 0, 0.0)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    n_files = len(list(Path(out.strip()).glob("part-*.bin"))) * 2
    server.requests.clear()
    both = [worker(tmp_path / "text", url, tmp_path / "machines" / "1", n, 600.0) for n in (0, 1)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert (
        n_files <= server.requests["GET"] <= n_files + 2
    )  # and the manifest; the second looks for it at most


def test_a_store_costs_the_requests_that_the_docs_say(
    server: Server, machine: Callable[[str], None], source: text.Source, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}/stores"
    server.requests.clear()
    n_parts = len(build(source, url).manifest["parts"])
    assert (server.requests["PUT"], server.requests["DELETE"]) == (4 * n_parts + 2, n_parts)
    machine("two")
    server.requests.clear()
    build(source, url)
    assert server.requests == {"GET": 2 * n_parts + 1, "HEAD": 1}
    server.requests.clear()
    build(source, url)
    assert server.requests == {"HEAD": 1}


def test_store_is_built_and_read_through_faults(
    server: Server, machine: Callable[[str], None], source: text.Source, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = build(source, tmp_path / "whole")
    url = f"s3://bucket/{tmp_path.name}/stores"
    kinds = ("500", "503", "lost", "torn_put", "short_put", "torn_get", "flipped_get", "stale_list")
    defaults = Store.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "attempts", 20)
    monkeypatch.setitem(defaults, "sleep", lambda seconds: time.sleep(0.01))
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.0)
    server.faults = Faults(seed=1, share=0.1, kinds=kinds)
    try:
        assert tokens(build(source, url)) == tokens(whole)
        machine("two")
        assert tokens(build(source, url, Refusing())) == tokens(whole)
    finally:
        done, server.faults = server.faults.done, None
    assert len(done) >= 5
    assert objects_of(url, whole.folder) == files_of(whole.folder)


def test_place_of_the_copies_is_named_where_nothing_can_be_written(
    source: text.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"set \$LMCORE_CACHE to another place"):
        build(source, f"memory://{tmp_path.name}/stores")


@pytest.mark.parametrize(
    ("store_dir", "words"),
    [("s3://key:word@bucket/x", "credentials"), ("s4://bucket/x", "unknown scheme"), ("s3://", "no bucket")],
)
def test_wrong_urls_are_refused(source: text.Source, store_dir: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        build(source, store_dir)


def test_copies_are_listed_and_removed(
    machine: Callable[[str], None], source: text.Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{tmp_path.name}/stores"
    folder = build(source, url).folder
    assert folder is not None
    assert main(["stores", "--store_dir", url, "--runs", str(tmp_path)]) in (0, None)
    assert folder.name in capsys.readouterr().out
    main(["stores", "--store_dir", url, "--runs", str(tmp_path), "--remove", "unused"])
    assert not folder.exists()
    assert RemoteFolder(f"{url}/{folder.name}", folder).exists
