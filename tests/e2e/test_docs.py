"""The commands in the documentation work, exactly as printed: every ``sh`` block of a page is run, in order.

A page is run in an empty folder beside which lie only what a user has: the repository's files and a small corpus
(``mytext/``, ``held.txt``). Nothing is added to a command. A block after ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in [ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```sh\n" in path.read_text(encoding="utf-8")
]

LEFT_OUT = re.compile(r"<!-- not run: (.+?) -->\n```sh\n.*?^```", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The ``sh`` blocks that are to be run."""
    return BLOCK.findall(LEFT_OUT.sub("", page.read_text(encoding="utf-8")))


def text(seed: int, sentences: int) -> str:
    draw = random.Random(seed)
    words = ["the", "cat", "dog", "tree", "river", "sees", "likes", "finds", "old", "red", "small", "quietly"]
    return "\n\n".join(
        f"The {draw.choice(words)} {' '.join(draw.choices(words, k=9))}." for _ in range(sentences)
    )


def test_every_block_that_is_not_run_says_why() -> None:
    for page in PAGES:
        for reason in LEFT_OUT.findall(page.read_text(encoding="utf-8")):
            assert len(reason.split()) >= 2, page.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem.replace(".", "-")
)
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    place, programs = tmp_path / "here", tmp_path / "bin"
    (place / "mytext").mkdir(parents=True)
    programs.mkdir()
    for name in ("train_lm.py", "recipes", "accelerate_configs", "ds_configs", "lmcore", "examples"):
        (place / name).symlink_to(ROOT / name)
    for number in range(3):
        (place / "mytext" / f"{number}.txt").write_text(text(number, 120), encoding="utf-8")
    lines = (f'{{"text": "{line}"}}\n' for line in text(7, 60).split("\n\n"))
    (place / "mytext" / "articles.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "held.txt").write_text(text(8, 40), encoding="utf-8")
    lmcore = programs / "lmcore"  # as `pip install .` makes it
    lmcore.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lmcore "$@"\n', encoding="utf-8")
    lmcore.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(tmp_path / "hub"),
    }
    script = "set -euo pipefail\n" + "\n".join(blocks(page))
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def named(page: str) -> set[str]:
    """Every word in code font on a page."""
    text_of = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {
        word for code in re.findall(r"`([^`\n]+)`", text_of) for word in re.findall(r"[A-Za-z_0-9]+", code)
    }


def test_every_training_argument_has_a_place() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    there = {field.name for field in fields(TrainingArguments)}
    assert there - named("from_trainer.md") == set()


def test_the_tables_name_options_that_exist() -> None:
    """Whatever looks like ``section.name`` in the documentation is an option."""
    from lmcore.config.schema import keys

    known = set(keys())
    sections = {key.split(".")[0] for key in known if "." in key}
    for page in (ROOT / "docs").glob("*.md"):
        if page.name == "log.md":
            continue  # it tells of the past
        for name in re.findall(r"(?:`|--)((?:[a-z_]+\.)+[a-z_0-9]+)", page.read_text(encoding="utf-8")):
            if name.split(".")[0] not in sections or name.endswith(
                (".py", ".md", ".log", ".json", ".yaml", ".bin", ".html", ".model", ".png", ".safetensors")
            ):
                continue
            free = any(name.startswith(form) for form in ("model.config.", "data.config.", "optim.config."))
            section = any(key.startswith(f"{name}.") for key in known)
            assert name in known or free or section, f"{page.name} names {name}"


def test_the_library_page_trains_as_printed(tmp_path: Path) -> None:
    code = "\n".join(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), re.DOTALL | re.MULTILINE)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1, "it does not learn"
    assert "torch.Size([4, 8])" in done.stdout


def test_the_library_page_lists_every_public_name() -> None:
    import lmcore

    table = (ROOT / "docs/library.md").read_text().partition("## Names")[2]
    assert set(re.findall(r"`(\w+)`", table)) >= set(lmcore.__all__) - {"__version__"}


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    options = (tmp_path / "site/reference/options/index.html").read_text()
    assert "--train.duration" in options


def test_the_tests_that_the_documentation_names_exist() -> None:
    """``test_resume_...`` names every test that begins so."""
    there: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        there.add(path.name)
        there.update(re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8")))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        if page.name == "log.md":
            continue  # it tells of the past
        for name in re.findall(r"\b(test_\w+(?:\.py)?)", page.read_text(encoding="utf-8")):
            assert name in there or any(known.startswith(name) for known in there), f"{page.name}: {name}"
