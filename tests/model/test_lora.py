"""Low-rank adapters: the weights under them stand still, a resume is exact, the export is a plain model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.config import parse
from lmcore.errors import EXIT_FINISHED, EXIT_SAVED, RequestError
from lmcore.model import lora
from lmcore.model.build import build_model
from lmcore.run import setup
from lmcore.saved import load
from tests.support.whole_runs import assert_same_state, losses, request, train, weights, words

pytest.importorskip("peft")
RANK = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages, and a base that was trained on the first; its vocabulary of 330 is padded to 384."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(words(400, 0), encoding="utf-8")
    (folder / "more.txt").write_text(words(300, 5), encoding="utf-8")
    (folder / "held.txt").write_text(words(40, 1), encoding="utf-8")
    argv = request(folder, folder / "base", train__duration="6 steps", tokenizer__vocab_size=330)
    assert train(argv) == [EXIT_FINISHED]
    return folder


def adapted(text: Path, run_dir: Path, **options: Any) -> list[str]:
    base = text / "base" / "export"
    own = {
        "model__from_pretrained": base, "tokenizer__path": base, "model__lora__rank": RANK, "model__lora__dropout": 0.1,
        "data__train": text / "more.txt", "train__duration": "6 steps", "checkpoint__every": "2 steps",
    }  # fmt: skip
    argv = request(text, run_dir, **own | options)
    for name in ("tokenizer.vocab_size", *(f"model.config.{one}" for one in ("n_layer", "n_head", "n_embd"))):
        place = argv.index(f"--{name}")
        del argv[place : place + 2]
    place = argv.index("--model.config.n_positions")
    del argv[place : place + 2]
    return ["--config", str(text / "plain.yaml"), *argv]


@pytest.fixture(scope="module")
def whole(text: Path) -> Path:
    (text / "plain.yaml").write_text("model: {type: null}\n")  # so that the demo's sizes do not stand in
    assert train(adapted(text, text / "whole")) == [EXIT_FINISHED]
    return text / "whole"


def test_lora_trains_only_the_adapters_and_the_checkpoint_has_all_weights(text: Path, whole: Path) -> None:
    before, after = weights(text / "base"), weights(whole)
    adapters = {name for name in after if name.startswith("model/") and ".lora_" in name}
    assert len(adapters) == 2 * 2, "two layers, A and B"
    assert any(bool(after[name].any()) for name in adapters if ".lora_B." in name), "B began at zero"
    for name, tensor in after.items():
        if name.startswith("model/") and name not in adapters:
            plain = before[name.replace(".base_layer", "")]
            # The export has no padding; it is zero afterwards
            real = slice(0, 330 if len(plain) == 384 else None)
            assert torch.equal(tensor[real], plain[real]), name
    moved = {name for name in after if name.startswith("optim/")}
    assert moved
    assert all(".lora_" in str(name) for name in moved), "moments of the adapters alone"


def test_lora_export_is_a_plain_model_with_the_same_logits(whole: Path) -> None:
    trained = load.load_model(whole, device="cpu")
    plain: Any = load.open_export(whole / "export").eval()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert plain.config.vocab_size == 330
    ids = torch.arange(330).reshape(-1, 30)
    with torch.no_grad():
        expected = trained.model(input_ids=ids).logits[..., :330]
        found = plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    base: Any = load.open_export(whole.parent / "base" / "export").eval()
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=ids).logits, found, atol=1e-4), "the adapters did something"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
def test_peft_applies_the_exported_adapter_to_the_base_model(whole: Path) -> None:
    from peft import PeftModel

    base: Any = load.open_export(whole.parent / "base" / "export")
    adapted_model = PeftModel.from_pretrained(base, str(whole / "export" / "adapter")).eval()
    merged: Any = load.open_export(whole / "export").eval()
    ids = torch.arange(330).reshape(-1, 30)
    with torch.no_grad():
        torch.testing.assert_close(
            adapted_model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_start_table_and_card_say_what_is_trained(whole: Path) -> None:
    method = "LoRA rank 4, alpha 8, dropout 0.1 in c_attn"
    assert f"1,024 trained ({method})" in (whole / "train.log").read_text()
    card = (whole / "export" / "README.md").read_text()
    assert f"- method: {method}; 1,024 parameters trained, the others frozen" in card
    assert "continued from `base/export`" in card
    assert str(whole.parent) not in card
    log = (whole / "train.log").read_text()
    assert "py.warnings" not in log, "the export asks no one for the base model"


def test_lora_resume_is_bit_exact(text: Path, whole: Path) -> None:
    stopped = text / "stopped"
    assert train(adapted(text, stopped), kill_before_step=3) == [EXIT_SAVED]
    assert train(adapted(text, stopped)) == [EXIT_FINISHED]
    assert losses(stopped) == losses(whole)
    assert_same_state(weights(stopped), weights(whole))


@pytest.mark.slow
def test_lora_ddp_trains_the_same_adapters(text: Path, whole: Path) -> None:
    options = {"model__lora__dropout": 0.0, "train__micro_batch_blocks": 3}
    one, two = text / "one", text / "two"
    assert train(adapted(text, one, **options)) == [EXIT_FINISHED]
    assert train(adapted(text, two, **options), 2) == [EXIT_FINISHED] * 2
    for step, loss in losses(one).items():  # the same tolerance and reason as in test_run.py
        assert math.isclose(loss, losses(two)[step], rel_tol=1e-5), step


def test_lora_plan_counts_what_is_trained(
    text: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmcore.cli.main import main

    assert main(["plan", *adapted(text, text / "planned")]) == 0
    rows = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    trained = load.load_model(whole, device="cpu").model
    total = sum(p.numel() for p in trained.parameters())
    mine = sum(p.numel() for name, p in trained.named_parameters() if ".lora_" in name)
    assert f"{total:,} (" in rows["parameters"]
    assert f"; {mine:,} trained" in rows["parameters"]
    assert "4 N + 2 N trained" in rows["FLOPs per token"]
    moments = float(rows["memory per device"].split("optimizer ")[1].split(" KiB")[0])
    assert moments == pytest.approx(8 * mine / 1024, rel=0.01)


# --- refusals ---

FIELDS = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}


def small(type: str = "gpt2") -> Any:
    return build_model(type=type, config_overrides=FIELDS, vocab_size=100, block_size=16, seed=0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attn.nothing"], "attn.nothing"),
        (["c_attn", "c_projj"], r"'c_projj' is not .*did you mean 'c_proj'\?"),
        (["c_attn", "all-linear"], "'all-linear' is not .* all-linear must stand alone"),
        (["lm_head"], "holds the vocabulary"),
        (["wte"], "holds the vocabulary"),
    ],
)
def test_lora_layers_that_cannot_have_adapters_are_refused(targets: list[str], expected: str) -> None:
    argv = ["--model.lora.rank", "2", "--model.from_pretrained", "x", "--tokenizer.path", "x"]
    config = parse.parse([*argv, "--model.lora.target_modules", *targets])
    with pytest.raises(RequestError, match=expected):
        setup.adapt(config, small())


def test_lora_without_peft_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RequestError, match="pip install peft"):
        lora.adapt(small(), rank=2)


def test_lora_with_sharding_or_from_scratch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"model\.from_pretrained"):
        parse.parse(["--model.lora.rank", "4"])
    config = parse.parse(["--model.lora.rank", "4", "--model.from_pretrained", "x", "--tokenizer.path", "x"])

    class Sharded:
        strategy, closed = "zero3", False

        def __init__(self, *_: Any, **options: Any) -> None: ...

        def close(self) -> None:
            Sharded.closed = True

    monkeypatch.setattr("lmcore.engine.engine.Engine", Sharded)
    with pytest.raises(RequestError, match="not with zero3"):
        setup.open_engine(config)
    assert Sharded.closed


def test_lora_adapters_are_the_same_on_every_rank_and_merge() -> None:
    one, two = small(), small()
    names = [name for name, _ in one.named_parameters()]
    torch.manual_seed(1)
    lora.adapt(one, rank=2, seed=3)
    torch.manual_seed(2)
    lora.adapt(two, rank=2, seed=3, target_modules=["c_attn"])
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(p.numel() for p in one.parameters() if p.requires_grad) == 2 * (2 * 32 + 96 * 2)
    lora.merge(one)
    assert [name for name, _ in one.named_parameters()] == names
    assert all(p.requires_grad for p in one.parameters())
    lora.adapt(two := small(), rank=2, target_modules=["all-linear"])
    assert not any("lora" in name for name, _ in two.named_parameters() if "wte" in name or "lm_head" in name)
