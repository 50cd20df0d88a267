"""What a run says: exact numbers in the record, calm screens for people, plain lines for files."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore import process
from lmcore.errors import RequestError
from lmcore.humanize import duration, short
from lmcore.report import console, meters
from lmcore.report.console import Console, is_interactive, one_line
from lmcore.report.meters import PeakMemory, Sums, Timer
from lmcore.report.metrics import MetricsFile, read_metrics
from lmcore.report.report import Report, silence_other_bars


def make(run_dir: Path, **options: Any) -> Report:
    return Report(run_dir, **{"stream": io.StringIO(), **options})


def feed(
    report: Report,
    first: int,
    last: int,
    *,
    every: int = 2,
    losses: Callable[[int], float] = lambda s: 1 / (s + 0.1),
) -> None:
    for step in range(first, last + 1):
        count = 100 + step % 3
        report.step(
            step=step,
            epoch=step / 50,
            tokens=1000 * step,
            position=8 * step,
            loss_sum=torch.tensor(losses(step) * count, dtype=torch.float32),
            count=torch.tensor(count),
            lr=1e-3 / step,
            norm=torch.tensor(0.5 + step),
            applied=torch.tensor(True),
            wait_seconds=0.0,
            due=step % every == 0,
        )


def trained(run_dir: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "position")
    return [tuple(record[key] for key in keys) for record in read_metrics(run_dir, "train")]


# ---- numbers


def test_logged_loss_is_the_exact_mean_since_the_last_line(tmp_path: Path) -> None:
    with make(tmp_path) as report:
        report.begin(total_steps=25)
        feed(report, 1, 25, every=10)
    records = read_metrics(tmp_path, "train")
    assert [record["step"] for record in records] == [1, 10, 20, 25], "the first, every tenth, the last"
    for previous, record in zip([0, 1, 10, 20], records):
        steps = range(previous + 1, record["step"] + 1)
        counts = [100 + step % 3 for step in steps]
        sums = [
            Fraction(float(torch.tensor(c / (s + 0.1), dtype=torch.float32))) for s, c in zip(steps, counts)
        ]
        assert record["loss"] == pytest.approx(float(sum(sums) / sum(counts)), rel=1e-15)
        assert record["grad_norm"] == 0.5 + record["step"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert repr(records[1]["loss"]) in lines[1], "all digits"
    design = {"kind", "step", "epoch", "tokens", "position", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert design | {"data_wait", "time"} <= set(records[0])


def test_no_device_wait_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path) as report:
        report.begin(total_steps=1000)
        feed(report, 1, 1)

        def forbidden(*arguments: Any) -> Any:
            raise AssertionError("a step asked the device for a number")

        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, forbidden)
            for step in range(2, 100):
                ready = {
                    "loss_sum": torch.ones(()),
                    "count": torch.ones(()),
                    "applied": torch.ones(()).bool(),
                }
                report.step(
                    step=step, epoch=0.0, tokens=step, position=step, lr=1.0, norm=torch.ones(()), **ready
                )
        feed(report, 100, 100, every=100)
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 100]


def test_ranks_are_summed_exactly_and_only_rank_0_writes(tmp_path: Path) -> None:
    sent: list[torch.Tensor] = []

    def from_rank_1(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.clone())
        return tensor

    stream = io.StringIO()
    with (
        make(tmp_path, rank=0, world_size=2) as main,
        make(tmp_path, rank=1, world_size=2, stream=stream) as other,
    ):
        other.begin(total_steps=6, reduce=from_rank_1)
        main.begin(total_steps=6, reduce=lambda tensor: tensor + sent.pop())
        for step in range(1, 7):
            for report, scale in ((other, 3.0), (main, 1.0)):
                sums = {"loss_sum": torch.tensor(scale * step), "count": 10 if scale == 1 else 30}
                report.step(
                    step=step, epoch=0.1, tokens=step, position=step, lr=1.0, due=step % 3 == 0, **sums
                )
        other.end_epoch(epoch=1, step=6)
        assert main.end_epoch(epoch=1, step=6) == (4 * 21) / (40 * 6)
        for report in (other, main):
            report.epoch(valid_loss=2.0, valid_step=4)
            report.epoch(valid_loss=3.0, valid_step=5)  # none has ended since
        other.note("rank 1 has something to say")
    records = read_metrics(tmp_path, "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 4 / 40), (3, 4 * 5 / 80), (6, 4 * 15 / 120)]
    ended = read_metrics(tmp_path, "epoch")[0]
    assert (ended["valid_loss"], ended["valid_step"]) == (2.0, 4)
    assert "valid loss 2.0000 (of step 4)" in (tmp_path / "train.log").read_text()
    assert stream.getvalue() == ""
    assert "rank 1 has something to say" in (tmp_path / "logs" / "rank-00001.log").read_text()


def test_resumed_run_logs_what_the_uninterrupted_one_logs(tmp_path: Path) -> None:
    """Killed at step 17 after a checkpoint at 14: inside an interval, with records beyond the checkpoint."""
    states: dict[str, dict[str, Any]] = {}
    for name in ("whole", "killed"):
        with make(tmp_path / name) as report:
            report.begin(total_steps=40)
            feed(report, 1, 14, every=5)
            states[name] = json.loads(json.dumps(report.state()))
            feed(report, 15, 40 if name == "whole" else 17, every=5)
            if name == "whole":
                report.end_epoch(epoch=1, step=40)
                report.epoch()
    with make(tmp_path / "killed") as report:
        report.begin(step=14, total_steps=40, tokens=14_000)
        report.load_state(states["killed"])
        report.event("resume", step=14)
        feed(report, 15, 40, every=5)
        assert report.results()[-1][1].endswith("(median since the resume)"), (
            "report.html has that of the run"
        )
        report.end_epoch(epoch=1, step=40)
        report.epoch()
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")
    ends = [read_metrics(tmp_path / name, "epoch")[0]["train_loss"] for name in ("whole", "killed")]
    assert ends[0] == ends[1]


def test_rewind_removes_later_records(tmp_path: Path) -> None:
    with make(tmp_path) as report:
        report.begin(total_steps=8)
        feed(report, 1, 3)
        state = report.state()
        feed(report, 4, 6, losses=lambda step: 99.0)
        report.rewind(step=3, tokens=3_000, state=state)
        feed(report, 4, 8)
    with make(tmp_path / "straight") as report:
        report.begin(total_steps=8)
        feed(report, 1, 8)
    assert trained(tmp_path) == trained(tmp_path / "straight")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 99.0 in [json.loads(line).get("loss") for line in lines], "the file itself forgets nothing"


def test_rewind_is_no_step_time_and_leaves_the_newest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    with make(tmp_path) as report:
        report.begin(total_steps=90)
        feed(report, 1, 3)
        state = report.state()
        feed(report, 4, 8)
        clock[0] += 1000  # the checkpoint is read
        report.rewind(step=3, tokens=3_000, state=state)
        clock[0] += 1
        feed(report, 4, 5, every=90)
        report.latest(step=5, loss=0.125)
        assert report.train_seconds == 1
        assert report.results()[0] == ("training loss", "0.1250  (step 5)")
        clock[0] += 1
        feed(report, 6, 6)
        assert report.results()[-1][1].endswith("(median)")


def test_nonfinite_loss_is_shown_in_the_report(tmp_path: Path) -> None:
    with make(tmp_path) as report:
        report.begin(total_steps=4)
        for step in (1, 2, 3, 4):
            loss = torch.tensor(float("nan") if step == 3 else 20.0)
            sums = {"loss_sum": loss, "count": 10, "norm": loss, "applied": torch.tensor(step != 3)}
            report.step(step=step, epoch=0.0, tokens=step, position=step, lr=1.0, **sums)
    record = read_metrics(tmp_path, "train")[-1]
    assert (record["loss"], record["nonfinite_losses"], record["skipped_steps"]) == (2.0, 1, 1)
    assert "skipped 1 non-finite 1" in (tmp_path / "train.log").read_text()


def test_evaluating_and_saving_are_not_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    timer = Timer()
    timer.start()
    clock[0] += 60  # the first step compiles
    timer.step(0.0)
    assert timer.seconds_per_step is None
    for _ in range(20):
        clock[0] += 1.0
        with timer.pause(), timer.pause():
            clock[0] += 500
        timer.step(0.25)
    clock[0] += 90  # one slow step
    timer.step(0.0)
    assert timer.seconds_per_step == 1.0
    assert timer.interval() == (60 + 20 + 90, 5.0, 22)
    assert timer.total_seconds == 170
    assert timer.interval() == (0.0, 0.0, 0)


def test_own_metrics_are_summed_like_the_loss_over_steps_and_ranks(tmp_path: Path) -> None:
    sent: list[torch.Tensor] = []

    def from_rank_1(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.clone())
        return tensor

    stream = io.StringIO()
    tracked: list[dict[str, Any]] = []

    class Tracker:
        def log(self, group: str, values: dict[str, Any], step: int) -> None:
            tracked.append(values)

        def close(self) -> None:
            """Nothing to close."""

    with make(tmp_path, world_size=2, stream=stream) as main, make(tmp_path, rank=1, world_size=2) as other:
        other.begin(total_steps=4, reduce=from_rank_1)
        main.begin(total_steps=4, reduce=lambda tensor: tensor + sent.pop(0), trackers=Tracker())
        for step in range(1, 5):
            for report, scale in ((other, 3), (main, 1)):
                own: dict[str, Any] = {
                    "accuracy": (torch.tensor(scale * step), torch.tensor(10)),
                    "temperature": 0.5 * step * scale,
                    "broken": torch.tensor(float("nan") if step == 3 else 1.0),
                }
                sums = {"loss_sum": torch.tensor(1.0), "count": 10, "metrics": own}
                report.step(step=step, epoch=0.1, tokens=step, position=step, lr=1.0, **sums)
                if step == 2:
                    state = json.loads(json.dumps(report.state()))
            if step == 2:  # a resume in the middle of an interval
                other.load_state(state)
                main.load_state(state)
    first, last = read_metrics(tmp_path, "train")
    assert (first["accuracy"], first["temperature"]) == (4 / 20, 1.0)
    assert last["accuracy"] == pytest.approx((4 * (2 + 3 + 4)) / 60), "sum / count over steps and ranks"
    assert last["temperature"] == pytest.approx((2 + 3 + 4) / 3), "a plain number counts once a step and rank"
    assert last["broken"] == 1.0, "what is not finite hides nothing"
    assert "accuracy 0.6 broken 1 temperature 3" in stream.getvalue()
    assert tracked[-1]["accuracy"] == last["accuracy"]


def test_own_metrics_with_wrong_names_or_shapes_raise(tmp_path: Path) -> None:
    sums = {"loss_sum": torch.tensor(1.0), "count": 10, "epoch": 0.0, "tokens": 1, "position": 1, "lr": 1.0}
    with make(tmp_path / "a") as report:
        for own in ({"loss": 1.0}, {"x": torch.ones(3)}, {"x": (1.0, 2.0, 3.0)}):
            with pytest.raises(RequestError, match="metrics"):
                report.step(step=1, **sums, metrics=own)
    # Rank 1 has another name: both ranks must raise instead of waiting for tensors of different lengths.
    sent: list[torch.Tensor] = []

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.clone())
        return tensor

    def add_other_rank(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + sent.pop(0)

    for names in (("x", "x"), ("y", "x"), ("x", "y")):
        sent.clear()
        ranks = [Sums(), Sums()]
        for sums_of_rank, name in zip(ranks, names):
            sums_of_rank.add(torch.tensor(1.0), 1, None, {name: 1.0})
        ranks[0].total(send, is_main=True)
        if names == ("x", "x"):
            assert ranks[1].total(add_other_rank, is_main=False).metric_means == {"x": 1.0}
        else:
            with pytest.raises(RequestError, match="same names"):
                ranks[1].total(add_other_rank, is_main=False)


# ---- files


def test_torn_metrics_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = MetricsFile(path)
    write({"kind": "train", "step": 1, "loss": 0.1 + 0.2, "note": "日本"})
    write({"kind": "train", "step": 2, "loss": float("nan"), "more": [float("inf")]})
    write.close()
    with open(path, "ab") as file:
        file.write('{"kind": "train", "step": 3, "日'.encode()[:-1])
    write = MetricsFile(path)
    write({"kind": "train", "step": 4, "loss": 1.0})
    write({"kind": "train", "step": 2, "loss": 5.0})
    write.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 0.1 + 0.2), (4, 1.0), (2, 5.0)]
    assert json.loads(path.read_text(errors="replace").splitlines()[1], parse_constant=pytest.fail)[
        "more"
    ] == [None]


def test_messages_of_libraries_become_one_note(tmp_path: Path) -> None:
    stream = io.StringIO()
    with make(tmp_path, stream=stream) as report, warnings.catch_warnings():
        warnings.simplefilter("always")
        report.capture_logging()
        for _ in range(3):
            logging.getLogger("some.library").warning("your %s is old", "driver")
        logging.getLogger("some.library").info("chatter")
        own = logging.getLogger().handlers[-1]  # pytest's raises where arguments do not fit a text
        own.handle(
            logging.LogRecord(
                "some.library", logging.WARNING, "x.py", 1, "has no place for it", (FutureWarning,), None
            )
        )
        warnings.warn("this will go away", FutureWarning, stacklevel=1)
    assert stream.getvalue().count("your driver is old") == 1
    assert "this will go away" in stream.getvalue()
    assert "has no place for it (<class 'FutureWarning'>,)" in stream.getvalue(), "and nothing is raised"
    assert "chatter" not in stream.getvalue()


def test_other_libraries_bars_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    silence_other_bars()
    assert os.environ["TQDM_DISABLE"] == "1"
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name)


def test_reading_metrics_needs_no_torch() -> None:
    code = "import sys, lmcore.report.report, lmcore.report.html; assert not {'torch', 'rich', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# ---- screens


def run_through(report: Report, shown: Callable[..., None] = lambda *words: None) -> None:
    """Everything that a run shows; ``shown`` waits until the screen holds all these words at once."""
    report.start([("model", "gpt2 " * 40), ("data", "標準ライブラリ")], title="a run [/]")
    with report.task("tokenizing", 4, "files") as advance:
        advance(4)
    report.begin(total_steps=6)
    for step in range(1, 7):
        feed(report, step, step)
    with report.task("evaluate valid\x1b[31mx", 10, "blocks") as advance:
        advance(5)
        shown("evaluate valid", "5/10")
    report.evaluation(
        set="valid", step=6, epoch=0.1, tokens=6000, loss=2.25, perplexity=9.49, bits_per_byte=1.125
    )
    report.samples(6, [("def ", "f(x):\n\treturn \x1b[31mx\x07")])
    report.event("checkpoint", step=6)
    feed(report, 6, 6)
    shown("checkpoint 6")
    report.warn_once("something fell back")
    report.warn_once("something fell back")
    report.end(
        "finished", [("held-out loss", "2.2500")], commands=[("generate", "python -m lmcore generate x")]
    )


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[str], list[bytes]]]:
    """A pseudo-terminal: (its stream, pictures of the screen over time, the raw bytes)."""
    pyte = pytest.importorskip("pyte")
    for name in ("SLURM_JOB_ID", "CI", "LMCORE_CONSOLE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "40")
    ours, theirs = os.openpty()
    screen = pyte.Screen(columns, 40)
    feed_screen = pyte.ByteStream(screen)
    pictures: list[str] = []
    raw: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:
                return
            raw.append(data)
            feed_screen.feed(data)
            pictures.append("\n".join(line.rstrip() for line in screen.display).rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as stream:
        yield stream, pictures, raw
    reader.join(120)
    os.close(ours)


def test_narrow_terminal_shows_values_beside_long_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(20, monkeypatch) as (stream, _, raw), Report(tmp_path, stream=stream) as report:
        report.start([("the name of a row that is longer", "is-1")])
        report.begin(total_steps=1)
        report.end("finished", [("a row at the end", "is-2")])
    assert b"is-1" in b"".join(raw)
    assert b"is-2" in b"".join(raw)


@pytest.mark.parametrize("columns", [80, 44, 160])
def test_terminal_shows_one_live_display(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(columns, monkeypatch) as (stream, pictures, raw):
        assert is_interactive(stream)
        started = time.monotonic()

        def whole(*words: str) -> list[str]:
            """Pictures that hold all these words; a bar has no place for its numbers on a narrow screen."""
            words = tuple(word for word in words if columns >= 60 or word != "5/10")
            return [picture for picture in pictures[:] if all(word in picture for word in words)]

        def shown(*words: str) -> None:
            give_up = time.monotonic() + 120
            while not whole(*words, "train", "loss", "lr"):
                assert time.monotonic() < give_up, (words, pictures[-1:])
                time.sleep(0.02)

        with Report(tmp_path, stream=stream) as report:
            run_through(report, shown)
        elapsed = time.monotonic() - started
    # Evaluation is a task of the same display.
    picture = whole("evaluate valid", "5/10", "train", "6/6 100%", "loss", "lr")[-1]
    cells = [line for line in picture.splitlines() if " · " in line or line.startswith("loss")]
    assert all(len(line) <= columns for line in cells), "cells are not broken"
    assert any("checkpoint 6" in picture for picture in pictures)
    last = pictures[-1]
    assert "step 6 valid loss 2.2500" in last.replace("\n", " ")
    assert last.count("something fell back") == 1
    assert "finished" in last
    assert "python -m lmcore generate x" in last.replace("\n", ""), "can be copied as one command"
    assert "evaluate valid" not in last, "the display is gone, what was said stays"
    assert b"\x07" not in b"".join(raw), "what the model writes cannot ring the bell"
    assert b"\x1b[31mx" not in b"".join(raw)
    assert b"\x1b[?25h" in raw[-1] + raw[-2] + b"".join(raw), "the cursor is back"
    redraws = b"".join(raw).count(b"\x1b[2K")
    assert redraws < 40 * (elapsed + 2), "a few redraws a second, not a flood"


@pytest.mark.parametrize("why", ["redirected", "TERM=dumb", "SLURM_JOB_ID=7", "CI=true", "JPY_PARENT_PID=7"])
def test_redirected_output_has_plain_whole_lines(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "redirected":
        stream: Any = io.StringIO()
        assert not is_interactive(stream)
        with Report(tmp_path, stream=stream) as report:
            run_through(report)
        text = stream.getvalue()
    else:
        with terminal(80, monkeypatch) as (stream, _, raw):
            monkeypatch.setenv(*why.split("="))
            assert not is_interactive(stream)
            with Report(tmp_path, stream=stream) as report:
                run_through(report)
        text = b"".join(raw).decode().replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "no control characters"
    steps = [line for line in text.splitlines() if re.search(r" step \d/6", line)]
    assert [int(line.split(" step ")[1][0]) for line in steps] == [1, 2, 4, 6, 6]
    for line in steps:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d step ", line)
        for word in (" loss ", " lr ", " norm ", " tok/s ", " wait ", " eta "):
            assert word in line, "one line says it all, however long"
    assert "gpt2 " * 39 in text, "nothing is cut or wrapped"
    assert "  | \treturn" not in text
    assert text.count("something fell back") == 1


def test_plain_output_shows_the_latest_step_between_two_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the device: the loss is one that the host has anyway, and metrics.jsonl does not get it."""
    monkeypatch.setattr("lmcore.report.report.PLAIN_STEP_SECONDS", 0.0)
    stream = io.StringIO()
    with make(tmp_path, stream=stream) as report:
        report.begin(total_steps=100)
        feed(report, 1, 4, every=1000)
        assert "alone" not in stream.getvalue(), "no loss is known yet"
        report.latest(step=4, loss=2.5)
        feed(report, 5, 5, every=1000)
    assert "step 5/100 5%, loss 2.5000 (of step 4 alone)" in stream.getvalue()
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [1]


