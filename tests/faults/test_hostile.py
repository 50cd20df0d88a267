"""Hostile folders (models, checkpoints, tokenizers, runs): no code of theirs runs, and a refusal is one line.

Every payload would create the file ``EXECUTED`` if it were executed. Whether a folder is opened or refused is up to the
reader; a refusal must be a ``RequestError``, never an exception from deep inside a library, and it must come quickly.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmcore.checkpoint import writer
from lmcore.checkpoint.manifest import manifest_bytes
from lmcore.cli.main import main
from lmcore.data.tokenizer.tokenizer import load_tokenizer
from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.saved import load
from lmcore.saved.run_config import CODE, read_run_config
from tests.support.checkpoints import checkpoints, whole


class Bomb:
    """Unpickling it makes the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "EXECUTED"


TINY = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 8, "vocab_size": 64}


def module_text(mark: Path) -> str:
    return (
        f"import os; os.system('touch {mark}')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
        "class Evil(GPT2LMHeadModel): pass\nclass EvilConfig(GPT2Config): model_type = 'evil'\n"
        "class EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )


def attempt(work: Callable[[], Any]) -> str:
    """The refusal, or ``opened``. Only a ``RequestError`` may be raised."""
    try:
        work()
    except RequestError as refusal:
        return str(refusal)
    return "opened"


def model_folder(folder: Path, mark: Path, config: dict[str, Any], weights: str = "safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(module_text(mark))
    (folder / "config.json").write_text(json.dumps(TINY | {"architectures": ["GPT2LMHeadModel"]} | config))
    tensors = {"transformer.wte.weight": torch.zeros(64, 4)}
    if weights == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif weights == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    elif weights == "index":
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../../evil.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder.parent.parent / "evil.bin").write_bytes(pickle.dumps(Bomb(mark)))
    elif weights == "named":
        (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    return folder


AUTO = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}
MODEL_PAYLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "auto_map beside a known type": ({"auto_map": AUTO}, "safetensors"),
    "auto_map of an unknown type": ({"auto_map": AUTO, "model_type": "evil"}, "safetensors"),
    "auto_map to another repository": (
        {"auto_map": {"AutoModelForCausalLM": "evil/repo--evil.Evil"}},
        "safetensors",
    ),
    "trust_remote_code in the config": (
        {"auto_map": AUTO, "model_type": "evil", "trust_remote_code": True},
        "safetensors",
    ),
    "trust_remote_code in a nested config": ({"text_config": {"trust_remote_code": True}}, "safetensors"),
    "CVE-2026-4372": ({"_attn_implementation_internal": "evil/kernel"}, "safetensors"),
    "a kernel as attention": ({"attn_implementation": "evil/kernel@main:Evil"}, "safetensors"),
    "another private key": ({"_experts_implementation_internal": "evil/kernel"}, "safetensors"),
    "pickled weights": ({}, "pickle"),
    "an index that leads out": ({}, "index"),
    "a pickle that is called safetensors": ({}, "named"),
    "a quantization that loads code": ({"quantization_config": {"quant_method": "evil.Evil"}}, "safetensors"),
    "custom generation code": ({"custom_generate": "evil"}, "safetensors"),
    "architectures of its own": ({"architectures": ["evil.Evil"]}, "safetensors"),
}


@pytest.mark.parametrize("name", MODEL_PAYLOADS)
def test_hostile_model_folders_run_no_code(tmp_path: Path, mark: Path, name: str) -> None:
    config, weights = MODEL_PAYLOADS[name]
    folder = model_folder(tmp_path / "deep" / "model", mark, config, weights)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(module_text(mark))
    before = set(sys.modules)
    attempt(
        lambda: build_model(
            from_pretrained=str(folder),
            vocab_size=64,
            special_ids={},
            block_size=8,
            seed=0,
            type=None,
            config_overrides={},
        )
    )
    attempt(lambda: load.open_export(folder))
    assert not mark.exists()
    assert not any("evil" in module for module in set(sys.modules) - before)


TOKENIZER_PAYLOADS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}},
    "a class of its own": {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": "evil.EvilTokenizer"},
    },
    "a class by path": {"tokenizer_class": "evil.EvilTokenizer"},
    "a class of the system": {"tokenizer_class": "os.system"},
    "trust_remote_code": {
        "trust_remote_code": True,
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]},
    },
    "a template": {"chat_template": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}"},
}


