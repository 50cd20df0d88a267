"""The verbs that use what a run has left behind; a part of the command line.

Comes in: the words after the verb. Goes out: what the verb prints. What always holds: nothing heavy is
imported before the words have been understood.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmcore.errors import RequestError

if TYPE_CHECKING:
    from lmcore.report.report import Report


class Parser(argparse.ArgumentParser):
    """argparse that refuses with one line, as everything else here."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; {self.prog} --help shows the options")


def quiet_libraries() -> None:
    """No bars and no advice from other libraries between our lines; their errors still show."""
    from lmcore.report.console import silence_other_bars

    silence_other_bars()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers imports DeepSpeed, which says what it chose


def tasks() -> Report:
    """A display for bars outside of a run; what it writes goes to a folder that vanishes."""
    import atexit
    import tempfile

    from lmcore.report.report import Report

    quiet_libraries()
    folder = tempfile.TemporaryDirectory(prefix="lmcore-")
    report = Report(folder.name, stream=sys.stderr)
    atexit.register(folder.cleanup)
    atexit.register(report.close)
    return report


def _opened(parser: Parser, words: list[str]) -> tuple[argparse.Namespace, Any]:
    """Add the options that say which model, parse, and open it."""
    parser.add_argument("path", help="a run folder, a checkpoint, or an export")
    parser.add_argument(
        "--checkpoint", default="auto", help="of a run: best, or a step (default: the newest)"
    )
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="ema: the moving average"
    )
    parser.add_argument("--device", default=None, help="default: the first GPU, else the CPU")
    parser.add_argument(
        "--factory", default=None, metavar="MODULE:NAME", help="the code of your own model, as in training"
    )
    asked = parser.parse_args(words)
    quiet_libraries()
    from lmcore.saved import load as saved

    opened = saved.open_saved(
        asked.path, asked.checkpoint, device=asked.device, weights=asked.weights, factory=asked.factory
    )
    return asked, opened


def generate(words: list[str]) -> None:
    """`generate RUN --prompt TEXT`: continue a text, as it is written."""
    parser = Parser(prog="python -m lmcore generate")
    parser.add_argument("--prompt", default="", help="empty: the start of a document; -: standard input")
    parser.add_argument("--max_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from so many tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from this share of the probability")
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="so many, with seeds from --seed on")
    parser.add_argument("--no_stop", action="store_true", help="go on after the end of a document")
    asked, saved = _opened(parser, words)
    from lmcore.saved import generate as room

    prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
    for number in range(asked.samples):
        pieces = room.stream(
            saved.model,
            saved.tokenizer,
            prompt,
            asked.max_tokens,
            temperature=0.0 if asked.greedy else asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed + number,
            stop_at_eos=not asked.no_stop,
        )
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n" if number + 1 == asked.samples else "\n\n")


def evaluate(words: list[str]) -> None:
    """`evaluate RUN --data FILE [NAME=FILE ...]`: loss, perplexity, bits per byte of held-out text."""
    parser = Parser(prog="python -m lmcore evaluate")
    parser.add_argument(
        "--data", nargs="+", required=True, help="files, folders, globs; NAME=PATH names a set"
    )
    parser.add_argument("--block_size", type=int, default=None, help="default: the context, at most 1,024")
    parser.add_argument("--blocks", type=int, default=None, help="at most so many of each set")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--unit", default="auto", choices=("auto", "line", "paragraph", "file"))
    parser.add_argument("--encoding", default="utf-8")
    parser.add_argument("--on_error", default="raise", choices=("raise", "skip"))
    parser.add_argument(
        "--json", default=None, metavar="FILE", help="write the results there too; -: only them"
    )
    asked, saved = _opened(parser, words)
    from lmcore.saved.score import score

    sets: dict[str, list[str]] = {}
    for entry in asked.data:
        name, equals, path = entry.partition("=")
        if not equals:
            name, path = Path(entry).name or entry, entry
        sets.setdefault(name, []).append(path)
    report = tasks()
    results = score(
        saved,
        sets,
        block_size=asked.block_size,
        blocks=asked.blocks,
        precision=asked.precision,
        text_field=asked.text_field,
        unit=asked.unit,
        encoding=asked.encoding,
        on_error=asked.on_error,
        task=report.task,
    )
    report.close()
    values = {
        name: {
            "loss": one.loss,
            "perplexity": one.perplexity,
            "bits_per_byte": one.bits_per_byte,
            "tokens": one.tokens,
            "bytes": one.bytes,
        }
        for name, one in results.items()
    }
    text = json.dumps({"model": str(saved.path), "step": saved.step, "sets": values}, indent=2)
    if asked.json == "-":
        print(text)
        return
    if asked.json:
        Path(asked.json).write_text(text + "\n", encoding="utf-8")
    for name, one in results.items():
        bits = "" if one.bits_per_byte is None else f"  bits/byte {one.bits_per_byte:.4f}"
        print(f"{name}: loss {one.loss:.4f}  perplexity {one.perplexity:.4f}{bits}  ({one.tokens:,} tokens)")


