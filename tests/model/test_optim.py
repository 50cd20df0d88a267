"""Optimizers, the choice of parameters by name, schedules as closed forms, the moving average."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lmcore.config.parse import parse
from lmcore.errors import RequestError
from lmcore.model import optim
from lmcore.run.setup import make_optimizer


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


def test_weight_decay_of_matrices_only() -> None:
    groups = optim.parameter_groups(make().named_parameters(), weight_decay=0.1)
    assert names(groups, weight_decay=0.1) == {"wte.weight", "h.0.weight", "h.1.weight", "lm_head.weight"}
    assert names(groups, weight_decay=0.0) == {"h.0.bias", "h.1.bias", "norm.weight", "norm.bias"}
    assert names(groups, hidden=True) == {"h.0.weight", "h.1.weight"}


def test_projection_called_output_is_no_head() -> None:
    """RWKV's attention and ProphetNet's MLP end in it; where the vocabulary is known, names do not say what a head is."""
    weight, name = nn.Parameter(torch.zeros(4, 4)), "rwkv.blocks.0.attention.output.weight"
    assert optim.parameter_kind(name, weight, vocabulary={"rwkv.embeddings.weight"}) == "matrices"
    assert optim.parameter_kind("output.weight", weight) == "head"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("layers.0.mlp.experts.gate_up_proj_bias", (4, 96), "vectors"),  # GPT-OSS: biases of all experts
        ("layers.0.mixer.A_log", (64, 16), "vectors"),  # Mamba, Jamba
        ("layers.0.mamba.A_log", (2, 8, 16), "vectors"),  # Zamba
        ("layers.0.self_attn.q_norm.weight", (4, 8), "vectors"),  # Cohere: a norm for each head
        ("block.0.relative_attention_bias.weight", (32, 4), "vectors"),
        ("blocks.0.attention.time_mix_key", (1, 1, 32), "vectors"),  # RWKV
        ("layers.0.mixer.conv1d.weight", (64, 1, 4), "matrices"),
        ("layers.0.mlp.gate.weight", (4, 32), "matrices"),
        ("layers.0.mlp.shared_expert_gate.weight", (1, 32), "matrices"),
        ("layers.0.norm_projection.weight", (4, 32), "matrices"),
    ],
)
def test_biases_and_norms_of_more_dimensions_are_no_matrices(
    name: str, shape: tuple[int, ...], kind: str
) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    assert optim.parameter_kind(name, parameter) == kind
    (group,) = optim.parameter_groups([(name, parameter)], weight_decay=0.1)
    assert group["decays"] == (kind == "matrices")
    assert group["hidden"] == (kind == "matrices" and len(shape) == 2)


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
def test_unmatched_parameter_pattern_is_refused_with_the_nearest_name(option: str) -> None:
    with pytest.raises(
        RequestError, match=rf"optim\.{option} 'wtte\.weight' matches no parameter.*'wte\.weight'"
    ):
        optim.choose_trained(make().named_parameters(), **{option: ["wtte.weight"]})


def test_no_trainable_parameter_is_refused() -> None:
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


def test_muon_is_torchs_muon_on_matrices_and_adamw_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: True)  # torch's is in bf16 on any CPU
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


def test_fused_updates_skip_nan_by_the_gate_on_the_device() -> None:
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
    with pytest.raises(RequestError, match=r"optim\.config: beta2_decay should be"):
        optim.build_optimizer("adafactor", groups, lr=1e-3, beta2_decay=5.0)
    with pytest.raises(RequestError, match=r"torch\.optim:Muon, optim\.config: Muon only supports 2D"):
        optim.build_optimizer("torch.optim:Muon", groups, lr=1e-3)


class TakesAnything(torch.optim.AdamW):
    def __init__(self, params: Any, **arguments: Any) -> None:  # of which AdamW has no momentum
        super().__init__(params, **arguments)


@pytest.mark.parametrize(
    ("path", "words", "said", "reaches"),
    [
        ("torch.optim:RAdam", "--optim.betas 0.8 0.9", "", {"betas": (0.8, 0.9)}),
        ("torch.optim:RMSprop", "--optim.betas 0.8 0.9", "optim.betas [0.8, 0.9] has no effect", {}),
        ("torch.optim:RMSprop", "--optim.momentum 0.5", "", {"momentum": 0.5}),
        ("torch.optim:RAdam", "--optim.momentum 0.5", "optim.momentum 0.5 has no effect", {}),
        (f"{__name__}:TakesAnything", "--optim.betas 0.8 0.9", "", {"betas": (0.8, 0.9)}),
        ("torch.optim:RAdam", "", "", {}),
    ],
)
def test_option_that_a_class_of_the_user_does_not_take_is_said(
    path: str, words: str, said: str, reaches: dict[str, Any]
) -> None:
    config = parse(["--optim.name", path, *words.split()], default_recipe=None)
    model, notes = make(), []
    module: Any = SimpleNamespace(model=model)
    optimizer = make_optimizer(config, module, list(model.named_parameters()), note=notes.append)
    assert [said in note for note in notes] == ([True] if said else [])
    assert all(optimizer.param_groups[0][name] == value for name, value in reaches.items())


def test_optimizer_names_have_no_case() -> None:
    assert type(built(make(), "adamW")) is torch.optim.AdamW
    assert type(built(make(), "Muon")) is optim.MuonWithAdamW


def test_learning_rate_reaches_every_group() -> None:
    optimizer = built(make(), "adamw")
    optim.set_learning_rate(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125] * 3
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    optim.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.25)


def test_learning_rate_multipliers_by_kind() -> None:
    groups = optim.parameter_groups(
        make().named_parameters(),
        weight_decay=0.1,
        lr_multipliers={"matrices": 1.0, "embedding": 5.0, "head": 0.5, "vectors": 2.0},
    )
    optimizer = optim.build_optimizer("adamw", groups, lr=0.01)
    optim.set_learning_rate(optimizer, 0.02)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["names"]}
    assert rates["h.0.weight"] == pytest.approx(0.02)
    assert rates["wte.weight"] == pytest.approx(0.1)
    assert rates["lm_head.weight"] == pytest.approx(0.01)
    assert rates["norm.weight"] == rates["h.0.bias"] == pytest.approx(0.04)
    # With equal multipliers the groups are what they were: checkpoints and sums of other strategies do not change.
    plain = optim.parameter_groups(make().named_parameters(), weight_decay=0.1)
    assert [len(group["names"]) for group in plain] == [2, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_update_is_orthogonal_for_every_shape_in_a_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (1, 32, 32), (2, 8, 200)):
        made = optim.orthogonalize(torch.randn(shape).to(dtype)).float()
        values = torch.linalg.svdvals(made)
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3


@pytest.mark.parametrize("native", [True, False])
def test_muon_multiplies_in_bf16_only_where_the_hardware_does(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """Emulated by a CPU with AVX2, a bf16 product takes 30 times as long as one in float32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    seen: list[torch.dtype] = []

    def spy(matrices: torch.Tensor) -> torch.Tensor:
        seen.append(matrices.dtype)
        return matrices

    monkeypatch.setattr(optim, "orthogonalize", spy)
    weight = nn.Parameter(torch.zeros(4, 8))
    group = {"params": [weight], "names": ["w"], "weight_decay": 0.0, "hidden": True, "lr_multiplier": 1.0}
    weight.grad = torch.ones(4, 8)
    optim.build_optimizer("muon", [group], lr=0.1).step()
    assert seen == [torch.bfloat16 if native else torch.float32]


