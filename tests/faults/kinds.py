"""The faults: each hurts runs in one way, and says whether what the contract promises came out.

A trial is a function of (place, seed, folder); all its random choices come from the seed. It returns a
:class:`Trial`; a broken promise is a raised ``AssertionError``, whose text is the evidence.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from tests.faults import runs
from tests.faults.runs import Run
from tests.support.disk_faults import FullAt

STEPS = 40
SAVE_EVERY = 5


@final
@dataclass(kw_only=True)
class Trial:
    """What one trial has shown; ``counts`` are added up over the trials of a kind."""

    counts: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


def arguments(place: Path, folder: Path, *more: str) -> list[str]:
    return [
        *runs.base_arguments(place, steps=STEPS, every=SAVE_EVERY),
        "--run_dir",
        str(folder / "run"),
        *more,
    ]


def lighten(rank: int = 0) -> None:
    """Leave out the picture and the export at the end: they take longer than the whole training, and no part
    in it.
    """
    from lmcore.run import finish

    finish.write_report = lambda _runs, path: path
    finish.export = lambda _checkpoint, path, **_: path


def undisturbed(
    place: Path, workers: int = 0, world_size: int = 1, extra: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Weights, losses and evaluations of the run that nobody hurts, and how long it takes."""

    def run(folder: Path) -> None:
        words = ("--data.workers", str(workers), *extra)
        finish(place, folder, *words, world_size=world_size)

    more = hashlib.sha256(json.dumps(extra).encode()).hexdigest()[:8]
    return runs.recorded(place, f"undisturbed-{workers}-{world_size}-{more}", run)


def assert_equal_to_undisturbed(run_dir: Path, expected: dict[str, Any]) -> None:
    """Weights, optimizer, every loss, every evaluation: equal to the last bit."""
    found = runs.outcome(run_dir)
    assert sorted(found["losses"]) == list(range(1, STEPS + 1)), f"steps logged: {sorted(found['losses'])}"
    for step, record in expected["losses"].items():
        assert found["losses"][step] == record, f"step {step}: {found['losses'][step]} instead of {record}"
    assert found["evaluations"] == expected["evaluations"]
    assert found["weights"] == expected["weights"]


def finish(place: Path, folder: Path, *more: str, world_size: int = 1, inject: Any = lighten) -> Run:
    """The same command again, to the end, undisturbed."""
    run = runs.start(
        arguments(place, folder, *more), logs=folder / "logs", world_size=world_size, inject=inject
    )
    assert run.wait(180), f"did not end: {run.output()}"
    assert set(run.codes.values()) == {0}, f"exit codes {run.codes}: {run.output()}"
    return run


def trained(folder: Path) -> Callable[[], bool]:
    """Whether the first training record is there: the loop runs."""
    return lambda: bool(runs.losses(folder / "run"))


def last_logged(folder: Path) -> int:
    return max(runs.losses(folder / "run"), default=0)


def further(folder: Path, step: int) -> bool:
    return last_logged(folder) > step


# ---- SIGKILL at a random moment ----------------------------------------------------------------------------


class InSave:
    """Do something at call ``number`` of those that touch the checkpoints."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self.number, self.action, self.count = number, action, 0

    def __call__(self, call: Any) -> None:
        if f"{os.sep}checkpoints" in call.path:
            if self.count == self.number:
                self.action()
            self.count += 1


def in_save(number: int, action: Callable[[], None]) -> Callable[[int], None]:
    """An injection that acts at call ``number`` of rank 0's saves."""

    def inject(rank: int) -> None:
        from lmcore import disk as files

        lighten()
        if rank == 0:
            files.DISK.before = InSave(number, action)

    return inject


def kill(place: Path, seed: int, folder: Path) -> Trial:
    """Killed up to four times, at a random moment or inside a save; then started again until it ends."""
    draw, trial = random.Random(seed), Trial()
    workers = draw.choice([0, 0, 0, 2])
    expected = undisturbed(place, workers)
    more = ("--data.workers", str(workers))
    for _ in range(draw.randrange(1, 5)):
        targeted = draw.random() < 0.5
        action = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        inject = in_save(draw.randrange(150), action) if targeted else lighten
        run = runs.start(arguments(place, folder, *more), logs=folder / "logs", inject=inject)
        if not targeted:
            run.wait(draw.uniform(0.0, 1.1 * expected["seconds"]), until=lambda: False)
            run.send(signal.SIGKILL)
        assert run.wait(180), run.output()
        if run.codes == {0: -9}:
            trial.count("kills")
            checkpoints = folder / "run" / "checkpoints"
            unfinished = checkpoints.is_dir() and any(checkpoints.glob(".step-*.tmp"))
            trial.count("kills inside a save", int(targeted or unfinished))
        else:
            assert run.codes == {0: 0}, run.output()  # it was faster than we were
            break
    finish(place, folder, *more)
    assert_equal_to_undisturbed(folder / "run", expected)
    assert not list((folder / "run" / "checkpoints").glob("*damaged*")), "a kill has left a wreck"
    return trial


