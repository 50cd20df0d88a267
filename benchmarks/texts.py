"""An English text that is on every machine where lmcore is installed: the docstrings of its libraries.

    python benchmarks/texts.py docstrings.jsonl

One document for each module of torch, transformers, sympy, scipy, numpy, matplotlib, accelerate and deepspeed: its docstrings,
in their order, without indentation. A docstring that an earlier module has already is left out: libraries repeat themselves.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("torch", "transformers", "sympy", "scipy", "numpy", "matplotlib", "accelerate", "deepspeed")
SHORTEST = 80
"""Characters: what is shorter is mostly a signature or a name."""


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and its functions.

    >>> docstrings('def f():' + chr(10) + '    "What it does."')
    ['What it does.']
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node)) is not None]


def documents() -> Iterator[str]:
    """One text for each module that has new docstrings, in the order of libraries and paths."""
    seen: set[str] = set()
    for library in LIBRARIES:
        found = importlib.util.find_spec(library)
        if found is None or not found.submodule_search_locations:
            continue
        for path in sorted(Path(found.submodule_search_locations[0]).rglob("*.py")):
            try:
                texts = docstrings(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # files made to be wrong, for the tests of the library
                continue
            new = [text for text in texts if len(text) >= SHORTEST and text not in seen]
            seen.update(new)
            if new:
                yield "\n\n".join(new)


def main() -> None:
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        for text in documents():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
