"""Under every strategy a compiled layer is one graph: no breaks, no cuts, one graph for all layers of a kind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.engine_runs import MODES, Job
from tests.support.fork_server import run_ranks


def graphs_in_rank(job: Job) -> tuple[int, int]:
    """(graphs that reach the compiler, graph breaks) of two steps."""
    import torch
    from torch._dynamo.utils import counters

    from lmcore.data.context import Context
    from lmcore.plan.probe import text_batch
    from tests.support import engine_runs
    from tests.support.engine_runs import VOCAB

    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    torch.compile = lambda f, mode=None, **options: compiler(f, backend=counting, **options)
    engine = engine_runs.make_engine(job)
    module = engine_runs.make_model(job.model, weights=engine.needs_weights)
    engine.prepare(
        module,
        engine_runs.make_optimizer("adamw"),
        gradient_accumulation=1,
        micro_batch_blocks=2,
        clip_norm=1.0,
    )
    if engine.strategy == "ddp":
        engine.module.bucket_bytes_cap = 1_000  # torch's graph splitter cuts where a bucket is full
    context = Context(
        rank=engine.context_rank, size=job.context_parallel, sequence_lengths=job.context_parallel > 1
    )
    batch = text_batch(VOCAB, 2, 12, context)
    for _ in range(2):
        loss_sum, _ = engine.forward(batch, 0)
        engine.backward(loss_sum, 24 * engine.data_world_size)
        engine.update()
    engine.close()
    return len(graphs), sum(counters["graph_break"].values())


def slow(**job: Any) -> Any:
    return pytest.param(job, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "job",
    [
        {"mode": "single"},
        {"mode": "ddp2"},
        {"mode": "zero3"},
        {"mode": "ddp2", "context_parallel": 2},
        {"mode": "ddp2", "tensor_parallel": 2},
        slow(mode="fsdp2"),
        slow(mode="hsdp"),
        slow(mode="zero1"),
        slow(mode="zero2"),
        slow(mode="fsdp2", context_parallel=2),
        slow(mode="zero3", context_parallel=2),
        slow(mode="fsdp2", tensor_parallel=2),
        slow(mode="hsdp", context_parallel=2),
        slow(mode="ddp2", tensor_parallel=2, checkpointing=True),
        slow(mode="fsdp2", tensor_parallel=2, checkpointing=True),
        slow(mode="ddp2", context_parallel=2, checkpointing=True),
    ],
    ids=lambda job: ", ".join(f"{name} {value}" for name, value in job.items()),
)
def test_compiled_layer_is_one_graph(job: dict[str, Any]) -> None:
    model = "llama-even" if "tensor_parallel" in job else "llama"
    _, processes = MODES[job["mode"]]
    for graphs, breaks in run_ranks(graphs_in_rank, processes, Job(**job, model=model, compile=True)):
        assert (graphs, breaks) == (1, 0)
