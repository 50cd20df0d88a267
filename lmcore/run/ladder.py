"""The ladder of short runs that ``lmcore size`` measures with: which runs there are, their recipes, and their results.

Every rung is an ordinary run of ``train_lm.py`` whose recipe stays on disk. Which rungs are due is a pure function of the design
and of the losses so far, so that a ladder that was interrupted, or whose rungs are jobs on a cluster, continues where it was.

A rung has a WSD schedule: constant, then a linear decay to zero over the last fifth. The next longer rung of the same size and
rate starts from the checkpoint that the shorter one saved at the end of its constant phase. The result is bit for bit that of
the longer run from scratch, and costs only the additional steps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmcore.config import presets
from lmcore.config.schema import RunConfig, to_dict
from lmcore.errors import RequestError
from lmcore.plan import scaling
from lmcore.report.metrics import read_metrics

WIDTHS = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
"""Widths of the models that are measured and chosen from. In this family depth grows with width, about as in the presets."""
HORIZONS = (1, 2, 4)
"""Lengths of the runs of one size, as multiples of the shortest."""
DECAY = 5
"""The last 1 / DECAY of a run is the decay phase (as with the default of ``optim.decay``)."""
FIRST_RATES = (-1, 0, 1)
"""The first learning rates of each size: powers of two by which the initial rate is multiplied."""
LAST_RATE = 3
"""If the best rate is the lowest or highest tried, one more is tried, up to this power of two."""
LEAST_STEPS = 50
"""Least number of steps of the shortest rung: fewer say little about a rate."""


def layers_of(width: int) -> int:
    """Number of layers for a width: width / 32 up to 8 layers, then one more for each 128.

    >>> [layers_of(width) for width in (32, 192, 256, 768, 2048)]
    [1, 6, 8, 12, 22]
    """
    return max(1, width // 32) if width <= 256 else 8 + (width - 256) // 128


def heads_of(width: int) -> int:
    """Number of heads for a width: heads have 32 dimensions up to a width of 384, then 64."""
    return width // 32 if width < 512 else width // 64


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of the family with its counts."""

    width: int
    parameters: int
    """Parameters that take part in a matrix product: without an embedding that is only looked up."""
    flops_per_token: int

    @property
    def name(self) -> str:
        return f"w{self.width}"

    def words(self) -> str:
        return f"{layers_of(self.width)} layers, width {self.width}, {heads_of(self.width)} heads"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One short run. It continues from the checkpoint of step ``parent_step`` of the rung ``parent``, if there is one."""

    member: str
    rate: float
    batch_blocks: int
    steps: int
    parent: str | None = None
    parent_step: int = 0

    @property
    def name(self) -> str:
        return f"{self.member}-b{self.batch_blocks}-lr{self.rate:.4g}-{self.steps}"

    @property
    def decay_steps(self) -> int:
        return self.steps // DECAY

    @property
    def new_steps(self) -> int:
        return self.steps - self.parent_step


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is decided before the first rung: the sizes, the steps of the shortest rung of each size, the initial rate, and the
    batch."""

    members: tuple[str, ...]
    steps: tuple[int, ...]
    rate: float
    batch_blocks: int
    block_size: int

    def first_steps(self, rung: Rung) -> int:
        """Steps of the shortest run of the same size with the same batch."""
        return self.steps[self.members.index(rung.member)] * self.batch_blocks // rung.batch_blocks

    def rung(self, member: str, rate: float, horizon: int, *, batch: float = 1.0) -> Rung:
        """The rung of a size at a rate. ``batch`` multiplies the batch and divides the steps; the number of tokens stays."""
        first = round(self.steps[self.members.index(member)] / batch)
        before = HORIZONS.index(horizon) - 1
        blocks = round(self.batch_blocks * batch)
        rung = Rung(member=member, rate=rate, batch_blocks=blocks, steps=first * horizon)
        if before < 0:
            return rung
        steps = first * HORIZONS[before]
        parent = Rung(member=member, rate=rate, batch_blocks=blocks, steps=steps)
        return Rung(
            member=member, rate=rate, batch_blocks=blocks, steps=first * horizon,
            parent=parent.name, parent_step=steps - parent.decay_steps,
        )  # fmt: skip

    def rates(self, member: str, losses: Mapping[str, float]) -> dict[float, float]:
        """Rate -> loss of the finished shortest rungs of a size; a run that diverged has an infinite loss."""
        found = {}
        for power in range(-LAST_RATE, LAST_RATE + 1):
            name = self.rung(member, self.rate * 2.0**power, 1).name
            if name in losses:
                found[self.rate * 2.0**power] = losses[name]
        return found

    def best_rate(self, member: str, losses: Mapping[str, float]) -> float:
        """The best of the rates that were tried. Raises :class:`RequestError` if all of them diverged."""
        tried = self.rates(member, losses)
        best = min(tried, key=lambda rate: tried[rate])
        if not math.isfinite(tried[best]):
            raise RequestError(
                f"{member}: every learning rate from {min(tried):g} to {max(tried):g} diverged"
            )
        return best


