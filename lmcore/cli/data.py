"""The commands about the data of a run: ``prepare``, ``inspect``, ``tokenizer``, ``order``, ``stores``.

The first three accept the options of ``train_lm.py``, so that they read exactly the text of that run.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.cli.options import configured, run_dir_of, taken
from lmcore.cli.saved import Parser, tasks
from lmcore.disk import refuse_unwritable
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig

MOST_POSITIONS = 1_000_000
"""Largest number of positions that ``order`` shows at once."""


def prepare(words: list[str]) -> None:
    """Build the tokenizer and the token stores of a configuration, without training."""
    worker = taken(words, "worker", "0") or "0"
    if not (worker.isdecimal() and len(worker) < 10):
        raise RequestError(f"--worker must be a number, 0 for the first of several workers (got {worker})")
    config = configured(
        words,
        "prepare [--worker N]",
        "Run it on machines without GPUs, so that training starts at once. Several workers may share the work.",
    )
    from lmcore.run import setup

    display = tasks()
    home = run_dir_of(config) / "tokenizer"
    data = setup.open_data(
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
    known = getattr(data.train, "epoch_blocks", None)
    count = "not known beforehand, blocks" if known is None else f"{known:,}"
    print(f"blocks in an epoch: {count} of {data.block_size:,} tokens")


def _one_at_a_time(lock: Path, work: Callable[[], Any]) -> Any:
    """Run ``work`` under a lock, so that a second process finds the tokenizer already trained."""
    from lmcore.disk import DISK

    DISK.makedirs(lock.parent)
    # O_NOFOLLOW, because a link could lead anywhere.
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        with contextlib.suppress(OSError):  # if locks are not supported, two processes train it twice
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        return work()
    finally:
        os.close(descriptor)


def inspect(words: list[str]) -> None:
    """Show the corpus: documents, bytes, tokens, broken records and three samples."""
    config = configured(
        words,
        "inspect",
        "Tokens are counted by tokenizer.path, by the run's tokenizer, or by one trained on a sample.",
    )
    from lmcore.data.inspect import inspect_sources, report_lines
    from lmcore.data.tokenizer.tokenizer import load_tokenizer
    from lmcore.run import setup

    home = run_dir_of(config) / "tokenizer"
    display = tasks()
    encoder, reason = setup.given_tokenizer(config), ""
    if encoder is None:
        splits = setup.splits_of(config, home.parent, keep=False)
        if setup.unfit_reason(config, home, splits) is None:
            encoder = load_tokenizer(home)
        else:
            encoder, reason = _trial_tokenizer(config)
    with display.task("reading", unit="bytes") as advance:
        found = inspect_sources(
            config.data.train or ["stdlib"],
            encoder,
            text_field=config.data.text_field,
            unit=config.data.unit,
            encoding=config.data.encoding,
            seed=config.seed,
            progress=advance,
        )
    display.close()
    print("\n".join(report_lines(found)))
    if reason:
        print(reason)


_TRIAL_BYTES = 4_000_000
"""Amount of text for the tokenizer that ``inspect`` counts with, so that training it takes seconds even for text without
spaces."""


def _trial_tokenizer(config: RunConfig) -> tuple[Any, str]:
    """A tokenizer like the run's, trained on a sample and not saved, and a note about it."""
    from lmcore.run import setup

    small = min(config.tokenizer.sample_bytes, _TRIAL_BYTES)
    forgiving = replace(config.data, on_error="skip")  # inspect itself counts and shows broken records
    try:
        made = setup.train_tokenizer(
            replace(config, data=forgiving, tokenizer=replace(config.tokenizer, sample_bytes=small)),
            None,
            note=lambda line: None,
        )
    except RequestError as refusal:
        return None, f"tokens: not counted ({refusal})"
    return made, (
        f"the tokens are those of a tokenizer of {made.vocab_size:,} pieces that was trained on {small / 1e6:g} MB of "
        "this text at most, for this count; give --tokenizer.path, or train one: lmcore tokenizer train ..."
    )


