"""YAML files and the command line -> one frozen, checked :class:`~lmcore.config.schema.RunConfig`.

Comes in: ``argv``. Goes out: the configuration. What always holds: defaults < files in their order < command
line, wherever on the line the files stand; a key that does not exist is an error with the nearest name (and
the file's name), never ignored; names are never abbreviated; every error is one line. jsonargparse checks the
types.

    python train_lm.py --config recipes/gpt2_small.yaml --config mine.yaml --data.train a.txt b.txt --seed 2

* Lists: ``--data.train a b``, ``--data.train a --data.train b`` and ``--data.train '[a, b]'`` are the same,
  and replace the list of the files. ``--data.train '{path: a.txt, weight: 2}'`` is a weighted source.
* Switches: ``--dry_run`` is ``--dry_run true``.
* ``--model.config.n_layer 8`` adds to the free-form ``model.config`` of the files.
* Where two keys exclude each other (``train.global_batch_blocks`` and ``_tokens``), that of the later layer
  wins.
* Without any ``--config``, the demo recipe stands in, and that is said.
"""

from __future__ import annotations

import copy
import difflib
import functools
import sys
import typing
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from lmcore.config import help as option_help
from lmcore.config import schema, yaml
from lmcore.config.checks import check
from lmcore.config.durations import Duration, Durations
from lmcore.config.schema import Key, RunConfig, keys
from lmcore.errors import RequestError

if typing.TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"

EXCLUSIVE = (
    ("train.global_batch_blocks", "train.global_batch_tokens"),
    ("tokenizer.path", "tokenizer.vocab_size"),
    ("data.valid", "data.valid_fraction"),
    ("model.type", "model.from_pretrained", "model.factory", "model.preset"),
)
"""Of each group one key counts: the one that the latest layer sets."""

_WITHOUT_KEY = ("config", "help", "print_config")

Layer = dict[str, Any]
"""Dotted name -> value, as one file or the command line gives it."""


def parse(
    argv: list[str] | None = None,
    *,
    say: Callable[[str], object] = lambda text: None,
    default_recipe: Path | None = DEMO,
) -> RunConfig:
    """Read a command line (default: ``sys.argv[1:]``).

    ``--help [SECTION]`` and ``--print_config`` print and raise ``SystemExit(0)``. ``say`` gets a line for
    each choice that the user did not make.

    Raises :class:`RequestError`, one line, for all that is wrong.
    """
    request = _split(sys.argv[1:] if argv is None else argv)
    files = request.files
    if not files and default_recipe is not None and default_recipe.exists():
        files = [str(default_recipe)]
        say(f"no --config given: the demo recipe {default_recipe.name} stands in")
    merged: Layer = {name: key.default for name, key in keys().items()}
    for file in files:
        _merge(merged, _typed(_read(file), file), file, say)
    _merge(merged, _typed(request.layer, None), "the command line", say)
    if merged["run_dir"] is None:
        recipe = Path(files[-1]).stem if files else "demo"
        # A rehearsal must not leave its checkpoints where the real run will look for them.
        merged["run_dir"] = f"runs/{recipe}" + ("-fast_dev_run" if merged["fast_dev_run"] else "")
    if request.help is not None:
        print(option_help.help_text(merged, request.help))
        raise SystemExit(0)
    config: RunConfig = schema.build(_nested(merged))
    if request.print_config:
        print(option_help.commented_yaml(config), end="")
        raise SystemExit(0)
    check(config)
    return config


class _Request(typing.NamedTuple):
    files: list[str]
    layer: Layer
    help: str | None
    """The section whose help is asked for; empty: all."""
    print_config: bool


