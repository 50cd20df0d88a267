"""``report.html``: one or several runs on one page that opens offline and loads nothing.

The page is a template (``templates/report.html.j2``) that escapes every value, so that what a run wrote (samples, names,
configuration) is shown as text and never interpreted as HTML. Pictures are SVG inside the page; their colours follow the
reader's light or dark mode.

    >>> write_report([read_run("runs/a"), read_run("runs/b")], "comparison.html")
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.humanize import duration, printable, short, size
from lmcore.report.curves import (
    CAN_DRAW,
    COLOURS,
    GRID,
    INK,
    MARKS,
    Run,
    is_number,
    loss_picture,
    name_apart,
    pictures,
    read_run,
)
from lmcore.report.redact import redact

__all__ = ["facts", "leaves", "page", "read_run", "write_report"]

DARK_COLOURS = ("#58a6ff", "#ff9b57", "#3fb950", "#bc8cff", "#ff7bb0", "#39c5cf", "#d4a72c", "#9198a1")
"""The colours that replace :data:`lmcore.report.curves.COLOURS` on a dark page."""
_VARIABLES = {colour: f"var(--c{index})" for index, colour in enumerate(COLOURS)} | {
    INK: "var(--fg)",
    GRID: "var(--muted)",
    MARKS["rewind"]: "var(--red)",
}


def write_report(runs: Sequence[Run], path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Path:
    """Write the page. It replaces an older one atomically, because someone may have that open."""
    text = page(runs)
    for target in map(Path, (path, *more)):
        DISK.makedirs(target.parent)
        DISK.write_text(target, text, durable=False)
    return Path(path)


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    from markupsafe import Markup

    name_apart(runs)
    names = [run.name for run in runs]
    drawn: list[bytes] = []
    if CAN_DRAW:
        drawn = [
            loss_picture(runs, "step", wide=True),
            loss_picture(runs, "step"),
            loss_picture(runs, "tokens"),
        ]
        drawn += pictures(runs)
    differences = _differences(runs)
    text = _template().render(
        runs=runs,
        names=", ".join(names),
        run_names=names,
        state=_state(runs[0]),
        facts=[facts(run) for run in runs],
        differences=differences,
        same_settings=differences == [] and len(runs) > 1,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        pictures=[Markup(figure(svg)) for svg in drawn],
        keys_of=lambda columns: list(dict.fromkeys(key for column in columns for key in column)),
        newest_first=lambda samples: sorted(samples.items(), reverse=True),
        versions_of=lambda start: _items(start.get("versions")),
        plan_rows=plan_rows,
    )
    return printable(text)  # removes characters that HTML forbids, which a model may have written


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader  # lazily: only a page needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: redact(value) if type(value) is str else value,  # older runs redacted less
    )
    return environment.get_template("report.html.j2")


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()


def figure(svg: bytes) -> str:
    """A picture for the page: without its own size, and with colours that are variables of the style sheet."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, tag_end, body = text.partition(">")
    text = re.sub(r'\s(?:width|height)="[^"]*"', "", head) + tag_end + body
    colour = re.compile("|".join(_VARIABLES))
    return re.sub(
        r'style="[^"]*"', lambda style: colour.sub(lambda found: _VARIABLES[found[0]], style[0]), text
    )


def _state(run: Run) -> str:
    state, reason = run.status.get("state", "state unknown"), run.status.get("reason")
    last: dict[str, Any] = next(
        (e for e in reversed(run.events) if e.get("event") in ("end", "start", "resume")), {}
    )
    if last.get("event") == "end":  # the page is written before the status is
        state, reason = "finished", last.get("reason")
    return f"{state}: {reason}" if reason else str(state)


