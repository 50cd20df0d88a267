"""``report.html``: one or several runs in one file that opens offline.

Comes in: run folders (``metrics.jsonl``, ``config.yaml``, ``status.json``). Goes out: HTML with SVG pictures
inside, nothing loaded from anywhere. What always holds: whatever a run wrote (samples, names, configuration)
is shown as text, never run as HTML; what was thrown away by a resume or a rewind is not drawn; a long run
costs no more bytes than a short one, and its extremes stay visible.

    >>> write_report([read_run("runs/a"), read_run("runs/b")], "runs/a/report.html")
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, final

from lmcore.console import duration, short
from lmcore.errors import RequestError
from lmcore.metrics import read_metrics

Points = list[tuple[float, float]]

POINTS = 600
"""Points of a curve; a picture is not wider."""
COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df", "#bf3989", "#6e7781", "#9a6700", "#0a7ea4")
MARKS = {"resume": "#6e7781", "rewind": "#cf222e", "skip": "#d1570a", "signal": "#9a6700"}
_STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans","Noto Sans CJK JP",sans-serif;color:#1f2328;background:#fff;
max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 10px;border-bottom:1px solid
#d1d9e0;padding-bottom:4px} .sub{color:#59636e;margin:0 0
18px}.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:14px}
figure{margin:0;border:1px solid #d1d9e0;border-radius:6px;padding:6px}figure
svg{width:100%;height:auto;display:block} table{border-collapse:collapse;margin:0 0 12px}td,th{padding:3px
14px 3px 0;text-align:left;vertical-align:top; border-bottom:1px solid
#eaeef2}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
th{font-weight:600;color:#59636e}pre{background:#f6f8fa;border-radius:6px;padding:10px 12px;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 14px;font:13px/1.45 ui-monospace,monospace}
summary{cursor:pointer;font-weight:600}.prompt{color:#59636e}.key{display:inline-block;width:12px;height:12px;
border-radius:3px;margin-right:6px}.wide{overflow-x:auto}
@media(max-width:560px){.grid{grid-template-columns:1fr}}
"""


@final
@dataclass(frozen=True)
class Run:
    """What one run folder says."""

    name: str
    path: Path
    records: list[dict[str, Any]]
    config: str = ""
    status: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [record for record in self.of("event") if record.get("event") in names]


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
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
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
    axes.xaxis.set_major_formatter(lambda value, _: short(value) if abs(value) >= 10_000 else f"{value:g}")
    return figure, axes


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


def _loss_picture(runs: Sequence[Run], by: str, *, format: str = "svg") -> bytes:
    label = "steps" if by == "step" else by
    figure, axes = _axes(f"Loss by {label}", label, "nats per token")
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        prefix = f"{run.name}: " if len(runs) > 1 else ""
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
                axes.plot(*zip(*thinned(points)), label=f"{prefix}{name}", **style)
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
                name = run.name if len(runs) > 1 else None
                axes.plot(*zip(*points), color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=name)
        if log and any(y > 0 for run in runs for _, y in series(run.of("train"), key)):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
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
    return _loss_picture([run], "step", format="png")


# ---- the page


def write_report(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write the page; atomically, since someone may have it open."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(page(runs), encoding="utf-8")
    os.replace(temporary, target)
    return target


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    names = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(names)}</h1>", _subtitle(runs), _summary(runs), "<h2>Curves</h2><div class=grid>"]
    body += [_figure(_loss_picture(runs, by)) for by in ("step", "tokens")]
    for key, (title, draw) in PICTURES.items():
        if any(series(run.of("train"), key) for run in runs):
            body.append(_figure(draw(runs, title)))
    body.append("</div>")
    if any(run.of("sample") for run in runs):
        body.append("<h2>What it writes</h2>")
        body += [_samples(run, len(runs) > 1) for run in runs]
    for run in runs:
        body += _about(run, len(runs) > 1)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(names)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _figure(svg: bytes) -> str:
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return f"<figure>{text}</figure>"


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        keys = (
            f'<span class=key style="background:{COLOURS[i % 8]}"></span>{escape(r.name)}'
            for i, r in enumerate(runs)
        )
        return f"<p class=sub>{' &nbsp; '.join(keys)}</p>"
    state = runs[0].status
    reason = f": {state['reason']}" if state.get("reason") else ""
    return f"<p class=sub>{escape(str(state.get('state', 'state unknown')) + reason)}</p>"


