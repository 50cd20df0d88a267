"""Checkpoints in a bucket: whole or not there, found by more than a listing, every flipped bit found."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lmcore.checkpoint.manifest import Damaged, step_name, verify
from lmcore.checkpoint.reader import open_checkpoint
from lmcore.checkpoint.remote import RemoteCheckpoints
from lmcore.checkpoint.retention import kept_steps
from lmcore.storage import Store
from tests.support.checkpoints import checkpoints
from tests.support.small_checkpoints import Killed, kill_at, same, save


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield Store(f"memory://{tmp_path.name}/run", attempts=2, sleep=lambda _: None)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def remote(store: Store, tmp_path: Path) -> RemoteCheckpoints:
    return RemoteCheckpoints(store, scratch=tmp_path / "scratch", note=lambda _: None)


def test_checkpoint_goes_to_the_bucket_and_back(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    here = save(tmp_path / "a", 10)
    manifest = remote.put(here)
    assert remote.manifests() == {10: manifest}
    assert same(here, remote.fetch(10, tmp_path / "b"))
    with open_checkpoint(tmp_path / "b" / step_name(10)) as opened:
        assert opened.step == 10


def test_bucket_holds_a_folder_that_is_a_checkpoint_as_it_is(
    remote: RemoteCheckpoints, store: Store, tmp_path: Path
) -> None:
    remote.put(save(tmp_path / "a", 10))
    fsspec.filesystem("memory").get(
        store.path(f"checkpoints/{step_name(10)}"), str(tmp_path / "copy/"), recursive=True
    )
    [copied] = tmp_path.glob("copy/**/manifest.json")
    shutil.move(copied.parent, tmp_path / step_name(10))
    verify(tmp_path / step_name(10), content=True)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_request_there_is_the_old_checkpoint_or_the_new_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    old, new = save(tmp_path / "a", 10), save(tmp_path / "b", 10, branch=1)
    before = save(tmp_path / "a", 5)
    for number in itertools.count():
        remote = RemoteCheckpoints(store, scratch=tmp_path / "scratch", note=lambda _: None)
        for path in (before, old):
            remote.put(path)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number, after=after)
            try:
                remote.put(new)
            except Killed:
                pass
            else:
                assert number >= 6
                assert calls() == number
                break
        found = RemoteCheckpoints(store, scratch=tmp_path / "scratch", note=lambda _: None)
        steps = found.manifests()
        assert 5 in steps
        for step in steps:
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            got = found.fetch(step, tmp_path / "c")  # every byte is compared: never one of mixed files
            assert any(same(got, path) for path in (before, old, new))
    assert same(remote.fetch(10, tmp_path / "d"), new)


def test_listing_that_is_out_of_date_hides_nothing(
    remote: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put(save(tmp_path / "a", 10))
    remote.put(save(tmp_path / "a", 20))
    monkeypatch.setattr(Store, "names", lambda *_: [])
    assert list(remote.manifests()) == [10, 20]


def test_listing_that_shows_what_was_removed_is_not_believed(
    remote: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        remote.put(save(tmp_path / "a", step))
    names = remote.store.names("checkpoints")
    remote.remove(10)
    monkeypatch.setattr(Store, "names", lambda *_: names)
    assert list(remote.manifests()) == [20]


def test_killed_while_it_is_removed_a_checkpoint_is_whole_or_gone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = save(tmp_path / "a", 10)
    for number in itertools.count():
        remote = RemoteCheckpoints(store, scratch=tmp_path / "scratch", note=lambda _: None)
        remote.put(here)
        with monkeypatch.context() as patch:
            kill_at(patch, number, after=False)
            try:
                remote.remove(10)
            except Killed:
                pass
            else:
                break
        if remote.manifests():
            shutil.rmtree(tmp_path / "b", ignore_errors=True)
            assert same(here, remote.fetch(10, tmp_path / "b"))
    assert number >= 4
    assert [name for name in store.names() if "step-" in name] == []


def test_every_flipped_bit_is_found(remote: RemoteCheckpoints, store: Store, tmp_path: Path) -> None:
    here = save(tmp_path / "a", 10)
    remote.put(here)
    draw = random.Random(0)
    for name in sorted(path.name for path in here.iterdir()):
        data = (here / name).read_bytes()
        for _ in range(60):
            place = draw.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            store.write(f"checkpoints/{step_name(10)}/{name}", bytes(flipped))
            with pytest.raises(Damaged):
                remote.fetch(10, tmp_path / "b")
            assert not (tmp_path / "b" / step_name(10)).exists()
        store.write(f"checkpoints/{step_name(10)}/{name}", data)
    assert same(here, remote.fetch(10, tmp_path / "b"))


def test_byte_that_flips_on_the_way_is_read_again(
    remote: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = save(tmp_path / "a", 10)
    remote.put(here)
    real, seen = Store.download, set()

    def download(self: Store, name: str, path: Path) -> None:
        real(self, name, path)
        if name not in seen:
            seen.add(name)
            path.write_bytes(b"\0" + path.read_bytes()[1:])

    monkeypatch.setattr(Store, "download", download)
    assert same(here, remote.fetch(10, tmp_path / "b"))


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_manifest_and_index_whose_bytes_flip_on_the_way_are_read_again(
    remote: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """Each of their objects comes back wrong so many times: nothing is set aside, hidden or called damaged."""
    here = save(tmp_path / "a", 10)
    remote.put(here)
    real, seen = Store.read, Counter[str]()

    def read(self: Store, name: str) -> bytes:
        data, seen[name] = real(self, name), seen[name] + 1
        place = len(data) // 2
        return data if seen[name] % 4 >= wrong + 1 or seen[name] % 4 == 0 else flip(data, place)

    def flip(data: bytes, place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    monkeypatch.setattr(Store, "read", read)
    monkeypatch.setattr(Store, "names", lambda *_: [])  # the listing is of an earlier moment, too
    assert list(remote.manifests()) == [10]
    assert same(here, remote.fetch(10, tmp_path / "b"))
    assert seen["checkpoints/index.json"] > 1


def test_what_is_set_aside_is_no_checkpoint_and_is_not_lost(
    remote: RemoteCheckpoints, store: Store, tmp_path: Path
) -> None:
    for number in (1, 2):
        here = save(tmp_path / str(number), 10, branch=number)
        remote.put(here)
        remote.set_aside(10, "abandoned", "newer than step 5, which is resumed")
        assert remote.manifests() == {}
        kept = store.read(f"checkpoints/{step_name(10)}/{number}.abandoned.json")
        assert kept == (here / "manifest.json").read_bytes()


def test_metrics_that_come_late_replace_the_manifest_alone(
    remote: RemoteCheckpoints, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = save(tmp_path / "a", 10)
    remote.put(here)
    saves = checkpoints(tmp_path / "a", keep=9, background=False)
    saves.record(10, {"loss": 1.5})
    saves.wait(final=True)
    monkeypatch.setattr(Store, "upload", lambda *_: pytest.fail("a file was put again"))
    assert remote.put(here)["metrics"] == {"loss": 1.5}
    assert remote.manifests()[10]["metrics"] == {"loss": 1.5}


def test_retention_keeps_the_newest_the_best_and_the_regular() -> None:
    known = {
        5: ("interval", {"loss": 1.0}),
        10: ("interval", {"loss": 3.0}),
        15: ("signal", {"loss": 2.0}),
        20: ("interval", {"loss": float("nan")}),
    }
    assert kept_steps(known, keep=1) == ({20}, None)
    assert kept_steps(known, keep=2) == ({10, 20}, None)
    best = {"k": 1, "metric": "loss", "mode": "min"}
    assert kept_steps(known, keep=1, keep_best=best) == ({5, 20}, 5)
    # The loss of step 5 is of another text; where none is of this one yet, what was best stays.
    assert kept_steps(known, keep=1, keep_best=best, measured_after=5) == ({15, 20}, 15)
    assert kept_steps(known, keep=1, keep_best=best, measured_after=15) == ({5, 20}, 5)
    assert kept_steps(known, keep=1, keeps=lambda step: step % 5 == 0) == ({5, 10, 15, 20}, None)
    assert kept_steps({5: ("interval", {}), 7: ("signal", {})}, keep=1) == ({5, 7}, None)
    assert kept_steps({}, keep=1) == (set(), None)
