"""The first weights of a sharded model: no rank but the first ever holds the whole of it.

Measured, not counted: the resident memory of the process (``VmHWM`` is the highest it has been).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lmcore.config import parse
from lmcore.config.schema import TrainConfig
from lmcore.errors import RequestError
from lmcore.run import setup
from tests.support import engine_runs
from tests.support.engine_runs import Job
from tests.support.fork_server import run_ranks

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
"""41 million parameters, 160 MB in fp32, in layers of 14 MB."""


def resident(word: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(word)


def build_and_shard(mode: str) -> dict[str, float]:
    """Growth of the process in shares of the whole model: when it is built, and at most until it is sharded."""
    from lmcore.model.build import build_model
    from lmcore.model.module import ModelWithLoss

    engine = engine_runs.make_engine(Job(mode=mode))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    settings = {"vocab_size": 64, "block_size": 16, "seed": 1, "weights": engine.needs_weights}
    module = ModelWithLoss(build_model(type="llama", config_overrides=WIDE, **settings))
    whole = 4 * sum(p.numel() for p in module.parameters())
    built = resident("VmRSS") - before
    engine.prepare(module, engine_runs.make_optimizer("sgd"), gradient_accumulation=1, micro_batch_blocks=1)
    most = resident("VmHWM") - before
    engine.close()
    return {"built": built / whole, "most": most / whole}


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_no_rank_but_the_first_has_the_whole_model(mode: str) -> None:
    """Seen: 0.10 and 0.71 of the model on rank 1 under FSDP2 (82 million parameters: 0.05 and 0.61; 1.06 and 1.09 when
    it built the model as rank 0 does).
    DeepSpeed allocates several times its share at once, so that only the building shows there."""
    main, other = run_ranks(build_and_shard, 2, mode)
    assert main["built"] > 0.9  # the measure measures
    assert other["built"] < 0.3
    if mode == "fsdp2":
        assert other["most"] < 0.85  # its half, and a parameter at a time


def test_shards_live_on_the_device_unless_they_are_offloaded() -> None:
    """Both are the CPU in the other tests; accelerate's plugin always has a policy, and the base class is none."""
    from accelerate import FullyShardedDataParallelPlugin

    from lmcore.engine.sharded_init import shards_live_on

    gpu = torch.device("cuda", 1)
    for offload, place in ((False, gpu), (True, torch.device("cpu"))):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offload)
        assert shards_live_on(plugin.cpu_offload, gpu) == place


def kernels_of(deterministic: bool) -> bool:
    from lmcore.engine.engine import Engine

    Engine(TrainConfig(deterministic=deterministic)).close()
    return torch.are_deterministic_algorithms_enabled()


def test_deterministic_kernels_are_asked_for() -> None:
    """torch refuses by itself then what has no deterministic form."""
    assert [run_ranks(kernels_of, 1, asked) for asked in (True, False)] == [[True], [False]]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden: Any) -> Any:
        return hidden + self.linear(hidden)


class Own(nn.Module):
    """A model of the user's own, of other weights on each rank, with a persistent buffer and tied weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(engine_runs.VOCAB, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, engine_runs.VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((), 1.0 + seed))

    def forward(self, input_ids: Any) -> Any:
        hidden = self.embedding(input_ids) * self.scale
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def shard_own(mode: str, folder: str) -> dict[str, Any]:
    """The state after preparing: of a factory's model, or of a pretrained one in ``folder``."""
    from lmcore.model.build import build_model
    from lmcore.model.module import ModelWithLoss

    engine = engine_runs.make_engine(Job(mode=mode, precision="bf16"))
    settings = {"vocab_size": engine_runs.VOCAB, "block_size": 8, "seed": 1, "weights": engine.needs_weights}
    own = build_model(from_pretrained=folder, **settings) if folder else Own(engine.rank)
    module = ModelWithLoss(own)
    engine.prepare(module, engine_runs.make_optimizer("adamw"), gradient_accumulation=1, micro_batch_blocks=2)
    state = {name: t for kind, name, _, t in engine.state() if kind == "model"}
    batch = {k: v[:2, :8] for k, v in engine_runs.batch_of(0).items()}
    loss_sum, _ = engine.forward(batch, 0)
    engine.backward(loss_sum, 16)
    assert bool(engine.update()[1])
    engine.close()
    return {**state, "loss": float(loss_sum.detach())}


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_every_rank_gets_the_weights_of_the_first(mode: str) -> None:
    """Exact fp32 values under bf16, tied weights, buffers: the same loss on the same batch."""
    main, other = run_ranks(shard_own, 2, mode, "")
    assert main.pop("loss") == other["loss"]
    theirs = Own(0)
    assert main.keys() == {name for name, _ in [*theirs.named_parameters(), *theirs.named_buffers()]}
    for name, tensor in main.items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["fsdp2", "zero2", "zero3"])
