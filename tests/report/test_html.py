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
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from lmcore.cli import saved
from lmcore.errors import RequestError
from lmcore.report.curves import Curves, Run, loss_picture, loss_png, read_run, smoothed
from lmcore.report.html import facts, page, plan_rows, write_report
from lmcore.report.metrics import MetricsFile, iterate_metrics, plain, read_metrics
from lmcore.saved import card

EVIL = "<script>alert(1)</script> & \"quotes\" '猫'"


OPENED: Any = SimpleNamespace(state={"config": {}}, manifest={})
EXPORT = {"step": 10, "run": "r", "lmcore": "1", "weights": "model", "dtype": "fp32"}
TOKENIZER = SimpleNamespace(vocab_size=9, eos_id=1)


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
    write({"kind": "event", "event": "end", "step": steps, "reason": "reached train.duration"})
    write.close()
    (folder / "config.yaml").write_text(
        f"# {EVIL}\noptim:\n  lr: {lr}\n  warmup: 2%\nrun_dir: {folder.name}\n"
    )
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    return read_run(folder)


def run_of(records: list[dict[str, Any]]) -> Run:
    run = Run("", Path())
    for record in records:
        run.add(record)
    return run


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


def test_report_is_one_valid_file_without_external_resources(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report([run], tmp_path / "run" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = parsed(text)
    said = " ".join(found.text)
    assert not re.search(r"(?:src|href)=\"?https?:|url\((?!#)|@import", text)
    assert "finished: reached train.duration" in said
    for expected in ("Loss by steps", "Loss by tokens", "Learning rate", "Gradient norm", "Throughput",
                     "Waiting for data", "Peak memory", "checkpoint", "skip", "step 400", "step 100",
                     "Plan and measurement", "torch version", "config.yaml"):  # fmt: skip
        assert expected in said, expected
    assert said.count(EVIL) == 1 + 4 + 1 + 1, "what the run wrote is there as text, in every place"
    assert "prefers-color-scheme:dark" in text
    style = text[text.index("<svg") :]
    for colour in ("#1f6feb", "#0a0b0c", "#0a0b0d", "#d1570a"):
        assert colour not in style, "pictures take their colours from the style sheet, which has a dark side"
    assert "\N{REPLACEMENT CHARACTER}[31m 400" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), "HTML allows no control characters"
    assert found.tags.count("svg") == 8, "the loss by steps twice: for a wide window and for a narrow one"
    assert not list(path.parent.glob(".report*"))


def test_several_runs_over_one_another_and_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 1e-3), ("b", 4e-3))]
    text = page(runs)
    said = " ".join(parsed(text).text)
    assert "a: train" in said
    assert "b: valid" in said
    differs = said[said.index("What differs") : said.index("Loss by steps")]
    assert "optim.lr" in differs
    assert "0.004" in differs
    assert "warmup" not in differs
    assert "run_dir" not in differs
    assert len(set(re.findall(r'id="([^"]+)"', text))) > 10
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)), "pictures do not clip one another"
    assert "Same configuration" in page([runs[0], make_run(tmp_path / "c", steps=20)])


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path) -> None:
    """Both were called x, in the tables and in the legends."""
    places = [tmp_path / place for place in ("a/x", "b/c/x", "b/d/x", "y")]
    runs = [make_run(place) for place in places]
    said = " ".join(parsed(page(runs)).text)
    for name in ("a/x", "c/x", "d/x", "y"):
        assert f"{name}: train" in said, name
    assert [run.name for run in runs] == ["a/x", "c/x", "d/x", "y"]
    page(runs)
    assert [run.name for run in runs] == ["a/x", "c/x", "d/x", "y"]
    again = [make_run(tmp_path / "y"), make_run(tmp_path / "y")]
    page(again)
    assert [run.name for run in again] == ["y", "y"]


def test_report_of_a_long_run_is_small_and_shows_its_spike(tmp_path: Path) -> None:
    short_run, long_run = (
        make_run(tmp_path / "s", steps=800),
        make_run(tmp_path / "l", steps=20_000, spike=7_777),
    )
    sizes = [len(page([run])) for run in (short_run, long_run)]
    assert sizes[1] < 2.5 * sizes[0] < 400_000
    points = long_run.train.points("loss")
    assert len(points) <= 4 * 300 + 2
    assert max(points, key=lambda p: p[1])[0] == 7_777, "no spike is lost"
    assert points == sorted(points)
    assert (points[0][0], points[-1][0]) == (1, 20_000)
    few = Curves({"step": step, "tokens": 2 * step, "loss": float(step % 7)} for step in range(100))
    assert few.points("loss", "tokens") == [(2.0 * step, float(step % 7)) for step in range(100)]
    assert few.means("loss") == [(step, step % 7) for step in range(100)]