def test_final_panel_after_a_resume(tmp_path: Path) -> None:
    stream = io.StringIO()
    with make(tmp_path) as report:
        report.begin(total_steps=4)
        feed(report, 1, 4, losses=lambda step: 3.0)
        for name, loss in (("日本語", 2.25), ("second", math.inf)):
            report.evaluation(
                set=name, step=4, epoch=0.1, tokens=4, loss=loss, perplexity=9.5, bits_per_byte=1.5
            )
        state = json.loads(json.dumps(report.state(), allow_nan=False))
    with make(tmp_path, stream=stream) as report:
        report.begin(step=4, total_steps=4)
        report.load_state(state)
        report.end("finished", [("model", "here")])
    said = stream.getvalue()
    assert "training loss  3.0000" in said
    assert "日本語 loss    2.2500  perplexity 9.5  bits/byte 1.5000  (step 4)" in said, (
        "wide characters are aligned"
    )
    assert "second loss    not finite" in said
    assert "time in steps" in said


def test_long_task_prints_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    screen = Console(stream)
    key = screen.add("tokenizing", 2_000_000, "bytes")
    screen._tasks[key].started = screen._tasks[key].printed = 0.0
    screen.update(key, 200_000)  # what an earlier start has done is no rate
    for second in range(5, 100, 5):
        clock[0] = second
        screen.update(key, 200_000 + 10_000 * second, also=f"{second} documents")
    clock[0] = 100
    screen.update(key, 0, total=9_000, also="")  # the next source begins anew
    clock[0] = 140
    screen.update(key, 4_000, also="7 documents")
    screen.remove(key)
    assert stream.getvalue().splitlines() == [
        "tokenizing: 500k/2M bytes 25%, 10k/s, left 0:02:30, 30 documents, 0:00:30",
        "tokenizing: 800k/2M bytes 40%, 10k/s, left 0:02:00, 60 documents, 0:01:00",
        "tokenizing: 1.1M/2M bytes 55%, 10k/s, left 0:01:30, 90 documents, 0:01:30",
        "tokenizing: 4,000/9,000 bytes 44%, 100/s, left 0:00:50, 7 documents, 0:02:20",
    ]


