# ruff: noqa: RUF009 -- option() gives an immutable dataclasses.field, which is what the rule cannot see.
"""The schema: every option with its type, default, help, limits and resume class.

``RunConfig`` is a tree of frozen dataclasses. ``build(to_dict(config)) == config``. The string under a field is its
help. Units are in the names; a duration is ``500`` (steps), ``1e9 tokens``, ``2 epochs``, ``10%``, ``30 min`` or
``never``; a value that changes during the run is a curve (:mod:`lmcore.config.curves`). Every option has a resume class:

* ``free``: may change at a resume.
* ``warn``: may change; the run prints both values.
* ``refuse``: a change would not fit what was trained so far; it is an error with both values, unless ``allow_changes`` names
  the key.

:mod:`lmcore.config.parse` reads files and the command line into a :class:`RunConfig`; :mod:`lmcore.config.checks` checks
the relations between options.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lmcore.config import yaml
from lmcore.config.curves import END, START, Curve, is_curve, values_of
from lmcore.config.durations import Duration, Durations
from lmcore.errors import RequestError
from lmcore.humanize import multiples_near

Resume = Literal["free", "warn", "refuse"]
Attention = Literal[
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
Entries = list[str | dict[str, Any]]


def option(
    default: Any,
    resume: Resume,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    secret: bool = False,
) -> Any:
    """A field with its resume class and its limits. A ``secret`` value is never written to a file."""
    limits = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    metadata = {"resume": resume, "limits": limits, "secret": secret}
    if isinstance(default, (list, dict)):
        return field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    return field(default_factory=kind)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: Entries = option([], "refuse")
    """Training text: files, folders, globs, hf://... or sources {path, weight}; default: Python's standard
    library."""
    valid: Entries = option([], "warn")
    """Validation text; sources with a name are separate validation sets."""
    test: Entries = option([], "free")
    """Test text, evaluated once after training."""
    valid_fraction: float | None = option(0.01, "refuse", at_least=0, below=1)
    """Share of the training documents that is held out for validation, by a hash of their content; only with
    mode store and without data.valid."""
    mode: Literal["store", "stream"] = option("store", "refuse")
    """store: tokenize once into a memory-mapped token store; stream: tokenize during training."""
    block_size: int | None = option(None, "refuse", at_least=1, at_most=2**31)
    """Number of tokens in a block; default: the model's context length, at most 1,024."""
    text_field: str = option("text", "refuse")
    """Field or column with the text, in JSON lines, CSV and parquet."""
    unit: Literal["auto", "line", "paragraph", "file"] = option("auto", "refuse")
    """What counts as one document in plain text files; auto: chosen per source."""
    encoding: str = option("utf-8", "refuse")
    """Encoding of plain text files, such as shift_jis or euc_jp."""
    eos: bool = option(True, "refuse")
    """Append the end-of-sequence token to every document."""
    store_dir: str = option("token_stores", "free")
    """Folder or URL for token stores, shared by all runs on the same text."""
    processes: int | None = option(None, "free", at_least=1, at_most=4096)
    """Number of tokenizing processes; default: the cores of this machine divided by its ranks."""
    workers: int = option(0, "free", at_least=0, at_most=1024)
    """Number of data loader processes per rank; 0 is fast enough for a token store."""
    prefetch: int = option(2, "free", at_least=1, at_most=100_000)
    """Number of steps whose batches are prepared ahead of time."""
    pin_memory: bool | None = option(None, "free")
    """Use pinned host memory for copies to the device; default: on a GPU."""
    shuffle: Literal["full", "blocks", "none"] = option("full", "refuse")
    """full: permute all blocks; blocks: permute runs of neighbouring blocks (for slow disks); none: keep the
    order of the corpus."""
    shuffle_window: int = option(1_024, "refuse", at_least=1, at_most=2**31)
    """Number of blocks in the window in which a stream is shuffled."""
    stream_lanes: int | None = option(None, "refuse", at_least=1, at_most=2**20)
    """Number of parallel readers of a stream, independent of the number of processes; default: the blocks of the
    global batch."""
    document_mask: bool = option(False, "warn")
    """Prevent attention between different documents of a block."""
    on_error: Literal["raise", "skip"] = option("raise", "warn")
    """What to do with a broken record: stop with its location, or count and skip it."""
    max_bad_fraction: float = option(0.001, "free", at_least=0, at_most=1)
    """Largest share of broken records that may be skipped."""
    skip_positions: list[str] = option([], "warn")
    """Positions to skip in training: '1200' or '1200-1263' (both included)."""
    phases: list[dict[str, Any]] = option([], "warn")
    """Changes of the mixture weights: {position: N, weights: {name: w}}; append one to change the mixture of a
    running training."""
    factory: str | None = option(None, "refuse")
    """Your own dataset: package.module:function, called with data.config."""
    config: dict[str, Any] = option({}, "refuse")
    """Keyword arguments of data.factory (--data.config.pairs 1000)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str | None = option(None, "refuse")
    """An existing tokenizer: a folder, a SentencePiece .model file or a Hub id; default: train one."""
    revision: str | None = option(None, "refuse")
    """Commit, branch or tag of a Hub tokenizer."""
    train: bool = option(False, "refuse")
    """Train a new tokenizer for model.from_pretrained, although its weights were trained with other ids; default: use its own."""
    vocab_size: int | None = option(32_000, "refuse", at_least=1, at_most=2**24)
    """Vocabulary size of the tokenizer to train."""
    model_type: Literal["bpe", "unigram", "char"] = option("bpe", "refuse")
    """SentencePiece model type; char: one piece per character."""
    character_coverage: float = option(0.9995, "refuse", at_least=0.98, at_most=1)
    """Share of the characters that become pieces; the others are encoded as bytes."""
    byte_fallback: bool = option(True, "refuse")
    """Encode unknown characters as bytes, so that no text is lost."""
    split_digits: bool = option(True, "refuse")
    """Make every digit a piece of its own."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = option("identity", "refuse")
    """Unicode normalization in the tokenizer; with any but identity, decoding may not return the original text."""
    user_symbols: list[str] = option([], "refuse")
    """Strings that are always one piece."""
    sample_bytes: int = option(100_000_000, "refuse", at_least=1, at_most=10**12)
    """Largest number of bytes to train the tokenizer on, sampled from the whole corpus; text without spaces needs
    50 bytes of memory per byte."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = option(0, "refuse", at_least=0, at_most=2**16)
    """Rank of LoRA adapters (peft) on the frozen weights of model.from_pretrained; 0: no adapters."""
    alpha: float | None = option(None, "refuse", above=0)
    """The adapters are scaled by alpha / rank; default: twice the rank."""
    dropout: float = option(0.0, "warn", at_least=0, below=1)
    """Dropout in front of the adapters."""
    target_modules: list[str] = option([], "refuse")
    """Suffixes of the names of the layers to adapt (q_proj v_proj), or all-linear; default: chosen by peft."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    type: str | None = option("gpt2", "refuse")
    """transformers model type to train from scratch (gpt2, llama, qwen3, mistral, ...)."""
    config: dict[str, Any] = option({}, "refuse")
    """Fields of the model type's config (--model.config.n_layer 8), or keyword arguments of model.factory."""
    from_pretrained: str | None = option(None, "refuse")
    """Pretrained weights to start from: a folder such as runs/X/export, or a Hub id."""
    revision: str | None = option(None, "refuse")
    """Commit, branch or tag of a Hub model."""
    factory: str | None = option(None, "refuse")
    """Your own nn.Module: package.module:function, called with model.config."""
    preset: Literal["gpt2", "modern", "modern_gguf", "modern_conv"] | None = option(None, "refuse")
    """A model by name, instead of model.type: gpt2, modern (nanochat), modern_gguf (qwen3, also for llama.cpp),
    modern_conv (lfm2, with short convolutions)."""
    size: Literal["5M", "8M", "15M", "124M", "350M", "1B"] | None = option(None, "refuse")
    """Size of the preset, which sets layers, width and heads; default: 5M."""
    zero_init: bool | None = option(None, "free")
    """Initialize output projections and an untied head with zeros; default: in the modern presets with muon."""
    attention: Attention | None = option(None, "free")
    """Attention implementation of transformers; default: the fastest available."""
    lora: LoraConfig = section(LoraConfig)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    label_smoothing: float = option(0.0, "warn", at_least=0, below=1)
    """Share of the target probability that is spread over the vocabulary (training only)."""
    z_loss: float = option(0.0, "warn", at_least=0)
    """Weight of the squared log of the softmax denominator (training only; PaLM used 1e-4)."""
    chunk: int | None = option(None, "free", at_least=0)
    """Number of tokens whose logits are in memory at once; 0: all; default: chosen by size."""
    factory: str | None = option(None, "refuse")
    """Your own loss: package.module:function(outputs, batch) -> (loss sum, number of labels that are not -100)."""
    config: dict[str, Any] = option({}, "refuse")
    """Keyword arguments of loss.factory."""


