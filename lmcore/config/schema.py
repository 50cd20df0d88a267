# ruff: noqa: RUF009 -- option() gives an immutable dataclasses.field, which is what the rule cannot see.
"""The schema: every name that a user may set, its default, its help, its limits, its class for resume.

Comes in: plain values (a nested dictionary, as YAML gives it). Goes out: one frozen :class:`RunConfig`, flat
views of it, and its YAML. What always holds: nothing here imports torch (``--help`` must be quick) or any
other room; no room imports this one; ``build(to_dict(config)) == config``; every field has a class for
resume:

* ``free``: may change at a resume, unseen.
* ``warn``: may change; the run says both values and what it does.
* ``refuse``: a changed past (law 6): refused with both values, unless ``allow_changes`` names the key.

The line under a field is its help. Units are in the names; a duration is ``500`` (steps), ``1e9 tokens``, ``2
epochs``, ``10%``, ``30 min`` or ``never``. :mod:`lmcore.config.parse` reads files and the command line into
this, :mod:`lmcore.config.checks` checks what no single field can know.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lmcore.config import yaml
from lmcore.config.durations import Duration, Durations
from lmcore.errors import RequestError

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
    """A field with its class for resume and its limits; ``secret`` values are never written anywhere."""
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
    """Training text: files, folders, globs, hf://..., sources {path, weight}; none: Python's library."""
    valid: Entries = option([], "warn")
    """Held-out text, evaluated during training; sources with a name are separate sets."""
    test: Entries = option([], "free")
    """Text that is scored once, after training."""
    valid_fraction: float | None = option(0.01, "refuse", at_least=0, below=1)
    """Share of the training documents held out by a hash of their content, where data.valid is not given."""
    mode: Literal["store", "stream"] = option("store", "refuse")
    """store: tokenize once to a memory-mapped token store; stream: tokenize on the fly."""
    block_size: int | None = option(None, "refuse", at_least=1)
    """Tokens of a block; default: the model's context, at most 1,024."""
    text_field: str = option("text", "refuse")
    """The field or column that holds the text in JSON lines and parquet."""
    unit: Literal["auto", "line", "paragraph", "file"] = option("auto", "refuse")
    """What one document is in plain text files."""
    encoding: str = option("utf-8", "refuse")
    """Encoding of plain text files, such as shift_jis or euc_jp."""
    eos: bool = option(True, "refuse")
    """End every document with the end-of-sequence token."""
    store_dir: str = option("token_stores", "free")
    """Folder of the token stores; they are shared by all runs on the same text."""
    processes: int | None = option(None, "free", at_least=1)
    """Processes that tokenize; default: the cores of this machine over its ranks."""
    workers: int = option(0, "free", at_least=0)
    """Loader processes of each rank; a token store is fast enough with 0."""
    prefetch: int = option(2, "free", at_least=1)
    """Steps whose batches are made ready ahead of time."""
    pin_memory: bool | None = option(None, "free")
    """Pinned host memory for the copies to the device; default: on a GPU."""
    shuffle: Literal["full", "blocks", "none"] = option("full", "refuse")
    """full: a keyed permutation of all blocks; blocks: of runs of blocks (slow disks); none: as they lie."""
    shuffle_window: int = option(1_024, "refuse", at_least=1)
    """Blocks of the window in which a stream is shuffled."""
    stream_lanes: int | None = option(None, "refuse", at_least=1)
    """Parallel readers of a stream, whatever the topology; default: the blocks of the global batch."""
    document_mask: bool = option(False, "warn")
    """Documents that share a block cannot attend to one another."""
    on_error: Literal["raise", "skip"] = option("raise", "warn")
    """What a broken record does: end the run with its place, or be counted and skipped."""
    max_bad_fraction: float = option(0.001, "free", at_least=0, at_most=1)
    """Share of broken records above which skipping is refused."""
    skip_positions: list[str] = option([], "warn")
    """Positions that training jumps over: '1200' or '1200-1263' (both included)."""
    phases: list[dict[str, Any]] = option([], "warn")
    """Changes of the mixture: {position: N, weights: {name: w}}; append one to change a running mixture."""
    factory: str | None = option(None, "refuse")
    """Your own dataset: package.module:function; it is called with data.config."""
    config: dict[str, Any] = option({}, "refuse")
    """Arguments of data.factory (--data.config.pairs 1000)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str | None = option(None, "refuse")
    """A tokenizer to use: a folder, a SentencePiece .model file, a Hub id; default: one is trained."""
    revision: str | None = option(None, "refuse")
    """Commit of a Hub tokenizer."""
    train: bool = option(False, "refuse")
    """Train a new tokenizer for model.from_pretrained, whose weights know other ids; default: its own."""
    vocab_size: int | None = option(32_000, "refuse", at_least=1)
    """Pieces of the tokenizer that is trained."""
    model_type: Literal["bpe", "unigram", "char"] = option("bpe", "refuse")
    """SentencePiece model; char is character-level."""
    character_coverage: float = option(0.9995, "refuse", above=0, at_most=1)
    """Share of the characters that become pieces; the rest is written in bytes."""
    byte_fallback: bool = option(True, "refuse")
    """Unknown characters become bytes, so that no text is lost."""
    split_digits: bool = option(True, "refuse")
    """Every digit is a piece of its own."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = option("identity", "refuse")
    """Normalization inside the tokenizer; all but identity lose the exact round trip."""
    user_symbols: list[str] = option([], "refuse")
    """Pieces that are always kept whole."""
    sample_bytes: int = option(100_000_000, "refuse", at_least=1)
    """Bytes of text to train on at most, from all over the corpus; without spaces, 50 bytes of memory for each."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = option(0, "refuse", at_least=0)
    """Rank of low-rank adapters (by peft) on frozen weights of model.from_pretrained; 0: none."""
    alpha: float | None = option(None, "refuse", above=0)
    """The adapters count alpha / rank; default: twice the rank."""
    dropout: float = option(0.0, "warn", at_least=0, below=1)
    """Dropout before the adapters."""
    target_modules: list[str] = option([], "refuse")
    """Endings of the names of the layers that get one (q_proj v_proj), or all-linear; default: peft's choice."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    type: str | None = option("gpt2", "refuse")
    """A transformers model type (gpt2, llama, qwen3, mistral, ...), trained from scratch."""
    config: dict[str, Any] = option({}, "refuse")
    """Any field of that type's config (--model.config.n_layer 8), or arguments of model.factory."""
    from_pretrained: str | None = option(None, "refuse")
    """Start from these weights: a folder such as runs/X/export, or a Hub id."""
    revision: str | None = option(None, "refuse")
    """Commit of a Hub model."""
    factory: str | None = option(None, "refuse")
    """Your own nn.Module: package.module:function; it is called with model.config."""
    preset: Literal["gpt2", "modern", "modern_gguf"] | None = option(None, "refuse")
    """A model by name, in place of model.type: gpt2, modern (nanochat), modern_gguf (qwen3, for llama.cpp too)."""
    size: Literal["5M", "15M", "124M", "350M", "1B"] | None = option(None, "refuse")
    """Layers, width and heads of the preset; default: 5M."""
    zero_init: bool | None = option(None, "free")
    """Start output projections and an untied head at zero; default: the modern presets do."""
    attention: Attention | None = option(None, "free")
    """Attention kernel of transformers: sdpa, eager, flash_attention_2, ...; default: the best there is."""
    lora: LoraConfig = section(LoraConfig)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    label_smoothing: float = option(0.0, "warn", at_least=0, below=1)
    """Share of the target that is spread over the vocabulary (training only)."""
    z_loss: float = option(0.0, "warn", at_least=0)
    """Weight of the squared log of the softmax denominator (training only; PaLM used 1e-4)."""
    chunk: int | None = option(None, "free", at_least=0)
    """Tokens whose logits are held at once; 0: all; default: chosen by size."""
    factory: str | None = option(None, "refuse")
    """Your own loss: package.module:function taking (outputs, batch), giving (sum, count of labels not -100)."""
    config: dict[str, Any] = option({}, "refuse")
    """Keyword arguments of loss.factory."""


