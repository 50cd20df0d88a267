"""The exported folder is the trained model: same logits, same tokenizer, for transformers and for us."""

from __future__ import annotations

import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lmcore.checkpoint.writer import Checkpoint, Checkpoints, find
from lmcore.data.tokenizer import tokenizer
from lmcore.errors import FaultError, RequestError
from lmcore.model.build import build_model
from lmcore.report.report import Report
from lmcore.saved import export as room
from lmcore.saved import load
from lmcore.saved.export import both_versions, describe, export

TEXTS = ["def f(x):\n    return x + 1\n", "吾輩は猫である。名前はまだ無い。😀\n"] * 40
VOCABULARY = 330  # no multiple of 64: the padding must go
TYPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    },
    "mixtral": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    },
}


def make_run(run_dir: Path, type: str = "gpt2", *, ema: bool = False, steps: int = 3) -> torch.nn.Module:
    """A run folder with one checkpoint, as the trainer leaves it."""
    words = tokenizer.train(TEXTS, vocab_size=VOCABULARY, folder=run_dir / "tokenizer")
    model = build_model(
        type=type,
        config_overrides=TYPES[type],
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=64,
        seed=1,
    )
    with torch.no_grad():  # away from the initialization, so that nothing can be right by accident
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    kept = set(model.state_dict())
    weights = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in kept)]
    tensors = [("model", name, "", tensor) for name, tensor in weights]
    if ema:
        tensors += [("ema", name, "", 0.5 * tensor) for name, tensor in model.named_parameters()]
    saves = Checkpoints(run_dir / "checkpoints", background=False, note=lambda text: None)
    saves.save(
        steps,
        layout=[(kind, name, slot, tuple(t.shape), t.dtype) for kind, name, slot, t in tensors],
        tensors=((kind, name, slot, t.detach()) for kind, name, slot, t in tensors),
        state={"model": describe(model), "tokens": 128 * steps},
        metrics={"loss": 2.5},
    )
    saves.wait()
    with Report(run_dir, stream=io.StringIO()) as report:
        report.event(
            "start",
            step=0,
            command=["train_lm.py", "--optim.lr", "1e-3"],
            rows={"model": f"{type} of a test"},
            versions={"torch": torch.__version__},
            data=[{"set": "train", "name": "stdlib", "documents": 10, "tokens": 1234, "bytes": 5678}],
        )
        report.begin(total_steps=steps)
        for step in range(1, steps + 1):
            sums = {"loss_sum": torch.tensor(300.0 / step), "count": 100}
            where = {"step": step, "epoch": step / 3, "tokens": 128 * step, "position": 2 * step}
            report.step(**where, lr=1e-3, due=True, **sums)
        report.evaluation(
            set="valid", step=steps, epoch=1.0, tokens=384, loss=2.5, perplexity=12.18, bits_per_byte=1.9
        )
    (run_dir / "config.yaml").write_text("optim:\n  lr: 0.001\n")
    return model.eval()


def newest(run_dir: Path) -> Checkpoint:
    found = find(run_dir / "checkpoints", note=pytest.fail)
    assert found is not None
    return found


