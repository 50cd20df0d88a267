"""What is set before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmcore.errors import RequestError, one_line_errors, require_docstrings, require_readable_arguments
from lmcore.run.start import check_launcher, let_segments_grow


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_ALLOC_CONF": "x"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}),
    ],
)
def test_segments_of_the_allocator_grow_unless_it_is_set_up(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    let_segments_grow(given)
    assert given == expected


ROOT = Path(__file__).resolve().parents[2]
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "env",
    [
        {},
        PLACE,  # left over; torch looks at it where there are ranks only
        {"RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"LOCAL_RANK": "0"} | PLACE,
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"} | PLACE,
        {"WORLD_SIZE": "2", "RANK": "1"} | PLACE,
    ],
)
def test_what_a_launcher_leaves_is_accepted(env: dict[str, str]) -> None:
    check_launcher(env)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "-1"} | PLACE, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | PLACE, "RANK is 2, but WORLD_SIZE says that there are 2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"} | PLACE, "LOCAL_RANK is 1"),
        ({"LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "but MASTER_PORT,"),
        ({"WORLD_SIZE": "2", "RANK": "0"} | PLACE | {"MASTER_PORT": "http"}, "MASTER_PORT must be"),
        ({"WORLD_SIZE": "2", "RANK": "0"} | PLACE | {"MASTER_PORT": "65536"}, "MASTER_PORT must be"),
    ],
)
def test_numbers_and_places_that_no_launcher_sets_are_refused(env: dict[str, str], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        check_launcher(env)


@pytest.mark.parametrize(
    ("rank", "said"),
    [("0", True), ("1", False), ("2", True), ("x", True), ("", True), ("²", True), ("1" * 5000, True)],
)
def test_rank_that_no_launcher_has_numbered_says_its_error_itself(
    rank: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit), one_line_errors():
        raise RequestError("wrong")
    assert ("wrong" in capsys.readouterr().err) == said


@pytest.mark.parametrize("words", [["train_lm.py", "--data.train", "README.md"], ["-m", "lmcore", "inspect"]])
def test_interpreter_without_docstrings_is_refused_in_one_line(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-OO", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "strips docstrings" in done.stderr
    assert "Traceback" not in done.stderr
    require_docstrings(1)  # -O


def started(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command line of a run on a small text, until it is read and checked."""
    (folder / "a.txt").write_text("some words of a text\n" * 100)
    code = "from lmcore.run.start import parse_or_exit; parse_or_exit()"
    command = [sys.executable, "-c", code, "--data.train", str(folder / "a.txt"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_refusal_stands_alone_and_defaults_are_shown_otherwise(tmp_path: Path) -> None:
    for wrong in (["--report.trackers", "nobody"], ["--resume", "lost"], ["--optim.name", "nobody"]):
        done = started(tmp_path, *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = started(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no --config: defaults for" in done.stdout


def test_printed_configuration_can_be_read_again(tmp_path: Path) -> None:
    done = started(tmp_path, "--print_config")
    (tmp_path / "mine.yaml").write_text(done.stdout)
    assert "# no --config: defaults for" in done.stdout
    again = started(tmp_path, "--print_config", "--config", str(tmp_path / "mine.yaml"))
    options = [line for line in done.stdout.splitlines() if line and not line.lstrip().startswith("#")]
    assert (again.returncode, again.stderr) == (0, "")
    assert [
        line for line in again.stdout.splitlines() if line and not line.lstrip().startswith("#")
    ] == options


def test_arguments_that_the_locale_cannot_read_are_refused() -> None:
    """Else the prompt would be no YAML, and the run folder "not UTF-8"."""
    read_as_ascii = "日本語".encode().decode("ascii", "surrogateescape")
    with pytest.raises(
        RequestError, match=r"'日本語' cannot be read: .* for ascii here .*; export PYTHONUTF8=1$"
    ):
        require_readable_arguments(["--run_dir", read_as_ascii], "ascii")
    require_readable_arguments(["--run_dir", "日本語"], "euc_jp")
    require_readable_arguments(
        ["--run_dir", read_as_ascii], "utf-8"
    )  # refused with its option, if it must be text