def _split(argv: Iterable[str]) -> _Request:
    """The command line into files and a layer of strings (lists of them where the key is a list)."""
    files: list[str] = []
    layer: Layer = {}
    help_section, print_config = None, False
    waiting = deque(argv)
    while waiting:
        word = waiting.popleft()
        name, equals, value = word[2:].partition("=") if word != "-h" else ("help", "", "")
        if not (word.startswith("--") and name) and word != "-h":
            raise RequestError(
                f"{word!r} stands alone: options are written --name value (--data.train {word})"
            )
        key = None if name in _WITHOUT_KEY else _find(name, "--")
        several = name == "config" or (key is not None and (key.is_list or key.type is Durations))
        values = [value] if equals else []
        while waiting and not equals and not waiting[0].startswith("--") and (several or not values):
            values.append(waiting.popleft())
        if key is None and name != "config":
            help_section = "".join(values) if name == "help" else help_section
            print_config |= name == "print_config"
            continue
        if not values and key is not None and key.type in (bool, bool | int):
            values = ["true"]
        if not values:
            raise RequestError(f"--{name} needs a value")
        if key is None:
            files += values
        elif key.is_free_form:
            _put(layer, name, yaml.load(values[0], f"--{name}"), f"--{name}")
        elif key.is_list:
            layer.setdefault(name, []).extend(item for text in values for item in _items(text, name))
        else:
            layer[name] = ", ".join(values) if several else values[0]
    return _Request(files, layer, help_section, print_config)


def _items(text: str, name: str) -> list[Any]:
    """One word of a list: ``[a, b]`` is several, ``{path: a}`` is a source, all else is itself."""
    if text[:1] + text[-1:] == "[]":
        return list(yaml.load(text, f"--{name}"))
    return [yaml.load(text, f"--{name}")] if text[:1] + text[-1:] == "{}" else [text]


def _find(name: str, dashes: str = "", where: str = "") -> Key:
    """The key of a dotted name, free-form ones included; else an error with the nearest name."""
    known = keys()
    if name in known:
        return known[name]
    for form in (key for key in known.values() if key.is_free_form):
        if name.startswith(form.name + ".") and not name.endswith("."):
            return form
    inside = [key for key in known if key.startswith(name + ".")]
    if inside:
        raise RequestError(
            f"{where}{dashes}{name} is a section; set its keys: {', '.join(dashes + key for key in inside)}"
        )
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, [*known, *_WITHOUT_KEY], 3, 0.6)
    by_last = {key.rpartition(".")[2]: key for key in reversed(list(known))}
    near += [by_last[match] for match in difflib.get_close_matches(last, by_last, 2, 0.6)]
    near = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(dashes + key for key in near)}?" if near else "--help lists all"
    raise RequestError(f"{where}there is no option {dashes}{name}; {hint}")


