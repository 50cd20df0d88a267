"""Flags over ranks: carried by the sums of the loss, acted on by all ranks alike, at most a step late."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmcore.config.durations import Durations
from lmcore.report.metrics import read_metrics
from lmcore.run import guard
from lmcore.run.agreement import BITS, Agreement, flags_of, numbers_of
from lmcore.run.intervals import EPOCH, EVALUATE, LOG, SAVE, Intervals
from lmcore.run.late_numbers import LateNumbers
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import (
    STEPS,
    assert_same_state,
    losses,
    request,
    train,
    train_in_rank,
    weights,
    write_texts,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=300, held=30)


# ---- the numbers -------------------------------------------------------------------------------------------


def test_every_flag_has_a_number() -> None:
    named = {getattr(guard, word) for word in guard.__all__ if isinstance(getattr(guard, word), int)}
    assert set(BITS) == (named - {guard.EXIT_STUCK}) | {LOG, EVALUATE, SAVE, EPOCH}


def test_sum_over_ranks_is_the_bitwise_or() -> None:
    device = torch.device("cpu")
    for index, bit in enumerate(BITS):
        other = BITS[index - 1] | guard.SIGTERM
        summed = numbers_of(bit, device) + numbers_of(other, device) + numbers_of(0, device)
        assert flags_of(summed.tolist()) == bit | other
    assert flags_of(numbers_of(0, device).tolist()) == 0


class Late:
    """Numbers of a GPU."""

    is_late = True

    def __init__(self, flags: int) -> None:
        self._numbers = numbers_of(flags, torch.device("cpu")).tolist()

    def tolist(self) -> Any:
        return self._numbers


def test_late_flags_are_acted_on_at_the_next_step_and_once() -> None:
    agreement = Agreement(several=True)

    def after(flags: int, *, at_once: bool = False) -> int:
        return agreement.after_step(flags, Late(flags), first=0, at_once=at_once)

    assert after(guard.SAVE_FILE) == 0
    assert after(guard.SAVE_FILE) == guard.SAVE_FILE  # the file is still there: its save comes after this
    assert after(0) == 0, "and is not made twice"
    assert after(guard.SIGTERM) == 0
    assert after(guard.SIGTERM | guard.SAVE_FILE, at_once=True) == guard.SIGTERM | guard.SAVE_FILE
    assert after(0) == 0
    assert after(guard.SAVE_FILE) == 0
    assert after(guard.SAVE_FILE | LOG, at_once=True) == guard.SAVE_FILE | LOG
    assert after(0) == 0


def test_flags_are_acted_on_at_once_where_that_waits_for_nothing() -> None:
    numbers = LateNumbers(numbers_of(guard.SIGTERM, torch.device("cpu")))
    assert Agreement(several=True).after_step(0, numbers, first=0, at_once=False) == guard.SIGTERM
    alone = Agreement(several=False)
    assert alone.after_step(guard.FAULT, Late(0), first=0, at_once=False) == guard.FAULT


def test_interval_by_the_clock_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    spans = SimpleNamespace(spans=lambda step: {"steps": (step - 1, step)})
    either = Durations.parse("[10 steps, 2 min]")
    never = Durations.parse("never")
    intervals = Intervals(spans, log=never, evaluate=either, save=either)
    assert intervals.clock_flags(saving=False) == intervals.flags(9) == 0
    now[0] = 121.0
    assert intervals.clock_flags(saving=True) == EVALUATE, "a save waits for the one before"
    assert intervals.clock_flags(saving=False) == SAVE
    assert intervals.clock_flags(saving=False) == 0
    now[0] = 200.0
    assert intervals.flags(10) == EVALUATE | SAVE
    now[0] = 300.0
    assert intervals.clock_flags(saving=False) == 0, "counted from the last one, whatever made it due"


# ---- whole runs of two ranks -------------------------------------------------------------------------------


COLLECTIVES = (
    "all_reduce",
    "barrier",
    "broadcast_object_list",
    "all_gather_object",
    "broadcast",
    "all_gather",
)


def collectives_in_rank(argv: list[str]) -> dict[int, dict[str, int]]:
    """Calls of each collective between two steps, by the step that they follow."""
    from lmcore.run.trainer import Run

    counts: dict[int, Counter[str]] = {}
    here = [-1]
    for name in COLLECTIVES:
        plain = getattr(dist, name)

        def counted(*args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            counts.setdefault(here[0], Counter())[name] += 1
            return plain(*args, **kwargs)

        setattr(dist, name, counted)
    learning_rate = Run.learning_rate

    def at_step(run: Run) -> float:
        here[0] = run.state.step
        return learning_rate(run)

    Run.learning_rate = at_step
    assert train_in_rank(argv, None, 0) == 0
    return {step: dict(found) for step, found in counts.items()}


def test_step_has_one_collective_beside_those_of_the_gradients(text: Path, tmp_path: Path) -> None:
    options = {"report.every": "100 steps", "evaluate.every": "never", "checkpoint.every": "100 steps"}
    argv = request(text, tmp_path, **{name.replace(".", "__"): value for name, value in options.items()})
    for found in run_ranks(collectives_in_rank, 2, argv, timeout=240):
        for step in range(2, STEPS - 1):  # the first makes the optimizer's state, the last saves
            assert found[step] == {"all_reduce": 1}


def late_run(argv: list[str], signal_before: int | None, save_file_before: int | None) -> int:
    """A rank whose numbers are read a step late, as on a GPU. Rank 1 gets the signal, rank 0 finds the file."""
    from lmcore.run import trainer

    class LateAsOnAGpu:
        def __init__(self, numbers: torch.Tensor) -> None:
            self.is_late, self._numbers = True, numbers.clone()

        def tolist(self) -> Any:
            return self._numbers.tolist()

    trainer.LateNumbers = LateAsOnAGpu
    learning_rate = trainer.Run.learning_rate

    def at_step(run: trainer.Run) -> float:
        if run.state.step == signal_before and run.engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.state.step == save_file_before and run.engine.rank == 0:
            (run.folder.path / "SAVE").touch()
        run.guard._next_look = 0.0  # it is looked for in every step: the steps of this run are short
        return learning_rate(run)

    trainer.Run.learning_rate = at_step
    return train_in_rank(argv, None, 0)


def saved_steps(run_dir: Path) -> list[tuple[int, str]]:
    events = read_metrics(run_dir / "metrics.jsonl", kind="event")
    # The last one is asked for twice, and written once.
    return list(dict.fromkeys((e["step"], e["reason"]) for e in events if e["event"] == "checkpoint"))


def test_late_signal_stops_all_ranks_a_step_later_and_the_run_goes_on_bit_for_bit(
    text: Path, tmp_path: Path
) -> None:
    options = {"checkpoint__every": "100 steps", "evaluate__every": "7 steps"}
    assert train(request(text, tmp_path / "whole", **options), 2) == [0, 0]
    argv = request(text, tmp_path / "cut", **options)
    # During step 6: known to all ranks with the numbers of step 6, acted on at the end of step 7.
    assert run_ranks(late_run, 2, argv, 5, None, timeout=240) == [75, 75]
    status = json.loads((tmp_path / "cut/status.json").read_bytes())
    assert (status["state"], status["step"], status["reason"]) == ("saved", 7, "SIGTERM")
    assert run_ranks(late_run, 2, argv, None, None, timeout=240) == [0, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_state(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_late_save_file_is_answered_by_one_save(text: Path, tmp_path: Path) -> None:
    argv = request(text, tmp_path / "run", checkpoint__every="15 steps", evaluate__every="never")
    assert run_ranks(late_run, 2, argv, None, 5, timeout=240) == [0, 0]
    assert saved_steps(tmp_path / "run") == [(7, "save file"), (15, "interval"), (20, "end")]
