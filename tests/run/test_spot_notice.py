"""Notices of a cloud that the machine will be taken away, from metadata services that answer as their documentation says."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcore.config.schema import GuardConfig
from lmcore.run.guard import SPOT, Guard, verdict
from lmcore.run.spot_notice import SpotWatch
from tests.support.disk_faults import forked
from tests.support.fork_server import run_ranks
from tests.support.metadata_service import MetadataService, serving
from tests.support.whole_runs import request, train_in_rank, write_texts

SAID = {"aws": 90.0, "gcp": 0.0, "azure": 20.0}
"""What the service says; gcp says no time."""
EXPECTED = {"aws": 90.0, "gcp": 30.0, "azure": 20.0}


@pytest.fixture(params=["aws", "gcp", "azure"])
def service(request: Any) -> Iterator[MetadataService]:
    with serving(request.param) as service:
        yield service


class Watched:
    """A watch of a service, and what it has said."""

    def __init__(self, service: MetadataService) -> None:
        self.seconds: list[float] = []
        self.notes: list[str] = []
        self.told = threading.Event()
        self.watch = SpotWatch(
            service.cloud,
            on_notice=self._on_notice,
            note=self.notes.append,
            poll_seconds=0.01,
            environ={"LMCORE_METADATA_URL": service.url},
        )
        self.watch.start()

    def _on_notice(self, left: float) -> None:
        self.seconds.append(left)
        self.told.set()


def wait_for_requests(service: MetadataService, count: int) -> None:
    begin, until = service.asked, time.monotonic() + 60
    while service.asked < begin + count:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("skew_seconds", [0.0, 86_400.0, -86_400.0])
def test_notice_is_told_with_the_time_that_is_left(
    service: MetadataService, skew_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the service, whatever this machine's clock says; and not through a proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service.skew_seconds = skew_seconds
    watched = Watched(service)
    wait_for_requests(service, 8)
    assert not watched.told.is_set()
    service.seconds_left = SAID[service.cloud]
    assert watched.told.wait(60)
    [seconds] = watched.seconds
    assert EXPECTED[service.cloud] - 2 <= seconds <= EXPECTED[service.cloud]
    assert watched.notes == []


def test_service_that_does_not_answer_is_said_once_and_asked_again(service: MetadataService) -> None:
    service.broken = True
    watched = Watched(service)
    wait_for_requests(service, 5)
    assert len(watched.notes) == 1
    assert f"guard.spot_notice {service.cloud}: the metadata service at {service.url}" in watched.notes[0]
    service.broken, service.seconds_left = False, SAID[service.cloud]
    assert watched.told.wait(60)


def test_event_of_another_machine_of_the_scale_set_is_none_of_ours() -> None:
    with serving("azure") as service:
        service.seconds_left, service.others = 20.0, True
        watched = Watched(service)
        wait_for_requests(service, 8)
        assert not watched.told.is_set()
        service.others = False
        assert watched.told.wait(60)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SpotWatch.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(SpotWatch.__init__.__kwdefaults__, "poll_seconds", 0.01)


def guard_of(tmp_path: Path, service: MetadataService, notes: list[str], **environ: str) -> Guard:
    return Guard(
        GuardConfig(spot_notice=service.cloud),
        run_dir=tmp_path,
        note=notes.append,
        environ={"LMCORE_METADATA_URL": service.url, **environ},
    )


def test_guard_saves_and_stops_and_knows_the_time_that_is_left(
    fast: None, service: MetadataService, tmp_path: Path
) -> None:
    notes: list[str] = []
    guard = guard_of(tmp_path, service, notes)
    guard.install()
    try:
        assert guard.flags() == 0
        assert guard.seconds_left() == float("inf")
        service.seconds_left = SAID[service.cloud]
        until = time.monotonic() + 60
        while not guard.signalled:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert guard.flags() == SPOT
        assert 0 < guard.seconds_left() <= EXPECTED[service.cloud] - 5
        decided = verdict(SPOT)
        assert (decided.save, decided.stop, decided.exit_code) == (True, True, 75)
        assert (decided.checkpoint_reason, decided.reason) == ("signal", "a spot notice")
        assert len(notes) == 1
        assert "this machine will be taken away in" in notes[0]
    finally:
        guard.close(give_signals_back=True)


def test_one_rank_of_a_machine_asks(tmp_path: Path) -> None:
    with serving("gcp") as service:
        assert guard_of(tmp_path, service, [], LOCAL_RANK="1")._spot is None
        assert guard_of(tmp_path, service, [], LOCAL_RANK="0")._spot is not None


def test_notice_before_training_ends_the_process_at_once(fast: None, tmp_path: Path) -> None:
    with serving("gcp") as service:
        service.seconds_left = 0.0

        def prepare() -> None:
            guard = guard_of(tmp_path, service, [])
            try:
                guard.install(training=False)
                time.sleep(60)
            except SystemExit as end:
                os._exit(int(end.code or 0))

        assert forked(prepare) == 75


def with_notice(argv: list[str], url: str) -> int:
    """In a rank: the service gives its notice before step 8."""
    from lmcore.run.trainer import Run

    os.environ["LMCORE_METADATA_URL"] = url
    assert SpotWatch.__init__.__kwdefaults__ is not None
    SpotWatch.__init__.__kwdefaults__["poll_seconds"] = 0.02
    learning_rate = Run.learning_rate

    def noticed(run: Run) -> float:
        if run.state.step == 7 and run.engine.is_main:
            urllib.request.urlopen(f"{url}/test/notice").close()
            until = time.monotonic() + 60
            while not run.guard.signalled:
                assert time.monotonic() < until
                time.sleep(0.01)
        return learning_rate(run)

    Run.learning_rate = noticed
    return train_in_rank(argv, None, signal.SIGTERM)


@pytest.mark.slow
def test_run_of_two_ranks_ends_at_a_notice_as_at_a_signal(tmp_path: Path) -> None:
    text = write_texts(tmp_path, train=300, held=60, seed=1)
    argv = request(text, tmp_path / "run", guard__spot_notice="aws")
    with serving("aws") as service:
        assert run_ranks(with_notice, 2, argv, service.url, timeout=240) == [75, 75]
    status = json.loads((tmp_path / "run/status.json").read_bytes())
    assert (status["state"], status["exit_code"], status["step"]) == ("saved", 75, 8)
    assert status["reason"] == "a spot notice"
    assert status["checkpoint_step"] == 8
