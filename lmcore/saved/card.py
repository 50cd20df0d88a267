"""The model card of an export, and the files next to it: curve, configuration, a task file for lm-eval.

The card contains what the run has recorded: base model, data, tokens, method, results. It does not contain a host or a path
of the machine. What is not recorded (licence, language, intended use) is listed for a person to fill in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from lmcore.checkpoint.reader import Checkpoint
from lmcore.disk import DISK, Disk
from lmcore.humanize import duration
from lmcore.report import curves
from lmcore.report.metrics import iterate_metrics
from lmcore.report.redact import redact_settings
from lmcore.saved import load

_SETS = 100
"""Largest number of sets that a card lists."""

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

TEMPLATE = """\
---
{{ card_data }}
---
# {{ name }}

A causal language model of {{ "{:,}".format(parameters) }} parameters,
{%- if base %} continued from {{ base }},{% else %} pretrained from scratch,{% endif %} trained with lmcore {{ lmcore }}.
These are the weights of step {{ "{:,}".format(step) }} ({{ weights }}, {{ dtype }}).
{%- if adapter %}
The adapter was merged into them; alone it is in `adapter/`.
{%- endif %}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({{ quoted }})  # this folder
model = AutoModelForCausalLM.from_pretrained({{ quoted }})
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

{% if eos %}It continues text; it does not follow instructions. Documents were separated by the end-of-text token, and no token
stands at their start.
{%- else %}It continues text; it does not follow instructions. Documents followed each other without a token between them, so
that it does not end a text.
{%- endif %}

## Results
{% if evaluations %}
| set | step | loss (nats/token) | perplexity | bits per byte |
|---|---|---|---|---|
{% for row in evaluations -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- if train_loss %}
Training loss at step {{ "{:,}".format(train_loss[0]) }}: {{ "%.4f" | format(train_loss[1]) }} nats/token.
{% endif %}
{%- if curve %}
![loss over steps](loss.png)
{% endif %}
## Training data
{% if data %}
| set | source | size |
|---|---|---|
{% for row in data -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- if tokens %}
Tokens seen: {{ "{:,}".format(tokens) }}{% if time %}, in {{ time }} (h:mm:ss) of training steps{% endif %}.
{% endif %}
Tokenizer: {{ "{:,}".format(vocab_size) }} ids.

## Training procedure

{% for key, value in procedure -%}
- {{ key }}: {{ value }}
{% endfor %}
All settings are in `training_config.yaml`.

## Score it on your own text

With lm-eval, one JSON object with a `text` a line in `held_out.jsonl`:

```
{{ lm_eval }}
```
{% if eos %}
`prefix_token_id={{ eos_id }}`: in training every document came after the end-of-text token; lm-eval would put the start
token there, which this model has never seen.
{%- else %}
lm-eval puts a token before every document, here the end-of-text token (`prefix_token_id={{ eos_id }}`). In training no token
stood there, so that the loss of the first tokens of a document is too high.
{%- endif %}

## Not recorded, for a person to fill in

Licence of the data and of the weights, languages, intended use, known biases and limits.
"""


def write(
    folder: Path,
    run_dir: Path,
    *,
    opened: Checkpoint,
    record: Mapping[str, Any],
    tokenizer: Any,
    parameters: int,
    adapter: Mapping[str, Any] | None = None,
    disk: Disk = DISK,
) -> None:
    """Write the card and the files next to it into an export.

    Args:
        run_dir: the run folder, whose ``metrics.jsonl`` and ``config.yaml`` are read.
        record: content of ``lmcore_export.json``.
        adapter: ``method`` and number of ``parameters`` of a low-rank adapter.
    """
    results = read_results(run_dir / "metrics.jsonl", record["step"])
    if (run_dir / "config.yaml").is_file():
        disk.write_text(folder / "training_config.yaml", _without_paths(curves.read_settings(run_dir)))
    disk.mkdir(folder / "lm_eval")
    disk.write_text(folder / "lm_eval" / "own_text.yaml", LM_EVAL_TASK)
    curve = curves.loss_png(results.run)
    if curve is not None:
        disk.write_bytes(folder / "loss.png", curve)
    text = markdown(
        results,
        opened=opened,
        record=record,
        tokenizer=tokenizer,
        parameters=parameters,
        adapter=adapter,
        curve=curve is not None,
    )
    disk.write_text(folder / "README.md", text)


@dataclass
class Results:
    """The recorded results of a run up to one of its steps; the size in memory does not depend on the length of the run."""

    run: curves.Run
    train: dict[str, Any] = field(default_factory=dict)
    """The last train record up to that step."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last eval record of each set up to that step."""


