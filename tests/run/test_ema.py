"""The moving average of the weights (EMA) is its definition."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from lmcore.config.schema import RunConfig
from lmcore.run import finish
from lmcore.run.ema import start_average, update_average


def test_moving_average_is_its_definition() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    average = start_average(net.named_parameters())
    expected = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        update_average(average, net.named_parameters(), 0.9)
        expected = {n: 0.9 * expected[n] + 0.1 * p.detach() for n, p in net.named_parameters()}
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kept", "exported"), [(["wte"], "ema"), ([], "model")])
def test_average_is_exported_where_the_checkpoint_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: list[str], exported: str
) -> None:
    """The best checkpoint may be older than the average: a run must not fail for that after its last step."""
    chosen = MagicMock(step=3, path=tmp_path)
    chosen.keys.return_value = kept
    wanted: list[str] = []
    monkeypatch.setattr(finish.reader, "find", lambda *_, **__: chosen)
    monkeypatch.setattr(finish, "export", lambda *_, weights, **__: wanted.append(weights))
    for name in ("read_run", "write_report", "expected_loss"):
        monkeypatch.setattr(finish, name, lambda *_: None)
    chosen.__enter__.return_value = chosen
    report = MagicMock()
    finish.write_results(RunConfig(), MagicMock(path=tmp_path), report, averaged=True)
    assert wanted == [exported]
    assert report.note.called == (not kept)
