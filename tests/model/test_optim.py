"""Optimizers, the choice of parameters by name, schedules as closed forms, the moving average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lmcore.errors import RequestError
from lmcore.model import optim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 8, bias=False)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.wte(ids)
        for layer in self.h:
            x = x + layer(x).tanh()
        return self.lm_head(self.norm(x))


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def names(groups: list[dict[str, Any]], **where: Any) -> set[str]:
    return {n for g in groups if all(g[k] == v for k, v in where.items()) for n in g["names"]}


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids), (ids * 3 + 1) % 8).backward()
        optimizer.step()


def built(net: Net, name: str, **options: Any) -> torch.optim.Optimizer:
    groups = optim.parameter_groups(net.named_parameters(), weight_decay=0.1)
    return optim.build_optimizer(name, groups, lr=1e-2, **options)


# ------------------------------------------------------------------------------------------------ parameters


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = optim.parameter_groups(make().named_parameters(), weight_decay=0.1)
    assert names(groups, weight_decay=0.1) == {"wte.weight", "h.0.weight", "h.1.weight", "lm_head.weight"}
    assert names(groups, weight_decay=0.0) == {"h.0.bias", "h.1.bias", "norm.weight", "norm.bias"}
    assert names(groups, hidden=True) == {"h.0.weight", "h.1.weight"}


def test_every_parameter_is_in_exactly_one_group_under_its_own_name() -> None:
    net = make()
    groups = optim.parameter_groups(net.named_parameters(), weight_decay=0.1)
    listed = [(n, id(p)) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert sorted(listed) == sorted((n, id(p)) for n, p in net.named_parameters())


def test_train_only_and_freeze() -> None:
    net = make()
    groups = optim.parameter_groups(
        net.named_parameters(), weight_decay=0.1, train_only=["h", "norm.*"], freeze=["*.bias"]
    )
    assert names(groups) == {"h.0.weight", "h.1.weight", "norm.weight"}
    assert {n for n, p in net.named_parameters() if p.requires_grad} == names(groups)
    before = {n: p.clone() for n, p in net.named_parameters()}
    train(net, optim.build_optimizer("adamw", groups, lr=1e-2), range(3))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names(groups)


@pytest.mark.parametrize("option", ["train_only", "freeze"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(option: str) -> None:
    with pytest.raises(
        RequestError, match=rf"optim\.{option} 'wtte\.weight' matches no parameter.*'wte\.weight'"
    ):
        optim.choose_trained(make().named_parameters(), **{option: ["wtte.weight"]})


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(RequestError, match="no parameter to train"):
        optim.choose_trained(make().named_parameters(), freeze=["*"])


# ------------------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, "torch.optim:RAdam"])
def test_every_optimizer_learns_and_continues_from_its_state(name: str) -> None:
    straight, broken = make(), make()
    one = built(straight, name)
    train(straight, one, range(10))
    two = built(broken, name)
    train(broken, two, range(5))
    other = make(seed=1)
    other.load_state_dict(broken.state_dict())
    three = built(other, name)
    three.load_state_dict(two.state_dict())
    train(other, three, range(5, 10))
    for (n, p), q in zip(straight.named_parameters(), other.parameters()):
        assert torch.equal(p, q), n
    ids = torch.arange(8)
    loss = nn.functional.cross_entropy(straight(ids), (ids * 3 + 1) % 8)
    assert loss < nn.functional.cross_entropy(make()(ids), (ids * 3 + 1) % 8)


def test_muon_is_torchs_muon_on_hidden_matrices_and_adamw_on_the_rest() -> None:
    ours, theirs = make(), make()
    train(ours, built(ours, "muon", momentum=0.9), range(4))
    p = dict(theirs.named_parameters())
    hidden = [p["h.0.weight"], p["h.1.weight"]]
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    matrices = [p["wte.weight"], p["lm_head.weight"]]
    vectors = [p[n] for n in ("h.0.bias", "h.1.bias", "norm.weight", "norm.bias")]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(4):
        ids = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        nn.functional.cross_entropy(theirs(ids), (ids * 3 + 1) % 8).backward()
        muon.step()
        adamw.step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if "h." not in n or "bias" in n:
            assert torch.equal(a, b), n
        # Products in bfloat16, whose sums a batch may order in another way: 2**-8 of an update of 0.01 x 0.4.
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 0.01 * 0.4 * 2**-7, msg=n)


def test_muon_state_is_one_mapping_addressed_by_parameter() -> None:
    net = make()
    optimizer = built(net, "muon")
    train(net, optimizer, range(2))
    slots = {
        n: set(optimizer.state[p]) for g in optimizer.param_groups for n, p in zip(g["names"], g["params"])
    }
    assert slots["h.0.weight"] == {"momentum_buffer"}
    assert slots["wte.weight"] == slots["norm.bias"] == {"step", "exp_avg", "exp_avg_sq"}
    optim.set_learning_rate(optimizer, 0.0)
    before = [p.clone() for p in net.parameters()]
    train(net, optimizer, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))  # the halves see the same groups


def test_fused_updates_obey_the_gate_on_the_device() -> None:
    for name in ("adamw", "adam", "sgd"):
        net = make()
        optimizer: Any = built(net, name)
        train(net, optimizer, range(2))
        before = [p.clone() for p in net.parameters()]
        slots = [v.clone() for s in optimizer.state.values() for v in s.values() if v is not None]
        for p in net.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters())), name
        after = [v for s in optimizer.state.values() for v in s.values() if v is not None]
        assert all(torch.equal(a, b) for a, b in zip(slots, after)), name


def test_wrong_names_are_refused() -> None:
    groups = optim.parameter_groups(make().named_parameters(), weight_decay=0.0)
    with pytest.raises(RequestError, match="did you mean 'adamw'"):
        optim.build_optimizer("adamww", groups, lr=1e-3)
    with pytest.raises(RequestError, match="has no Nothing"):
        optim.build_optimizer("torch.optim:Nothing", groups, lr=1e-3)
    with pytest.raises(RequestError, match="not a torch Optimizer"):
        optim.build_optimizer("builtins:dict", [("a", 1)], lr=1e-3)
    with pytest.raises(RequestError, match="cautious_weight_decay is for optim"):
        optim.build_optimizer("sgd", groups, lr=1e-3, cautious_weight_decay=True)


def test_optimizer_names_have_no_case() -> None:
    assert type(built(make(), "adamW")) is torch.optim.AdamW
    assert type(built(make(), "Muon")) is optim.MuonWithAdamW


def test_the_rate_reaches_every_group() -> None:
    optimizer = built(make(), "adamw")
    optim.set_learning_rate(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125] * 3
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    optim.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.25)