def test_muon_batches_tall_and_wide_matrices_as_each_by_itself() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in ((8, 32), (32, 8), (8, 8), (8, 32))]

    def updated(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        group = {"params": parameters, "names": [str(i) for i in range(len(parameters))], "weight_decay": 0.1,
                 "hidden": True, "lr_multiplier": 1.0}  # fmt: skip
        optimizer = optim.build_optimizer("muon", [group], lr=0.1)
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.sin(tensors[int(parameter.tag)] + index * 0)
        optimizer.step()
        return [parameter.detach().clone() for parameter in parameters]

    def parameters(which: list[int]) -> list[nn.Parameter]:
        made = [nn.Parameter(tensors[index].clone()) for index in which]
        for index, parameter in zip(which, made):
            parameter.tag = index
        return made

    together = updated(parameters([0, 1, 2, 3]))
    alone = [updated(parameters([index]))[0] for index in range(4)]
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1 * 0.2 * 32**0.5 * 2**-7)


@pytest.mark.parametrize(("name", "most"), [("adamw", 10), ("sgd", 6), ("muon", 80)])
def test_update_of_a_deeper_model_takes_no_more_launches(name: str, most: int) -> None:
    """Each is a launch on a GPU: one by one they would take longer than the arithmetic. Views are none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lmcore.model.build import build_model

    views = (
        "transpose",
        "view",
        "expand",
        "unbind",
        "select",
        "slice",
        "record_function",
        "RecordFunction",
        "detach",
    )

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not any(view in str(function) for view in views)
            return function(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 6):
        fields = {"n_layer": layers, "n_embd": 32, "n_head": 2}
        model: Any = build_model(type="gpt2", config_overrides=fields, vocab_size=64, block_size=16, seed=0)
        groups = optim.parameter_groups(model.named_parameters(), weight_decay=0.1)
        optimizer = optim.build_optimizer(name, groups, lr=1e-3)
        for _ in range(2):  # the first makes the state
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with Launches() as launches:
                optimizer.step()
        counts.append(launches.count)
    assert counts[0] == counts[1] <= most


def test_cautious_weight_decay_only_where_the_update_shrinks_a_weight() -> None:
    start = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    gradient = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # an update moves against it

    def moved(decay: float) -> torch.Tensor:
        weight = nn.Parameter(start.clone())
        group = {
            "params": [weight],
            "names": ["w"],
            "weight_decay": decay,
            "hidden": True,
            "lr_multiplier": 1.0,
        }
        weight.grad = gradient.clone()
        optim.build_optimizer("muon", [group], lr=0.1, cautious_weight_decay=True).step()
        return weight.detach()

    extra = moved(0.0) - moved(0.5)
    update = start - moved(0.0)
    expected = torch.where(update * start > 0, 0.1 * 0.5 * start, 0.0)
    torch.testing.assert_close(extra, expected, rtol=1e-5, atol=1e-6)


def test_argument_that_does_not_go_with_fused_is_refused_with_the_reason() -> None:
    with pytest.raises(RequestError, match=r"optim\.name sgd, optim\.config: `fused` and `foreach`"):
        optim.build_optimizer(
            "sgd",
            optim.parameter_groups(nn.Linear(2, 2).named_parameters(), weight_decay=0.0),
            lr=1.0,
            foreach=True,
        )
