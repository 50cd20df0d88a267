"""The report opens offline, shows what happened, and treats everything a run wrote as text."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lmcore.cli import saved
from lmcore.errors import RequestError
from lmcore.report.curves import Run, loss_png, read_run, series, smoothed, thinned
from lmcore.report.html import facts, page, write_report
from lmcore.report.metrics import MetricsFile

EVIL = "<script>alert(1)</script> & \"quotes\" '猫'"


def make_run(folder: Path, *, lr: float = 1e-3, steps: int = 400, spike: int | None = None) -> Run:
    """A run folder with everything in it that a report shows."""
    write = MetricsFile(folder / "metrics.jsonl")
    write({"kind": "event", "event": "start", "step": 0, "rows": {"model": EVIL}, "versions": {"torch": "2.13"},
           "command": ["train_lm.py"], "plan": {"memory_bytes": 2**30, "note": "fits"}})  # fmt: skip
    for step in range(1, steps + 1):
        loss = 9 * math.exp(-step / 100) + 2 + (50.0 if step == spike else 0.0)
        write({"kind": "train", "step": step, "epoch": step / 100, "tokens": 1000 * step, "loss": loss, "lr": lr,
               "grad_norm": 1 / step, "tokens_per_second": 5000.0, "data_wait": 0.01, "memory_bytes": 2**29,
               "train_seconds": 0.2 * step})  # fmt: skip
        if step % 100 == 0:
            write({"kind": "eval", "set": "valid", "step": step, "tokens": 1000 * step, "epoch": step / 100,
                   "loss": loss + 0.1, "perplexity": 9.0, "bits_per_byte": 1.5})  # fmt: skip
            write(
                {
                    "kind": "sample",
                    "step": step,
                    "set": "def ",
                    "prompt": "def ",
                    "text": f"{EVIL}\x00\x1b[31m {step}",
                }
            )
            write({"kind": "event", "event": "checkpoint", "step": step})
    write({"kind": "event", "event": "skip", "step": 150, "reason": EVIL})
    write({"kind": "event", "event": "end", "step": steps, "reason": "the horizon is reached"})
    write.close()
    (folder / "config.yaml").write_text(
        f"# {EVIL}\noptim:\n  lr: {lr}\n  warmup: 2%\nrun_dir: {folder.name}\n"
    )
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    return read_run(folder)


class Checker(HTMLParser):
    """Every tag is closed, and nothing is loaded."""

    EMPTY = frozenset({"meta", "br", "path", "use", "rect", "circle", "line", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} would run code"
            if name in ("src", "href", "xlink:href", "data"):
                assert (value or "").startswith("#"), value
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_the_report_is_one_sound_file_that_loads_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report([run], tmp_path / "run" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = parsed(text)
    said = " ".join(found.text)
    assert not re.search(r"(?:src|href)=\"?https?:|url\((?!#)|@import", text)
    assert "finished: the horizon is reached" in said
    for expected in ("Loss by steps", "Loss by tokens", "Learning rate", "Gradient norm", "Throughput",
                     "Waiting for data", "Peak memory", "checkpoint", "skip", "step 400", "step 100",
                     "Plan against reality", "torch version", "config.yaml"):  # fmt: skip
        assert expected in said, expected
    assert said.count(EVIL) == 1 + 4 + 1 + 1, "what the run wrote is there as text, in every place"
    assert "\N{REPLACEMENT CHARACTER}[31m 400" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), "HTML allows no control characters"
    assert found.tags.count("svg") == 7
    assert not list(path.parent.glob(".report*"))


def test_several_runs_over_one_another_and_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 1e-3), ("b", 4e-3))]
    text = page(runs)
    said = " ".join(parsed(text).text)
    assert "a: train" in said
    assert "b: valid" in said
    differs = said[said.index("What differs") : said.index("Curves")]
    assert "optim.lr" in differs
    assert "0.004" in differs
    assert "warmup" not in differs
    assert "run_dir" not in differs
    assert len(set(re.findall(r'id="([^"]+)"', text))) > 10
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)), "pictures do not clip one another"
    same = page([runs[0], Run("c", tmp_path, runs[0].records, runs[0].config)])
    assert "Same configuration" in same


def test_a_long_run_stays_light_and_its_spike_visible(tmp_path: Path) -> None:
    short_run, long_run = (
        make_run(tmp_path / "s", steps=800),
        make_run(tmp_path / "l", steps=20_000, spike=7_777),
    )
    sizes = [len(page([run])) for run in (short_run, long_run)]
    assert sizes[1] < 1.7 * sizes[0] < 400_000
    points = series(long_run.of("train"), "loss")
    few = thinned(points)
    assert len(few) <= 603
    assert max(few, key=lambda p: p[1])[0] == 7_777
    assert few[-1] == points[-1]
    assert few == sorted(few)
    assert thinned(points[:100]) == points[:100]
    level = smoothed([(float(x), 3.0) for x in range(100)])
    assert all(y == pytest.approx(3.0) for _, y in level), "no bias at the start"


def test_numbers_in_words(tmp_path: Path) -> None:
    rows = facts(make_run(tmp_path / "run"))
    assert rows["steps"] == "400"
    assert rows["tokens"] == "400k"
    assert rows["best valid"].endswith("at 400")
    assert rows["valid bits/byte"] == "1.5000"
    assert rows["time in steps"] == "0:01:20"
    assert rows["skips"] == "1"


def test_a_run_without_steps_still_has_a_page(tmp_path: Path) -> None:
    write = MetricsFile(tmp_path / "metrics.jsonl")
    write({"kind": "event", "event": "start", "step": 0})
    write({"kind": "train", "step": 1, "epoch": 0.0, "tokens": 5, "loss": float("nan"), "lr": 1.0})
    write.close()
    run = read_run(tmp_path)
    parsed(page([run]))
    assert loss_png(run.records) is None
    with pytest.raises(RequestError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "nothing")


def test_the_card_gets_a_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    png = loss_png(make_run(tmp_path / "run").records)
    assert png is not None
    picture = imread(io.BytesIO(png))
    assert picture.shape[:2] == (465, 900)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::50]}) > 5, "not an empty picture"


def test_past_runs_are_picked_by_their_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lr in (("a", 1e-4), ("b", 4e-3)):
        make_run(tmp_path / name, lr=lr, steps=20)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    for wish in ("lr=1e-4", "optim.lr=0.0001"):
        saved.report([*both, "--where", wish])
        said = capsys.readouterr().out
        assert "a: steps 20" in said
        assert "b: steps" not in said
        assert (tmp_path / "a" / "report.html").exists()
    newer = tmp_path / "b" / "config.yaml"
    newer.write_text(newer.read_text() + "fresh: 3\n", encoding="utf-8")
    saved.report([*both, "--where", "fresh=3"])
    assert "a: steps" not in capsys.readouterr().out, "an older run has no such option: it is not that run"
    with pytest.raises(RequestError, match="no lrr"):
        saved.report([*both, "--where", "lrr=1"])
    with pytest.raises(RequestError, match="none of the 2"):
        saved.report([*both, "--where", "lr=7"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="not run: no chromium here")
def test_chromium_draws_it(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    picture: Any = tmp_path / "screen.png"
    subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000",
         f"--screenshot={picture}", f"file://{path}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    from matplotlib.image import imread

    pixels = imread(picture)
    blue = (pixels[..., 2] > 0.8) & (pixels[..., 0] < 0.3)
    assert blue.sum() > 2000, "the curves are there"
