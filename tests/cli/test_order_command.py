"""``lmcore order`` shows what the run has read, for every kind of data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcore.cli.main import main
from lmcore.errors import EXIT_FINISHED, EXIT_REQUEST
from lmcore.report.metrics import read_metrics
from lmcore.saved.load import load_model
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import request, train_in_rank, words

SHORT = {"evaluate__every": "never", "checkpoint__every": "4 steps"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(600, 0), encoding="utf-8")
    (folder / "held.txt").write_text(words(30, 1), encoding="utf-8")
    return folder


def _train_and_tell(argv: list[str], out: str) -> int:
    """As ``train_in_rank``; the blocks of each step are written down as the model has seen them."""
    from lmcore.run.trainer import Run

    record = Run.record

    def written(self: Any, batch: Any, **numbers: Any) -> None:
        record(self, batch, **numbers)
        blocks = [row.tolist() for micro_batch in batch.micro_batches for row in micro_batch["input_ids"]]
        with open(out, "a") as file:
            file.write(json.dumps([self.state.step, blocks]) + "\n")

    Run.record = written
    return train_in_rank(argv, None, 0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="store"),
        pytest.param({"data__skip_positions": "[24-35, 60-71]"}, id="skipped"),
        pytest.param({"data__mode": "stream", "data__shuffle_window": 48}, id="stream"),
        pytest.param({"data__mode": "stream", "data__skip_positions": "24-35"}, id="stream-skipped"),
    ],
)
def test_order_shows_the_blocks_of_a_step_decoded(
    text: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """At the beginning, before and after the checkpoints that are kept, at the end."""
    argv = request(text, tmp_path / "run", **SHORT, **options, data__store_dir=tmp_path / "stores")
    assert run_ranks(_train_and_tell, 1, argv, str(tmp_path / "seen")) == [EXIT_FINISHED]
    seen = dict(json.loads(line) for line in (tmp_path / "seen").read_text().splitlines())
    decode = load_model(tmp_path / "run").tokenizer.decode

    def check(step: int) -> None:
        assert main(["order", str(tmp_path / "run"), "--step", str(step), "--text", "10000"]) == EXIT_FINISHED
        shown = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
        assert sorted(shown) == sorted(repr(decode(ids)) for ids in seen[step])

    for step in (1, 3, 13, 20):
        check(step)
    end = read_metrics(tmp_path / "run" / "metrics.jsonl", kind="train")[-1]["position"]
    beyond = {"--step": ("20", "21"), "--position": (str(end - 1), str(end))}
    for option, (last, next_one) in beyond.items():
        assert main(["order", str(tmp_path / "run"), option, last]) == EXIT_FINISHED
        assert "beyond the run" not in capsys.readouterr().err
        assert main(["order", str(tmp_path / "run"), option, next_one]) == EXIT_FINISHED
        message = " ".join(capsys.readouterr().err.split())
        assert f"{option[2:]} {next_one} is beyond the run, which ends" in message
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as before the first one
    check(13)


def test_order_of_a_finished_epoch_is_that_of_its_steps(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks are no multiple of the batch; and one that went on with another batch."""
    options = {
        "data__store_dir": tmp_path / "stores",
        "train__duration": "1 epochs",
        "evaluate__every": "never",
    }
    argv = request(text, tmp_path / "run", **options)
    assert run_ranks(_train_and_tell, 1, argv, str(tmp_path / "seen")) == [EXIT_FINISHED]
    seen = dict(json.loads(line) for line in (tmp_path / "seen").read_text().splitlines())
    last = max(seen)
    options |= {"train__duration": "2 epochs", "train__global_batch_blocks": 24}
    decode = load_model(tmp_path / "run").tokenizer.decode

    def check(step: int) -> None:
        assert main(["order", str(tmp_path / "run"), "--step", str(step), "--text", "10000"]) == EXIT_FINISHED
        shown = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
        read = {repr(decode(ids)) for ids in seen[step]}
        assert shown
        assert set(shown) <= read  # what fills the last step up is not shown
        assert step in (last, max(seen)) or len(shown) == len(seen[step])

    for step in (1, 2, last - 1, last):
        check(step)
    assert "beyond the run" not in capsys.readouterr().err
    assert main(["order", str(tmp_path / "run"), "--step", str(last + 1)]) == EXIT_FINISHED
    assert f"ends at step {last}" in " ".join(capsys.readouterr().err.split())
    argv = [*request(text, tmp_path / "run", **options), "--allow_changes", "train.global_batch_blocks"]
    assert run_ranks(_train_and_tell, 1, argv, str(tmp_path / "seen")) == [EXIT_FINISHED]
    seen = dict(json.loads(line) for line in (tmp_path / "seen").read_text().splitlines())
    for step in (1, 2, last, last + 1, last + 3, max(seen)):
        check(step)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    check(last + 1)
    assert main(["order", str(tmp_path / "run"), "--step", "2"]) == EXIT_REQUEST
    assert "made with another plan" in capsys.readouterr().err


def test_order_numbers_items_of_an_own_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "run_dir": tmp_path / "own",
        "data.factory": "tests.support.own_parts:data",
        "data.config.count": 64,
        "model.type": "null",
        "model.factory": "tests.support.own_parts:model",
        "model.config.width": 8,
        "loss.factory": "tests.support.own_parts:squares",
        "train.duration": "2 steps",
        "train.global_batch_blocks": 8,
        "train.micro_batch_blocks": 4,
        "train.precision": "fp32",
        "evaluate.every": "never",
        "report.trackers": "[]",
    }
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert run_ranks(train_in_rank, 1, argv, None, 0) == [EXIT_FINISHED]
    assert (
        main(
            [
                "order",
                str(tmp_path / "own"),
                "--position",
                "0-63",
                "--factory",
                "tests.support.own_parts:data",
            ]
        )
        == EXIT_FINISHED
    )
    lines = capsys.readouterr().out.splitlines()
    assert sorted(int(line.split()[3].rstrip(",")) for line in lines) == list(range(64))
    assert all(line.endswith("epoch 0") for line in lines)
    for step in ("0", "9" * 30):
        words = ["order", str(tmp_path / "own"), "--step", step, "--factory", "tests.support.own_parts:data"]
        assert main(words) == EXIT_REQUEST
        assert f"--step must be from 1 to 1,099,511,627,775 (got {step})" in capsys.readouterr().err