def facts(run: Run) -> dict[str, str]:
    """The numbers of a run in words."""
    last = run.train.last
    rows: dict[str, str] = {}
    if last:
        rows["steps"] = _format(last.get("step"), "{:,}")
        rows["epochs"] = _format(last.get("epoch"), "{:.2f}")
        rows["tokens"] = short(last["tokens"]) if is_number(last.get("tokens")) else "-"
        rows["train loss"] = _format(last.get("loss"), "{:.4f}")
    for name, known in run.evaluations.items():
        if known.best is None:
            continue
        rows[f"{name} loss"] = _format(known.last.get("loss"), "{:.4f}")
        if is_number(known.last.get("bits_per_byte")):
            rows[f"{name} bits/byte"] = _format(known.last["bits_per_byte"], "{:.4f}")
        rows[f"best {name}"] = f"{known.best['loss']:.4f} at {_format(known.best.get('step'), '{:,}')}"
    if (expected := expected_loss(run)) is not None:
        rows["expected loss"] = expected
    rates = [rate for _, rate in run.train.means("tokens_per_second")]
    if rates:
        rows["tokens/s (median)"] = short(median(rates))
    if is_number(last.get("train_seconds")):
        rows["time in steps"] = duration(last["train_seconds"])
    memory = [most for _, most in run.train.points("memory_bytes")]
    if memory:
        rows["peak memory"] = f"{max(memory) / 2**30:.2f} GiB"
    for name in ("resume", "rewind", "skip"):
        if run.counts[name]:
            rows[f"{name}s"] = str(run.counts[name])
    return rows


def expected_loss(run: Run) -> str | None:
    """``report.expected_loss`` and the last loss of the first validation set; ``None`` if ``report.expected_loss`` is not set."""
    try:
        asked = run.settings().get("report") or {}
        low, middle, high = (asked.get(f"expected_loss{end}") for end in ("_low", "", "_high"))
    except (RequestError, AttributeError):  # a damaged config.yaml: the page shows it as it is
        return None
    if not is_number(middle):
        return None
    ends = is_number(low) and is_number(high)
    words = f"{middle:.4f} (90%: {low:.4f} to {high:.4f})" if ends else f"{middle:.4f}"
    reached = next(
        (known.last.get("loss") for known in run.evaluations.values() if known.best is not None), None
    )
    if not is_number(reached) or reached is None:
        return words
    where = "" if not ends else ": below" if reached < low else ": above" if reached > high else ": inside"
    return f"{words}, reached {reached:.4f}{where}"


def _format(value: Any, form: str) -> str:
    return form.format(value) if is_number(value) else "-"


def _differences(runs: Sequence[Run]) -> list[dict[str, str]] | None:
    """The settings that differ between several runs; ``None`` if they are not known."""
    if len(runs) < 2 or not all(run.config for run in runs):
        return None
    columns = [{name: str(value) for name, value in leaves(run.settings())} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    differ = [key for key in keys if len({column.get(key) for column in columns}) > 1 and key != "run_dir"]
    return [{key: column.get(key, "-") for key in differ} for column in columns] if differ else []


def leaves(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested configuration as a list of (dotted name, value)."""
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [leaf for k, v in values.items() for leaf in leaves(v, f"{prefix}.{k}" if prefix else str(k))]


MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "memory_bytes": ("memory of a device", size),
    "tokens_per_second": ("tokens/s", lambda rate: f"{rate:,.0f}"),
    "seconds": ("time in steps", duration),
    "tokens": ("tokens", short),
    "steps": ("steps", lambda count: f"{count:,.0f}"),
}
"""Numbers of a plan: their names and formats."""


def _measured(run: Run) -> dict[str, float]:
    """The measured values, under the names of the plan's numbers."""
    if not run.train:
        return {}
    # Runs of older versions have no tensor_bytes; resident memory includes Python and torch.
    memory = run.train.points("tensor_bytes") or run.train.points("memory_bytes")
    rates = [rate for _, rate in run.train.means("tokens_per_second")]
    last = run.train.last
    found = {
        "memory_bytes": max((most for _, most in memory), default=None),
        "tokens_per_second": median(rates) if rates else None,
        "seconds": last.get("train_seconds"),
        "tokens": last.get("tokens"),
        "steps": last.get("step"),
    }
    return {name: value for name, value in found.items() if value is not None}


def plan_rows(run: Run) -> list[tuple[str, list[str]]]:
    """Planned and measured values and their ratio, by name; an empty list without a plan."""
    plan = (run.start or {}).get("plan")
    if not isinstance(plan, dict) or not plan:
        return []
    measured = _measured(run)
    rows: list[tuple[str, list[str]]] = []
    for key, (name, write) in MEASURES.items():
        planned, found = (float(side[key]) if is_number(side.get(key)) else None for side in (plan, measured))
        if planned is None and found is None:
            continue
        cells = ["-" if value is None else write(value) for value in (planned, found)]
        rows.append((name, [*cells, f"{found / planned:.2f}" if planned and found else ""]))
    return rows