def due(design: Design, losses: Mapping[str, float]) -> list[Rung]:
    """The rungs that can run now, in parallel if there are several machines; an empty list if the ladder is complete.

    First each size runs at three rates, and at one more while the best is the lowest or highest. Then each size runs at its
    best rate twice and four times as long, and the smallest size with half and twice the batch.

    Args:
        losses: losses by the name of the rung; infinite for one that diverged.
    """

    def missing(rungs: Sequence[Rung]) -> list[Rung]:
        return [rung for rung in rungs if rung.name not in losses]

    first = missing(
        [design.rung(m, design.rate * 2.0**power, 1) for m in design.members for power in FIRST_RATES]
    )
    if first:
        return first
    more = []
    for member in design.members:
        tried = design.rates(member, losses)
        best = design.best_rate(member, losses)
        power = round(math.log2(best / design.rate))
        step = (best == max(tried)) - (best == min(tried))
        if step and abs(power + step) <= LAST_RATE:
            more.append(design.rung(member, design.rate * 2.0 ** (power + step), 1))
    if missing(more):
        return missing(more)
    rates = {member: design.best_rate(member, losses) for member in design.members}
    small = design.members[0]
    batches = [
        design.rung(small, rates[small] * math.sqrt(factor), 1, batch=factor)
        for factor in (0.5, 2.0)
        if design.batch_blocks * factor >= 1
    ]
    second = missing([*(design.rung(m, rates[m], HORIZONS[1]) for m in design.members), *batches])
    return second or missing([design.rung(m, rates[m], HORIZONS[2]) for m in design.members])


def points(design: Design, members: Mapping[str, Member], losses: Mapping[str, float]) -> list[scaling.Point]:
    """The finished runs at the best rate of each size, as input for :func:`lmcore.plan.scaling.fit`."""
    found = []
    for name in design.members:
        if not design.rates(name, losses):
            continue
        best = design.best_rate(name, losses)
        for horizon in HORIZONS:
            rung = design.rung(name, best, horizon)
            if math.isfinite(losses.get(rung.name, math.inf)):
                tokens = rung.steps * rung.batch_blocks * design.block_size
                found.append(
                    scaling.Point(parameters=members[name].parameters, tokens=tokens, loss=losses[rung.name])
                )
    return found


def best_batch(design: Design, losses: Mapping[str, float]) -> int:
    """The best batch of the smallest size in blocks, rounded to a power of two: the minimum of a parabola through the losses with
    half, once and twice the ladder's batch."""
    small = design.members[0]
    best = design.best_rate(small, losses)
    tried = {design.batch_blocks: losses[design.rung(small, best, 1).name]}
    for factor in (0.5, 2.0):
        rung = design.rung(small, best * math.sqrt(factor), 1, batch=factor)
        if rung.name in losses:
            tried[rung.batch_blocks] = losses[rung.name]
    return int(2 ** round(math.log2(scaling.lowest_of_parabola(list(tried), list(tried.values())))))


# -------------------------------------------------------------------------------------------------------- design


