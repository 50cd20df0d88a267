"""Whole runs whose run folder is in a bucket: the machine vanishes, another one with an empty disk goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcore.checkpoint.manifest import step_name
from lmcore.storage import Store
from tests.support.fork_server import RankFailure, run_ranks
from tests.support.s3_server import Faults, Server, manifest_steps, serving
from tests.support.whole_runs import (
    assert_same_state,
    losses,
    request,
    train,
    train_in_rank,
    weights,
    write_texts,
)

SECRET = "not-a-secret-of-anybody"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=300, held=60, seed=1)


@pytest.fixture(scope="module")
def plain(text: Path) -> Path:
    """The run that nothing happens to, on a disk."""
    assert train(request(text, text / "plain")) == [0]
    return text / "plain"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def on_machine(argv: list[str], host: str, vanish_before_step: int | None) -> int:
    """In a rank: a run on a machine of this name, which may vanish once the bucket has what was saved."""
    from lmcore.run.lease import Lease
    from lmcore.run.trainer import Run

    socket.gethostname = lambda: host
    assert Lease.__init__.__kwdefaults__ is not None
    Lease.__init__.__kwdefaults__["beat_seconds"] = 0.2
    if vanish_before_step is not None:
        learning_rate = Run.learning_rate

        def vanishing(run: Run) -> float:
            if run.state.step == vanish_before_step:
                run.saves.wait()  # of all ranks together
                if not run.engine.is_main:
                    time.sleep(300)  # until rank 0 is gone
                assert run.bucket is not None
                assert run.bucket.wait(limit_seconds=60)
                os.kill(os.getpid(), signal.SIGKILL)
            return learning_rate(run)

        Run.learning_rate = vanishing
    return train_in_rank(argv, None, signal.SIGTERM)


def vanish(argv: list[str], world_size: int, step: int) -> None:
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(on_machine, world_size, argv, "first", step, timeout=240)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2)])
@pytest.mark.slow
def test_machine_that_vanishes_is_replaced_bit_for_bit(
    text: Path, plain: Path, server: Server, tmp_path: Path, before: int, after: int
) -> None:
    if before == 1:
        undisturbed = plain
    else:
        undisturbed = tmp_path / "undisturbed"
        assert train(request(text, undisturbed), before) == [0] * before
    vanish(request(text, "s3://bucket/run", local_dir=tmp_path / "one"), before, 13)
    assert manifest_steps(server, "run")[-1] == 10
    shutil.rmtree(tmp_path / "one")
    argv = request(text, "s3://bucket/run", local_dir=tmp_path / "two")
    assert run_ranks(on_machine, after, argv, "second", None, timeout=240) == [0] * after
    assert losses(tmp_path / "two").keys() == losses(undisturbed).keys()
    if before == after:
        assert losses(tmp_path / "two") == losses(undisturbed)
        assert_same_state(weights(tmp_path / "two"), weights(undisturbed))
    else:  # the same batches in another order of addition
        for step, loss in losses(undisturbed).items():
            assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)
    assert manifest_steps(server, "run") == [10, 15, 20]


@pytest.mark.slow
def test_run_whose_text_and_store_are_in_the_bucket_too_needs_nothing_of_the_disk(
    text: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store("s3://bucket/text")
    for name in ("train.txt", "held.txt"):
        store.upload(text / name, name)
    of_bucket = {
        "data__train": "s3://bucket/text/train.txt",
        "data__valid": "s3://bucket/text/held.txt",
        "data__store_dir": "s3://bucket/stores",
    }
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache-0"))
    assert train(request(text, tmp_path / "undisturbed", **of_bucket), 2) == [0, 0]
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache-1"))
    vanish(request(text, "s3://bucket/run", local_dir=tmp_path / "one", **of_bucket), 2, 13)
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setenv("LMCORE_CACHE", str(tmp_path / "cache-2"))
    argv = request(text, "s3://bucket/run", local_dir=tmp_path / "two", **of_bucket)
    assert run_ranks(on_machine, 2, argv, "second", None, timeout=240) == [0, 0]
    assert losses(tmp_path / "two") == losses(tmp_path / "undisturbed")
    assert_same_state(weights(tmp_path / "two"), weights(tmp_path / "undisturbed"))
    for number in range(3):
        assert list((tmp_path / f"cache-{number}/token_stores").rglob("part-*.bin")), number


@pytest.mark.slow
def test_whole_run_through_faults_equals_the_one_on_a_disk(
    text: Path, plain: Path, server: Server, tmp_path: Path
) -> None:
    kinds = ("500", "503", "lost", "torn_put", "short_put", "torn_get", "flipped_get", "stale_list")
    server.faults, server.skew_seconds = Faults(seed=5, share=0.1, kinds=kinds), 86_400.0
    argv = request(text, "s3://bucket/run", local_dir=tmp_path / "one")
    assert run_ranks(on_machine, 1, argv, "first", None, timeout=400) == [0]
    assert sum(server.faults.done.values()) > 5
    server.faults = None
    assert losses(tmp_path / "one") == losses(plain)
    assert manifest_steps(server, "run") == [10, 15, 20]
    objects = server.objects()
    for step in (10, 15, 20):
        folder = tmp_path / "one/checkpoints" / step_name(step)
        for file in folder.iterdir():
            assert objects[f"run/checkpoints/{step_name(step)}/{file.name}"] == file.read_bytes()


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_a_file(
    text: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = request(text, "s3://bucket/run", local_dir=tmp_path / "one", train__duration="5 steps")
    assert run_ranks(on_machine, 1, argv, "first", None, timeout=240) == [0]
    contents: dict[Any, bytes] = {**server.objects()}
    contents |= {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert len(contents) > 20
    assert [name for name, content in contents.items() if SECRET.encode() in content] == []


def test_wrong_urls_are_refused_before_anything_is_done(text: Path, tmp_path: Path) -> None:
    from lmcore.config.parse import parse
    from lmcore.errors import RequestError
    from lmcore.run.preflight import preflight

    for options, words_of_it in (
        ({"run_dir": "s3://key:word@bucket/x"}, "credentials"),
        ({"run_dir": "s4://bucket/x"}, "unknown scheme"),
        ({"run_dir": tmp_path / "run", "local_dir": tmp_path / "two"}, "for a run_dir that is a URL"),
    ):
        config = parse(request(text, **{"run_dir": tmp_path, **options}), default_recipe=None)
        with pytest.raises(RequestError, match=words_of_it):
            preflight(config)
