"""The search of ``lmcore size``: measure the speed of a few sizes, run the ladder of short runs, and choose.

Every result that took time is saved in ``ladder.json`` immediately, so that the same search continues after an interruption.
The steps, in order: :meth:`Search.open_text`, :meth:`Search.probe`, :meth:`Search.design_ladder`, :meth:`Search.climb`,
:meth:`Search.choose`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.config import yaml
from lmcore.config.schema import RunConfig, flatten, plain
from lmcore.disk import DISK
from lmcore.errors import EXIT_FAULT, EXIT_SAVED, FaultError, RequestError
from lmcore.humanize import amount, message_of, short
from lmcore.plan import scaling
from lmcore.run import ladder
from lmcore.run.children import Children, Stopped
from lmcore.run.folder import RunFolder

if TYPE_CHECKING:
    from lmcore.run.setup import Note, Task

SHARE = 0.1
"""Largest share of the budget for the short runs."""
PLANNED = 0.85
"""Share of that time that is planned; the rest is a reserve for a machine that becomes slower than in its first steps."""
KEPT = 0.95
"""Share of the remaining budget for training steps; evaluation, checkpoints and the start take the rest."""
PROBES = (64, 128, 256, 512, 1024)
"""Widths whose speed is measured first, up to the size for which the budget would not allow two tokens per parameter."""
START_RATES = {"muon": 0.01, "adamw": 0.003}
"""Initial learning rates of the search: the demo's, and that of its version with AdamW."""
LEAST_TEXT_BLOCKS, LEAST_VALID_BLOCKS = 64, 8
REACH = 16
"""A chosen model has at most this many times the parameters of the largest measured one."""
LADDER = "ladder.json"


# ------------------------------------------------------------------------------------------------ without any state


def family(
    config: RunConfig, *, vocab_size: int, block_size: int, widths: Sequence[int]
) -> dict[str, ladder.Member]:
    """The models to choose from, by name, with their counts of parameters and FLOPs; built without weights."""
    from lmcore.plan import plan
    from lmcore.run import planning

    found = {}
    for width in widths:
        model = replace(RunConfig().model, **ladder.with_member(config, width, block_size=block_size))
        module = planning.model_without_weights(
            replace(config, model=model), vocab_size=vocab_size, block_size=block_size, note=lambda line: None
        )
        parameters = plan.parameters(module)
        tied = "head" not in parameters.groups
        looked_up = 0 if tied else parameters.groups.get("embeddings", 0)
        member = ladder.Member(
            width=width,
            parameters=parameters.total - looked_up,
            flops_per_token=plan.model_flops_per_token(module, block_size) or 6 * parameters.total,
        )
        found[member.name] = member
    return found


def published_laws(
    members: Mapping[str, ladder.Member], speed: Mapping[str, float], *, seconds: float, unique_tokens: float
) -> list[scaling.Published]:
    """What published laws choose for the time that remains of a budget of ``seconds`` after the ladder."""
    training = seconds * (1 - SHARE)
    by_size = {float(m.parameters): speed[name] * training for name, m in members.items()}
    return scaling.published(list(by_size), by_size.__getitem__, unique_tokens)


