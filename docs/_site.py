"""Hooks of the documentation site: pages that lie outside of docs/, and the reference, which is generated.

Pages outside of docs/ keep their paths in the site, so that the links between them work as they do in the repository.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "README.ja.md": "index.ja.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "slurm/README.md": "slurm/README.md",
    "benchmarks/README.md": "benchmarks/README.md",
    **{f"examples/{name}": f"examples/{name}" for name in (
        "tutorial/README.md", "tutorial/README.ja.md", "tutorial/differences.md", "tutorial/differences.ja.md",
        "number_sequences/README.md")},
}  # fmt: skip
"""Path in the repository -> path in the site."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    sys.path.append(str(ROOT))  # here, not above: mkdocs restores the path after it has loaded this file
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference/options.md", content=options()))
    files.append(File.generated(config, "reference/python.md", content=python_names()))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Links as in the repository -> links of the site; a link to a file that is no page becomes its path."""
    where = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == where), f"docs/{where}")

    def resolved(found: re.Match[str]) -> str:
        text, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        site = OUTSIDE.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(site) is None:
            if not (ROOT / path).exists():
                raise ValueError(f"{source} links to {target}, which does not exist")
            return text
        link = posixpath.relpath(site, posixpath.dirname(where) or ".")
        return f"[{text}]({link}{'#' + anchor if anchor else ''})"

    return LINK.sub(resolved, markdown)


def options() -> str:
    """Every option with its type, default and help, from the schema."""
    from lmcore.config.convert import type_name
    from lmcore.config.help import default_text, docs
    from lmcore.config.schema import keys

    lines = ["# Options", "", "Options of `train_lm.py`, as in `python train_lm.py --help`.", ""]
    section = None
    for name, key in keys().items():
        here = name.rpartition(".")[0].partition(".")[0] or "run"
        if here != section:
            section = here
            lines += ["", f"## {here}", "", "| option | type | default | |", "|---|---|---|---|"]
        value = default_text(key)
        default = "" if value in ("null", "[]", "{}") else f"`{value}`"
        help_text = docs()[name].replace("|", "\\|")
        kind = type_name(key.type).replace("|", "\\|")
        lines.append(f"| `--{name}` | {kind} | {default} | {help_text} |")
    return "\n".join(lines) + "\n"


def python_names() -> str:
    """The public names with signature and docstring."""
    import lmcore

    lines = ["# Python names", "", "`from lmcore import ...`; everything else may change.", ""]
    for name in sorted(lmcore.__all__):
        value = getattr(lmcore, name)
        try:
            signature = str(inspect.signature(value))
        except (TypeError, ValueError):
            signature = ""
        text = inspect.getdoc(value) or ""
        lines += [f"## {name}", "", "```python", f"{name}{signature}", "```", "", "```text", text, "```", ""]
    return "\n".join(lines) + "\n"
