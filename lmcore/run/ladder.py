"""The ladder of short runs by which ``lmcore size`` measures: which runs, their recipes, and what they found.

Every rung is an ordinary run of ``train_lm.py`` whose recipe stays on disk. Which rungs are due is a pure function of the design
and of the losses so far, so that a ladder that was interrupted, or whose rungs are jobs of a cluster, goes on where it was.

A rung has a WSD schedule: constant, then linear to zero over the last fifth. The next horizon of the same size and rate starts from
the checkpoint of the rung before at the end of its constant phase: it is bit for bit the longer run, and costs only the difference.
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
"""Of the models that are measured and chosen from. One family: depth grows with width, about as in the presets."""
HORIZONS = (1, 2, 4)
"""Lengths of the runs of a size, as multiples of the shortest."""
DECAY = 5
"""The last 1 / DECAY of a run decays (as ``optim.decay`` does by default)."""
FIRST_RATES = (-1, 0, 1)
"""Of each size, as powers of two of the rate to start from."""
LAST_RATE = 3
"""Where the best is at an edge one more is tried, up to this power of two."""
LEAST_STEPS = 50
"""Of the shortest rung: fewer say little about a rate."""


def layers_of(width: int) -> int:
    """Layers of the family's member: width / 32 up to 8, then one more for each 128.

    >>> [layers_of(width) for width in (32, 192, 256, 768, 2048)]
    [1, 6, 8, 12, 22]
    """
    return max(1, width // 32) if width <= 256 else 8 + (width - 256) // 128


def heads_of(width: int) -> int:
    """Of 32 dimensions up to a width of 384, then of 64."""
    return width // 32 if width < 512 else width // 64


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of the family, counted."""

    width: int
    parameters: int
    """Those that multiply: without an embedding that is only looked up."""
    flops_per_token: int

    @property
    def name(self) -> str:
        return f"w{self.width}"

    def words(self) -> str:
        return f"{layers_of(self.width)} layers, width {self.width}, {heads_of(self.width)} heads"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One short run. ``parent``: the rung from whose checkpoint of step ``parent_step`` it goes on."""

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
    """What was decided before the first rung: sizes, steps of the shortest rung of each, rate to start from, batch."""

    members: tuple[str, ...]
    steps: tuple[int, ...]
    rate: float
    batch_blocks: int
    block_size: int

    def first_steps(self, rung: Rung) -> int:
        """Steps of the shortest run of its size with its batch."""
        return self.steps[self.members.index(rung.member)] * self.batch_blocks // rung.batch_blocks

    def rung(self, member: str, rate: float, horizon: int, *, batch: float = 1.0) -> Rung:
        """The rung of a size at a rate; ``batch`` multiplies the batch and divides the steps: the tokens stay."""
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
        """Rate -> loss of the shortest rungs that are finished; a run that diverged has an infinite loss."""
        found = {}
        for power in range(-LAST_RATE, LAST_RATE + 1):
            name = self.rung(member, self.rate * 2.0**power, 1).name
            if name in losses:
                found[self.rate * 2.0**power] = losses[name]
        return found

    def best_rate(self, member: str, losses: Mapping[str, float]) -> float:
        """Of those that were tried. Raises :class:`RequestError` where every one diverged."""
        tried = self.rates(member, losses)
        best = min(tried, key=lambda rate: tried[rate])
        if not math.isfinite(tried[best]):
            raise RequestError(
                f"{member}: every learning rate from {min(tried):g} to {max(tried):g} diverged"
            )
        return best


def due(design: Design, losses: Mapping[str, float]) -> list[Rung]:
    """The rungs that can run now, all of them at once where there are several machines; none: the ladder is complete.

    First each size at three rates, and at one more while the best is at an edge; then the best rate of each size for twice and
    four times as long (the others end here), and the smallest size at half and twice the batch.

    Args:
        losses: by the name of the rung; infinite for one that diverged.
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
    """The finished runs at the best rate of each size: what :func:`lmcore.plan.scaling.fit` fits."""
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
    """Of the smallest size, as a power of two of blocks: by the parabola through half, once and twice the ladder's batch."""
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
"""Of a rung, from its start to its first step and from its last step to its end: data, model, checkpoint, export."""


