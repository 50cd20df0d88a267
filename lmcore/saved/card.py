"""The model card of an export, and what lies beside it: curve, configuration, a task file for lm-eval.

Comes in: the run folder (``metrics.jsonl``, ``config.yaml``) and what the export knows. Goes out:
``README.md``, ``loss.png``, ``training_config.yaml``, ``lm_eval/own_text.yaml``. What always holds: it says
only what was recorded; what nobody recorded (licence, language, intended use) is left for a person to fill
in, and named.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from lmcore.report import curves
from lmcore.report.metrics import read_metrics

LM_EVAL_TASK = """\
# Scores your own text: one JSON object a line with a field "text", in held_out.jsonl where you start lm-eval.
task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: held_out.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
  - metric: word_perplexity
metadata:
  version: 1.0
"""


def write(folder: Path, run_dir: Path, *, record: dict[str, Any], tokenizer: Any, parameters: int) -> None:
    """Write the card and its companions into an export."""
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    configuration = run_dir / "config.yaml"
    if configuration.exists():
        shutil.copyfile(configuration, folder / "training_config.yaml")
    (folder / "lm_eval").mkdir()
    (folder / "lm_eval" / "own_text.yaml").write_text(LM_EVAL_TASK, encoding="utf-8")
    curve = curves.loss_png(records)
    if curve is not None:
        (folder / "loss.png").write_bytes(curve)
    text = markdown(
        records, record=record, tokenizer=tokenizer, parameters=parameters, curve=curve is not None
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def markdown(
    records: list[dict[str, Any]],
    *,
    record: dict[str, Any],
    tokenizer: Any,
    parameters: int,
    curve: bool,
) -> str:
    """The card's text."""
    step = record["step"]
    start = next((r for r in records if r.get("event") in ("start", "resume") and "command" in r), {})
    until = [r for r in records if r["kind"] in ("train", "eval") and r.get("step", 0) <= step]
    last_train: dict[str, Any] = next((r for r in reversed(until) if r["kind"] == "train"), {})
    evaluations = {r["set"]: r for r in until if r["kind"] == "eval"}  # the last of each set
    name = record["run"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lmcore]",
        "---",
        f"# {name}",
        "",
        f"A causal language model of {parameters:,} parameters, pretrained with lmcore {record['lmcore']}; "
        f"the weights of step {step:,} ({'moving average' if record['weights'] == 'ema' else 'as trained'}, "
        f"{record['dtype']}).",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # this folder',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        'inputs = tokenizer("...", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))",
        "```",
        "",
        "It continues text; it follows no instructions. Documents were separated by the end-of-text token, "
        "and no token stands at their start.",
        "",
        "## Results",
        "",
    ]
    if evaluations:
        lines += ["| set | step | loss (nats/token) | perplexity | bits per byte |", "|---|---|---|---|---|"]
        for key, row in evaluations.items():
            values = (row["loss"], row["perplexity"], row["bits_per_byte"])
            numbers = " | ".join("-" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {key} | {row['step']:,} | {numbers} |")
        lines.append("")
    if last_train.get("loss") is not None:
        lines += [f"Training loss at step {last_train['step']:,}: {last_train['loss']:.4f} nats/token.", ""]
    if curve:
        lines += ["![loss over steps](loss.png)", ""]
    lines += ["## Data and training", ""]
    if start.get("data"):
        lines += ["| set | source | documents | tokens | bytes |", "|---|---|---|---|---|"]
        for row in start["data"]:
            cells = [row.get("set", ""), row.get("name", "")]
            cells += [
                f"{row[key]:,}" if row.get(key) is not None else "-"
                for key in ("documents", "tokens", "bytes")
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if last_train.get("tokens"):
        hours = last_train.get("train_seconds", 0) / 3600
        lines += [f"Tokens seen: {last_train['tokens']:,} in {hours:.2f} hours of training steps.", ""]
    lines += [f"- {key}: {value}" for key, value in start.get("rows", {}).items()]
    lines += ["", f"Tokenizer: {tokenizer.vocab_size:,} ids. Configuration: `training_config.yaml`.", ""]
    if start.get("command"):
        command = shlex.join(["accelerate", "launch", *start["command"]])
        lines += ["The command that trained it:", "", "```", command, "```", ""]
    lines += [f"- {key} {value}" for key, value in start.get("versions", {}).items()]
    lines += [
        "",
        "## Score it on your own text",
        "",
        "With lm-eval, one JSON object with a `text` a line in `held_out.jsonl`:",
        "",
        "```",
        f"lm_eval --model hf --model_args pretrained={name},prefix_token_id={tokenizer.eos_id} "
        f"--include_path {name}/lm_eval --tasks own_text",
        "```",
        "",
        f"`prefix_token_id={tokenizer.eos_id}`: in training every document came after the end-of-text token; "
        "lm-eval would put the start token there, which this model has never seen.",
        "",
        "## Not recorded, for a person to fill in",
        "",
        "Licence of the data and of the weights, languages, intended use, known biases and limits.",
        "",
    ]
    return "\n".join(lines)