@dataclass(frozen=True, kw_only=True)
class LrMultipliersConfig:
    matrices: float = option(1.0, "warn", at_least=0, at_most=10**6)
    """Learning rate of the matrices inside the network, as a multiple of optim.lr."""
    embedding: float = option(1.0, "warn", at_least=0, at_most=10**6)
    """The same for the embeddings (and a head that is tied to them)."""
    head: float = option(1.0, "warn", at_least=0, at_most=10**6)
    """The same for an untied vocabulary head."""
    vectors: float = option(1.0, "warn", at_least=0, at_most=10**6)
    """The same for biases and norms."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = option("adamw", "refuse")
    """adamw, adam, sgd, adafactor, muon (for matrices, adamw for the rest), or package.module:Class."""
    config: dict[str, Any] = option({}, "warn")
    """Additional keyword arguments of the optimizer."""
    lr: float = option(6e-4, "warn", above=0)
    """Peak learning rate."""
    min_lr_ratio: float = option(0.1, "warn", at_least=0, at_most=1)
    """Final learning rate as a share of the peak."""
    betas: tuple[float, float] = option((0.9, 0.95), "warn", at_least=0, below=1)
    """Decay rates of the first and second moment of Adam."""
    eps: float = option(1e-8, "warn", above=0)
    """Added to the denominator of Adam, for numerical stability."""
    lr_multipliers: LrMultipliersConfig = section(LrMultipliersConfig)
    momentum: float | Curve = option(0.95, "warn", at_least=0, below=1)
    """Momentum of sgd and muon; a curve such as '0: 0.85, 10%: 0.95' replaces the warmup."""
    momentum_start: float | None = option(None, "warn", at_least=0, below=1)
    """Momentum of the first step; default: optim.momentum, for muon 0.85."""
    momentum_warmup: Duration = option(Duration(10, "percent"), "warn")
    """Length of the warmup from optim.momentum_start to optim.momentum."""
    cautious_weight_decay: bool = option(False, "warn")
    """Decay only those weights of muon's matrices that the update makes smaller as well."""
    weight_decay: float | Curve = option(0.1, "warn", at_least=0, at_most=1e6)
    """Decoupled weight decay of matrices; biases and normalization weights are not decayed. A curve changes it during
    the run ('linear 0.1 0')."""
    clip_norm: float = option(1.0, "warn", at_least=0)
    """Clip the global gradient norm to this value; 0: no clipping."""
    schedule: Literal["constant", "linear", "linear_to_zero", "cosine", "wsd", "inverse_sqrt"] | Curve = (
        option("cosine", "warn", at_least=0, at_most=10**6)
    )
    """Learning rate schedule; wsd: warmup, stable, decay. A curve of multiples of optim.lr ('0: 0, 2%: 1, 60%: 1, 100%:
    0') is the whole schedule, its own warmup and decay included."""
    warmup: Duration = option(Duration(2, "percent"), "warn")
    """Length of the linear warmup of the learning rate."""
    decay: Duration = option(Duration(20, "percent"), "warn")
    """Length of the final decay of the wsd schedule."""
    train_only: list[str] = option([], "refuse")
    """Train only the parameters whose names match one of these patterns ('transformer.h.11.*')."""
    freeze: list[str] = option([], "refuse")
    """Do not train the parameters whose names match one of these patterns."""
    fused: bool | None = option(None, "free")
    """Use torch's fused optimizer; default: where it is available."""
    state_dtype: Literal["fp32", "bf16"] = option("fp32", "refuse")
    """Only fp32; for smaller moments use optim.name torchao.optim:AdamW8bit or adafactor."""
    ema_decay: float = option(0.0, "refuse", at_least=0, below=1)
    """Decay of an exponential moving average of the weights, which is evaluated and exported; 0: off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    duration: Duration = option(Duration(1, "epochs"), "warn")
    """How long to train, in steps, tokens or epochs."""
    global_batch_blocks: int | Curve | None = option(512, "warn", at_least=1, at_most=2**24)
    """Number of blocks in a step over all processes; gradient accumulation is derived from it. It may change in the run:
    '0: 32, 10%: 128, 1e9 tokens: 512', or 'linear 32 512' in multiples of 32."""
    global_batch_tokens: int | Curve | None = option(None, "warn", at_least=1, at_most=2**40)
    """The same in tokens; must be a multiple of data.block_size."""
    micro_batch_blocks: int | Literal["auto"] = option("auto", "warn", at_least=1)
    """Largest number of blocks in a forward pass of one process; the largest divisor of its share of the global
    batch is used. auto: the largest that fits into memory."""
    micro_batch_exact: bool = option(False, "free")
    """Refuse a global batch that train.micro_batch_blocks does not divide, instead of using a smaller divisor."""
    context_parallel: int = option(1, "warn", at_least=1, at_most=4096)
    """Number of processes that share each block, for blocks too long for one device; divides the number of
    processes."""
    tensor_parallel: int = option(1, "warn", at_least=1, at_most=1024)
    """Number of processes that share each layer's matrices, for layers too large for one device; neighbours, which
    should be on one node. For families with a plan in transformers (Llama, Qwen, Mistral, ...)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "warn")
    """Precision of the arithmetic; auto: bf16 on GPUs with compute capability 8.0 or newer and on CPUs with AMX or
    AVX512-BF16, else fp32; a run that began in fp32 on a CPU stays in it."""
    param_dtype: Literal["fp32", "bf16"] = option("fp32", "warn")
    """Data type of the stored weights."""
    residual_dtype: Literal["auto", "fp32", "bf16"] = option("auto", "warn")
    """Data type of the sum of embedding and layer outputs that runs through the network under train.precision bf16; auto:
    bf16 on GPUs and under FSDP2 and ZeRO, else fp32."""
    tf32: bool = option(True, "warn")
    """Use TensorFloat-32 for fp32 matrix products on a GPU."""
    compile: bool | Literal["auto"] = option("auto", "warn")
    """Compile the layers with torch.compile; auto: on GPUs, where a C++ compiler and Python.h are found."""
    compile_mode: Literal["default", "max-autotune"] = option("default", "free")
    """Mode of torch.compile, without CUDA graphs: they overwrite gradients that are summed over micro-batches."""
    activation_checkpointing: bool | int = option(False, "free", at_least=0, at_most=10**6)
    """Recompute the layers in the backward pass: less memory, about a third more arithmetic; 2: every second
    layer."""
    deterministic: bool = option(False, "warn")
    """Use deterministic kernels; an operation without one is an error."""
    max_minutes: float | None = option(None, "free", above=0, at_most=10**8)
    """Save and exit (code 75) after this time."""
    profile: str | None = option(None, "free")
    """Steps to profile with torch, such as '10-15'; the trace is written to the run folder."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    deepspeed: str | None = option(None, "warn")
    """A DeepSpeed configuration (ds_configs/zero3.json); an accelerate configuration can bring one too."""
    timeout_seconds: int = option(1_800, "free", at_least=1, at_most=10**9)
    """How long a process waits for the others in a collective operation of the device; 10 times that on the host."""
    reduce_dtype: Literal["fp32", "bf16"] = option("fp32", "warn")
    """Data type of gradients sent between processes (bf16 halves the traffic) and of the sums of those of bf16 weights."""


@dataclass(frozen=True, kw_only=True)
class KeepBestConfig:
    k: int = option(0, "free", at_least=0)
    """Number of best checkpoints to keep in addition to the newest; saves before each evaluation. 0: none."""
    metric: str = option("loss", "warn")
    """Metric that decides which is best: loss, perplexity or bits_per_byte of the first validation set, NAME/loss
    of another one, or train/loss."""
    mode: Literal["min", "max"] = option("min", "warn")
    """Which is better."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Durations = option(Durations.parse("10%"), "free")
    """How often to save; several intervals may be given, also in time ('[1000, 30 min]'). The last step is always
    saved."""
    keep: int = option(3, "free", at_least=1)
    """Number of newest checkpoints to keep."""
    keep_best: KeepBestConfig = section(KeepBestConfig)
    keep_every: Durations = option(Durations(), "free")
    """Interval of checkpoints that are saved and never deleted, such as '10%' or '10000 steps'."""
    background: bool = option(True, "free")
    """Write checkpoints in the background while training continues."""
    on_full_disk: Literal["continue", "stop"] = option("continue", "free")
    """What to do when a checkpoint cannot be written because the disk is full."""
    on_upload_failure: Literal["warn", "stop"] = option("warn", "free")
    """What to do when nothing can be uploaded to a run_dir that is a URL; the local copy stays."""
    upload_wait_seconds: float = option(90.0, "free", at_least=0, at_most=10**6)
    """How long a run that stops at a signal or deadline waits for its last upload; less before the end of a Slurm job."""
    export: Literal["last", "best"] = option("last", "free")
    """Which checkpoint to export at the end."""
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "free")
    """Data type of the exported weights."""
    private: bool = option(False, "free")
    """Make the run folder readable by its owner only."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    patience: int | None = option(None, "warn", at_least=0)
    """Stop after this many evaluations without improvement; 0: off; default: 3 where the text is seen more than once and
    there is a validation set, else off."""
    metric: str = option("loss", "warn")
    """Metric to monitor."""
    mode: Literal["min", "max"] = option("min", "warn")
    """Which is better."""
    threshold: float = option(0.0, "warn", at_least=0)
    """Smallest change that counts as an improvement."""
    target: float | None = option(None, "warn")
    """Stop when the metric reaches this value."""
    divergence: float | None = option(None, "warn")
    """Stop when the metric becomes worse than this value."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every: Durations = option(Durations.parse("10%"), "free")
    """How often to evaluate."""
    at_start: bool = option(False, "free")
    """Evaluate before the first step."""
    at_end: bool = option(True, "free")
    """Evaluate after the last step."""
    blocks: int | None = option(None, "warn", at_least=1)
    """Number of blocks to evaluate of each validation set; default: all."""
    micro_batch_blocks: int | None = option(None, "free", at_least=1, at_most=2**24)
    """Number of blocks in a forward pass; default: as in training."""
    prompts: list[str] = option([], "free")
    """Prompts to continue at every evaluation."""
    sample_tokens: int = option(100, "free", at_least=1, at_most=10**6)
    """Number of tokens to generate for each prompt."""
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    every: Durations = option(Durations.parse("100, 30 s"), "free")
    """How often to log; several intervals may be given, also in time ('[100, 10 s]')."""
    trackers: list[str] = option(["tensorboard"], "free")
    """Trackers in addition to metrics.jsonl: tensorboard, wandb, mlflow, trackio, ...; '[]': none."""
    project: str = option("lmcore", "free")
    """Project name in the trackers."""
    name: str | None = option(None, "free")
    """Run name in the trackers; default: the name of the run folder."""
    tags: list[str] = option([], "free")
    """Tags in the trackers."""
    save_code: bool = option(False, "free")
    """Save a copy of the code in the trackers."""
    expected_loss: float | None = option(None, "free", above=0)
    """Expected validation loss at the end, as lmcore size writes it; the report shows it beside the loss that was reached."""
    expected_loss_low: float | None = option(None, "free", above=0)
    """Lower end of the interval that holds the loss with a probability of 90%."""
    expected_loss_high: float | None = option(None, "free", above=0)
    """Upper end of that interval."""
    webhook: str | None = option(None, "free", secret=True)
    """URL for a Slack-compatible message at the end, on failure and on a rewind; also read from LMCORE_WEBHOOK."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    max_skips: int = option(10, "free", at_least=0)
    """Number of updates that may be skipped for a non-finite loss or gradient within guard.spike_window steps before a
    rewind."""
    max_rewinds: int = option(3, "free", at_least=0)
    """Number of rewinds to a checkpoint before the run stops (exit code 70)."""
    spike: Literal["off", "warn", "skip", "rewind"] = option("warn", "warn")
    """What to do at a loss spike."""
    spike_window: int = option(200, "warn", at_least=10, at_most=10**6)
    """Number of previous steps to compare the loss with."""
    spike_sigma: float = option(6.0, "warn", above=0)
    """How many robust standard deviations above the median of the window count as a spike."""
    hash_every: Durations = option(Durations(), "free")
    """How often to compare the weights of all processes."""
    stuck_seconds: float = option(1_800.0, "free", above=0, at_most=10**8)
    """Stop the run when a step takes longer than this, and print the stacks of all threads (exit code 71)."""
    stop_before_deadline_seconds: float = option(120.0, "free", at_least=0, at_most=10**8)
    """How long before the end of a Slurm job to save and exit; at most half of the time left at the start."""
    spot_notice: Literal["aws", "gcp", "azure"] | None = option(None, "free")
    """Ask the metadata service of this cloud whether the spot machine will be taken away, and save and exit then."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run_dir: str | None = option(None, "free")
    """Folder of the run, or a URL (s3://bucket/run); default: runs/<name of the last --config, or of the text>, the same
    on every restart."""
    local_dir: str | None = option(None, "free")
    """Where the run works if run_dir is a URL; default: a folder of the cache, named after the URL."""
    seed: int = option(1, "refuse", at_least=0, below=2**63)
    """Seed of the order, the initial weights and dropout."""
    resume: str = option("auto", "free")
    """auto: resume from the newest valid checkpoint; never; best; or the path of a checkpoint."""
    allow_changes: list[str] = option([], "free")
    """Options that may differ from the checkpoint although that is refused by default."""
    dry_run: bool = option(False, "free")
    """Print the plan and exit."""
    fast_dev_run: bool = option(False, "free")
    """Run every part of a training in seconds, with a tiny model."""
    debug: bool = option(False, "free")
    """Show the traceback of an error in the request."""
    data: DataConfig = section(DataConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    engine: EngineConfig = section(EngineConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    report: ReportConfig = section(ReportConfig)
    guard: GuardConfig = section(GuardConfig)


class Key(NamedTuple):
    """One option of the schema: its dotted name, type and default, and the arguments of :func:`option`."""

    name: str
    type: Any
    default: Any
    resume: Resume
    limits: dict[str, float | None]
    secret: bool

    @property
    def is_free_form(self) -> bool:
        """A dictionary under which any name may be set (``model.config.n_layer``)."""
        return typing.get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) in (list, tuple)


@functools.cache
def keys(kind: type = RunConfig, prefix: str = "") -> dict[str, Key]:
    """Every option in the order of the schema, by dotted name."""
    found: dict[str, Key] = {}
    types_by_name = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name = prefix + item.name
        if dataclasses.is_dataclass(types_by_name[item.name]):
            found |= keys(types_by_name[item.name], name + ".")
        else:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            found[name] = Key(name, types_by_name[item.name], default, **item.metadata)
    return found


def to_dict(config: Any, *, secrets: bool = True) -> dict[str, Any]:
    """Nested plain values for YAML and JSON. With ``secrets=False`` secret values are ``None``."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Curve):
            values[item.name] = to_dict(value, secrets=secrets)
        elif item.metadata["secret"] and not secrets:
            values[item.name] = None
        else:
            values[item.name] = plain(value)
    return values


def plain(value: Any) -> Any:
    if isinstance(value, Durations):
        return value.plain()
    if isinstance(value, (Duration, Curve)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def build(values: dict[str, Any], kind: type = RunConfig) -> Any:
    """The inverse of :func:`to_dict`; missing keys get their defaults. The types are not checked here."""
    arguments: dict[str, Any] = {}
    types_by_name = typing.get_type_hints(kind)
    for name, value in values.items():
        wanted = types_by_name[name]
        if dataclasses.is_dataclass(wanted):
            value = build(value, wanted)  # type: ignore[arg-type]  # is_dataclass also allows instances
        elif wanted in (Duration, Durations):
            value = wanted.parse(value)
        elif typing.get_origin(wanted) is tuple:
            value = tuple(value)
        elif Curve in typing.get_args(wanted) and is_curve(value):
            value = Curve.parse(value)
        arguments[name] = value
    return kind(**arguments)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; ``--config`` with this text repeats the run. Secrets are left out."""
    return yaml.dump(to_dict(config, secrets=False))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> scalar or list of plain values; free-form dictionaries become ``model.config.n_layer``.

    Checkpoints record this and trackers receive it. Secret values are ``None``.
    """

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(to_dict(config, secrets=False), ""))


def ranges(texts: list[str], key: str) -> list[tuple[int, int]]:
    """``['7', '10-12']`` -> ``[(7, 8), (10, 13)]``: sorted half-open ranges. Raises :class:`RequestError`."""
    found = []
    for text in texts:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", str(text))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise RequestError(
                f"{key}: {str(text)[:40]!r} is not a range: write '1200' or '1200-1263', both included"
            )
        found.append((first, last + 1))
    return sorted(found)


def batch_points(config: RunConfig, block_size: int) -> list[tuple[Duration, int]]:
    """(place, global batch in blocks from there on); the first place is 0. The option may be in blocks or in tokens.

    ``linear 8 64`` grows in multiples of 8 at equal distances: 8, 16, ..., 64.

    Raises:
        RequestError: a batch is not a whole number of blocks; the message has the numbers.
    """
    in_tokens = config.train.global_batch_tokens is not None
    name = "train.global_batch_tokens" if in_tokens else "train.global_batch_blocks"
    given = config.train.global_batch_tokens if in_tokens else config.train.global_batch_blocks
    assert given is not None  # guaranteed by check()
    blocks = [_whole_blocks(name, value, block_size if in_tokens else 1) for value in values_of(given)]
    if not isinstance(given, Curve):
        return [(START, blocks[0])]
    if not given.name:
        return [(place, batch) for (place, _), batch in zip(given.points, blocks)]
    first, last = blocks
    unit = min(first, last)
    if given.name != "linear" or max(first, last) % unit:
        raise RequestError(
            f"{name} {given}: a batch grows from one number to a multiple of it, such as 'linear 8 64', or by points such "
            "as '0: 8, 10%: 32'"
        )
    batches = range(first, last + 1, unit) if first <= last else range(first, last - 1, -unit)
    share = END.exact() / len(batches)
    return [
        (Duration(float(number * share), "percent") if number else START, batch)
        for number, batch in enumerate(batches)
    ]


def global_batches(config: RunConfig, block_size: int) -> list[int]:
    """The global batches of a run in blocks: one, or all that its curve has."""
    return list(dict.fromkeys(batch for _, batch in batch_points(config, block_size)))


def _whole_blocks(name: str, value: float, block_size: int) -> int:
    if not float(value).is_integer():
        raise RequestError(f"{name} must be a whole number (got {value:g})")
    tokens = int(value)
    if tokens % block_size:
        raise RequestError(
            f"{name} must be a multiple of the block size {block_size} (got {tokens}); try "
            f"{multiples_near(tokens, block_size)}"
        )
    return tokens // block_size
