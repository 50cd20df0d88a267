"""``plan`` as a user asks it: of weights from elsewhere, of own code, with two real steps; and beside the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lmcore.cli.main import main
from lmcore.cli.plan import plan_rows
from lmcore.config.parse import parse
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import EXIT_FINISHED, EXIT_REQUEST, RequestError
from lmcore.model.build import build_model
from lmcore.plan import plan, probe
from lmcore.report.metrics import read_metrics
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import request, train, words

SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}
SIZES = [
    "--train.duration",
    "10 steps",
    "--train.global_batch_blocks",
    "8",
    "--train.micro_batch_blocks",
    "4",
]


def planned(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, str]:
    assert main(["plan", "--debug", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:22].strip(): line[22:].strip() for line in lines}


def count_of(rows: dict[str, str]) -> int:
    return int(rows["parameters"].split()[0].replace(",", ""))


def test_pretrained_model_is_planned_from_its_config_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # What is free here changes all the time
    monkeypatch.setattr("lmcore.process.available_bytes", lambda: 2**34)
    free = SimpleNamespace(total=2**40, used=0, free=2**39)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    Path("base.yaml").write_text("run_dir: runs/x\n")  # so that the demo's sizes do not stand in
    made = train_tokenizer([words(200, 0)], vocab_size=300, folder="weights")
    base = ["--config", "base.yaml", *SIZES]
    model: Any = build_model(
        type="gpt2", config_overrides=SHAPE, vocab_size=made.vocab_size, block_size=64, seed=0
    )
    model.config.save_pretrained("weights")  # and no weights
    scratch = [part for name, value in SHAPE.items() for part in (f"--model.config.{name}", value)]
    rows = planned(capsys, *base, *scratch, "--tokenizer.path", "weights")
    found = planned(capsys, *base, "--model.type", "null", "--model.from_pretrained", "weights")
    assert found == rows
    assert count_of(found) == sum(p.numel() for p in model.parameters())
    assert "x 64 (processes" in found["global batch"], "the block is the context that the weights have"


class Bare(nn.Module):
    """Takes text; its layers can be made without numbers."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(input_ids)))


def bare(vocab_size: int, width: int = 16) -> nn.Module:
    return Bare(vocab_size, width)


def curious(vocab_size: int) -> nn.Module:
    """Asks for numbers while it is made."""
    made = Bare(vocab_size, 16)
    assert float(made.head.weight.abs().max()) > 0
    return made


