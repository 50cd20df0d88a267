"""The commands that use what a run has saved: generate, evaluate, export, report, checkpoints.

No heavy library is imported before the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from lmcore.errors import FaultError, RequestError

if TYPE_CHECKING:
    from lmcore.report.report import Report


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, like all errors of lmcore, without abbreviations of options, and without options
    that are given twice, of which argparse keeps the last without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        options = words[: words.index("--")] if "--" in words else words
        given = [word.partition("=")[0] for word in options if word.startswith("--")]
        for name in self._option_string_actions:
            if given.count(name) > 1:
                self.error(f"{name} is given {given.count(name)} times, where it can be given once")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from lmcore.humanize import did_you_mean

        _, unknown, words = message.partition("unrecognized arguments: ")
        word = words.split("=")[0].partition(" ")[0]  # may be empty: a variable of the shell that is not set
        near = did_you_mean(word, self._option_string_actions) if unknown else ""
        raise RequestError(f"{message}{near}; {self.prog} --help shows the options")


def given_path(text: str) -> str:
    """The value of an option that names a file or folder. An empty one, of a variable of the shell that is not set, is refused:
    the default would be written, or nothing, or the current folder be taken for a checkpoint."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty: give a path, or leave it out")
    return text


def given_file(text: str) -> str:
    """:func:`given_path` of a file that is written. ``.`` and ``/`` are folders without a name to write beside."""
    if os.path.isdir(given_path(text)):
        raise argparse.ArgumentTypeError(f"{text} is a folder: give the name of a file")
    return text


def quiet_libraries() -> None:
    """Silence progress bars and advice of other libraries; their errors are still shown."""
    from lmcore.report.console import silence_other_bars

    silence_other_bars()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not os.path.exists("/dev/nvidiactl"):
        # transformers imports DeepSpeed, which prints the accelerator that it has chosen unless this is set.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def tasks() -> Report:
    """A display for progress bars outside a run; its files are written to a temporary folder."""
    from lmcore.disk import temporary_folder
    from lmcore.report.report import Report

    quiet_libraries()
    folder = temporary_folder("lmcore-")
    report = Report(folder.name, stream=sys.stderr)
    atexit.register(folder.cleanup)
    atexit.register(report.close)
    return report


def _opened(parser: Parser, words: list[str]) -> tuple[argparse.Namespace, Any]:
    """Add the options that select a model, parse the arguments, and open the model."""
    parser.add_argument("path", help="a run folder, a checkpoint, or an export")
    parser.add_argument(
        "--checkpoint",
        type=given_path,
        default="auto",
        help="of a run: best, or a step (default: the newest)",
    )
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="ema: the moving average"
    )
    parser.add_argument("--device", default=None, help="default: the first GPU, else the CPU")
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:NAME",
        help="the code of your own model, as in training: only what is named here is run",
    )
    asked = parser.parse_args(words)
    quiet_libraries()
    from lmcore.cli.remote import local_copy
    from lmcore.saved.load import load_model

    with _own_options():
        opened = load_model(
            local_copy(asked.path, asked.checkpoint, note=to_stderr),
            asked.checkpoint,
            device=asked.device,
            weights=asked.weights,
            factory=asked.factory,
            note=to_stderr,
        )
    return asked, opened


_OPTIONS_OF_A_TRAINING = re.compile(
    r"--resume(?= auto)|(?<![\w/.-])(?:--)?data\.(on_error|encoding|text_field|unit|block_size)\b"
)


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """In this context error messages name the options of these commands, which have other names in a training."""
    try:
        yield
    except (RequestError, FaultError) as error:
        own = _OPTIONS_OF_A_TRAINING.sub(lambda found: f"--{found[1] or 'checkpoint'}", str(error))
        raise type(error)(own) from error


def to_stderr(line: str) -> None:
    """Print a line about the result to standard error: standard output contains only the result."""
    from lmcore.humanize import printable

    print(f"lmcore: {printable(line)}", file=sys.stderr)


