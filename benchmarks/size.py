"""How near the choice of lmcore size comes to the best of a grid, and how often the loss lies in its interval.

    python benchmarks/size.py grid                 # sizes x rates x batches x seeds; stored one by one, so that it can be stopped
    python benchmarks/size.py ladder               # the ladder of the same budgets, and the runs that it chooses
    python benchmarks/size.py report               # regret, error, coverage, transfer of the rate

A budget is seconds of training at speeds that are measured once for each size and kept with the results: the tokens of a run are
``budget x speed``, so that neighbours on the machine change nothing and a grid can be computed in pieces. (FLOPs are no such
measure: a step of a tiny model costs far more time than its arithmetic.) Every run is train_lm.py with the recipe that lmcore
size would write. Results: ``results/size.json``, one record a run, with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table

from lmcore.config import yaml
from lmcore.config.parse import parse
from lmcore.config.schema import plain
from lmcore.plan import scaling
from lmcore.run import ladder, setup
from lmcore.run.size_search import SHARE, START_RATES, choose, design_for, family

ROOT = Path(__file__).resolve().parent.parent
SPEED_STEPS, SPEED_BLOCKS = 60, 8
"""Of the run that measures the speed of a size."""


class Case:
    """A text with its tokenizer, and the models of the family."""

    def __init__(self, asked: argparse.Namespace, results: dict[str, Any]) -> None:
        self.asked = asked
        words = ["--data.train", asked.train, "--data.valid_fraction", "0.03", "--data.block_size", str(asked.block_size),
                 "--tokenizer.vocab_size", str(asked.vocab_size), "--optim.name", "muon", "--train.precision", "fp32",
                 "--data.store_dir", str(asked.work / "stores")]  # fmt: skip
        self.config = parse(words, default_recipe=None)
        self.config = replace(self.config, model=replace(self.config.model, preset="modern"))
        home = asked.work / asked.name / "tokenizer"
        data = setup.open_data(self.config, home)
        self.home, self.unique_tokens = home, data.train.epoch_blocks * data.block_size
        assert data.encoder is not None
        self.members = family(
            self.config, vocab_size=data.encoder.vocab_size, block_size=asked.block_size,
            widths=ladder.WIDTHS[: ladder.WIDTHS.index(asked.widest) + 1],
        )  # fmt: skip
        self.speeds = {name: self._speed(name, results) for name in self.members}

    def _speed(self, member: str, results: dict[str, Any]) -> float:
        """Tokens a second of a size: from the results, or measured and kept."""
        name = f"speed-{self.asked.name}-{member}"
        if name not in results:
            with tempfile.TemporaryDirectory() as folder:
                values = self.base(member, 1) | {
                    "run_dir": str(Path(folder) / "run"), "optim": {"name": "muon", "lr": START_RATES["muon"]},
                    "train": {"precision": "fp32", "duration": f"{SPEED_STEPS} steps", "global_batch_blocks": SPEED_BLOCKS},
                    "report": {"every": f"{SPEED_STEPS // 10} steps", "trackers": []},
                    "checkpoint": {"every": "never"},
                }  # fmt: skip
                values["evaluate"] |= {"every": "never", "prompts": []}
                speed = train(values, Path(folder)).tokens_per_second
            assert speed is not None
            results[name] = {
                "tokens_per_second": speed,
                "parameters": self.members[member].parameters,
                "machine": machine(),
            }
            keep(results, self.asked.out)
            print(f"{name}: {speed:,.0f} tokens/s", flush=True)
        return float(results[name]["tokens_per_second"])

    def base(self, member: str, seed: int) -> dict[str, Any]:
        """The options that all runs of a size share."""
        values = ladder.changed(self.config)
        values.pop("run_dir", None)
        values |= {
            "seed": seed, "tokenizer": {"path": str(self.home)}, "evaluate": {"blocks": self.asked.eval_blocks},
            "model": ladder.with_member(self.config, self.members[member].width, block_size=self.asked.block_size),
        }  # fmt: skip
        return values

    def steps(self, member: str, budget: float, blocks: int) -> int:
        """Of a run that spends the budget."""
        tokens = budget * self.speeds[member]
        return max(10, int(tokens / blocks / self.asked.block_size) // 10 * 10)


def keep(results: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def train(values: dict[str, Any], folder: Path) -> ladder.Result:
    """Run it; its last validation loss, infinite where it diverged, and its speed."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.dump(plain(values)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train_lm.py"), "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 70):
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    result = ladder.read_result(Path(values["run_dir"]))
    assert result.loss is not None
    return result


def one_run(
    case: Case,
    results: dict[str, Any],
    member: str,
    rate: float,
    blocks: int,
    steps: int,
    seed: int,
    first: int = 0,
) -> float:
    """The loss of a WSD run from its start: from the results, or trained and kept.

    Args:
        first: steps of the run whose warm-ups it has, as a ladder's longer runs have those of the shortest; 0: its own.
    """
    length = f"{steps}-of{first}" if first else f"{steps}"
    name = f"{case.asked.name}-{member}-b{blocks}-lr{rate:.4g}-{length}-s{seed}"
    if name not in results:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            design = ladder.Design(members=(member,), steps=(first or steps,), rate=rate, batch_blocks=blocks,
                                   block_size=case.asked.block_size)  # fmt: skip
            rung = ladder.Rung(member=member, rate=rate, batch_blocks=blocks, steps=steps)
            values = ladder.rung_values(case.base(member, seed), design, rung, folder)
            values["checkpoint"]["every"] = "never"
            loss = train(values, folder).loss
        assert loss is not None
        results[name] = {
            "corpus": case.asked.name, "member": member, "parameters": case.members[member].parameters, "rate": rate,
            "blocks": blocks, "steps": steps, "tokens": steps * blocks * case.asked.block_size, "seed": seed,
            "flops": steps * blocks * case.asked.block_size * case.members[member].flops_per_token,
            "loss": loss if math.isfinite(loss) else None, "machine": machine(),
        }  # fmt: skip
        keep(results, case.asked.out)
        print(f"{name}: {loss:.4f}", flush=True)
    loss = results[name]["loss"]
    return math.inf if loss is None else float(loss)


