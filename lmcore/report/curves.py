"""A run's records -> curves: what lies behind the pictures of ``report.html`` and of the model card.

Comes in: a run folder (``metrics.jsonl``, ``config.yaml``, ``status.json``). Goes out: :class:`Run`, and
pictures as SVG or PNG. What always holds: what was thrown away by a resume or a rewind is not drawn; a long
run costs no more points than a short one, and its extremes stay visible; matplotlib is imported only when a
picture is drawn.

    >>> svg = loss_picture([read_run("runs/a"), read_run("runs/b")], by="tokens")
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lmcore.errors import RequestError
from lmcore.humanize import short
from lmcore.report.metrics import read_metrics
from lmcore.report.redact import redact

Points = list[tuple[float, float]]

POINTS = 600
"""Points of a curve; a picture is not wider."""
COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df", "#bf3989", "#6e7781", "#9a6700", "#0a7ea4")
MARKS = {"resume": "#6e7781", "rewind": "#cf222e", "skip": "#d1570a", "signal": "#9a6700"}


@final
@dataclass(frozen=True)
class Run:
    """What one run folder says."""

    name: str
    path: Path
    records: list[dict[str, Any]]
    config: str = ""
    status: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The configuration as nested values."""
        values = plain_yaml(self.config, f"{self.path}/config.yaml")
        return values if isinstance(values, dict) else {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [record for record in self.of("event") if record.get("event") in names]


def plain_yaml(text: str, where: str) -> Any:
    """Values of YAML as lmcore writes it: no tags, and no aliases, of which a few lines can stand for terabytes.

    Raises:
        RequestError: not such YAML; the message begins with ``where``.
    """
    import yaml  # lazily: comes with jsonargparse

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*name), which lmcore does not write")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RequestError(
            f"{where}: not a configuration of lmcore: {' '.join(str(error).split())}"
        ) from None


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        RequestError: no metrics there.
    """
    folder = Path(path)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise RequestError(
            f"{folder}: no metrics.jsonl there; give the folder of a run that has logged a step"
        )
    config, status = folder / "config.yaml", folder / "status.json"
    try:
        state = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
    except ValueError:
        state = {}
    return Run(
        name=folder.resolve().name,
        path=folder,
        records=read_metrics(metrics),
        config=redact(config.read_text(encoding="utf-8")) if config.is_file() else "",
        status=state,
    )


# ---- curves


def series(records: Sequence[dict[str, Any]], value: str, by: str = "step", scale: float = 1.0) -> Points:
    """(x, y) of the records that have both as numbers."""
    return [
        (float(record[by]), scale * float(record[value]))
        for record in records
        if isinstance(record.get(value), (int, float)) and isinstance(record.get(by), (int, float))
    ]


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most about ``most`` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def smoothed(points: Points) -> Points:
    """An exponential mean over about 2% of the curve (debiased at its start)."""
    decay = 1 - 1 / max(3.0, len(points) / 50)
    mean = weight = 0.0
    result: Points = []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        result.append((x, mean / weight))
    return result


def _plain_label(text: str) -> str:
    """A name as matplotlib shows it: between two dollar signs it would read a formula, and fail on most texts."""
    return text.replace("$", r"\$")


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # lazily: matplotlib takes a second to import

    figure = Figure(figsize=(6.0, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)
    axes.set_xmargin(0.01)
    return figure, axes


def _tick(value: float, _: float = 0) -> str:
    return short(value) if abs(value) >= 10_000 else f"{value:.6g}"


def _finish(figure: Any, axes: Any, name: str, *, format: str = "svg") -> bytes:
    import matplotlib

    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, fontsize=8, frameon=False)
    out = io.BytesIO()
    # Text stays text: smaller, searchable, and drawn in a font that has Japanese. The salt makes ids unique.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(out, format=format, metadata=metadata, dpi=150)
    return out.getvalue()


def _loss_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Where the losses are after the first fall, so that the first steps do not flatten the rest."""
    values = [y for run in runs for _, y in series([*run.of("train"), *run.of("eval")], "loss")]
    if len(values) < 8:
        return None
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.98 * (len(ordered) - 1))]
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def loss_picture(runs: Sequence[Run], by: str, *, format: str = "svg") -> bytes:
    """Training loss (raw and smoothed) and held-out losses of one or several runs, by ``step`` or
    ``tokens``.
    """
    label = "steps" if by == "step" else by
    figure, axes = _axes(f"Loss by {label}", label, "nats per token")
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        prefix = f"{_plain_label(run.name)}: " if len(runs) > 1 else ""
        train = series(run.of("train"), "loss", by)
        raw = thinned(train)
        if len(train) > 12:
            axes.plot(*zip(*raw), color=colour, alpha=0.28, linewidth=0.8)
            axes.plot(*zip(*thinned(smoothed(train))), color=colour, linewidth=1.6, label=f"{prefix}train")
        elif train:
            axes.plot(*zip(*raw), color=colour, linewidth=1.6, label=f"{prefix}train")
        sets = list(dict.fromkeys(r["set"] for r in run.of("eval")))
        for number, name in enumerate(sets):
            points = series([r for r in run.of("eval") if r["set"] == name], "loss", by)
            shade = colour if len(runs) > 1 else COLOURS[(number + 1) % len(COLOURS)]
            if points:
                style = {"color": shade, "linestyle": "--", "marker": "o", "markersize": 3, "linewidth": 1.2}
                axes.plot(*zip(*thinned(points)), label=f"{prefix}{_plain_label(str(name))}", **style)
        if by == "step" and len(runs) == 1:
            _marks(axes, run)
    limits = _loss_limits(runs)
    if limits:
        axes.set_ylim(*limits)
    return _finish(figure, axes, f"loss-{by}", format=format)