STARTUP_SECONDS = 4.0
"""Time that a rung spends outside its steps, before the first and after the last: data, model, checkpoint, export."""


def cost_in_first_rungs(smallest: bool) -> float:
    """Tokens of all rungs of a size as a multiple of those of its shortest: three rates and sometimes a fourth, two longer runs,
    and for the smallest size two other batches.

    >>> round(cost_in_first_rungs(False), 2), round(cost_in_first_rungs(True), 2)
    (7.1, 9.1)
    """
    longer = sum(b - a * (1 - 1 / DECAY) for a, b in itertools.pairwise(HORIZONS))
    return len(FIRST_RATES) + 0.5 + longer + (2.0 if smallest else 0.0)


def rungs_of(sizes: int) -> int:
    """The approximate number of runs of a ladder with so many sizes."""
    return sizes * (len(FIRST_RATES) + len(HORIZONS) - 1) + sizes // 2 + 2


def design(
    family: Sequence[tuple[Member, float]],
    *,
    ladder_seconds: float,
    budget_of: Callable[[float], float],
    wanted_parameters: float,
    rate: float,
    block_size: int,
    largest_batch_blocks: int,
) -> Design:
    """Choose the sizes, steps and batch of a ladder.

    Args:
        family: members with their tokens per second, the smallest first.
        budget_of: maps the seconds of a ladder to the whole budget in seconds, for the message that it is too small.
        wanted_parameters: about the size that is expected to be chosen; the largest size of the ladder is a third of it, if the
            family has members that small.
        largest_batch_blocks: the batch that the published law recommends.

    Raises:
        RequestError: there is too little time for three sizes; the message says how much is needed.
    """
    last = max([2, *(i for i, (m, _) in enumerate(family) if m.parameters <= wanted_parameters / 3)])
    chosen = sorted({max(0, last - 4), max(1, last - 2), last}) if last >= 4 else [last - 2, last - 1, last]
    seconds = ladder_seconds - STARTUP_SECONDS * rungs_of(len(chosen))
    blocks = largest_batch_blocks
    while True:
        steps = []
        for index in chosen:
            each = seconds / len(chosen) / cost_in_first_rungs(index == chosen[0])
            # A multiple of 10, so that a fifth of it and of its half are whole numbers.
            steps.append(int(each * family[index][1] / (blocks * block_size) // 10 * 10))
        if min(steps) >= LEAST_STEPS:
            break
        if blocks > 2:
            blocks //= 2
        elif chosen[0] > 0 and chosen[-1] > 2:
            chosen = [chosen[0] - 1, chosen[0], chosen[0] + 1]
            blocks = largest_batch_blocks
        else:
            each = max(
                LEAST_STEPS * blocks * block_size * cost_in_first_rungs(i == chosen[0]) / family[i][1]
                for i in chosen
            )
            needed = len(chosen) * each + STARTUP_SECONDS * rungs_of(len(chosen))
            raise RequestError(
                f"the budget is too small to measure: three sizes need about {needed / 60:.1f} min of short runs here, and may "
                f"take {max(0.0, ladder_seconds) / 60:.1f} min. Give a --budget of at least "
                f"{math.ceil(budget_of(needed) / 60)} min, or train without measuring: train_lm.py --data.train ... chooses by "
                "the size of the text"
            )
    return Design(
        members=tuple(family[i][0].name for i in chosen), steps=tuple(steps), rate=rate,
        batch_blocks=blocks, block_size=block_size,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- recipes


def with_member(config: RunConfig, width: int, *, block_size: int) -> dict[str, Any]:
    """The values of ``model.*`` for a member of the family: the preset's model type and its config fields."""
    preset = config.model.preset or "modern"
    shape = presets.Shape(layers=layers_of(width), width=width, heads=heads_of(width), context=block_size)
    type, fields = presets.fields_of(preset, shape, block_size)
    values: dict[str, Any] = {"type": type, "config": fields}
    if presets.zero_init(replace(config, model=replace(config.model, preset=preset))):
        values["zero_init"] = True
    if config.model.attention is not None:
        values["attention"] = config.model.attention
    return values


def rung_values(base: dict[str, Any], design: Design, rung: Rung, folder: Path) -> dict[str, Any]:
    """The options of a rung, nested.

    Args:
        base: options that all rungs share (text, tokenizer, optimizer, precision), nested.
        folder: the folder of the ladder; the rung's run folder is ``folder/runs/NAME``.
    """
    # All lengths use the warmups of the shortest run, so that a longer run can continue from a shorter one.
    first = design.first_steps(rung)
    resume = "auto" if rung.parent is None else str(
        folder / "runs" / rung.parent / "checkpoints" / f"step-{rung.parent_step:08d}"
    )  # fmt: skip
    own = {
        "run_dir": str(folder / "runs" / rung.name),
        "resume": resume,
        "optim": {
            "lr": rung.rate,
            **schedule(warmup=f"{max(1, first // 50)} steps", momentum=f"{max(1, first // 10)} steps"),
            "decay": f"{rung.decay_steps} steps",
        },
        "train": {"duration": f"{rung.steps} steps", "global_batch_blocks": rung.batch_blocks},
        # What the user asks for at evaluations during the run applies to the final run; rungs have no such evaluations.
        "checkpoint": {
            "every": f"{rung.steps - rung.decay_steps} steps", "keep": 2, "background": False, "keep_best": {"k": 0},
            "export": "last",
        },
        "evaluate": {
            "every": "never", "prompts": [], "early_stopping": {"patience": 0, "target": None, "divergence": None},
        },
        "report": {"every": f"{max(1, rung.new_steps // 10)} steps", "trackers": []},
        # A loss that is not finite means that the rate is too high. That is a result, so do not try again.
        "guard": {"max_rewinds": 0},
    }  # fmt: skip
    return merged(base, own)


def schedule(*, warmup: str, momentum: str) -> dict[str, Any]:
    """A WSD schedule to zero. The warmups are the same for every length, so that the constant phases are the same run."""
    return {"schedule": "wsd", "min_lr_ratio": 0.0, "warmup": warmup, "momentum_warmup": momentum}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries; ``over`` takes precedence, and ``model.config`` is replaced as a whole."""
    result = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping) and name != "config"
        result[name] = merged(result[name], value) if both else value
    return result


def changed(config: RunConfig) -> dict[str, Any]:
    """The options that differ from their defaults, nested."""
    values, defaults = to_dict(config, secrets=False), to_dict(RunConfig())

    def differ(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in now.items():
            if isinstance(value, dict) and isinstance(before.get(name), dict) and before[name]:
                inside = differ(value, before[name])
                if inside:
                    found[name] = inside
            elif value != before.get(name):
                found[name] = value
        return found

    return differ(values, defaults)


# -------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a rung. ``loss`` is infinite if the training diverged, and ``None`` if the rung is not finished."""

    loss: float | None
    tokens_per_second: float | None


def read_result(run_dir: Path) -> Result:
    """Read the last validation loss (of the first set) and the speed (without the first record) of a run."""
    try:
        status = json.loads((run_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        return Result(loss=None, tokens_per_second=None)
    if not isinstance(status, dict):  # damaged: the run itself will write it again
        return Result(loss=None, tokens_per_second=None)
    state = status.get("state")
    if state == "failed" and status.get("diverged") is True:  # exit code 70 may also be a full disk
        return Result(loss=math.inf, tokens_per_second=None)
    records = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    scored = [r for r in records if r.get("kind") == "eval" and r.get("step") == status.get("step")]
    train = [r for r in records if r.get("kind") == "train" and r.get("tokens_per_second")]
    tokens = seconds = 0.0
    for before, record in itertools.pairwise(train):
        tokens += record["tokens"] - before["tokens"]
        seconds += (record["tokens"] - before["tokens"]) / record["tokens_per_second"]
    loss: float | None = None
    if state == "finished" and scored:
        found = scored[0].get("loss")  # JSON has no NaN and no infinity: null
        loss = math.inf if found is None else float(found)
    return Result(loss=loss, tokens_per_second=tokens / seconds if seconds else None)