def export(words: list[str]) -> None:
    """`export RUN [--out FOLDER]`: a folder that transformers, lm-eval and vLLM open."""
    parser = Parser(prog="python -m lmcore export")
    parser.add_argument("path", help="a run folder or a checkpoint")
    parser.add_argument(
        "--checkpoint", default="auto", help="of a run: best, or a step (default: the newest)"
    )
    parser.add_argument("--out", default=None, help="default: RUN/export")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="ema: the moving average"
    )
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="a larger model is split")
    parser.add_argument("--push", default=None, metavar="OWNER/NAME", help="upload to the Hub (private)")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    asked = parser.parse_args(words)
    quiet_libraries()
    from lmcore.checkpoint import writer as checkpoint
    from lmcore.saved import export as room
    from lmcore.saved import load as saved

    kind, path = saved.resolve(asked.path, asked.checkpoint)
    if kind == "checkpoint":
        run_dir = path.parent.parent
        with checkpoint.open_checkpoint(path) as opened:
            path = room.export(
                opened,
                asked.out or run_dir / "export",
                run_dir=run_dir,
                dtype=asked.dtype,
                weights=asked.weights,
                max_shard_bytes=int(asked.max_shard_gb * 1e9),
                note=print,
            )
    elif not asked.push:
        raise RequestError(f"{path} is an export already: give a run folder or a checkpoint")
    if asked.push:
        print(room.push(path, asked.push, private=not asked.public))


def report(words: list[str]) -> None:
    """`report RUN [RUN ...]`: report.html of one run, or several over one another."""
    parser = Parser(prog="python -m lmcore report")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument(
        "--out", default=None, help="default: RUN/report.html, or comparison.html for several"
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only runs of this configuration (lr=1e-4)",
    )
    asked = parser.parse_args(words)
    from lmcore.report import html

    runs = [
        html.read_run(path) for path in asked.runs if not asked.where or Path(path, "config.yaml").exists()
    ]
    for wish in asked.where:
        runs = [
            run
            for run, same in zip(runs, _matching([html.leaves(run.settings()) for run in runs], wish))
            if same
        ]
    if not runs:
        raise RequestError(
            f"--where {' '.join(asked.where)}: none of the {len(asked.runs)} runs is like that"
        )
    out = asked.out or (runs[0].path / "report.html" if len(runs) == 1 else "comparison.html")
    html.write_report(runs, out)
    for run in runs:
        facts = html.facts(run)
        print(f"{run.name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(out)


def _matching(runs: list[list[tuple[str, Any]]], wish: str) -> list[bool]:
    """Which configurations have ``key=value``; a key may leave its sections out, and older runs may not have it."""
    key, equals, value = wish.partition("=")
    if not equals:
        raise RequestError(f"--where {wish}: write KEY=VALUE, such as optim.lr=1e-4")
    found = [[item for name, item in settings if f".{name}".endswith(f".{key}")] for settings in runs]
    if runs and not any(found):
        raise RequestError(f"--where {wish}: the configuration has no {key}")
    return [any(_same(item, value) for item in items) for items in found]


def _same(item: Any, value: str) -> bool:
    try:
        return float(item) == float(value)  # 1e-4 and 0.0001 are one number; YAML gives some as text
    except (TypeError, ValueError):
        return str(item).lower() == value.lower()


def checkpoints(words: list[str]) -> None:
    """`checkpoints RUN [--verify]`: what is there, and whether it is whole."""
    parser = Parser(prog="python -m lmcore checkpoints")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--verify", action="store_true", help="compare every byte with its hash")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    from lmcore.checkpoint import writer as checkpoint
    from lmcore.humanize import short

    folder = Path(asked.run) / "checkpoints"
    if not folder.is_dir():
        raise RequestError(f"{asked.run}: no checkpoints there")
    rows = checkpoint.listing(folder, verify_bytes=asked.verify)
    if asked.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    for row in rows:
        loss = (row.get("metrics") or {}).get("loss")
        words = [
            row["name"],
            f"{short(row['bytes'])}B" if row.get("bytes") else "",
            f"{short(row['tokens'])} tokens" if row.get("tokens") else "",
            "" if loss is None else f"held-out loss {loss:.4f}",
            "best" if row.get("best") else "",
            str(row.get("reason") or ""),
            f"DAMAGED: {row['problem']}" if row["problem"] else ("verified" if asked.verify else ""),
        ]
        print("  ".join(word for word in words if word))