@pytest.mark.parametrize("type", TYPES)
def test_transformers_opens_the_export_with_the_trainers_logits(type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = make_run(tmp_path, type)
    assert trained.config.vocab_size == 384
    notes: list[str] = []
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path, note=notes.append)
    assert "verified" in notes[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == VOCABULARY == len(words)
    assert model.dtype == torch.float32
    text = "def f(x):\n    吾輩は猫 😀"
    ids = words(text)["input_ids"]
    assert ids == tokenizer.load(tmp_path / "tokenizer").encode(text)
    assert words.decode(ids) == text
    with torch.no_grad():
        batch = torch.tensor([ids])
        expected = trained(input_ids=batch).logits[..., :VOCABULARY]
        torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=1e-5, atol=1e-5)
    output = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert output.shape[1] <= len(ids) + 5
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(words, name) == getattr(model.generation_config, name)
    assert words.model_max_length == 64
    assert model.config.use_cache


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.get_tensor("transformer.wte.weight").shape == (VOCABULARY, 32)
    assert "lm_head.weight" not in names
    model: Any = load.open_export(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_bf16_and_pieces_and_the_moving_average(tmp_path: Path) -> None:
    trained = make_run(tmp_path, "llama", ema=True)
    with newest(tmp_path) as opened:
        folder = export(
            opened, tmp_path / "half", run_dir=tmp_path, dtype="bf16", weights="ema", max_shard_bytes=20_000
        )
    pieces = sorted(folder.glob("model-*.safetensors"))
    assert len(pieces) > 1
    with safe_open(pieces[0], "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 - no dict
    model: Any = load.open_export(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    half = (0.5 * dict(trained.named_parameters())[name]).bfloat16().float()
    assert torch.equal(dict(model.named_parameters())[name], half)
    record = json.loads((folder / "lmcore_export.json").read_text())
    assert (record["weights"], record["dtype"], record["step"]) == ("ema", "bf16", 3)


def test_a_wrong_export_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        export(opened, tmp_path / "export", run_dir=tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir() if p.is_file()}

        original = room._write_model

        def spoilt(trained: Any, *arguments: Any) -> None:
            with torch.no_grad():
                trained.transformer.h[0].mlp.c_fc.weight[0, 0] += 1.0
            original(trained, *arguments)
            with torch.no_grad():
                trained.transformer.h[0].mlp.c_fc.weight[0, 0] -= 1.0

        monkeypatch.setattr(room, "_write_model", spoilt)
        with pytest.raises(FaultError, match="logits differ"):
            export(opened, tmp_path / "export", run_dir=tmp_path)
    after = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir() if p.is_file()}
    assert after == before
    assert not list(tmp_path.glob(".export*"))


def test_refusals(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    foreign = tmp_path / "precious"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with newest(tmp_path / "run") as opened:
        with pytest.raises(RequestError, match="no export of lmcore"):
            export(opened, foreign, run_dir=tmp_path / "run")
        with pytest.raises(RequestError, match="fp8"):
            export(opened, tmp_path / "x", run_dir=tmp_path / "run", dtype="fp8")
        opened.state["model"] = {"kind": "factory", "factory": "mine:net", "arguments": {}}
        with pytest.raises(RequestError, match=r"model\.factory"):
            export(opened, tmp_path / "x", run_dir=tmp_path / "run")
    assert (foreign / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RequestError, match="no such folder"):
        load.resolve(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="neither a checkpoint nor an export"):
        load.resolve(tmp_path / "empty")


def test_the_card_says_what_was_recorded(tmp_path: Path) -> None:
    make_run(tmp_path / "demo")
    with newest(tmp_path / "demo") as opened:
        folder = export(opened, tmp_path / "demo" / "export", run_dir=tmp_path / "demo")
    card = (folder / "README.md").read_text()
    for expected in (
        "| train | stdlib | 10 | 1,234 | 5,678 |",
        "| valid | 3 | 2.5000 | 12.1800 | 1.9000 |",
        "accelerate launch train_lm.py --optim.lr 1e-3",
        "![loss over steps](loss.png)",
        "prefix_token_id=2",
        "weights of step 3",
    ):
        assert expected in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lr: 0.001" in (folder / "training_config.yaml").read_text()
    assert "loglikelihood_rolling" in (folder / "lm_eval" / "own_text.yaml").read_text()


def test_opened_from_run_folder_checkpoint_and_export_it_is_one_model(tmp_path: Path) -> None:
    trained = make_run(tmp_path)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path)
    ids = torch.tensor([[random.Random(0).randrange(VOCABULARY) for _ in range(20)]])
    with torch.no_grad():
        expected = trained(input_ids=ids).logits[..., :VOCABULARY]
        for path in (tmp_path, tmp_path / "checkpoints" / "step-00000003", folder):
            one = load.load_model(path, device="cpu")
            logits = one.model(input_ids=ids).logits[..., :VOCABULARY]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            assert one.run_dir == tmp_path
    assert load.resolve(tmp_path, "3") == load.resolve(tmp_path) == load.resolve(tmp_path, "best")


def test_rotary_settings_are_written_for_both_major_versions() -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"}
    both = both_versions(new)
    assert both["rope_theta"] == 5e5
    assert both["rope_scaling"] is None
    assert both["rope_parameters"] == new["rope_parameters"]
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert both_versions(scaled)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert both_versions({"n_embd": 4}) == {"n_embd": 4}


OTHER_VERSION = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__ == "4.57.6"
for folder in sys.argv[1:]:
    wanted = torch.load(folder + "/../wanted.pt")
    words = AutoTokenizer.from_pretrained(folder)
    assert words(wanted["text"])["input_ids"] == wanted["ids"]
    assert words.decode(wanted["ids"]) == wanted["text"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([wanted["ids"]])).logits
    torch.testing.assert_close(logits, wanted["logits"], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_transformers_4_57_and_lm_eval_open_it_in_an_environment_of_their_own(tmp_path: Path) -> None:
    """A second environment, with this one's torch behind it."""
    place = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    site = next(place.glob("lib/python*/site-packages"))
    (site / "behind.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    wanted = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub<1", "lm-eval==0.4.13"]
    install = subprocess.run(
        [place / "bin" / "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    if install.returncode:
        pytest.skip(f"not run: no package index is reached ({install.stderr.strip().splitlines()[-1]})")
    text = "def f(x):\n    吾輩は猫 😀"
    folders = []
    for type in TYPES:
        run_dir = tmp_path / type
        trained = make_run(run_dir, type)
        ids = tokenizer.load(run_dir / "tokenizer").encode(text)
        with torch.no_grad():
            logits = trained(input_ids=torch.tensor([ids])).logits[..., :VOCABULARY]
        torch.save({"text": text, "ids": ids, "logits": logits}, run_dir / "wanted.pt")
        with newest(run_dir) as opened:
            folders.append(str(export(opened, run_dir / "export", run_dir=run_dir)))
    subprocess.run([place / "bin" / "python", "-c", OTHER_VERSION, *folders], check=True)

    documents = ["def f(x):\n    return x + 1\n", "吾輩は猫である。"]
    with open(tmp_path / "held_out.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    subprocess.run(
        [place / "bin" / "lm_eval", "--model", "hf", "--model_args", f"pretrained={folders[1]},prefix_token_id=2",
         "--include_path", f"{folders[1]}/lm_eval", "--tasks", "own_text", "--device", "cpu",
         "--output_path", tmp_path / "scores"],
        check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    scores = json.loads(next((tmp_path / "scores").rglob("results*.json")).read_text())["results"]["own_text"]
    one = load.load_model(folders[1], device="cpu")
    nats = 0.0
    for document in documents:
        ids = torch.tensor([[one.tokenizer.eos_id, *one.tokenizer.encode(document)]])
        with torch.no_grad():
            logits = one.model(input_ids=ids[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum"))
    size = sum(len(document.encode()) for document in documents)
    assert scores["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
