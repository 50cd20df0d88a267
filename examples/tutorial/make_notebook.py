"""README.ja.md -> tutorial.ipynb: its text, code and outputs as the cells of a notebook.

python examples/tutorial/make_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook (format 4.5)."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **more: Any) -> None:
        if text.strip():
            number = f"cell-{len(cells):02d}"
            cells.append({"cell_type": kind, "id": number, "metadata": {}, "source": lines(text), **more})

    end = 0
    for block in BLOCK.finditer(page):
        add("markdown", page[end : block.start()])
        printed = block["output"]
        outputs = [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}]
        add("code", block["code"], execution_count=None, outputs=outputs if printed else [])
        end = block.end()
    add("markdown", page[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def lines(text: str) -> list[str]:
    """The lines of a cell, without empty ones around them and without a newline at the end."""
    return text.strip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    made = notebook((FOLDER / "README.ja.md").read_text(encoding="utf-8"))
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    (FOLDER / "tutorial.ipynb").write_text(text, encoding="utf-8")
