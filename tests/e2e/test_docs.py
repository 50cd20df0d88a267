"""The commands in the documentation work, exactly as printed: every ``sh`` block of a page is run, in order.

A page is run in an empty folder beside which lie only what a user has: the repository's files and a small corpus
(``mytext/``, ``held.txt``). Nothing is added to a command. A block after ``<!-- not run: reason -->`` is left out.
The page about buckets has an S3 server on the loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_first_hours import READERS
from tests.support.pages import LEFT_OUT, blocks, lay_out
from tests.support.s3_server import serving

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in [ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```sh\n" in path.read_text(encoding="utf-8")
]
TRANSLATIONS = sorted((ROOT / "docs").glob("*.ja.md"))
"""Pages in Japanese; their commands are those of the English page (a test), and run once."""

IN_A_FIRST_HOUR = {command for reader in READERS for command in reader().commands}
"""Blocks that :mod:`tests.e2e.test_first_hours` runs: a page of these alone is not run again."""


def test_docs_blocks_that_are_not_run_give_a_reason() -> None:
    for page in PAGES:
        for reason in LEFT_OUT.findall(page.read_text(encoding="utf-8")):
            assert len(reason.split()) >= 2, page.name


def test_links_between_pages_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def facts(page: Path) -> tuple[list[str], set[str], set[str], list[str]]:
    """What a translation must not change: the commands, the code in the text, the numbers, the headings and table rows."""
    text_of = page.read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```", text_of, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text_of, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", prose).replace("\n", " ")  # links lead to the translated pages
    code = set(re.findall(r"`([^`]+)`", prose))
    numbers = set(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"`[^`]+`", "", prose)))
    parts = [line[0] for line in text_of.splitlines() if line.startswith(("#", "|"))]
    return commands, code, numbers, parts


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translation_has_the_commands_and_numbers_of_the_page(page: Path) -> None:
    english = page.with_name(page.name.replace(".ja.md", ".md"))
    here, there = facts(page), facts(english)
    assert here[0] == there[0]
    assert here[1] == there[1]
    words = {"1", "2", "3", "5", "10"}  # which English writes out: one, second, three, five, a tenth
    assert here[2] - words == there[2] - words
    assert here[3] == there[3]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in TRANSLATIONS and not IN_A_FIRST_HOUR.issuperset(blocks(page))],
    ids=lambda page: page.stem.replace(".", "-"),
)
def test_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    script = "set -euo pipefail\n" + "\n".join(blocks(page))
    with serving(also=("my-bucket",)) if page.name == "buckets.md" else contextlib.nullcontext():
        place, environment = lay_out(tmp_path)  # with the keys of that server, if there is one
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


def test_every_training_argument_is_listed() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    there = {field.name for field in fields(TrainingArguments)}
    assert there - named("from_trainer.md") == set()


def test_tables_name_existing_options() -> None:
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


def test_library_page_trains_as_printed(tmp_path: Path) -> None:
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


def test_library_page_lists_every_public_name() -> None:
    import lmcore

    table = (ROOT / "docs/library.md").read_text().partition("## Names")[2]
    assert set(re.findall(r"`(\w+)`", table)) >= set(lmcore.__all__) - {"__version__"}


def test_site_builds_without_broken_links(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    options = (tmp_path / "site/reference/options/index.html").read_text()
    assert "--train.duration" in options


def test_tests_named_in_the_docs_exist() -> None:
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
