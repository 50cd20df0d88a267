"""``lmcore size``: model, learning rate, batch and epochs for this text, this machine and these hours, measured by short runs."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import runpy
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmcore.cli.options import taken
from lmcore.cli.saved import tasks
from lmcore.cli.train import script
from lmcore.config import yaml
from lmcore.config.durations import Duration
from lmcore.config.parse import named_options, parse
from lmcore.config.schema import RunConfig, flatten, plain
from lmcore.disk import DISK
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_SAVED, FaultError, RequestError, of_disk
from lmcore.humanize import amount, duration, message_of, short, table
from lmcore.plan import scaling
from lmcore.run import ladder, own_text
from lmcore.run.folder import RunFolder
from lmcore.run.preflight import preflight

USAGE = """\
usage: lmcore size --budget DURATION [--out FILE] [--write_only] [options of train_lm.py]

Measures which model, learning rate and batch fit this text, this machine and this time, by short runs of train_lm.py that take at
most a tenth of it, and writes a recipe. The same command again goes on after an interruption.

  --budget DURATION      the time that this and the training may take together: '8 h', '30 min'
  --out FILE             the recipe to write [recipes/mine.yaml], over one of lmcore size only; the short runs stay in
                         runs/<name of FILE>-size
  --write_only           write the recipes of the short runs that are due, print their commands and stop: for a cluster

Model, learning rate, schedule, batch and duration are chosen and cannot be given; --model.preset (default: modern) says of which
family, --optim.name with which optimizer (default: muon).
"""
CHOSEN = (
    "model.type", "model.config", "model.size", "model.from_pretrained", "model.factory", "data.factory", "optim.lr",
    "optim.schedule", "optim.min_lr_ratio", "optim.warmup", "optim.momentum_warmup", "optim.decay", "train.duration",
    "train.global_batch_blocks", "train.global_batch_tokens", "train.max_minutes", "evaluate.every", "evaluate.blocks", "resume",
    "report.expected_loss",
)  # fmt: skip
"""Options that are chosen here, or that make another model than one of the family."""
SHARE = 0.1
"""Of the budget for the short runs, at most."""
PLANNED = 0.85
"""Of that share is planned for; the rest is for a machine that is slower than its first steps."""
KEPT = 0.95
"""Of the rest of the budget for training steps; evaluation, checkpoints and the start take what remains."""
PROBES = (64, 128, 256, 512, 1024)
"""Widths whose speed is measured first, until the budget could not even show such a model two tokens for each parameter."""
START_RATES = {"muon": 0.01, "adamw": 0.003}
"""Where the search begins: the demo's rate, and that of its version with AdamW."""
LEAST_TEXT_BLOCKS, LEAST_VALID_BLOCKS = 64, 8
WIDE, MISSED = 0.2, 0.025
"""An interval wider than this share of the loss, or a fit that misses its own runs by more than this share, does not hold."""
UNSTEADY = 0.25
"""Difference between the fastest and the slowest rung of one size, as a share, above which a warning is printed."""
REACH = 16
"""The largest model that is chosen has so many times the parameters of the largest that was measured, at most."""
LADDER = "ladder.json"
WRITTEN = "Written by lmcore size"
"""How a recipe begins that may be written anew."""
PRELOADED = ["lmcore.run.trainer", "lmcore.engine.engine", "transformers", "accelerate"]
"""What every child needs: imported once, in the process that they are forks of."""


def size(words: list[str]) -> int:
    """Choose model, learning rate, batch and epochs for a time budget, by short runs."""
    if not words or words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return EXIT_FINISHED
    words = list(words)
    budget = taken(words, "budget")
    out = Path(taken(words, "out") or "recipes/mine.yaml")
    write_only = "--write_only" in words
    words = [word for word in words if word != "--write_only"]
    seconds = budget_seconds(budget)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError(
            "lmcore size measures on one device: start it without accelerate launch or torchrun"
        )
    if out.suffix not in (".yaml", ".yml"):
        raise RequestError(f"--out {out}: a recipe ends with .yaml")
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(f"# {WRITTEN}".encode())):
        raise RequestError(f"--out {out} exists and is not of lmcore size: choose another name, or remove it")
    config = requested(words)
    preflight(config)
    folder = RunFolder(Path("runs") / f"{out.stem}-size")
    display = tasks()
    folder.lock(note=display.note)
    with contextlib.ExitStack() as held:
        held.callback(folder.unlock)
        children = held.enter_context(Children(folder))
        search = Search(config, seconds=seconds, out=out, folder=folder, display=display, children=children)
        code = EXIT_FINISHED
        try:
            folder.write_status("running", step=0)
            with children.stopping_at_once():
                search.measure()
            waiting = search.climb(write_only=write_only)
            if waiting:
                display.close()
                print(f"# {len(waiting)} short runs are due; run these, then the same command again")
                for rung in waiting:
                    print(
                        shlex.join(
                            ["accelerate", "launch", str(script()), "--config", str(search.recipe(rung))]
                        )
                    )
            else:
                with children.stopping_at_once():
                    text = search.choose()
                display.close()
                print(text)
            folder.write_status("finished", exit_code=code)
        except Stopped:
            code = EXIT_SAVED
            folder.write_status("saved", exit_code=code, reason="stopped by a signal")
            display.close()
            print("saved: run the same command to go on", file=sys.stderr)
        except (RequestError, FaultError) as error:
            folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
            display.close()
            raise
        except OSError as error:
            # main() says it in one line; the status would be "running" for ever
            failure = of_disk(error)
            with contextlib.suppress(OSError):  # the disk may be full
                folder.write_status("failed", exit_code=failure.exit_code, reason=str(failure))
            display.close()
            raise
    return code


