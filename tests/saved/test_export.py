"""The export is the trained model: same logits, same tokenizer, for transformers and for lmcore."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lmcore.checkpoint.writer import Checkpoint, Checkpoints, find
from lmcore.cli.main import main
from lmcore.data.tokenizer.tokenizer import load_tokenizer
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import FaultError, RequestError
from lmcore.model.build import build_model
from lmcore.report.report import Report
from lmcore.saved import export as exporting
from lmcore.saved import load
from lmcore.saved.export import both_versions, export, refuse_foreign_folder
from lmcore.saved.score import score

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


def make_run(
    run_dir: Path, type: str = "gpt2", *, ema: bool = False, steps: int = 3, scale: float = 1.0
) -> torch.nn.Module:
    """A run folder with one checkpoint, as the trainer leaves it."""
    words = train_tokenizer(TEXTS, vocab_size=VOCABULARY, folder=run_dir / "tokenizer")
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
            parameter.mul_(scale)
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
        state={
            "model": load.describe(model),
            "tokens": 128 * steps,
            "tokenizer": words.fingerprint,
            "config": {"optim.name": "adamw", "optim.lr": 1e-3, "data.train": ["/home/me/corpus/a.txt"]},
        },
        metrics={"loss": 2.5},
    )
    saves.wait()
    with Report(run_dir, stream=io.StringIO()) as report:
        report.event(
            "start",
            step=0,
            command=["train_lm.py", "--optim.lr", "1e-3"],
            rows={
                "model": f"{type} of a test",
                "run folder": "/home/me/runs/demo",
                "job": "host my-host",
                "text (stdlib)": "10 documents, 0.0 MB, 1,234 tokens",
                "held out (v|1)": "2 documents, 99 tokens",
            },
            versions={"torch": torch.__version__},
        )
        report.begin(total_steps=steps)
        for step in range(1, steps + 1):
            sums = {"loss_sum": torch.tensor(300.0 / step), "count": 100}
            where = {"step": step, "epoch": step / 3, "tokens": 128 * step, "position": 2 * step}
            report.step(**where, lr=1e-3, due=True, **sums)
        report.evaluation(
            set="costs $5_{ to $6_",
            step=steps,
            epoch=1.0,
            tokens=384,
            loss=2.5,
            perplexity=12.18,
            bits_per_byte=1.9,
        )
    (run_dir / "config.yaml").write_text(
        "run_dir: /home/me/runs/demo\noptim:\n  lr: 0.001\ndata:\n  train:\n  - /home/me/corpus/a.txt\n"
    )
    return model.eval()


def newest(run_dir: Path) -> Checkpoint:
    found = find(run_dir / "checkpoints", note=pytest.fail)
    assert found is not None
    return found


@pytest.mark.parametrize("type", TYPES)
def test_transformers_opens_the_export_with_the_same_logits(type: str, tmp_path: Path) -> None:
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
    assert ids == load_tokenizer(tmp_path / "tokenizer").encode(text)
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


def test_export_of_tied_weights(tmp_path: Path) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.get_tensor("transformer.wte.weight").shape == (VOCABULARY, 32)
    assert "lm_head.weight" not in names
    model: Any = load.open_export(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_export_bf16_shards_and_ema(tmp_path: Path) -> None:
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


def test_export_with_wrong_logits_raises_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        export(opened, tmp_path / "export", run_dir=tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir() if p.is_file()}

        original = exporting._write_model

        def spoilt(trained: Any, *arguments: Any) -> None:
            with torch.no_grad():
                trained.transformer.h[0].mlp.c_fc.weight[0, 0] += 1.0
            original(trained, *arguments)
            with torch.no_grad():
                trained.transformer.h[0].mlp.c_fc.weight[0, 0] -= 1.0

        monkeypatch.setattr(exporting, "_write_model", spoilt)
        with pytest.raises(FaultError, match="logits differ"):
            export(opened, tmp_path / "export", run_dir=tmp_path)
    after = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir() if p.is_file()}
    assert after == before
    assert not list(tmp_path.glob(".export*"))


def test_export_refusals(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    foreign = tmp_path / "precious"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with newest(tmp_path / "run") as opened:
        with pytest.raises(RequestError, match="not an export of lmcore"):
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


def test_model_card(tmp_path: Path) -> None:
    make_run(tmp_path / "demo")
    with newest(tmp_path / "demo") as opened:
        folder = export(opened, tmp_path / "demo" / "export", run_dir=tmp_path / "demo")
    card = (folder / "README.md").read_text()
    for expected in (
        "library_name: transformers",
        "| train | stdlib | 10 documents, 0.0 MB, 1,234 tokens |",
        "| validation | v\\|1 | 2 documents, 99 tokens |",
        "| costs $5_{ to $6_ | 3 | 2.5000 | 12.1800 | 1.9000 |",
        "pretrained from scratch",
        "- method: pretraining from scratch",
        "- optimizer: name adamw, lr 0.001",
        "Tokens seen: 384",
        "![loss over steps](loss.png)",
        "prefix_token_id=2",
        "weights of step 3",
    ):
        assert expected in card
    for private in ("my-host", "/home/me", "job", str(tmp_path)):
        assert private not in card
        assert private not in (folder / "training_config.yaml").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lr: 0.001" in (folder / "training_config.yaml").read_text()
    assert "loglikelihood_rolling" in (folder / "lm_eval" / "own_text.yaml").read_text()


def test_load_model_from_run_checkpoint_and_export(tmp_path: Path) -> None:
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


def test_export_bf16_of_a_trained_rotary_model(tmp_path: Path) -> None:
    """Rounded are the parameters, as in the file; the rotary frequencies of the reference stay float32."""
    make_run(tmp_path, "llama", scale=3.0)  # large weights: what attention does depends on the frequencies
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "half", run_dir=tmp_path, dtype="bf16")
    assert json.loads((folder / "lmcore_export.json").read_text())["largest_logit_difference"] < 1e-3


def test_killed_exports_are_cleared(tmp_path: Path) -> None:
    make_run(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".export.{dead.pid}.tmp", f".export.{dead.pid}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    others = tmp_path / f".export.{os.getppid()}.tmp"  # of a process that lives
    others.mkdir()
    with newest(tmp_path) as opened:
        export(opened, tmp_path / "export", run_dir=tmp_path)
    assert [path.name for path in tmp_path.glob(".export*")] == [others.name]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    for content in ("missing", "empty"):
        refuse_foreign_folder(tmp_path / content)
        (tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("x")
    for name in ("file", "link", "thesis"):
        with pytest.raises(RequestError, match="give another folder, or remove it"):
            refuse_foreign_folder(tmp_path / name)


def test_changed_export_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        with pytest.raises(RequestError, match=f"{name} is damaged or was changed after the export"):
            load.load_model(folder, device="cpu")
        path.write_bytes(good)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="adapter"):
        load.load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint_given_by_path_is_not_exported(tmp_path: Path, name: str) -> None:
    make_run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000003"
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    for work in (
        lambda: main(["export", str(path), "--debug"]),
        lambda: main(["generate", str(path), "--prompt", "x", "--device", "cpu", "--debug"]),
        lambda: load.load_model(path, device="cpu"),
    ):
        with pytest.raises(RequestError, match="damaged"):
            work()
    assert not (tmp_path / "export").exists()


def test_other_tokenizer_than_trained_with_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    train_tokenizer(TEXTS, vocab_size=VOCABULARY, folder=tmp_path / "tokenizer", split_digits=False, seed=9,
                    model_type="unigram")  # fmt: skip
    with pytest.raises(RequestError, match="is not the tokenizer that the checkpoint was trained with"):
        load.load_model(tmp_path, device="cpu")
    with newest(tmp_path) as opened, pytest.raises(RequestError, match="is not the tokenizer"):
        export(opened, tmp_path / "export", run_dir=tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(RequestError, match=r"tokenizer is missing"):
        load.load_model(tmp_path, device="cpu")


def test_load_model_of_an_own_model_without_tokenizer(tmp_path: Path) -> None:
    model = own_model(width=3)
    tensors = [("model", name, None, tensor.detach()) for name, tensor in model.named_parameters()]
    saves = Checkpoints(tmp_path / "run" / "checkpoints", note=lambda text: None)
    saves.save(
        1,
        layout=[(kind, name, slot, tuple(t.shape), t.dtype) for kind, name, slot, t in tensors],
        tensors=iter(tensors),
        state={"model": load.describe(model, factory=f"{__name__}:own_model", arguments={"width": 3})},
    )
    saves.wait(final=True)
    for factory in (own_model, f"{__name__}:own_model"):
        saved = load.load_model(tmp_path / "run", factory=factory, device="cpu")
        assert saved.tokenizer is None
        assert torch.equal(saved.model.weight, model.weight)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="no tokenizer"):
            score(saved, {"x": [str(tmp_path)]})
    with pytest.raises(RequestError, match="if you trust it, add --factory"):
        load.load_model(tmp_path / "run", device="cpu")


def own_model(width: int) -> torch.nn.Linear:
    torch.manual_seed(width)
    return torch.nn.Linear(width, 2)


def test_linked_checkpoint_uses_the_tokenizer_of_its_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for given in (tmp_path / "run", path):
        assert load.load_model(given, device="cpu").run_dir == tmp_path / "run"


def test_rotary_settings_for_transformers_4_and_5() -> None:
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
def test_transformers_4_57_and_lm_eval_open_the_export(tmp_path: Path) -> None:
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
        ids = load_tokenizer(run_dir / "tokenizer").encode(text)
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
