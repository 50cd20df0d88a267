"""What must not happen in a step: the host waits for the device, or the compiler starts anew. Counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmcore.config.schema import TrainConfig
from lmcore.engine.engine import Engine
from lmcore.model import module as m
from lmcore.model import optim
from lmcore.model.build import build_model
from lmcore.model.evaluate import evaluate
from lmcore.report.meters import Sums

V, T = 100, 16
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {**SMALL, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 12,
        "n_head": 2,
    },  # more layers than the compiler's limit of recompilations
    "llama": {**GQA, "num_hidden_layers": 12},
    "qwen2": GQA,
    "qwen3": {**GQA, "head_dim": 16},
    "mistral": GQA,
    "mixtral": {**GQA, "num_local_experts": 2},
    "gemma2": {**GQA, "head_dim": 16},
    "gpt_neox": SMALL,
    "phi": SMALL,
    "olmo2": GQA,
}

# What makes the host wait: reading a number, an output whose size depends on values, a tensor made from Python
# numbers (on a GPU: a copy from unpinned memory, which waits for the whole stream).
WAITS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten._unique2.default",
    "aten.unique_dim.default",
    "aten.lift_fresh.default",
}


class Waits(TorchDispatchMode):
    """Counts the operations inside for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name in ("aten.index.Tensor", "aten.index_put_.default") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITS or by_mask:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def batch(seed: int, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def make(family: str) -> m.ModelWithLoss:
    return m.ModelWithLoss(
        build_model(type=family, config_overrides=FAMILIES[family], vocab_size=V, block_size=T, seed=0)
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(TrainConfig(precision="bf16"), seed=0)
    yield made
    made.close()


def test_counter_of_host_waits_counts() -> None:
    x = torch.arange(4.0)
    for work, name in (
        (lambda: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda: bool(x.isfinite().all()), "aten._local_scalar_dense.default"),
        (lambda: x[x > 1], "aten.index.Tensor"),
        (lambda: torch.as_tensor(3), "aten.lift_fresh.default"),
    ):
        with Waits() as waits:
            work()
        assert waits.seen[name] == 1, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_no_step_waits_for_the_device(family: str, engine: Engine) -> None:
    module = make(family)

    def make_optimizer(named: Any) -> torch.optim.Optimizer:
        return optim.build_optimizer("adamw", optim.parameter_groups(named, weight_decay=0.1), lr=1e-3)

    engine.prepare(module, make_optimizer, gradient_accumulation=2, micro_batch_blocks=2, clip_norm=1.0)
    for step in range(3):
        with Waits() as waits:
            engine.set_learning_rate(1e-3)
            for key in (0, 1):
                loss_sum, _ = engine.forward(batch(key), key)
                engine.backward(loss_sum, 4 * T)
            engine.update()
        if step > 0:  # the first makes the optimizer's state
            assert not waits.seen, waits.seen


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_residual_stream_reaches_the_last_layer_in_one_graph(family: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = make(family)
    assert m.narrow_residual_stream(module) == (2 if family == "gpt2" else 1)
    m.compile_regions(module, backend="eager")
    types: set[torch.dtype] = set()

    def look(layer: Any, inputs: Any, output: Any) -> None:
        types.add((output[0] if isinstance(output, tuple) else output).dtype)

    for layer in m.decoder_layers(module):
        layer.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum = module(**batch(0))[0]
    loss_sum.backward()
    widened = family == "mixtral"  # its experts' outputs are weighted in fp32: layers of two kinds
    assert types == {torch.float32 if widened else torch.bfloat16}
    assert counters["stats"]["unique_graphs"] == (2 if widened else 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", get_args(get_type_hints(TrainConfig)["compile_mode"]))
def test_no_mode_of_compilation_records_cuda_graphs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient made by one lies in memory that the next micro-batch overwrites: sums over micro-batches would be wrong."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda forward, *, mode, dynamic: asked.append(mode) or forward)
    m.compile_regions(make("gpt2"), mode)
    graphs = [torch._inductor.list_mode_options(one).get("triton.cudagraphs", False) for one in asked]
    assert graphs
    assert not any(graphs)


def test_own_metrics_of_a_step_do_not_wait_for_the_device() -> None:
    """torch.as_tensor of a number copies it from unpinned memory: each step with a metric waited for the GPU's whole queue."""
    sums, loss, count = Sums(), torch.tensor(6.0), torch.tensor(3)
    metrics: dict[str, Any] = {"mean": torch.tensor(2.0), "number": 5, "pair": (torch.tensor(1.0), 4)}
    with Waits() as waits:
        sums.add(loss, count, True, metrics)
    assert not waits.seen, waits.seen
    means = sums.total(lambda tensor: tensor, is_main=True).metric_means
    assert means == {"mean": 2.0, "number": 5.0, "pair": 0.25}


def test_evaluation_waits_once_however_long_it_is(engine: Engine) -> None:
    def make_optimizer(named: Any) -> torch.optim.Optimizer:
        return optim.build_optimizer("adamw", optim.parameter_groups(named, weight_decay=0.1), lr=1e-3)

    engine.prepare(make("gpt2"), make_optimizer, gradient_accumulation=1, micro_batch_blocks=2, clip_norm=1.0)
    seen = []
    for count in (1, 4):
        batches = [batch(seed) for seed in range(count)]
        with Waits() as waits:
            result = evaluate(engine, batches, byte_lengths=np.arange(V) % 5)
        assert result.bytes is not None
        assert result.tokens == count * 2 * T
        seen.append(waits.seen)
    assert seen[0] == seen[1], "not once for each micro-batch"
    assert sum(seen[0].values()) > 0, "the sums are read in the end"


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every input's .grad
@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_breaks_and_no_recompilation_after_the_warm_up(family: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = make(family)
    # Dynamo's part alone: what it captures, and how often
    layers = m.compile_regions(module, backend="eager")
    assert layers == len(m.decoder_layers(module)) > 0

    def step(seed: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum = module(**batch(seed))[0]
        loss_sum.backward()

    def evaluate() -> None:
        module.eval()
        with torch.no_grad():
            module(**batch(0))
        module.train()

    step(0)
    evaluate()
    warm = counters["stats"]["unique_graphs"]
    for seed in range(1, 4):
        step(seed)
    evaluate()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == warm
    # Training and evaluation, of each kind of layer and of the loss: the layers share their graphs.
    kinds = 2 if family == "gemma2" else 1
    assert warm <= 2 * kinds + 2, warm
    assert not counters["recompile_limit"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_every_micro_batch_of_a_batch_that_grows_is_compiled() -> None:
    """By default dynamo gives up after eight graphs of one function: the rest of the run would not be compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = make("gpt2")
    m.compile_regions(module, backend="eager")
    sizes = range(2, 13)
    for blocks in sizes:
        module(**batch(0, rows=blocks))[0].backward()
    assert counters["stats"]["unique_graphs"] == len(sizes)
    assert not counters["recompile_limit"]
