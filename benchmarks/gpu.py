"""Everything that is to be known of one GPU, in one call of a few minutes.

    python benchmarks/gpu.py                          # one CUDA device; writes results/gpu.json and a table
    python benchmarks/gpu.py --tiny                   # proves the script itself: tiny models, any device, seconds

For GPT-2 124M, 350M and 1.5B at 1,024 tokens and a Llama-shaped 1B at 4,096: tokens/s of train_lm.py's own parts end
to end (token array -> batches on the device -> update -> numbers read a step late), peak memory, model FLOPs
utilization, and the share of the matrix rate that is measured in the same call. Beside them the plain alternatives:
transformers' own loss in a nanoGPT-style compiled loop. And the parity of the losses in bfloat16 over some steps:
compiled and chunked against neither.

FLOPs of a token, forward and backward: 6 N + 12 L d T (PaLM, appendix B; N all parameters, L layers, d width, T
context). The peak for the utilization is the dense bfloat16 rate of the data sheet, 989 TFLOP/s for H100 and H200.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from lmcore.model import build, module, optim
from lmcore.run.late_numbers import LateNumbers

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# name -> (type, config, vocabulary, T, micro-batch blocks, micro-batches a step)
FULL: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "GPT-2 124M": ("gpt2", NO_DROPOUT, 50257, 1024, 64, 8),
    "GPT-2 350M": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16, **NO_DROPOUT}, 50257, 1024, 32, 8),
    "GPT-2 1.5B": ("gpt2", {"n_layer": 48, "n_embd": 1600, "n_head": 25, **NO_DROPOUT}, 50257, 1024, 16, 8),
    "Llama 1B": ("llama", LLAMA_1B, 128256, 4096, 4, 8),
}
TARGETS = {"GPT-2 124M": 470_000, "GPT-2 350M": 190_000, "GPT-2 1.5B": 47_000, "Llama 1B": 48_000}
SMALL_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "GPT-2 tiny": ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2, **NO_DROPOUT}, 300, 32, 2, 2),
    "Llama tiny": ("llama", SMALL_LLAMA, 300, 32, 2, 2),
}


def random_tokens(vocab: int, tokens: int) -> Tensor:
    """(rows, T + 1) int32."""
    return torch.randint(0, vocab, (8_000_000 // tokens, tokens + 1), dtype=torch.int32)


def sequences(vocab: int, tokens: int) -> Tensor:
    """(rows, T + 1) int32 that a model learns in a few steps: numbers that go on by a step of each row's own."""
    rows = 1_000_000 // tokens
    start, by = torch.randint(0, 256, (rows, 1)), torch.randint(1, 8, (rows, 1))
    return ((start + by * torch.arange(tokens + 1)) % min(vocab, 256)).to(torch.int32)