class Branching(Bare):
    """Asks for numbers while it runs."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * (2.0 if int(input_ids.sum()) > 1_000 else 1.0)


def branching(vocab_size: int) -> nn.Module:
    return Branching(vocab_size, 16)


def own(name: str) -> list[str]:
    return ["--model.type", "null", "--model.factory", f"tests.cli.test_plan_command:{name}", "--tokenizer.vocab_size", "500",
            "--data.block_size", "64", *SIZES]  # fmt: skip


def test_own_model_is_planned_on_meta_or_built(capsys: Any, tmp_path: Path) -> None:
    home = ["--run_dir", str(tmp_path)]
    rows = planned(capsys, *own("bare"), "--model.config.width", 32, *home)
    assert count_of(rows) == 2 * 500 * 32
    assert "activations" in rows["memory per device"]
    assert "counted" in rows["FLOPs per token"]
    built = planned(capsys, *own("curious"), *home)
    assert count_of(built) == 2 * 500 * 16
    part = planned(capsys, *own("branching"), *home)
    assert re.search(r"at least .* could not be counted \(.*DataDependent", part["memory per device"])
    assert "not counted" in part["FLOPs per token"]
    judged = planned(capsys, *own("branching"), *home, "--device_gib", 10)
    assert judged["verdict"].startswith("not known")
    assert planned(capsys, *own("branching"), *home, "--device_gib", "1e-5")["verdict"].startswith(
        "does not fit"
    )


def test_cpu_plan_compares_with_the_available_memory(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcore import process

    home = [*own("bare"), "--run_dir", str(tmp_path)]
    monkeypatch.setattr(process, "available_bytes", lambda: 2**34)
    assert planned(capsys, *home)["verdict"].startswith("fits into 16 GiB")
    assert planned(capsys, *home, "--processes", 2)["verdict"].startswith("fits into 8 GiB"), "each its share"
    monkeypatch.setattr(process, "available_bytes", lambda: 2**17)
    short = planned(capsys, *home)
    assert short["verdict"].startswith("does not fit into 128 KiB")
    assert short.keys() & {"it would fit with", "least memory by"}
    monkeypatch.setattr(process, "available_bytes", lambda: None)
    assert "verdict" not in planned(capsys, *home)


def test_own_dataset_is_planned_with_its_shapes(capsys: Any, tmp_path: Path) -> None:
    rows = planned(
        capsys, "--config", "examples/number_sequences/unseen_pairs.yaml", "--run_dir", tmp_path,
    )  # fmt: skip
    assert "activations" in rows["memory per device"]
    assert "could not" not in rows["memory per device"]
    assert "epochs" in rows["budget"]


def test_ema_counts_one_more_copy_of_the_weights(capsys: Any, tmp_path: Path) -> None:
    def mebibytes(*options: str) -> tuple[float, float]:
        rows = planned(capsys, *SMALL, "--optim.name", "adamw", "--run_dir", tmp_path, *options)
        number, unit = rows["memory per device"].partition("optimizer ")[2].split()[:2]
        kept, unit_kept = rows["checkpoints"].split()[:2]
        scale = {"KiB": 1 / 1024, "MiB": 1.0}
        return float(number) * scale[unit], float(kept) * scale[unit_kept]

    (without, small), (having, large) = mebibytes(), mebibytes("--optim.ema_decay", "0.9")
    assert having == pytest.approx(1.5 * without, rel=0.01), (
        "8 bytes a parameter of moments, 4 of the average"
    )
    assert large == pytest.approx(small * 16 / 12, rel=0.01)


def test_strategy_of_the_launcher_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcore.config import parse
    from lmcore.run.planning import setting_of

    def setting(*words: str, **options: Any) -> plan.Setting:
        return setting_of(parse.parse(list(words)), precision="bf16", **{"world_size": 2, **options})

    assert setting().strategy == "ddp"
    assert setting(world_size=1).strategy == "single"
    zero = setting("--engine.deepspeed", "ds_configs/zero3_offload.json")
    assert (zero.strategy, zero.zero_bucket, zero.offload_optimizer) == ("zero3", 50_000_000, True)
    assert not setting("--engine.deepspeed", "ds_configs/zero2.json").offload_optimizer
    assert setting("--engine.deepspeed", "ds_configs/zero2.json", strategy="fsdp2").strategy == "fsdp2"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert setting().strategy == "fsdp2"


SMALL = ["--model.type", "gpt2", *(p for name, value in SHAPE.items() for p in (f"--model.config.{name}", str(value))),
         "--tokenizer.vocab_size", "500", "--data.block_size", "64", *SIZES]  # fmt: skip


def _probe(argv: list[str]) -> str:
    """In a process of its own, since it joins a process group."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(argv) == 0
    return said.getvalue()


