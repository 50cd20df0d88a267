"""Commands about the options themselves, and helpers for the commands that accept the options of ``train_lm.py``."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcore.config.curves import Curve
from lmcore.config.durations import Duration, Durations
from lmcore.config.help import docs
from lmcore.config.parse import parse
from lmcore.config.schema import Key, keys, plain
from lmcore.data.text.sources import without_run_files
from lmcore.errors import RequestError
from lmcore.run import own_text
from lmcore.run.folder import local_run_dir

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig


def configured(words: list[str], command: str, summary: str, *, allow_idle: bool = False) -> RunConfig:
    """The configuration from the command line, as ``train_lm.py`` would read it. ``--help`` prints and exits.

    Args:
        allow_idle: as in :func:`lmcore.config.parse.parse`.
    """
    if words in (["-h"], ["--help"]):
        print(f"usage: lmcore {command} [options of train_lm.py]\n\n{summary}")
        print("\ntrain_lm.py --help lists the options, --help SECTION those of one section.")
        raise SystemExit(0)
    return parse(
        words,
        note=lambda line: print(line, file=sys.stderr),
        own_text=own_text.defaults,
        own_entries=without_run_files,
        allow_idle=allow_idle,
    )


def run_dir_of(config: RunConfig) -> Path:
    """The run folder, which the parser always sets."""
    return local_run_dir(config.run_dir, config.local_dir)


def taken(words: list[str], name: str, default: str | None = None) -> str | None:
    """Remove ``--name VALUE`` (or ``--name=VALUE``) from ``words`` and return the value."""
    for index, word in enumerate(words):
        if word == f"--{name}":
            if index + 1 >= len(words):
                raise RequestError(f"--{name} needs a value")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"--{name}="):
            del words[index]
            return word.partition("=")[2]
    return default


def schema(words: list[str]) -> None:
    """Print the JSON schema of the configuration, for editors."""
    if words:
        raise RequestError(
            f"schema takes no arguments (got {words[0]}); usage: lmcore schema > lmcore.schema.json"
        )
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def json_schema() -> dict[str, Any]:
    """The configuration as a JSON schema (draft 2020-12), with help, defaults and limits.

    For an editor with the YAML language server, put this line at the top of a recipe::

        # yaml-language-server: $schema=lmcore.schema.json
    """
    root: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lmcore configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {},
    }
    for name, key in keys().items():
        *path, last = name.split(".")
        inside = root
        for part in path:
            section = {"type": ["object", "null"], "additionalProperties": False, "properties": {}}
            inside = inside["properties"].setdefault(part, section)
        inside["properties"][last] = _property(key)
    return root


def _property(key: Key) -> dict[str, Any]:
    found = _type_schema(key.type)
    for limit, word in (
        ("above", "exclusiveMinimum"),
        ("at_least", "minimum"),
        ("at_most", "maximum"),
        ("below", "exclusiveMaximum"),
    ):
        if key.limits[limit] is not None and not key.is_list:
            found[word] = key.limits[limit]
    found["description"] = docs()[key.name]
    if not key.secret:
        found["default"] = plain(key.default)
    return found


def _type_schema(kind: Any) -> dict[str, Any]:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        alternatives = [_type_schema(part) for part in parts]
        simple = [
            one["type"] for one in alternatives if set(one) == {"type"} and isinstance(one["type"], str)
        ]
        return {"type": simple} if len(simple) == len(alternatives) else {"anyOf": alternatives}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": ["array", "null"], "items": _type_schema(parts[0])}
    if origin is tuple:
        items = [_type_schema(part) for part in parts]
        return {"type": "array", "prefixItems": items, "minItems": len(parts), "maxItems": len(parts)}
    if origin is dict or kind is dict:
        return {"type": "object"}
    if kind is Duration:
        return {"type": ["string", "number", "null"]}
    if kind is Curve:
        return {"type": ["string", "object"]}
    if kind is Durations:
        one = {"type": ["string", "number"]}
        return {"anyOf": [{"type": ["string", "number", "null"]}, {"type": "array", "items": one}]}
    return {
        "type": {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}[kind]
    }


TRAINING = ("train", "inspect", "tokenizer", "prepare", "plan", "size")
"""Commands that accept the options of ``train_lm.py``."""


def completion(words: list[str]) -> None:
    """Print a completion script for the shell: completion bash (or zsh)."""
    if words not in (["bash"], ["zsh"]):
        raise RequestError("give the shell: lmcore completion bash, or lmcore completion zsh")
    from lmcore.cli.main import COMMANDS

    print(completion_script(words[0], list(COMMANDS)), end="")


def completion_script(shell: str, commands: list[str]) -> str:
    """A bash or zsh script that completes commands, options and their choices.

    Use it with ``source <(lmcore completion bash)``, or write it to a file that the shell reads.
    """
    choices = []
    for name, key in keys().items():
        found = _choices(key.type)
        if found:
            choices.append(f"    --{name}) words='{' '.join(found)}' ;;")
    training = [f"--{name}" for name in [*keys(), "config", "help", "print_config"]]
    named = [
        f"    {name}) options='{' '.join([*own_options(name), *(training if name in TRAINING else [])])}' ;;"
        for name in commands
    ]
    header = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{header}_lmcore() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words='' options=''
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{" ".join(commands)}' -- "$word")); return
  fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(named)}
  esac
  case "$word" in
    --*) before='' ;;
  esac
  case "$before" in
{chr(10).join(choices)}
    --*) COMPREPLY=($(compgen -f -- "$word")); return ;;
    *) words=$options ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ "${{#COMPREPLY[@]}}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -F _lmcore lmcore
"""


def own_options(command: str) -> list[str]:
    """The options in the help of a command, in addition to those of ``train_lm.py``."""
    from lmcore.cli.main import COMMANDS

    if command in ("schema", "completion"):
        return []
    show = getattr(importlib.import_module(f"lmcore.cli.{COMMANDS[command][0]}"), command)
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        show(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z_]*(?![\w.-])", text.getvalue())))


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(kind) for choice in _choices(part)]
    return []
