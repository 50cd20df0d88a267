"""YAML as people expect it: ``1e-3`` is a number, ``off`` and ``no`` are words, ``1:20`` is text.

Comes in: text or plain values. Goes out: the other of the two. What always holds: only plain data is built,
never an object; a key that is given twice is an error, not a silent choice; ``load(dump(values)) == values``,
and readers of YAML 1.1 (PyYAML's ``safe_load``, jsonargparse) read the same from what is dumped.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lmcore.errors import RequestError

# YAML 1.2's core schema. PyYAML follows 1.1, where 1e-3 is text, off is false and 1:20 is eighty.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # anchors would only puzzle a reader


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in (*_SCALARS, "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):  # the dumper keeps 1.1's too, and so quotes what either would misread
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def load(text: str, where: str) -> Any:
    """Plain values from YAML. Raises :class:`RequestError` that begins with ``where``."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RequestError(f"{where}{line}: not valid YAML: {reason}") from error


def dump(values: dict[str, Any]) -> str:
    """YAML of plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
