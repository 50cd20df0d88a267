"""``lmcore size``: choose model, learning rate, batch and epochs for a text, a machine and a time budget, by short runs."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lmcore.errors import EXIT_FINISHED, EXIT_SAVED, FaultError, RequestError, of_disk
from lmcore.humanize import amount, duration, short, table
from lmcore.plan import scaling
from lmcore.run import ladder, own_text
from lmcore.run.children import Children, Stopped
from lmcore.run.folder import RunFolder
from lmcore.run.preflight import preflight
from lmcore.run.size_search import SHARE, START_RATES, Chosen, Search, at_edge

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
"""Options that this command chooses, or that would make a model outside the family."""
WIDE, MISSED = 0.25, 0.025
"""If the interval is wider than this share of the loss, or the fit misses its own runs by more than this share, it is not
reliable."""
UNSTEADY = 0.25
"""Difference between the fastest and the slowest rung of one size, as a share, above which a warning is printed."""
WRITTEN = "Written by lmcore size"
"""First words of a recipe that this command may overwrite."""


def size(words: list[str]) -> int:
    """Choose model, learning rate, batch and epochs for a time budget, by short runs."""
    if not words or words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return EXIT_FINISHED
    words = list(words)
    budget = taken(words, "budget")
    out = Path(taken(words, "out", "recipes/mine.yaml") or "")  # an empty one is refused below
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
        search = Search(
            config, seconds=seconds, folder=folder, children=children, script=script(), task=display.task
        )
        code = EXIT_FINISHED

        def say(label: str, text: str) -> None:
            display.note(f"{label:<14} {text}")

        try:
            folder.write_status("running", step=0)
            with children.stopping_at_once():
                measure(search, say, note=display.note)
            if not write_only:
                climb(search, say)
            waiting = search.due()
            if waiting and write_only:
                display.close()
                print(f"# {len(waiting)} short runs are due; run these, then the same command again")
                for rung in waiting:
                    print(
                        shlex.join(
                            [
                                "accelerate",
                                "launch",
                                str(script()),
                                "--config",
                                str(search.write_recipe(rung)),
                            ]
                        )
                    )
            else:
                if waiting:
                    say(
                        "time",
                        f"{duration(SHARE * seconds)}, a tenth of the budget, are spent; {amount(len(waiting), 'rung')} left out",
                    )
                with children.stopping_at_once():
                    text = write_choice(search, out, complete=not waiting)
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
            # main() prints the error in one line, but the status would stay "running" forever.
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
        data = replace(data, valid_fraction=0.03)  # 1% of a small text is too little to measure with
    if tokenizer.path is None and not given("tokenizer.vocab_size"):
        vocabulary, _ = own_text.vocabulary_for(
            config.data.train or ["stdlib"], fits, flatten(config), unit="line", **reading
        )
        tokenizer = replace(tokenizer, vocab_size=vocabulary)
    if optim.name not in START_RATES:
        raise RequestError(f"optim.name must be one of {', '.join(START_RATES)} here (got {optim.name})")
    if model.preset is None:
        model = replace(model, preset="modern")
    return replace(config, data=data, tokenizer=tokenizer, model=model)


# ---------------------------------------------------------------------------------------- the search, with its rows

Say = Callable[[str, str], None]
"""Prints a row of the progress: a label and a result."""


def measure(search: Search, say: Say, *, note: Callable[[str], None]) -> None:
    """Count the text, measure the machine, and design the ladder."""
    search.open_text(note)
    say("text", f"{short(search.unique_tokens)} tokens, {search.valid_blocks:,} blocks of validation text")
    for member, speed in search.probe():
        words = f"{member.words()}, {short(member.parameters)} parameters"
        say(f"speed {member.name}", f"{words}: {speed:,.0f} tokens/s")
    search.design_ladder()
    for law in search.published():
        found = []
        if law.parameters and law.tokens:
            found.append(f"{short(law.parameters)} parameters, {short(law.tokens)} tokens")
        if law.learning_rate and law.batch_tokens:
            found.append(f"rate {law.learning_rate:.2g}, batch {short(law.batch_tokens)} tokens")
        place = "inside its range" if law.inside else "outside its range"
        say("published", f"{', '.join(found)}: {law.source}; {law.measured}: {place}")
    for name, steps in zip(search.design.members, search.design.steps):
        member = search.members[name]
        tokens = steps * search.design.batch_blocks * search.block_size
        say(
            f"ladder {name}",
            f"{member.words()}, {short(member.parameters)} parameters; {steps:,} to {4 * steps:,} steps of "
            f"{search.design.batch_blocks} blocks ({short(tokens)} to {short(4 * tokens)} tokens)",
        )


def climb(search: Search, say: Say) -> None:
    """Run the ladder, for at most a tenth of the budget."""
    for rung, result in search.climb():
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        loss = "diverged" if result.loss is None or math.isinf(result.loss) else f"{result.loss:.4f}"
        say(
            "rung",
            f"{rung.member} rate {rung.rate:.3g}, {amount(rung.batch_blocks, 'block')}, {amount(rung.steps, 'step')}: "
            f"{loss}{speed}",
        )


def write_choice(search: Search, out: Path, *, complete: bool) -> str:
    """Choose, and write the recipe and the picture. Returns the text to print."""
    recipe = Recipe(search, search.choose(), complete=complete)
    DISK.makedirs(out.parent)
    DISK.write_text(out, recipe.text())
    parse(["--config", str(out)])  # check that the recipe can be read
    picture = search.draw(recipe.chosen) or "none: pip install matplotlib"
    search.keep_choice(recipe.chosen)
    rows = [*recipe.rows(), ("recipe", str(out)), ("picture", str(picture))]
    command = f"accelerate launch {shlex.join([str(script_name()), '--config', str(out)])}"
    return "\n".join([table(rows), *recipe.warnings, "", "train it with", "", f"  {command}"])


def script_name() -> Path:
    """``train_lm.py`` if it is in the current folder, as in the documentation; otherwise its path."""
    return Path("train_lm.py") if Path("train_lm.py").exists() else script()


# ------------------------------------------------------------------------------------------------------- the recipe


@dataclass
class Recipe:
    """The choice as a recipe with the reason next to each number, and as rows."""

    search: Search
    chosen: Chosen
    complete: bool
    """Whether every rung of the ladder has run."""

    def __post_init__(self) -> None:
        self.warnings = [f"WARNING: {line}" for line in self._doubts()]

    def _doubts(self) -> list[str]:
        """What the user should know before trusting the numbers."""
        found = []
        search, fitted, choice = self.search, self.chosen.fitted, self.chosen.choice
        interval = choice.expected
        if interval.width > WIDE or fitted.residual > MISSED:
            found.append(
                f"the fit does not hold: the interval is {interval.width:.0%} of the loss (up to {WIDE:.0%} is usable), the "
                f"fit misses its own runs by {fitted.residual:.1%}. Take the numbers as a guess; a longer --budget is surer"
            )
        spread = search.unsteadiness()
        if spread > UNSTEADY:
            found.append(
                f"the speed of this machine varies: the same model was up to {1 + spread:.1f} times as fast in one rung as in "
                f"another. The losses do not depend on that, but the time of {self.chosen.steps:,} steps does"
            )
        last = scaling.last_useful_epoch()
        if choice.epochs > 4:
            ends = " The budget is not used up: training ends there." if choice.epochs > last - 1 else ""
            found.append(
                f"too little text: it is repeated {choice.epochs:.1f} times. By Muennighoff et al. 2023 (2305.16264) a token of the "
                f"last epoch is worth {scaling.worth_of_epoch(choice.epochs):.0%} of a new one, and after epoch {last} less than "
                f"{scaling.STOPS_HELPING:.0%}.{ends} Overfitting is not in that law: the best checkpoint is exported"
            )
        if not self.complete:
            found.append(
                "a tenth of the budget was spent before the ladder was complete: the fit has fewer runs than it was to have"
            )
        if edge := at_edge(search.design, search.losses()):
            found.append(
                f"the best learning rate of {', '.join(edge)} is the last that was tried: it may lie beyond"
            )
        sizes = sorted(m.parameters for m in search.members.values())
        if self.chosen.member.parameters == sizes[0]:
            found.append("the smallest model of the family was chosen: an even smaller one might be better")
        return found

    def expected_words(self) -> str:
        interval = self.chosen.choice.expected
        return f"{interval.middle:.3f} (90%: {interval.low:.3f} to {interval.high:.3f})"

    def rows(self) -> list[tuple[str, str]]:
        search, chosen, choice = self.search, self.chosen, self.chosen.choice
        spent, runs = duration(search.spent_seconds), amount(len(chosen.fitted.points), "run")
        other = "; ".join(
            f"{short(one.candidate.parameters)} parameters {one.expected.middle:.3f}" for one in chosen.others
        )
        return [
            ("measured", f"{runs} fitted, {spent} of {duration(search.seconds)}"),
            ("fit", law_words(chosen.fitted)),
            ("model", f"{chosen.member.words()}, {short(chosen.member.parameters)} parameters (next best: {other})"),
            ("learning rate", f"{chosen.rate:g}"),
            ("batch", f"{chosen.batch_blocks} blocks of {search.block_size} tokens"),
            ("length", f"{chosen.steps:,} steps, {short(choice.tokens)} tokens, {choice.epochs:.2f} epochs, "
                       f"{duration(choice.tokens / choice.candidate.tokens_per_second)}"),
            ("expected loss", self.expected_words()),
        ]  # fmt: skip

    def text(self) -> str:
        """The recipe as YAML."""
        search, chosen, choice = self.search, self.chosen, self.chosen.choice
        values = ladder.changed(search.config)
        values.pop("run_dir", None)
        values.pop("model", None)
        if search.config.tokenizer.path is None:
            values.setdefault("tokenizer", {})["vocab_size"] = search.config.tokenizer.vocab_size
        model = ladder.with_member(search.config, chosen.member.width, block_size=search.block_size)
        repeated = choice.epochs > 1
        rates = ", ".join(f"{rate:.3g} at {short(n)}" for n, rate in chosen.best_rates)
        speed = choice.candidate.tokens_per_second
        own: dict[str, Any] = {
            "data": {"block_size": search.block_size},
            "model": model,
            "optim": {"name": search.config.optim.name, "lr": chosen.rate, "schedule": "wsd", "min_lr_ratio": 0.0, "decay": "20%"},
            "train": {"duration": f"{chosen.steps} steps", "global_batch_blocks": chosen.batch_blocks},
            "evaluate": {"every": "5%" if repeated else "10%", "blocks": search.eval_blocks},
            "report": {
                "expected_loss_low": round(choice.expected.low, 4),
                "expected_loss": round(choice.expected.middle, 4),
                "expected_loss_high": round(choice.expected.high, 4),
            },
        }  # fmt: skip
        if repeated:
            # Options that the user has set are kept.
            own["checkpoint"] = ladder.merged(
                {"keep_best": {"k": 1}, "export": "best"}, values.get("checkpoint", {})
            )
        reasons = {
            "data.block_size": "by the size of the text, where it was not given",
            "model.config": f"{chosen.member.words()}, {short(chosen.member.parameters)} parameters that multiply: the lowest "
                            f"expected loss of the family after {duration(chosen.seconds)}",
            "optim.lr": f"best rates {rates}; along their line (slope {chosen.slope:.2f}), times the root of {chosen.batch_blocks}/"
                        f"{search.design.batch_blocks} for the batch",
            "optim.decay": "as in the short runs: WSD, linear to zero",
            "train.duration": f"{speed:,.0f} tokens/s for {duration(choice.tokens / speed)}: {short(choice.tokens)} tokens, "
                              f"{choice.epochs:.2f} epochs",
            "train.global_batch_blocks": f"best of the smallest size: {chosen.ladder_batch}; grown by "
                                         f"(tokens)^{scaling.BATCH_EXPONENT}",
            "evaluate.blocks": "the same as in the short runs, so that the expected loss is of the same text",
            "report.expected_loss_low": "expected validation loss at the end, between the ends of an interval that holds it with 90%",
            "checkpoint.export": "the text is repeated: the last checkpoint need not be the best",
        }  # fmt: skip
        header = [
            f"{WRITTEN} for {duration(search.seconds)} on this machine, of which measuring took {duration(search.spent_seconds)}.",
            f"Text: {short(search.unique_tokens)} tokens. Fit: {law_words(chosen.fitted)}.",
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
