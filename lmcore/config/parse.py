"""YAML files and the command line -> one frozen, checked :class:`~lmcore.config.schema.RunConfig`.

Precedence: defaults < files in their order < command line, regardless of where on the line the files are named. An unknown
option is an error that suggests the nearest name; names cannot be abbreviated; every error is one line.

    python train_lm.py --config recipes/gpt2_small.yaml --config mine.yaml --data.train a.txt b.txt --seed 2

* Lists: ``--data.train a b``, ``--data.train a --data.train b`` and ``--data.train '[a, b]'`` are the same and replace the list
  from the files; ``null`` is the empty list. ``--data.train '{path: a.txt, weight: 2}'`` is a weighted source.
* Switches: ``--dry_run`` means ``--dry_run true``.
* ``--model.config.n_layer 8`` adds to the dictionary ``model.config`` from the files.
* If options exclude each other (``train.global_batch_blocks`` and ``_tokens``), the later layer wins.
* A file that does not exist is looked up by name among the recipes of the package (``--config gpt2_small``).
* In a file named ``config.yaml`` in a run folder, ``run_dir`` means this folder, even after the folder was moved.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import typing
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lmcore.config import help as help_
from lmcore.config import schema, yaml
from lmcore.config.aliases import NAMES, foreign
from lmcore.config.checks import OPTIMIZERS, check
from lmcore.config.convert import convert, shown
from lmcore.config.curves import Curve
from lmcore.config.durations import EXAMPLES, LENGTHS, Duration, Durations, is_unit
from lmcore.config.idle import say_idle
from lmcore.config.schema import Key, RunConfig, keys
from lmcore.conventions import HIDDEN
from lmcore.errors import RequestError, require_output
from lmcore.storage import is_url

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The recipes that are installed with the package; ``recipes/`` in the repository is a link to this folder."""
DEMO = RECIPES / "demo.yaml"
MAX_FILE_BYTES = 10_000_000

MODELS = ("model.type", "model.from_pretrained", "model.factory", "model.preset")
"""The ways to name a model."""
EXCLUSIVE = (
    ("train.global_batch_blocks", "train.global_batch_tokens"),
    ("tokenizer.path", "tokenizer.vocab_size"),
    ("data.valid", "data.valid_fraction"),
    MODELS,
)
"""In each group only one option has a value: the one that the latest layer sets."""

OWN = ("data.train", "data.factory", "model.from_pretrained")
"""If one of these is set, and no file is given, the demo is not used."""

_WITHOUT_KEY = ("config", "help", "print_config")

Layer = dict[str, Any]
"""Dotted name -> value, from one file or the command line."""
OwnText = Callable[[Layer], tuple[Layer, list[str]]]
"""The options that are set -> defaults for this text, and the lines that explain them."""
OwnEntries = Callable[[list[Any], str | None], tuple[list[Any], list[str]]]
"""A list of texts as given, and ``data.store_dir`` -> the list without the files of runs, and what was left out."""


PATHS = ("run_dir", "local_dir", "resume", "model.from_pretrained", "engine.deepspeed")
"""Options in which ``~`` is expanded to the home folder: the shell does not expand it in a file or after ``--run_dir=``. Options
of data and tokenizer are expanded where they are read."""


