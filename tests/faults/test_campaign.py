"""The large fault campaign (benchmarks/faults) in its short form, and the damages and the report that it uses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.campaign import PARTS
from benchmarks.faults.damages import DAMAGES, damage
from benchmarks.faults.report import summary, table, write_page

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(1200)


def campaign(out: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of a campaign that held."""
    command = [sys.executable, "-m", "benchmarks.faults.campaign", "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert all(row["held"] for row in rows)
    return rows


def count(rows: list[dict[str, Any]], name: str) -> int:
    return sum(row["counts"].get(name, 0) for row in rows)


@pytest.mark.long
@pytest.mark.slow
def test_short_campaign_of_every_part_holds_and_is_not_run_twice(tmp_path: Path) -> None:
    # Every kill of the launcher in a save is a launch of its own: two minutes a trial. `make faults` has all eleven.
    words = [word for part in PARTS if part != "launcher-in-save" for word in ("--part", part)]
    words += ["--trials", "3", "--jobs", "2"]
    rows = campaign(tmp_path, *words)
    assert {row["part"] for row in rows} >= {
        "kills",
        "launched",
        "damages",
        "hostile",
        "environments",
        "signals",
    }
    assert count(rows, "kills") >= 7
    assert count(rows, "damages") == 75
    assert count(rows, "hostile inputs") == 3
    assert campaign(tmp_path, *words) == rows


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_changes_the_folder(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.faults.damages.DAMAGES", {how: DAMAGES[how]})
    folder, other = tmp_path / "hurt" / "folder", tmp_path / "other.bin"
    other.write_bytes(b"another file")

    def content() -> dict[str, Any]:
        return {
            str(path.relative_to(folder)): (path.is_symlink(), path.read_bytes() if path.is_file() else path.lstat().st_mode)
            for path in folder.rglob("*")
        }  # fmt: skip

    for seed in range(20):
        for file in folder.glob("*"):
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.bin").write_bytes(random.Random(seed).randbytes(5000))
        (folder / "b.json").write_text('{"a": 1, "b": ["x", {"c": null}]}')
        before = content()
        damage(folder, random.Random(seed), [other])
        assert content() != before, seed


def row(part: str, trial: int, held: bool, **counts: int) -> dict[str, Any]:
    named = {name.replace("_", " "): value for name, value in counts.items()}
    return {
        "part": part, "trial": trial, "held": held, "counts": named, "evidence": "Traceback\nAssertionError: step 3",
        "date": "2026-11-28", "commit": "abc1234", "system": {"torch": "2.13.0"},
    }  # fmt: skip


def test_page_shows_counts_of_what_held_and_every_broken_promise(tmp_path: Path) -> None:
    rows = [
        row("kills", 0, True, kills=4, of_ddp=4),
        row("kills", 1, False, kills=2, of_ddp=2),
        row("damages", 0, True, damages=25, refused=25),
        row("hostile", 0, True, hostile_inputs=1),
    ]
    assert summary(rows)["parts"]["kills"]["held"] == 1
    assert "| 2 | 1 | 4 kills, 4 of ddp |" in table(rows)
    write_page(rows, tmp_path, {"kills": 120, "launched": 60})
    page = (tmp_path / "faults.md").read_text()
    assert "4 kills, 25 damages, 1 hostile inputs and 0 environments held" in page
    assert "kills 2 of 120, launched 0 of 60. The rest is not run." in page
    assert "- kills 1 (abc1234): `AssertionError: step 3`" in page
    assert json.loads((tmp_path / "faults.json").read_text())["parts"]["damages"]["counts"] == {
        "damages": 25,
        "refused": 25,
    }


def test_part_that_is_run_anew_replaces_its_record_and_no_other(tmp_path: Path) -> None:
    write_page([row("kills", 0, False), row("damages", 0, True, damages=25)], tmp_path, {})
    write_page([row("kills", 0, True, kills=3), row("launcher-in-save", 0, True, kills=40)], tmp_path, {})
    page = (tmp_path / "faults.md").read_text()
    assert "43 kills, 25 damages" in page
    assert "did not hold" not in page
    assert [*json.loads((tmp_path / "faults.json").read_text())["parts"]] == [
        "kills",
        "launcher-in-save",
        "damages",
    ]