def read_results(metrics: Path, step: int) -> Results:
    """The results of a run up to ``step``; empty if there is no such file."""
    results = Results(curves.Run("", metrics.parent))
    if not metrics.is_file():
        return results
    for record in iterate_metrics(metrics):
        if (
            record.get("event") == "resume"
            and curves.is_number(record.get("step"))
            and record["step"] >= step
        ):
            continue  # what the run continued with later does not concern this step
        results.run.add(record)
        if record["kind"] not in ("train", "eval") or record.get("step", 0) > step:
            continue
        name = record.get("set")
        if record["kind"] == "train":
            results.train = record
        elif isinstance(name, str) and (name in results.evaluations or len(results.evaluations) < _SETS):
            results.evaluations[name] = record
    return results


def markdown(
    results: Results,
    *,
    opened: Checkpoint,
    record: Mapping[str, Any],
    tokenizer: Any,
    parameters: int,
    curve: bool,
    adapter: Mapping[str, Any] | None = None,
) -> str:
    """The text of the card, including the metadata that the Hub reads."""
    from huggingface_hub import ModelCard, ModelCardData  # lazily: only an export needs it

    step, last = record["step"], results.train
    seconds: Any = last.get("train_seconds")
    base = base_model(opened)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lmcore", *(["lora"] if adapter else [])],
        base_model=base if base and _is_hub_id(base) else None,
    )
    made = ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        name=_cell(record["run"]),
        quoted=json.dumps(record["run"], ensure_ascii=False),  # also a valid Python string
        parameters=parameters,
        base=f"`{base}`" if base else None,
        lmcore=record["lmcore"],
        step=step,
        weights="moving average" if record["weights"] == "ema" else "as trained",
        dtype=record["dtype"],
        adapter=adapter,
        evaluations=[
            (
                _cell(row.get("set")),
                f"{row['step']:,}" if curves.is_number(row.get("step")) else "-",
                *map(_number, map(row.get, ("loss", "perplexity", "bits_per_byte"))),
            )
            for row in results.evaluations.values()
        ],
        train_loss=(last["step"], last["loss"])
        if all(map(curves.is_number, (last.get("step"), last.get("loss"))))
        else None,
        curve=curve,
        data=[tuple(map(_cell, row)) for row in _data(results.run.start or {})],
        tokens=last.get("tokens"),
        time=duration(seconds) if curves.is_number(seconds) and seconds >= 1 else None,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos=load.reading_of(opened)["eos"],
        lm_eval=shlex.join(
            [
                *("lm_eval", "--model", "hf", "--model_args"),
                f"pretrained={record['run']},prefix_token_id={tokenizer.eos_id}",
                *("--include_path", f"{record['run']}/lm_eval", "--tasks", "own_text"),
            ]
        ),
        procedure=_procedure(opened, adapter),
    )
    return str(made)


def base_model(opened: Checkpoint) -> str | None:
    """The pretrained model that a run started from: its Hub id or the name of its folder; ``None`` if from scratch."""
    named = (opened.state.get("config") or {}).get("model.from_pretrained")
    if not isinstance(named, str) or not named:
        return None
    if _is_hub_id(named) and not os.path.exists(named):
        return named
    path = Path(os.path.abspath(named))
    return f"{path.parent.name}/{path.name}" if path.name in ("export", "model") else path.name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and not name.endswith(
        "/export"
    )


