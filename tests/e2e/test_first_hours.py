"""The first hour of four people, each in an empty folder with a small corpus and the commands of the documentation.

The commands are taken from the pages and run in a real terminal, one after another, as a reader pastes them. What counts: how
many were refused, how long it took, and what the screen showed.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.pages import ROOT, blocks, indented_commands, lay_out
from tests.support.terminal import Terminal

SECONDS = 600
"""For all commands of one person. On two busy cores: student 110 s, nanoGPT 85 s, Lightning 73 s."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Somebody who follows these commands.

    Attributes:
        trains: run folders that must hold a finished training.
    """

    commands: list[str]
    trains: tuple[str, ...]
    text: str = "english"


def student() -> Reader:
    """Knows the Japanese tutorial, then takes a text of their own."""
    tutorial = indented_commands(ROOT / "examples/tutorial/README.ja.md")
    return Reader(
        commands=[*tutorial, *blocks(ROOT / "README.ja.md")],
        trains=("runs/neko", "runs/mine"),
        text="japanese",
    )


def trainer_user() -> Reader:
    """Comes from Trainer and run_clm; opens the model with transformers."""
    return Reader(
        commands=[*blocks(ROOT / "docs/from_trainer.md"), *blocks(ROOT / "docs/where_is_my_model.md")[:1]],
        trains=("runs/from_trainer", "runs/model"),
    )


def nanogpt_user() -> Reader:
    """Comes from nanoGPT."""
    return Reader(commands=blocks(ROOT / "docs/from_nanogpt.md"), trains=("runs/nano",))


def lightning_user() -> Reader:
    """Comes from Lightning; has a model, data and a loss of their own: here the example's, in seconds."""
    example = indented_commands(ROOT / "examples/number_sequences/README.md")[0]
    return Reader(
        commands=[*blocks(ROOT / "docs/from_lightning.md"), f"{example} --fast_dev_run"],
        trains=("runs/dev_run", "runs/random_draws"),
    )


READERS = (student, trainer_user, nanogpt_user, lightning_user)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_first_hour(reader, tmp_path: Path) -> None:
    asked = reader()
    assert asked.commands
    place, environment = lay_out(tmp_path, text=asked.text)
    environment.pop("ACCELERATE_USE_CPU")  # which a reader has not set
    refused = tmp_path / "refused"
    script = f"set -o pipefail; trap 'echo \"$BASH_COMMAND\" >> {refused}' ERR\n" + "\n".join(asked.commands)
    begun = time.monotonic()
    with Terminal(["bash", "-c", script], cwd=place, env=environment, columns=110, lines=40) as terminal:
        terminal.wait(seconds=SECONDS)
        screen = terminal.text()
    assert not refused.exists(), f"refused: {refused.read_text()}\n{screen[-6000:]}"
    assert time.monotonic() - begun < SECONDS
    assert "Traceback" not in screen
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|\[\?25|\[2K", screen), "control codes on the screen"
    assert "━" not in screen, "the display leaves nothing behind"
    for run in asked.trains:
        status = json.loads((place / run / "status.json").read_text(encoding="utf-8"))
        assert (status["state"], status["exit_code"]) == ("finished", 0), run
    assert screen.count("training loss") == len(asked.trains), "the last panel of every run"
    assert re.search(r"valid loss|held loss", screen) or "runs/random_draws" in asked.trains
    lines = re.findall(r"^step 1/\d+ .*", screen, re.MULTILINE)
    assert len(lines) >= len(asked.trains), "every line of loss stays in the scrollback"