def design_for(
    members: Mapping[str, ladder.Member],
    speed: Mapping[str, float],
    *,
    seconds: float,
    spent_seconds: float,
    unique_tokens: float,
    rate: float,
    block_size: int,
) -> ladder.Design:
    """The ladder for a budget of ``seconds``, of which ``spent_seconds`` are already used.

    Args:
        speed: tokens per second of each member.
        rate: the initial learning rate of the search.

    Raises:
        RequestError: the budget is too small to measure.
    """
    laws = published_laws(members, speed, seconds=seconds, unique_tokens=unique_tokens)
    family = [(member, speed[name]) for name, member in members.items()]
    wanted = laws[1].parameters or family[2][0].parameters
    ladder_seconds = SHARE * seconds - spent_seconds
    # The batch that the law gives for the tokens of a middle rung, about a twentieth of the ladder's time.
    middle = min(speed, key=lambda name: abs(members[name].parameters - wanted / 8))
    tokens = max(1e5, speed[middle] * ladder_seconds / 20)
    asked = scaling.step_law(wanted, tokens)[1] / block_size
    return ladder.design(
        family,
        ladder_seconds=ladder_seconds * PLANNED,
        budget_of=lambda needed: (needed / PLANNED + spent_seconds) / SHARE,
        wanted_parameters=wanted,
        rate=rate,
        block_size=block_size,
        largest_batch_blocks=max(4, min(256, 2 ** round(math.log2(max(1.0, asked))))),
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The model, learning rate, batch and length that are expected to reach the lowest loss, and what they are derived from."""

    fitted: scaling.Fit
    choice: scaling.Choice
    others: tuple[scaling.Choice, ...]
    """The next best sizes."""
    member: ladder.Member
    rate: float
    best_rates: tuple[tuple[float, float], ...]
    """(parameters, best rate) of each size of the ladder; ``slope`` is the slope of the line by which they are extrapolated."""
    slope: float
    batch_blocks: int
    ladder_batch: int
    """The best batch of the smallest size."""
    steps: int
    seconds: float
    """Seconds that the budget leaves for training."""


def choose(
    design: ladder.Design,
    members: Mapping[str, ladder.Member],
    losses: Mapping[str, float],
    fitted: scaling.Fit,
    *,
    speed: Mapping[str, float],
    seconds: float,
) -> Chosen:
    """Choose the member with the lowest expected loss after ``seconds`` of training, and how to train it.

    Args:
        losses: losses of the rungs by name.
        fitted: the law that was fitted to the ladder's runs.
        speed: tokens per second of each member.
    """
    largest = max(point.parameters for point in fitted.points)
    candidates = [
        scaling.Candidate(name=name, parameters=m.parameters, tokens_per_second=speed[name])
        for name, m in members.items()
        if m.parameters <= REACH * largest
    ]
    choice, *others = scaling.choices(candidates, fitted, seconds)
    member = members[choice.candidate.name]
    ladder_batch = ladder.best_batch(design, losses)
    blocks = scaling.scaled_batch(
        ladder_batch, design.steps[0] * design.batch_blocks * design.block_size, choice.tokens,
        at_most=max(ladder_batch, int(choice.tokens / design.block_size / 500)),
    )  # fmt: skip
    best = []
    for name in design.members:
        if tried := design.rates(name, losses):
            lowest = scaling.lowest_of_parabola(list(tried), list(tried.values()))
            best.append((float(members[name].parameters), lowest))
    rate, slope = scaling.transferred_rate(best, member.parameters)
    return Chosen(
        fitted=fitted, choice=choice, others=tuple(others[:2]), member=member,
        rate=float(f"{rate * math.sqrt(blocks / design.batch_blocks):.2g}"), best_rates=tuple(best), slope=slope,
        batch_blocks=blocks, ladder_batch=ladder_batch,
        steps=max(5, int(choice.tokens / (blocks * design.block_size)) // 5 * 5), seconds=seconds,
    )  # fmt: skip


def at_edge(design: ladder.Design, losses: Mapping[str, float]) -> list[str]:
    """The sizes whose best learning rate is the lowest or highest one that was tried."""
    found = []
    for member in design.members:
        tried = design.rates(member, losses)
        finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
        if finite and min(finite, key=lambda rate: finite[rate]) in (min(tried), max(tried)):
            found.append(member)
    return found


# ------------------------------------------------------------------------------------------------------- the search


@dataclass
class Search:
    """Measures, runs the ladder, and chooses. The measurements are saved in ``ladder.json`` of the folder.

    Args:
        seconds: the whole budget.
        script: path of ``train_lm.py``.
        task: shows progress; see :class:`lmcore.report.report.Report`.
    """

    config: RunConfig
    seconds: float
    folder: RunFolder
    children: Children
    script: Path
    task: Task

    def __post_init__(self) -> None:
        self.path = self.folder.path
        for name in ("recipes", "runs"):
            DISK.makedirs(self.path / name)
        asked = {"seconds": self.seconds, "options": self._options()}
        self.known: dict[str, Any] = {"asked": asked, "speeds": {}, "rungs": {}, "spent_seconds": 0.0}
        if (self.path / LADDER).exists():
            before = self._before()
            # Speeds are valid for any budget: a larger budget, after "the budget is too small to measure", reuses them.
            same = asked if "design" in before else asked | {"seconds": before["asked"].get("seconds")}
            if before["asked"] != same:
                raise RequestError(
                    f"{self.path} is of another budget or other options: remove it, or choose another --out"
                )
            self.known = before | {"asked": asked}

    def _before(self) -> dict[str, Any]:
        """What an earlier start has saved. Raises :class:`RequestError` if it is damaged."""
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

    def _keep(self) -> None:
        DISK.write_json(self.path / LADDER, self.known)

    @property
    def spent_seconds(self) -> float:
        """The time spent on measuring so far."""
        return float(self.known["spent_seconds"])

    # ---- 1: the text and the machine

    def open_text(self, note: Note) -> None:
        """Tokenize the text, and count the text and the models that can be trained on it.

        Raises:
            RequestError: too little text.
        """
        from lmcore.run import setup

        data = setup.open_data(self.config, self.path / "tokenizer", note=note, task=self.task)
        self.block_size = data.block_size
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
        vocab_size = data.encoder.vocab_size if data.encoder else 0
        self.members = family(
            self.config, vocab_size=vocab_size, block_size=self.block_size, widths=ladder.WIDTHS
        )

    def probe(self) -> Iterator[tuple[ladder.Member, float]]:
        """Measure the speed of a few sizes; yields each with its tokens per second."""
        speeds = self.known["speeds"]
        for width in PROBES:
            member = self.members[f"w{width}"]
            if member.name not in speeds:
                if len(speeds) >= 2 and self._affordable(member) < 2 * member.parameters:
                    break
                name = f"probe-{member.name}"
                run = self.path / "runs" / name
                values = self._member_values(member.name) | {"run_dir": str(run)}
                values = ladder.merged(
                    values, {"train": {"duration": "100 steps", "global_batch_blocks": 16}}
                )
                recipe = self._write(name, values)
                with self.task(f"measuring {member.name}"):
                    code, seconds = self.children.run(
                        "lmcore", ["plan", "--probe", "--config", str(recipe)], self._log(name)
                    )
                self._refuse(code, name)
                kept = json.loads((run / "plan.json").read_text(encoding="utf-8"))
                speeds[member.name] = kept["tokens_per_second"]
                self.known["spent_seconds"] += seconds
                self._keep()
            yield member, speeds[member.name]

    def _affordable(self, member: ladder.Member) -> float:
        return self._speed({member.name: member})[member.name] * self.seconds

    def _speed(self, members: Mapping[str, ladder.Member], factor: float = 1.0) -> dict[str, float]:
        """Tokens per second of each member, interpolated from the probes and, where there are any, the rungs."""
        measured = {name: statistics.median(rates) for name, rates in self._rung_speeds().items()}
        known = {name: rate * factor for name, rate in self.known["speeds"].items()} | measured
        flops = [(self.members[name].flops_per_token, rate) for name, rate in known.items()]
        found = scaling.speeds(flops, [member.flops_per_token for member in members.values()])
        return dict(zip(members, found))

    def _rung_speeds(self) -> dict[str, list[float]]:
        by_member: dict[str, list[float]] = {}
        for name, one in self.known["rungs"].items():
            if one.get("tokens_per_second"):
                by_member.setdefault(name.split("-")[0], []).append(one["tokens_per_second"])
        return by_member

    def unsteadiness(self) -> float:
        """The largest relative difference in speed between the fastest and the slowest rung of a size."""
        rates = self._rung_speeds().values()
        return max((max(r) / min(r) - 1 for r in rates if len(r) > 1), default=0.0)

    def published(self) -> list[scaling.Published]:
        """What published laws choose for this budget."""
        speed = self._speed(self.members)
        return published_laws(self.members, speed, seconds=self.seconds, unique_tokens=self.unique_tokens)

    def design_ladder(self) -> None:
        """Decide on the sizes, steps and batch of the ladder, or load those of an earlier start."""
        if "design" not in self.known:
            self.known["design"] = asdict(
                design_for(
                    self.members, self._speed(self.members),
                    seconds=self.seconds, spent_seconds=self.spent_seconds, unique_tokens=self.unique_tokens,
                    rate=START_RATES[self.config.optim.name], block_size=self.block_size,
                )
            )  # fmt: skip

            self._keep()
        stored = dict(self.known["design"])
        stored |= {"members": tuple(stored["members"]), "steps": tuple(stored["steps"])}
        self.design = ladder.Design(**stored)
        smallest = self.design.steps[-1] * self.design.batch_blocks
        self.eval_blocks = min(self.valid_blocks, max(32, smallest // 4))

    # ---- 2: the rungs

    def _member_values(self, name: str) -> dict[str, Any]:
        values = ladder.changed(self.config)
        values.pop("run_dir", None)
        values["model"] = ladder.with_member(
            self.config, self.members[name].width, block_size=self.block_size
        )
        values["tokenizer"] = {"path": str(self.path / "tokenizer")}
        return values

    def write_recipe(self, rung: ladder.Rung) -> Path:
        """Write the recipe of a rung."""
        base = ladder.merged(self._member_values(rung.member), {"evaluate": {"blocks": self.eval_blocks}})
        return self._write(rung.name, ladder.rung_values(base, self.design, rung, self.path))

    def _write(self, name: str, values: dict[str, Any]) -> Path:
        path = self.path / "recipes" / f"{name}.yaml"
        DISK.write_text(path, yaml.dump(plain(values)), durable=False)
        return path

    def _log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def _refuse(self, code: int, name: str) -> None:
        """End the search if a short run failed for any reason except its learning rate."""
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
        """The losses of the finished rungs by name, including those that ran as jobs."""
        found = {}
        for path in sorted((self.path / "recipes").glob("w*.yaml")):
            result = ladder.read_result(self.path / "runs" / path.stem)
            if result.loss is not None:
                found[path.stem] = result.loss
                known = self.known["rungs"].setdefault(path.stem, {})
                known |= {"loss": result.loss if math.isfinite(result.loss) else None,
                          "tokens_per_second": result.tokens_per_second}  # fmt: skip
        return found

    def due(self) -> list[ladder.Rung]:
        """The rungs that can run now; an empty list if the ladder is complete."""
        losses = self.losses()
        self._keep()
        return ladder.due(self.design, losses)

    def climb(self) -> Iterator[tuple[ladder.Rung, ladder.Result]]:
        """Run the rungs that are due, until none is or the share of the budget is spent; yields each with its result.

        Raises:
            Stopped: a signal arrived.
            FaultError: a rung failed.
        """
        while waiting := self.due():
            rung = waiting[0]
            tokens = rung.new_steps * rung.batch_blocks * self.block_size
            speed = self._speed({rung.member: self.members[rung.member]})[rung.member]
            if self.spent_seconds + tokens / speed + ladder.STARTUP_SECONDS > SHARE * self.seconds:
                return
            recipe = self.write_recipe(rung)
            run = self.path / "runs" / rung.name
            own = ["--resume", "auto"] if any((run / "checkpoints").glob("step-*")) else []
            started = time.monotonic()
            try:
                with self.task(f"{rung.name}"):
                    code, _ = self.children.run(
                        str(self.script), ["--config", str(recipe), *own], self._log(rung.name)
                    )
            finally:
                self.known["spent_seconds"] += time.monotonic() - started
                self._keep()
            self._refuse(code, rung.name)
            result = ladder.read_result(run)
            if result.loss is None:
                raise FaultError(
                    f"the short run {rung.name} has no validation loss; its output: {self._log(rung.name)}"
                )
            self.folder.write_status("running", step=len(self.losses()))
            yield rung, result

    # ---- 3: the choice

    def choose(self) -> Chosen:
        """Fit the law to the ladder, and choose for the rest of the budget."""
        losses = self.losses()
        points = ladder.points(self.design, self.members, losses)
        try:
            fitted = scaling.fit(points, self.unique_tokens, draws=scaling.DRAWS)
        except RequestError as reason:
            raise RequestError(
                f"the budget is too small to measure: {reason}; the machine was slower than its first steps said. Give a "
                f"longer --budget and another --out"
            ) from None
        probed = self.known["speeds"]
        ratios = [
            statistics.median(rates) / probed[name]
            for name, rates in self._rung_speeds().items()
            if name in probed
        ]
        return choose(
            self.design, self.members, losses, fitted,
            speed=self._speed(self.members, statistics.median(ratios) if ratios else 1.0),
            seconds=(self.seconds - self.spent_seconds) * KEPT,
        )  # fmt: skip

    def keep_choice(self, chosen: Chosen) -> None:
        """Save the choice together with the measurements."""
        self.known["choice"] = {
            "member": chosen.member.name, "rate": chosen.rate, "batch_blocks": chosen.batch_blocks, "steps": chosen.steps,
            "epochs": chosen.choice.epochs, "expected": asdict(chosen.choice.expected), "spent_seconds": self.spent_seconds,
            "law": asdict(chosen.fitted.law), "noise": chosen.fitted.noise,
        }  # fmt: skip
        self._keep()

    def draw(self, chosen: Chosen) -> Path | None:
        """Plot the ladder with its law and the choice. Returns the path of the picture, or ``None`` without matplotlib."""
        from lmcore.report.curves import CAN_DRAW
        from lmcore.report.ladder import Size, ladder_picture

        if not CAN_DRAW:
            return None
        fitted, choice = chosen.fitted, chosen.choice
        sizes = []
        for name in dict.fromkeys([*self.design.members, chosen.member.name]):
            n = self.members[name].parameters
            measured = [(p.tokens, p.loss) for p in fitted.points if p.parameters == n]
            first = min([t for t, _ in measured] or [choice.tokens / 64])
            grid = [first * (choice.tokens / first) ** (i / 40) for i in range(41)]
            line = [(t, fitted.law.loss(n, scaling.effective_tokens(t, self.unique_tokens))) for t in grid]
            sizes.append(Size(name=f"{short(n)} parameters", measured=measured, fitted=line))
        interval = choice.expected
        drawn = ladder_picture(
            sizes, chosen=f"{short(chosen.member.parameters)} parameters", tokens=choice.tokens,
            expected=(interval.low, interval.middle, interval.high),
        )  # fmt: skip
        path = self.path / "ladder.png"
        path.write_bytes(drawn)
        return path
