"""Everything that is to be known of one machine with GPUs, in one call of less than 8 minutes.

    python benchmarks/gpu.py              # writes results/gpu.json and two tables
    python benchmarks/gpu.py --tiny       # proves the script itself: tiny models, on a CPU, every line of it

Speed: train_lm.py itself (a process of its own; its metrics.jsonl says how fast it was) on GPT-2 124M, 350M and 1.5B at 1,024
tokens, a Llama-shaped 1B at 4,096, and with several GPUs blocks of 8,192 tokens a GPU by context parallelism. Beside it
transformers' Trainer at its best and a nanoGPT-style loop, compiled. torch 2.13 lets transformers build a mask of T x T inside a
graph, which turns off the fast kernels: here both go without, as nanoGPT does.

Correctness: documents by variable lengths against each document alone, the softcapped head, Muon's update, FSDP2 with its
state on the host, ZeRO-2, a resume bit for bit, and the peak of the memory against the plan of the run.

The order is that of importance: train_lm.py on the first model, the checks (side by side, because nothing in them is timed),
train_lm.py on the other models, the rest. After each row the results so far are written, so that nothing is lost if the call is
ended from outside. A row is ended after --row_seconds, and what does not fit into --seconds is listed as not measured. FLOPs of
a token, forward and backward: 6 N + 12 L d T (lmcore/plan/plan.py); the peak is that of the data sheet for dense bfloat16
products.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import psutil

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, **NO_DROPOUT}
TINY_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WARM_UP, INTERVAL, INTERVALS = 10, 5, 3
"""Steps before the measurement; steps of a line of metrics.jsonl; how many lines count."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained. ``goal``: tokens/s on one H200."""

    type: str
    fields: dict[str, Any]
    vocab: int
    tokens: int
    blocks: int
    accumulation: int
    goal: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


FULL = {
    "GPT-2 124M": Case(
        type="gpt2", fields=NO_DROPOUT, vocab=50257, tokens=1024, blocks=64, accumulation=8, goal=550_000
    ),
    "GPT-2 350M": Case(
        type="gpt2",
        fields={"n_layer": 24, "n_embd": 1024, "n_head": 16, **NO_DROPOUT},
        vocab=50257,
        tokens=1024,
        blocks=64,
        accumulation=2,
        goal=210_000,
    ),
    "GPT-2 1.5B": Case(
        type="gpt2",
        fields={"n_layer": 48, "n_embd": 1600, "n_head": 25, **NO_DROPOUT},
        vocab=50257,
        tokens=1024,
        blocks=16,
        accumulation=2,
        goal=50_000,
    ),
    "Llama 1B": Case(
        type="llama", fields=LLAMA_1B, vocab=128256, tokens=4096, blocks=4, accumulation=2, goal=54_000
    ),
}
TINY = {
    "GPT-2 tiny": Case(type="gpt2", fields=TINY_GPT2, vocab=300, tokens=32, blocks=2, accumulation=2, goal=1),
    "Llama tiny": Case(type="llama", fields=TINY_LLAMA, vocab=400, tokens=32, blocks=2, accumulation=1),
}


# ---- what the models read ----------------------------------------------------------------------------------