def generate(words: list[str]) -> None:
    """`generate RUN --prompt TEXT`: continue a text; without a prompt, ask for one after another."""
    parser = Parser(prog="lmcore generate")
    parser.add_argument(
        "--prompt",
        default=None,
        help="'': the start of a document; -: standard input as one prompt. Without it, and at a terminal: a loop that "
        "asks for prompts until Ctrl-D",
    )
    parser.add_argument(
        "--prompts",
        default=None,
        metavar="FILE",
        help="a file with a prompt per line; of .jsonl: JSON strings, or objects with a field prompt",
    )
    parser.add_argument(
        "--interactive", action="store_true", help="the loop, also where input is not a terminal"
    )
    parser.add_argument(
        "--max_tokens", "--max_new_tokens", type=int, default=200, help="length of a continuation"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw from the k most probable tokens; 0: from all"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the fewest tokens that hold this probability"
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: tokens that were there become less probable",
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--samples", type=int, default=1, help="number of continuations, with seeds from --seed on"
    )
    parser.add_argument("--no_stop", action="store_true", help="continue after the end of a document")
    for place, word in enumerate(words[:-1]):
        # argparse would take such a prompt for an option.
        if word == "--prompt" and words[place + 1].startswith("-") and words[place + 1] != "-":
            words = [*words[:place], f"--prompt={words[place + 1]}", *words[place + 2 :]]
            break
    asked, saved = _opened(parser, words)
    if asked.samples < 1:
        raise RequestError(f"--samples must be 1 or more (got {asked.samples})")
    if (asked.prompt is not None) + (asked.prompts is not None) + asked.interactive > 1:
        raise RequestError("--prompt, --prompts and --interactive exclude one another: give one of them")
    if asked.interactive or (asked.prompt is None and asked.prompts is None and sys.stdin.isatty()):
        _prompt_loop(asked, saved)
        return
    prompts = _prompts_of_file(asked.prompts) if asked.prompts is not None else [_prompt(asked.prompt or "")]
    for number, prompt in enumerate(prompts):
        if number:
            sys.stdout.write("\n")
        _continue(asked, saved, prompt)


_MOST_PROMPT_BYTES = 64 << 20
"""More than the context of any model, and little enough to keep in memory."""


def _continue(asked: argparse.Namespace, saved: Any, prompt: str, *, echo: bool = True) -> None:
    """Write all samples of one prompt to standard output while they are generated."""
    from lmcore.humanize import printable
    from lmcore.saved.generate import stream, tokens_seen

    seen, tokens = tokens_seen(saved.model, saved.tokenizer, prompt)
    if seen < tokens:
        to_stderr(f"the prompt has {tokens:,} tokens, the model sees its last {seen:,}: its context is full")
    for number in range(asked.samples):
        pieces = stream(
            saved.model,
            saved.tokenizer,
            prompt,
            asked.max_tokens,
            temperature=0.0 if asked.greedy else asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
            seed=asked.seed + number,
            stop_at_eos=not asked.no_stop,
        )
        if echo:
            sys.stdout.write(printable(prompt))
        for piece in pieces:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
        sys.stdout.write("\n" if number + 1 == asked.samples else "\n\n")


def _prompt_loop(asked: argparse.Namespace, saved: Any) -> None:
    """Ask for prompts and continue them until the input ends. An invalid prompt does not end the loop."""
    print(
        "Type a prompt and Enter; \\n in it is a line end. Ctrl-C stops a continuation, Ctrl-D ends.",
        file=sys.stderr,
    )
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        try:
            _continue(asked, saved, _utf8(line.rstrip("\n").replace("\\n", "\n")), echo=False)
        except RequestError as error:
            to_stderr(str(error))
        except KeyboardInterrupt:
            print(file=sys.stderr)


def _prompt(given: str) -> str:
    if given != "-":
        return _utf8(given)
    stream = getattr(sys.stdin, "buffer", sys.stdin)  # bytes: the terminal's encoding need not be UTF-8
    data = _bounded(stream, "--prompt -")
    return _utf8(data.decode("utf-8", "surrogateescape") if isinstance(data, bytes) else data)


def _bounded(stream: IO[Any], where: str) -> Any:
    """Read all of a stream, with a limit because it may be endless (``/dev/zero``, ``yes |``)."""
    data = stream.read(_MOST_PROMPT_BYTES + 1)
    if len(data) > _MOST_PROMPT_BYTES:
        raise RequestError(f"{where}: more than {_MOST_PROMPT_BYTES:,} bytes: that is no prompt")
    return data


def _prompts_of_file(name: str) -> list[str]:
    try:
        with open(name, "rb") as file:
            text = _bounded(file, f"--prompts {name}").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise RequestError(f"--prompts {name}: {error.strerror}") from None
    # Not splitlines(), because a prompt may contain a form feed or U+2028.
    numbered = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1)
        if line.strip()
    ]
    lines = [line for _, line in numbered]
    if name.endswith(".jsonl"):
        lines = [_prompt_of_json(line, f"{name}, line {number}") for number, line in numbered]
    if not lines:
        raise RequestError(f"--prompts {name}: the file has no prompts; write one on each line")
    return [_utf8(line) for line in lines]


def _prompt_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--prompts {where}: not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise RequestError(f"--prompts {where}: write a JSON string, or an object with a text field 'prompt'")
    return prompt


