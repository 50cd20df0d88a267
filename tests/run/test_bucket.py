"""A run folder in a bucket: what another machine finds there at any moment, and what it does with its own disk."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lmcore.checkpoint.manifest import committed, step_name, step_of
from lmcore.checkpoint.reader import find
from lmcore.checkpoint.remote import RemoteCheckpoints
from lmcore.errors import FaultError, RequestError
from lmcore.run import bucket as buckets
from lmcore.run.bucket import Bucket
from lmcore.run.folder import local_run_dir
from lmcore.run.lease import Lease
from lmcore.storage import Store, StoreError
from tests.support.checkpoints import checkpoints
from tests.support.s3_server import serving
from tests.support.small_checkpoints import Killed, kill_at, same, save


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(buckets, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(buckets, "LONGEST_WAIT_SECONDS", 0.05)
    yield f"memory://{tmp_path.name}/run"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


def bucket_of(url: str, local: Path, notes: list[str] | None = None, **options: Any) -> Bucket:
    """A run on a machine of its own."""
    store = Store(url, attempts=2, sleep=lambda _: None)
    said = notes if notes is not None else []
    lease = Lease(store, note=said.append, beat_seconds=0.1, silent_beats=2)
    lease.holder |= {"host": local.name, "boot": local.name, "job_id": None}
    return Bucket(url, local, store=store, lease=lease, note=said.append, **options)


def opened(url: str, local: Path, notes: list[str] | None = None, **options: Any) -> Bucket:
    """As a run starts: what it resumes from lies in the local folder."""
    bucket = bucket_of(url, local, notes, **options)
    bucket.open()
    bucket.fetch("auto")
    newest = [step_of(path) for path in committed(local / "checkpoints")][-1:]
    bucket.abandon_after(newest[0] if newest else -1)
    return bucket


def steps_there(url: str, tmp_path: Path) -> list[int]:
    store = Store(url, attempts=2, sleep=lambda _: None)
    return list(RemoteCheckpoints(store, scratch=tmp_path / "look", note=lambda _: None).manifests())


def vanish(bucket: Bucket) -> None:
    """The machine is gone: no beat, no release."""
    bucket._closing.set()
    bucket._lease._stop.set()
    if bucket._thread is not None:
        bucket._thread.join()


def test_another_machine_with_an_empty_disk_goes_on(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one")
    first.start()
    save(tmp_path / "one/checkpoints", 10)
    (tmp_path / "one/metrics.jsonl").write_text('{"kind": "train", "step": 10}\n')
    (tmp_path / "one/status.json").write_text('{"state": "running", "checkpoint_step": 10}')
    assert first.wait(limit_seconds=10)
    save(tmp_path / "one/checkpoints", 20)
    assert first.wait(limit_seconds=10)
    vanish(first)

    second = opened(url, tmp_path / "two")
    with find(tmp_path / "two/checkpoints", note=lambda _: None) as found:
        assert found.step == 20
    assert same(tmp_path / "one/checkpoints" / step_name(20), tmp_path / "two/checkpoints" / step_name(20))
    assert (tmp_path / "two/metrics.jsonl").read_text() == '{"kind": "train", "step": 10}\n'
    assert json.loads((tmp_path / "two/status.json").read_text())["checkpoint_step"] == 20
    second.close(limit_seconds=5)


def test_log_that_a_launcher_has_opened_is_not_replaced(url: str, tmp_path: Path) -> None:
    store = Store(url)
    store.write("logs/slurm-1-n1.log", b"of the first machine")
    store.write("logs/slurm-1-n2.log", b"of another node")
    (tmp_path / "one/logs").mkdir(parents=True)
    with open(tmp_path / "one/logs/slurm-1-n1.log", "w") as log:
        assert buckets.bring_files(store, tmp_path / "one") == 1
        log.write("of the second machine")
    assert (tmp_path / "one/logs/slurm-1-n1.log").read_text() == "of the second machine"
    assert (tmp_path / "one/logs/slurm-1-n2.log").read_text() == "of another node"


def test_a_checkpoint_costs_the_requests_that_the_docs_say(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "buckets.md").read_text()
    said = re.search(r"takes (\d+) PUT, (\d+) GET, (\d+) HEAD, (\d+) LIST and (\d+) DELETE", page)
    assert said is not None
    with serving() as server:
        bucket = opened("s3://bucket/run", tmp_path)
        bucket._lease._stop.set()  # its beats are requests, too
        bucket._pass(False)
        for step in (1, 2):
            files = list(save(tmp_path / "checkpoints", step).iterdir())
            assert len(files) == 3, "two and the manifest"
            server.requests.clear()
            bucket._pass(False)
            assert [server.requests[kind] for kind in ("PUT", "GET", "HEAD", "LIST", "DELETE")] == [
                int(number) for number in said.groups()
            ]
        server.requests.clear()
        bucket._pass(False)
        assert not server.requests, "a pass without anything new asks nothing"


def test_manifest_is_read_again_only_where_it_has_changed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing a large one would take the interpreter from the training at every look at the folder."""
    bucket = opened(url, tmp_path)
    read: list[int] = []
    real = buckets.read_manifest
    monkeypatch.setattr(buckets, "read_manifest", lambda path: read.append(step_of(path)) or real(path))
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    bucket._pass(False)
    assert sorted(read) == [10, 20]
    for _ in range(3):
        bucket._pass(False)
    assert sorted(read) == [10, 20]
    saves = checkpoints(tmp_path / "checkpoints", keep=9, background=False)
    saves.record(20, {"loss": 0.5})
    saves.wait(final=True)
    bucket._pass(False)
    assert sorted(read) == [10, 20, 20]
    store = Store(url)
    there = json.loads(store.read(f"checkpoints/{step_name(20)}/manifest.json"))
    assert there["metrics"] == {"loss": 0.5}