@dataclass(frozen=True, kw_only=True)
class LrMultipliersConfig:
    matrices: float | None = option(None, "warn", at_least=0)
    """Learning rate of the matrices inside the network, as a multiple of optim.lr; default: 1."""
    embedding: float | None = option(None, "warn", at_least=0)
    """The same of the embeddings (and of a head that is tied to them); default: the optimizer's."""
    head: float | None = option(None, "warn", at_least=0)
    """The same of a vocabulary head of its own; default: the optimizer's."""
    vectors: float | None = option(None, "warn", at_least=0)
    """The same of biases and norms; default: the optimizer's."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = option("adamw", "refuse")
    """adamw, adam, sgd, adafactor, muon (matrices; adamw for the rest), or package.module:Class."""
    config: dict[str, Any] = option({}, "warn")
    """Further keyword arguments of the optimizer."""
    lr: float = option(6e-4, "warn", above=0)
    """Peak learning rate."""
    min_lr_ratio: float = option(0.1, "warn", at_least=0, at_most=1)
    """Where the schedule ends, as a share of the peak."""
    betas: tuple[float, float] = option((0.9, 0.95), "warn", at_least=0, below=1)
    """Decay of the first and the second moment."""
    eps: float = option(1e-8, "warn", above=0)
    """Term that keeps Adam's division finite."""
    lr_multipliers: LrMultipliersConfig = section(LrMultipliersConfig)
    momentum: float = option(0.95, "warn", at_least=0, below=1)
    """Momentum of sgd and muon."""
    momentum_start: float | None = option(None, "warn", at_least=0, below=1)
    """Momentum of the first step; default: optim.momentum, for muon 0.85."""
    momentum_warmup: Duration = option(Duration(10, "percent"), "warn")
    """How long the momentum takes from optim.momentum_start to optim.momentum."""
    cautious_weight_decay: bool = option(False, "warn")
    """Of muon's matrices only those weights decay that the update makes smaller as well."""
    weight_decay: float = option(0.1, "warn", at_least=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    clip_norm: float = option(1.0, "warn", at_least=0)
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = option("cosine", "warn")
    """Shape of the learning rate over the run; wsd: warm-up, stable, decay."""
    warmup: Duration = option(Duration(2, "percent"), "warn")
    """Linear warm-up."""
    decay: Duration = option(Duration(20, "percent"), "warn")
    """The last part of wsd, in which the rate falls."""
    train_only: list[str] = option([], "refuse")
    """Train only the parameters whose name matches one of these patterns ('transformer.h.11.*')."""
    freeze: list[str] = option([], "refuse")
    """Do not train the parameters whose name matches one of these patterns."""
    fused: bool | None = option(None, "free")
    """torch's fused update; default: where it exists."""
    state_dtype: Literal["fp32", "bf16"] = option("fp32", "refuse")
    """Type of the optimizer's moments: fp32. For smaller ones: optim.name torchao.optim:AdamW8bit, or adafactor."""
    ema_decay: float = option(0.0, "refuse", at_least=0, below=1)
    """Exponential moving average of the weights, evaluated and exported; 0: off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    duration: Duration = option(Duration(1, "epochs"), "warn")
    """The horizon: steps, tokens or epochs."""
    global_batch_blocks: int | None = option(512, "warn", at_least=1)
    """Blocks of one step over all ranks; accumulation follows from the world size."""
    global_batch_tokens: int | None = option(None, "warn", at_least=1)
    """The same in tokens; a multiple of data.block_size."""
    micro_batch_blocks: int | Literal["auto"] = option("auto", "warn", at_least=1)
    """Blocks of one forward pass on one rank; auto: the largest that fits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "warn")
    """Arithmetic; auto: bf16 on GPUs that compute in it (compute capability 8.0 or newer), else fp32."""
    param_dtype: Literal["fp32", "bf16"] = option("fp32", "warn")
    """Type in which the weights are kept."""
    tf32: bool = option(True, "warn")
    """TensorFloat-32 for the fp32 matrix products of a GPU."""
    compile: bool = option(False, "warn")
    """torch.compile, layer by layer."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option("default", "free")
    """Mode of torch.compile."""
    activation_checkpointing: bool | int = option(False, "free", at_least=0)
    """Recompute the layers in the backward pass: less memory, about a third more arithmetic; 2: every second one."""
    deterministic: bool = option(False, "warn")
    """Deterministic kernels, and an error where there is none."""
    max_minutes: float | None = option(None, "free", above=0)
    """Save and leave (exit code 75) after this time."""
    profile: str | None = option(None, "free")
    """Steps to profile with torch, such as '10-15'; the trace goes to the run folder."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    deepspeed: str | None = option(None, "warn")
    """A DeepSpeed configuration (ds_configs/zero3.json); an accelerate configuration can bring one too."""
    timeout_seconds: int = option(1_800, "free", at_least=1)
    """How long a rank waits for the others in a collective operation of the device; 10 times that on the host."""
    reduce_dtype: Literal["fp32", "bf16"] = option("fp32", "warn")
    """Type in which gradients are sent between ranks (bf16 halves the traffic), and those of bf16 weights are summed."""


