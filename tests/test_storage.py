"""The store: names, errors, tries, conditional creation; against an S3 server with faults and fsspec's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcore import storage
from lmcore.errors import RequestError
from lmcore.storage import Store, StoreError, check_url, is_url
from tests.support.s3_server import Faults, Server, serving


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    yield shared_server
    shared_server.faults, shared_server.down = None, False


def quick(url: str, attempts: int = 12) -> Store:
    return Store(url, attempts=attempts, sleep=lambda _: None)


@pytest.fixture(params=["s3", "memory", "file"])
def store(request: Any, server: Server, tmp_path: Path) -> Store:
    place = {"s3": "s3://bucket/x", "memory": f"memory://{tmp_path.name}/x", "file": f"file://{tmp_path}/x"}
    return quick(f"{place[request.param]}/{request.node.name.split('[')[0]}")


def test_objects_are_written_read_listed_and_removed(store: Store, tmp_path: Path) -> None:
    assert store.names() == []
    store.write("a/b.json", b"1")
    store.write("a/b.json", b"22")
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    store.upload(tmp_path / "file", "c.bin")
    assert store.names() == ["a/b.json", "c.bin"]
    assert store.names("a") == ["a/b.json"]
    assert store.read("a/b.json") == b"22"
    store.download("c.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 100_000
    info = store.info("c.bin")
    assert info is not None
    assert info.n_bytes == 100_000
    store.remove("c.bin")
    store.remove("c.bin")
    assert store.info("c.bin") is None
    for call in (lambda: store.read("c.bin"), lambda: store.download("c.bin", tmp_path / "none")):
        with pytest.raises(FileNotFoundError):
            call()


def test_version_changes_with_the_object(store: Store) -> None:
    store.write("a", b"one")
    before = store.info("a")
    store.write("a", b"two")
    assert store.info("a") != before


def test_of_two_creations_one_succeeds(store: Store) -> None:
    assert store.exclusive
    assert store.create("lease", b"first")
    assert not store.create("lease", b"second")
    assert store.read("lease") == b"first"


def test_creation_whose_answer_was_lost_has_succeeded(server: Server) -> None:
    class LostOnce(Faults):
        def __call__(self, method: str, path: str, *, is_list: bool) -> str | None:
            return "lost" if method == "PUT" and not self.done["lost"] else None

    server.faults = LostOnce(seed=0, share=1)
    assert quick("s3://bucket/lost").create("lease", b"mine")
    assert server.faults.done["lost"] == 1


def test_own_creation_is_recognized_though_its_answer_was_lost_and_its_content_came_back_wrong(
    server: Server,
) -> None:
    class LostAndFlipped(Faults):
        def __call__(self, method: str, path: str, *, is_list: bool) -> str | None:
            kind = {"PUT": "lost", "GET": "flipped_get"}.get(method)
            return kind if kind and not self.done[kind] else None

    server.faults = LostAndFlipped(seed=0, share=1)
    assert quick("s3://bucket/flipped").create("lease", b"mine")
    assert server.faults.done == {"lost": 1, "flipped_get": 1}


def test_creation_beside_an_object_that_is_being_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = quick(f"memory://{tmp_path.name}")
    store.write("claim", b"of another")
    real = type(store._fs).pipe_file

    def removed_meanwhile(fs: Any, path: str, data: bytes, **options: Any) -> None:
        try:
            real(fs, path, data, **options)
        except FileExistsError:
            fs.rm_file(path)
            raise

    monkeypatch.setattr(type(store._fs), "pipe_file", removed_meanwhile)
    assert store.create("claim", b"mine")
    assert store.read("claim") == b"mine"


def test_every_injected_fault_is_survived(server: Server, tmp_path: Path) -> None:
    # A fault in half of the requests; flips are not in it: they are found by the hashes of whoever reads.
    kinds = ("500", "503", "lost", "torn_put", "short_put", "torn_get")
    server.faults = Faults(seed=2, share=0.5, kinds=kinds)
    store = quick("s3://bucket/faults", attempts=60)
    for number in range(20):
        (tmp_path / "file").write_bytes(bytes([number]) * 3000)
        store.upload(tmp_path / "file", f"{number}.bin")
        store.download(f"{number}.bin", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == bytes([number]) * 3000
    assert sum(server.faults.done.values()) > 20
    server.faults = None
    assert store.names() == sorted(f"{number}.bin" for number in range(20))


def test_store_that_does_not_answer_is_named_after_all_tries(server: Server) -> None:
    waits: list[float] = []
    server.down = True
    store = Store("s3://bucket/down", attempts=3, sleep=waits.append)
    with pytest.raises(StoreError, match=r"s3://bucket/down: cannot write a: .*"):
        store.write("a", b"1")
    assert waits == [0.5, 1]


def test_bucket_that_is_not_there_is_an_error(server: Server) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        quick("s3://another/x").write("a", b"1")


def test_missing_driver_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RequestError, match=r"gs:// needs the package gcsfs.*pip install gcsfs"):
        Store("gs://bucket/run")


def test_driver_that_drops_the_condition_of_a_put_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "version", {"s3fs": "2024.10.0"}.__getitem__)
    storage._refuse_old.cache_clear()
    with pytest.raises(
        RequestError, match=r"s3fs 2024\.12 or newer \(found 2024\.10\.0\).*pip install --upgrade s3fs"
    ):
        Store("s3://bucket/run")
    for later in ("2024.12.0", "2025.2.0", "2026.9.0.post1"):
        monkeypatch.setattr(storage, "version", {"s3fs": later}.__getitem__)
        storage._refuse_old.cache_clear()
        Store("s3://bucket/run")


@pytest.mark.parametrize("url", ["s3://key:verysecret@bucket/run", "s3://bucket/run?sig=verysecret"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RequestError, match="credentials") as refusal:
        check_url(url, "run_dir")
    assert "verysecret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s4://bucket/x", "unknown scheme"),
        ("s3://", "no bucket"),
        ("s3://b/../c", "part"),
        ("x", "not a URL"),
    ],
)
def test_wrong_url_is_refused(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_url(url)


def test_paths_are_not_urls() -> None:
    assert is_url("s3://bucket/x")
    for path in ("runs/x", "/abs/x", "C:\\x", "a:b", None, 3):
        assert not is_url(path)


def test_every_driver_can_be_had_by_its_name() -> None:
    assert storage.DRIVERS.keys() >= {"s3", "gs", "az", "hf", "memory", "file"}