def cost_in_first_rungs(smallest: bool) -> float:
    """Tokens of all rungs of a size in tokens of its shortest: three rates and, now and then, one more; two more horizons.

    >>> round(cost_in_first_rungs(False), 2), round(cost_in_first_rungs(True), 2)
    (7.1, 9.1)
    """
    longer = sum(b - a * (1 - 1 / DECAY) for a, b in itertools.pairwise(HORIZONS))
    return len(FIRST_RATES) + 0.5 + longer + (2.0 if smallest else 0.0)


def rungs_of(sizes: int) -> int:
    """How many runs a ladder of so many sizes has, about."""
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
    """Sizes, steps and batch of a ladder.

    Args:
        family: members with their tokens a second, the smallest first.
        budget_of: the budget (seconds) whose ladder gets so many seconds, for the message that it is too small.
        wanted_parameters: about where the choice is expected; the ladder ends at a third of it, if there are so small members.
        largest_batch_blocks: of the batch that the published law asks for.

    Raises:
        RequestError: too little time for three sizes; says how much is needed.
    """
    last = max([2, *(i for i, (m, _) in enumerate(family) if m.parameters <= wanted_parameters / 3)])
    chosen = sorted({max(0, last - 4), max(1, last - 2), last}) if last >= 4 else [last - 2, last - 1, last]
    seconds = ladder_seconds - STARTUP_SECONDS * rungs_of(len(chosen))
    blocks = largest_batch_blocks
    while True:
        steps = []
        for index in chosen:
            each = seconds / len(chosen) / cost_in_first_rungs(index == chosen[0])
            # A multiple of 10: a fifth of it, and of its half, is whole.
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
    """The values of ``model.*`` of a member of the family: the preset's class and fields, by their own names."""
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
        base: options of all rungs (text, tokenizer, optimizer, precision), nested.
        folder: of the ladder; the rung's run folder is ``folder/runs/NAME``.
    """
    # The warm-ups of the shortest run, for all lengths: so a longer run can go on from a shorter one.
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
        # What the user asks for at evaluations during the run is for the run of the recipe: here there are none.
        "checkpoint": {
            "every": f"{rung.steps - rung.decay_steps} steps", "keep": 2, "background": False, "keep_best": {"k": 0},
            "export": "last",
        },
        "evaluate": {
            "every": "never", "prompts": [], "early_stopping": {"patience": 0, "target": None, "divergence": None},
        },
        "report": {"every": f"{max(1, rung.new_steps // 10)} steps", "trackers": []},
        # A rung that is not finite is a rate that is too high: that is an answer, not worth a second try.
        "guard": {"max_rewinds": 0},
    }  # fmt: skip
    return merged(base, own)


def schedule(*, warmup: str, momentum: str) -> dict[str, Any]:
    """WSD to zero; what it is warmed up by is the same for every horizon, so that the constant phases are the same run."""
    return {"schedule": "wsd", "min_lr_ratio": 0.0, "warmup": warmup, "momentum_warmup": momentum}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries as one; ``model.config`` is replaced as a whole."""
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
    """Of a rung. ``loss``: infinite where the training diverged; ``None``: it is not finished."""

    loss: float | None
    tokens_per_second: float | None


def read_result(run_dir: Path) -> Result:
    """What a run folder says: its last validation loss (of the first set) and its speed without the first record."""
    try:
        status = json.loads((run_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        return Result(loss=None, tokens_per_second=None)
    if not isinstance(status, dict):  # damaged: the run itself writes it anew
        return Result(loss=None, tokens_per_second=None)
    state = status.get("state")
    if state == "failed" and status.get("diverged") is True:  # code 70 is that of a full disk, too
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