def test_retention_deletes_in_the_bucket_too(url: str, tmp_path: Path) -> None:
    bucket = opened(url, tmp_path / "one", keep=2, keeps=lambda step: step % 20 == 0)
    bucket.start()
    for step in (10, 20, 30, 40, 50):
        save(tmp_path / "one/checkpoints", step, keep=2)
        assert bucket.wait(limit_seconds=10)
    assert steps_there(url, tmp_path) == [20, 40, 50]
    bucket.close(limit_seconds=5)
    names = Store(url).names("checkpoints")
    assert {name.split("/")[1] for name in names} == {"index.json", *map(step_name, (20, 40, 50))}


def test_nothing_is_removed_before_the_intervals_are_known(url: str, tmp_path: Path) -> None:
    bucket = opened(url, tmp_path / "one", keep=1, keeps=None)
    bucket.start()
    for step in (10, 20):
        save(tmp_path / "one/checkpoints", step)
        assert bucket.wait(limit_seconds=10)
    assert steps_there(url, tmp_path) == [10, 20]
    bucket.close(limit_seconds=5)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_request_the_newest_checkpoint_is_never_lost(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """One pass uploads step 30 and removes step 10; whatever is cut off, another machine finds 20 or 30 whole."""
    for number in range(200):
        place = f"{url}-{number}"
        home = tmp_path / f"{number}"
        first = opened(place, home / "one", keep=2)
        first._lease._stop.set()  # its beats are requests, too, in a thread of their own
        first._lease._thread.join()
        for step in (10, 20):
            save(home / "one/checkpoints", step, keep=2)
            first._pass(False)
        save(home / "one/checkpoints", 30, keep=2)
        with monkeypatch.context() as patch:
            kill_at(patch, number, after=after)
            try:
                first._pass(True)
                finished = True
            except Killed:
                finished = False
        vanish(first)
        second = opened(place, home / "two", keep=2)
        [newest] = [step_of(path) for path in committed(home / "two/checkpoints")][-1:]
        assert newest in ((30,) if finished else (20, 30))
        assert same(
            home / "two/checkpoints" / step_name(newest), home / "one/checkpoints" / step_name(newest)
        )
        second.close(limit_seconds=5)
        if finished:
            assert number > 10
            return
    pytest.fail("a pass makes more requests than expected")


def test_disk_that_is_ahead_of_the_bucket_counts(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one")
    save(tmp_path / "one/checkpoints", 10)
    first._pass(True)
    save(tmp_path / "one/checkpoints", 20)  # and the machine dies before it is uploaded
    vanish(first)
    again = opened(url, tmp_path / "one")
    assert [step_of(path) for path in committed(tmp_path / "one/checkpoints")] == [10, 20]
    again.start()
    assert again.wait(limit_seconds=10)
    assert steps_there(url, tmp_path) == [10, 20]
    again.close(limit_seconds=5)


def test_disk_on_which_another_machine_did_not_go_on_is_set_aside(url: str, tmp_path: Path) -> None:
    notes: list[str] = []
    first = opened(url, tmp_path / "one")
    save(tmp_path / "one/checkpoints", 10)
    first._pass(True)
    save(tmp_path / "one/checkpoints", 20)
    vanish(first)
    second = opened(url, tmp_path / "two")
    save(tmp_path / "two/checkpoints", 20, branch=1)
    second._pass(True)
    second.close(limit_seconds=5)
    third = opened(url, tmp_path / "one", notes)
    assert same(tmp_path / "one/checkpoints" / step_name(20), tmp_path / "two/checkpoints" / step_name(20))
    assert any(
        "where another machine went on; set aside as step-00000020.abandoned-1" in note for note in notes
    )
    third.close(limit_seconds=5)


def test_damaged_checkpoint_in_the_bucket_is_set_aside_and_the_older_one_taken(
    url: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    first = opened(url, tmp_path / "one")
    for step in (10, 20):
        save(tmp_path / "one/checkpoints", step)
        first._pass(True)
    first.close(limit_seconds=5)
    name = f"checkpoints/{step_name(20)}/model.safetensors"
    store = Store(url)
    store.write(name, store.read(name)[:-1] + b"\xff")
    second = opened(url, tmp_path / "two", notes)
    assert [step_of(path) for path in committed(tmp_path / "two/checkpoints")] == [10]
    assert any("damaged (the content of model.safetensors has changed)" in note for note in notes)
    second.close(limit_seconds=5)


def test_damaged_checkpoint_on_the_disk_is_replaced_by_that_of_the_bucket(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one")
    path = save(tmp_path / "one/checkpoints", 20)
    first._pass(True)
    vanish(first)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1] + b"\xff")
    again = opened(url, tmp_path / "one")
    assert (path / "model.safetensors").read_bytes() == data
    again.close(limit_seconds=5)


def test_going_back_to_an_older_step_sets_later_ones_of_the_bucket_aside(url: str, tmp_path: Path) -> None:
    bucket = opened(url, tmp_path / "one")
    bucket.start()
    for step in (10, 20):
        save(tmp_path / "one/checkpoints", step)
    assert bucket.wait(limit_seconds=10)
    shutil.rmtree(tmp_path / "one/checkpoints" / step_name(20))
    bucket.abandon_after(10)
    assert bucket.wait(limit_seconds=10)
    assert steps_there(url, tmp_path) == [10]
    other = save(tmp_path / "one/checkpoints", 20, branch=1)
    assert bucket.wait(limit_seconds=10)
    bucket.close(limit_seconds=5)
    opened(url, tmp_path / "two").close(limit_seconds=5)
    assert same(other, tmp_path / "two/checkpoints" / step_name(20))


def test_best_checkpoint_of_the_bucket_is_fetched(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one", keep=3)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        save(tmp_path / "one/checkpoints", step, metrics={"loss": loss})
        first._pass(True)
    first.close(limit_seconds=5)
    second = bucket_of(url, tmp_path / "two")
    second.open()
    second.fetch("best")
    assert [step_of(path) for path in committed(tmp_path / "two/checkpoints")] == [20, 30]
    second.close(limit_seconds=5)


def test_checkpoint_of_the_bucket_that_is_named_is_fetched(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one", keep=3)
    for step in (10, 20):
        save(tmp_path / "one/checkpoints", step)
        first._pass(True)
    first.close(limit_seconds=5)
    second = bucket_of(url, tmp_path / "two")
    second.open()
    second.fetch(step_name(99))  # refused where it is looked for
    second.fetch(step_name(10))
    assert [step_of(path) for path in committed(tmp_path / "two/checkpoints")] == [10]
    second.close(limit_seconds=5)


def test_outage_is_said_once_and_survived(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    bucket = opened(url, tmp_path / "one", notes)
    bucket.start()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", _refuse)
        save(tmp_path / "one/checkpoints", 10)
        until = time.monotonic() + 20
        while bucket._failed_passes < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert not bucket.wait(limit_seconds=0.3)
        assert not bucket.failed
    assert bucket.wait(limit_seconds=10)
    assert [note for note in notes if "uploads are tried again, the local copy" in note] == notes[:1]
    assert any("takes uploads again" in note for note in notes)
    assert steps_there(url, tmp_path) == [10]
    bucket.close(limit_seconds=5)


def _refuse(self: Store, path: Path, name: str) -> None:
    raise StoreError(f"{self.url}: cannot write {name}: SlowDown")


def test_policy_stop_ends_the_run_when_nothing_can_be_uploaded(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = opened(url, tmp_path / "one", stop_on_failure=True)
    monkeypatch.setattr(Store, "upload", _refuse)
    save(tmp_path / "one/checkpoints", 10)
    bucket.start()
    until = time.monotonic() + 20
    while not bucket.failed and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(FaultError, match=r"takes no uploads.*--checkpoint.on_upload_failure warn"):
        bucket.poll()
    begin = time.monotonic()
    assert not bucket.wait(limit_seconds=60), "the end of a training does not wait for what was given up"
    assert time.monotonic() - begin < 30
    bucket.close(limit_seconds=0.1)


def test_closing_waits_no_longer_than_the_time_that_is_left(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    bucket = opened(url, tmp_path / "one", notes)
    save(tmp_path / "one/checkpoints", 10)
    monkeypatch.setattr(Store, "upload", lambda *_: time.sleep(3))
    bucket.start()
    begin = time.monotonic()
    bucket.close(limit_seconds=0.5)
    assert 0.4 < time.monotonic() - begin < 2
    assert "was uploaded" in notes[-1]
    assert (tmp_path / "one/checkpoints" / step_name(10)).is_dir()


def test_run_that_lost_its_lease_writes_no_manifest(url: str, tmp_path: Path) -> None:
    first = opened(url, tmp_path / "one")
    save(tmp_path / "one/checkpoints", 10)
    first._pass(True)
    first._lease._stop.set()
    second = opened(url, tmp_path / "two")
    save(tmp_path / "one/checkpoints", 20)
    with pytest.raises(FaultError, match="taken over"):
        first._pass(True)
    assert steps_there(url, tmp_path) == [10]
    second.close(limit_seconds=5)


def test_retention_on_the_disk_does_not_cut_an_upload_off(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = opened(url, tmp_path / "one")
    path = save(tmp_path / "one/checkpoints", 10)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    real = Store.upload

    def upload(self: Store, file: Path, name: str) -> None:
        shutil.rmtree(path, ignore_errors=True)
        real(self, file, name)

    monkeypatch.setattr(Store, "upload", upload)
    bucket._pass(False)
    bucket.close(limit_seconds=5)
    store = Store(url)
    assert {name: store.read(f"checkpoints/{step_name(10)}/{name}") for name in before} == before


def test_status_of_the_bucket_does_not_promise_what_only_the_disk_has(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = opened(url, tmp_path / "one")
    save(tmp_path / "one/checkpoints", 10)
    (tmp_path / "one/status.json").write_text('{"state": "running", "checkpoint_step": 10}')
    monkeypatch.setattr(RemoteCheckpoints, "put", _damaged)
    bucket._pass(True)
    assert json.loads(Store(url).read("status.json"))["checkpoint_step"] is None
    bucket.close(limit_seconds=5)


def _damaged(*_: Any, **__: Any) -> None:
    from lmcore.checkpoint.manifest import Damaged

    raise Damaged("removed while it was being read")


def test_local_folder_of_another_run_is_refused(url: str, tmp_path: Path) -> None:
    opened(url, tmp_path / "one").close(limit_seconds=5)
    with pytest.raises(RequestError, match="is the copy of"):
        bucket_of(f"{url}-other", tmp_path / "one").open()
    save(tmp_path / "two/checkpoints", 10)
    with pytest.raises(RequestError, match="holds one too"):
        bucket_of(url, tmp_path / "two").open()


def test_local_run_moves_to_a_bucket(url: str, tmp_path: Path) -> None:
    save(tmp_path / "one/checkpoints", 10)
    bucket = opened(url, tmp_path / "one")
    bucket._pass(True)
    bucket.close(limit_seconds=5)
    assert steps_there(url, tmp_path) == [10]


def test_local_folder_is_the_same_at_every_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path))
    first = local_run_dir("s3://bucket/runs/demo")
    assert first == local_run_dir("s3://bucket/runs/demo/")
    assert first.parent == tmp_path / "runs"
    assert first.name.startswith("demo-")
    assert first != local_run_dir("s3://other/runs/demo")
    assert local_run_dir("s3://bucket/x", "here") == Path("here")
    assert local_run_dir("runs/demo") == Path("runs/demo")