def test_probe_trains_two_steps_and_prints_its_assumptions(tmp_path: Path) -> None:
    argv = [
        "plan",
        "--probe",
        *SMALL,
        "--train.precision",
        "fp32",
        "--run_dir",
        str(tmp_path / "run"),
        "--debug",
    ]
    (said,) = run_ranks(_probe, 1, argv)
    assert "2 steps of 2 micro-batches on 1 x CPU, single, fp32" in said
    spoken = re.search(r" at ([\d,]+) tokens/s", said)
    assert spoken
    rate = float(spoken[1].replace(",", ""))
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert kept["tokens_per_second"] == pytest.approx(rate, abs=1)
    row = re.search(r"memory of the probe .*", said)
    assert row
    assert "of the" in row[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"], "and leaves nothing else"
    (said,) = run_ranks(_probe, 1, [*argv, "--processes", "2", "--train.micro_batch_blocks", "2"])
    assert "2 devices are 2 times as fast" in said


def test_probe_under_ddp_measures_both_processes(tmp_path: Path) -> None:
    argv = ["plan", "--probe", *SMALL, "--run_dir", str(tmp_path), "--debug"]
    first, second = run_ranks(_probe, 2, argv)
    assert "2 steps of 1 micro-batches on 2 x CPU, ddp" in first
    assert second == "", "one speaks"


def test_probe_extrapolates_gradient_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 micro-batches 4 are run: forward and backward count 16 times, the update once."""
    calls: list[str] = []

    class Engine:
        device, world_size = torch.device("cpu"), 1

        def prepare(self, module: nn.Module, make_optimizer: Any, **options: Any) -> None:
            calls.append(f"accumulation {options['gradient_accumulation']}")

        def forward(self, batch: Any, key: int) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append("forward")
            return torch.zeros(()), torch.zeros(())

        def backward(self, loss_sum: torch.Tensor, count: int) -> None:
            assert count == 4 * 6

        def update(self) -> None:
            calls.append("update")

        def gather_object(self, value: Any) -> list[Any]:
            return [value]

    clock = iter([0.0, 9.0, 9.5, 100.0, 108.0, 111.0])
    monkeypatch.setattr(probe, "_now", lambda device: next(clock))
    found = probe.probe(
        Engine(),
        lambda: nn.Linear(1, 1),
        lambda module, named: torch.optim.SGD([p for _, p in named], lr=0.1),
        lambda module: {"labels": torch.ones(2, 3, dtype=torch.int64)},
        accumulation=64,
        micro_batch_blocks=2,
        clip_norm=1.0,
    )
    assert calls == ["accumulation 4", *(["forward"] * 4 + ["update"]) * 2]
    assert (found.step_seconds, found.first_seconds, found.micro_batches) == (8.0 / 4 * 64 + 3.0, 9.5, 4)


def test_report_compares_plan_and_measurement(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(words(300, 0), encoding="utf-8")
    (tmp_path / "held.txt").write_text(words(40, 1), encoding="utf-8")
    run_dir = tmp_path / "run"
    argv = request(tmp_path, run_dir, train__duration="4 steps", checkpoint__every="never")
    run_ranks(_probe, 1, ["plan", "--probe", *argv])
    assert train(argv) == [EXIT_FINISHED]
    (start,) = [r for r in read_metrics(run_dir / "metrics.jsonl", kind="event") if r["event"] == "start"]
    kept = json.loads((run_dir / "plan.json").read_text())
    assert start["plan"]["tokens_per_second"] == kept["tokens_per_second"]
    assert start["plan"]["steps"] == 4
    assert start["plan"]["seconds"] == pytest.approx(4 * 12 * 16 / kept["tokens_per_second"])
    for row in ("memory per device", "tokens per parameter", "FLOPs per token", "checkpoints", "time"):
        assert row in start["rows"], row
    steps = read_metrics(run_dir / "metrics.jsonl", kind="train")
    assert all(0 < step["tensor_bytes"] < step["memory_bytes"] for step in steps)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    table = page[page.index("Plan and measurement") :]
    table = table[: table.index("</table>")]
    rows = {row[0]: row[1:] for row in (re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", one) for one in table.split("<tr>"))
            if row}  # fmt: skip
    assert rows["steps"] == ["4", "4", "1.00"]
    for name in ("memory of a device", "tokens/s", "time in steps"):
        planned, measured, ratio = rows[name]
        assert "-" not in (planned, measured), rows
        # Two digits: 0.00 where the machine stood still in one of the two.
        assert re.fullmatch(r"\d+\.\d\d", ratio), rows
    assert float(rows["memory of a device"][2]) > 0


@pytest.mark.parametrize("processes", ["0", "1.5"])
def test_invalid_number_of_processes_is_refused(processes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--processes", processes]) == EXIT_REQUEST
    assert f"--processes must be a whole number of at least 1 (got {processes})" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x", "1e400", ""])
@pytest.mark.parametrize("option", ["--device_gib", "--tokens_per_second", "--processes"])
def test_numbers_of_the_plan_must_be_finite(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--train.duration", "5 steps", option, value]) == EXIT_REQUEST
    assert f"{option} must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--model.config.n_head 3 --model.config.n_embd 32",
            "model.config.n_embd must be a multiple of model.config.n_head 3 (got 32); try 30 or 33",
        ),
        ("--model.config.activation_function foo", "GPT2LMHeadModel refuses this configuration: 'foo'"),
        ("--model.config.n_layer -1", "model.config.n_layer -1 must be at least 1"),
        ("--model.config.n_embd 0", "model.config.n_embd 0 must be at least 1"),
    ],
)
def test_invalid_model_config_is_refused_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model.type", "gpt2", *words.split()]) == EXIT_REQUEST
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lmcore: {said}")


def test_growing_batch_is_planned() -> None:
    words = [
        "--data.train",
        "x",
        "--data.block_size",
        "16",
        "--model.config.n_layer",
        "1",
        "--model.config.n_embd",
        "32",
    ]
    words += ["--model.config.n_head", "2", "--train.duration", "10 steps", "--tokenizer.vocab_size", "300"]
    config = parse([*words, "--train.global_batch_blocks", "0: 4, 5 steps: 8"], default_recipe=None)
    rows = dict(plan_rows(config, {"processes": "2"}, open_data=lambda: None))
    assert rows["global batch"] == "4 blocks of 16 tokens at first"
    assert rows["batch changes"] == "from step 6 (position 20) 8 blocks = 2 x 1 x 4"
    assert rows["budget"] == "10 steps = 960 tokens"


def tiny(*words: str) -> Any:
    sizes = "--data.block_size 16 --model.config.n_layer 1 --model.config.n_embd 32 --model.config.n_head 2"
    argv = ["--data.train", "x", *sizes.split(), "--tokenizer.vocab_size", "300", *words]
    return parse(argv, default_recipe=None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--optim.warmup|1e6 tokens|--train.duration|10 steps",
            "optim.warmup of .* do not fit into a run of",
        ),
        (
            "--optim.schedule|0: 0, 50: 1, 100%: 0|--train.duration|40 steps",
            "100% comes no later than 50 steps",
        ),
        ("--optim.momentum|0: 0.5, 50: 0.9, 100%: 0.8|--train.duration|40 steps", "100% comes no later"),
    ],
)
def test_schedule_that_does_not_fit_is_not_planned(words: str, said: str) -> None:
    config = tiny(*words.split("|"), "--optim.name", "sgd", "--train.global_batch_blocks", "4")
    with pytest.raises(RequestError, match=said):
        plan_rows(config, {}, open_data=lambda: None)


@pytest.mark.parametrize(
    ("words", "strategy", "said"),
    [
        ("--optim.name muon", "zero2", "does not work under ZeRO"),
        ("--optim.name adafactor", "zero3", "does not work under ZeRO"),
        ("--optim.name adafactor", "fsdp2", "fails on sharded tensors"),
        ("--train.param_dtype bf16 --train.precision bf16", "fsdp2", "has no meaning under fsdp2"),
    ],
)
def test_strategy_that_the_run_would_refuse_is_not_planned(words: str, strategy: str, said: str) -> None:
    config = tiny(*words.split(), "--train.duration", "10 steps", "--train.global_batch_blocks", "4")
    with pytest.raises(RequestError, match=said):
        plan_rows(config, {"processes": "2", "strategy": strategy}, open_data=lambda: None)


def test_option_of_its_own_is_not_taken_from_the_optimizers_keywords() -> None:
    config = tiny(
        "--optim.config.lr", "1", "--train.duration", "10 steps", "--train.global_batch_blocks", "4"
    )
    with pytest.raises(RequestError, match=r"optim\.config\.lr is an option of its own: use --optim\.lr"):
        plan_rows(config, {}, open_data=lambda: None)


@pytest.mark.parametrize("name", ["muon", "adafactor", "adamw"])
def test_advice_is_what_the_run_accepts(name: str) -> None:
    config = tiny("--optim.name", name, "--train.duration", "10 steps", "--train.global_batch_blocks", "4")
    rows = dict(plan_rows(config, {"processes": "2", "device_gib": "0.00001"}, open_data=lambda: None))
    said = " ".join(rows.values())
    assert ("zero" in said) == (name == "adamw"), said


def test_tokenize_counts_the_epochs_of_a_run_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was ignored without a word unless the duration was in epochs, which it never is without a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(words(400, 0), encoding="utf-8")
    asked = ["--data.train", "a.txt", "--data.valid_fraction", "0", *SMALL, "--tokenizer.vocab_size", "300"]
    assert "epochs" not in planned(capsys, *asked)["budget"]
    assert planned(capsys, "--tokenize", *asked)["budget"].endswith(" epochs")
