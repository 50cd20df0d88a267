"""Sizes, counts, durations, suggestions; and the user's own functions by import path."""

import doctest
from pathlib import Path

import pytest

import lmcore.humanize
import lmcore.plugins
from lmcore.errors import RequestError
from lmcore.humanize import amount, columns, did_you_mean, duration, short, size, table
from lmcore.plugins import import_path


def test_docstring_examples() -> None:
    for module in (lmcore.humanize, lmcore.plugins):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (size(0), "0 B"),
        (size(1536), "1.5 KiB"),
        (size(5 * 2**40), "5 TiB"),
        (size(2**30 - 1), "1 GiB"),
        (size(2**20 - 1), "1 MiB"),
        (size(1023), "1023 B"),
        (size(999.4 * 2**20), "999 MiB"),
        (short(999_499), "999k"),
        (short(999_999), "1M"),
        (short(9_999), "9,999"),
        (short(1e12 - 1), "1T"),
        (short(0), "0"),
        (short(12_345), "12.3k"),
        (short(7_000_000_000), "7G"),
        (amount(0, "file"), "0 files"),
        (amount(1, "process"), "1 process"),
        (duration(0.2), "0:00:00"),
        (duration(3600), "1:00:00"),
        (table([]), ""),
        (table([("a", "1"), ("long", "2")]), "a     1\nlong  2"),
        (
            table([("日本", "1"), ("e\N{COMBINING ACUTE ACCENT}te", "2")]),
            "日本  1\ne\N{COMBINING ACUTE ACCENT}te   2",
        ),
        (columns("か\N{COMBINING KATAKANA-HIRAGANA VOICED SOUND MARK}"), columns("が")),
    ],
)
def test_formats(text: object, wanted: object) -> None:
    assert text == wanted


def test_suggestion_ignores_case_and_names_several() -> None:
    assert did_you_mean("LR", ["lr", "seed"]) == "; did you mean 'lr'?"
    assert did_you_mean("block", ["blocks", "blocky", "seed"], at_most=2).count("' or '") == 1
    assert did_you_mean("", ["lr"]) == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", "not an import path"),
        ("json:", "not an import path"),
        (":dumps", "not an import path"),
        ("json:dumps:more", "not an import path"),
        ("no_such_module_at_all:x", "cannot import"),
        ("json:dump5", "did you mean .dump"),
        ("json:decoder", "not a function or class"),
        ("broken_on_import:x", "ZeroDivisionError"),
    ],
)
def test_wrong_import_path_raises(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_on_import.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message) as caught:
        import_path(path, "data.factory")
    assert str(caught.value).startswith("data.factory")
    assert "\n" not in str(caught.value)


def test_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_today.py").write_text("class A:\n    @staticmethod\n    def make(): return 5\n")
    monkeypatch.chdir(tmp_path)
    assert import_path("mine_of_today:A.make", "model.factory")() == 5
