"""The picture of ``lmcore size``: what its axes say."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib")

from lmcore.report import ladder
from lmcore.report.curves import finished


def test_labels_of_the_axes_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "finished", lambda figure, axes, format: finished(figure, axes))
    sizes = [ladder.Size(name="w32", measured=[(1e5, 4.2), (4e5, 3.8)], fitted=[(1e5, 4.2), (1e7, 2.7)])]
    page = ladder.ladder_picture(sizes, chosen="w64", tokens=6e6, expected=(2.6, 2.75, 2.9)).decode()
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert "mathdefault" not in page
    assert {"1M", "4"} <= set(labels), labels
