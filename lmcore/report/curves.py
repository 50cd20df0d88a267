"""Reads a run folder into curves, from which the pictures of ``report.html`` and of the model card are drawn.

The run is divided into a few hundred stretches, so the memory does not depend on its length. A stretch keeps the minimum, the
maximum and the mean of each number, so that no spike is lost. What a resume or a rewind discarded is not drawn.

    >>> svg = loss_picture([read_run("runs/a"), read_run("runs/b")], by="tokens")
"""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, final

from lmcore.errors import RequestError
from lmcore.humanize import message_of, one_line, runs_near, short
from lmcore.report.metrics import ABANDONING_EVENTS, RECORD_KEYS, iterate_metrics
from lmcore.report.redact import redact

Points = list[tuple[float, float]]

CAN_DRAW = importlib.util.find_spec("matplotlib") is not None
"""matplotlib is optional; without it there are tables and text, but no pictures."""
STRETCHES = 300
"""Between this many and twice as many stretches are kept; a picture has no more columns."""
SAMPLED_STEPS = 24
"""Samples of between this many and twice as many steps are kept."""
SHOWN_EVENTS = 200
COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df", "#bf3989", "#0a7ea4", "#9a6700", "#6e7781")
INK, GRID = "#0a0b0c", "#0a0b0d"
"""Colours of text and grid lines; for a page, :func:`lmcore.report.html.figure` replaces all colours by CSS variables."""
MARKS = {"resume": "#6e7781", "rewind": "#cf222e", "skip": "#d1570a", "signal": "#9a6700"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


# ---- reading


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that can be drawn: not a bool, infinity or NaN."""
    return type(value) in (int, float) and -1e300 < value < 1e300


@dataclass
class _Stretch:
    """Consecutive records: for each key the lowest and highest (value, step, tokens), the sum and the count."""

    step: float
    tokens: float
    numbers: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], float, int]]

    @staticmethod
    def of(records: Sequence[dict[str, Any]]) -> _Stretch:
        middle = records[len(records) // 2]
        numbers = {}
        for key in set().union(*records):  # a number of the user's own need not be in every record
            found = [
                (record[key], record.get("step", 0), record.get("tokens", 0))
                for record in records
                if is_number(record.get(key))
            ]
            if found:
                numbers[key] = min(found), max(found), sum(value for value, _, _ in found), len(found)
        return _Stretch(middle.get("step", 0), middle.get("tokens", 0), numbers)

    def joined(self, other: _Stretch) -> _Stretch:
        numbers = {**self.numbers, **other.numbers}
        for key in self.numbers.keys() & other.numbers.keys():
            low, high, total, count = self.numbers[key]
            low_2, high_2, total_2, count_2 = other.numbers[key]
            numbers[key] = min(low, low_2), max(high, high_2), total + total_2, count + count_2
        return _Stretch((self.step + other.step) / 2, (self.tokens + other.tokens) / 2, numbers)


class Curves:
    """The numbers of records over step and tokens, reduced to stretches while they are added."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.last: dict[str, Any] = {}
        """The newest record."""
        self._size = 1
        self._stretches: list[_Stretch] = []
        self._waiting: list[dict[str, Any]] = []
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Add the next record; if it has the same step as the last one, it replaces that one."""
        if self._waiting and self._waiting[-1].get("step") == record.get("step"):
            self._waiting.pop()
        elif len(self._waiting) > self._size:
            self._close(self._waiting[: self._size])
            del self._waiting[: self._size]
        self._waiting.append(record)
        self.last = record

    def _close(self, records: Sequence[dict[str, Any]]) -> None:
        self._stretches.append(_Stretch.of(records))
        if len(self._stretches) >= 2 * STRETCHES:
            pairs = zip(self._stretches[::2], self._stretches[1::2])
            self._stretches = [one.joined(other) for one, other in pairs]
            self._size *= 2

    def _all(self) -> list[_Stretch]:
        rest = [
            self._waiting[start : start + self._size] for start in range(0, len(self._waiting), self._size)
        ]
        return [*self._stretches, *map(_Stretch.of, rest)]

    def __bool__(self) -> bool:
        return bool(self.last)

    def keys(self) -> set[str]:
        """The names of all numbers so far."""
        return {key for stretch in self._all() for key in stretch.numbers}

    def points(self, key: str, by: str = "step") -> Points:
        """(x, value) of the minimum and the maximum of each stretch; ``by`` is ``step`` or ``tokens``."""
        column = 1 if by == "step" else 2
        found: Points = []
        for stretch in self._all():
            if key in stretch.numbers:
                low, high, _, _ = stretch.numbers[key]
                found += sorted({(low[column], low[0]), (high[column], high[0])})
        return found

    def means(self, key: str, by: str = "step") -> Points:
        """(x, mean) of each stretch."""
        return [
            (getattr(stretch, by), stretch.numbers[key][2] / stretch.numbers[key][3])
            for stretch in self._all()
            if key in stretch.numbers
        ]


@dataclass
class Evaluations:
    """The results on one set."""

    curve: Curves = field(default_factory=Curves)
    best: dict[str, Any] | None = None
    """The record with the lowest loss."""

    def add(self, record: dict[str, Any]) -> None:
        self.curve.add(record)
        if is_number(record.get("loss")) and (self.best is None or record["loss"] <= self.best["loss"]):
            self.best = record

    @property
    def last(self) -> dict[str, Any]:
        return self.curve.last


@final
@dataclass
class Run:
    """The content of one run folder; its size in memory does not depend on the length of the run."""

    name: str
    path: Path
    config: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    train: Curves = field(default_factory=Curves)
    evaluations: dict[str, Evaluations] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    """The newest ``start`` or ``resume`` event with a table of rows: the final request."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """The first events except checkpoints, and the last one."""
    counts: Counter[str] = field(default_factory=Counter)
    """How often each event happened."""
    saved_steps: list[int] = field(default_factory=list)
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    sampled_steps: int = 0
    """Number of steps with samples; ``samples`` holds some of them, evenly spread, and the newest."""
    _sample_every: int = 1
    _save_every: int = 1

    def add(self, record: dict[str, Any]) -> None:
        """Add the next record of metrics.jsonl."""
        match record["kind"]:
            case "train":
                self.train.add(record)
            case "eval" if isinstance(record.get("set"), str):
                self.evaluations.setdefault(record["set"], Evaluations()).add(record)
            case "sample" if "step" in record:
                self._add_sample(record)
            case "event":
                self._add_event(record)

    def _add_sample(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if step not in self.samples:
            newest = next(reversed(self.samples), None)
            if newest is not None and (self.sampled_steps - 1) % self._sample_every:
                del self.samples[newest]
            self.samples[step] = []
            self.sampled_steps += 1
            if len(self.samples) > 2 * SAMPLED_STEPS:
                self._sample_every *= 2
                self.samples = dict(list(self.samples.items())[::2])
        again = [old for old in self.samples[step] if old.get("set") != record.get("set")]
        self.samples[step] = [*again, record][:SHOWN_EVENTS]

    def _add_event(self, record: dict[str, Any]) -> None:
        name, step = str(record.get("event")), record.get("step")
        if name == "start":  # a new start: what happened before does not belong to this run
            self.counts.clear()
        if name in ABANDONING_EVENTS and type(step) is int:
            self.saved_steps = [saved for saved in self.saved_steps if saved <= step]
        self.counts[name] += 1
        if name == "checkpoint":
            if type(step) is int and self.counts[name] % self._save_every == 0:
                self.saved_steps.append(step)
            if len(self.saved_steps) >= 2 * STRETCHES:
                self.saved_steps, self._save_every = self.saved_steps[1::2], 2 * self._save_every
            return
        if name in ("start", "resume") and isinstance(record.get("rows"), dict):
            self.start = record
        if len(self.events) > SHOWN_EVENTS:
            self.events.pop()
        self.events.append(record)

    def settings(self) -> dict[str, Any]:
        """The configuration as nested values."""
        values = plain_yaml(self.config, f"{self.path}/config.yaml")
        return values if isinstance(values, dict) else {}


def plain_yaml(text: str, where: str) -> Any:
    """Parse YAML in the form that lmcore writes: without tags and aliases (a few lines of aliases can expand to terabytes).

    Raises:
        RequestError: the text is not such YAML; the message begins with ``where``.
    """
    import yaml  # lazily: only a comparison needs it

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*name), which lmcore does not write")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RequestError(f"{where}: not a configuration of lmcore: {message_of(error)}") from None


def read_settings(run_dir: Path) -> Any:
    """The values of a run's ``config.yaml``, without conversion.

    Raises:
        RequestError: it cannot be read, or is not YAML in the form that lmcore writes.
    """
    path = run_dir / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {error}") from None
    return plain_yaml(text, str(path))


def read_run(path: str | PathLike[str]) -> Run:
    """Read a run folder. The time grows with the number of records; the memory does not.

    Raises:
        RequestError: the folder has no metrics, or a file cannot be read.
    """
    folder = Path(path)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise RequestError(
            f"{folder}: no metrics.jsonl there; give the folder of a run that has logged a step{runs_near(folder)}"
        )
    config, status = folder / "config.yaml", folder / "status.json"
    try:
        state = json.loads(status.read_bytes()) if status.is_file() else {}
    except (OSError, ValueError, RecursionError):
        state = {}
    try:
        run = Run(
            name=folder.resolve().name,
            path=folder,
            config=redact(config.read_text(encoding="utf-8", errors="replace")) if config.is_file() else "",
            status=state if isinstance(state, dict) else {},
        )
        for record in iterate_metrics(metrics):
            run.add(record)
    except OSError as error:
        raise RequestError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    return run


def name_apart(runs: Sequence[Run]) -> None:
    """Extend equal names of runs (``/a/x``, ``/b/x``) by as many parent folders as are needed to distinguish them (``a/x``,
    ``b/x``)."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    for same in by_name.values():
        parts = [run.path.resolve().parts for run in same]
        if len(set(parts)) == 1:  # a single run, or the same run repeated
            continue
        depth = 1
        while len({one[-depth:] for one in parts}) < len(set(parts)):
            depth += 1
        for run, one in zip(same, parts):
            run.name = str(Path(*one[-depth:]))


# ---- drawing


FEWEST_SMOOTHED = 50
"""Least number of points to smooth: 4% of fewer are less than two."""


def smoothed(points: Points) -> Points:
    """A moving average over about 4% of the curve, with a smaller window near its ends; fewer than 50 points are not smoothed.

    The window is centred on the point, so that the mean neither lags behind a falling loss nor leads it. A wider window would
    show the steep beginning of a run too high.
    """
    half = len(points) // FEWEST_SMOOTHED
    if half == 0:
        return points
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result: Points = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        first, last = index - reach, index + reach + 1
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result


@functools.cache
def _fonts() -> list[str]:
    """DejaVu, which comes with matplotlib, and an installed font with Chinese, Japanese and Korean characters, if any."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    families = ("Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "TakaoPGothic",
                "VL PGothic", "Hiragino Sans", "Yu Gothic", "Meiryo", "MS Gothic", "Noto Sans CJK SC", "Noto Sans SC",
                "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Noto Sans CJK KR",
                "Noto Sans KR", "NanumGothic", "Droid Sans Fallback", "Arial Unicode MS")  # fmt: skip
    return ["DejaVu Sans", *[name for name in families if name in installed][:2]]


def drawing(draw: Callable[..., bytes]) -> Callable[..., bytes]:
    """Decorate a drawing function to use the fonts and colours of a report; names are text, never parsed as formulas."""

    @functools.wraps(draw)
    def wrapper(*arguments: Any, **options: Any) -> bytes:
        import matplotlib  # lazily: it takes a second to import

        style: Any = {"font.family": _fonts(), "text.parse_math": False, "svg.fonttype": "none"}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK)
        style |= {"xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "svg.hashsalt": "lmcore"}
        with matplotlib.rc_context(rc=style), warnings.catch_warnings():
            # Characters that no installed font has are fine: in a page the browser draws the text with its own fonts.
            warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph .* missing from")
            return draw(*arguments, **options)

    return wrapper


def new_axes(
    title: str, x_label: str, y_label: str, size: tuple[float, float] = (4.4, 2.9)
) -> tuple[Any, Any]:
    """An empty figure of ``size`` inches and its axes, in the style of a report."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.18, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(tick)
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xmargin(0.01)
    return figure, axes


def tick(value: float, _: float = 0) -> str:
    """The label of a tick; has the signature of a matplotlib formatter."""
    return short(value) if abs(value) >= 10_000 else f"{value:.6g}"


def _label(name: str) -> str:
    """A name for a legend, which would leave out a name that begins with ``_``."""
    name = one_line(name)
    name = name if len(name) <= 48 else f"{name[:47]}…"
    return f" {name}" if name.startswith("_") else name


def finished(figure: Any, axes: Any, *, format: str = "svg") -> bytes:
    """A figure with its legend, as ``svg`` (with a transparent background, for a page) or in another format of matplotlib."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, fontsize=8, frameon=False)
    if format == "svg":  # the page's own background
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format=format, metadata={"Date": None} if format == "svg" else None, dpi=150)
    if format != "svg":
        return out.getvalue()
    # Ids are derived from the content, so equal clip paths of two pictures on one page would have the same id: make them unique.
    return re.sub(
        rb'(id="|url\(#|href="#)', rb"\g<1>" + f"p{next(_PICTURE_NUMBERS)}-".encode(), out.getvalue()
    )


_PICTURE_NUMBERS = itertools.count()


def loss_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The limits of the loss axis: they include 98% of the losses and each curve's first one, and all losses unless that more
    than doubles the range, as a spike does. ``None`` for fewer than 8 losses."""
    curves = [run.train for run in runs] + [known.curve for run in runs for known in run.evaluations.values()]
    points = [curve.points("loss") for curve in curves]
    values = sorted(y for curve in points for _, y in curve)
    if len(values) < 8:
        return None
    usual = max([values[int(0.98 * (len(values) - 1))], *[curve[0][1] for curve in points if curve]])
    low, high = values[0], values[-1]
    if high - low > 2 * (usual - low):
        high = usual
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


@drawing
def loss_picture(runs: Sequence[Run], by: str, *, format: str = "svg", wide: bool = False) -> bytes:
    """Training loss (as logged, and its mean) and validation losses of one or several runs, by ``step`` or ``tokens``."""
    label = "steps" if by == "step" else by
    figure, axes = new_axes(f"Loss by {label}", label, "nats per token", (11.0, 3.7) if wide else (4.4, 2.9))
    colours = itertools.cycle(COLOURS)
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        raw, mean = run.train.points("loss", by), run.train.means("loss", by)
        colour = next(colours)
        if len(mean) >= FEWEST_SMOOTHED:
            axes.plot(*zip(*raw), color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(*zip(*smoothed(mean)), color=colour, linewidth=1.7, label=_label(f"{prefix}train"))
        elif raw:
            axes.plot(*zip(*raw), color=colour, linewidth=1.7, marker=".", label=_label(f"{prefix}train"))
        for (name, known), marker in zip(run.evaluations.items(), itertools.cycle(MARKERS)):
            points = known.curve.points("loss", by)
            style = {"color": next(colours), "linestyle": "--", "marker": marker, "markersize": 3.5}
            if points:
                axes.plot(*zip(*points), label=_label(f"{prefix}{name}"), linewidth=1.2, **style)
    if by == "step" and len(runs) == 1:
        _mark_events(axes, runs[0])
    limits = loss_limits(runs)
    if limits:
        axes.set_ylim(*limits)
    return finished(figure, axes, format=format)


def _mark_events(axes: Any, run: Run) -> None:
    if run.saved_steps:
        bottom = axes.get_xaxis_transform()
        places = [0.015] * len(run.saved_steps)
        axes.plot(run.saved_steps, places, "^", color="#2da44e", ms=4, transform=bottom, label="checkpoint")
    starts = [index for index, event in enumerate(run.events) if event.get("event") == "start"]
    events = run.events[max(starts, default=0) :]
    for name, colour in MARKS.items():
        steps = [
            event["step"] for event in events if event.get("event") == name and is_number(event.get("step"))
        ]
        for index, step in enumerate(steps):
            axes.axvline(step, color=colour, linewidth=0.9, linestyle=":", label=None if index else name)


@drawing
def number_picture(
    runs: Sequence[Run], key: str, title: str, label: str, *, scale: float = 1.0, log: bool = False
) -> bytes:
    """One number of the train records over the steps of one or several runs."""
    figure, axes = new_axes(title, "steps", label)
    lowest = 0.0
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        points = [(x, scale * y) for x, y in run.train.points(key)]
        if points:
            name = _label(run.name) if len(runs) > 1 else None
            axes.plot(*zip(*points), color=colour, linewidth=1.2, label=name)
            lowest = min(lowest, *[y for _, y in points])
    if log and any(y > 0 for run in runs for _, y in run.train.points(key)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(tick)
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    elif lowest == 0:
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1] or 1.0)
    return finished(figure, axes)


PICTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lr": ("Learning rate", "learning rate", {}),
    "grad_norm": ("Gradient norm, before clipping", "norm", {"log": True}),
    "tokens_per_second": ("Throughput", "tokens per second", {}),
    "memory_bytes": ("Peak memory of the first rank", "GiB", {"scale": 2.0**-30}),
    "data_wait": ("Waiting for data", "% of the time", {"scale": 100.0}),
    "mfu": ("Use of the device's peak (MFU)", "%", {"scale": 100.0}),
}
"""Key of a train record -> title, label, options of :func:`number_picture`."""


def pictures(runs: Sequence[Run]) -> Iterator[bytes]:
    """Every number of the runs except the loss, including the user's own metrics, as SVG."""
    known = set().union(*[run.train.keys() for run in runs])
    own = sorted(known - RECORD_KEYS)
    for key in own[:24]:
        yield number_picture(runs, key, _label(key), _label(key))
    for key, (title, label, options) in PICTURES.items():
        if key in known:
            yield number_picture(runs, key, title, label, **options)


def loss_png(run: Run) -> bytes | None:
    """The loss curve of one run as PNG, for a model card; ``None`` without a logged loss or without matplotlib."""
    if not CAN_DRAW or not run.train.points("loss"):
        return None
    return loss_picture([run], "step", format="png")
