"""What ``--help`` and ``--print_config`` print: the line under each field of the schema, beside its value.

Comes in: the merged values. Goes out: text. What always holds: every option of the schema is there, in its
order; neither jsonargparse nor torch is imported, so that the help is there at once.
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
from lmcore.config.schema import RunConfig, keys
from lmcore.errors import RequestError

_HEAD = """\
usage: accelerate launch train_lm.py [--config FILE ...] [--name value ...]

Pretrain a causal language model on your own text. Defaults < files in their order < command line. Lists
take several values (--data.train a.txt b.txt); switches need none (--dry_run). A duration is 500 (steps),
'1e9 tokens', '2 epochs', 10%, '30 min' or never; where durations are taken, several may be given. Without
--config, the demo recipe stands in.

  --config FILE          a file of options; may be given again, the later one wins
  --print_config         print all options as they are merged, with their help, and stop
  --help [SECTION]       this text, or one section of it: {sections}"""


@functools.cache
def docs() -> dict[str, str]:
    """Dotted name -> the line under its field."""
    lines: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for line, after in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
                lines[node.name, line.target.id] = after.value.value  # type: ignore  # the schema is our own
    found: dict[str, str] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, wanted in typing.get_type_hints(kind).items():
            if (kind.__name__, name) in lines:
                found[prefix + name] = lines[kind.__name__, name]
            else:
                walk(wanted, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def help_text(merged: dict[str, Any], section: str = "") -> str:
    """All options with their values in brackets, or those of one section. Raises :class:`RequestError`."""
    sections = list(dict.fromkeys(name.split(".")[0] for name in keys() if "." in name))
    if section and section not in sections:
        raise RequestError(f"--help {section}: there is no such section; there are {', '.join(sections)}")
    lines = [] if section else [_HEAD.format(sections=", ".join(sections))]
    before = None
    for name, key in keys().items():
        here = name.split(".")[0] if "." in name else ""
        if section and here != section:
            continue
        if here != before:
            lines.append(f"\n{here or 'run'}:")
            before = here
        value = merged[name]
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        lines.append(f"  --{name} <{schema.type_name(key.type)}>  [{shown}]")
        lines += textwrap.wrap(docs()[name], 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")


def commented_yaml(config: RunConfig) -> str:
    """:func:`lmcore.config.schema.to_yaml` with the help above each key."""

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