def parse(
    argv: list[str] | None = None,
    *,
    note: Callable[[str], object] = lambda text: None,
    default_recipe: Path | None = DEMO,
    own_text: OwnText | None = None,
    own_entries: OwnEntries | None = None,
    allow_hidden: bool = False,
    allow_idle: bool = False,
) -> RunConfig:
    """Read a command line.

    Args:
        argv: default: ``sys.argv[1:]``. ``--help [SECTION]`` and ``--print_config`` print and raise
            ``SystemExit(0)``.
        note: called with one line for each choice that the user did not make.
        default_recipe: used if there is no ``--config`` and no text or dataset is given.
        own_text: returns defaults for the text, if text is given without ``--config``
            (:func:`lmcore.run.own_text.defaults`).
        own_entries: removes files that runs have written next to the text from the command line's texts
            (:func:`lmcore.data.text.sources.without_run_files`).
        allow_hidden: a saved configuration may have ``<hidden>`` in place of a secret, because the caller does not start a
            run with it.
        allow_idle: no warnings about options that have no effect on a run, because the caller does not start one.

    Raises:
        RequestError: one line, for anything that is wrong.

    >>> parse(["--seed", "7", "--train.duration", "10 steps"]).seed
    7
    """
    request = _split(sys.argv[1:] if argv is None else argv)
    if request.help is not None:
        print(help_.help_text(request.help))
        raise SystemExit(0)
    if request.print_config:  # the output must be a valid configuration file
        note = _comment
    typed = _converted(request.layer, None)
    files = request.files
    own = not files and any(typed.get(name) for name in OWN)
    if not files and not own and default_recipe is not None and default_recipe.exists():
        files = [str(default_recipe)]
        note(f"no --config and no --data.train: using the demo recipe (recipes/{default_recipe.name})")
    merged: Layer = {name: key.default for name, key in keys().items()}
    layers = [(file, _converted(_read(file, note), file)) for file in files]
    named = [
        layer["data.store_dir"]
        for layer in (merged, *(layer for _, layer in layers), typed)
        if "data.store_dir" in layer
    ]
    for name in ("data.train", "data.valid", "data.test"):
        if own_entries is not None and typed.get(name):
            typed[name], left_out = own_entries(typed[name], named[-1])
            for line in left_out:
                note(f"{name}: {line}")
    for file, layer in layers:
        _merge(merged, layer, file, note)
    lines: list[str] = []
    if own and own_text is not None and not typed.get("data.factory"):
        chosen, lines = own_text(typed)
        _merge(merged, _converted(chosen, "defaults"), "the defaults for this text", lambda text: None)
    _merge(merged, typed, "the command line", note if files else lambda text: None)
    if files and not allow_hidden:
        _refuse_hidden(merged, typed, files[-1])
    for line in lines:
        note(line)
    if merged["report.trackers"] == keys()["report.trackers"].default and not _is_installed("tensorboard"):
        note(
            "report.trackers: tensorboard is not installed (pip install tensorboard); metrics.jsonl is written"
        )
        merged["report.trackers"] = []
    if merged["run_dir"] is None:
        name = Path(files[-1]).stem if files else _name_of_text(typed.get("data.train"))
        # A test run must not leave checkpoints where the real run would resume from them.
        merged["run_dir"] = f"runs/{name}" + ("-fast_dev_run" if merged["fast_dev_run"] else "")
    for name in PATHS:
        if isinstance(merged[name], str):
            merged[name] = os.path.expanduser(merged[name])
    config: RunConfig = schema.build(_nested(merged))
    if request.print_config:
        print(help_.commented_yaml(config), end="")
        require_output()
        raise SystemExit(0)
    check(config)
    if not allow_idle:
        set_by = {name: file for file, layer in layers for name in layer}
        say_idle(config, typed=typed.keys(), files=set_by, note=note)
    return config


