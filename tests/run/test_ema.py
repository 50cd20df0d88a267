"""The moving average of the weights (EMA) is its definition."""

from __future__ import annotations

import torch
from torch import nn

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
