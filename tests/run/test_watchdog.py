"""A run in which nothing moves ends with stacks; slow saves and evaluations do not end it."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcore.config.parse import parse
from lmcore.config.schema import EngineConfig
from lmcore.disk import DISK
from lmcore.run.peers import EXIT_STUCK
from lmcore.run.setup import open_engine
from lmcore.run.watchdog import Watchdog, collective_seconds


@pytest.fixture(autouse=True)
def _no_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ends the process
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_words, **_more: None)


def watchdog(logs: Path, left: list[int], said: list[str], **more: Any) -> Watchdog:
    settings: dict[str, Any] = {"stuck_seconds": 0.5, "note": said.append, "leave": left.append} | more
    made = Watchdog(logs=logs, **settings)
    made.start()
    return made


def wait_for(what: Any, seconds: float = 60.0) -> bool:
    give_up = time.monotonic() + seconds
    while not what():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def test_stuck_process_ends_with_its_stacks(tmp_path: Path) -> None:
    left: list[int] = []
    said: list[str] = []
    ends: list[str] = []
    made = watchdog(tmp_path, left, said, on_end=lambda line, code: ends.append(line))
    made.beat("forward", 10)
    assert wait_for(lambda: left)
    made.close()
    assert left[0] == EXIT_STUCK
    assert "is stuck at forward, step 10: no progress for 0.5 s" in said[0]
    assert ends[:1] == said[:1]
    stacks = (tmp_path / "stacks-rank-00000.txt").read_text()
    assert said[0] in stacks
    assert "test_watchdog.py" in stacks


def test_alarm_comes_before_collectives_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL ends the process at its limit without a word; the stacks come first, even in the first step, which may take twice
    as long."""
    now = [0.0]
    monkeypatch.setattr("lmcore.run.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    left: list[int] = []
    made = watchdog(tmp_path, left, [], stuck_seconds=4.0)
    now[0] = 7.9
    time.sleep(1.0)  # more than two looks of the watchdog
    assert left == []
    now[0] = 8.1
    assert wait_for(lambda: left)
    made.close()
    assert now[0] < collective_seconds(4.0)


def test_engine_waits_longer_than_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def engine(_train: Any, options: EngineConfig, *, seed: int) -> Any:
        limits.append(options.timeout_seconds)
        return SimpleNamespace(strategy="single")

    monkeypatch.setattr("lmcore.engine.engine.Engine", engine)
    for asked in ([], ["--guard.stuck_seconds", "7200"], ["--engine.timeout_seconds", "100000"]):
        open_engine(parse(["--data.train", "a.txt", *asked]))
    assert limits == [3660, 14460, 100000]


def test_beats_keep_a_slow_evaluation_alive(tmp_path: Path) -> None:
    left: list[int] = []
    made = watchdog(tmp_path, left, [])
    for number in range(15):
        made.beat("evaluate", number)
        time.sleep(0.1)
    assert made.standing().what == "evaluate"
    made.close()
    made.close()
    assert left == []
    assert not list(tmp_path.glob("stacks-*")), "an empty file is removed"


def test_foreground_save_longer_than_stuck_seconds_is_not_stuck(tmp_path: Path) -> None:
    """No beat comes while a large checkpoint is written; its pieces are progress."""
    left: list[int] = []
    made = watchdog(tmp_path, left, [])
    made.beat("save", 3)
    file = DISK.create(tmp_path / "large")
    for _ in range(15):
        DISK.write(file, bytes(1 << 17))
        time.sleep(0.1)
    DISK.close(file)
    assert left == []
    assert made.standing().seconds < 0.5
    assert wait_for(lambda: left), "and afterwards the limit counts again"
    made.close()


def test_first_step_may_take_twice_as_long(tmp_path: Path) -> None:
    left: list[int] = []
    made = watchdog(tmp_path, left, [], stuck_seconds=1.0)
    time.sleep(1.4)
    assert left == []
    assert wait_for(lambda: left)
    made.close()