def batches(array: Tensor, blocks: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Blocks of one array, narrow over the wire and from page-locked memory, as the training path has it."""
    array = array.pin_memory() if device.type == "cuda" else array
    start = 0
    while True:
        start = (start + blocks) % (len(array) - blocks)
        ids = array[start : start + blocks].to(device, non_blocking=True).long()
        yield {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of one large bfloat16 product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


class Run:
    """One model in training, by lmcore's parts (``ours``) or by transformers' model and loss in a plain loop."""

    def __init__(self, case: Any, device: torch.device, *, ours: bool, compiled: bool) -> None:
        kind, config, vocab, tokens, blocks, self.accumulation = case
        self.device, self.ours, self.tokens_per_step = device, ours, tokens * blocks * self.accumulation
        self.model: Any = build.build_model(
            type=kind, config_overrides=config, vocab_size=vocab, block_size=tokens, seed=0
        ).to(device)
        self.module = module.ModelWithLoss(self.model, chunk="auto" if ours else 0)
        groups = optim.parameter_groups(self.model.named_parameters(), weight_decay=0.1)
        self.optimizer: Any = optim.build_optimizer("adamw", groups, lr=1e-4)
        self.parameters = [p for g in groups for p in g["params"]]
        self.plain = torch.compile(self.model) if compiled and not ours else self.model
        if compiled and ours:
            module.compile_regions(self.module)
        self.data = batches(random_tokens(vocab, tokens), blocks, device)
        self.sequences = batches(sequences(vocab, tokens), blocks, device)
        self.tokens_per_micro_batch = tokens * blocks
        text = self.model.config.get_text_config()
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = (
            6 * self.parameter_count + 12 * text.num_hidden_layers * text.hidden_size * tokens
        )
        self.formula = (
            f"6 x {self.parameter_count:,} + 12 x {text.num_hidden_layers} x {text.hidden_size:,} x {tokens:,} = "
            f"{self.flops_per_token:,} FLOPs a token"
        )
        self._late: LateNumbers | None = None

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            if self.ours:
                return self.module(**batch)
            logits = self.plain(input_ids=batch["input_ids"]).logits
            real = self.model.real_vocab_size
            loss = torch.nn.functional.cross_entropy(
                logits[..., :real].flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum"
            )
        return loss, torch.tensor(batch["labels"].numel())

    def parity(self, steps: int) -> list[float]:
        """The mean losses of steps of one micro-batch each, on :func:`sequences`."""
        self.data, self.accumulation, self.tokens_per_step = self.sequences, 1, self.tokens_per_micro_batch
        self._late = None
        losses = [self.step() for _ in range(steps + 1)]
        return [value for value in losses if value is not None]

    def step(self) -> float | None:
        """One update; the mean loss of the step before it (``ours``: read without waiting for this one)."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _ in range(self.accumulation):
            loss, _ = self.loss(next(self.data))
            (loss / self.tokens_per_step).backward()
            total += loss.detach().double()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.optimizer.found_inf, self.optimizer.grad_scale = (~torch.isfinite(norm)).float(), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        before, self._late = self._late, LateNumbers(torch.stack([total / self.tokens_per_step]))
        return before.tolist()[0] if before is not None else None

    def seconds(self, steps: int) -> float:
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return (time.perf_counter() - start) / steps


def forget(device: torch.device) -> None:
    """Give back what the run before has held."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(case: Any, device: torch.device, steps: int, *, parity_steps: int, **how: bool) -> dict[str, Any]:
    """Tokens/s, memory and the losses of one way to train."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    run = Run(case, device, **how)
    for _ in range(4):
        run.step()
    wait(device)
    cold = time.perf_counter() - start
    turns = [run.tokens_per_step / run.seconds(steps) for _ in range(3)]
    result = {
        "tokens_per_second": common.spread(turns),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "cold_start_seconds": cold,
        "losses": run.parity(parity_steps),
        "flops_per_token": run.flops_per_token,
        "formula": run.formula,
        "parameters": run.parameter_count,
    }
    del run
    forget(device)
    return result


def measure_trainer(case: Any, device: torch.device, steps: int, *, compiled: bool) -> dict[str, Any]:
    """Tokens/s and memory of transformers' Trainer on the same model and batch, by its own clock's callbacks."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    kind, config, vocab, tokens, blocks, accumulation = case
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    array = random_tokens(vocab, tokens).long()
    marks = [4 + steps * turn for turn in range(4)]
    times: list[float] = []

    class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(array)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": array[index, :-1], "labels": array[index, :-1]}  # the model shifts them

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            if state.global_step in marks:
                wait(device)
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=blocks,
            gradient_accumulation_steps=accumulation,
            max_steps=marks[-1] + 1,
            learning_rate=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            optim="adamw_torch_fused",
            bf16=True,
            torch_compile=compiled,
            dataloader_num_workers=4 if device.type == "cuda" else 0,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        settings = AutoConfig.for_model(
            kind, vocab_size=vocab, **{"max_position_embeddings": tokens, **config}
        )
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
        Trainer(model=model, args=arguments, train_dataset=Blocks(), callbacks=[Clock()]).train()
    per_turn = steps * blocks * accumulation * tokens
    result = {
        "tokens_per_second": common.spread([per_turn / (b - a) for a, b in pairwise(times)]),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "losses": [],
    }
    del model
    forget(device)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="*", default=None, help="some of the names in the table")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--parity-steps", type=int, default=100, help="steps over which the losses are compared"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device: --tiny proves the script without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    rate = matrix_rate(device, 256 if options.tiny else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)

    compiled = not options.no_compile
    ways: dict[str, dict[str, bool]] = {"lmcore": {"ours": True, "compiled": compiled}}
    ways["plain loop"] = {"ours": False, "compiled": compiled}
    ways["Trainer"] = {"compiled": compiled}
    if compiled:
        ways["lmcore, not compiled"] = {"ours": True, "compiled": False}
        ways["plain loop, not compiled"] = {"ours": False, "compiled": False}
    cases = TINY if options.tiny else FULL
    rows, numbers, formulas = [], {}, []
    for label in options.models or cases:
        first: dict[str, Any] = {}
        for way, how in ways.items():
            try:
                if "ours" in how:
                    found = measure(
                        cases[label], device, options.steps, parity_steps=options.parity_steps, **how
                    )
                else:
                    found = measure_trainer(cases[label], device, options.steps, **how)
            except torch.OutOfMemoryError:
                rows.append((label, way, "out of memory", "", "", "", "", ""))
                forget(device)
                continue
            if not first:
                first = found
                formulas.append(f"{label}: {found['formula']}")
            numbers[f"{label} / {way}"] = found
            speed = found["tokens_per_second"]["median"]
            flops = speed * first["flops_per_token"]
            target = f"{speed / TARGETS[label]:.2f}" if label in TARGETS and way == "lmcore" else ""
            apart = max((abs(a - b) / b for a, b in zip(found["losses"], first["losses"])), default=None)
            rows.append(
                (
                    label,
                    way,
                    f"{speed:,.0f}",
                    target,
                    f"{flops / peak:.1%}" if peak else "-",
                    f"{flops / rate:.1%}",
                    "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**30:.1f} GiB",
                    "" if apart is None else f"{apart:.1e}",
                )
            )
            print(rows[-1], flush=True)
    setting = (
        f"{name}: {rate / 1e12:.3g} TFLOP/s in a bf16 product in this call; peak by data sheet {peak or '-'}"
    )
    header = [
        "model",
        "way",
        "tokens/s",
        "of the target",
        "MFU",
        "of the measured rate",
        "peak memory",
        "loss apart",
    ]
    text = "\n".join([setting, *formulas, "", common.table(rows, header)])
    common.write(
        "gpu-tiny" if options.tiny else "gpu", {"setting": setting, "cases": numbers}, text, options.out
    )


if __name__ == "__main__":
    main()