def _read(file: str) -> Layer:
    """A YAML file as a layer; every key is known, or it is an error that names the file."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        recipes = sorted(str(recipe) for recipe in Path("recipes").glob("*.yaml"))
        near = [recipe for recipe in recipes if Path(recipe).stem == path.stem]
        near = near or difflib.get_close_matches(file, recipes, 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != file else ""
        raise RequestError(f"--config {file}: {reason}{hint}") from error
    values = yaml.load(text, file)
    if not isinstance(values, dict) and values is not None:
        raise RequestError(f"--config {file}: {type(values).__name__} at the top, not sections with keys")
    layer: Layer = {}
    _collect(values or {}, "", f"{file}: ", layer)
    return layer


def _collect(values: dict[Any, Any], prefix: str, where: str, layer: Layer) -> None:
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and any(key.startswith(dotted + ".") for key in keys()):
            _collect(value, dotted + ".", where, layer)
        elif value is None and any(key.startswith(dotted + ".") for key in keys()):
            continue  # a section whose lines are all commented out
        else:
            key = _find(dotted, where=where)
            if key.is_free_form:
                _put(layer, dotted, value, f"{where}{dotted}")
            else:
                layer[dotted] = value


def _put(layer: Layer, name: str, value: Any, where: str) -> None:
    """Set ``model.config.rope_parameters.rope_theta`` inside the dictionary of ``model.config``."""
    form = _find(name)
    inside = layer.setdefault(form.name, {})
    path = name[len(form.name) + 1 :].split(".") if name != form.name else []
    for part in reversed(path):
        value = {part: value}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RequestError(f"{where} must be names with values, not {value!r}")
    layer[form.name] = _deep(inside, value)


def _typed(layer: Layer, source: str | None) -> Layer:
    """Check and convert the types by jsonargparse; ``source`` is a file, or ``None``: typed by hand."""
    free = {name: value for name, value in layer.items() if keys()[name].is_free_form}
    ready: Layer = {}
    for name in (name for name in layer if name not in free):
        try:
            ready[name] = _normalized(layer[name], keys()[name], typed_by_hand=source is None)
        except RequestError as error:
            raise RequestError(f"{_where(name, source)}: {error}") from error
    try:
        checked = _checked(ready)
    except TypeError:
        checked = {}
        for name, value in ready.items():  # again, one by one, to find the culprit
            try:
                checked |= _checked({name: value})
            except TypeError as error:
                kind = keys()[name].type
                choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
                near = difflib.get_close_matches(str(value), choices, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                reason = f"{value!r} is not of the type {schema.type_name(kind)}{hint}"
                raise RequestError(f"{_where(name, source)}: {reason}") from error
    return checked | free


def _where(name: str, source: str | None) -> str:
    return f"{source}: {name}" if source else f"--{name}"


def _checked(layer: Layer) -> Layer:
    parsed = _parser().parse_object(_nested(copy.deepcopy(layer)), defaults=False) if layer else {}
    # jsonargparse reads text again as YAML where other types are allowed too: a run named 'Null' would
    # have no name. So it checks text, in a copy (it converts in place too), and does not convert it.
    return {name: value if _is_text(keys()[name].type) else parsed[name] for name, value in layer.items()}


def _is_text(kind: Any) -> bool:
    return kind is str or typing.get_origin(kind) is list or str in typing.get_args(kind)


def _normalized(value: Any, key: Key, typed_by_hand: bool) -> Any:
    """Forms that people write and jsonargparse does not take: one value for a list, ``5e5`` for an int."""
    if key.type in (Duration, Durations):
        return key.type.parse(value)
    if not key.is_list:
        return _scalar(value, key.type, typed_by_hand)
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    wanted = typing.get_args(key.type)[0]
    return [_scalar(item, wanted, typed_by_hand) for item in values]


def _scalar(value: Any, wanted: Any, typed_by_hand: bool) -> Any:
    allowed = set(typing.get_args(wanted) or (wanted,))
    if isinstance(value, str) and typed_by_hand:
        if value in ("null", "None") and type(None) in allowed:
            return None
        number = yaml.load(value, value) if allowed & {int, float, bool} else None
        value = number if isinstance(number, (int, float)) else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, float) and int in allowed and float not in allowed and value.is_integer():
        return int(value)
    if is_number and str in allowed and not allowed & {int, float}:
        return str(value)  # a run that is named 2026, a skipped position
    return value


def _merge(merged: Layer, layer: Layer, source: str, say: Callable[[str], object]) -> None:
    """Lay ``layer`` over ``merged``; keys that exclude each other give way to the later layer."""
    for group in EXCLUSIVE:
        for name in (name for name in group if layer.get(name)):
            for other in (other for other in group if other not in layer and merged[other]):
                if merged[other] != keys()[other].default:
                    say(f"{name} of {source} takes the place of {other} {merged[other]}")
                merged[other] = [] if keys()[other].is_list else None
    kind = [(name, layer[name]) for name in EXCLUSIVE[3] if layer.get(name)]
    if kind and merged["model.config"] and any(merged[name] != value for name, value in kind):
        say(f"{kind[0][0]} of {source} is another model: the earlier model.config is dropped")
        merged["model.config"] = {}
    for name, value in layer.items():
        merged[name] = _deep(merged[name], value) if keys()[name].is_free_form else value


def _deep(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _deep(result[name], value) if both else value
    return result


def _nested(flat: Layer) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inside = values
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return values


@functools.cache
def _parser() -> ArgumentParser:
    """The types, as jsonargparse sees them."""
    from jsonargparse import ArgumentParser  # 0.1 s that only a request with options pays
    from jsonargparse.typing import register_type

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
            raise TypeError(message)  # jsonargparse would print its usage and exit

    register_type(Duration, serializer=str, deserializer=Duration.parse, fail_already_registered=False)
    register_type(
        Durations, serializer=Durations.plain, deserializer=Durations.parse, fail_already_registered=False
    )
    parser = Parser(prog="train_lm.py", allow_abbrev=False, add_help=False)
    parser.add_class_arguments(RunConfig)
    return parser