@dataclass(frozen=True, kw_only=True)
class KeepBestConfig:
    k: int = option(0, "free", at_least=0)
    """Keep this many best checkpoints beside the newest, and save before each evaluation; 0: none."""
    metric: str = option("loss", "warn")
    """Of an evaluation: loss, perplexity, bits_per_byte, of another than the first set name/loss; or train/loss."""
    mode: Literal["min", "max"] = option("min", "warn")
    """Which is better."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Durations = option(Durations.parse("10%"), "free")
    """Save so often; several intervals may be given, and time ('[1000, 30 min]'). The end always saves."""
    keep: int = option(3, "free", at_least=1)
    """Newest checkpoints that stay."""
    keep_best: KeepBestConfig = section(KeepBestConfig)
    keep_every: Durations = option(Durations(), "free")
    """Checkpoints that stay for ever, such as '10%' or '10000 steps'."""
    background: bool = option(True, "free")
    """Write while training goes on."""
    on_full_disk: Literal["continue", "stop"] = option("continue", "free")
    """What a save that fails for want of space does."""
    export: Literal["last", "best"] = option("last", "free")
    """Which weights the export takes."""
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "free")
    """Type of the exported weights."""
    private: bool = option(False, "free")
    """Make the run folder readable by its owner only."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    patience: int = option(0, "warn", at_least=0)
    """Stop after this many evaluations without improvement; 0: never."""
    metric: str = option("loss", "warn")
    """Evaluation metric that is watched."""
    mode: Literal["min", "max"] = option("min", "warn")
    """Which is better."""
    threshold: float = option(0.0, "warn", at_least=0)
    """Smallest change that counts as an improvement."""
    target: float | None = option(None, "warn")
    """Stop when the metric reaches this."""
    divergence: float | None = option(None, "warn")
    """Stop when the metric gets worse than this."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every: Durations = option(Durations.parse("10%"), "free")
    """Evaluate so often."""
    at_start: bool = option(False, "free")
    """Evaluate before the first step."""
    at_end: bool = option(True, "free")
    """Evaluate after the last step."""
    blocks: int | None = option(None, "warn", at_least=1)
    """Blocks of each held-out set that are scored; default: all."""
    micro_batch_blocks: int | None = option(None, "free", at_least=1)
    """Blocks of one forward pass; default: as in training."""
    prompts: list[str] = option([], "free")
    """Texts that the model continues at every evaluation."""
    sample_tokens: int = option(100, "free", at_least=1)
    """Tokens of each continuation."""
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    every: Durations = option(Durations.parse(100), "free")
    """Log so often."""
    trackers: list[str] = option(["tensorboard"], "free")
    """tensorboard, wandb, mlflow, trackio, ... beside metrics.jsonl; '[]': none."""
    project: str = option("lmcore", "free")
    """Project name for trackers."""
    name: str | None = option(None, "free")
    """Run name for trackers; default: the run folder's name."""
    tags: list[str] = option([], "free")
    """Tags for trackers."""
    save_code: bool = option(False, "free")
    """Let the tracker keep a copy of the code."""
    webhook: str | None = option(None, "free", secret=True)
    """Address for a Slack-compatible message at the end, on failure, on rewind; or LMCORE_WEBHOOK."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    max_skips: int = option(10, "free", at_least=0)
    """Updates that may be skipped for a non-finite loss or gradient within ``guard.spike_window`` steps, before a rewind."""
    max_rewinds: int = option(3, "free", at_least=0)
    """Rewinds to a checkpoint before the run gives up (exit code 70)."""
    spike: Literal["off", "warn", "skip", "rewind"] = option("warn", "warn")
    """What a loss spike does."""
    spike_window: int = option(200, "warn", at_least=10)
    """Steps to which a loss is compared."""
    spike_sigma: float = option(6.0, "warn", above=0)
    """Robust standard deviations above the window's median that make a spike."""
    hash_every: Durations = option(Durations(), "free")
    """Compare the weights of all ranks so often."""
    stuck_seconds: float = option(1_800.0, "free", above=0)
    """A step that takes longer ends the run with the stacks of all ranks."""
    stop_before_deadline_seconds: float = option(120.0, "free", at_least=0)
    """Save and leave so long before a Slurm job ends; at most half of the time that it has left when it begins."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run_dir: str | None = option(None, "free")
    """Folder of the run; default: runs/<name of the last --config>, the same on every restart."""
    seed: int = option(1, "refuse", at_least=0, below=2**63)
    """Seed of everything: order, initial weights, dropout, held-out split."""
    resume: str = option("auto", "free")
    """auto: go on from the newest good checkpoint; never; best; or the path of a checkpoint."""
    allow_changes: list[str] = option([], "free")
    """Keys that may differ from the checkpoint's although that is refused by default."""
    dry_run: bool = option(False, "free")
    """Print the plan and stop."""
    fast_dev_run: bool = option(False, "free")
    """Go through every part of a run in seconds."""
    debug: bool = option(False, "free")
    """Show tracebacks of wrong requests."""
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
    """One option of the schema: its dotted name, its type, and what :func:`option` was told."""

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
    """Nested plain values (what YAML and JSON can hold); without ``secrets`` those are ``None``."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values[item.name] = to_dict(value, secrets=secrets)
        elif item.metadata["secret"] and not secrets:
            values[item.name] = None
        else:
            values[item.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Durations):
        return value.plain()
    if isinstance(value, Duration):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def build(values: dict[str, Any], kind: type = RunConfig) -> Any:
    """The inverse of :func:`to_dict`; missing keys take their defaults. The parser has checked the types."""
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
        arguments[name] = value
    return kind(**arguments)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as asked; ``--config`` of this text repeats the run. Secrets are left out."""
    return yaml.dump(to_dict(config, secrets=False))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> scalar, or a list of plain values; free-form ones become ``model.config.n_layer``.

    This is what checkpoints record and trackers get; secrets are ``None``.
    """

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(to_dict(config, secrets=False), ""))


class Change(NamedTuple):
    """A key whose value differs between a checkpoint and the present request."""

    key: str
    old: Any
    new: Any
    cls: Resume


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """What differs between two :func:`flatten` views, refusals first; keys of another version are free."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before != after:
            known = keys().get(name) or keys().get(name.split(".config.")[0] + ".config")
            found.append(Change(name, before, after, known.resume if known else "free"))
    return sorted(found, key=lambda change: ["refuse", "warn", "free"].index(change.cls))