def grid(case: Case, results: dict[str, Any]) -> None:
    """Every size, rate and batch for every budget and seed; the cheapest budget first."""
    for budget in sorted(case.asked.budgets):
        for seed in range(1, case.asked.seeds + 1):
            for member in case.members:
                for blocks in case.asked.batches:
                    for rate in case.asked.rates:
                        one_run(case, results, member, rate, blocks, case.steps(member, budget, blocks), seed)


def climb(case: Case, results: dict[str, Any]) -> None:
    """For every budget the ladder of a tenth of it, its choice, and the run that was chosen."""
    for budget in sorted(case.asked.budgets):
        ladder.STARTUP_SECONDS = 0.0  # it is no part of these budgets
        design = design_for(
            case.members, case.speeds, seconds=budget, spent_seconds=0.0, unique_tokens=case.unique_tokens,
            rate=START_RATES["muon"], block_size=case.asked.block_size,
        )  # fmt: skip
        losses: dict[str, float] = {}
        while waiting := ladder.due(design, losses):
            # Each from its start: the same digits as resuming its parent, and a result that stands alone.
            for rung in waiting:
                blocks, steps, first = rung.batch_blocks, rung.steps, design.first_steps(rung)
                losses[rung.name] = one_run(
                    case, results, rung.member, rung.rate, blocks, steps, 1, first if first < steps else 0
                )
        fitted = scaling.fit(ladder.points(design, case.members, losses), case.unique_tokens)
        seconds = budget * (1 - SHARE)
        chosen = choose(design, case.members, losses, fitted, speed=case.speeds, seconds=seconds)
        member, rate, blocks, steps = chosen.member.name, chosen.rate, chosen.batch_blocks, chosen.steps
        reached = [
            one_run(case, results, member, rate, blocks, steps, seed)
            for seed in range(1, case.asked.seeds + 1)
        ]
        results[f"choice-{case.asked.name}-{budget:g}"] = {
            "corpus": case.asked.name, "budget": budget, "member": member, "rate": rate, "blocks": blocks,
            "steps": steps, "fit": asdict(fitted.law), "expected": asdict(chosen.choice.expected), "reached": reached,
            "machine": machine(),
        }  # fmt: skip
        keep(results, case.asked.out)


def report(results: dict[str, Any]) -> str:
    """Of every choice: regret against the best of its grid (mean over seeds), error of the expectation, coverage."""
    header = "corpus", "seconds", "chosen", "loss", "against the grid's best", "expected", "in the interval"
    rows = []
    for name, choice in results.items():
        if not name.startswith("choice-"):
            continue
        by_setting: dict[tuple[Any, ...], list[float]] = {}
        for run in results.values():
            if run.get("loss") and run["corpus"] == choice["corpus"]:  # of one that diverged it is null
                speed = results[f"speed-{run['corpus']}-{run['member']}"]["tokens_per_second"]
                # The chosen run has nine tenths of the budget.
                if not 0.85 <= run["tokens"] / speed / choice["budget"] <= 1.05:
                    continue
                setting = (run["member"], run["rate"], run["blocks"], run["steps"])
                by_setting.setdefault(setting, []).append(run["loss"])
        reached = statistics.mean(choice["reached"])
        full = [statistics.mean(v) for v in by_setting.values() if len(v) >= len(choice["reached"])]
        expected = choice["expected"]
        inside = sum(expected["low"] <= loss <= expected["high"] for loss in choice["reached"])
        rows.append(
            (
                choice["corpus"],
                f"{choice['budget']:g}",
                f"{choice['member']}, rate {choice['rate']:g}, {choice['blocks']} blocks",
                f"{reached:.4f}",
                f"{reached / min(full) - 1:+.2%} of {len(full)}" if len(full) > 1 else "-",
                f"{expected['middle'] / reached - 1:+.2%}",
                f"{inside} of {len(choice['reached'])}",
            )
        )
    return table(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("grid", "ladder", "report"))
    parser.add_argument("--train", default="stdlib")
    parser.add_argument("--name", default="python", help="of the corpus, in the results")
    parser.add_argument("--budgets", type=float, nargs="+", default=[600, 1800])
    parser.add_argument("--widest", type=int, default=128, choices=ladder.WIDTHS)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0025, 0.005, 0.01, 0.02, 0.04])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=1_000)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--eval_blocks", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmark-size")
    parser.add_argument("--out", type=Path, default=RESULTS / "size.json")
    asked = parser.parse_args()
    asked.work = asked.work.resolve()
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if asked.what != "report":
        (grid if asked.what == "grid" else climb)(Case(asked, results), results)
    print(report(results))


if __name__ == "__main__":
    main()
