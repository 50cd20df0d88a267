"""Whole runs: raw text in, a trained, resumable, loadable model out. Each run is a forked process (fork_server)."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

from lmcore.data.text.sources import _RUN_FILES, resolve_sources
from lmcore.errors import EXIT_FINISHED, EXIT_REQUEST, EXIT_SAVED, RequestError
from lmcore.report.metrics import read_metrics
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import (
    STEPS,
    assert_same_state,
    losses,
    request,
    train,
    train_in_rank,
    weights,
    words,
    write_texts,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), train=1500, held=60)


@pytest.fixture(scope="module")
def whole(text: Path) -> Path:
    """The run that nothing disturbed."""
    run_dir = text / "whole"
    assert train(request(text, run_dir)) == [EXIT_FINISHED]
    return run_dir


def test_nothing_that_a_run_writes_is_read_as_text(whole: Path, tmp_path: Path) -> None:
    assert {path.name for path in whole.iterdir() if not path.name.startswith(".")} <= _RUN_FILES
    stores = whole.parent / "stores"
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(stores, tmp_path / "stores")
    (tmp_path / "own.txt").write_text("text")
    for entry in (str(tmp_path), f"{tmp_path}/**"):
        assert resolve_sources([entry])[0].relative_paths == ("own.txt",)


def test_run_folder_has_the_documented_files(whole: Path) -> None:
    for name in ("config.yaml", "train.log", "metrics.jsonl", "report.html", "status.json"):
        assert (whole / name).stat().st_size > 0, name
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, STEPS)
    assert {p.name for p in (whole / "checkpoints").glob("step-*")} == {
        "step-00000010",
        "step-00000015",
        "step-00000020",
    }
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    first, last = losses(whole)[1], losses(whole)[STEPS]
    assert last < first - 0.5, "the model does not learn"
    evaluations = read_metrics(whole / "metrics.jsonl", kind="eval")
    assert [record["step"] for record in evaluations] == [10, 20]
    assert all(math.isclose(r["perplexity"], math.exp(r["loss"]), rel_tol=1e-9) for r in evaluations)
    assert all(r["bits_per_byte"] > 0 for r in evaluations)


def test_every_checkpoint_is_one_event(whole: Path) -> None:
    events = read_metrics(whole / "metrics.jsonl", kind="event")
    saves = [(record["step"], record["reason"]) for record in events if record["event"] == "checkpoint"]
    assert saves == [(5, "interval"), (10, "interval"), (15, "interval"), (20, "end")]


def test_export_has_the_trained_logits_in_transformers(whole: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmcore.saved.load import load_model

    exported = AutoModelForCausalLM.from_pretrained(whole / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    trained = load_model(whole)
    ids = tokenizer("alpha 日本語 ですから", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == trained.tokenizer.encode("alpha 日本語 ですから")
    with torch.no_grad():
        ours = trained.model(input_ids=ids).logits[..., : trained.tokenizer.vocab_size]
        # The same weights; only the padding columns of the last product are gone, and with them an order of sums.
        torch.testing.assert_close(exported(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_two_processes_follow_one(text: Path, whole: Path) -> None:
    """Law 9. The same blocks and weights; only sums are made in another order: 1e-5 relative over 20 steps."""
    run_dir = text / "two"
    assert train(request(text, run_dir), 2) == [EXIT_FINISHED] * 2
    one, two = losses(whole), losses(run_dir)
    assert two.keys() == one.keys()
    for step in one:
        assert math.isclose(one[step], two[step], rel_tol=1e-5), step


@pytest.mark.parametrize("kill_with", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_equals_uninterrupted(text: Path, whole: Path, kill_with: int) -> None:
    """Law 13: bit for bit, losses, weights and moments; the kill comes between two checkpoints."""
    run_dir = text / f"killed-{kill_with}"
    if kill_with == signal.SIGTERM:
        assert train(request(text, run_dir), kill_before_step=12) == [EXIT_SAVED]
        assert json.loads((run_dir / "status.json").read_text())["state"] == "saved"
    else:
        from tests.support.fork_server import RankFailure

        with pytest.raises(RankFailure):
            train(request(text, run_dir), kill_before_step=12, kill_with=kill_with)
    assert train(request(text, run_dir)) == [EXIT_FINISHED]
    assert losses(run_dir) == losses(whole)
    assert_same_state(weights(run_dir), weights(whole))


def test_resumed_at_every_step(text: Path) -> None:
    """With dropout on (law 10), stopped after each step in turn, and every continuation in the same run."""
    options = {"train__duration": "6 steps", "evaluate__every": "never", "model__config__resid_pdrop": 0.2}
    straight, stopped = text / "straight", text / "stopped"
    assert train(request(text, straight, **options)) == [EXIT_FINISHED]
    for step in range(5):
        assert train(request(text, stopped, **options), kill_before_step=step) == [EXIT_SAVED]
    assert train(request(text, stopped, **options)) == [EXIT_FINISHED]
    assert losses(stopped) == losses(straight)
    assert_same_state(weights(stopped), weights(straight))


def test_finished_run_started_again_stays_finished(text: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_text().count('"kind": "train"')
    assert train(request(text, whole)) == [EXIT_FINISHED]
    assert (whole / "metrics.jsonl").read_text().count('"kind": "train"') == before


def test_best_checkpoint_is_of_an_evaluated_step(text: Path) -> None:
    """Saves and evaluations have intervals of their own: no checkpoint has the result of another step."""
    run_dir = text / "best"
    best = {"checkpoint__keep_best__k": 1, "checkpoint__keep_best__mode": "max", "checkpoint__keep": 9}
    options = {"train__duration": "10 steps", "evaluate__every": "4 steps", "checkpoint__every": "3 steps"}
    assert train(request(text, run_dir, **best, **options)) == [EXIT_FINISHED]
    told = {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl", kind="eval")}
    assert list(told) == [4, 8, 10]
    rows = {
        path.name: json.loads((path / "manifest.json").read_text())["metrics"].get("loss")
        for path in (run_dir / "checkpoints").glob("step-*")
    }
    assert rows == {f"step-{step:08d}": told.get(step) for step in (3, 4, 6, 8, 9, 10)}
    assert os.readlink(run_dir / "checkpoints" / "best") == f"step-{max(told, key=lambda s: told[s]):08d}"


def test_keep_best_by_training_loss_needs_no_validation_set(text: Path) -> None:
    """And is the same whether the run was killed or not: what was logged last is in the checkpoint."""
    best = {"checkpoint__keep_best__k": 1, "checkpoint__keep_best__metric": "train/loss", "report__every": 3}
    options = {"train__duration": "10 steps", "checkpoint__every": "2 steps", "evaluate__every": "never"}
    found = []
    for name, killed in (("train-best", None), ("train-best-killed", 7)):
        run_dir = text / name
        if killed is not None:
            train(request(text, run_dir, **best, **options), kill_before_step=killed)
        assert train(request(text, run_dir, **best, **options)) == [EXIT_FINISHED]
        records = read_metrics(run_dir / "metrics.jsonl", kind="train")
        for path in (run_dir / "checkpoints").glob("step-*"):
            manifest = json.loads((path / "manifest.json").read_text())
            last = [r for r in records if r["step"] <= manifest["step"]][-1]
            assert manifest["metrics"]["train/loss"] == last["loss"], path
            assert manifest["metrics"]["train/grad_norm"] == last["grad_norm"], path
        found.append(os.readlink(run_dir / "checkpoints" / "best"))
    assert found[0] == found[1]


def test_saved_configuration_repeats_the_run_exactly(text: Path, whole: Path) -> None:
    run_dir = text / "repeated"
    argv = ["--config", str(whole / "config.yaml"), "--run_dir", str(run_dir)]
    assert train(argv) == [EXIT_FINISHED]
    assert losses(run_dir) == losses(whole)


BAD = {
    "no such file": ({"data__train": "nowhere/*.txt"}, "nowhere"),
    "unknown model type": ({"model__type": "gtp2"}, "gpt2"),
    "does not divide": ({"train__micro_batch_blocks": 5, "train__micro_batch_exact": "true"}, "12"),
    "block size beyond the context": ({"data__block_size": 128}, "64"),
    "corpus smaller than a block": (
        {
            "data__train": "{text}/tiny.txt",
            "tokenizer__path": "{text}/whole/tokenizer",
            "tokenizer__vocab_size": "null",
        },
        "block",
    ),
    "empty corpus": ({"data__train": "{text}/empty.txt"}, "source 'empty' (1 file) holds none"),
    "no such metric": ({"checkpoint__keep_best__metric": "help/loss"}, "held/loss"),
    "no such text field": ({"data__train": "{text}/records.jsonl", "data__text_field": "txt"}, "text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_one_line_and_code_2(
    text: Path, whole: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (text / "tiny.txt").write_text("alpha\n", encoding="utf-8")
    (text / "empty.txt").write_text("\n", encoding="utf-8")
    (text / "records.jsonl").write_text('{"text": "alpha beta"}\n' * 50, encoding="utf-8")
    options, word = BAD[case]
    filled = {k: v.format(text=text) if isinstance(v, str) else v for k, v in options.items()}
    codes = run_ranks(_say, 1, request(text, text / f"bad-{case.replace(' ', '-')}", **filled))
    code, message = codes[0]
    assert code == EXIT_REQUEST
    assert word in message
    assert "Traceback" not in message
    assert message.count("\n") == 1


def _say(argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        code = train_in_rank(argv, None, 0)
    return code, out.getvalue()


def test_changed_earlier_phase_raises(text: Path, whole: Path) -> None:
    """Law 6: both values and the override."""
    code, message = run_ranks(_say, 1, request(text, whole, seed=8))[0]
    assert code == EXIT_REQUEST
    assert "seed" in message
    assert "7" in message
    assert "8" in message


def test_refused_tokenizer_changes_nothing(text: Path, whole: Path) -> None:
    """Another one in the place that the run names, and one that is insisted on: the run folder keeps its own."""
    from lmcore.data.tokenizer.tokenizer import load_tokenizer
    from lmcore.data.tokenizer.training import train_tokenizer
    from lmcore.saved.load import load_model

    brought, run_dir = text / "brought", text / "brought-run"
    options = {"tokenizer__path": brought, "tokenizer__vocab_size": "null", "train__duration": "2 steps"}
    load_tokenizer(whole / "tokenizer").save(brought)
    assert train(request(text, run_dir, **options)) == [EXIT_FINISHED]
    before = {path.name: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()}
    other = train_tokenizer([words(300, 5)], vocab_size=390)
    other.save(brought)
    for extra in ({}, {"allow_changes": "tokenizer.path"}, {"allow_changes": "data.train"}):
        code, message = run_ranks(_say, 1, request(text, run_dir, **options, **extra))[0]
        assert code == EXIT_REQUEST, message
        assert {path.name: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()} == before
    other.save(run_dir / "tokenizer")
    with pytest.raises(RequestError, match="is not the tokenizer that the checkpoint was trained with"):
        load_model(run_dir, device="cpu")