def _comment(text: str) -> None:
    print(f"# {text}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _name_of_text(entries: Any) -> str:
    """A name for the run folder from the first source: ``mytext`` for ``mytext/*.txt``."""
    if not entries:
        return "own_data"
    first = entries[0]
    if isinstance(first, dict):
        paths = first.get("paths")
        listed = paths[0] if isinstance(paths, list) and paths else ""
        first = first.get("name") or first.get("path") or listed
    parts = [
        part for part in str(first).split("/") if part not in ("", ".", "..") and not set(part) & set("*?[")
    ]
    name = re.sub(r"\.[a-z0-9]{1,8}(\.(gz|zst|xz|bz2))?$", "", parts[-1]) if parts else ""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[:60] or "own_text"


class _Request(typing.NamedTuple):
    files: list[str]
    layer: Layer
    help: str | None
    """The section after ``--help``; empty for all sections."""
    print_config: bool


def named_options(argv: Sequence[str]) -> Layer:
    """The options that a command line sets, directly and by its ``--config`` files, with the values as written.

    Raises:
        RequestError: as for :func:`parse`.

    >>> sorted(named_options(["--seed", "7", "--train.duration=10 steps"]))
    ['seed', 'train.duration']
    """
    request = _split(argv)
    layers = [_read(file, lambda line: None) for file in request.files]
    return {name: value for layer in [*layers, request.layer] for name, value in layer.items()}


def _split(argv: Iterable[str]) -> _Request:
    """Split the command line into files and a layer of strings (lists of strings for options that are lists)."""
    files: list[str] = []
    layer: Layer = {}
    help_section, print_config = None, False
    waiting = deque(argv)
    single: tuple[str, str] | None = None  # the option before, if its value may have spaces, and the value
    while waiting:
        word = waiting.popleft()
        name, equals, value = word[2:].partition("=") if word != "-h" else ("help", "", "")
        if not (word.startswith("--") and name) and word != "-h":
            if single is not None and not word.startswith("-"):
                words = [word, *itertools.takewhile(lambda one: not one.startswith("-"), waiting)]
                raise _not_quoted(*single, words)
            key_of, sign, rest = word.lstrip("-").partition("=")
            hint = foreign(key_of) if sign or word.startswith("-") else None
            given = rest if sign else waiting[0] if waiting else "VALUE"
            example = f"--{key_of} {given}" if key_of in keys() else f"--data.train {word}"
            raise RequestError(
                f"unexpected {shown(word)}: {hint or f'options are written --name value (for example {example})'}"
            )
        key = None if name in _WITHOUT_KEY else _find(name, "--")
        several = name == "config" or (key is not None and (key.is_list or key.type is Durations))
        values = [value] if equals else []
        while waiting and not equals and not _is_option(waiting[0], bool(values)) and (several or not values):
            values.append(waiting.popleft())
        single = (name, values[0]) if values and key is not None and _may_have_spaces(key) else None
        if key is None and name != "config":
            help_section = "".join(values) if name == "help" else help_section
            print_config |= name == "print_config"
            continue
        if not values and key is not None and bool in (key.type, *typing.get_args(key.type)):
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
            if several and len(values) == 2 and is_unit(values[1]):
                raise _not_quoted(name, values[0], values[1:])
            layer[name] = ", ".join(values) if several else values[0]
    return _Request(files, layer, help_section, print_config)


def _is_option(word: str, has_value: bool) -> bool:
    """Whether a word begins another option: also ``-seed``, after a value. A file or a prompt may begin with one dash."""
    name = word.lstrip("-").partition("=")[0]
    return word.startswith("--") or (has_value and word.startswith("-") and (name in keys() or name in NAMES))


def _may_have_spaces(key: Key) -> bool:
    """Whether the option takes one value, and that may be several words."""
    return not key.secret and not {str, Duration, Curve}.isdisjoint((key.type, *typing.get_args(key.type)))


def _not_quoted(name: str, value: str, rest: Sequence[str]) -> RequestError:
    """The error about ``--train.duration 2 epochs``, which the shell passes on as three words."""
    whole = shlex.quote(" ".join([value, *rest]))
    return RequestError(
        f"unexpected {shown(rest[0])} after --{name} {value[:60]}: a value with spaces is written in quotes"
        + (f": --{name} {whole}" if len(whole) <= 60 else "")
    )


def _items(text: str, name: str) -> list[Any]:
    """One word of a list: ``[a, b]`` is several items, ``{path: a}`` is a source, anything else is one item."""
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return [text]
    try:
        read = yaml.load(text, f"--{name}")
    except RequestError as error:
        shown_text = text if len(text) <= 60 else "..."
        quoted = shlex.quote(f"[{json.dumps(shown_text, ensure_ascii=False)}]")
        raise RequestError(
            f"{error}; if it is text and not a list, quote it inside of a list: {quoted}"
        ) from error
    return list(read) if isinstance(read, list) else [read]


def _find(name: str, dashes: str = "", where: str = "") -> Key:
    """The option with a dotted name, also inside a free-form dictionary. Raises :class:`RequestError`."""
    known = keys()
    if name in known:
        return known[name]
    for form in (key for key in known.values() if key.is_free_form):
        if name.startswith(form.name + ".") and not name.endswith("."):
            return form
    inside = [key for key in known if key.startswith(name + ".")]
    if inside:
        raise RequestError(
            f"{where}{dashes}{name} is a section; set its options: {', '.join(dashes + key for key in inside)}"
        )
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name.replace("-", "_"), [*known, *_WITHOUT_KEY], 3, 0.6)
    hint = foreign(name, dashes)
    if hint is None and last in NAMES and not difflib.get_close_matches(name, near, 1, 0.85):
        hint = foreign(last, dashes)  # --optim.learning_rate: our section, another program's option
    if hint is None:
        near = [
            key for key in known if key.rpartition(".")[2] == last
        ] + near  # --train.seed: the wrong section
        by_last = {key.rpartition(".")[2]: key for key in reversed(list(known))}
        near += [by_last[match] for match in difflib.get_close_matches(last, by_last, 2, 0.6)]
        near = list(dict.fromkeys(near))[:3]
        hint = (
            f"did you mean {' or '.join(dashes + key for key in near)}?"
            if near
            else "--help lists all options"
        )
    raise RequestError(f"{where}unknown option {dashes}{name[:60]}; {hint}")