def budget_seconds(text: str | None) -> float:
    """``--budget`` in seconds.

    >>> budget_seconds("8 h")
    28800.0
    """
    if text is None:
        raise RequestError("--budget is missing: how long may measuring and training take? --budget '8 h'")
    asked = Duration.parse(text)
    if asked.unit != "minutes":
        raise RequestError(f"--budget must be a time, such as '8 h' or '30 min' (got {text})")
    return float(asked.value) * 60


def requested(words: Sequence[str]) -> RunConfig:
    """The options of the command line, with the defaults of ``size``: preset, optimizer, vocabulary, block."""
    named = named_options(words)

    def given(name: str) -> bool:
        return any(one == name or one.startswith(f"{name}.") for one in named)

    if named.get("data.mode") == "stream":
        raise RequestError("lmcore size counts the tokens of the text first, which data.mode stream does not")
    request = [*words, *([] if given("optim.name") else ["--optim.name", "muon"])]
    config = parse(request, note=lambda line: print(line, file=sys.stderr), default_recipe=None)
    now, defaults = flatten(config), flatten(RunConfig())
    free = {"model.type"} if config.model.preset else set()
    for name in CHOSEN:
        value = now.get(name, {k: v for k, v in now.items() if k.startswith(f"{name}.")} or None)
        if name not in free and (given(name) or (value != defaults.get(name) and value not in (None, {}))):
            raise RequestError(f"{name} is chosen by lmcore size: leave it out")
    if given("run_dir"):
        raise RequestError("run_dir is named by --out: leave it out")
    if config.model.lora.rank:
        raise RequestError(
            "model.lora needs pretrained weights; lmcore size chooses a model to train from scratch"
        )
    reading = {"text_field": config.data.text_field, "encoding": config.data.encoding}
    found = own_text.text_bytes(config.data.train or ["stdlib"], unit="line", **reading)
    fits = next(one for one in own_text.SIZES if found <= one.bytes)
    data, tokenizer, optim, model = config.data, config.tokenizer, config.optim, config.model
    if not given("data.block_size") and data.block_size is None:
        data = replace(data, block_size=fits.context)
    if not data.valid and not given("data.valid_fraction") and found < 2e7:
        data = replace(data, valid_fraction=0.03)  # 1% of a small text would hardly be a measurement
    if tokenizer.path is None and not given("tokenizer.vocab_size"):
        tokenizer = replace(tokenizer, vocab_size=fits.vocabulary)
    if optim.name not in START_RATES:
        raise RequestError(f"optim.name must be one of {', '.join(START_RATES)} here (got {optim.name})")
    if model.preset is None:
        model = replace(model, preset="modern")
    return replace(config, data=data, tokenizer=tokenizer, model=model)


# ---------------------------------------------------------------------------------------------------- the children


class Stopped(BaseException):
    """A signal asked to stop; the run that was going on has saved. No ``Exception``: it comes wherever the signal finds this
    process, and what handles the errors of a text or a library must let it through."""