def sequences(vocab: int, tokens: int, count: int) -> Any:
    """(count x (tokens + 1),) numbers that go on by a step of each row's own: a model learns them in a few steps.

    The first id is that of a document's end: each row is a document or two.
    """
    import numpy as np

    draw = np.random.default_rng(1)
    start, by = draw.integers(0, 256, (count, 1)), draw.integers(1, 8, (count, 1))
    rows = 1 + (start + by * np.arange(tokens + 1)) % min(vocab - 1, 256)
    rows[:, -1] = 0
    rows[np.arange(count), draw.integers(tokens // 4, tokens, count)] = 0
    return rows.reshape(-1).astype(np.uint32)


def write_tokenizer(folder: Path, vocab: int) -> Path:
    """A byte-level BPE tokenizer of exactly ``vocab`` pieces: the end of a document, the bytes, and merges of them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = ["<|endoftext|>", *letters], []
    firsts = list(letters)
    for first in firsts:  # pairs of bytes, then triples
        for second in letters:
            if len(pieces) == vocab:
                break
            merges.append((first, second))
            pieces.append(first + second)
            firsts.append(first + second)
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# ---- train_lm.py itself ------------------------------------------------------------------------------------


class Workplace:
    """A folder for the runs, and the time that is left."""

    def __init__(self, folder: Path, seconds: float, *, cuda: bool, gpus: int) -> None:
        self.folder, self.cuda, self.gpus = folder, cuda, gpus
        self._end = time.monotonic() + seconds
        self._of_thread = threading.local()
        self._runs = itertools.count(1)
        self.preparing = threading.Lock()

    @property
    def seconds_left(self) -> float:
        """Of the whole call, or of the row that this thread runs if that ends earlier."""
        return min(self._end, getattr(self._of_thread, "end", math.inf)) - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the time of the whole call is up."""
        return self._end < time.monotonic()

    @contextlib.contextmanager
    def row(self, seconds: float, **variables: str) -> Iterator[None]:
        """In this context what this thread calls has these environment variables and is ended after ``seconds``."""
        self._of_thread.__dict__.update(end=time.monotonic() + seconds, variables=variables)
        try:
            yield
        finally:
            self._of_thread.__dict__.clear()

    def run_dir(self) -> Path:
        return self.folder / f"run-{next(self._runs)}"

    def call(self, command: list[str], until: Callable[[], bool] | None = None, **variables: str) -> str:
        """What a process prints; raises with its last lines, or when the time is up. ``until``: it is killed as soon as this holds."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                **getattr(self._of_thread, "variables", {}),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if until is not None and until():
                        kill_all(process)
                        return ""
                    if self.seconds_left < 0:
                        raise
        except BaseException as error:
            said = kill_all(process)
            if isinstance(error, subprocess.TimeoutExpired):
                error.output = said
            raise
        if process.returncode:
            text = stdout + stderr
            said = [line for line in text.splitlines() if line.startswith("train_lm.py: ")]
            raise RuntimeError("\n".join([*dict.fromkeys(said), text[-2000:]]))
        return stdout

    def child(self, name: str, argument: Any) -> Any:
        """One of :data:`CHILDREN` in a process of its own, which gives all of its memory back.

        It sees one GPU: transformers' Trainer takes all that it sees, with a batch for each.
        """
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = [sys.executable, __file__, "--child", name, json.dumps(argument)]
        return json.loads(self.call(command, CUDA_VISIBLE_DEVICES=first).splitlines()[-1])


def kill_all(process: subprocess.Popen[str]) -> str:
    """A launcher and all that it has started: that would go on, on the GPU and in the folder that is removed in the end.

    Returns what it has printed."""
    started = psutil.Process(process.pid).children(recursive=True)
    for one in [*started, process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    stdout, stderr = process.communicate()
    psutil.wait_procs(started)  # their memory on the GPU is given back
    return stdout + stderr


def launcher(work: Workplace, name: str, processes: int = 1, *more: str) -> list[str]:
    """``accelerate launch`` with this file of accelerate_configs/; on a CPU with cpu.yaml instead of those for GPUs.

    On one GPU without a launcher, which would import torch only to start one process that does so again.
    """
    if work.cuda and name == "gpu":
        return [sys.executable]
    if not work.cuda and name in ("gpu", "fsdp2"):
        name, more = "cpu", ()
    file = ROOT / "accelerate_configs" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*command, "--num_processes", str(processes), *more]


def train_lm(
    work: Workplace,
    case: Case,
    *,
    steps: int,
    launch: list[str] | None = None,
    run_dir: Path | None = None,
    until: Callable[[Path], bool] | None = None,
    **options: Any,
) -> Path:
    """A run of train_lm.py; its folder. ``options`` with ``__`` for the dots; ``until`` of its folder as in Workplace.call."""
    import numpy as np

    tokenizer = work.folder / f"tokenizer-{case.vocab}"
    data = work.folder / f"tokens-{case.vocab}-{case.tokens}.npy"
    with work.preparing:  # checks run side by side
        if not tokenizer.exists():
            write_tokenizer(tokenizer, case.vocab)
        if not data.exists():
            np.save(data, sequences(case.vocab, case.tokens, max(64, 4_000_000 // case.tokens)))
    run_dir = run_dir or work.run_dir()
    words = {
        "run_dir": run_dir,
        "data.train": data,
        "data.valid_fraction": 0,
        "data.store_dir": work.folder / "stores",
        "data.block_size": case.tokens,
        "tokenizer.path": tokenizer,
        "model.type": case.type,
        **{f"model.config.{name}": json.dumps(value) for name, value in case.fields.items()},
        "train.duration": f"{steps} steps",
        "train.global_batch_blocks": case.blocks * case.accumulation,
        "train.micro_batch_blocks": case.blocks,
        "train.precision": "bf16",
        "optim.lr": 3e-4,
        "evaluate.every": "never",
        "evaluate.at_end": "false",
        "evaluate.prompts": "[]",
        "checkpoint.every": "never",
        "report.every": f"{INTERVAL} steps",
        "report.trackers": "[]",
        **case.extra,
        **{name.replace("__", "."): value for name, value in options.items()},
    }
    command = launch or launcher(work, "gpu")
    command = [*command, str(ROOT / "train_lm.py"), *(f"--{name}={value}" for name, value in words.items())]
    work.call(command, until and (lambda: until(run_dir)))
    return run_dir


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # without one that is being written
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def measure_train_lm(work: Workplace, case: Case, **options: Any) -> dict[str, Any]:
    """Tokens/s of the lines after the warm-up, by train_lm.py's own clock, and what its plan and its peak were."""
    start = time.monotonic()
    steps = WARM_UP + INTERVAL * INTERVALS

    def measured_all(run_dir: Path) -> bool:
        return (run_dir / "metrics.jsonl").exists() and any(r["step"] >= steps for r in records(run_dir))

    # Stopped before its end: the last checkpoint and the export of the largest model are 25 GB that nobody reads.
    run_dir = train_lm(work, case, steps=10 * steps, until=measured_all, **options)
    lines = [line for line in records(run_dir) if line["step"] <= steps]
    (begun,) = (event for event in records(run_dir, "event") if event["event"] == "start")
    measured = [line["tokens_per_second"] for line in lines if line["step"] > WARM_UP]
    assert len(measured) == INTERVALS, [line["step"] for line in lines]
    found = {
        "tokens_per_second": common.spread(measured),
        # Of tensors, as the plan and the others count it, not what the allocator has reserved
        "peak_bytes": max(line["tensor_bytes"] for line in lines),
        "planned_bytes": begun["plan"].get("memory_bytes"),
        "losses": [line["loss"] for line in lines],
        "seconds_in_all": time.monotonic() - start,
    }
    tables = sorted((run_dir / "profile").glob("*.txt"))
    if tables:
        found["slowest_kernels"] = tables[0].read_text().splitlines()
    shutil.rmtree(run_dir)
    return found


# ---- the others, each in a process of its own --------------------------------------------------------------


def without_masks(kind: str) -> None:
    """Let transformers make no mask: its attention is then causal by a flag, which the fast kernels take."""
    import importlib

    modeling: Any = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    modeling.create_causal_mask = lambda **_: None


def config_fields(case: Case) -> dict[str, Any]:
    """Fields of the model's config, with room for the case's blocks."""
    positions = "n_positions" if case.type == "gpt2" else "max_position_embeddings"
    return {positions: case.tokens, **case.fields}


def plain_model(case: Case) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    without_masks(case.type)
    padded = -(-case.vocab // 64) * 64
    special = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    config = AutoConfig.for_model(case.type, vocab_size=padded, **special, **config_fields(case))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def blocks_of(case: Case) -> Any:
    import torch

    rows = sequences(case.vocab, case.tokens, max(case.blocks, 4_000_000 // case.tokens)).astype("int64")
    return torch.from_numpy(rows).view(-1, case.tokens + 1)


class Turns:
    """The time of steps, by the device: call at the top of every step."""

    def __init__(self, case: Case, device: Any) -> None:
        self._device, self._step, self._times = device, 0, []
        self._tokens = case.tokens * case.blocks * case.accumulation * INTERVAL
        self.steps = WARM_UP + INTERVAL * INTERVALS + 1

    def __call__(self) -> None:
        import torch

        if self._step >= WARM_UP and (self._step - WARM_UP) % INTERVAL == 0:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self._times.append(time.perf_counter())
        self._step += 1

    def result(self, losses: list[float]) -> dict[str, Any]:
        import torch

        seconds = [b - a for a, b in zip(self._times, self._times[1:])]
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None
        rates = common.spread([self._tokens / one for one in seconds])
        return {"tokens_per_second": rates, "peak_bytes": peak, "losses": losses}


def device_here() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def child_nanogpt(argument: dict[str, Any]) -> dict[str, Any]:
    """nanoGPT's train.py: the whole model compiled with its loss over a padded vocabulary, fused AdamW, clipping."""
    import torch
    from torch.nn.functional import cross_entropy

    case, device = Case(**argument["case"]), device_here()
    torch.set_float32_matmul_precision("high")
    raw = plain_model(case).to(device).train()
    decay = [p for p in raw.parameters() if p.ndim >= 2]
    rest = [p for p in raw.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    # Compiled with the model, as in nanoGPT: outside it would take a sixth of the step, by its memory traffic.
    def loss_of(ids: Any) -> Any:
        logits = raw(input_ids=ids[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    net = torch.compile(loss_of) if argument["compiled"] else loss_of
    data = blocks_of(case)
    data = data.pin_memory() if device.type == "cuda" else data
    turns, losses, at = Turns(case, device), [], 0
    for step in range(turns.steps):
        turns()
        for _ in range(case.accumulation):
            at = (at + case.blocks) % (len(data) - case.blocks + 1)
            ids = data[at : at + case.blocks].to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = net(ids)
            (loss / case.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % INTERVAL == 0:
            losses.append(loss.item())
    return turns.result(losses)


def child_trainer(argument: dict[str, Any]) -> dict[str, Any]:
    """transformers' Trainer with its best documented settings."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    case, device = Case(**argument["case"]), device_here()
    data, turns = blocks_of(case), Turns(case, device)

    class Blocks(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": data[index, :-1], "labels": data[index, :-1]}  # the model shifts them

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.blocks,
            gradient_accumulation_steps=case.accumulation,
            max_steps=turns.steps,
            learning_rate=3e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            optim="adamw_torch_fused",
            bf16=True,
            tf32=True if device.type == "cuda" else None,
            torch_compile=argument["compiled"],
            dataloader_num_workers=4 if device.type == "cuda" else 0,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(model=plain_model(case), args=settings, train_dataset=Blocks(), callbacks=[Clock()])
        trainer.train()
    return turns.result([line["loss"] for line in trainer.state.log_history if "loss" in line])


def child_device(argument: dict[str, Any]) -> dict[str, Any]:
    """What the device is, the rate of one large bf16 product, and which attention kernels torch would take."""
    import torch

    from lmcore.plan import plan

    device, size = device_here(), argument["size"]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "name": name,
        "matrix_flops": best,
        "peak_flops": plan.peak_flops(name, "bf16"),
        "cudnn": torch.backends.cudnn.version(),
        "attention_priority": [int(one) for one in torch._C._get_sdp_priority_order()],
        "machine": common.machine(),  # not in the parent, which would hold memory of the GPU
    }


def child_flops(argument: dict[str, dict[str, Any]]) -> dict[str, int]:
    """FLOPs of a token of each case."""
    from lmcore.model.module import ModelWithLoss
    from lmcore.plan import plan, trace

    found = {}
    for name, fields in argument.items():
        case = Case(**fields)
        bare, probe = trace.build_on_meta(
            type=case.type, config_overrides=config_fields(case), vocab_size=case.vocab
        )
        counted = plan.model_flops_per_token(ModelWithLoss(bare, probe=probe), case.tokens)
        assert counted is not None
        found[name] = counted
    return found


# ---- correctness -------------------------------------------------------------------------------------------


def relative(ours: Any, theirs: Any) -> float:
    """The distance of two tensors over the size of the second."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def child_documents(_argument: Any) -> dict[str, Any]:
    """Two blocks of five documents in one call, against the documents one by one: loss and gradients, in bf16."""
    import numpy as np
    import torch

    from lmcore.data.context import Context
    from lmcore.model.build import build_model
    from lmcore.model.module import ModelWithLoss

    device, tokens = device_here(), 64
    found: dict[str, Any] = {}
    for kind, fields in (("gpt2", {**TINY_GPT2, "n_embd": 64}), ("llama", {**TINY_LLAMA, "hidden_size": 64})):
        built = build_model(type=kind, config_overrides=fields, vocab_size=300, block_size=tokens, seed=0)
        module = ModelWithLoss(built.to(device))
        ids = torch.randint(0, 300, (2, tokens + 1), generator=torch.Generator().manual_seed(1)).to(device)
        borders = [[0, 20, 41, tokens], [0, 33, tokens]]
        positions = np.concatenate(
            [np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(row)])[None] for row in borders]
        )
        lengths = Context(sequence_lengths=True).lengths(positions)
        batch = {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "position_ids": torch.from_numpy(positions).to(device),
            **{
                k: torch.from_numpy(v).to(device) if isinstance(v, np.ndarray) else v
                for k, v in lengths.items()
            },
        }
        results = []
        for parts in (
            [batch],
            [
                {"input_ids": ids[row : row + 1, a:b], "labels": ids[row : row + 1, a + 1 : b + 1]}
                for row, of_row in enumerate(borders)
                for a, b in itertools.pairwise(of_row)
            ],
        ):
            module.zero_grad()
            total = 0.0
            for part in parts:
                with torch.autocast(device.type, torch.bfloat16):
                    loss_sum, _ = module(**part)
                loss_sum.backward()
                total += float(loss_sum.detach())
            results.append((total, torch.cat([p.grad.flatten() for p in module.parameters()])))
        found[f"{kind} loss"] = abs(results[0][0] / results[1][0] - 1)
        found[f"{kind} gradient"] = relative(results[0][1], results[1][1])
    # Products of bf16 numbers (2^-9) in another order, over two layers.
    found["passed"] = all(value < (1e-3 if "loss" in name else 2e-2) for name, value in found.items())
    return found


def child_softcap(_argument: Any) -> dict[str, Any]:
    """The chunked head with a softcap, compiled and not, against all logits in float64."""
    import torch

    from lmcore.model.loss import causal_lm_loss, head_logits, token_losses

    device, generator = device_here(), torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device).bfloat16() for n in (500, 320))
    labels = torch.randint(0, 300, (500,), generator=generator).to(device)
    found: dict[str, Any] = {}
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = head_logits(exact[0] @ exact[1].t(), softcap=15.0)
    theirs = token_losses(logits, labels, vocab_size=300).sum()
    theirs.backward()
    for compiled in (False, True) if device.type == "cuda" else (False,):
        ours = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        loss, _ = causal_lm_loss(
            *ours, None, labels, chunk=128, softcap=15.0, vocab_size=300, compiled=compiled
        )
        loss.backward()
        way = "compiled" if compiled else "not compiled"
        found[f"{way} loss"] = abs(float(loss.detach()) / float(theirs.detach()) - 1)
        found[f"{way} gradient"] = max(relative(a.grad, b.grad) for a, b in zip(ours, exact))
    # Logits up to 15 are rounded to 2^-9 of themselves; losses average that out.
    found["passed"] = all(value < (1e-2 if "loss" in name else 3e-2) for name, value in found.items())
    return found


def child_muon(_argument: Any) -> dict[str, Any]:
    """One update of six matrices of two shapes, against torch.optim.Muon."""
    import torch

    from lmcore.model import optim

    device, generator = device_here(), torch.Generator().manual_seed(0)
    shapes = [(64, 64), (64, 192), (64, 64), (64, 192), (64, 64), (64, 192)]
    start = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    slopes = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in start] for _ in range(2))
    named = [(f"layer.{index}.weight", p) for index, p in enumerate(ours)]
    groups = optim.parameter_groups(named, weight_decay=0.1)
    mine = optim.build_optimizer("muon", groups, lr=0.01, momentum=0.95)
    torchs = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for parameters, optimizer in ((ours, mine), (theirs, torchs)):
        for parameter, slope in zip(parameters, slopes):
            parameter.grad = slope.clone()
        optimizer.step()
    apart = max(relative(a.detach() - s, b.detach() - s) for a, b, s in zip(ours, theirs, start))
    return {"update": apart, "passed": apart < 2e-2}  # five iterations in bf16, in a batch and one by one


def check_strategy(
    work: Workplace, case: Case, alone: Future[list[float]], launch: list[str]
) -> dict[str, Any]:
    """Losses of ten steps under a strategy against those of one process."""
    run_dir = train_lm(work, case, steps=10, launch=launch, report__every=1)
    losses = [line["loss"] for line in records(run_dir)]
    try:
        expected = alone.result(timeout=max(0.0, work.seconds_left))
    except TimeoutError:
        raise subprocess.TimeoutExpired("the run with one process", 0) from None
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    status = json.loads((run_dir / "status.json").read_text())["state"]
    # Two ways to compute in bf16: docs/strategies.md.
    return {"losses apart": apart, "passed": apart < 5e-3 and status == "finished"}


def check_resume(work: Workplace, case: Case) -> dict[str, Any]:
    """Six steps with a save after three; then a copy that has only that save goes on: the same bytes."""
    options: dict[str, Any] = {"train__deterministic": "true", "checkpoint__every": "3 steps"}
    whole = train_lm(work, case, steps=6, **options)
    cut = work.run_dir()
    shutil.copytree(whole, cut, symlinks=True)
    for path in (cut / "checkpoints").glob("*step-00000006*"):
        shutil.rmtree(path)
    (cut / "status.json").unlink()
    train_lm(work, case, steps=6, run_dir=cut, **options)
    hashes = []
    for run_dir in (whole, cut):
        manifest = json.loads((run_dir / "checkpoints/step-00000006/manifest.json").read_text())
        tensors = {n: f["sha256"] for n, f in manifest["files"].items() if n.endswith(".safetensors")}
        hashes.append(tensors)
    resumed = [event for event in records(cut, "event") if event["event"] == "resume"]
    return {
        "files": len(hashes[0]),
        "resumed at": resumed[-1]["step"] if resumed else None,
        "passed": bool(hashes[0]) and hashes[0] == hashes[1] and bool(resumed) and resumed[-1]["step"] == 3,
    }


# ---- all together ------------------------------------------------------------------------------------------


def arguments_of(case: Case, compiled: bool) -> dict[str, Any]:
    return {"case": vars(case), "compiled": compiled}


def checks_of(work: Workplace, case: Case) -> dict[str, Callable[[], Any]]:
    """The checks in the order in which they run; ``case`` is a small one."""
    alone: Future[list[float]] = Future()

    def one_process() -> dict[str, Any]:
        try:
            run_dir = train_lm(work, case, steps=10, report__every=1)
            losses = [line["loss"] for line in records(run_dir)]
        except BaseException:
            alone.set_exception(RuntimeError("one process, with which it is compared, gave no losses"))
            raise
        alone.set_result(losses)
        return {"last loss": losses[-1], "passed": len(losses) == 10 and losses[-1] < losses[0]}

    def zero() -> dict[str, Any]:
        try:
            work.call([sys.executable, "-c", "import deepspeed"])
        except RuntimeError as error:  # it raises what it likes where the machine does not suit it
            return {"passed": None, "why": f"deepspeed does not import: {str(error).splitlines()[-1]}"}
        return check_strategy(work, case, alone, launcher(work, "zero2"))

    def offloaded() -> dict[str, Any]:
        launch = launcher(work, "fsdp2", 1, "--fsdp_offload_params", "true")
        found = check_strategy(work, case, alone, launch)
        return found if work.cuda else {**found, "not sharded": "one process on a CPU instead"}

    # Those that take longest first, and the one process before what is compared with it.
    return {
        "one process learns": one_process,
        "FSDP2 with CPU offload follows": offloaded,
        "ZeRO-2 follows": zero,
        "resume bit for bit": lambda: check_resume(work, case),
        "documents by lengths against each alone": lambda: work.child("documents", None),
        "softcapped head against float64": lambda: work.child("softcap", None),
        "Muon against torch.optim.Muon": lambda: work.child("muon", None),
    }


def speeds_of(
    work: Workplace, cases: dict[str, Case], *, compiled: bool
) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is measured, the most important first."""
    own: dict[str, Any] = {} if compiled else {"train__compile": "false"}
    rows: dict[tuple[str, str], Callable[[], Any]] = {}
    first = next(iter(cases))
    for name, case in cases.items():
        rows[name, "train_lm.py"] = lambda case=case: measure_train_lm(work, case, **own)
    for name, case in cases.items():
        rows[name, "nanoGPT-style loop"] = lambda c=case: work.child("nanogpt", arguments_of(c, compiled))
        rows[name, "Trainer"] = lambda c=case: work.child("trainer", arguments_of(c, compiled))
    several = min(work.gpus, 8)
    llama = next((case for case in cases.values() if case.type == "llama"), None)
    if several > 1 and llama is not None:
        long = Case(**{**vars(llama), "tokens": llama.tokens * 2 * several, "blocks": 1, "goal": None})
        shared = launcher(work, "ddp" if work.cuda else "cpu_2", several)
        context = {"train__context_parallel": several, "train__global_batch_blocks": 1}
        rows[f"Llama, blocks of {long.tokens:,} over {several}", "train_lm.py"] = lambda: measure_train_lm(
            work, long, launch=shared, **own, **context
        )
    wide = {**own, "train__residual_dtype": "fp32"}
    rows[first, "train_lm.py, fp32 stream"] = lambda: measure_train_lm(work, cases[first], **wide)
    window = f"{WARM_UP + 1}-{WARM_UP + 2}"
    rows[first, "train_lm.py, profiled"] = lambda: measure_train_lm(
        work, cases[first], **own, train__profile=window
    )
    return rows


def attempt(
    work: Workplace, what: str, run: Callable[[], Any], seconds: float = math.inf, **variables: str
) -> Any:
    """Its result, or why there is none; as in :meth:`Workplace.row`."""
    if work.seconds_left < 5:
        return {"not_measured": "out of time"}
    begin = time.monotonic()
    try:
        with work.row(seconds, **variables):
            found = run()
    except subprocess.TimeoutExpired as error:
        found = {"not_measured": "out of time"}
        if not work.over:  # it hangs, or compiles for long
            found = {"not_measured": f"not done in {seconds:.0f} s", "error": (error.output or "")[-2000:]}
    except Exception as error:  # the others are still to be measured
        text = str(error) or traceback.format_exc()
        memory = "out of memory" if "out of memory" in text.lower() else None
        found = {"not_measured": memory or "failed", "error": text[:3000]}
    print(f"{what}: {time.monotonic() - begin:.0f} s, {work.seconds_left:.0f} s left", flush=True)
    return found


def side_by_side(
    work: Workplace, runs: Mapping[str, Callable[[], Any]], seconds: float
) -> Iterator[tuple[str, Any]]:
    """What does not disturb each other, on two cores each: yields (name, result) as soon as there is one."""
    # Otherwise each of them would start a compiler for every core.
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        begun = {
            pool.submit(attempt, work, name, run, seconds, **threads): name for name, run in runs.items()
        }
        for one in as_completed(begun):
            yield begun[one], one.result()


def row_of(found: dict[str, Any], case: Case | None, flops: int | None, device: dict[str, Any]) -> list[str]:
    """Cells of the table of speeds."""
    if "not_measured" in found:
        return [found["not_measured"], *[""] * 6]
    speed = found["tokens_per_second"]["median"]
    goal = case.goal if case else None
    used = None if flops is None else speed * flops
    peak, planned = found["peak_bytes"], found.get("planned_bytes")
    return [
        f"{speed:,.0f}",
        f"{goal:,}" if goal else "",
        f"{speed / goal:.2f}" if goal else "",
        f"{used / device['peak_flops']:.1%}" if used and device["peak_flops"] else "",
        f"{used / device['matrix_flops']:.1%}" if used and device["matrix_flops"] else "",
        f"{peak / 2**30:.1f} GiB" if peak else "",
        f"{planned / peak:.2f}" if peak and planned else "",
    ]


DEVICE: dict[str, Any] = {"name": "unknown device", "matrix_flops": 0.0, "peak_flops": None}
"""What is known of a device that could not be asked."""
NOT_REACHED = {"not_measured": "not reached"}
CHILDREN: dict[str, Callable[[Any], Any]] = {
    "nanogpt": child_nanogpt,
    "trainer": child_trainer,
    "device": child_device,
    "flops": child_flops,
    "documents": child_documents,
    "softcap": child_softcap,
    "muon": child_muon,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any device")
    parser.add_argument("--models", nargs="*", default=None, help="some of the names in the table")
    parser.add_argument("--seconds", type=float, default=460, help="of the whole call")
    parser.add_argument(
        "--row_seconds",
        type=float,
        default=120,
        help="most of them for one row; half as many more for a check",
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        name, argument = options.child
        print(json.dumps(CHILDREN[name](json.loads(argument))))
        return
    begin = time.monotonic()  # importing torch may take ten seconds
    import torch

    cuda = torch.cuda.is_available()
    if not options.tiny and not cuda:
        parser.error("no CUDA device: --tiny proves the script without one")
    cases = TINY if options.tiny else FULL
    if options.models:
        cases = {name: cases[name] for name in options.models}
    # A process that was killed may still write there
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-", ignore_cleanup_errors=True) as folder:
        gpus = torch.cuda.device_count() if cuda else 2
        left = options.seconds - (time.monotonic() - begin)
        work = Workplace(Path(folder), left, cuda=cuda, gpus=gpus)
        found = Found(
            begin=begin, name="gpu-tiny" if options.tiny else "gpu", folder=options.out, cases=cases
        )
        measure(work, found, options)
    found.write(show=True)
    failed = [name for name, one in found.checks.items() if one.get("passed") is False or "error" in one]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def measure(work: Workplace, found: Found, options: argparse.Namespace) -> None:
    """Everything, the most important first."""
    limit = options.row_seconds
    speeds = speeds_of(work, found.cases, compiled=not options.no_compile)
    checks = checks_of(work, TINY["GPT-2 tiny"])
    found.speeds = {" / ".join(key): NOT_REACHED for key in speeds}
    found.checks = dict.fromkeys(checks, NOT_REACHED)
    size = {"size": 256 if options.tiny else 8192}
    asked = {name: vars(case) for name, case in found.cases.items()}
    before = {"device": lambda: work.child("device", size), "FLOPs": lambda: work.child("flops", asked)}
    for name, one in side_by_side(work, before, limit):
        if "not_measured" in one:
            found.unknown[name] = one
        elif name == "device":
            found.machine = one.pop("machine", {})
            found.device = DEVICE | one
        else:
            found.flops = one
    own = [key for key in speeds if key[1] == "train_lm.py"]
    found.write()

    def measure_rows(keys: list[tuple[str, str]]) -> None:
        for key in keys:
            name = " / ".join(key)
            found.speeds[name] = attempt(work, name, speeds[key], limit)
            found.write()

    measure_rows(own[:1])
    # Side by side they share the cores, and one of them is two runs.
    for name, one in side_by_side(work, checks, 1.5 * limit):
        found.checks[name] = one
        found.write()
    measure_rows(own[1:])
    measure_rows([key for key in speeds if key not in own])


@dataclass(kw_only=True)
class Found:
    """The results so far. ``begin``: when the call began; ``unknown``: what could not be asked, and why; ``machine``: empty
    if it could not be asked."""

    begin: float
    name: str
    folder: Path | None
    cases: dict[str, Case]
    machine: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=lambda: dict(DEVICE))
    flops: dict[str, int] = field(default_factory=dict)
    speeds: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)

    def write(self, *, show: bool = False) -> None:
        """Write the JSON with the tables in it; ``show``: print them as well."""
        seconds = time.monotonic() - self.begin
        result = {
            "machine": self.machine,
            "device": self.device,
            "speeds": self.speeds,
            "checks": self.checks,
            "flops_per_token": self.flops,
            "unknown": self.unknown,
            "seconds": seconds,
        }
        common.write(self.name, result, self._tables(seconds), self.folder, show=show)

    def _tables(self, seconds: float) -> str:
        device = self.device
        rows = []
        for name, one in self.speeds.items():
            model, _, way = name.partition(" / ")
            rows.append([model, way, *row_of(one, self.cases.get(model), self.flops.get(model), device)])
        verdicts = {None: "not run", True: "passed", False: "FAILED"}
        said = []
        for name, one in self.checks.items():
            passed = one.get("passed") if "not_measured" not in one else None
            numbers = ", ".join(
                f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                for key, value in one.items()
                if key not in ("passed", "error")
            )
            said.append((name, verdicts[passed], numbers))
        rate, peak = device["matrix_flops"] / 1e12, device["peak_flops"]
        header = [
            "model",
            "way",
            "tokens/s",
            "goal",
            "of the goal",
            "MFU",
            "of the measured rate",
            "peak memory",
        ]
        return "\n".join(
            [
                f"{device['name']}: {rate:.3g} TFLOP/s in a bf16 product in this call; peak by data sheet "
                f"{peak or '-'}; {seconds:.0f} s in all; goals are for one H200",
                *(f"{name}: {value:,} FLOPs a token" for name, value in self.flops.items()),
                "",
                common.table(rows, [*header, "plan over peak"]),
                "",
                common.table(said, ["check", "result", "numbers"]),
            ]
        )


if __name__ == "__main__":
    main()