def _read(file: str, note: Callable[[str], object]) -> Layer:
    """Read a YAML file as a layer. Raises :class:`RequestError` with the name of the file."""
    path = Path(file)
    try:
        shipped = RECIPES / f"{path.stem}.yaml"
        if not path.exists() and shipped.is_file() and path.name != ".yaml":
            if path.parts[:-1] not in ((), ("recipes",)):
                raise FileNotFoundError(2, "no such file")
            note(f"--config {file}: using the recipe {shipped.name} of the package")
            path = shipped
        with path.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise RequestError(f"--config {file}: larger than {MAX_FILE_BYTES:,} bytes")
        text = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text: save it as UTF-8"
        recipes = sorted(f"recipes/{recipe.name}" for recipe in RECIPES.glob("*.yaml"))
        near = [recipe for recipe in recipes if Path(recipe).stem == path.stem]
        near = near or difflib.get_close_matches(file, recipes, 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != file else ""
        raise RequestError(f"--config {shown(file)[1:-1]}: {reason}{hint}") from error
    values = yaml.load(text, file)
    if not isinstance(values, dict) and values is not None:
        got = "a list" if isinstance(values, list) else f"only the value {shown(values)}"
        raise RequestError(
            f"--config {file}: must be sections with options, such as 'optim: {{lr: 1e-3}}' (got {got}); a colon is an ASCII "
            "one, with a space after it"
        )
    layer: Layer = {}
    _collect(values or {}, "", f"{file}: ", layer)
    if not layer:
        # An empty file would silently train the demo instead of what the user meant.
        raise RequestError(
            f"--config {file}: sets no option (it is empty, or all of its options are comments): write options into it, "
            "or leave out this --config"
        )
    in_run = path.name == "config.yaml" and (path.parent / "checkpoints").is_dir()
    if in_run and "run_dir" in layer and not is_url(layer["run_dir"]):
        layer["run_dir"] = str(path.parent)  # the folder may have been moved
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
            own: Layer = {}
            if key.is_free_form:
                _put(own, dotted, value, f"{where}{dotted}")
                twice = _set_by_both(layer, own) if key.name in layer else None
            else:
                own[dotted], twice = value, dotted if dotted in layer else None
            if twice is not None:
                raise RequestError(
                    f"{where}{twice} is given twice, in its section and by its whole name: remove one of the two"
                )
            layer |= _deep(layer, own) if key.name in layer else own


def _put(layer: Layer, name: str, value: Any, where: str) -> None:
    """Set ``model.config.rope_parameters.rope_theta`` inside the dictionary of ``model.config``."""
    form = _find(name)
    inside = layer.setdefault(form.name, {})
    path = name[len(form.name) + 1 :].split(".") if name != form.name else []
    for part in reversed(path):
        value = {part: value}
    if value is None:
        value = {}
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise RequestError(f"{where} must be a dictionary with names as keys (got {shown(value)})")
    layer[form.name] = _deep(inside, value)


def _converted(layer: Layer, source: str | None) -> Layer:
    """Convert the values to the types of their options; ``source`` is a file, or ``None`` for the command line."""
    converted: Layer = {}
    for name, value in layer.items():
        key = keys()[name]
        if name == "optim.name" and isinstance(value, str) and value.lower() in OPTIMIZERS:
            value = value.lower()
        try:
            converted[name] = value if key.is_free_form else convert(value, key.type, typed=source is None)
        except ValueError as error:
            where = f"{source}: {name}" if source else f"--{name}"
            if name == "model.preset" and isinstance(value, str) and "did you mean" not in str(error):
                error = ValueError(f"{error}; a model family of transformers is given as model.type")
            reason = "is not valid (its value is secret)" if key.secret else str(error)
            if name == "train.duration":  # the whole run cannot be a share of itself, a time, or nothing
                reason = reason.partition("; write 'never'")[0].replace(EXAMPLES, LENGTHS)
            raise RequestError(f"{where}{'' if reason.startswith('must') else ':'} {reason}") from error
    return converted


def _merge(merged: Layer, layer: Layer, source: str, note: Callable[[str], object]) -> None:
    """Merge ``layer`` into ``merged``; if options exclude each other, that of the later layer stays."""
    for group in EXCLUSIVE:
        for name in (name for name in group if layer.get(name)):
            for other in (other for other in group if other not in layer and merged[other]):
                if merged[other] != keys()[other].default:
                    note(f"{name} of {source} replaces {other} {merged[other]}")
                merged[other] = [] if keys()[other].is_list else None
    kind = [(name, layer[name]) for name in MODELS if layer.get(name)]
    if kind and merged["model.config"] and any(merged[name] != value for name, value in kind):
        note(f"{kind[0][0]} of {source} is another model: model.config of the earlier file is not used")
        merged["model.config"] = {}
    if merged["model.preset"] is None and "model.size" not in layer:
        merged["model.size"] = None  # only presets have sizes
    for name, value in layer.items():
        merged[name] = _deep(merged[name], value) if keys()[name].is_free_form else value


def _refuse_hidden(merged: Layer, typed: Layer, file: str) -> None:
    """Refuse a saved configuration's ``<hidden>`` as the value of a secret."""
    for name, value in merged.items():
        if name != "tokenizer.user_symbols" and _holds_hidden(value) and not _holds_hidden(typed.get(name)):
            raise RequestError(
                f"{file}: {name} holds {HIDDEN}, which stands for a secret that was not written down: give the value "
                f"again with --{name}"
            )


def _holds_hidden(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_hidden, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_hidden, value))
    return isinstance(value, str) and HIDDEN in value


def _deep(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _deep(result[name], value) if both else value
    return result


def _set_by_both(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The dotted name of a value that both nested dictionaries set, or ``None``."""
    for name in one.keys() & other.keys():
        if not (isinstance(one[name], dict) and isinstance(other[name], dict)):
            return name
        if (inside := _set_by_both(one[name], other[name])) is not None:
            return f"{name}.{inside}"
    return None


def _nested(flat: Layer) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inside = values
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return values
