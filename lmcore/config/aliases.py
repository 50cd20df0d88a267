"""What an option of another training program is called here, for the error message about an unknown option."""

from __future__ import annotations

_TRAINER = {  # transformers' TrainingArguments and run_clm.py
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "bf16": "train.precision bf16",
    "block_size": "data.block_size",
    "config_name": "model.type and --model.config.FIELD",
    "config_overrides": "model.config.FIELD",
    "data_seed": "seed",
    "dataloader_num_workers": "data.workers",
    "dataloader_pin_memory": "data.pin_memory",
    "dataset_name": "data.train hf://OWNER/NAME",
    "ddp_timeout": "engine.timeout_seconds",
    "deepspeed": "engine.deepspeed",
    "do_eval": "evaluate.every",
    "do_train": "",
    "eval_steps": "evaluate.every",
    "eval_strategy": "evaluate.every (500, '1 epochs' or never)",
    "evaluation_strategy": "evaluate.every (500, '1 epochs' or never)",
    "fp16": "train.precision fp16",
    "gradient_accumulation_steps": "train.global_batch_blocks (accumulation is derived from it)",
    "gradient_checkpointing": "train.activation_checkpointing",
    "label_smoothing_factor": "loss.label_smoothing",
    "learning_rate": "optim.lr",
    "load_best_model_at_end": "checkpoint.keep_best.k 1 --checkpoint.export best",
    "logging_dir": "run_dir (trackers write below it)",
    "logging_steps": "report.every",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "max_seq_length": "data.block_size",
    "max_steps": "train.duration",
    "metric_for_best_model": "checkpoint.keep_best.metric",
    "model_name_or_path": "model.from_pretrained",
    "model_revision": "model.revision",
    "model_type": "model.type",
    "num_train_epochs": "train.duration 'N epochs'",
    "optim": "optim.name",
    "output_dir": "run_dir",
    "overwrite_output_dir": "resume never",
    "per_device_eval_batch_size": "evaluate.micro_batch_blocks",
    "per_device_train_batch_size": "train.micro_batch_blocks (and --train.global_batch_blocks over all devices)",
    "preprocessing_num_workers": "data.processes",
    "report_to": "report.trackers",
    "resume_from_checkpoint": "resume (auto by default)",
    "run_name": "report.name",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "streaming": "data.mode stream",
    "tokenizer_name": "tokenizer.path",
    "torch_compile": "train.compile",
    "train_file": "data.train",
    "validation_file": "data.valid",
    "validation_split_percentage": "data.valid_fraction",
    "warmup_ratio": "optim.warmup N%",
    "warmup_steps": "optim.warmup",
}
_NANOGPT = {
    "always_save_checkpoint": "checkpoint.every",
    "backend": "",
    "batch_size": "train.micro_batch_blocks (and --train.global_batch_blocks over all devices)",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "compile": "train.compile",
    "dataset": "data.train",
    "decay_lr": "optim.schedule",
    "device": "",
    "dropout": "model.config.resid_pdrop",
    "dtype": "train.precision",
    "eval_interval": "evaluate.every",
    "eval_iters": "evaluate.blocks",
    "grad_clip": "optim.clip_norm",
    "init_from": "model.from_pretrained (or --resume)",
    "log_interval": "report.every",
    "lr_decay_iters": "train.duration",
    "max_iters": "train.duration",
    "min_lr": "optim.min_lr_ratio (a share of --optim.lr)",
    "n_embd": "model.config.n_embd",
    "n_head": "model.config.n_head",
    "n_layer": "model.config.n_layer",
    "out_dir": "run_dir",
    "vocab_size": "tokenizer.vocab_size",
    "wandb_log": "report.trackers wandb",
    "wandb_project": "report.project",
    "wandb_run_name": "report.name",
    "warmup_iters": "optim.warmup",
}
_LIGHTNING = {
    "accelerator": "",
    "accumulate_grad_batches": "train.global_batch_blocks (accumulation is derived from it)",
    "check_val_every_n_epoch": "evaluate.every 'N epochs'",
    "ckpt_path": "resume",
    "default_root_dir": "run_dir",
    "detect_anomaly": "train.deterministic",
    "devices": "",
    "enable_checkpointing": "checkpoint.every",
    "gradient_clip_val": "optim.clip_norm",
    "limit_val_batches": "evaluate.blocks",
    "log_every_n_steps": "report.every",
    "logger": "report.trackers",
    "max_epochs": "train.duration 'N epochs'",
    "max_time": "train.max_minutes",
    "num_nodes": "",
    "num_sanity_val_steps": "evaluate.at_start",
    "num_workers": "data.workers",
    "overfit_batches": "fast_dev_run",
    "precision": "train.precision",
    "strategy": "",
    "val_check_interval": "evaluate.every",
}
_GENERAL = {
    "epochs": "train.duration 'N epochs'",
    "gpus": "",
    "lr": "optim.lr",
    "steps": "train.duration",
    "wandb": "report.trackers wandb",
    "weight_decay": "optim.weight_decay",
}
_LAUNCHER = {"accelerator", "backend", "device", "devices", "gpus", "num_nodes", "strategy"}
NAMES = {**_GENERAL, **_LIGHTNING, **_NANOGPT, **_TRAINER}
"""Name in another program -> option here and, where it differs, its value; empty: there is no such option."""


def foreign(name: str, dashes: str = "--") -> str | None:
    """The hint for an option that another program has, or ``None``.

    >>> foreign("learning_rate")
    'here it is --optim.lr'
    """
    plain = name.replace("-", "_").lower()
    if plain == "version":
        return "lmcore --version prints it"
    if plain not in NAMES:
        return None
    if plain in _LAUNCHER:
        return "devices and strategy are chosen by the launcher: accelerate launch --config_file accelerate_configs/..."
    if not NAMES[plain]:
        return "it is not needed here"
    return f"here it is {dashes}{NAMES[plain]}"
