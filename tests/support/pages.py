"""The commands of the documentation, and the folder that a reader has: the repository's files and a small corpus."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = re.compile(r"<!-- not run: (.+?) -->\n```sh\n.*?^```", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    ((?:accelerate|python) .+)$", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The ``sh`` blocks of a page that are to be run."""
    return _BLOCK.findall(LEFT_OUT.sub("", page.read_text(encoding="utf-8")))


def indented_commands(page: Path) -> list[str]:
    """The commands of a page that shows them indented."""
    return _INDENTED.findall(page.read_text(encoding="utf-8"))


def english(seed: int, sentences: int) -> str:
    """Paragraphs of one sentence."""
    draw = random.Random(seed)
    words = ["the", "cat", "dog", "tree", "river", "sees", "likes", "finds", "old", "red", "small", "quietly"]
    return "\n\n".join(
        f"The {draw.choice(words)} {' '.join(draw.choices(words, k=9))}." for _ in range(sentences)
    )


def japanese(seed: int, sentences: int) -> str:
    """Paragraphs of one sentence."""
    draw = random.Random(seed)
    who, what = ["吾輩", "猫", "書生", "主人", "下女"], ["餅", "書物", "鼠", "薬缶", "日記"]
    does = ["を見る", "を食う", "を探す", "を忘れる", "に飽きる"]
    return "\n\n".join(
        f"{draw.choice(who)}は{draw.choice(what)}{draw.choice(does)}。" for _ in range(sentences)
    )


def lay_out(folder: Path, *, text: str = "english") -> tuple[Path, dict[str, str]]:
    """A reader's folder and environment: nothing but the repository, ``mytext/`` and ``held.txt``."""
    write = {"english": english, "japanese": japanese}[text]
    place, programs = folder / "here", folder / "bin"
    (place / "mytext").mkdir(parents=True)
    programs.mkdir()
    for name in ("train_lm.py", "recipes", "accelerate_configs", "ds_configs", "lmcore", "examples"):
        (place / name).symlink_to(ROOT / name)
    for number in range(3):
        (place / "mytext" / f"{number}.txt").write_text(write(number, 120), encoding="utf-8")
    lines = (f'{{"text": "{line}"}}\n' for line in write(7, 60).split("\n\n"))
    (place / "mytext" / "articles.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "held.txt").write_text(write(8, 40), encoding="utf-8")
    lmcore = programs / "lmcore"  # as `pip install .` makes it
    lmcore.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lmcore "$@"\n', encoding="utf-8")
    lmcore.chmod(0o755)
    return place, {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "hub"),
    }
