"""``python -m lmcore VERB``: everything around a training run.

Comes in: a command line. Goes out: what the verb says, and an exit code: 0, or 2 for a wrong request (one
line, no traceback unless ``--debug``). What always holds: a verb imports only what it needs, so that
``--help`` is there at once; the work is done by the rooms, which take plain arguments; ``prepare``,
``inspect``, ``tokenizer``, ``plan`` and ``order`` take the options of ``train_lm.py``, so that they speak
about exactly that run.

    python -m lmcore generate runs/demo --prompt 'def '
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.cli.saved import Parser, checkpoints, evaluate, export, generate, report, tasks
from lmcore.errors import EXIT_FINISHED, FaultError, RequestError
from lmcore.report.console import protect_output

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig

EXIT_COMPLAINTS = 1
"""``doctor`` has found something that will not work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    protect_output()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_FINISHED
    try:
        verb = VERBS.get(words[0])
        if verb is None:
            import difflib  # lazily: only a typo needs it

            near = difflib.get_close_matches(words[0], VERBS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
            raise RequestError(f"there is no verb {words[0]!r}: {hint}")
        return verb(words[1:]) or EXIT_FINISHED
    except (RequestError, FaultError) as error:
        if debug:
            raise
        print(f"lmcore: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        return EXIT_FINISHED


def overview() -> str:
    """The verbs, one line each."""
    lines = ["usage: python -m lmcore VERB ... [--debug]", ""]
    for name, verb in VERBS.items():
        lines.append(f"  {name:<12} {(verb.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "VERB --help says more; training itself: accelerate launch train_lm.py"])


# ---- before: verbs that take the options of train_lm.py


def _config(words: list[str], prog: str, summary: str) -> RunConfig:
    from lmcore.config import parse as command_line
    from lmcore.run import own_text

    if words and words[0] in ("-h", "--help") and len(words) == 1:
        print(f"usage: python -m lmcore {prog} [options of train_lm.py]\n\n{summary}\n")
    return command_line.parse(
        words, note=lambda line: print(line, file=sys.stderr), own_text=own_text.defaults
    )


def _run_dir(config: RunConfig) -> Path:
    """Where the run writes; the command line always fills it in."""
    return Path(config.run_dir or "runs/demo")


def _taken(words: list[str], name: str, default: str | None = None) -> str | None:
    """Take ``--name VALUE`` (or ``--name=VALUE``) out of the words; what is left belongs to the
    configuration.
    """
    for index, word in enumerate(words):
        if word == f"--{name}":
            if index + 1 >= len(words):
                raise RequestError(f"--{name} needs a value")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"--{name}="):
            del words[index]
            return word.partition("=")[2]
    return default


def prepare(words: list[str]) -> None:
    """Build the tokenizer and the token stores of a configuration, without training."""
    worker = _taken(words, "worker", "0") or "0"
    if not worker.isdigit():
        raise RequestError(
            f"--worker {worker}: give a number, 0 for the first of several that share the work"
        )
    config = _config(
        words,
        "prepare [--worker N]",
        "Run it on machines without GPUs; the run then begins at once. Several may share the work.",
    )
    from lmcore.run import setup as assemble

    display = tasks()
    home = _run_dir(config) / "tokenizer"
    data = assemble.open_data(
        config,
        home,
        rank=int(worker),
        on_main=partial(_one_at_a_time, home.parent / ".prepare.lock"),
        note=display.note,
        task=display.task,
    )
    display.close()
    for name, value in data.rows:
        print(f"{name}: {value}")
    print(f"blocks in an epoch: {data.train.epoch_blocks:,} of {data.block_size:,} tokens")


def _one_at_a_time(lock: Path, work: Callable[[], Any]) -> Any:
    """What one process does for all: the second finds it done (a tokenizer is not trained twice)."""
    from lmcore.disk import DISK

    DISK.makedirs(lock.parent)
    with open(lock, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return work()


def inspect(words: list[str]) -> None:
    """What the corpus is: documents, bytes, tokens, broken records, three decoded samples."""
    config = _config(
        words,
        "inspect",
        "Tokens are counted by tokenizer.path, by the run's tokenizer, or by one trained on a sample.",
    )
    from lmcore.data import inspect as room
    from lmcore.data.tokenizer.tokenizer import load_tokenizer
    from lmcore.run import setup as assemble

    home = _run_dir(config) / "tokenizer"
    display = tasks()
    encoder, reason = assemble.given_tokenizer(config), ""
    if encoder is None and assemble.unfit_reason(config, home) is None:
        encoder = load_tokenizer(home)
    elif encoder is None:
        encoder, reason = _trial_tokenizer(config)
    with display.task("reading", unit="bytes") as advance:
        found = room.inspect_sources(
            config.data.train or ["stdlib"],
            encoder,
            text_field=config.data.text_field,
            unit=config.data.unit,
            encoding=config.data.encoding,
            seed=config.seed,
            progress=advance,
        )
    display.close()
    print("\n".join(room.report_lines(found)))
    if reason:
        print(reason)


_TRIAL_BYTES = 4_000_000
"""Of text for the tokenizer that ``inspect`` counts with: seconds, also for text without spaces."""


def _trial_tokenizer(config: RunConfig) -> tuple[Any, str]:
    """One like the run's, of a sample and written nowhere; and what is to be said about it."""
    from lmcore.run import setup as assemble

    small = min(config.tokenizer.sample_bytes, _TRIAL_BYTES)
    forgiving = replace(config.data, on_error="skip")  # broken records are counted and shown below
    try:
        made = assemble.train_tokenizer(
            replace(config, data=forgiving, tokenizer=replace(config.tokenizer, sample_bytes=small)),
            None,
            note=lambda line: None,
        )
    except RequestError as refusal:
        return None, f"tokens: not counted ({refusal})"
    return made, (
        f"the tokens are those of a tokenizer of {made.vocab_size:,} pieces that was trained on {small / 1e6:g} MB of "
        "this text at most, for this count; give --tokenizer.path, or train one: python -m lmcore tokenizer train ..."
    )


def tokenizer(words: list[str]) -> None:
    """`tokenizer train [--out FOLDER] ...`: train a tokenizer on data.train; the run's own by default."""
    if words[:1] != ["train"]:
        if words[:1] in (["-h"], ["--help"]):
            print("usage: python -m lmcore tokenizer train [--out FOLDER] [options of train_lm.py]")
            return
        raise RequestError(
            "tokenizer takes one word: train (python -m lmcore tokenizer train --data.train ...)"
        )
    words = words[1:]
    out = _taken(words, "out")
    config = _config(words, "tokenizer train [--out FOLDER]", "The text side that is held out is not used.")
    from lmcore.data.tokenizer.tokenizer import load_tokenizer
    from lmcore.run import setup as assemble

    folder = Path(out) if out else _run_dir(config) / "tokenizer"
    if (folder / "tokenizer.json").exists():
        raise RequestError(f"{folder} holds a tokenizer already: give another --out, or remove it")
    display = tasks()
    assemble.train_tokenizer(config, folder, note=display.note, task=display.task)
    display.close()
    made = load_tokenizer(folder)
    print(
        f"{folder}: {made.vocab_size:,} pieces, {made.fingerprint[:12]}; use it by --tokenizer.path {folder}"
    )


def plan(words: list[str]) -> None:
    """Parameters, steps, memory, time and cost of a configuration, before anything runs."""
    from lmcore.cli import plan as verb

    if words[:1] in (["-h"], ["--help"]):
        print(verb.MACHINE)
        return
    probed, tokenized = "--probe" in words, "--tokenize" in words
    words = [word for word in words if word not in ("--probe", "--tokenize")]
    given = {"tokenize": "true"} if tokenized else {}
    for name in ("processes", "strategy", "device_gib", "tokens_per_second", "watts"):
        value = _taken(words, name)
        if value is not None:
            given[name] = value
    config = _config(words, "plan", "")
    from lmcore.run.preflight import preflight

    processes = given.get("processes", "1")
    preflight(config, processes=int(processes) if processes.isdecimal() and int(processes) else 1)
    display = tasks()  # first: it tells the libraries to be quiet
    from lmcore.humanize import table
    from lmcore.run import setup as assemble

    opened = partial(
        assemble.open_data, config, _run_dir(config) / "tokenizer", note=display.note, task=display.task
    )
    rows_of = verb.probe_rows if probed else verb.plan_rows
    rows = rows_of(config, given, open_data=opened, note=display.note)
    display.close()
    if rows:  # under a launcher one process speaks
        print(table([*rows, verb.disk(_run_dir(config))]))


def order(words: list[str]) -> None:
    """`order RUN --position 0-7` or `--step N`: which blocks stand there, and what they say."""
    parser = Parser(prog="python -m lmcore order")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--position", default=None, help="one position or FIRST-LAST, both included")
    parser.add_argument("--step", type=int, default=None, help="all positions of this step (the first is 1)")
    parser.add_argument("--text", type=int, default=80, help="characters of each block to show; 0: none")
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:NAME",
        help="the code of your own data, as in training: only what is named here is run",
    )
    asked = parser.parse_args(words)
    from lmcore.config.schema import global_batch_blocks
    from lmcore.run import setup as assemble
    from lmcore.saved.run_config import read_run_config

    run = Path(asked.run)
    config = read_run_config(run, trusted=[asked.factory] if asked.factory else (), uses=("data.factory",))
    display = tasks()
    data = assemble.open_data(config, run / "tokenizer", note=display.note, task=display.task)
    display.close()
    cursors = _past(run, data.train.fingerprint, config.seed)
    positions = _positions(
        asked, global_batch_blocks(config, data.block_size), cursors[-1].skips if cursors else ()
    )
    from lmcore.data import locate as room

    decode = data.encoder.decode if data.encoder else str
    for place, ids in room.places(data.train, positions.tolist(), cursors):
        print(f"{place}  {decode(ids)[: asked.text]!r}" if asked.text and ids is not None else place)


def _past(run: Path, fingerprint: str, seed: int) -> list[Any]:
    """The cursors of the checkpoints that are still there, oldest first; the last one knows what was jumped over.

    Refuses a corpus that is not the one the run was trained on.
    """
    from lmcore.checkpoint.manifest import STATE, Damaged, committed, read_json
    from lmcore.data.cursor import Cursor

    cursors = []
    for path in committed(run / "checkpoints"):  # a run that has not saved yet has none
        try:
            cursor = Cursor.from_json(read_json(path / STATE)["cursor"])
        except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{path}: {STATE} has no valid cursor ({error}); check it with lmcore checkpoints"
            ) from None
        cursors.append(cursor.check(fingerprint=fingerprint, seed=seed, override="the text as it was"))
    return cursors


def _positions(asked: argparse.Namespace, batch: int, skips: Any) -> Any:
    import numpy as np

    from lmcore.data.cursor import next_positions

    if (asked.position is None) == (asked.step is None):
        raise RequestError("give --position or --step")
    if asked.position is not None:
        first, _, last = asked.position.partition("-")
        if not (first.isdigit() and (last or first).isdigit()) or int(last or first) < int(first):
            raise RequestError(f"--position {asked.position}: give 1200 or 1200-1263")
        return np.arange(int(first), int(last or first) + 1)
    if asked.step < 1:
        raise RequestError(f"--step {asked.step}: the first step is 1")
    position = (asked.step - 1) * batch
    for start, stop in skips:  # sorted; what was jumped over before this step moves it on
        position += stop - start if start <= position else 0
    return next_positions(position, batch, skips)[0]


def doctor(words: list[str]) -> int:
    """Look at this machine and say what is missing, with the remedy."""
    parser = Parser(prog="python -m lmcore doctor")
    parser.add_argument("folder", nargs="?", default=".", help="where runs will be written")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    from lmcore.cli.doctor import examine

    found = examine(asked.folder)
    if asked.json:
        print(json.dumps([vars(one) for one in found], indent=2))
    else:
        print("\n".join(one.line() for one in found))
    return EXIT_COMPLAINTS if any(one.state == "bad" for one in found) else EXIT_FINISHED


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "inspect": inspect,
    "tokenizer": tokenizer,
    "prepare": prepare,
    "plan": plan,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "checkpoints": checkpoints,
    "order": order,
    "doctor": doctor,
}