def refuse_changes(found: list[Change], allowed: list[str]) -> list[Change]:
    """Raise :class:`RequestError` on a changed past that is not ``allowed``; else give those to be said."""
    refused = [change for change in found if change.cls == "refuse" and change.key not in allowed]
    if refused:
        listed = "; ".join(f"{change.key}: {change.old!r} then, {change.new!r} now" for change in refused)
        names = " ".join(change.key for change in refused)
        raise RequestError(
            f"the checkpoint was made under another configuration ({listed}): take another --run_dir, "
            f"or insist with --allow_changes {names}"
        )
    return [change for change in found if change.cls != "free"]


def ranges(texts: list[str], key: str) -> list[tuple[int, int]]:
    """``['7', '10-12']`` -> ``[(7, 8), (10, 13)]``: half-open, sorted, as the order takes them."""
    found = []
    for text in texts:
        first, dash, last = str(text).partition("-")
        if (
            not first.isdecimal()
            or not (last.isdecimal() if dash else True)
            or int(last or first) < int(first)
        ):
            raise RequestError(f"{key}: {text!r} is not a range: write '1200' or '1200-1263', both included")
        found.append((int(first), int(last or first) + 1))
    return sorted(found)


def global_batch_blocks(config: RunConfig, block_size: int) -> int:
    """Blocks of a step, whether it was given in blocks or in tokens."""
    tokens = config.train.global_batch_tokens
    if tokens is None:
        assert config.train.global_batch_blocks is not None  # check() has seen to it
        return config.train.global_batch_blocks
    if tokens % block_size:
        below = tokens // block_size * block_size
        near = f"{below} or {below + block_size}" if below else f"{block_size}"
        raise RequestError(
            f"train.global_batch_tokens {tokens} is no multiple of the block size {block_size}: take {near}"
        )
    return tokens // block_size


def type_name(kind: Any) -> str:
    """A type as a person would write it: ``int | auto``, ``full | blocks | none``, ``list``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = [type_name(part) for part in typing.get_args(kind)]
        return " | ".join("null" if part == "NoneType" else part for part in parts)
    if typing.get_origin(kind) is tuple:
        return ", ".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    return {Durations: "durations", Duration: "duration"}.get(origin, origin.__name__)
