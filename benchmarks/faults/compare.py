"""The same fault, done to ``train_lm.py`` and to the Trainer of transformers, side by side in one run.

    python -m benchmarks.faults.compare --n 20 --out benchmarks/faults/results.json

Faults: SIGKILL inside a save and the same command again; one bit flipped in the newest checkpoint's weights; one NaN
loss; SIGTERM. A tiny GPT-2 on one CPU process. The Trainer runs with its defaults and a save every 5 steps, and is
resumed by ``resume_from_checkpoint=True`` where it has a checkpoint: what its documentation says to do. Both are
forks of a process that has imported the libraries and run nothing (tests/faults/runs.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults import kinds, runs

STEPS, SAVE_EVERY = 40, 5


def trainer(folder: Path, *, nan_at: int | None = None, jit: bool = False, step_seconds: float = 0.0) -> None:
    """One start of the Trainer, in a fork; the losses that it logs go to ``losses.json``.

    ``jit``: with ``enable_jit_checkpoint``. ``step_seconds``: a pause in every step, so that there is time for it.
    """
    import torch
    from torch.utils.data import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    torch.manual_seed(0)
    data = torch.randint(0, 300, (400, 16), generator=torch.Generator().manual_seed(1))

    class Blocks(Dataset[Any]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": data[index], "labels": data[index]}

    calls = 0

    # A hook and not another forward: the Trainer reads forward's signature.
    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal calls
        time.sleep(step_seconds)
        if calls == nan_at:
            output.loss = output.loss * float("nan")
        calls += 1

    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=320, bos_token_id=1, eos_token_id=1
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        enable_jit_checkpoint=jit,
    )
    model = GPT2LMHeadModel(config)
    model.register_forward_hook(poison)
    train = Trainer(model=model, args=arguments, train_dataset=Blocks())
    exists = (folder / "run").is_dir() and get_last_checkpoint(str(folder / "run")) is not None
    train.train(resume_from_checkpoint=True if exists else None)
    finite = all(bool(p.isfinite().all()) for p in train.model.parameters())
    losses = [row["loss"] for row in train.state.log_history if "loss" in row]
    (folder / "losses.json").write_text(json.dumps({"losses": losses, "weights_finite": finite}))


def run_ours(place: Path, folder: Path, inject: Callable[[int], None] = kinds.lighten) -> runs.Run:
    """One start of ``train_lm.py``, to its end."""
    run = runs.start(kinds.arguments(place, folder), logs=folder / "logs", inject=inject)
    run.wait(120)
    return run


def start_trainer(folder: Path, **options: Any) -> runs.Run:
    """Fork one start of the Trainer; it is still running."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            trainer(folder, **options)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # as the interpreter does, with whoever has hung in
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return runs.Run(pids=[pid], outputs=[folder / "out"])


def last_error(folder: Path) -> str:
    """The last line of what it said."""
    line = (folder / "out").read_text(errors="replace").strip().splitlines()[-1]
    return re.sub(r"checkpoint-\d+", "checkpoint-N", re.sub(r"/\S*/run/", "", line))[:160]


def newest(folder: Path) -> Path | None:
    found = sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] if found else None


