"""The tutorial: every cell of the notebook runs and prints what it shows, and both pages show the same."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tutorial"
NUMBER = re.compile(r"\d+\.\d+")


def blocks(page: str) -> list[tuple[str, str]]:
    """[(code, output)]: each block of Python, and the block of text behind it."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.DOTALL)
    return [(code, output) for code, output in found]


def notebook() -> dict[str, Any]:
    return json.loads((FOLDER / "tutorial.ipynb").read_text(encoding="utf-8"))


def assert_same(shown: str, printed: str) -> None:
    """Equal, but for the last digits of measured losses, which depend on the processor's arithmetic."""
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", printed)
    wanted = [float(number) for number in NUMBER.findall(shown)]
    assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(wanted, rel=0.2, abs=0.1)


def test_notebook_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells in their order, in one namespace, as a kernel runs them."""
    for name in ("neko.txt", "held.txt"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 10
    for number, cell in enumerate(cells, 1):
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("".join(cell["source"]), f"tutorial.ipynb, code cell {number}", "exec"), names)
        assert_same(shown, out.getvalue())


def test_notebook_is_made_of_the_japanese_page(tmp_path: Path) -> None:
    for name in ("README.ja.md", "make_notebook.py"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "make_notebook.py")], check=True)
    made = (tmp_path / "tutorial.ipynb").read_text(encoding="utf-8")
    assert json.loads(made) == notebook(), "run python examples/tutorial/make_notebook.py"


def test_both_languages_show_the_same_code_and_output() -> None:
    assert blocks("README.ja.md") == blocks("README.md")
