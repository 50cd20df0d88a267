"""The text of ``--help`` and ``--print_config``: the help under each field of the schema, with types and values.

Neither torch nor any other heavy library is imported, so that the help appears at once.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import typing
from typing import Any

from lmcore.config import schema, yaml
from lmcore.config.convert import type_name
from lmcore.config.schema import RunConfig, keys
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean

_HEAD = """\
usage: accelerate launch train_lm.py [--config FILE ...] [--name value ...]
       lmcore train [--config FILE ...] [--name value ...]

Pretrain a causal language model on your own text. Precedence: defaults < files in their order < command line. A list
takes several values (--data.train a.txt b.txt); a switch needs none (--dry_run). A duration is 500 (steps),
'1e9 tokens', '2 epochs', 10%, '30 min' or never; intervals may be several. A curve changes a value during the run:
'linear 0.1 0' or '0: 8, 10%: 32'. With --data.train and without --config,
the model, vocabulary, steps and learning rate are chosen by the size of the text; with neither, the demo is trained.
Defaults are in brackets.

  --config FILE          a YAML file of options; may be repeated, later files override earlier ones
  --print_config         print the merged options with their help, and exit
  --help [SECTION]       this text, or one section of it: {sections}"""


@functools.cache
def docs() -> dict[str, str]:
    """Dotted name -> help of the option, which is the string under its field."""
    lines: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for line, after in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
                lines[node.name, line.target.id] = " ".join(after.value.value.split())  # type: ignore  # the form of the schema is known
    found: dict[str, str] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, wanted in typing.get_type_hints(kind).items():
            if (kind.__name__, name) in lines:
                found[prefix + name] = lines[kind.__name__, name]
            else:
                walk(wanted, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def sections() -> list[str]:
    """The top-level sections of the schema, in order."""
    return list(dict.fromkeys(name.split(".")[0] for name in keys() if "." in name))


def help_text(section: str = "") -> str:
    """All options with their types and defaults, or those of one section. Raises :class:`RequestError`."""
    if section and section not in sections():
        raise RequestError(
            f"--help: unknown section {section!r}: choose from {', '.join(sections())}"
            f"{did_you_mean(section, sections())}"
        )
    lines = [] if section else [_HEAD.format(sections=", ".join(sections()))]
    before = None
    for name, key in keys().items():
        here = name.split(".")[0] if "." in name else ""
        if section and here != section:
            continue
        if here != before:
            lines.append(f"\n{here or 'run'}:")
            before = here
        lines.append(f"  --{name} <{type_name(key.type)}>  [{default_text(key)}]")
        lines += textwrap.wrap(docs()[name], 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")


def default_text(key: schema.Key) -> str:
    """The default of an option as a user would type it: ``10%``, ``null``, ``[tensorboard]``."""
    value = schema.plain(key.default)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def commented_yaml(config: RunConfig) -> str:
    """:func:`lmcore.config.schema.to_yaml` with the help above each option."""

    def walk(values: dict[str, Any], prefix: str, indent: str) -> list[str]:
        lines = []
        for name, value in values.items():
            if prefix + name in docs():
                lines.append(f"{indent}# {docs()[prefix + name]}")
                lines += [indent + line for line in yaml.dump({name: value}).splitlines()]
            else:
                lines += ["", f"{indent}{name}:"] if not prefix else [f"{indent}{name}:"]
                lines += walk(value, f"{prefix}{name}.", indent + "  ")
        return lines

    return "\n".join(walk(schema.to_dict(config, secrets=False), "", "")) + "\n"