def test_number_that_few_records_have_is_not_lost() -> None:
    """A metric that the user computes every tenth log line, in a run whose lines are joined by eight."""
    curves = Curves(
        {"step": step, "loss": 1.0} | ({"accuracy": step / 4000} if step % 10 == 7 else {})
        for step in range(1, 4001)
    )
    joined = {step for step, _ in curves.points("accuracy")}
    assert len(joined) == 400, "no stretch has more than two of them, its lowest and its highest"
    assert len(curves.points("loss")) < 2400


def test_smoothing_has_no_bias() -> None:
    """Neither at the start, where an exponential mean hangs on to its first value, nor on a falling line."""
    falling = [(float(x), 10.0 - 0.05 * x) for x in range(150)]
    assert smoothed(falling) == [(x, pytest.approx(y)) for x, y in falling]
    noisy = [(float(x), 3.0 + (-1) ** x) for x in range(301)]
    assert all(abs(y - 3.0) < 0.15 for _, y in smoothed(noisy)[10:-10])
    steep = [(float(x), 9.0 / (x + 1)) for x in range(49)]
    assert smoothed(steep) == steep, "few points are shown as they are"


def test_first_loss_and_last_loss_are_inside_the_picture(tmp_path: Path) -> None:
    from lmcore.report.curves import loss_limits

    for spike in (None, 150):
        run = make_run(tmp_path / f"spike{spike}", steps=400, spike=spike)
        limits = loss_limits([run])
        assert limits is not None
        points = run.train.points("loss")
        assert limits[0] < points[-1][1] < points[0][1] < limits[1] < 20