def kill_in_save(place: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """SIGKILL while a save is on its way; then the same command again."""
    folder.mkdir(parents=True)
    kill = kinds.in_save(draw.randrange(60), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run = run_ours(place, folder / "ours", kill)
    again = run_ours(place, folder / "ours")
    ours = run.codes == {0: -9} and again.codes == {0: 0}

    theirs_folder = folder / "theirs"
    wanted, delay = draw.randrange(1, 7) * SAVE_EVERY, draw.uniform(0.0, 0.02)
    theirs = start_trainer(theirs_folder)
    goal = theirs_folder / "run" / f"checkpoint-{wanted}"
    while not theirs.poll() and not goal.exists():  # its folder appears at the beginning of a save
        time.sleep(0.0005)
    time.sleep(delay)
    theirs.kill()
    complete = (goal / "trainer_state.json").exists()
    result = {"ours": ours, "trainer_killed_in_save": theirs.codes == {0: -9} and not complete}
    again = start_trainer(theirs_folder)
    again.wait(120)
    return result | {
        "trainer": again.codes == {0: 0},
        "trainer_said": "" if again.codes == {0: 0} else last_error(theirs_folder),
    }


def flip_a_bit(place: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """One bit of the weights in the newest of two checkpoints is flipped, and the same command given again."""
    ours_folder = folder / "ours"
    run_ours(place, ours_folder)
    older, step = runs.committed_steps(ours_folder / "run")
    _flip(ours_folder / "run" / "checkpoints" / f"step-{step:08d}" / "model.safetensors", draw)
    again = run_ours(place, ours_folder)
    log = (ours_folder / "run" / "train.log").read_text()
    resumed_from = [event["step"] for event in runs.events(ours_folder / "run", "resume")]

    theirs = start_trainer(folder / "theirs")
    theirs.wait(120)
    last = newest(folder / "theirs")
    assert last is not None
    _flip(last / "model.safetensors", draw)
    resumed = start_trainer(folder / "theirs")
    resumed.wait(120)
    refused = resumed.codes != {0: 0}
    return {
        "ours": again.codes == {0: 0} and "is damaged" in log and resumed_from == [older],
        "trainer": refused,
        "trainer_said": last_error(folder / "theirs") if refused else "nothing: resumed from it",
    }


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    # In the numbers, not the header
    data[draw.randrange(len(data) // 2, len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def one_nan(place: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """One loss is NaN: is the update kept from the weights, and is the NaN shown?"""
    (folder / "evidence").mkdir(parents=True)
    at = draw.randrange(8, 60)
    run = run_ours(place, folder / "ours", kinds.poison({at: 0}, folder / "evidence"))
    skipped = runs.events(folder / "ours" / "run", "skip")
    theirs = start_trainer(folder / "theirs", nan_at=at // 2)
    theirs.wait(120)
    told = json.loads((folder / "theirs" / "losses.json").read_text())
    tail = [round(loss, 3) for loss in told["losses"][at // 2 : at // 2 + 3]]
    return {
        "ours": run.codes == {0: 0} and len(skipped) == 1,
        "trainer": bool(told["weights_finite"]),
        "trainer_said": f"exit {theirs.codes[0]}, losses from the NaN on {tail}",
    }


def sigterm(place: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """SIGTERM in the middle: is there a checkpoint of the step at which it came?"""
    at = draw.randrange(10, 60)
    run = run_ours(place, folder / "ours", kinds.at_forward(at, lambda: signal.raise_signal(signal.SIGTERM)))
    steps = runs.committed_steps(folder / "ours" / "run")
    theirs = start_trainer(folder / "theirs")
    wanted = draw.randrange(1, 6) * SAVE_EVERY
    while not theirs.poll() and not (folder / "theirs" / "run" / f"checkpoint-{wanted}").exists():
        time.sleep(0.001)
    time.sleep(0.03)  # some steps beyond a save
    theirs.send(signal.SIGTERM)
    theirs.wait(120)
    # A save of the Trainer's own schedule is none for the signal.
    last = newest(folder / "theirs")
    saved = last is not None and int(last.name.split("-")[1]) % SAVE_EVERY != 0
    return {
        "ours": run.codes == {0: 75} and steps[-1:] == [runs.status(folder / "ours" / "run")["step"]],
        "trainer_hit": theirs.codes != {0: 0},
        "trainer": saved,
        "trainer_said": f"exit {theirs.codes[0]}",
    }


def sigterm_jit(place: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """SIGTERM, saved, the same command again: are its losses those of the run that nobody hurt?

    The Trainer has ``enable_jit_checkpoint``, which waits 3 s before it asks for a save; its steps take 0.15 s here.
    """
    at = draw.randrange(10, 60)
    run_ours(place, folder / "ours", kinds.at_forward(at, lambda: signal.raise_signal(signal.SIGTERM)))
    run_ours(place, folder / "ours")
    ours = runs.outcome(folder / "ours" / "run")
    expected = kinds.undisturbed(place)

    wanted = draw.randrange(1, 3) * SAVE_EVERY
    theirs = start_trainer(folder / "theirs", jit=True, step_seconds=0.15)
    while not theirs.poll() and not (folder / "theirs" / "run" / f"checkpoint-{wanted}").exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0.05, 0.7))
    begin = time.monotonic()
    theirs.send(signal.SIGTERM)
    theirs.wait(120)
    seconds = time.monotonic() - begin
    last = newest(folder / "theirs")
    step = 0 if last is None else int(last.name.split("-")[1])
    again = start_trainer(folder / "theirs", jit=True)
    again.wait(120)
    found = json.loads((folder / "theirs" / "losses.json").read_text())["losses"]
    undisturbed = json.loads((place / "undisturbed" / "losses.json").read_text())["losses"]
    unequal = [number for number, pair in enumerate(zip(found, undisturbed), 1) if pair[0] != pair[1]]
    if unequal[:1] == [step + 1]:
        difference = "has other losses from its first step on"
    elif unequal:
        difference = f"has other losses from step {unequal[0]} on, saved was {step}"
    else:
        difference = f"has {len(found)} losses, all equal"
    return {
        "ours": all(ours[name] == expected[name] for name in ours),
        "trainer": again.codes == {0: 0} and found == undisturbed,
        "trainer_saved": step < STEPS,
        "trainer_said": f"exit {theirs.codes[0]} {seconds:.0f} s after the signal; the continued run {difference}",
    }


FAULTS: dict[str, Callable[[Path, Path, random.Random], dict[str, Any]]] = {
    "SIGKILL inside a save, the same command again": kill_in_save,
    "a flipped bit in the newest weights is found": flip_a_bit,
    "a NaN loss is kept from the weights": one_nan,
    "SIGTERM saves before it leaves": sigterm,
    "SIGTERM and the same command again is the undisturbed run (Trainer: enable_jit_checkpoint)": sigterm_jit,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.compare")
    parser.add_argument("--only", help="only faults with this word in their name; the others' results stay")
    parser.add_argument("--n", type=int, default=10, help="trials of each fault")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    options = parser.parse_args()
    runs.preload()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="faults-compare-") as temporary:
        place = Path(temporary)
        runs.prepare(place)
        undisturbed = start_trainer(place / "undisturbed")
        undisturbed.wait(120)
        if undisturbed.codes != {0: 0}:
            raise RuntimeError(f"the Trainer does not run undisturbed: {last_error(place / 'undisturbed')}")
        for name, fault in FAULTS.items():
            if options.only and options.only not in name:
                continue
            results = []
            for number in range(options.n):
                folder = place / "trial"
                shutil.rmtree(folder, ignore_errors=True)
                results.append(fault(place, folder, random.Random(number)))
            # Only trials in which the fault met the Trainer as it was meant to are counted against it.
            counted = [r for r in results if r.get("trainer_killed_in_save", r.get("trainer_hit", True))]
            rows[name] = {
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "ours": f"{sum(r['ours'] for r in results)} of {len(results)}",
                "trainer": f"{sum(r['trainer'] for r in counted)} of {len(counted)}",
                "trainer_said": sorted({r["trainer_said"] for r in counted if r["trainer_said"]})[:4],
            }
            print(f"{name}: {json.dumps(rows[name])}", flush=True)
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    known = json.loads(options.out.read_text())["faults"] if options.only and options.out.exists() else {}
    result = {"versions": versions, "faults": known | rows}
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