def _marks(axes: Any, run: Run) -> None:
    saved = [event["step"] for event in run.events("checkpoint") if isinstance(event.get("step"), int)]
    if saved:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            saved, [0.015] * len(saved), "^", color="#2da44e", ms=4, transform=bottom, label="checkpoint"
        )
    for name, colour in MARKS.items():
        for index, event in enumerate(e for e in run.events(name) if isinstance(e.get("step"), int)):
            label = name if index == 0 else None
            axes.axvline(event["step"], color=colour, linewidth=0.9, linestyle=":", label=label)


def _simple(
    key: str, label: str, scale: float = 1.0, *, log: bool = False
) -> Callable[[Sequence[Run], str], bytes]:
    def draw(runs: Sequence[Run], title: str) -> bytes:
        figure, axes = _axes(title, "steps", label)
        for index, run in enumerate(runs):
            points = thinned(series(run.of("train"), key, scale=scale))
            if points:
                name = _plain_label(run.name) if len(runs) > 1 else None
                axes.plot(*zip(*points), color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=name)
        if log and any(y > 0 for run in runs for _, y in series(run.of("train"), key)):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_tick)
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}" if f"{value:e}"[0] in "25" else "")
            axes.tick_params(axis="y", which="minor", labelsize=8)
        else:
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        return _finish(figure, axes, key)

    return draw


PICTURES: dict[str, tuple[str, Callable[[Sequence[Run], str], bytes]]] = {
    "lr": ("Learning rate", _simple("lr", "learning rate")),
    "grad_norm": ("Gradient norm, before clipping", _simple("grad_norm", "norm", log=True)),
    "tokens_per_second": ("Throughput", _simple("tokens_per_second", "tokens per second")),
    "memory_bytes": ("Peak memory of the first rank", _simple("memory_bytes", "GiB", 2.0**-30)),
    "data_wait": ("Waiting for data", _simple("data_wait", "% of the time", 100.0)),
    "mfu": ("Use of the device's peak (MFU)", _simple("mfu", "%", 100.0)),
}


def loss_png(records: list[dict[str, Any]]) -> bytes | None:
    """The loss curve of one run as PNG, for a model card; ``None`` without a logged loss."""
    run = Run("", Path(), records)
    if not series(run.of("train"), "loss"):
        return None
    return loss_picture([run], "step", format="png")