def _child(program: str, words: list[str], log: str) -> None:
    """In a process of its own: a program with its words, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [program, *words]
    if program == "lmcore":
        from lmcore.cli.main import main

        sys.exit(main(words))
    runpy.run_path(program, run_name="__main__")


class Children:
    """Starts programs one after another, each in a fork of a process that has imported the libraries and done nothing else.

    SIGTERM, SIGINT and SIGHUP go to the child, which saves; then :class:`Stopped` is raised. Within :meth:`stopping_at_once`
    it is raised at once where there is no child.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._child: Any = None
        self._stopped = False
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Children:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Inside, a signal raises :class:`Stopped` wherever this process is, unless a child runs: tokenizing takes hours."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # inherited by a process that tokenizes, which ends with this one
        again, self._stopped = self._stopped, True
        if self._child is None and self._at_once and not again:
            raise Stopped
        self._tell_child(number)

    def _tell_child(self, number: int) -> None:
        if self._child is not None and self._child.pid is not None:
            # Ctrl-C reaches the child by itself, ``kill -INT`` of this process alone does not; another signal than SIGINT,
            # whose second one would end the child unsaved.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM if number == signal.SIGINT else number)

    def run(self, program: str, words: list[str], log: Path) -> tuple[int, float]:
        """Run to the end. Returns (exit code, seconds).

        Raises:
            Stopped: a signal came; the child has ended.
        """
        self.check()
        started = time.monotonic()
        self._child = self._context.Process(target=_child, args=(program, words, str(log)))
        self._child.start()
        if self._stopped:  # by a signal that came before the child could be told
            self._tell_child(signal.SIGTERM)
        while self._child.is_alive():
            self._child.join(0.2)
            if (self._folder.path / "STOP").exists() and not self._stopped:
                self._stopped = True
                os.kill(self._child.pid, signal.SIGTERM)
        code, self._child = self._child.exitcode, None
        self.check()
        return code, time.monotonic() - started

    def check(self) -> None:
        """Raises :class:`Stopped` if a signal came."""
        if self._stopped:
            (self._folder.path / "STOP").unlink(missing_ok=True)
            raise Stopped


# ------------------------------------------------------------------------------------------------------- the search