def _utf8(text: str) -> str:
    """``text`` with invalid UTF-8 replaced, because a tokenizer reads only Unicode; prints a line if there was any."""
    data = text.encode("utf-8", "surrogateescape" if not _has_pairs(text) else "surrogatepass")
    clean = data.decode("utf-8", "replace")
    if clean != text:
        to_stderr(
            "the prompt is not valid UTF-8: its invalid bytes are read as \N{REPLACEMENT CHARACTER} (U+FFFD)"
        )
    return clean


def _has_pairs(text: str) -> bool:
    return any(0xD800 <= ord(letter) <= 0xDFFF and not 0xDC80 <= ord(letter) <= 0xDCFF for letter in text)


def _store_dir_of(run_dir: Path | None) -> str | None:
    """The folder of a run's token stores, if its configuration can be read."""
    from lmcore.report.curves import read_settings

    if run_dir is None:
        return None
    try:
        place = read_settings(run_dir)["data"]["store_dir"]
    except (KeyError, TypeError, RequestError):
        return None  # this affects only which token stores are used
    return place if isinstance(place, str) else None


def evaluate(words: list[str]) -> None:
    """`evaluate RUN --data FILE [NAME=FILE ...]`: loss, perplexity and bits per byte of text."""
    parser = Parser(prog="lmcore evaluate")
    parser.add_argument(
        "--data", nargs="+", required=True, help="files, folders, globs; NAME=PATH names a set"
    )
    parser.add_argument("--block_size", type=int, default=None, help="default: as in training")
    parser.add_argument(
        "--blocks", type=int, default=None, help="number of blocks of each set (default: all)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--text_field", default="text")
    parser.add_argument(
        "--unit",
        default=None,
        choices=("auto", "line", "paragraph", "file"),
        help="default: the run's data.unit",
    )
    parser.add_argument("--encoding", default="utf-8")
    parser.add_argument("--on_error", default="raise", choices=("raise", "skip"))
    parser.add_argument(
        "--json",
        type=given_file,
        default=None,
        metavar="FILE",
        help="write the results there too; -: only them",
    )
    asked, saved = _opened(parser, words)
    if asked.blocks is not None and asked.blocks < 1:
        raise RequestError(f"--blocks must be 1 or more (got {asked.blocks})")
    from lmcore.data.text.sources import without_run_files
    from lmcore.humanize import amount, printable
    from lmcore.report.metrics import plain
    from lmcore.saved.score import score

    data, left_out = without_run_files(asked.data, _store_dir_of(saved.run_dir))
    for line in left_out:
        print(f"--data: {line}", file=sys.stderr)
    sets: dict[str, list[str]] = {}
    for entry in data:
        name, equals, path = entry.partition("=")
        # The part before the first = may belong to a path: lang=en/part.parquet
        if not equals or "/" in name or os.path.exists(entry):
            name, path = Path(entry).name or entry, entry
            if name in sets:  # files are joined into one set only by a name that the user has given
                name = entry
        sets.setdefault(name, []).append(path)
    report = tasks()
    with _own_options():
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
    whole = plain({"model": str(saved.path), "step": saved.step, "sets": values})
    text = json.dumps(whole, indent=2, allow_nan=False)  # JSON has no NaN and no infinity: null
    if asked.json == "-":
        print(text)
        return
    if asked.json:
        from lmcore.disk import DISK

        try:
            DISK.write_text(Path(asked.json), text + "\n")
        except OSError as error:
            raise RequestError(f"--json {asked.json}: {error.strerror}") from None
    for name, one in results.items():
        bits = "" if one.bits_per_byte is None else f"  bits/byte {one.bits_per_byte:.4f}"
        print(
            f"{printable(name)}: loss {one.loss:.4f}  perplexity {one.perplexity:.4f}{bits}  ({amount(one.tokens, 'token')})"
        )


