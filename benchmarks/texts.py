"""English and Japanese text for the benchmarks, from packages.

    python benchmarks/texts.py docstrings docstrings.jsonl
    python benchmarks/texts.py manual manual.jsonl /usr/share/man/ja

``docstrings`` is on every machine where lmcore is installed: one document for each module of torch, transformers, sympy, scipy,
numpy, matplotlib, accelerate and deepspeed: its docstrings, in their order, without indentation. A docstring that an earlier
module has already is left out: libraries repeat themselves.

``manual`` is one document for each manual page of a folder, without its markup; of Debian's package ``manpages-ja`` for
Japanese. A paragraph that an earlier page has already is left out: licences and authors repeat themselves.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("torch", "transformers", "sympy", "scipy", "numpy", "matplotlib", "accelerate", "deepspeed")
SHORTEST = 80
"""Characters of a docstring: what is shorter is mostly a signature or a name."""

SHOWN = {"SH", "SS", "B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "Sh", "Ss", "Nm", "Nd"}
"""Macros of manual pages whose arguments are text."""


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and its functions.

    >>> docstrings('def f():' + chr(10) + '    "What it does."')
    ['What it does.']
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node)) is not None]


def docstrings_of_libraries() -> Iterator[str]:
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


def plain(page: str) -> str:
    """The text of a manual page: comments, macros and changes of font removed.

    >>> print(plain('.SH 名前' + chr(10) + r'tar \\- \\fBアーカイブ\\fP' + chr(10) + '.TP 4'))
    名前
    tar - アーカイブ
    """
    lines = []
    for line in page.splitlines():
        macro = re.match(r"[.'] *(\S*) *", line)
        if macro is not None:
            if macro[1] not in SHOWN:
                continue
            line = line[macro.end() :].replace('"', "")
        line = re.sub(r"\\(f(\(..|\[.*?\]|.)|s[+-]?\d|\(..|[&/,|^%:]|\".*)", "", line)
        lines.append(re.sub(r"\\(.)", r"\1", line))
    return "\n".join(lines)


def manual(folder: Path) -> Iterator[str]:
    """One text for each page that has new paragraphs, in the order of the paths."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.gz")):
        paragraphs = plain(gzip.decompress(path.read_bytes()).decode("utf-8")).split("\n\n")
        new = [text for text in paragraphs if text.strip() and text not in seen]
        seen.update(new)
        if new:
            yield "\n\n".join(new)


def main() -> None:
    if [*sys.argv[1:2], len(sys.argv)] not in (["docstrings", 3], ["manual", 4]):
        sys.exit(__doc__)
    kind, out, *folder = sys.argv[1:]
    with open(out, "w", encoding="utf-8") as file:
        for text in manual(Path(*folder)) if kind == "manual" else docstrings_of_libraries():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