@dataclass
class Search:
    """Measure, climb, choose. What was measured is kept in ``ladder.json`` of the folder."""

    config: RunConfig
    seconds: float
    out: Path
    folder: RunFolder
    display: Any
    children: Children

    def __post_init__(self) -> None:
        self.path = self.folder.path
        for name in ("recipes", "runs"):
            DISK.makedirs(self.path / name)
        asked = {"seconds": self.seconds, "options": self._options()}
        self.known: dict[str, Any] = {"asked": asked, "speeds": {}, "rungs": {}, "spent_seconds": 0.0}
        if (self.path / LADDER).exists():
            before = self._before()
            # Speeds hold for any budget: after "the budget is too small to measure" a larger one goes on from them.
            same = asked if "design" in before else asked | {"seconds": before["asked"].get("seconds")}
            if before["asked"] != same:
                raise RequestError(
                    f"{self.path} is of another budget or other options: remove it, or choose another --out"
                )
            self.known = before | {"asked": asked}

    def _before(self) -> dict[str, Any]:
        """What an earlier start has kept. Raises :class:`RequestError` where it is damaged."""
        path = self.path / LADDER
        try:
            found = json.loads(path.read_bytes())
            whole = all(isinstance(found[name], dict) for name in ("asked", "speeds", "rungs"))
            if not (whole and isinstance(found["spent_seconds"], int | float)):
                raise ValueError("something is missing")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = message_of(error)
            raise RequestError(
                f"{path} is damaged ({what}): remove {self.path} to measure anew, or choose another --out"
            ) from error
        return dict(found)

    def _options(self) -> dict[str, Any]:
        values = flatten(replace(self.config, run_dir=None))
        return json.loads(json.dumps(plain(values)))

    def keep(self) -> None:
        """Write what is known."""
        DISK.write_json(self.path / LADDER, self.known)

    # ---- 1: the text and the machine

    def measure(self) -> None:
        """Tokens of the text, and the speed of four or five sizes; then the design of the ladder."""
        from lmcore.run import planning, setup

        data = setup.open_data(
            self.config, self.path / "tokenizer", note=self.display.note, task=self.display.task
        )
        self.block_size = data.block_size
        self.vocab_size = data.encoder.vocab_size if data.encoder else 0
        self.unique_tokens = data.train.epoch_blocks * data.block_size
        self.valid_blocks = next(iter(data.valid.values())).n_in_order if data.valid else 0
        if data.train.epoch_blocks < LEAST_TEXT_BLOCKS:
            raise RequestError(
                f"too little text to measure: {amount(data.train.epoch_blocks, 'block')} of {data.block_size} tokens, at least "
                f"{LEAST_TEXT_BLOCKS} are needed; give more text, or a smaller --data.block_size"
            )
        if self.valid_blocks < LEAST_VALID_BLOCKS:
            raise RequestError(
                f"too little validation text to tell two models apart: {amount(self.valid_blocks, 'block')} of {data.block_size} "
                f"tokens, at least {LEAST_VALID_BLOCKS} are needed; give --data.valid, or a larger --data.valid_fraction"
            )
        self.say(
            "text", f"{short(self.unique_tokens)} tokens, {self.valid_blocks:,} blocks of validation text"
        )
        self.members = {}
        for width in ladder.WIDTHS:
            model = replace(
                RunConfig().model, **ladder.with_member(self.config, width, block_size=self.block_size)
            )
            module = planning.model_without_weights(
                replace(self.config, model=replace(model, preset=None)),
                vocab_size=self.vocab_size, block_size=self.block_size, note=lambda line: None,
            )  # fmt: skip
            self.members[f"w{width}"] = counted(module, width, self.block_size)
        self._probe()
        if "design" not in self.known:
            self.known["design"] = asdict(self._designed())
            self.keep()
        stored = dict(self.known["design"])
        stored |= {"members": tuple(stored["members"]), "steps": tuple(stored["steps"])}
        self.design = ladder.Design(**stored)
        self._say_laws()
        self._base = self._base_values()
        for name, steps in zip(self.design.members, self.design.steps):
            member = self.members[name]
            tokens = steps * self.design.batch_blocks * self.block_size
            self.say(
                f"ladder {name}",
                f"{member.words()}, {short(member.parameters)} parameters; {steps:,} to {4 * steps:,} steps of "
                f"{self.design.batch_blocks} blocks ({short(tokens)} to {short(4 * tokens)} tokens)",
            )

    def spent(self) -> str:
        """The time that measuring took."""
        return duration(self.known["spent_seconds"])

    def say(self, label: str, text: str) -> None:
        """A row of the progress."""
        self.display.note(f"{label:<14} {text}")

    def _probe(self) -> None:
        speeds = self.known["speeds"]
        for width in PROBES:
            member = self.members[f"w{width}"]
            if member.name not in speeds:
                if len(speeds) >= 2 and self._affordable(member) < 2 * member.parameters:
                    break
                run = self.path / "runs" / f"probe-{member.name}"
                values = self._member_values(member.name) | {"run_dir": str(run)}
                values = ladder.merged(
                    values, {"train": {"duration": "100 steps", "global_batch_blocks": 16}}
                )
                recipe = self._write(f"probe-{member.name}", values)
                with self.display.task(f"measuring {member.name}"):
                    code, seconds = self.children.run(
                        "lmcore",
                        ["plan", "--probe", "--config", str(recipe)],
                        self._log(f"probe-{member.name}"),
                    )
                self._refuse(code, f"probe-{member.name}")
                kept = json.loads((run / "plan.json").read_text(encoding="utf-8"))
                speeds[member.name] = kept["tokens_per_second"]
                self.known["spent_seconds"] += seconds
                self.keep()
            self.say(
                f"speed {member.name}",
                f"{member.words()}, {short(member.parameters)} parameters: {speeds[member.name]:,.0f} tokens/s",
            )

    def _affordable(self, member: ladder.Member) -> float:
        return self._speed({member.name: member})[member.name] * self.seconds

    def _speed(self, members: Mapping[str, ladder.Member], factor: float = 1.0) -> dict[str, float]:
        """Tokens a second of each member, by what was measured: the probes, and the rungs where there are any."""
        known = {name: rate * factor for name, rate in self.known["speeds"].items()} | self._rung_speeds()
        flops = [(self.members[name].flops_per_token, rate) for name, rate in known.items()]
        found = scaling.speeds(flops, [member.flops_per_token for member in members.values()])
        return dict(zip(members, found))

    def _rung_speeds(self) -> dict[str, float]:
        by_member: dict[str, list[float]] = {}
        for name, one in self.known["rungs"].items():
            if one.get("tokens_per_second"):
                by_member.setdefault(name.split("-")[0], []).append(one["tokens_per_second"])
        return {name: statistics.median(rates) for name, rates in by_member.items()}

    def _published(self) -> list[scaling.Published]:
        speed = self._speed(self.members)
        seconds = self.seconds * (1 - SHARE)
        by_size = {float(m.parameters): speed[name] * seconds for name, m in self.members.items()}
        return scaling.published(list(by_size), by_size.__getitem__, self.unique_tokens)

    def _say_laws(self) -> None:
        for law in self._published():
            words = []
            if law.parameters and law.tokens:
                words.append(f"{short(law.parameters)} parameters, {short(law.tokens)} tokens")
            if law.learning_rate and law.batch_tokens:
                words.append(f"rate {law.learning_rate:.2g}, batch {short(law.batch_tokens)} tokens")
            place = "inside its range" if law.inside else "outside its range"
            self.say("published", f"{', '.join(words)}: {law.source}; {law.measured}: {place}")

    def _designed(self) -> ladder.Design:
        speed = self._speed(self.members)
        family = [(member, speed[name]) for name, member in self.members.items()]
        wanted = self._published()[1].parameters or family[2][0].parameters
        ladder_seconds = SHARE * self.seconds - self.known["spent_seconds"]
        # The batch of the law for the tokens of a middle rung; a rung of the ladder has a few per cent of the budget.
        tokens = max(
            1e5,
            speed[min(speed, key=lambda n: abs(self.members[n].parameters - wanted / 8))]
            * ladder_seconds
            / 20,
        )
        asked = scaling.step_law(wanted, tokens)[1] / self.block_size
        return ladder.design(
            family,
            ladder_seconds=ladder_seconds * PLANNED,
            budget_of=lambda needed: (needed / PLANNED + self.known["spent_seconds"]) / SHARE,
            wanted_parameters=wanted,
            rate=START_RATES[self.config.optim.name],
            block_size=self.block_size,
            largest_batch_blocks=max(4, min(256, 2 ** round(math.log2(max(1.0, asked))))),
        )

    # ---- 2: the rungs

    def _base_values(self) -> dict[str, Any]:
        """The options that all rungs share."""
        smallest = self.design.steps[-1] * self.design.batch_blocks
        self.eval_blocks = min(self.valid_blocks, max(32, smallest // 4))
        return {"evaluate": {"blocks": self.eval_blocks}}

    def _member_values(self, name: str) -> dict[str, Any]:
        values = ladder.changed(self.config)
        values.pop("run_dir", None)
        values["model"] = ladder.with_member(
            self.config, self.members[name].width, block_size=self.block_size
        )
        values["tokenizer"] = {"path": str(self.path / "tokenizer")}
        return values

    def recipe(self, rung: ladder.Rung) -> Path:
        """Write the recipe of a rung."""
        base = ladder.merged(self._member_values(rung.member), self._base)
        return self._write(rung.name, ladder.rung_values(base, self.design, rung, self.path))

    def _write(self, name: str, values: dict[str, Any]) -> Path:
        path = self.path / "recipes" / f"{name}.yaml"
        DISK.write_text(path, yaml.dump(plain(values)), durable=False)
        return path

    def _log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def _refuse(self, code: int, name: str) -> None:
        """A short run that failed for any reason but its learning rate ends the search."""
        run = self.path / "runs" / name
        if code == 0 or (code == EXIT_FAULT and ladder.read_result(run).loss == math.inf):
            return
        if code == EXIT_SAVED:
            raise Stopped
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise FaultError(
            f"the short run {name} ended with code {code}: {lines[-1] if lines else 'it wrote nothing'} (all of it: {self._log(name)})"
        )

    def losses(self) -> dict[str, float]:
        """Of the rungs that are finished, also of those that ran as jobs."""
        found = {}
        for path in sorted((self.path / "recipes").glob("w*.yaml")):
            result = ladder.read_result(self.path / "runs" / path.stem)
            if result.loss is not None:
                found[path.stem] = result.loss
                known = self.known["rungs"].setdefault(path.stem, {})
                known |= {"loss": result.loss if math.isfinite(result.loss) else None,
                          "tokens_per_second": result.tokens_per_second}  # fmt: skip
        return found

    def climb(self, *, write_only: bool) -> list[ladder.Rung]:
        """Run what is due until nothing is, or the share of the budget is spent. Returns what others must run first."""
        limit = SHARE * self.seconds
        self.cut_short = False
        while True:
            losses = self.losses()
            self.keep()
            waiting = ladder.due(self.design, losses)
            if not waiting or write_only:
                return waiting
            rung = waiting[0]
            tokens = rung.new_steps * rung.batch_blocks * self.block_size
            speed = self._speed({rung.member: self.members[rung.member]})[rung.member]
            if self.known["spent_seconds"] + tokens / speed + ladder.STARTUP_SECONDS > limit:
                self.cut_short = True
                self.say(
                    "time",
                    f"{duration(limit)}, a tenth of the budget, are spent; {amount(len(waiting), 'rung')} left out",
                )
                return []
            recipe = self.recipe(rung)
            run = self.path / "runs" / rung.name
            own = ["--resume", "auto"] if any((run / "checkpoints").glob("step-*")) else []
            started = time.monotonic()
            try:
                with self.display.task(f"{rung.name}"):
                    code, _ = self.children.run(
                        str(script()), ["--config", str(recipe), *own], self._log(rung.name)
                    )
            finally:
                self.known["spent_seconds"] += time.monotonic() - started
                self.keep()
            self._refuse(code, rung.name)
            result = ladder.read_result(run)
            if result.loss is None:
                raise FaultError(
                    f"the short run {rung.name} has no validation loss; its output: {self._log(rung.name)}"
                )
            self.folder.write_status("running", step=len(losses) + 1)
            speed_words = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
            loss = f"{result.loss:.4f}" if math.isfinite(result.loss) else "diverged"
            self.say(
                "rung",
                f"{rung.member} rate {rung.rate:.3g}, {amount(rung.batch_blocks, 'block')}, {amount(rung.steps, 'step')}: "
                f"{loss}{speed_words}",
            )

    # ---- 3: the choice

    def choose(self) -> str:
        """Fit, choose, write recipe and picture. Returns what to print."""
        losses = self.losses()
        points = ladder.points(self.design, self.members, losses)
        try:
            fitted = scaling.fit(points, self.unique_tokens, draws=scaling.DRAWS)
        except RequestError as reason:
            raise RequestError(
                f"the budget is too small to measure: {reason}; the machine was slower than its first steps said. Give a "
                f"longer --budget and another --out"
            ) from None
        best = [
            (float(self.members[m].parameters), self._rate(m, losses))
            for m in self.design.members
            if self.design.rates(m, losses)
        ]
        ratios = [
            rate / self.known["speeds"][name]
            for name, rate in self._rung_speeds().items()
            if name in self.known["speeds"]
        ]
        speed = self._speed(self.members, statistics.median(ratios) if ratios else 1.0)
        largest = max(point.parameters for point in points)
        candidates = [
            scaling.Candidate(name=name, parameters=m.parameters, tokens_per_second=speed[name])
            for name, m in self.members.items()
            if m.parameters <= REACH * largest
        ]
        left = (self.seconds - self.known["spent_seconds"]) * KEPT
        ordered = scaling.choices(candidates, fitted, left)
        chosen = ordered[0]
        member = self.members[chosen.candidate.name]
        smallest_tokens = self.design.steps[0] * self.design.batch_blocks * self.block_size
        ladder_batch = ladder.best_batch(self.design, losses)
        blocks = scaling.scaled_batch(
            ladder_batch, smallest_tokens, chosen.tokens,
            at_most=max(ladder_batch, int(chosen.tokens / self.block_size / 500)),
        )  # fmt: skip
        rate, slope = scaling.transferred_rate(best, member.parameters)
        rate *= math.sqrt(blocks / self.design.batch_blocks)
        rate = float(f"{rate:.2g}")
        steps = max(5, int(chosen.tokens / (blocks * self.block_size)) // 5 * 5)
        recipe = Recipe(
            search=self, fitted=fitted, chosen=chosen, others=ordered[1:3], member=member, rate=rate, slope=slope,
            best=tuple(best), blocks=blocks, ladder_batch=ladder_batch, steps=steps, left=left,
        )  # fmt: skip
        DISK.makedirs(self.out.parent)
        DISK.write_text(self.out, recipe.text())
        parse(["--config", str(self.out)])  # what is written can be read
        picture = self._draw(fitted, chosen, member)
        self.known["choice"] = {
            "member": member.name, "rate": rate, "batch_blocks": blocks, "steps": steps, "epochs": chosen.epochs,
            "expected": asdict(chosen.expected), "spent_seconds": self.known["spent_seconds"],
            "law": asdict(fitted.law), "noise": fitted.noise,
        }  # fmt: skip
        self.keep()
        rows = [*recipe.rows(), ("recipe", str(self.out)), ("picture", picture)]
        command = f"accelerate launch {shlex.join([str(script_name()), '--config', str(self.out)])}"
        return "\n".join([table(rows), *recipe.warnings, "", "train it with", "", f"  {command}"])

    def _rate(self, member: str, losses: Mapping[str, float]) -> float:
        tried = self.design.rates(member, losses)
        return scaling.lowest_of_parabola(list(tried), list(tried.values()))

    def _draw(self, fitted: scaling.Fit, chosen: scaling.Choice, member: ladder.Member) -> str:
        from lmcore.report.curves import CAN_DRAW
        from lmcore.report.ladder import Size, ladder_picture

        if not CAN_DRAW:
            return "none: pip install matplotlib"
        sizes = []
        for name in dict.fromkeys([*self.design.members, member.name]):
            n = self.members[name].parameters
            measured = [(p.tokens, p.loss) for p in fitted.points if p.parameters == n]
            first = min([t for t, _ in measured] or [chosen.tokens / 64])
            grid = [first * (chosen.tokens / first) ** (i / 40) for i in range(41)]
            line = [(t, fitted.law.loss(n, scaling.effective_tokens(t, self.unique_tokens))) for t in grid]
            sizes.append(Size(name=f"{short(n)} parameters", measured=measured, fitted=line))
        interval = chosen.expected
        drawn = ladder_picture(
            sizes, chosen=f"{short(member.parameters)} parameters", tokens=chosen.tokens,
            expected=(interval.low, interval.middle, interval.high),
        )  # fmt: skip
        path = self.path / "ladder.png"
        path.write_bytes(drawn)
        return str(path)


def script_name() -> Path:
    """``train_lm.py`` where it lies here, as the documentation writes it; else its path."""
    return Path("train_lm.py") if Path("train_lm.py").exists() else script()


def counted(module: Any, width: int, block_size: int) -> ladder.Member:
    """A member of the family with its parameters that multiply."""
    from lmcore.plan import plan

    parameters = plan.parameters(module)
    tied = "head" not in parameters.groups
    looked_up = 0 if tied else parameters.groups.get("embeddings", 0)
    return ladder.Member(
        width=width,
        parameters=parameters.total - looked_up,
        flops_per_token=plan.model_flops_per_token(module, block_size) or 6 * parameters.total,
    )


# ------------------------------------------------------------------------------------------------------- the recipe


@dataclass
class Recipe:
    """What was chosen, as a recipe with the reason beside each number, and as rows."""

    search: Search
    fitted: scaling.Fit
    chosen: scaling.Choice
    others: Sequence[scaling.Choice]
    member: ladder.Member
    rate: float
    slope: float
    best: tuple[tuple[float, float], ...]
    blocks: int
    ladder_batch: int
    steps: int
    left: float

    def __post_init__(self) -> None:
        self.warnings = [f"WARNING: {line}" for line in self._doubts()]

    def _doubts(self) -> list[str]:
        """What the user must know before trusting the numbers."""
        found = []
        search, interval, choice = self.search, self.chosen.expected, self.chosen
        if interval.width > WIDE or self.fitted.residual > MISSED:
            found.append(
                f"the fit does not hold: the interval is {interval.width:.0%} of the loss (up to {WIDE:.0%} is usable), the "
                f"fit misses its own runs by {self.fitted.residual:.1%}. Take the numbers as a guess; a longer --budget is surer"
            )
        rates: dict[str, list[float]] = {}
        for name, one in search.known["rungs"].items():
            if one.get("tokens_per_second"):
                rates.setdefault(name.split("-")[0], []).append(one["tokens_per_second"])
        spread = max((max(r) / min(r) - 1 for r in rates.values() if len(r) > 1), default=0.0)
        if spread > UNSTEADY:
            found.append(
                f"the speed of this machine varies: the same model was up to {1 + spread:.1f} times as fast in one rung as in "
                f"another. The losses do not depend on that, but the time of {self.steps:,} steps does"
            )
        last = scaling.last_useful_epoch()
        if choice.epochs > 4:
            ends = " The budget is not used up: training ends there." if choice.epochs > last - 1 else ""
            found.append(
                f"too little text: it is repeated {choice.epochs:.1f} times. By Muennighoff et al. 2023 (2305.16264) a token of the "
                f"last epoch is worth {scaling.worth_of_epoch(choice.epochs):.0%} of a new one, and after epoch {last} less than "
                f"{scaling.STOPS_HELPING:.0%}.{ends} Overfitting is not in that law: the best checkpoint is exported"
            )
        if search.cut_short:
            found.append(
                "a tenth of the budget was spent before the ladder was complete: the fit has fewer runs than it was to have"
            )
        edge = [m for m in search.design.members if self._at_edge(m)]
        if edge:
            found.append(
                f"the best learning rate of {', '.join(edge)} is the last that was tried: it may lie beyond"
            )
        sizes = sorted(m.parameters for m in search.members.values())
        if self.member.parameters == sizes[0]:
            found.append("the smallest model of the family was chosen: an even smaller one might be better")
        return found

    def _at_edge(self, member: str) -> bool:
        tried = self.search.design.rates(member, self.search.losses())
        finite = {r: loss for r, loss in tried.items() if math.isfinite(loss)}
        best = min(finite, key=lambda r: finite[r]) if finite else 0.0
        return bool(finite) and best in (min(tried), max(tried))

    def expected_words(self) -> str:
        interval = self.chosen.expected
        return f"{interval.middle:.3f} (90%: {interval.low:.3f} to {interval.high:.3f})"

    def rows(self) -> list[tuple[str, str]]:
        search, choice = self.search, self.chosen
        other = "; ".join(
            f"{short(one.candidate.parameters)} parameters {one.expected.middle:.3f}" for one in self.others
        )
        return [
            ("measured", f"{amount(len(self.fitted.points), 'run')} fitted, {search.spent()} of {duration(search.seconds)}"),
            ("fit", law_words(self.fitted)),
            ("model", f"{self.member.words()}, {short(self.member.parameters)} parameters (next best: {other})"),
            ("learning rate", f"{self.rate:g}"),
            ("batch", f"{self.blocks} blocks of {search.block_size} tokens"),
            ("length", f"{self.steps:,} steps, {short(choice.tokens)} tokens, {choice.epochs:.2f} epochs, "
                       f"{duration(choice.tokens / choice.candidate.tokens_per_second)}"),
            ("expected loss", self.expected_words()),
        ]  # fmt: skip

    def text(self) -> str:
        """The recipe."""
        search, choice = self.search, self.chosen
        values = ladder.changed(search.config)
        values.pop("run_dir", None)
        values.pop("model", None)
        if search.config.tokenizer.path is None:
            values.setdefault("tokenizer", {})["vocab_size"] = search.config.tokenizer.vocab_size
        model = ladder.with_member(search.config, self.member.width, block_size=search.block_size)
        repeated = choice.epochs > 1
        rates = ", ".join(f"{rate:.3g} at {short(n)}" for n, rate in self.best)
        speed = choice.candidate.tokens_per_second
        own: dict[str, Any] = {
            "data": {"block_size": search.block_size},
            "model": model,
            "optim": {"name": search.config.optim.name, "lr": self.rate, "schedule": "wsd", "min_lr_ratio": 0.0, "decay": "20%"},
            "train": {"duration": f"{self.steps} steps", "global_batch_blocks": self.blocks},
            "evaluate": {"every": "5%" if repeated else "10%", "blocks": search.eval_blocks},
            "report": {
                "expected_loss_low": round(choice.expected.low, 4),
                "expected_loss": round(choice.expected.middle, 4),
                "expected_loss_high": round(choice.expected.high, 4),
            },
        }  # fmt: skip
        if repeated:
            # What the user has set of these stays.
            own["checkpoint"] = ladder.merged(
                {"keep_best": {"k": 1}, "export": "best"}, values.get("checkpoint", {})
            )
        reasons = {
            "data.block_size": "by the size of the text, where it was not given",
            "model.config": f"{self.member.words()}, {short(self.member.parameters)} parameters that multiply: the lowest expected "
                            f"loss of the family after {duration(self.left)}",
            "optim.lr": f"best rates {rates}; along their line (slope {self.slope:.2f}), times the root of {self.blocks}/"
                        f"{search.design.batch_blocks} for the batch",
            "optim.decay": "as in the short runs: WSD, linear to zero",
            "train.duration": f"{speed:,.0f} tokens/s for {duration(choice.tokens / speed)}: {short(choice.tokens)} tokens, "
                              f"{choice.epochs:.2f} epochs",
            "train.global_batch_blocks": f"best of the smallest size: {self.ladder_batch}; grown by (tokens)^{scaling.BATCH_EXPONENT}",
            "evaluate.blocks": "the same as in the short runs, so that the expected loss is of the same text",
            "report.expected_loss_low": "expected validation loss at the end, between the ends of an interval that holds it with 90%",
            "checkpoint.export": "the text is repeated: the last checkpoint need not be the best",
        }  # fmt: skip
        header = [
            f"{WRITTEN} for {duration(search.seconds)} on this machine, of which measuring took {search.spent()}.",
            f"Text: {short(search.unique_tokens)} tokens. Fit: {law_words(self.fitted)}.",
            f"Expected validation loss: {self.expected_words()}.",
            *self.warnings,
            f"The short runs, their recipes and the picture: {search.path}.",
        ]
        lines = [f"# {line}" for line in header]
        lines += _commented(ladder.merged(values, own), reasons)
        return "\n".join(lines) + "\n"


def law_words(fitted: scaling.Fit) -> str:
    """The law with its numbers."""
    law, noise = fitted.law, fitted.noise
    of_size, of_length = f"{law.A:.3g} / N^{law.alpha:.3f}", f"{law.B:.3g} / D^{law.beta:.3f}"
    return f"L = {law.E:.3g} + {of_size} + {of_length}, one run deviates by {noise:.1%}"


def _commented(values: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    """YAML with a reason above each number that has one."""
    lines = yaml.dump(plain(dict(values))).rstrip("\n").split("\n")
    found: list[str] = []
    path: list[tuple[int, str]] = []
    for line in lines:
        bare = line.lstrip(" ")
        indent = len(line) - len(bare)
        name = bare.split(":")[0]
        if not bare.startswith("-") and ":" in bare:
            path = [(depth, one) for depth, one in path if depth < indent] + [(indent, name)]
            dotted = ".".join(one for _, one in path)
            if dotted in reasons:
                found.append(f"{' ' * indent}# {reasons[dotted]}")
        found.append(line)
    return found