def _data(start: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(set, source, size) of the texts in the run's first record; only names, no paths."""
    rows = []
    for key, value in (start.get("rows") or {}).items():
        found = re.fullmatch(r"(text|training text|held out|validation|test)[ :]*\(?(.*?)\)?", str(key))
        if found and ("tokens" in str(value) or "files" in str(value)):
            kind = {"text": "train", "training text": "train", "held out": "validation"}.get(
                found[1], found[1]
            )
            rows.append((kind, found[2], str(value)))
    return rows


def _procedure(opened: Checkpoint, adapter: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    config: Mapping[str, Any] = opened.state.get("config") or {}
    used = (opened.state.get("topology") or {}).get("precision")
    if used and config.get("train.precision") == "auto":
        config = {**config, "train.precision": f"{used} (auto)"}
    rows: list[tuple[str, str]] = []

    def add(label: str, *keys: str) -> None:
        values = [
            f"{key.rpartition('.')[2]} {config[key]}" for key in keys if config.get(key) not in (None, [], "")
        ]
        if values:
            rows.append((label, ", ".join(values)))

    if adapter:
        words = f"{adapter['method']}; {adapter['parameters']:,} parameters trained, the others frozen"
        rows.append(("method", words))
    elif config.get("model.from_pretrained"):
        rows.append(("method", "continued pretraining of all weights"))
    else:
        rows.append(("method", "pretraining from scratch"))
    add("optimizer", "optim.name", "optim.lr", "optim.betas", "optim.weight_decay", "optim.clip_norm")
    add("schedule", "optim.schedule", "optim.warmup", "train.duration")
    add("batch", "train.global_batch_blocks", "train.global_batch_tokens", "data.block_size")
    add("precision", "train.precision", "train.param_dtype")
    add("seed", "seed")
    rows.append(("versions", f"lmcore {opened.manifest.get('lmcore')}, torch {opened.manifest.get('torch')}"))
    return rows


def _without_paths(settings: Any) -> str:
    """A configuration as YAML without secrets; paths of this machine are shortened to their last part."""
    values = redact_settings(settings)  # an older run redacted less
    return yaml.safe_dump(_cut(values), sort_keys=False, allow_unicode=True, width=110)


_LOCAL: Final = r"(?:(?:file|local):(?://[^/\s]*)?(?=/))"
"""The part of a local file's URL before the path; it may include a host."""
_WHOLE_PATH: Final = re.compile(
    rf"(?P<before>[\w.\-]+=)?(?:{_LOCAL}|(?=(?:~(?:[A-Za-z_][\w.\-]*)?|\.\.?)?/))(?P<path>.*)", re.DOTALL
)
"""A value that is a path, or NAME=PATH; it may contain spaces."""
_PATH_INSIDE: Final = re.compile(
    rf"(?<![\w/.~*$)\]}}])(?:{_LOCAL}/|(?:~(?:[A-Za-z_][\w.\-]*)?|\.\.?)/|/[^/\s\"'`<>|;,:()]+/)[^\s\"'`<>|;,:()]*"
)
"""An absolute path within a longer text, of at least two parts, so that "/" and "and/or" are unchanged."""


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_cut(key): _cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    if not isinstance(value, str):
        return value
    if found := _WHOLE_PATH.fullmatch(value):
        return (found["before"] or "") + _last_part(found["path"])
    return _PATH_INSIDE.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _cell(value: Any) -> str:
    """Text for a Markdown table cell or heading: on one line, without characters that would end the cell or start HTML."""
    text = re.sub(r"\s+", " ", str(value))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _number(value: Any) -> str:
    return f"{value:.4f}" if curves.is_number(value) else "-"
