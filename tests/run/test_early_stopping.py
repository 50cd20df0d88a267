"""Early stopping, by a table of cases."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmcore.run.early_stopping import EarlyStopping

STOPS: dict[str, tuple[dict[str, Any], list[float], bool]] = {
    "nothing seen": ({"patience": 1}, [], False),
    "off": ({}, [1.0, 2.0, 3.0], False),
    "still improving": ({"patience": 2}, [3.0, 2.0, 1.0], False),
    "patience used up": ({"patience": 2}, [3.0, 1.0, 1.1, 1.2], True),
    "one good value resets the patience": ({"patience": 2}, [3.0, 1.0, 1.1, 0.9, 1.0], False),
    "too small to count": ({"patience": 2, "threshold": 0.5}, [3.0, 2.9, 2.8], True),
    "slowly but enough": ({"patience": 2, "threshold": 0.5}, [3.0, 2.7, 2.4], False),
    "higher is better": ({"patience": 1, "mode": "max"}, [1.0, 2.0, 1.5], True),
    "target reached": ({"target": 2.0}, [3.0, 2.0], True),
    "target not reached": ({"target": 2.0}, [3.0, 2.1], False),
    "target from below": ({"target": 2.0, "mode": "max"}, [1.0, 2.5], True),
    "diverged": ({"divergence": 10.0}, [3.0, 11.0], True),
    "not a number diverges": ({"divergence": 10.0}, [3.0, math.nan], True),
    "infinite first": ({"patience": 2}, [math.inf, math.inf], True),
}


@pytest.mark.parametrize("case", STOPS)
def test_early_stopping(case: str) -> None:
    settings, values, stops = STOPS[case]
    reason = EarlyStopping(**settings).reason(values)
    assert (reason is not None) == stops
    if reason is not None:
        assert "loss" in reason