def test_words_for_numbers() -> None:
    assert [short(n) for n in (0, 999, 9_999, 12_345, 1_234_567, 2.5e9)] == [
        "0",
        "999",
        "9,999",
        "12.3k",
        "1.23M",
        "2.5G",
    ]
    assert [duration(s) for s in (0, 59.6, 3_661, 93_784)] == ["0:00:00", "0:01:00", "1:01:01", "1d 2:03:04"]
    assert one_line("a\r\nb\tc\x1b[1m\u2028") == "a\\nb    c\\x1b[1m\\u2028"


# ---- output that goes away, and text that must not act


def test_run_goes_on_when_standard_output_fails(tmp_path: Path) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    closed = io.StringIO()
    closed.close()
    for name, stream in (("pipe", Broken()), ("closed", closed)):
        with Report(tmp_path / name, stream=stream) as report:
            run_through(report)
        assert len(read_metrics(tmp_path / name, "train")) == 4
        log = (tmp_path / name / "train.log").read_text()
        assert log.count("standard output is gone") == 1
        assert "generate: python -m lmcore generate x" in log


def test_ascii_stream_gets_escapes(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with Report(tmp_path, stream=io.TextIOWrapper(raw, encoding="ascii")) as report:
        report.note("吾輩は \ud800 猫")
        assert raw.getvalue() == b"\\u543e\\u8f29\\u306f \\ud800 \\u732b\n"
    assert "吾輩は \\ud800 猫" in (tmp_path / "train.log").read_text()


PROGRAM = """
import sys
from lmcore.report.console import protect_output
protect_output()
sys.stdin.isatty() or sys.stdin.readline()
for number in range(20_000):
    print(f"line {number} \\x1b]0;pwned\\x07\\x1b[2J 日本")
print("error \\x1b[31m", file=sys.stderr)
open(sys.argv[1], "w").write("reached the end")
"""


@pytest.mark.parametrize("shell", ["| head -3", ">/dev/full", ">&- 2>&- <&-", ">/dev/full 2>&1", "| cat"])
def test_training_survives_any_failing_output(shell: str, tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -c \"$0\" '{tmp_path}/done' {shell}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command, PROGRAM],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "reached the end"
    assert b"\x1b" not in done.stdout + done.stderr, "no escape codes from text"
    if shell in ("| cat", "| head -3"):
        assert b"line 2 \\ufffd]0;pwned\\ufffd\\ufffd[2J \\u65e5\\u672c\n" in done.stdout


def test_metrics_wait_for_a_full_disk(tmp_path: Path) -> None:
    """The file is exchanged for a full one: its records wait in memory, and are written when there is space."""
    for policy in ("continue", "stop"):
        stream = io.StringIO()
        folder = tmp_path / policy
        with make(folder, stream=stream, on_full_disk=policy) as report:
            report.begin(total_steps=30)
            feed(report, 1, 10)
            assert report._file is not None
            file = report._file._file
            with open("/dev/full", "ab", buffering=0) as full:
                report._file._file = full
                feed(report, 11, 20)
                assert report.failed == (policy == "stop")
            report._file._file = file
            feed(report, 21, 30)
            assert not report.failed
        assert [r["step"] for r in read_metrics(folder, "train")] == [1, *range(2, 31, 2)]
        assert stream.getvalue().count("cannot be written (No space left on device)") == 1
        assert "is written again; no record missing" in stream.getvalue()


def test_metrics_lost_to_a_full_disk_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = MetricsFile(path)
    write({"kind": "train", "step": 1})

    class Short:
        """The last page of a disk: half a line goes in, then nothing."""

        calls = 0

        def write(self, line: bytes) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            file.write(line[:10])
            return 10

    file, write._file = write._file, Short()
    write({"kind": "train", "step": 2})
    write({"kind": "train", "step": 3})
    assert (write.unwritten, write.problem) == (2, "No space left on device")
    write._file = file
    write({"kind": "train", "step": 4})
    write.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4], "the torn line spoils nothing but itself"
    assert b"\n\n" not in path.read_bytes()


def test_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        Report(tmp_path / "file" / "run")


# ---- commands


@pytest.mark.parametrize(
    "word", ["a b", "it's", "100% $HOME", "`x`", "日本 語", "a\nb\t'c'", "\x1b[31m", "", "-x", "~"]
)
def test_printed_commands_can_be_pasted(word: str) -> None:
    words = ["printf", "%s", word]
    command = console.shell_command(*words)
    assert "\n" not in command
    assert console.printable(command) == command, "nothing in it acts on the terminal that shows it"
    said = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout.decode()
    assert said == word


def test_printed_commands_name_the_interpreter_that_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert console.shell_command("python", "x.py") == "python x.py"
    assert console.shell_command("accelerate", "launch") == "accelerate launch"
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = tmp_path / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "lmcore").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    assert console.shell_command("lmcore", "generate", "a b") == f"{environment}/lmcore generate 'a b'"
    monkeypatch.chdir(tmp_path)
    assert console.shell_command("lmcore", "generate", "a b") == ".venv/bin/lmcore generate 'a b'"
    assert console.shell_command("python", "x.py") == ".venv/bin/python x.py"
    module = "accelerate.commands.accelerate_cli"
    assert console.shell_command("accelerate", "launch") == f".venv/bin/python -m {module} launch"