def export(words: list[str]) -> None:
    """`export RUN [--out FOLDER]`: a folder that transformers, lm-eval and vLLM open."""
    parser = Parser(prog="lmcore export")
    parser.add_argument("path", help="a run folder or a checkpoint")
    parser.add_argument(
        "--checkpoint",
        type=given_path,
        default="auto",
        help="of a run: best, or a step (default: the newest)",
    )
    parser.add_argument("--out", type=given_path, default=None, help="default: RUN/export")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="ema: the moving average"
    )
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="a larger model is split")
    parser.add_argument("--push", default=None, metavar="OWNER/NAME", help="upload to the Hub (private)")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    asked = parser.parse_args(words)
    if asked.public and not asked.push:
        raise RequestError("--public says how --push uploads: give --push OWNER/NAME, or leave it out")
    if not 0 < asked.max_shard_gb <= 1e6:
        raise RequestError(f"--max_shard_gb must be above 0 and at most 1,000,000 (got {asked.max_shard_gb})")
    quiet_libraries()
    from lmcore.checkpoint.reader import open_checkpoint
    from lmcore.cli.remote import local_copy
    from lmcore.humanize import printable
    from lmcore.saved import export as exporting
    from lmcore.saved.load import resolve

    asked.path = local_copy(asked.path, asked.checkpoint, note=to_stderr)
    with _own_options():
        kind, path = resolve(asked.path, asked.checkpoint, note=to_stderr)
    if kind == "checkpoint":
        run_dir = path.parent.parent
        # A checkpoint that was found in a run folder has just been verified.
        given = Path(os.path.abspath(asked.path)) == path
        with _own_options(), open_checkpoint(path, verify_bytes=given) as opened:
            path = exporting.export(
                opened,
                asked.out or run_dir / "export",
                run_dir=run_dir,
                dtype=asked.dtype,
                weights=asked.weights,
                max_shard_bytes=int(asked.max_shard_gb * 1e9),
                note=lambda line: print(printable(line)),
            )
    elif not asked.push:
        raise RequestError(f"{path} is an export already: give a run folder or a checkpoint")
    else:
        changed = [
            f"--{name}"
            for name in ("out", "dtype", "weights", "max_shard_gb")
            if getattr(asked, name) != parser.get_default(name)
        ]
        if changed:
            raise RequestError(
                f"{' and '.join(changed)}: {path} is an export already and is pushed as it is; give the run folder or a "
                "checkpoint to export it anew"
            )
    if asked.push:
        print(exporting.push(path, asked.push, private=not asked.public))


def report(words: list[str]) -> None:
    """`report RUN [RUN ...]`: report.html of one run, or a comparison of several."""
    parser = Parser(prog="lmcore report")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument(
        "--out",
        type=given_file,
        default=None,
        help="default: RUN/report.html, or RUN/comparison.html in each of several runs",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only runs of this configuration (lr=1e-4)",
    )
    asked = parser.parse_args(words)
    from lmcore.cli.remote import local_copy
    from lmcore.humanize import amount
    from lmcore.report import html

    asked.runs = [local_copy(path, note=to_stderr) for path in asked.runs]
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
            f"--where {' '.join(asked.where)}: no such run among {amount(len(asked.runs), 'run')}"
        )
    name = "report.html" if len(runs) == 1 else "comparison.html"
    outs = [Path(asked.out)] if asked.out else [run.path / name for run in runs]
    html.write_report(runs, *outs)
    for run in runs:
        facts = html.facts(run)
        print(f"{run.name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print("\n".join(map(str, outs)))


def _matching(runs: list[list[tuple[str, Any]]], wish: str) -> list[bool]:
    """Which configurations have ``key=value``. The sections of the key may be omitted, and older runs may not have it."""
    key, equals, value = wish.partition("=")
    if not equals:
        raise RequestError(f"--where {wish}: write KEY=VALUE, such as optim.lr=1e-4")
    found = [[item for name, item in settings if f".{name}".endswith(f".{key}")] for settings in runs]
    if runs and not any(found):
        raise RequestError(f"--where {wish}: the configuration has no {key}")
    return [any(_same(item, value) for item in items) for items in found]


def _same(item: Any, value: str) -> bool:
    try:
        return float(item) == float(value)  # 1e-4 equals 0.0001; YAML returns some numbers as text
    except (TypeError, ValueError):
        return str(item).lower() == value.lower()


def checkpoints(words: list[str]) -> None:
    """`checkpoints RUN [--verify]`: list the checkpoints of a run and check them."""
    parser = Parser(prog="lmcore checkpoints")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--verify", action="store_true", help="compare every byte with its hash")
    parser.add_argument("--json", action="store_true", help="one JSON array with all that is known")
    asked = parser.parse_args(words)
    from lmcore.checkpoint.reader import listing
    from lmcore.humanize import printable, runs_near, short, size
    from lmcore.report.metrics import plain

    folder = Path(asked.run) / "checkpoints"
    if not folder.is_dir():
        raise RequestError(f"{asked.run}: no checkpoints there{runs_near(asked.run)}")
    rows = listing(folder, verify_bytes=asked.verify)
    if asked.json:
        print(json.dumps(plain(rows), indent=2, default=str, allow_nan=False))
        return
    for row in rows:
        loss, tokens = (row.get("metrics") or {}).get("loss"), row.get("tokens")
        cells = [
            row["name"],
            size(row["bytes"]) if row.get("bytes") else "",
            f"{short(tokens)} tokens" if isinstance(tokens, int | float) else "",
            f"validation loss {loss:.4f}" if isinstance(loss, int | float) else "",
            "best" if row.get("best") else "",
            str(row.get("reason") or ""),
            f"DAMAGED: {row['problem']}" if row["problem"] else ("verified" if asked.verify else ""),
        ]
        print(printable("  ".join(cell for cell in cells if cell)))