# ---- signals -----------------------------------------------------------------------------------------------


def at_forward(
    number: int, action: Callable[[], None], only_rank: int | None = None
) -> Callable[[int], None]:
    """An injection that acts at forward pass ``number``: inside an accumulation, or inside an evaluation."""

    def inject(rank: int) -> None:
        from lmcore.engine import engine

        lighten()
        if only_rank is not None and rank != only_rank:
            return
        real, count = engine.Engine.forward, [0]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if count[0] == number:
                action()
            count[0] += 1
            return real(self, *args, **kwargs)

        engine.Engine.forward = forward

    return inject


def held(step: int, told: Path) -> Callable[[int], None]:
    """An injection: the loop goes no further than ``step`` until the file ``told`` is there. What is done to the run
    meanwhile does not come too late.
    """

    def inject(rank: int) -> None:
        from lmcore.run.trainer import Run

        lighten()
        real = Run.record

        def record(self: Any, *words: Any, **numbers: Any) -> None:
            real(self, *words, **numbers)
            while self.state.step >= step and not told.exists():
                time.sleep(0.002)

        Run.record = record

    return inject


def signals(place: Path, seed: int, folder: Path) -> Trial:
    """SIGTERM, SIGUSR1 or SIGINT on a rank or on all, at any phase, up to five times: each time saved, code
    75.
    """
    draw, trial = random.Random(seed), Trial()
    workers, world_size = draw.choice([0, 0, 2]), draw.choice([1, 1, 2])
    expected = undisturbed(place, workers, world_size)
    more = ("--data.workers", str(workers))
    for hit in range(5):
        number = draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1, signal.SIGINT])
        phase = draw.choice(["any moment", "accumulation or evaluation", "save"])
        target = draw.choice([*range(world_size), None])
        action = functools.partial(signal.raise_signal, number)
        inject = lighten
        if phase == "save":
            inject = in_save(draw.randrange(40), action)
        elif phase == "accumulation or evaluation":
            inject = at_forward(draw.randrange(1, 20 // world_size), action, target)
        if hit == 0 and seed % 2 == 0:  # exactly at the boundary where an evaluation is due, after the save
            phase, inject = "a boundary with an evaluation", at_forward(30 // world_size - 1, action, target)
        logs, told = folder / f"logs-{hit}", folder / f"told-{hit}"
        begin = last_logged(folder)
        if phase == "any moment" and begin + 8 < STEPS:
            inject = held(begin + 8, told)
        run = runs.start(arguments(place, folder, *more), logs=logs, world_size=world_size, inject=inject)
        at_step = 0
        if phase == "any moment":
            run.wait(120, until=functools.partial(further, folder, begin))
            run.wait(draw.uniform(0.0, 0.1 * expected["seconds"]), until=lambda: False)
            at_step = last_logged(folder)
            run.send(number, None if target is None else [target])
            told.touch()
        what = f"hit {hit}: {phase}, {signal.Signals(number).name}, rank {target} of {world_size}"
        assert run.wait(180), f"{what}: {run.output()}"
        codes = set(run.codes.values())
        if codes == {0}:
            trial.count("came too late")
            break
        assert codes == {75}, f"{what}: exit codes {run.codes}: {run.output()}"
        trial.count(f"{signal.Signals(number).name}")
        trial.count("signals")
        trial.count(f"at {phase}")
        said = runs.status(folder / "run")
        assert (said["state"], said["exit_code"]) == ("saved", 75), f"{what}: {said}"
        assert signal.Signals(number).name in said["reason"], f"{what}: {said}"
        newest = runs.committed_steps(folder / "run")[-1]
        assert newest >= at_step, f"{what}: signal at step {at_step}, newest checkpoint {newest}"
        assert newest == said["step"], f"{what}: newest checkpoint {newest}, {said}"
    finish(place, folder, *more, world_size=world_size)
    assert_equal_to_undisturbed(folder / "run", expected)
    return trial


# ---- disk full ---------------------------------------------------------------------------------------------


class FullInSave:
    """A disk that is full for the checkpoints after some bytes; ``once`` for a while only."""

    def __init__(self, capacity_bytes: int, *, once: bool) -> None:
        self.full, self.once, self.hit = FullAt(capacity_bytes), once, False

    def __call__(self, call: Any) -> None:
        if f"{os.sep}checkpoints" not in call.path or (self.once and self.hit):
            return
        try:
            self.full(call)
        except OSError:
            self.hit = True
            raise


def full(place: Path, seed: int, folder: Path) -> Trial:
    """The disk is full at byte b of the saves: the last good one stays; stop with 70, or train on and save
    later.
    """
    draw, trial = random.Random(seed), Trial()
    policy = draw.choice(["stop", "continue"])
    expected = undisturbed(place)
    size = sum(
        entry["bytes"]
        for entry in json.loads(
            (expected["run"] / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text()
        )["files"].values()
    )
    capacity = draw.randrange(size * (STEPS // SAVE_EVERY - 1))

    def inject(_rank: int) -> None:
        from lmcore import disk as files

        lighten()
        files.DISK.before = FullInSave(capacity, once=policy == "continue")

    more = ("--checkpoint.on_full_disk", policy)
    run = runs.start(arguments(place, folder, *more), logs=folder / "logs", inject=inject)
    assert run.wait(180), run.output()
    trial.count(policy)
    if policy == "stop":
        assert run.codes == {0: 70}, f"{run.codes}: {run.output()}"
        said = runs.status(folder / "run")
        assert (said["state"], said["exit_code"]) == ("failed", 70), said
        assert "could not be written" in said["reason"], said
        assert os.strerror(errno.ENOSPC) in said["reason"], said
        saved = runs.committed_steps(folder / "run")
        assert len(saved) == min(2, capacity // size) or len(saved) in (1, 2), saved
        finish(place, folder)
    else:
        assert run.codes == {0: 0}, f"{run.codes}: {run.output()}"
        assert "could not be written" in (folder / "run" / "train.log").read_text()
    assert_equal_to_undisturbed(folder / "run", expected)
    return trial


# ---- not finite --------------------------------------------------------------------------------------------


def poison(places: Mapping[int, int], evidence: Path) -> Callable[[int], None]:
    """Make losses NaN (``places``: number of the micro-batch on its rank -> rank), and write down a hash of
    the weights before and after every update of every rank.
    """

    def inject(rank: int) -> None:
        from lmcore.engine import engine
        from lmcore.run.replicas import parameter_hash

        lighten()
        forward, update, count = engine.Engine.forward, engine.Engine.update, [0]

        def poisoned(self: Any, batch: Any, key: int | None = None) -> Any:
            loss_sum, labels = forward(self, batch, key)
            if key is not None:
                if places.get(count[0]) == rank:
                    loss_sum = loss_sum * float("nan")
                count[0] += 1
            return loss_sum, labels

        def watched(self: Any, *args: Any) -> Any:
            before = parameter_hash(local_weights(self))
            norm, applied = update(self, *args)
            after = parameter_hash(local_weights(self))
            with open(evidence / f"rank-{rank}", "a") as file:
                print(json.dumps([before, after, bool(applied)]), file=file)
            return norm, applied

        engine.Engine.forward = poisoned
        engine.Engine.update = watched

    return inject


def local_weights(engine: Any) -> list[tuple[str, Any]]:
    """The weights as this rank holds them: all of them, or its shards."""
    named = []
    for name, parameter in engine.module.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        tensor = getattr(parameter, "ds_tensor", tensor)  # ZeRO-3 keeps its shard beside an empty parameter
        named.append((name, tensor))
    return named


def prepared(strategy: str, inject: Callable[[int], None] = lighten) -> Callable[[int], None]:
    """accelerate shards with FSDP2 on GPUs only: there its idea of the machine is changed, as in tests/engine/test_engine.py;
    the sharding and the collectives (gloo) are real.
    """

    def with_gpus(rank: int) -> None:
        from tests.support.engine_runs import pretend_gpus

        inject(rank)
        pretend_gpus()

    return with_gpus if strategy == "fsdp2" else inject


STRATEGIES: dict[str, tuple[int, dict[str, str], tuple[str, ...]]] = {
    "single": (1, {}, ()),
    "ddp": (2, {}, ()),
    "fsdp2": (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "false"}, ()),
    "zero1": (
        2,
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"},
        ("--engine.deepspeed", "ds_configs/zero1.json"),
    ),
    "zero2": (
        2,
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"},
        ("--engine.deepspeed", "ds_configs/zero2.json"),
    ),
    "zero3": (
        2,
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"},
        ("--engine.deepspeed", "ds_configs/zero3.json"),
    ),
}


def not_finite(
    place: Path, seed: int, folder: Path, strategies: tuple[str, ...] = ("single", "ddp", "ddp")
) -> Trial:
    """NaN in rank r, micro-batch m: that update is applied nowhere, all ranks agree, it is said with its
    positions.
    """
    draw, trial = random.Random(seed), Trial()
    strategy = draw.choice(strategies)
    world_size, environment, more = STRATEGIES[strategy]
    more = tuple(str(runs.ROOT / word) if word.startswith("ds_configs") else word for word in more)
    accumulation = 2 // world_size
    steps = sorted(draw.sample(range(1, STEPS + 1), 5))
    places = {
        (step - 1) * accumulation + draw.randrange(accumulation): draw.randrange(world_size) for step in steps
    }
    evidence = folder / "evidence"
    evidence.mkdir(parents=True)
    run = runs.start(
        arguments(place, folder, *more),
        logs=folder / "logs",
        world_size=world_size,
        inject=prepared(strategy, poison(places, evidence)),
        environment=environment,
    )
    assert run.wait(180), run.output()
    assert set(run.codes.values()) == {0}, f"{strategy}: {run.codes}: {run.output()}"
    for rank in range(world_size):
        rows = [json.loads(line) for line in (evidence / f"rank-{rank}").read_text().splitlines()]
        assert len(rows) == STEPS
        for number, (before, after, applied) in enumerate(rows, 1):
            assert applied == (number not in steps), (
                f"{strategy} rank {rank} step {number}: applied {applied}"
            )
            assert (before == after) == (number in steps), f"{strategy} rank {rank}: weights at step {number}"
    said = runs.events(folder / "run", "skip")
    assert [event["step"] for event in said] == steps, said
    for event in said:
        first = (event["step"] - 1) * 4
        assert [tuple(pair) for pair in event["positions"]] == [(first, first + 4)], event
        record = runs.losses(folder / "run")[event["step"]]
        assert record["skipped_steps"] == 1, f"hidden, not shown: {record}"
    trial.count(strategy, len(steps))
    return trial


# ---- ranks and workers -------------------------------------------------------------------------------------


def rank_killed(place: Path, seed: int, folder: Path) -> Trial:
    """SIGKILL one of two ranks: the other is out within 10 s, naming it; the restart loses nothing."""
    draw = random.Random(seed)
    victim = draw.randrange(2)
    expected = undisturbed(place, 0, 2)
    run = runs.start(arguments(place, folder), logs=folder / "logs", world_size=2, inject=lighten)
    assert run.wait(120, until=trained(folder)), run.output()
    run.wait(draw.uniform(0.0, 0.4 * expected["seconds"]), until=lambda: False)
    run.send(signal.SIGKILL, [victim])
    begin = run.clock()
    other = 1 - victim
    run.wait(20, until=lambda: other in run.codes)
    seconds = run.clock() - begin
    run.kill()
    trial = Trial(note=f"{seconds:.1f} s")
    if run.codes.get(victim) == -9 and run.codes[other] == 0:  # the last thing that they do together was done
        assert runs.status(folder / "run")["state"] == "finished", run.output()
        trial.count("after the end")
    elif run.codes.get(victim) == -9:
        assert run.codes[other] != -9, f"{run.codes}: {run.output()}"
        assert seconds < 10, f"{seconds:.1f} s: {run.output()}"
        named = re.search(rf"rank {victim} \(pid {run.pids[victim]} .* is dead", run.output(10**6))
        assert named, f"the dead rank is not named: {run.output()}"
        trial.count("killed")
    finish(place, folder, world_size=2)
    assert_equal_to_undisturbed(folder / "run", expected)
    return trial


def rank_stopped(place: Path, seed: int, folder: Path) -> Trial:
    """SIGSTOP one of two ranks: both are out soon after the timeout, with stacks; the restart loses
    nothing.
    """
    draw = random.Random(seed)
    victim = draw.randrange(2)
    expected = undisturbed(place, 0, 2)
    stuck_seconds = 15  # less is a false alarm where other work keeps the cores from a rank for so long
    more = ("--guard.stuck_seconds", str(stuck_seconds))
    run = runs.start(arguments(place, folder, *more), logs=folder / "logs", world_size=2, inject=lighten)
    assert run.wait(120, until=trained(folder)), run.output()
    run.wait(draw.uniform(0.0, 0.2 * expected["seconds"]), until=lambda: False)
    if run.codes:
        return Trial(note="it was faster than we were")
    run.send(signal.SIGSTOP, [victim])
    begin = run.clock()
    run.wait(stuck_seconds + 40, until=lambda: len(run.codes) == 2)
    seconds = run.clock() - begin
    run.kill()
    if run.codes[1 - victim] == 0:  # the last thing that they do together was done
        assert runs.status(folder / "run")["state"] == "finished", run.output()
        return Trial(counts={"after the end": 1})
    assert run.codes[1 - victim] == 71, f"{run.codes}: {run.output()}"
    assert re.search(rf"rank {victim} \(pid {run.pids[victim]} .* is stuck", run.output(10**6)), run.output()
    assert seconds < stuck_seconds + 10, f"{seconds:.1f} s"
    for rank in (0, 1):
        stacks = (folder / "run" / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()
        assert "train_lm.py" in stacks, f"no stack of rank {rank}"
    finish(place, folder, world_size=2)
    assert_equal_to_undisturbed(folder / "run", expected)
    return Trial(counts={"stopped": 1}, note=f"{seconds:.1f} s")


def children(pid: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [int(child) for child in thread.read_text().split()]
    return found


def worker_killed(place: Path, seed: int, folder: Path) -> Trial:
    """SIGKILL a data worker: the run ends with the cause, or goes on; either way nothing is lost or seen
    twice.
    """
    draw, trial = random.Random(seed), Trial()
    expected = undisturbed(place, 2)
    more = ("--data.workers", "2")
    run = runs.start(arguments(place, folder, *more), logs=folder / "logs", inject=lighten)
    assert run.wait(120, until=trained(folder)), run.output()
    run.wait(draw.uniform(0.0, 0.2 * expected["seconds"]), until=lambda: False)
    workers = children(run.pids[0])
    if workers and not run.codes:
        with contextlib.suppress(ProcessLookupError):  # the run was faster than we were
            os.kill(draw.choice(workers), signal.SIGKILL)
            trial.count("killed")
    begin = time.monotonic()
    assert run.wait(120), f"hangs: {run.output()}"
    trial.note = f"exit {run.codes[0]} after {time.monotonic() - begin:.1f} s"
    trial.count(f"exit {run.codes[0]}")
    if run.codes[0] != 0:
        assert "worker" in run.output().lower(), f"no cause: {run.output()}"
    finish(place, folder, *more)
    assert_equal_to_undisturbed(folder / "run", expected)
    return trial


def world_size(place: Path, seed: int, folder: Path) -> Trial:
    """2 processes, killed; 1 process, killed; 2 again: the same positions in every step, losses within
    rounding.
    """
    draw, trial = random.Random(seed), Trial()
    expected = undisturbed(place, 0, 2)
    for size in (2, 1):
        run = runs.start(arguments(place, folder), logs=folder / "logs", world_size=size, inject=lighten)
        begin = last_logged(folder)
        goal = min(begin + draw.randrange(6, 14), STEPS - 2)
        run.wait(90, until=lambda goal=goal: last_logged(folder) >= goal)
        run.kill()
        trial.count("kills", int(-9 in run.codes.values()))
    finish(place, folder, world_size=2)
    found = runs.losses(folder / "run")
    for step, record in expected["losses"].items():
        assert found[step]["position"] == record["position"], f"step {step}: other samples"
        # Two ranks add their gradients in another order than one rank its micro-batches: rounding of fp32
        # only.
        assert abs(found[step]["loss"] - record["loss"]) < 1e-4, f"step {step}: {found[step]} / {record}"
    return trial


CANARIES = {
    "HF_TOKEN": "hf_cAnArYcAnArYcAnArY0001",
    "WANDB_API_KEY": "cAnArY0002cAnArY0002cAnArY0002cAnArY0002",
    "AWS_SECRET_ACCESS_KEY": "cAnArY0003/cAnArY0003",
    "MY_SERVICE_TOKEN": "cAnArY-0004-cAnArY-0004",
    "DB_PASSWORD": "cAnArY0005cAnArY",
    "OPENAI_API_KEY": "sk-cAnArY0006cAnArY0006",
}


def secrets(place: Path, seed: int, folder: Path) -> Trial:
    """Secrets in the environment, and one that a user has put into a name: in no file of the run."""
    canary = random.Random(seed).choice(sorted(CANARIES.values()))
    more = (
        "--report.name",
        f"with-{canary}",
        "--report.tags",
        f"[{canary}]",
        "--report.trackers",
        "[tensorboard]",
    )
    # With the export and the report, which are left out elsewhere.
    run = runs.start(arguments(place, folder, *more), logs=folder / "logs", environment=CANARIES)
    assert run.wait(240), run.output()
    assert run.codes == {0: 0}, run.output()
    trial = Trial()
    for path in sorted((folder / "run").rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            trial.count("files searched")
            for name, value in CANARIES.items():
                assert value.encode() not in content, f"{name} is in {path.relative_to(folder)}"
    return trial


def strategies(place: Path, seed: int, folder: Path) -> Trial:
    """Every strategy in turn: the NaNs; then SIGKILL of all ranks, a restart, and the weights of the
    undisturbed run.
    """
    names = list(STRATEGIES)
    strategy = names[seed % len(names)]
    trial = not_finite(place, seed, folder / "nan", (strategy,))
    size, environment, more = STRATEGIES[strategy]
    more = tuple(str(runs.ROOT / word) if word.startswith("ds_configs") else word for word in more)
    draw = random.Random(seed)
    for name in ("expected", "hurt"):
        goal = draw.randrange(8, STEPS - 5)
        for attempt in ("killed", "to the end"):
            if (name, attempt) == ("expected", "killed"):
                continue
            run = runs.start(
                arguments(place, folder / name, *more),
                logs=folder / name / "logs",
                world_size=size,
                inject=prepared(strategy),
                environment=environment,
            )
            if attempt == "killed":
                run.wait(120, until=lambda goal=goal: last_logged(folder / "hurt") >= goal)
                run.kill()
                trial.count("kills", int(-9 in run.codes.values()))
            else:
                assert run.wait(240), f"{strategy}: {run.output()}"
                assert set(run.codes.values()) == {0}, f"{strategy}: {run.codes}: {run.output()}"
    assert_equal_to_undisturbed(folder / "hurt" / "run", runs.outcome(folder / "expected" / "run"))
    return trial


# ---- damage ------------------------------------------------------------------------------------------------


def damage(place: Path, seed: int, folder: Path, repeats: int = 100) -> Trial:
    """A hundred flips, truncations, zeroed pages, deleted and added files: every one is found, the older is
    taken.
    """
    from lmcore.checkpoint.writer import find
    from tests.support.disk_faults import damage as hurt

    draw, trial = random.Random(seed), Trial()
    good = undisturbed(place)["run"] / "checkpoints"
    older, newest = (good / f"step-{step:08d}" for step in (STEPS - SAVE_EVERY, STEPS))
    folder.mkdir(parents=True)
    os.symlink(older, folder / "older")
    for _ in range(repeats):
        shutil.copytree(older, folder / older.name)
        shutil.copytree(newest, folder / newest.name)
        how = hurt(folder / newest.name, draw)
        heard: list[str] = []
        found = find(folder, note=heard.append)
        assert found is not None, how
        assert found.step == STEPS - SAVE_EVERY, f"{how} was not found"
        assert len(heard) == 1, (how, heard)
        found.close()
        for path in folder.glob("step-*"):
            shutil.rmtree(path)
        trial.count("damages")
    return trial


Kind = Callable[[Path, int, Path], Trial]
KINDS: dict[str, Kind] = {
    "kill": kill,
    "signal": signals,
    "full": full,
    "nan": not_finite,
    "rank-killed": rank_killed,
    "rank-stopped": rank_stopped,
    "worker-killed": worker_killed,
    "world-size": world_size,
    "damage": damage,
    "secrets": secrets,
    "strategies": strategies,
}