def tokenizer(words: list[str]) -> None:
    """Train a tokenizer on data.train: tokenizer train [--out FOLDER]."""
    if words[:1] != ["train"]:
        if words[:1] in (["-h"], ["--help"]):
            print("usage: lmcore tokenizer train [--out FOLDER] [options of train_lm.py]")
            return
        raise RequestError("tokenizer needs a subcommand: lmcore tokenizer train --data.train ...")
    words = words[1:]
    out = taken(words, "out")
    if out == "":  # for example an unset shell variable
        raise RequestError("--out must not be empty: give a folder, or leave it out")
    # This command trains a tokenizer regardless of which one the run would use.
    config = configured(
        words, "tokenizer train [--out FOLDER]", "Validation text is not used.", allow_idle=True
    )
    from lmcore.data.tokenizer import huggingface
    from lmcore.data.tokenizer.tokenizer import load_tokenizer
    from lmcore.run import setup

    if config.tokenizer.vocab_size is None:
        raise RequestError(
            "give --tokenizer.vocab_size: it is chosen by the size of the text only where a run trains its tokenizer (without "
            "tokenizer.path and model.from_pretrained)"
        )
    folder = Path(out) if out else run_dir_of(config) / "tokenizer"
    refuse_unwritable(folder, "--out")  # training takes minutes, and only then the folder is made
    # Saving removes the files of another tokenizer, and --out may be any folder of the user's.
    there = next(huggingface.stale_files(folder, ()), None)
    if there is not None:
        raise RequestError(
            f"{folder} already contains a tokenizer, or a file that belongs to one ({there.name}): choose another --out, or "
            "remove it"
        )
    display = tasks()
    setup.train_tokenizer(config, folder, note=display.note, task=display.task)
    display.close()
    made = load_tokenizer(folder)
    print(
        f"{folder}: {made.vocab_size:,} pieces, {made.fingerprint[:12]}; use it with --tokenizer.path {shlex.quote(str(folder))}"
    )


def order(words: list[str]) -> None:
    """Show the blocks of positions or of a step: order RUN --position 0-7."""
    parser = Parser(prog="lmcore order")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--position", default=None, help="one position or FIRST-LAST, both included")
    parser.add_argument("--step", type=int, default=None, help="all positions of this step (the first is 1)")
    parser.add_argument("--text", type=int, default=80, help="characters of each block to show; 0: none")
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:NAME",
        help="the data.factory of the run, which is code: it is run only if it is named here",
    )
    asked = parser.parse_args(words)
    if asked.text < 0:
        raise RequestError(f"--text must be 0 or more (got {asked.text})")
    from lmcore.config.schema import ranges
    from lmcore.data.cursor import merge_skips
    from lmcore.run import setup
    from lmcore.run.resume import with_sources_of
    from lmcore.saved.run_config import read_run_config

    run = Path(asked.run)
    config = read_run_config(run, trusted=[asked.factory] if asked.factory else (), uses=("data.factory",))
    display = tasks()
    states = _states(run)
    begun = with_sources_of(config, states[-1][1] if states else {})
    data = setup.open_data(begun, run / "tokenizer", note=display.note, task=display.task)
    former = getattr(data.train, "former_fingerprints", ())
    same = {"fingerprint": data.train.fingerprint, "former": former, "override": "the text as it was"}
    states = [(cursor.check(seed=config.seed, **same), state) for cursor, state in states]
    cursors = [cursor for cursor, _ in states]
    newest = states[-1] if states else (None, {})
    skips = merge_skips(
        cursors[-1].skips if cursors else (), ranges(config.data.skip_positions, "data.skip_positions")
    )
    sizes = _sizes_of(config, data, *newest)
    positions = _positions(asked, run, sizes, skips)
    for line in _beyond(asked, sizes, positions, skips):
        display.note(
            f"{line} (train.duration {config.train.duration}): the model sees it only if the run is made longer"
        )
    display.close()
    from lmcore.data.locate import locate

    decode = data.encoder.decode if data.encoder else str
    for place, ids in locate(data.train, positions.tolist(), cursors):
        print(f"{place}  {decode(ids)[: asked.text]!r}" if asked.text and ids is not None else place)


def _states(run: Path) -> list[tuple[Any, dict[str, Any]]]:
    """The cursors and states of the checkpoints, oldest first; the last cursor has all skipped positions.

    Raises:
        RequestError: a checkpoint has no valid cursor.
    """
    from lmcore.checkpoint.manifest import STATE, Damaged, committed, read_json
    from lmcore.data.cursor import Cursor

    states = []
    for path in committed(run / "checkpoints"):
        try:
            state = read_json(path / STATE)
            cursor = Cursor.from_json(state["cursor"])
        except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{path}: {STATE} has no valid cursor ({error}); check it with lmcore checkpoints"
            ) from None
        states.append((cursor, state))
    return states


def _sizes_of(config: Any, data: Any, cursor: Any, state: dict[str, Any]) -> Any:
    """The number of blocks of every step, according to the run's plan at its newest checkpoint."""
    from lmcore.run.budget import horizon

    return horizon(
        config,
        block_size=data.block_size,
        epoch_blocks=getattr(data.train, "epoch_blocks", None),
        world_size=1,
        step=state.get("step", 0),
        blocks=state.get("tokens", 0) // data.block_size,
        position=cursor.position if cursor else None,
        skips=cursor.skips if cursor else (),
        planned_from=tuple(state.get("planned_from", (0, 0))),
    )


