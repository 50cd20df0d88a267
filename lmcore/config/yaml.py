"""YAML without the surprises of YAML 1.1: ``1e-3`` is a number, ``off`` and ``no`` are text, ``1:20`` is text.

Only plain data is built, never an object. A duplicate key is an error. ``load(dump(values)) == values``, and
PyYAML's ``safe_load`` reads the same values from what :func:`dump` writes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lmcore.errors import RequestError

MAX_VALUES = 100_000
"""Most values in a document after its aliases are expanded. A few lines of aliases can expand to billions."""

# YAML 1.2's core schema. PyYAML follows YAML 1.1, in which 1e-3 is text, off is false and 1:20 is eighty.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge (``<<``): the mapping's own keys take precedence, then the first of several merged mappings that has the key.

        PyYAML's own method is not used: which of two values it keeps differs between its versions, and in 6.0.4 depends on the
        identity of a string.
        """
        own: list[tuple[yaml.Node, yaml.Node]] = []
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                own.append((key, value))
                continue
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    problem = "only mappings can be merged with <<"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                self.flatten_mapping(part)
                for pair in part.value:
                    merged.setdefault(str(pair[0].value), pair)
        names = {str(key.value) for key, _ in own}
        node.value = [pair for name, pair in merged.items() if name not in names] + own


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # the same list under two keys is written twice, not as an anchor and an alias


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in (*_SCALARS, "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):  # the dumper also keeps 1.1's, so it quotes what either would misread
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def load(text: str, where: str) -> Any:
    """Parse YAML into plain values.

    Args:
        where: the file or option; error messages begin with it.

    Raises:
        RequestError: not valid YAML, a tag other than those of plain data, or too many values (an alias bomb).
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RequestError(f"{where}{line}: not valid YAML: {reason}{_remedy(error, reason)}") from error


def _remedy(error: Exception, reason: str) -> str:
    """What to do about the usual mistakes, which PyYAML names by its own grammar."""
    context = str(getattr(error, "context", None))
    if "undefined alias" in reason or context.startswith(
        ("while scanning an alias", "while scanning an anchor")
    ):
        return "; text that begins with * or & must be in quotes: '*.txt'"
    if "cannot start any token" in reason:
        return (
            "; indent with spaces" if r"'\t'" in reason else "; text that begins with this must be in quotes"
        )
    if context.startswith("while scanning a double-quoted scalar"):
        return r"; text with a backslash must be in single quotes: 'a\b'"
    if "mapping values are not allowed" in reason:
        return "; text that holds ': ' must be in quotes, and options of one section must begin in one column"
    return ""


def _check(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Refuse duplicate keys, other tags and too many values under ``node``. Returns the number of its values with aliases
    expanded.

    This happens before objects are built, because building adds merged keys (``<<``) to the mapping's own keys, which may
    override them.

    Args:
        known: the numbers of values of finished nodes.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.constructor.ConstructorError(None, None, "a value contains itself", node.start_mark)
        return count
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"duplicate key {key.value!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    if node.tag not in _PLAIN_TAGS and node.tag != _MERGE:
        problem = f"the tag {node.tag!r} is not plain data"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    total = 1 + sum(_check(child, known) for child in children)
    if total > MAX_VALUES:
        problem = f"more than {MAX_VALUES:,} values after the aliases are expanded"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    known[id(node)] = total
    return total


def dump(values: dict[str, Any]) -> str:
    """YAML of plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
