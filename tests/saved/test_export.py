"""The export is the trained model: same logits, same tokenizer, for transformers and for lmcore."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from lmcore.checkpoint.pieces import Held, Range
from lmcore.checkpoint.writer import Checkpoint, find
from lmcore.cli.main import main
from lmcore.conventions import torch_dtype
from lmcore.data.tokenizer.tokenizer import load_tokenizer
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.model import module
from lmcore.model.build import build_model
from lmcore.report.report import Report
from lmcore.saved import card, load
from lmcore.saved import export as exporting
from lmcore.saved.export import both_versions, export, refuse_foreign_folder
from lmcore.saved.generate import stream
from lmcore.saved.score import score
from tests.support.checkpoints import Threads, checkpoints, whole
from tests.support.fork_server import run_ranks

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
    run_dir: Path,
    type: str = "gpt2",
    *,
    ema: bool = False,
    steps: int = 3,
    scale: float = 1.0,
    config: dict[str, Any] | None = None,
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
    saves = checkpoints(run_dir / "checkpoints", background=False)
    saves.save(
        steps,
        tensors=whole((kind, name, slot, t.detach()) for kind, name, slot, t in tensors),
        state={
            "model": load.describe(model),
            "tokens": 128 * steps,
            "tokenizer": words.fingerprint,
            "config": {"optim.name": "adamw", "optim.lr": 1e-3, "data.train": ["/home/me/corpus/a.txt"]}
            | (config or {}),
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


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_has_the_weights_and_layout_of_save_pretrained(type: str, dtype: str, tmp_path: Path) -> None:
    """Written one weight at a time; save_pretrained has all of them in memory."""
    trained: Any = make_run(tmp_path, type)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "e", run_dir=tmp_path, dtype=dtype, max_shard_bytes=20_000)
    small = trained.__class__(module.export_config(trained))
    small.load_state_dict(dict(module.export_state(trained.state_dict().items(), small)))
    small.tie_weights()
    small.to(torch_dtype(dtype)).save_pretrained(tmp_path / "whole", max_shard_size=20_000)

    def tensors(place: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in place.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        return found

    ours, theirs = tensors(folder), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    indices = [
        json.loads((place / "model.safetensors.index.json").read_text())
        for place in (folder, tmp_path / "whole")
    ]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    for name, file in indices[0]["weight_map"].items():
        with safe_open(folder / file, "pt") as opened_file:
            assert name in opened_file.keys()  # noqa: SIM118 - no dict
    assert indices[0]["weight_map"].keys() == ours.keys()
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "whole")]
    assert configs[0] == both_versions(configs[1])


def test_export_cuts_every_tensor_that_has_the_vocabulary(tmp_path: Path) -> None:
    """DeepSeek V4 chooses experts by a buffer of one row for each token."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "moe_intermediate_size": 8, "n_routed_experts": 2}
    low_rank = {"q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 1, "index_n_heads": 2, "index_head_dim": 8}
    trained: Any = build_model(
        type="deepseek_v4",
        config_overrides=heads | layers | low_rank | {"num_experts_per_tok": 1, "partial_rotary_factor": 0.5},
        vocab_size=50,
        block_size=16,
        seed=0,
    )
    assert trained.get_buffer("model.layers.0.mlp.gate.tid2eid").shape == (64, 1)
    exporting._write_model(trained, trained.get_parameter, tmp_path, torch.float32, 10**9, DISK)
    assert exporting.verify(tmp_path, trained, trained.get_parameter, torch.float32) <= 1e-4


def test_export_of_a_model_that_takes_no_cache(tmp_path: Path) -> None:
    """Where no layer attends to tokens, the cache of transformers counts none, and the model refuses it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    trained: Any = build_model(
        type="lfm2",
        config_overrides={**sizes, "intermediate_size": 48, "layer_types": ["conv", "conv"]},
        vocab_size=50,
        block_size=16,
        seed=0,
    )
    exporting._write_model(trained, trained.get_parameter, tmp_path, torch.float32, 10**9, DISK)
    assert exporting.verify(tmp_path, trained, trained.get_parameter, torch.float32) <= 1e-4
    opened: Any = load.open_export(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert opened(input_ids=ids).logits.shape == (1, 3, 50)  # as a user and lm-eval call it
    assert opened.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_export_reads_back_what_it_wrote(tmp_path: Path) -> None:
    class Flips(Disk):
        def write(self, file: Any, data: memoryview) -> None:
            super().write(file, data if len(data) < 5000 else memoryview(b"x" + bytes(data[1:])))

    make_run(tmp_path)
    with newest(tmp_path) as opened, pytest.raises(FaultError, match="reads back differently"):
        export(opened, tmp_path / "export", run_dir=tmp_path, disk=Flips())
    assert not list(tmp_path.glob("*export*"))


def test_export_without_memory_to_open_it_says_that_logits_were_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    notes: list[str] = []
    monkeypatch.setattr(exporting, "available_bytes", lambda: 100_000)
    for dtype in ("bf16", "fp32"):  # what is float32 in the file is mapped
        with newest(tmp_path) as opened:
            export(opened, tmp_path / dtype, run_dir=tmp_path, dtype=dtype, note=notes.append)
    assert "logits not compared: opened as float32 it takes" in notes[0]
    assert "logits verified" in notes[1]
    records = [json.loads((tmp_path / d / "lmcore_export.json").read_text()) for d in ("bf16", "fp32")]
    assert records[0]["largest_logit_difference"] is None
    assert records[1]["largest_logit_difference"] < 1e-3


def make_run_of_two_writers(run_dir: Path) -> int:
    """38 million parameters, no weight in one file whole; their bytes."""
    words = train_tokenizer(TEXTS, vocab_size=VOCABULARY, folder=run_dir / "tokenizer")
    model = build_model(
        type="gpt2",
        config_overrides={"n_layer": 12, "n_head": 2, "n_embd": 512, "n_positions": 64},
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=64,
        seed=1,
    )
    state = {"model": load.describe(model), "tokens": 1, "tokenizer": words.fingerprint, "config": {}}

    def work(member: Any) -> None:
        saves = checkpoints(run_dir / "checkpoints", ranks=member)
        held = []
        for name, parameter in model.named_parameters():
            half = parameter.numel() // 2
            part = Range(half * member.rank, half if member.rank == 0 else parameter.numel() - half)
            numbers = parameter.detach().view(-1)[part.start : part.start + part.length]
            held.append(Held("model", name, "", tuple(parameter.shape), part, numbers))
        saves.save(1, tensors=held, state=state)
        saves.wait(final=True)

    Threads(2).together(work)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def most_memory(work: Callable[[], Any]) -> float:
    """Most bytes of memory (without mapped files) that ``work`` takes, beyond those before it."""

    def resident() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) * 1024

    begin, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most - begin


def extra_memory_of_an_export(run_dir: Path, dtype: str) -> float:
    def work(run_dir: Path) -> None:
        with newest(run_dir) as opened:
            export(opened, run_dir / "export", run_dir=run_dir, dtype=dtype)

    make_run(run_dir / "warm")  # libraries are loaded and threads started once
    work(run_dir / "warm")
    exporting.available_bytes = lambda: 0 if dtype == "bf16" else None
    return most_memory(lambda: work(run_dir))


def use_of_a_model(run_dir: Path) -> tuple[int, str, float, list[str]]:
    """Most bytes of weights that a model has while it generates and is scored; what comes out, and is said."""
    said: list[str] = []
    saved = load.load_model(run_dir, device="cpu", note=said.append)
    held: list[int] = []

    def look(*_: Any) -> None:
        held.append(sum(p.nbytes for p in saved.model.parameters() if not p.is_meta))

    for layer in module.decoder_layers(saved.model):
        layer.mlp.register_forward_hook(look)
    written = "".join(stream(saved.model, saved.tokenizer, "the", 4, seed=3))
    loss = score(saved, {"valid": [str(run_dir / "text.txt")]})["valid"].loss
    return max(held), written, loss, said


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_never_holds_the_model(dtype: str, tmp_path: Path) -> None:
    """One weight and one layer at a time; half of the model is far above that and below one copy of it. In bf16 without
    the comparison of logits, for which transformers opens it as float32."""
    total = make_run_of_two_writers(tmp_path)
    (extra,) = run_ranks(extra_memory_of_an_export, 1, tmp_path, dtype)
    assert extra < 0.5 * total


@pytest.mark.slow
def test_model_of_several_ranks_is_used_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not fit: generating and scoring hold a layer at a time, and give what the whole model gives."""
    total = make_run_of_two_writers(tmp_path)
    (tmp_path / "text.txt").write_text("the lion and the mouse\n" * 20)
    whole = use_of_a_model(tmp_path)
    assert whole[0] == total
    assert not whole[3]
    monkeypatch.setattr(load, "available_bytes", lambda: total)
    layered = use_of_a_model(tmp_path)
    a_layer = 4 * (12 * 512**2 + 13 * 512)  # of GPT-2's weights and biases, 512 wide; there are 12
    assert layered[0] == total - 11 * a_layer
    assert layered[1:3] == whole[1:3]
    assert "its layers are read from the files one at a time" in layered[3][0]


def test_loaded_model_is_mapped_and_its_file_never_changes(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000003" / "model.safetensors"
    before = path.read_bytes()
    saved = load.load_model(tmp_path, device="cpu")
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for parameter in saved.model.parameters():
        assert any(first <= parameter.data_ptr() < last for first, last in spans)
        with torch.no_grad():
            parameter.zero_()
    assert path.read_bytes() == before


def test_export_of_weights_that_diverged_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a rate of 1e30: finite weights whose logits are not."""
    make_run(tmp_path)
    original = exporting._write_model

    def diverged(trained: Any, read: Callable[[str], torch.Tensor], *arguments: Any) -> Any:
        return original(trained, lambda name: read(name) * 1e30, *arguments)

    real = exporting.verify

    def verify(folder: Path, trained: Any, read: Callable[[str], torch.Tensor], *more: Any) -> float:
        return real(folder, trained, lambda name: read(name) * 1e30, *more)

    monkeypatch.setattr(exporting, "_write_model", diverged)
    monkeypatch.setattr(exporting, "verify", verify)
    with newest(tmp_path) as opened, pytest.raises(FaultError, match=r"not finite: its weights diverged"):
        export(opened, tmp_path / "export", run_dir=tmp_path)
    assert not (tmp_path / "export").exists()


def test_export_with_wrong_logits_raises_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        export(opened, tmp_path / "export", run_dir=tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir() if p.is_file()}

        original = exporting._write_model

        def spoilt(trained: Any, read: Callable[[str], torch.Tensor], *arguments: Any) -> Any:
            def other(name: str) -> torch.Tensor:
                weight = read(name).clone()
                if name == "transformer.h.0.mlp.c_fc.weight":
                    weight[0, 0] += 1.0
                return weight

            return original(trained, other, *arguments)

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
    text = (folder / "README.md").read_text()
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
        assert expected in text
    for private in ("my-host", "/home/me", "job", str(tmp_path)):
        assert private not in text
        assert private not in (folder / "training_config.yaml").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lr: 0.001" in (folder / "training_config.yaml").read_text()
    assert "loglikelihood_rolling" in (folder / "lm_eval" / "own_text.yaml").read_text()


@pytest.mark.parametrize("content", [b"a: \xff\n", b"a: *b\n"])
def test_damaged_configuration_is_named_with_its_path(content: bytes, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    with (
        newest(tmp_path) as opened,
        pytest.raises(RequestError, match=re.escape(str(tmp_path / "config.yaml"))),
    ):
        export(opened, tmp_path / "export", run_dir=tmp_path)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/me/my corpus/*.txt", "*.txt"),
        ("file:///home/me/x.txt", "x.txt"),
        ("file://my-host/home/me/x.txt", "x.txt"),
        ("zip://a.txt::file:///home/me/x.zip", "zip://a.txt::x.zip"),
        ("held=/home/me/my corpus/x.txt", "held=x.txt"),
        ("held=file:///home/me/x.txt", "held=x.txt"),
        ("held=~/me/x.txt", "held=x.txt"),
        ("~me", "~me"),
        ("cat '/home/me/x.txt' ../me/y.txt | sort --key=/home/me/z", "cat 'x.txt' y.txt | sort --key=z"),
        ("logs:/home/me/a:/home/me/b", "logs:a:b"),
        ({"/home/me/x.txt": ["~/me/y.txt", 2, None]}, {"x.txt": ["y.txt", 2, None]}),
        *((same, same) for same in ("s3://bucket/a/b.txt", "https://host:80/a/b", "corpus/a/*.txt", "he/she / it",
                                    "1/2 and /or", "~3/4 a</b></i>", "[[a]]/b/c", "TCP/IP/x")),
    ],
)  # fmt: skip
def test_configuration_beside_the_card_names_no_path_of_the_machine(value: Any, kept: Any) -> None:
    written = yaml.safe_load(card._without_paths({"data": {"train": [value]}}))
    assert written == {"data": {"train": [kept]}}


@pytest.mark.parametrize(("asked", "said"), [("auto", "bf16 (auto)"), ("fp32", "fp32")])
def test_card_names_the_precision_that_auto_was(asked: str, said: str) -> None:
    opened: Any = SimpleNamespace(
        state={
            "config": {"train.precision": asked},
            "topology": {"precision": "bf16" if asked == "auto" else asked},
        },
        manifest={},
    )
    assert dict(card._procedure(opened, None))["precision"] == f"precision {said}"


def test_configuration_beside_the_card_of_an_older_run_holds_no_secret() -> None:
    assert "cAnArY" not in card._without_paths({"a": "https://h/x?sig=cAnArY", "data": {"api_key": "cAnArY"}})


@pytest.mark.parametrize("data", [{}, {"eos": False, "document_mask": True, "unit": "line", "block_size": 8}])
def test_how_a_model_was_trained_is_known_from_its_checkpoint_and_its_export(
    data: dict[str, Any], tmp_path: Path
) -> None:
    make_run(tmp_path, config={f"data.{name}": value for name, value in data.items()})
    with newest(tmp_path) as opened:
        export(opened, tmp_path / "export", run_dir=tmp_path)
    for path in (tmp_path, tmp_path / "export"):
        saved = load.load_model(path, device="cpu")
        assert saved.eos is data.get("eos", True)
        assert saved.document_mask is data.get("document_mask", False)
        assert saved.unit == data.get("unit", "auto")
        assert saved.block_size == data.get("block_size")
    text = (tmp_path / "export" / "README.md").read_text()
    assert ("Documents were separated by the end-of-text token" in text) is saved.eos
    assert ("Documents followed each other without a token" in text) is not saved.eos


def test_commands_of_the_card_can_be_pasted(tmp_path: Path) -> None:
    run_dir = tmp_path / 'my "run" | `a` \\ b'
    make_run(run_dir)
    with newest(run_dir) as opened:
        folder = export(opened, run_dir / "export", run_dir=run_dir)
    text = (folder / "README.md").read_text()
    [command] = [line for line in text.splitlines() if line.startswith("lm_eval ")]
    words = shlex.split(command)
    assert words[words.index("--model_args") + 1] == f"pretrained={run_dir.name},prefix_token_id=2"
    assert words[words.index("--include_path") + 1] == f"{run_dir.name}/lm_eval"
    code = ast.parse(text.partition("```python")[2].partition("```")[0])
    texts = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert texts.count(run_dir.name) == 2, "tokenizer and model"


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


@pytest.mark.parametrize("name", ["export", "mine[1]"])
def test_killed_exports_are_cleared(name: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for kind in ("tmp", "old"):
        left = tmp_path / f".{name}.{dead.pid}.{kind}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"x")
    others = tmp_path / f".{name}.{os.getppid()}.tmp"  # of a process that lives
    others.mkdir()
    with newest(tmp_path) as opened:
        export(opened, tmp_path / name, run_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(f".{name}")] == [others]


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


def test_export_does_not_remove_files_that_were_added_to_an_older_one(tmp_path: Path) -> None:
    make_run(tmp_path)
    with newest(tmp_path) as opened:
        folder = export(opened, tmp_path / "export", run_dir=tmp_path)
        (folder / ".DS_Store").write_text("of the system")
        export(opened, folder, run_dir=tmp_path)
        (folder / "model.gguf").write_text("an hour of converting")
        with pytest.raises(RequestError, match=r"holds model\.gguf beside the export"):
            export(opened, folder, run_dir=tmp_path)
        with pytest.raises(RequestError, match="would be removed when it is replaced: move it elsewhere"):
            refuse_foreign_folder(folder)
    assert (folder / "model.gguf").read_text() == "an hour of converting"


def test_device_without_memory_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RequestError, match=r"device meta: .*; use cpu or one of this machine's GPUs"):
        load.load_model(tmp_path, device="meta")


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
    saves = checkpoints(tmp_path / "run" / "checkpoints")
    saves.save(
        1,
        tensors=whole(tensors),
        state={"model": load.describe(model, factory=f"{__name__}:own_model", arguments={"width": 3})},
    )
    saves.wait(final=True)
    for factory in (own_model, f"{__name__}:own_model"):
        saved = load.load_model(tmp_path / "run", factory=factory, device="cpu")
        assert saved.tokenizer is None
        assert torch.equal(saved.model.weight, model.weight)
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