def test_pretrained_weights_reach_every_rank_exactly(mode: str, tmp_path: Path) -> None:
    engine_runs.make_model("llama-tied").model.save_pretrained(tmp_path)  # its vocabulary is padded once more
    main, other = run_ranks(shard_own, 2, mode, str(tmp_path))
    assert main.pop("loss") == other["loss"]
    for name, p in engine_runs.make_model("llama-tied").model.named_parameters():
        assert torch.equal(main[name], p), name


def build_differently() -> str:
    engine = engine_runs.make_engine(Job(mode="fsdp2"))
    model = engine_runs.make_model("gpt2-tied" if engine.is_main else "llama")
    try:
        engine.prepare(
            model, engine_runs.make_optimizer("sgd"), gradient_accumulation=1, micro_batch_blocks=1
        )
    except RequestError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_rank_with_another_model_is_refused_on_every_rank() -> None:
    for answer in run_ranks(build_differently, 2):
        assert "rank 1 built a different model than rank 0 (Shape(name='model.embed_tokens.weight'" in answer


def test_run_builds_the_model_its_engine_requires() -> None:
    """The others than rank 0 the structure; but a factory's model is whole, and that is said."""
    argv = ["--model.type", "llama", "--model.config", "{hidden_size: 8, num_attention_heads: 2}"]
    data: Any = SimpleNamespace(
        encoder=SimpleNamespace(vocab_size=70, special_ids={}), block_size=8, train=None, valid={}, test={}
    )
    notes: list[str] = []
    for own in (
        [],
        [
            "--model.factory",
            "tests.support.own_parts:model",
            "--loss.factory",
            "tests.support.own_parts:squares",
        ],
    ):
        config = parse.parse([*(own or argv), "--data.block_size", "8"], note=lambda line: None)
        for needs_weights in (True, False):
            engine: Any = SimpleNamespace(
                needs_weights=needs_weights,
                sharded=True,
                tensor_parallel=1,
                gather_object=lambda word: [word],
            )
            module = setup.open_model(config, data, engine, note=notes.append)
            assert all(p.is_meta for p in module.parameters()) == (not needs_weights and not own)
    assert len([line for line in notes if "every rank builds the whole model in host memory" in line]) == 2


def test_model_that_sees_the_future_is_refused() -> None:
    argv = [
        "--model.type",
        "xlnet",
        "--data.block_size",
        "8",
        "--data.train",
        "x",
        "--model.config.d_model=32",
    ]
    argv += ["--model.config.n_layer=2", "--model.config.n_head=2", "--model.config.d_inner=40"]
    data: Any = SimpleNamespace(encoder=SimpleNamespace(vocab_size=64, special_ids={}), block_size=8)
    engine: Any = SimpleNamespace(
        needs_weights=True, sharded=False, tensor_parallel=1, gather_object=lambda word: [word]
    )
    with pytest.raises(RequestError, match="xlnet: XLNetLMHeadModel sees the tokens that it must predict"):
        setup.open_model(parse.parse(argv, default_recipe=None), data, engine, note=lambda line: None)


def open_what_only_rank_0_reads(folder: str) -> str:
    engine = engine_runs.make_engine(Job(mode="zero3"))
    argv = ["--model.from_pretrained", folder, "--data.block_size", "8", "--model.config", "{}"]
    data: Any = SimpleNamespace(
        encoder=SimpleNamespace(vocab_size=engine_runs.VOCAB, special_ids={}), block_size=8, train=None
    )
    try:
        setup.open_model(parse.parse(argv, default_recipe=None), data, engine)
    except RequestError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_file_unreadable_on_rank_0_is_refused_on_every_rank(tmp_path: Path) -> None:
    """The others build the structure by config.json alone, and would wait for its weights."""
    engine_runs.make_model("llama").model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    one, other = run_ranks(open_what_only_rank_0_reads, 2, str(tmp_path))
    assert one == other
    assert one.startswith(f"model.from_pretrained {str(tmp_path)!r}")