@pytest.mark.parametrize("name", TOKENIZER_PAYLOADS)
def test_hostile_tokenizer_folders_run_no_code(tmp_path: Path, mark: Path, name: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(module_text(mark))
    (folder / "tokenization_evil.py").write_text(module_text(mark))
    Tokenizer(WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")).save(
        str(folder / "tokenizer.json")
    )
    config = {"eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(config | TOKENIZER_PAYLOADS[name]).replace("MARK", str(mark))
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": AUTO}))
    for pickled in ("tokenizer.pkl", "tokenizer.bin", "vocab.pt"):
        (folder / pickled).write_bytes(pickle.dumps(Bomb(mark)))

    def work() -> None:
        opened = load_tokenizer(folder)
        opened.decode(opened.encode("a a"))
        opened.save(tmp_path / "again")

    attempt(work)
    assert not mark.exists()
    assert not any(module.startswith(("evil", "tokenization_evil")) for module in sys.modules)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x0a" * 100, b"PK\x03\x04"])
def test_pickle_as_sentencepiece_model(tmp_path: Path, mark: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content + pickle.dumps(Bomb(mark)))
    assert attempt(lambda: load_tokenizer(path)) != "opened"
    assert not mark.exists()


def a_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    saves = checkpoints(folder / "checkpoints")
    tensor = torch.zeros(2)
    saves.save(1, tensors=whole([("model", "w", None, tensor)]), state=state)
    saves.wait(final=True)
    return folder / "checkpoints" / "step-00000001"


STATE_PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "a factory of the system": lambda mark: {
        "kind": "factory",
        "factory": "os:system",
        "arguments": {"command": f"touch {mark}"},
    },
    "a factory of subprocess": lambda mark: {
        "kind": "factory",
        "factory": "subprocess:run",
        "arguments": {"args": ["touch", str(mark)]},
    },
    "a factory beside it": lambda mark: {"kind": "factory", "factory": "evil:Evil", "arguments": {}},
    "an unsafe config": lambda mark: {
        "kind": "transformers",
        "config": TINY | {"_attn_implementation_internal": "evil/kernel"},
        "real_vocab_size": 64,
    },
    "an unknown type": lambda mark: {
        "kind": "transformers",
        "config": TINY | {"model_type": "evil", "auto_map": AUTO},
        "real_vocab_size": 64,
    },
    "nothing": lambda mark: {},
    "a list": lambda mark: {"kind": "transformers", "config": [], "real_vocab_size": 64},
}


@pytest.mark.parametrize("name", STATE_PAYLOADS)
def test_hostile_checkpoint_states_run_no_code(
    tmp_path: Path, mark: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(module_text(mark))
    path = a_checkpoint(tmp_path / "run", {"model": STATE_PAYLOADS[name](mark)})
    for given in (path, tmp_path / "run"):
        assert attempt(lambda given=given: load.load_model(given, device="cpu")) != "opened"
    assert not mark.exists()


def test_only_the_factory_named_by_the_user_runs(tmp_path: Path, mark: Path) -> None:
    description = STATE_PAYLOADS["a factory of the system"](mark)
    with pytest.raises(RequestError, match=r"--factory os:system"):
        load.empty_model(description)
    with pytest.raises(RequestError, match=r"--factory os:system"):
        load.empty_model(description, factory="torch.nn:Linear")
    built = load.empty_model(
        {"kind": "factory", "factory": "torch.nn:Linear", "arguments": {"in_features": 1, "out_features": 1}},
        factory="torch.nn:Linear",
    )
    assert isinstance(built, torch.nn.Linear)
    assert not mark.exists()


def _pickle_as(name: str) -> Callable[[Path, Path], None]:
    def hurt(folder: Path, mark: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))

    return hurt


def _torch_archive(folder: Path, mark: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
        archive.writestr("archive/version", "3")


def _signed(folder: Path, mark: Path) -> None:
    """The attacker computes the hashes as well."""
    import hashlib

    data = pickle.dumps(Bomb(mark))
    (folder / "model.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["model.safetensors"] = entry
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


def _signed_state(folder: Path, mark: Path) -> None:
    import hashlib

    data = b"[" * 100_000
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


FOLDER_PAYLOADS: dict[str, Callable[[Path, Path], None]] = {
    "training_args.bin": _pickle_as("training_args.bin"),
    "optimizer.pt": _pickle_as("optimizer.pt"),
    "rng_state.pth": _pickle_as("rng_state.pth"),
    ".metadata of DCP": _pickle_as(".metadata"),
    "a pickle for a manifest": _pickle_as("manifest.json"),
    "a pickle for a state": _pickle_as("state.json"),
    "a pickle for weights": _pickle_as("model.safetensors"),
    "an archive of torch for weights": _torch_archive,
    "with matching hashes": _signed,
    "a state without end": _signed_state,
    "a script": lambda folder, mark: (folder / "sitecustomize.py").write_text(module_text(mark)) and None,
}


@pytest.mark.parametrize("name", FOLDER_PAYLOADS)
def test_hostile_checkpoint_folders_run_no_code(
    tmp_path: Path, mark: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_checkpoint(tmp_path / "run", {})
    FOLDER_PAYLOADS[name](path, mark)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    monkeypatch.chdir(path)
    for work in (
        lambda: writer.open_checkpoint(path, verify_bytes=True),
        lambda: writer.open_checkpoint(copy),
        lambda: writer.find(path.parent, repair=False, note=lambda _: None),
        lambda: writer.find(path.parent, note=lambda _: None),
        lambda: writer.listing(path.parent, verify_bytes=True),
    ):
        attempt(work)
    assert attempt(lambda: writer.open_checkpoint(copy)) != "opened"
    assert not mark.exists()


# ---- configurations that ask for the impossible -------------------------------------------------------------

HUGE: dict[str, dict[str, Any]] = {
    "ten million layers": {"n_layer": 10_000_000},
    "a billion layers": {"n_layer": 1_000_000_000},
    "a vocabulary of terabytes": {"vocab_size": 10**12},
    "a context of terabytes": {"n_positions": 10**12},
    "a width of petabytes": {"n_embd": 10**9},
    "more layers than there are weights": {"n_layer": 3},
    "no heads": {"n_head": 0},
    "a negative width": {"n_embd": -4},
    "text for a number": {"n_layer": "many"},
    "null": {"n_embd": None},
    "a list": {"n_head": [1]},
}


def tiny_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    values = {key: value for key, value in TINY.items() if key != "model_type"}
    return GPT2LMHeadModel(GPT2Config(**values))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HUGE)
def test_impossible_configuration_in_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing of the size that the configuration names is built or allocated."""
    model = tiny_model()
    tensors = [("model", key, None, value.detach()) for key, value in model.named_parameters()]
    description = load.describe(model)
    description["config"] |= HUGE[name]
    saves = checkpoints(tmp_path / "checkpoints")
    saves.save(
        1,
        tensors=whole(tensors),
        state={"model": description},
    )
    saves.wait(final=True)
    assert attempt(lambda: load.load_model(tmp_path, device="cpu")) != "opened"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HUGE)
def test_impossible_configuration_in_an_export_is_refused(tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert attempt(lambda: load.open_export(tmp_path)) == "opened"
    (tmp_path / "config.json").write_text(json.dumps(values | HUGE[name]))
    assert attempt(lambda: load.open_export(tmp_path)) != "opened"


EXPORT_DAMAGES: dict[str, tuple[str, bytes]] = {
    "config is empty": ("config.json", b""),
    "config is a list": ("config.json", b"[]"),
    "config is deep": ("config.json", b"[" * 100_000),
    "config is not UTF-8": ("config.json", b"\xff\xfe{"),
    "config without a type": ("config.json", b"{}"),
    "config of a type that is a list": ("config.json", b'{"model_type": ["gpt2"]}'),
    "weights are empty": ("model.safetensors", b""),
    "weights are text": ("model.safetensors", b"hello, this is no file of tensors"),
    "index of weights is a list": ("model.safetensors.index.json", b"[]"),
    "weight_map is a list": ("model.safetensors.index.json", b'{"weight_map": []}'),
    "weight_map is missing": ("model.safetensors.index.json", b"{}"),
    "index is deep": ("model.safetensors.index.json", b'{"weight_map":' * 50_000),
    "generation config is a list": ("generation_config.json", b"[1]"),
    "record is a list": ("lmcore_export.json", b"[]"),
    "record is deep": ("lmcore_export.json", b"[" * 100_000),
    "record of other files": ("lmcore_export.json", b'{"files": {"../x": "0"}}'),
}


@pytest.mark.parametrize("name", EXPORT_DAMAGES)
def test_damaged_export_is_one_line(tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    file, content = EXPORT_DAMAGES[name]
    if file.endswith(".index.json"):
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / file).write_bytes(content)
    said = attempt(lambda: load.load_model(tmp_path, device="cpu"))
    assert said != "opened"
    assert "\n" not in said


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json", "other"])
def test_fifo_in_an_export_is_refused(tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "neither a file nor a folder" in attempt(lambda: load.load_model(tmp_path, device="cpu"))


TOKENIZER_DAMAGES: dict[str, dict[str, bytes]] = {
    "deep": {"tokenizer.json": b'{"a":' * 50_000},
    "a class that opens itself": {"tokenizer_config.json": b'{"tokenizer_class": "AutoTokenizer"}'},
    "a list for a configuration": {"tokenizer_config.json": b"[]"},
    "a record that is none": {"lmcore_tokenizer.json": b"[]", "tokenizer.model": b"x"},
    "a record that is cut": {"lmcore_tokenizer.json": b"{", "tokenizer.model": b"x"},
}


@pytest.mark.parametrize("name", TOKENIZER_DAMAGES)
def test_damaged_tokenizer_of_an_export_is_one_line(tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    for file, content in TOKENIZER_DAMAGES[name].items():
        (tmp_path / file).write_bytes(content)
    said = attempt(lambda: load.load_model(tmp_path, device="cpu"))
    assert said != "opened"
    assert "\n" not in said


# ---- configurations of run folders --------------------------------------------------------------------------


def run_folder(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text('{"kind": "event", "event": "start", "step": 0}\n')
    return folder


@pytest.mark.parametrize("option", CODE)
def test_code_named_by_a_run_folder_runs_only_if_the_user_names_it(
    tmp_path: Path, mark: Path, option: str
) -> None:
    section, _, key = option.partition(".")
    other = "" if section == "data" else "data: {train: [a.txt]}\n"
    run = run_folder(
        tmp_path / "run", f"{other}{section}:\n  {key}: os:system\n  config: {{command: touch {mark}}}\n"
    )
    for trusted in ((), ("os:popen",)):
        with pytest.raises(
            RequestError, match=rf"{option} is 'os:system', which is code.*--factory os:system"
        ):
            read_run_config(run, trusted=trusted)
    assert read_run_config(run, trusted=("os:system",)).run_dir
    assert not mark.exists()


@pytest.mark.parametrize("words", [["order", "RUN", "--step", "1"], ["report", "RUN"], ["checkpoints", "RUN"],
                                   ["generate", "RUN", "--prompt", "x"], ["export", "RUN"],
                                   ["evaluate", "RUN", "--data", "RUN/metrics.jsonl"]])  # fmt: skip
def test_commands_run_no_code_of_a_run_folder(tmp_path: Path, mark: Path, words: list[str]) -> None:
    run = run_folder(
        tmp_path / "run",
        f"data: {{factory: 'os:system', config: {{command: 'touch {mark}'}}}}\nmodel: {{factory: 'os:system'}}\n",
    )
    (run / "checkpoints").mkdir()
    attempt(lambda: main([*(word.replace("RUN", str(run)) for word in words), "--debug"]))
    assert not mark.exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)
"""A thousand bytes that stand for 9 to the 10th power of values."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", [BOMB, "[" * 5_000, "run_dir: [", "\x00", "- a\n", "!!python/object:os.system {}"]
)
def test_hostile_config_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    runs = [run_folder(tmp_path / name, text) for name in "ab"]
    with pytest.raises(RequestError) as refused:
        read_run_config(runs[0])
    assert "\n" not in str(refused.value)
    attempt(lambda: main(["report", *map(str, runs), "--out", str(tmp_path / "out.html"), "--debug"]))
