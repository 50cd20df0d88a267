"""The programs that the benchmarks compare, each in a process of its own that waits at the top of every step.

    python benchmarks/contestants.py NAME 'JSON settings' READ_FD WRITE_FD        (started by Contestant)

A process of its own, because an allocator's settings, a compiler's cache and thread pools belong to a process. The
parent lets one run some steps, then another, in turn; the one that waits does nothing. A step is timed from the top
of one to the top of a later one, so that everything between them counts: data, logging, checks, the update.

- ``train_lm``       the real script, its own loop, its own report; nothing is replaced but the wait
- ``bare``           a hand-written loop around the same ModelWithLoss, with the same kernels and nothing else
- ``trainer``        transformers.Trainer as in run_clm.py, with this precision and fused AdamW
- ``trainer_default`` the same as it ships: float32, no compilation, its own defaults
- ``nanogpt``        a nanoGPT-style script: transformers' model and its loss, fused AdamW, ``loss.item()`` when logging
- ``documents``      no model: a step is one reading of all documents of a text
- ``blocks``         no model: a step is a global batch of blocks of a text, tokenized as they are needed
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64},
    # nanoGPT's character-level model for a CPU (0.8 million parameters; it trains on 12 blocks of 64)
    "character": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "demo": {"n_layer": 8, "n_head": 6, "n_embd": 192},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
}
LEAST_BPE_VOCAB = 300
"""Below this the vocabulary is of characters: a byte-level one has 256 pieces for the bytes alone."""
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEFAULTS: dict[str, Any] = {
    "model": "demo",
    "blocks": 8,
    "tokens": 256,
    "vocab": 8000,
    "precision": "bf16",
    "compile": False,
    "accumulation": 1,
    "options": {},
    "core": None,
}


class Contestant:
    """The parent's end: starts the process, and lets it run steps."""

    def __init__(
        self, name: str, settings: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        theirs, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / f"{name}.log"
        self.name = name
        own_settings = json.dumps(DEFAULTS | settings)
        command = [sys.executable, __file__, name, own_settings, str(theirs), str(theirs_out)]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs, theirs_out),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder.name,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            )
        os.close(theirs)
        os.close(theirs_out)
        self._to, self._from = os.fdopen(ours_out, "w"), os.fdopen(ours_in)

    def run(self, steps: int) -> dict[str, float]:
        """Let it make ``steps`` steps: ``seconds``, ``cpu_seconds`` and page ``faults`` of all of them together."""
        try:
            print(steps, file=self._to, flush=True)
            line = self._from.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def alternate(
    cases: Sequence[tuple[str, str, dict[str, Any], dict[str, str]]],
    settings: dict[str, Any],
    *,
    launches: int,
    rounds: int,
    steps: int,
    warmup: int,
    after_turn: Callable[[str, int], None] = lambda label, launch: None,
) -> dict[str, list[dict[str, float]]]:
    """Let programs run in turn; {label: what :meth:`Contestant.run` gave for each of the turns}.

    Args:
        cases: (label, program, own settings, environment) of each.
        launches: how often all are started anew, in the other order each time; they share the rounds.
        warmup: first steps of a launch that are not counted.
        after_turn: called with the label and the number of the launch; not timed.
    """
    measured: dict[str, list[dict[str, float]]] = {case[0]: [] for case in cases}
    for launch in range(launches):
        order = cases if launch % 2 == 0 else cases[::-1]
        running = {
            label: Contestant(name, settings | own | {"launch": launch}, env)
            for label, name, own, env in order
        }
        try:
            for label, _, own, _ in order:
                running[label].run(warmup)
                if "earlier_steps" in own:  # so many times what each of the others will have done
                    running[label].run(own["earlier_steps"] * steps * rounds // launches)
            # The shares of the launches add up to all rounds.
            for turn in range(launch, rounds, launches):
                for label in list(running) if turn % 2 == 0 else reversed(list(running)):
                    measured[label].append(running[label].run(steps))
                    after_turn(label, launch)
        finally:
            for contestant in running.values():
                contestant.close()
    return measured


class Gate:
    """The child's end: called at the top of every step."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._from, self._to = os.fdopen(read_fd), os.fdopen(write_fd, "w")
        self._left = 0
        self._since: tuple[float, float, int] | None = None

    @staticmethod
    def _now() -> tuple[float, float, int]:
        import resource

        if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
            torch.cuda.synchronize()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        if self._left == 0:
            if self._since is not None:
                seconds, cpu, faults = (b - a for a, b in zip(self._since, self._now()))
                answer = {"seconds": seconds, "cpu_seconds": cpu, "faults": faults}
                print(json.dumps(answer), file=self._to, flush=True)
            line = self._from.readline()
            if not line:
                os._exit(0)
            self._left, self._since = int(line), self._now()
        self._left -= 1


def train_lm(s: dict[str, Any], gate: Gate) -> None:
    """The script itself. Its loop calls the engine's set_learning_rate first in every step."""
    from lmcore.engine.engine import Engine

    original = Engine.set_learning_rate

    def waits(self: Engine, learning_rate: float) -> None:
        gate()
        original(self, learning_rate)

    Engine.set_learning_rate = waits
    config = MODELS[s["model"]] | NO_DROPOUT | {"n_positions": s["tokens"]}
    extra: list[str] = []
    if s.get("corpus_times"):
        longer = Path("longer.bin").absolute()
        with longer.open("wb") as file:
            for _ in range(s["corpus_times"]):
                train_tokens(s).tofile(file)
        extra += ["--data.train", str(longer), "--data.valid_fraction", "0"]
    options = {
        "run_dir": "run",
        "data.block_size": s["tokens"],
        "tokenizer.path": corpus(s["vocab"]) / "tokenizer",
        "model.type": "gpt2",
        "optim.name": "adamw",
        "train.global_batch_blocks": s["blocks"] * s["accumulation"],
        "train.micro_batch_blocks": s["blocks"],
        "train.duration": "100000 steps",
        "optim.lr": 3e-4,
        "optim.schedule": "constant",
        "optim.warmup": "never",
        "train.precision": s["precision"],
        "train.compile": str(s["compile"]).lower(),
        "evaluate.every": "never",
        "checkpoint.every": s.get("save_every", "never"),
        "report.every": "100 steps",
        "data.store_dir": corpus(s["vocab"]),
        **{f"model.config.{key}": value for key, value in config.items()},
        **{key: str(value).format(**s) for key, value in s["options"].items()},
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    sys.argv = [str(ROOT / "train_lm.py"), *words, *extra]
    if s.get("resume"):  # another process makes a checkpoint, and this one goes on from it
        first = [*sys.argv, "--train.duration=5 steps", "--evaluate.at_end=false"]
        subprocess.run([sys.executable, *first], check=True)
        sys.argv.append("--allow_changes=train.duration")
    os.environ["ACCELERATE_USE_CPU"] = os.environ.get("ACCELERATE_USE_CPU", "true")
    runpy.run_path(sys.argv[0], run_name="__main__")


def documents(s: dict[str, Any], gate: Gate) -> None:
    """Reads ``s["text"]`` as it is read for a token store, part by part."""
    from lmcore.data.text import documents as text

    [source] = text.resolve_sources([s["text"]])
    while True:
        gate()
        count = sum(1 for part in text.parts(source) for _ in text.read(source, part, bad=print))
        assert count > 0, s["text"]


def blocks(s: dict[str, Any], gate: Gate) -> None:
    """Streams ``s["text"]``: reading, tokenizing and shuffling, as a run with ``data.mode stream``."""
    from lmcore.data.batches import Batches
    from lmcore.data.stream import StreamDataset
    from lmcore.data.text import documents as text
    from lmcore.data.tokenizer.tokenizer import load_tokenizer

    [source] = text.resolve_sources([s["text"]])
    tokenizer = load_tokenizer(corpus(s["vocab"]) / "tokenizer")
    size = s["blocks"]
    dataset = StreamDataset([source], tokenizer, block_size=s["tokens"], lanes=size, seed=1)
    for _ in Batches(dataset, cursor=dataset.new_cursor(), global_batch_blocks=size, micro_batch_blocks=size):
        gate()


def prepare_corpus(vocab: int) -> None:
    """Tokenizer and token store of the demo's corpus, once for all programs; call it before any of them starts.

    All read the same tokens: kernels take 2 to 3% longer over real text than over random numbers (docs/log.md).
    """
    command = [sys.executable, "-m", "lmcore", "prepare", "--run_dir", str(corpus(vocab))]
    options = [
        f"--tokenizer.vocab_size={vocab}",
        f"--data.store_dir={corpus(vocab)}",
        "--data.block_size=256",
    ]
    if vocab < LEAST_BPE_VOCAB:
        options += ["--tokenizer.model_type=char", "--tokenizer.byte_fallback=false"]
    subprocess.run(
        [*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def corpus(vocab: int) -> Path:
    """The folder of the tokenizer and the token stores that :func:`prepare_corpus` makes."""
    return Path(tempfile.gettempdir()) / f"benchmark-corpus-{vocab}"


def train_tokens(s: dict[str, Any]) -> Any:
    """The text that all programs train on, (N,) uint16."""
    return _stored_tokens(s["vocab"], "train")


def held_out_tokens(vocab: int) -> Any:
    """The demo's held-out text, (N,) uint16."""
    return _stored_tokens(vocab, "valid")


def _stored_tokens(vocab: int, split: str) -> Any:
    import numpy as np

    parts = sorted(corpus(vocab).glob(f"*{split}*/part-*.bin"))
    return np.concatenate([np.fromfile(part, dtype=np.uint16) for part in parts])


def _batches(s: dict[str, Any], device: Any) -> Any:
    """Random places of one array, as nanoGPT's ``get_batch`` has it."""
    import numpy as np
    import torch

    tokens, draw = train_tokens(s), np.random.default_rng(1)
    while True:
        starts = draw.integers(0, len(tokens) - s["tokens"] - 1, s["blocks"])
        rows = np.stack([tokens[start : start + s["tokens"] + 1] for start in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def bare(s: dict[str, Any], gate: Gate) -> None:
    """The same module, kernels, optimizer and memory setting, and no more than a loop needs."""
    import torch

    from lmcore.engine.allocator import keep_freed_memory
    from lmcore.model import build, optim
    from lmcore.model import module as model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    config = MODELS[s["model"]] | NO_DROPOUT | {"n_positions": s["tokens"]}
    built = build.build_model(
        type="gpt2", config_overrides=config, vocab_size=s["vocab"], block_size=s["tokens"], seed=0
    )
    module = model.ModelWithLoss(built.to(device))
    if s["compile"]:
        model.compile_regions(module)
    groups = optim.parameter_groups(built.named_parameters(), weight_decay=0.1)
    optimizer: Any = optim.build_optimizer("adamw", groups, lr=3e-4)
    parameters = [p for g in groups for p in g["params"]]
    batches = _batches(s, device)
    while True:
        gate()
        for _ in range(s["accumulation"]):
            inputs, labels = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=s["precision"] == "bf16"):
                loss_sum, _ = module(input_ids=inputs, labels=labels)
            (loss_sum / (labels.numel() * s["accumulation"])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def plain_gpt2(s: dict[str, Any], padded: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocab = -(-s["vocab"] // 64) * 64 if padded else s["vocab"]
    config = GPT2Config(**MODELS[s["model"]], **NO_DROPOUT, vocab_size=vocab, n_positions=s["tokens"])
    config.use_cache = False
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def nanogpt(s: dict[str, Any], gate: Gate) -> None:
    """nanoGPT's train.py around transformers' GPT-2: the whole model compiled, its own loss, AdamW fused."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw = plain_gpt2(s, padded=True).to(device).train()
    decay = [p for p in raw.parameters() if p.ndim >= 2]
    rest = [p for p in raw.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    net = torch.compile(raw) if s["compile"] else raw
    batches = _batches(s, device)
    step = 0
    while True:
        gate()
        for _ in range(s["accumulation"]):
            inputs, labels = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=s["precision"] == "bf16"):
                logits = net(input_ids=inputs).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            (loss / s["accumulation"]).backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:  # nanoGPT's log_interval is 1 in some configs and 10 in the default
            loss.item()
        step += 1


def _trainer(s: dict[str, Any], gate: Gate, **arguments: Any) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = torch.from_numpy(train_tokens(s).astype("int64"))

    class Blocks(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(tokens) // s["tokens"]

        def __getitem__(self, index: int) -> dict[str, Any]:
            block = tokens[index * s["tokens"] : (index + 1) * s["tokens"]]
            return {"input_ids": block, "labels": block}

    class Waits(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gate()

    training = TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=s["blocks"],
        gradient_accumulation_steps=s["accumulation"],
        max_steps=100_000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    Trainer(
        model=plain_gpt2(s, padded=False), args=training, train_dataset=Blocks(), callbacks=[Waits()]
    ).train()


def trainer(s: dict[str, Any], gate: Gate) -> None:
    """Trainer with this precision and optimizer; its best documented settings otherwise."""
    import torch

    _trainer(
        s,
        gate,
        optim="adamw_torch_fused",
        bf16=s["precision"] == "bf16",
        logging_steps=100,
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=s["compile"] and torch.cuda.is_available(),
    )


def trainer_default(s: dict[str, Any], gate: Gate) -> None:
    """Trainer as it ships."""
    _trainer(s, gate)


if __name__ == "__main__":
    name, settings, read_fd, write_fd = sys.argv[1:]
    programs = (train_lm, bare, nanogpt, trainer, trainer_default, documents, blocks)
    here, chosen = {f.__name__: f for f in programs}, json.loads(settings)
    if chosen["core"] is not None:  # before any thread starts
        os.sched_setaffinity(0, {chosen["core"]})
    here[name](chosen, Gate(int(read_fd), int(write_fd)))