def test_reading_is_linear_and_bounded(tmp_path: Path) -> None:
    """Ten times the records, resumes included: about ten times the time, and hardly more memory."""
    import tracemalloc

    used = {}
    for steps in (1_000, 10_000):
        path = tmp_path / f"{steps}"
        path.mkdir()
        with open(path / "metrics.jsonl", "w") as file:
            for step in range(1, steps + 1):
                for kind in ("train", "eval"):
                    file.write(
                        f'{{"kind": "{kind}", "set": "v", "step": {step}, "tokens": {step}, "loss": 2.0}}\n'
                    )
                file.write(
                    f'{{"kind": "sample", "step": {step}, "set": "p", "prompt": "p", "text": "{"x" * 50}"}}\n'
                )
                file.write(f'{{"kind": "event", "event": "checkpoint", "step": {step}}}\n')
                if step % 10 == 0:
                    file.write(f'{{"kind": "event", "event": "resume", "step": {step - 2}}}\n')
        tracemalloc.start()
        run = read_run(path)
        used[steps] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert run.train.last["step"] == steps - 2, "the last steps were thrown away by the resume"
        assert run.counts == {"checkpoint": steps, "resume": steps // 10}
        assert steps - 2 in run.samples
        assert 24 <= len(run.samples) <= 48
        assert len(run.saved_steps) < 600
    assert used[10_000] < 2.5 * used[1_000]


def test_hostile_records_are_skipped_or_shown_as_text(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=20)
    nested = '{"kind":' + "[" * 100_000
    with open(run_dir / "metrics.jsonl", "a") as file:
        for line in (
            '{"kind": "event", "event": "skip", "step": "<img src=x onerror=alert(1)>"}',
            '{"kind": "event", "event": "<b>", "step": [1], "reason": {"a": "<i>"}}',
            '{"kind": "train", "step": "five", "loss": 1}',
            '{"kind": "train", "step": 30, "loss": NaN, "lr": 1e999, "tokens": 1, "epoch": "<u>"}',
            '{"kind": "eval", "set": ["a"], "step": 1, "loss": 1}',
            '{"kind": "eval", "set": "<s>", "step": 1, "loss": 1, "bits_per_byte": "x"}',
            '{"kind": "sample", "step": 1, "text": 5}',
            '{"kind": "event", "event": "start", "step": true, "rows": [1], "versions": 7, "plan": "x"}',
            nested, "[]", "7", "", "\x00", '{"kind": 7}',
        ):  # fmt: skip
            file.write(line + "\n")
    (run_dir / "status.json").write_text("[1]")
    run = read_run(run_dir)
    text = page([run])
    parsed(text)
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    for tag in ("<b>{", "<i>", "<u>", "<s>"):
        assert tag not in text


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    """As a set, as a run, as a metric; warnings are errors in these tests."""
    names = [
        "costs $5_{ to $6_",
        "日本語マニュアル",
        "한국어 中文",
        "_hidden",
        "\\frac{1}{2}",
        "a\nb",
        "<svg>",
        "x" * 300,
    ]
    run = make_run(tmp_path / "run", steps=20)
    records = [{"kind": "train", "step": step, "tokens": step, "loss": 2.0} for step in range(20)]
    for name in names:
        for step in range(1, 20):
            records += [
                {
                    "kind": "eval",
                    "set": name,
                    "step": step,
                    "tokens": step,
                    "loss": 3.0,
                    "bits_per_byte": None,
                },
                {"kind": "train", "step": 20 + step, "tokens": step, "loss": 3.0, name: 1.0},
            ]
    for record in records:
        run.add(record)
    named = [make_run(tmp_path / f"{number}", steps=20) for number in range(len(names))]
    for one, name in zip(named, names, strict=True):
        one.name = name
    for runs in ([run], [run, *named]):
        parsed(page(runs))
    assert loss_png(run_of(records))


def test_sets_and_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        run = make_run(tmp_path / name, steps=40)
        for step in (10, 20):
            run.add({"kind": "eval", "set": "second", "step": step, "tokens": step, "loss": 3.0})
            run.add({"kind": "eval", "set": "third", "step": step, "tokens": step, "loss": 3.0})
        runs.append(run)
    text = page(runs)
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert {f"var(--c{index})" for index in range(6)} <= set(re.findall(r"var\(--c\d\)", drawn))


@pytest.mark.parametrize(("again", "at", "kept"), [("resume", 3, [2, 7]), ("start", 0, [7])])
def test_run_is_what_its_newest_start_says(again: str, at: int, kept: list[int], tmp_path: Path) -> None:
    old, new = {"text (old)": "9 documents, 8 tokens"}, {"text (new)": "3 documents, 2 tokens"}
    write = MetricsFile(tmp_path / "metrics.jsonl")
    happened = [
        ("start", 0),
        ("checkpoint", 2),
        ("resume", 2),
        ("checkpoint", 4),
        (again, at),
        ("checkpoint", 7),
    ]
    for index, (name, step) in enumerate(happened):
        rows = new if index == 4 else old
        write({"kind": "event", "event": name, "step": step, "rows": rows, "plan": {"steps": index}})
    write({"kind": "train", "step": 9, "tokens": 9, "loss": 2.0})
    write.close()
    run = read_run(tmp_path)
    assert plan_rows(run)[-1] == ("steps", ["4", "9", "2.25"])
    assert run.saved_steps == kept
    assert facts(run).get("resumes") == ("2" if again == "resume" else None)
    assert (b">resume<" in loss_picture([run], "step")) == (again == "resume")
    assert run.start is not None
    assert run.start["rows"] == new
    of_card = {step: card.read_results(tmp_path / "metrics.jsonl", step).run.start for step in (2, 9)}
    assert of_card[9] == run.start
    assert of_card[2] is not None
    assert of_card[2]["rows"] == (old if again == "resume" else new)


def test_numbers_in_words(tmp_path: Path) -> None:
    rows = facts(make_run(tmp_path / "run"))
    assert rows["steps"] == "400"
    assert rows["tokens"] == "400k"
    assert rows["best valid"].endswith("at 400")
    assert rows["valid bits/byte"] == "1.5000"
    assert rows["time in steps"] == "0:01:20"
    assert rows["skips"] == "1"


@pytest.mark.parametrize(
    ("expected", "shown"),
    [
        (
            "{expected_loss_low: 2, expected_loss: 2.2, expected_loss_high: 2.4}",
            "2.2000 (90%: 2.0000 to 2.4000), reached 2.2648: inside",
        ),
        (
            "{expected_loss_low: 1.9, expected_loss: 2.0, expected_loss_high: 2.1}",
            "2.0000 (90%: 1.9000 to 2.1000), reached 2.2648: above",
        ),
        (
            "{expected_loss_low: 2.3, expected_loss: 2.4, expected_loss_high: 2.5}",
            "2.4000 (90%: 2.3000 to 2.5000), reached 2.2648: below",
        ),
        ("{expected_loss: 2.0}", "2.0000, reached 2.2648"),
        ("{expected_loss: null}", None),
        ("[1, 2]", None),
        ("{expected_loss: nothing}", None),
    ],
)  # fmt: skip
def test_expected_loss_stands_beside_the_loss_that_was_reached(
    expected: str, shown: str | None, tmp_path: Path
) -> None:
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_text(f"report: {expected}\n")
    run = read_run(tmp_path)  # its last validation loss: 9 exp(-4) + 2.1
    assert facts(run).get("expected loss") == shown
    if shown is not None:
        assert shown in page([run])


def test_report_of_a_run_without_steps(tmp_path: Path) -> None:
    write = MetricsFile(tmp_path / "metrics.jsonl")
    write({"kind": "event", "event": "start", "step": 0})
    write({"kind": "train", "step": 1, "epoch": 0.0, "tokens": 5, "loss": float("nan"), "lr": 1.0})
    write.close()
    run = read_run(tmp_path)
    parsed(page([run]))
    assert loss_png(run_of([{"kind": "train", "step": 1, "loss": None}])) is None
    with pytest.raises(RequestError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "nothing")


HOSTILE: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        10**400,
        -(2**63),
        1e308,
        -1e-300,
        float("nan"),
        float("inf"),
        "",
        "7",
        "<b>",
        "\ud800",
    ),
    *([], [1, [2]], {}, {"step": 1}, {"<i>": ["$", {}]}, "x" * 5000, "$5_{ \x1b]0;", "resume", "start"),
]
"""Values of every type, for any field."""


