"""``report.html``: one or several runs in one file that opens offline.

Comes in: runs (:class:`lmcore.report.curves.Run`). Goes out: HTML with SVG pictures inside, nothing loaded from
anywhere. What always holds: whatever a run wrote (samples, names, configuration) is shown as text, never run
as HTML.

    >>> write_report([read_run("runs/a"), read_run("runs/b")], "comparison.html")
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from lmcore.disk import DISK
from lmcore.humanize import duration, printable, short, size
from lmcore.report.curves import COLOURS, PICTURES, Run, loss_picture, read_run, series

__all__ = ["facts", "leaves", "page", "read_run", "write_report"]

SAMPLED_STEPS = 24
"""Samples of so many steps are shown: a long run must not become a heavy page."""
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


def write_report(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write the page; atomically, since someone may have it open."""
    target = Path(path)
    DISK.makedirs(target.parent)
    DISK.write_text(target, page(runs), durable=False)
    return target


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    names = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(names)}</h1>", _subtitle(runs), _summary(runs), _differences(runs)]
    body.append("<h2>Curves</h2><div class=grid>")
    body += [_figure(loss_picture(runs, by)) for by in ("step", "tokens")]
    for key, (title, draw) in PICTURES.items():
        if any(series(run.of("train"), key) for run in runs):
            body.append(_figure(draw(runs, title)))
    body.append("</div>")
    if any(run.of("sample") for run in runs):
        body.append("<h2>What it writes</h2>")
        body += [_samples(run, len(runs) > 1) for run in runs]
    for run in runs:
        body += _about(run, len(runs) > 1)
    return printable(  # no character that HTML forbids, whatever a model has written
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
    state, reason = runs[0].status.get("state", "state unknown"), runs[0].status.get("reason")
    last = runs[0].events("end", "start", "resume")[-1:]
    if last and last[0]["event"] == "end":  # the page is written before the status is
        state, reason = "finished", last[0].get("reason")
    return f"<p class=sub>{escape(str(state) + (f': {reason}' if reason else ''))}</p>"


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
    return _columns(runs, [facts(run) for run in runs])


def _differences(runs: Sequence[Run]) -> str:
    """Of several runs: the settings that are not the same in all."""
    if len(runs) < 2 or not all(run.config for run in runs):
        return ""
    columns = [{name: str(value) for name, value in leaves(run.settings())} for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    differ = [key for key in keys if len({column.get(key) for column in columns}) > 1 and key != "run_dir"]
    if not differ:
        return "<p class=sub>Same configuration.</p>"
    chosen = [{key: column.get(key, "-") for key in differ} for column in columns]
    return f"<h2>What differs</h2>{_columns(runs, chosen)}"


def leaves(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested configuration as (dotted name, value)."""
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [leaf for k, v in values.items() for leaf in leaves(v, f"{prefix}.{k}" if prefix else str(k))]


def _columns(runs: Sequence[Run], columns: Sequence[dict[str, str]]) -> str:
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
    steps = sorted(by_step, reverse=True)
    if len(steps) > SAMPLED_STEPS:  # evenly, the newest and the oldest among them
        steps = [steps[round(i * (len(steps) - 1) / (SAMPLED_STEPS - 1))] for i in range(SAMPLED_STEPS)]
        parts.append(f"<p class=sub>{SAMPLED_STEPS} of {len(by_step)} times; all are in metrics.jsonl.</p>")
    for index, step in enumerate(steps):
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


MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "memory_bytes": ("memory of a device", size),
    "tokens_per_second": ("tokens/s", lambda rate: f"{rate:,.0f}"),
    "seconds": ("time in steps", duration),
    "tokens": ("tokens", short),
    "steps": ("steps", lambda count: f"{count:,.0f}"),
}
"""Numbers of a plan: what a person calls them and how they are written."""


def _measured(run: Run) -> dict[str, float]:
    """What came about, under the names of the plan's numbers."""
    train = run.of("train")
    if not train:
        return {}
    # Runs of older versions have no tensor_bytes; resident memory holds Python and torch too.
    memory = series(train, "tensor_bytes") or series(train, "memory_bytes")
    rates = [rate for _, rate in series(train, "tokens_per_second")]
    found = {
        "memory_bytes": max((most for _, most in memory), default=None),
        "tokens_per_second": median(rates) if rates else None,
        "seconds": train[-1].get("train_seconds"),
        "tokens": train[-1].get("tokens"),
        "steps": train[-1].get("step"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _plan(plan: dict[str, Any], run: Run) -> str:
    """Planned, measured, and the one as a share of the other."""
    measured, rows = _measured(run), ""
    for key, (name, write) in MEASURES.items():
        if not {key} & (plan.keys() | measured.keys()):
            continue
        cells = [write(side[key]) if _is_number(side.get(key)) else "-" for side in (plan, measured)]
        both = all(_is_number(side.get(key)) and side[key] for side in (plan, measured))
        cells.append(f"{measured[key] / plan[key]:.2f}" if both else "")
        rows += f"<tr><th>{name}</th>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in cells)}</tr>"
    words = [
        "Memory: the plan counts tensors; measured are tensors on a GPU, and on a CPU what the process holds "
        "above what it held before its model was built."
    ]
    if "tokens_per_second" not in plan:
        words.append("No rate was planned: python -m lmcore plan --probe measures one before the run.")
    head = "<tr><th></th><th class=n>planned</th><th class=n>measured</th><th class=n>ratio</th></tr>"
    return f"<table>{head}{rows}</table><p class=sub>{escape(' '.join(words))}</p>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"