OURS = "/v/python -m lmcore.engine.launcher"


@pytest.mark.parametrize(
    ("above", "start"),
    [
        (
            "/v/python3 /v/accelerate launch --config_file a/cpu_2.yaml",
            "accelerate launch --config_file a/cpu_2.yaml",
        ),
        (
            "python -m accelerate.commands.launch --num_processes 2",
            "python -m accelerate.commands.launch --num_processes 2",
        ),
        ("/v/python /v/torchrun --nproc_per_node 2", "torchrun --nproc_per_node 2"),
        (f"{OURS} --config_file /p/accelerate_configs/cpu.yaml", "lmcore train"),
        (
            f"{OURS} --config_file /p/accelerate_configs/cpu_2.yaml --num_processes 2",
            "lmcore train --processes 2",
        ),
        (
            f"{OURS} --config_file /p/accelerate_configs/fsdp2.yaml --num_processes 4",
            "lmcore train --config_file fsdp2 --processes 4",
        ),
        (f"{OURS} --config_file mine.yaml", "lmcore train --config_file mine.yaml"),
        ("timeout 60", "accelerate launch"),
        ("", "accelerate launch"),
    ],
)
def test_printed_training_command_has_the_launcher_and_its_options(
    monkeypatch: pytest.MonkeyPatch, above: str, start: str
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(process, "command_line_above", lambda script: above.split())
    monkeypatch.setattr(sys, "argv", ["train_lm.py"])
    script = "" if start.startswith("lmcore") else " train_lm.py"
    assert console.training_command("--seed", "1") == f"{start}{script} --seed 1"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert console.training_command("--seed", "1") == "python train_lm.py --seed 1"


def test_peak_memory_of_a_gpu_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the allocator: what a run before in this process took, or a resume, is not this loop's."""
    peaks = {"allocated": 900, "reserved": 1000}  # of before
    now = {"allocated": 70, "reserved": 100}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(now))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peaks["reserved"])
    memory = PeakMemory(torch.device("cuda", 0))
    assert (memory.tensor_bytes, memory.peak_bytes) == (70, 100)