def hostile_record(draw: Random) -> dict[str, Any]:
    """A record as a run writes it, some of whose fields are missing or hold anything."""
    known: dict[str, Any] = {
        "train": {"step": 3, "epoch": 0.1, "tokens": 30, "loss": 2.0, "lr": 0.1, "tokens_per_second": 5.0,
                  "memory_bytes": 9, "train_seconds": 3.0, "position": 4},
        "eval": {"step": 3, "set": "valid", "loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0},
        "event": {"event": "start", "step": 0, "rows": {"model": "x"}, "versions": {"torch": "2"},
                  "plan": {"memory_bytes": 8, "seconds": 2.0, "tokens": 4, "steps": 1}, "reason": "none"},
        "sample": {"step": 3, "set": "a", "prompt": "p", "text": "t"},
    }  # fmt: skip
    kind = draw.choice(list(known))
    record = {"kind": kind, **known[kind]}
    for name in draw.sample(list(known[kind]), draw.randrange(4)):
        if draw.random() < 0.4:
            del record[name]
        else:
            record[name] = draw.choice(HOSTILE)
    return record


@pytest.mark.parametrize("seed", range(40))
def test_every_reader_of_records_takes_any_value_in_any_field(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Random(seed)
    monkeypatch.setattr("lmcore.report.html.CAN_DRAW", seed % 10 == 0)  # half a second each
    for name in "ab":
        (tmp_path / name).mkdir()
        lines = [json.dumps(hostile_record(draw)) for _ in range(30)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, "", "{", "[1]", '{"kind": 3}']))
        status = draw.choice(
            ["", "[]", "[" * 100_000, json.dumps({"state": draw.choice(HOSTILE), "reason": {}})]
        )
        (tmp_path / name / "status.json").write_text(status)
        config = draw.choice(["", "- 1", "optim: 3", "optim: {lr: [1, {a: .nan}]}", "1: 2\nnull: {}"])
        (tmp_path / name / "config.yaml").write_text(config)
    runs = [read_run(tmp_path / name) for name in "ab"]
    for shown in (runs, runs[:1]):
        parsed(page(shown))
    assert len(read_metrics(tmp_path / "a")) <= len(list(iterate_metrics(tmp_path / "a")))
    results = card.read_results(tmp_path / "a" / "metrics.jsonl", 10)
    words = card.markdown(
        results, opened=OPENED, record=EXPORT, tokenizer=TOKENIZER, parameters=5, curve=False
    )
    assert "<b>" not in words.replace("`", "")


def test_card_reads_only_what_it_shows(tmp_path: Path) -> None:
    write = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 5001):
        write({"kind": "train", "step": step, "tokens": step, "loss": 1.0 / step})
        write({"kind": "eval", "set": f"set {step}", "step": step, "tokens": step, "loss": 1.0 / step})
    write.close()
    results = card.read_results(tmp_path / "metrics.jsonl", 4000)
    assert results.train["step"] == 4000
    assert len(results.evaluations) == 100
    assert len(results.run.train.points("loss")) <= 1200


def test_card_has_a_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    png = loss_png(read_run(make_run(tmp_path / "run").path))
    assert png is not None
    picture = imread(io.BytesIO(png))
    assert picture.shape[:2] == (435, 660)
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
    with pytest.raises(RequestError, match="no such run among 2 runs"):
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


def test_numbers_that_json_does_not_have_become_null() -> None:
    values = {"a": [float("inf"), {"b": (float("nan"), 1.5, -float("inf"))}], "c": None}
    assert json.loads(json.dumps(plain(values), allow_nan=False)) == {
        "a": [None, {"b": [None, 1.5, None]}],
        "c": None,
    }