def facts(run: Run) -> dict[str, str]:
    """The numbers of a run in words."""
    train, evaluations = run.of("train"), run.of("eval")
    last = train[-1] if train else {}
    rows: dict[str, str] = {}
    if last:
        rows["steps"] = f"{last['step']:,}"
        rows["epochs"] = f"{last['epoch']:.2f}"
        rows["tokens"] = short(last["tokens"])
        rows["train loss"] = "-" if last["loss"] is None else f"{last['loss']:.4f}"
    for name in dict.fromkeys(record["set"] for record in evaluations):
        own = [r for r in evaluations if r["set"] == name and isinstance(r["loss"], (int, float))]
        if own:
            best = min(own, key=lambda r: r["loss"])
            rows[f"{name} loss"] = f"{own[-1]['loss']:.4f}"
            if own[-1].get("bits_per_byte") is not None:
                rows[f"{name} bits/byte"] = f"{own[-1]['bits_per_byte']:.4f}"
            rows[f"best {name}"] = f"{best['loss']:.4f} at {best['step']:,}"
    rates = [y for _, y in series(train, "tokens_per_second")]
    if rates:
        rows["tokens/s (median)"] = short(median(rates))
    if last.get("train_seconds"):
        rows["time in steps"] = duration(last["train_seconds"])
    if last.get("memory_bytes"):
        rows["peak memory"] = f"{max(y for _, y in series(train, 'memory_bytes')) / 2**30:.2f} GiB"
    for name in ("resume", "rewind", "skip"):
        if count := len(run.events(name)):
            rows[f"{name}s"] = str(count)
    return rows


def _summary(runs: Sequence[Run]) -> str:
    columns = [facts(run) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    head = "".join(f"<th class=n>{escape(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    rows = "".join(
        f"<tr><th>{escape(key)}</th>"
        + "".join(f"<td class=n>{escape(column.get(key, '-'))}</td>" for column in columns)
        + "</tr>"
        for key in keys
    )
    return f"<div class=wide><table>{f'<tr><th></th>{head}</tr>' if head else ''}{rows}</table></div>"


def _samples(run: Run, several: bool) -> str:
    """The newest samples open, the older ones folded, newest first."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in run.of("sample"):
        by_step.setdefault(record["step"], []).append(record)
    parts = [f"<h3>{escape(run.name)}</h3>"] if several else []
    for index, step in enumerate(sorted(by_step, reverse=True)):
        texts = "".join(
            f"<pre><span class=prompt>{escape(r['prompt'])}</span>{escape(r['text'])}</pre>"
            for r in by_step[step]
        )
        parts.append(f"<details{'' if index else ' open'}><summary>step {step:,}</summary>{texts}</details>")
    return "".join(parts)


def _about(run: Run, several: bool) -> list[str]:
    """Start, plan against reality, restarts, configuration."""
    of_this = f" of {escape(run.name)}" if several else ""
    starts = [record for record in run.events("start", "resume") if record.get("rows")]
    parts: list[str] = []
    if starts:
        first = starts[0]
        rows = {**first["rows"], **{f"{k} version": v for k, v in first.get("versions", {}).items()}}
        parts.append(f"<h2>Start{of_this}</h2>{_table(rows)}")
        if first.get("plan"):
            parts.append(f"<h2>Plan against reality{of_this}</h2>{_plan(first['plan'], run)}")
    happened = [record for record in run.of("event") if record.get("event") not in ("checkpoint", None)]
    if happened:
        lines = "".join(
            f"<tr><td>{escape(str(r['event']))}</td><td class=n>{r.get('step', '')}</td>"
            f"<td>{escape(str(r.get('reason', '') or ''))}</td></tr>"
            for r in happened[:200]
        )
        head = "<tr><th>event</th><th class=n>step</th><th>reason</th></tr>"
        parts.append(f"<h2>What happened{of_this}</h2><table>{head}{lines}</table>")
    if run.config:
        parts.append(
            f"<h2>Configuration{of_this}</h2><details><summary>config.yaml</summary>"
            f"<pre>{escape(run.config)}</pre></details>"
        )
    return parts


def _plan(plan: dict[str, Any], run: Run) -> str:
    train = run.of("train")
    measured: dict[str, float] = {}
    if train:
        measured = {
            "memory_bytes": max((y for _, y in series(train, "memory_bytes")), default=math.nan),
            "tokens_per_second": median([y for _, y in series(train, "tokens_per_second")] or [math.nan]),
            "seconds": train[-1].get("train_seconds") or math.nan,
            "tokens": train[-1].get("tokens") or math.nan,
            "steps": train[-1].get("step") or math.nan,
        }
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td class=n>{escape(_number(value))}</td>"
        f"<td class=n>{escape(_number(measured[key]) if key in measured else '-')}</td></tr>"
        for key, value in plan.items()
    )
    return f"<table><tr><th></th><th class=n>planned</th><th class=n>measured</th></tr>{rows}</table>"


def _number(value: Any) -> str:
    return short(value) if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"