def _logged_positions(run: Path, step: int) -> tuple[int, int]:
    """The positions at which a step began and ended, from the records in metrics.jsonl of this step and the one before.

    Raises:
        RequestError: one of the two steps was not logged.
    """
    from lmcore.report.metrics import read_metrics

    path = run / "metrics.jsonl"
    records = read_metrics(path, kind="train") if path.exists() else []
    ends = {0: 0} | {record["step"]: record["position"] for record in records if "position" in record}
    if step not in ends or step - 1 not in ends:
        raise RequestError(
            f"the steps up to {step} were made with another plan (train.global_batch_blocks or train.duration was changed "
            f"later), and {path} has no line for the steps {step - 1} and {step}: give --position; a line holds the position "
            "after its step"
        )
    return ends[step - 1], ends[step]


def _positions(asked: argparse.Namespace, run: Path, sizes: Any, skips: Any) -> Any:
    import numpy as np

    from lmcore.config.schema import ranges
    from lmcore.data.cursor import next_positions

    if (asked.position is None) == (asked.step is None):
        raise RequestError("give --position or --step")
    if asked.position is not None:
        ((start, stop),) = ranges([asked.position], "--position")
        if stop - start > MOST_POSITIONS:
            raise RequestError(f"--position {asked.position}: at most {MOST_POSITIONS:,} positions at once")
        return np.arange(start, stop)
    if not 1 <= asked.step < 2**40:
        raise RequestError(f"--step must be from 1 to {2**40 - 1:,} (got {asked.step})")
    steps = sizes.steps
    if asked.step <= steps.stretches[0].step:
        start, stop = _logged_positions(run, asked.step)
        found = next_positions(start, stop - start, skips)[0]
        return found[found < stop]
    position = _position_after(steps.blocks_before(asked.step - 1), skips)
    found = next_positions(position, steps.batch_of(asked.step - 1), skips)[0]
    end = sizes.end_position
    read = found if end is None else found[found < end]  # blocks that fill up the last step have no labels
    return read if len(read) else found


def _position_after(blocks: int, skips: Any) -> int:
    """The position after so many blocks from the start of the run."""
    position = blocks
    for start, stop in skips:  # sorted; positions skipped before this place move it
        position += stop - start if start <= position else 0
    return position


def _beyond(asked: argparse.Namespace, sizes: Any, positions: Any, skips: Any) -> Iterator[str]:
    """What of the answer the run does not reach: it shows text that the model never sees."""
    end = sizes.end_position
    if end is None:
        end = _position_after(sizes.run_blocks, skips)
    if asked.step is not None and asked.step > sizes.total_steps:
        yield f"step {asked.step} is beyond the run, which ends at step {sizes.total_steps}"
    elif asked.position is not None and positions[-1] >= end:
        yield f"position {positions[-1]} is beyond the run, which ends before position {end}"


def stores(words: list[str]) -> None:
    """`stores [--remove unused]`: list the token stores and the runs that use them."""
    from lmcore.config.schema import DataConfig
    from lmcore.data.store.inventory import list_stores, remove_store
    from lmcore.data.store.remote import local_store_dir
    from lmcore.humanize import size, table

    parser = Parser(prog="lmcore stores", description="List the token stores and the runs that use them.")
    parser.add_argument(
        "--store_dir",
        default=DataConfig().store_dir,
        help="folder of the stores, or a URL: its copies on this machine [%(default)s]",
    )
    parser.add_argument("--runs", nargs="+", default=["runs"], help="folders of runs [runs]")
    parser.add_argument(
        "--remove", nargs="+", metavar="NAME", help="remove these stores, or: unused, all that no run uses"
    )
    asked = parser.parse_args(words)
    asked.store_dir = local_store_dir(asked.store_dir)
    found = list_stores(asked.store_dir, runs=asked.runs)
    known = {store.folder.name: store for store in found}
    if asked.remove is None:
        if not found:
            print(f"{asked.store_dir}: no token stores")
            return
        rows = []
        for store in found:
            tokens = store.reason if store.n_tokens is None else f"{store.n_tokens:,} tokens"
            used = ", ".join(map(str, store.used_by)) or ("being built" if store.is_being_built else "unused")
            rows.append((store.folder.name, f"{size(store.n_bytes):>9}  {tokens}  {used}"))
        print(table(rows))
        return
    names = [name for name in asked.remove if name != "unused"]
    for name in names:
        if name not in known:
            raise RequestError(f"{asked.store_dir} holds no store {name!r}{did_you_mean(name, known)}")
    if "unused" in asked.remove:
        names += [s.folder.name for s in found if not s.used_by and not s.is_being_built]
    for name in dict.fromkeys(names):
        remove_store(known[name])
        print(f"removed {known[name].folder} ({size(known[name].n_bytes)})")
    if not names:
        print(f"{asked.store_dir}: every store is used by a run under {', '.join(asked.runs)}")
