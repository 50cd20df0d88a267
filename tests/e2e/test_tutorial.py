"""The tutorial: every block of code on the page runs, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tutorial"
NUMBER = re.compile(r"\d+\.\d+")


def blocks(page: str) -> list[tuple[str, str]]:
    """[(code, output)]: each block of Python, and the block of text behind it."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.DOTALL)
    return [(code, output) for code, output in found]


def assert_same(shown: str, printed: str) -> None:
    """Equal, but for the last digits of measured losses, which depend on the processor's arithmetic."""
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", printed)
    wanted = [float(number) for number in NUMBER.findall(shown)]
    assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(wanted, rel=0.2, abs=0.1)


def test_the_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neko.txt", "held.txt"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, (code, shown) in enumerate(blocks("README.md"), 1):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"README.md, block {number}", "exec"), names)
        assert_same(shown, out.getvalue())


def test_both_languages_show_the_same_code_and_output() -> None:
    assert blocks("README.ja.md") == blocks("README.md")
