"""Commands on a run folder in a bucket: the copy that they read, and what the requests of a checkpoint are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcore.checkpoint.manifest import committed, step_name
from lmcore.cli.remote import local_copy
from lmcore.errors import RequestError
from lmcore.run.bucket import Bucket
from tests.support.s3_server import Server, serving
from tests.support.small_checkpoints import same, save

URL = "s3://bucket/run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        yield server


def run_in_bucket(local: Path, losses: dict[int, float]) -> Bucket:
    bucket = Bucket(URL, local, note=lambda _: None)
    bucket.open()
    bucket.abandon_after(-1)
    for step, loss in losses.items():
        save(local / "checkpoints", step, metrics={"loss": loss})
        (local / "metrics.jsonl").write_text(f'{{"kind": "train", "step": {step}}}\n')
        bucket._pass(False)
    return bucket


READER = """
import sys
from lmcore.cli.remote import local_copy
print(local_copy("s3://bucket/run", "10", note=print), flush=True)
sys.stdin.read()
"""


def test_two_commands_at_once_have_copies_of_their_own(server: Server, tmp_path: Path) -> None:
    """One of step 10 and one of step 20: the second removed the checkpoint that the first was reading."""
    bucket = run_in_bucket(tmp_path / "one", {10: 1.0, 20: 2.0})
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", READER], stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout is not None
        theirs = Path(reader.stdout.readline().strip())
        mine = Path(local_copy(URL, "20", note=print))
        assert [path.name for path in committed(theirs / "checkpoints")] == [step_name(10)]
        assert [path.name for path in committed(mine / "checkpoints")] == [step_name(20)]
        assert mine == theirs.with_name(f"{theirs.name}-2")
        assert local_copy(URL, "auto", note=print) == str(mine), "of one process it is one copy"
        reader.communicate()
    bucket.close(limit_seconds=5)


def test_copy_has_the_files_and_the_checkpoint_that_is_asked_for(server: Server, tmp_path: Path) -> None:
    bucket = run_in_bucket(tmp_path / "one", {10: 1.0, 20: 2.0})
    before = server.objects()
    notes: list[str] = []
    for which, step in ((None, None), ("auto", 20), ("best", 10), ("10", 10), ("auto", 20)):
        copy = Path(local_copy(URL, which, note=notes.append))
        assert (copy / "metrics.jsonl").read_text() == '{"kind": "train", "step": 20}\n'
        assert [path.name for path in committed(copy / "checkpoints")] == ([step_name(step)] if step else [])
        if step:
            assert same(
                copy / "checkpoints" / step_name(step), tmp_path / "one/checkpoints" / step_name(step)
            )
    assert server.objects() == before
    assert notes == []
    with pytest.raises(RequestError, match="no good checkpoint of step 15"):
        local_copy(URL, "15", note=notes.append)
    with pytest.raises(RequestError, match="there is no run"):
        local_copy("s3://bucket/other", "auto", note=notes.append)
    assert local_copy(str(tmp_path), "auto", note=notes.append) == str(tmp_path)
    bucket.close(limit_seconds=5)


def test_damaged_checkpoint_is_skipped_and_stays_in_the_bucket(server: Server, tmp_path: Path) -> None:
    bucket = run_in_bucket(tmp_path / "one", {10: 1.0, 20: 2.0})
    name = f"run/checkpoints/{step_name(20)}/model.safetensors"
    server.set_object(name, b"\0" + server.objects()[name][1:])
    before, notes = server.objects(), []
    copy = Path(local_copy(URL, "auto", note=notes.append))
    assert [path.name for path in committed(copy / "checkpoints")] == [step_name(10)]
    assert "damaged" in notes[0]
    assert server.objects() == before
    bucket.close(limit_seconds=5)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_damage_in_the_cache_is_not_taken_for_damage_in_the_bucket(
    server: Server, tmp_path: Path, name: str
) -> None:
    bucket = run_in_bucket(tmp_path / "one", {10: 1.0, 20: 2.0})
    notes: list[str] = []
    for _ in range(2):
        copy = Path(local_copy(URL, "auto", note=notes.append)) / "checkpoints" / step_name(20)
        assert same(copy, tmp_path / "one/checkpoints" / step_name(20))
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert notes == []
    bucket.close(limit_seconds=5)


def test_requests_of_a_checkpoint_are_those_that_the_page_states(server: Server, tmp_path: Path) -> None:
    """docs/buckets.md counts them: a checkpoint of two files beside its manifest, none to remove."""
    bucket = run_in_bucket(tmp_path / "one", {10: 1.0})
    bucket._lease._stop.set()  # no beats meanwhile
    assert bucket._lease._thread is not None
    bucket._lease._thread.join()
    server.requests.clear()
    path = save(tmp_path / "one/checkpoints", 20)
    assert len(list(path.iterdir())) == 3
    bucket._pass(False)
    counts = dict(server.requests)
    page = (Path(__file__).parents[2] / "docs" / "buckets.md").read_text(encoding="utf-8")
    words = f"{counts['PUT']} PUT, {counts['GET']} GET, {counts['HEAD']} HEAD, {counts['LIST']} LIST and {counts['DELETE']} DELETE"
    assert words in " ".join(page.split()), words
    shutil.rmtree(tmp_path / "one")
