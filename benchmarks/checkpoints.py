"""What a checkpoint costs each rank: stall, memory, bytes written, time to durable, time to load.

The state of a model of ``--millions`` parameters (fp32 weights and Adam's two moments, 12 bytes a parameter) as a strategy
holds it, without gradients and activations: whole on every rank (ddp), rows (fsdp2: real DTensors), a range of all parameters
in a row (zero1; ZeRO-2 holds the same), a range of each parameter (zero3). Ranks are processes on this machine that meet over
gloo. What all ranks of ddp hold is the same, so here they map one copy of it: eight whole ones fit on few machines, and what is
measured, the memory beyond the state, is each rank's own.

    python benchmarks/checkpoints.py --ranks 4 8 --millions 277 --out FILE
    python benchmarks/checkpoints.py --ranks 4 --systems lmcore before --before ../lmcore-of-an-earlier-commit --out FILE
    python benchmarks/checkpoints.py --ranks 4 8 --strategies fsdp2 --systems lmcore dcp dcp-kept --rounds 3 --out FILE
    python benchmarks/checkpoints.py --table FILE

``before`` is an earlier checkout, in which rank 0 writes everything. ``dcp`` is torch.distributed.checkpoint's async_save with
its defaults (fsdp2 only), which stages anew at every save; ``dcp-kept`` the same with a stager that keeps its memory. Every
system saves twice; the second save is reported, for which buffers that are kept exist already. Beside the stall stands the time
in which all ranks together copy as many bytes once, without a checkpoint. Rounds run in turn, in alternating order. With
``--out`` what is in that file already is not measured again; ``--table`` prints the medians of its rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """The weights of a GPT-2 of about this many parameters: 12 h^2 a layer, 24 layers, and an embedding of 50,304 tokens."""
    width = 64
    while 50_304 * (width + 64) + 24 * 12 * (width + 64) ** 2 < millions * 1e6:
        width += 64
    found: dict[str, tuple[int, ...]] = {"wte.weight": (50_304, width), "wpe.weight": (1024, width)}
    for layer in range(24):
        for name, shape in (("attn.c_attn", (width, 3 * width)), ("attn.c_proj", (width, width)),
                            ("mlp.c_fc", (width, 4 * width)), ("mlp.c_proj", (4 * width, width))):  # fmt: skip
            found[f"h.{layer}.{name}.weight"] = shape
            found[f"h.{layer}.{name}.bias"] = shape[1:]
        found |= {f"h.{layer}.ln_{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    return found


def entries(millions: float) -> list[tuple[str, str, str, tuple[int, ...]]]:
    sizes = shapes(millions).items()
    weights = [("model", name, "", shape) for name, shape in sizes]
    return weights + [("optim", n, slot, s) for n, s in sizes for slot in ("exp_avg", "exp_avg_sq")]


class Gloo:
    """The processes, as ``Checkpoints`` wants them."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_object(self, value: Any) -> list[Any]:
        values = [None] * self.world_size
        self._dist.all_gather_object(values, value)
        return values


def memory() -> dict[str, int]:
    """Bytes of this process: resident, and the most since :func:`reset_peak`."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kib) << 10 for name, kib in re.findall(r"(VmRSS|VmHWM):\s+(\d+)", text)}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def one_copy(millions: float, rank: int) -> Any:
    """The state of all ranks of ddp, flat, in memory that they share; it counts as resident in each of them."""
    import torch
    import torch.distributed as dist

    path, count = os.environ["CHECKPOINTS_STATE"], 3 * sum(map(math.prod, shapes(millions).values()))
    if rank == 0:
        os.truncate(path, 4 * count)
    dist.barrier()
    flat = torch.from_file(path, shared=True, size=count)
    if rank == 0:
        flat.fill_(1.0)
    dist.barrier()
    flat[:: 4096 // 4].sum()
    return flat


def held(strategy: str, millions: float, rank: int, count: int) -> dict[tuple[str, str, str], Any]:
    """What this rank holds: (whole shape, start, length, local tensor), or a DTensor."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (count,)) if strategy == "fsdp2" else None
    found: dict[tuple[str, str, str], Any] = {}
    share = -(-sum(math.prod(shape) for shape in shapes(millions).values()) // count)
    behind: dict[tuple[str, str], int] = {}  # parameters that come before, of the same kind and slot
    flat, filled = (one_copy(millions, rank), 0) if strategy == "ddp" else (None, 0)
    for kind, name, slot, shape in entries(millions):
        size = math.prod(shape)
        first = behind.get((kind, slot), 0)
        behind[kind, slot] = first + size
        if mesh is not None:
            each = -(-shape[0] // count)
            rows = max(0, min(each, shape[0] - rank * each))
            local = torch.full((rows, *shape[1:]), float(rank))
            stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            found[kind, name, slot] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
        elif strategy.startswith("zero"):
            each, offset = (share, first) if strategy == "zero1" else (-(-size // count), 0)
            start = min(max(rank * each - offset, 0), size)
            length = min(max((rank + 1) * each - offset, 0), size) - start
            found[kind, name, slot] = (shape, start, length, torch.full((length,), float(rank)))
        else:
            found[kind, name, slot] = (shape, 0, size, flat[filled : filled + size].view(shape))
            filled += size
    return found


def parts(state: dict[tuple[str, str, str], Any], strategy: str, ranks: Gloo) -> list[Any]:
    """The state as the engine gives it to ``Checkpoints.save``."""
    from lmcore.checkpoint.pieces import Held, Range, held_whole
    from lmcore.engine.state import place_of

    found = []
    for (kind, name, slot), value in state.items():
        if strategy == "fsdp2":
            found.append(Held(kind, name, slot, tuple(value.shape), place_of(value), value.to_local()))
        elif strategy.startswith("zero"):
            shape, start, length, local = value
            found.append(Held(kind, name, slot, shape, Range(start, length), local))
        else:
            found.append(held_whole(kind, name, slot, value[3], (ranks.rank, ranks.world_size)))
    return found


def load(folder: Path, state: Any, strategy: str, ranks: Gloo) -> None:
    """Verify the newest checkpoint, each rank its share, and copy this rank's parts into ``state``."""
    from lmcore.checkpoint.reader import find, open_checkpoint
    from lmcore.engine.ranks import hashing_together

    def newest(hashes: Any) -> Path | None:
        found = find(folder, hashes=hashes)
        return None if found is None else found.path

    path = hashing_together(ranks, newest)  # of an engine it needs what Gloo has
    with open_checkpoint(path, verify_bytes=False) as checkpoint:
        for part in parts(state, strategy, ranks):
            stored = checkpoint.stored(part.kind, part.name, part.slot)
            assert stored is not None, f"{part.name} {part.slot} is not in {path}"
            part.tensor.copy_(stored.read(part.part))


def lmcore(folder: Path, strategy: str, millions: float, ranks: Gloo) -> Iterator[dict[str, Any]]:
    from lmcore.checkpoint.pieces import to_write
    from lmcore.checkpoint.writer import Checkpoints
    from lmcore.config.schema import CheckpointConfig

    state = held(strategy, millions, ranks.rank, ranks.world_size)
    saves = Checkpoints(CheckpointConfig(keep=1), folder, ranks=ranks, note=lambda text: None)
    yield {"state": sum(p.tensor.numel() * 4 for p in parts(state, strategy, ranks))}
    for step in (1, 2):
        begin = time.perf_counter()
        saves.save(step, tensors=parts(state, strategy, ranks), state={})
        stall = time.perf_counter() - begin
        saves.wait(final=True)
        yield {
            "stall": stall,
            "durable": time.perf_counter() - begin,
            "buffers": sum(map(len, saves._buffers.values())),
        }
    written = f"*-r{ranks.rank:05d}*" if ranks.world_size > 1 else "*.safetensors"
    yield {"written": sum(path.stat().st_size for path in (folder / "step-00000002").glob(written))}
    begin = time.perf_counter()
    load(folder, state, strategy, ranks)
    yield {"load": time.perf_counter() - begin}
    saves._buffers.clear()
    written_here = to_write(parts(state, strategy, ranks), rank=ranks.rank)
    yield {"copy": one_plain_copy([part.tensor for part in written_here])}


def one_plain_copy(tensors: list[Any]) -> float:
    """Seconds in which every rank copies these to memory that it has used before, all ranks at the same time."""
    import torch
    import torch.distributed as dist

    target, seconds = torch.empty(sum(tensor.numel() for tensor in tensors)), 0.0
    for _ in range(2):
        dist.barrier()
        begin, at = time.perf_counter(), 0
        for tensor in tensors:
            target[at : at + tensor.numel()].copy_(tensor.reshape(-1))
            at += tensor.numel()
        seconds = time.perf_counter() - begin
    return seconds


def before(folder: Path, strategy: str, millions: float, ranks: Gloo) -> Iterator[dict[str, Any]]:
    """An earlier lmcore: every tensor is gathered, and rank 0 copies, hashes and writes it; every rank reads all of it."""
    import torch
    import torch.distributed as dist

    from lmcore.checkpoint.writer import Checkpoints, find, open_checkpoint

    state = held(strategy, millions, ranks.rank, ranks.world_size)
    layout = [(*key, shape, torch.float32) for *key, shape in entries(millions)]
    saves = Checkpoints(folder, keep=1, is_main=ranks.is_main, note=lambda text: None)

    def tensors() -> Iterator[Any]:
        for key, value in state.items():
            if strategy == "fsdp2":
                whole = value.full_tensor()
            elif strategy.startswith("zero"):
                shape, start, length, local = value
                whole = torch.zeros(math.prod(shape))
                whole[start : start + length] = local
                dist.reduce(whole, dst=0)
                whole = whole.view(shape)
            else:
                whole = value[3]
            yield *key, whole.clone() if ranks.is_main else None

    yield {"state": sum((v.to_local() if strategy == "fsdp2" else v[3]).numel() * 4 for v in state.values())}
    for step in (1, 2):
        begin = time.perf_counter()
        saves.save(step, layout=layout, tensors=tensors(), state={})
        dist.barrier()
        stall = time.perf_counter() - begin
        saves.wait(final=True)
        dist.barrier()
        yield {
            "stall": stall,
            "durable": time.perf_counter() - begin,
            "buffers": sum(map(len, saves._buffers.values())),
        }
    files = (folder / "step-00000002").glob("*.safetensors")
    yield {"written": sum(path.stat().st_size for path in files) if ranks.is_main else 0}
    begin = time.perf_counter()
    found = find(folder) if ranks.is_main else None
    path = ranks.broadcast_object(None if found is None else found.path)
    with open_checkpoint(path, verify_bytes=False) as checkpoint:
        for (kind, name, slot), value in state.items():
            whole = checkpoint.read(kind, name, slot)
            if strategy == "fsdp2":
                each = -(-whole.shape[0] // ranks.world_size)
                value.to_local().copy_(whole[ranks.rank * each : (ranks.rank + 1) * each])
            else:
                value[3].view(-1).copy_(whole.reshape(-1)[value[1] : value[1] + value[2]])
    dist.barrier()
    yield {"load": time.perf_counter() - begin}


def dcp(
    folder: Path, strategy: str, millions: float, ranks: Gloo, *, kept: bool = False
) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    # As async_save makes its own, but for all saves
    stager = DefaultStager(StagingOptions(False, False, False, False)) if kept else None
    assert strategy == "fsdp2", "flat ranges are no DTensors"
    state = {
        "/".join(key): value for key, value in held(strategy, millions, ranks.rank, ranks.world_size).items()
    }
    yield {"state": sum(value.to_local().numel() * 4 for value in state.values())}
    for step in (1, 2):
        begin = time.perf_counter()
        future: Any = checkpoint.async_save(state, checkpoint_id=folder / str(step), async_stager=stager)
        stall = time.perf_counter() - begin
        future.result()
        dist.barrier()
        yield {"stall": stall, "durable": time.perf_counter() - begin}
    yield {"written": sum(path.stat().st_size for path in (folder / "2").glob(f"__{ranks.rank}_*"))}
    begin = time.perf_counter()
    checkpoint.load(state, checkpoint_id=folder / "2")
    dist.barrier()
    yield {"load": time.perf_counter() - begin}


def load_only(folder: Path, system: str, strategy: str, millions: float, ranks: Gloo) -> dict[str, Any]:
    """On another number of ranks than wrote it."""
    import torch.distributed as dist

    state = held(strategy, millions, ranks.rank, ranks.world_size)
    dist.barrier()
    begin = time.perf_counter()
    if system.startswith("dcp"):
        import torch.distributed.checkpoint as checkpoint

        checkpoint.load({"/".join(key): value for key, value in state.items()}, checkpoint_id=folder / "2")
    else:
        load(folder, state, strategy, ranks)
    dist.barrier()
    return {"load_elsewhere": time.perf_counter() - begin}


def rank_main(options: argparse.Namespace) -> None:
    """One rank: everything that was measured, as a line of JSON."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, found = Gloo(), {}
    folder = Path(options.child)
    if options.elsewhere:
        found = load_only(folder, options.systems[0], options.strategies[0], options.millions, ranks)
    else:
        work = {"lmcore": lmcore, "before": before, "dcp": dcp, "dcp-kept": partial(dcp, kept=True)}[
            options.systems[0]
        ]
        stages = work(folder, options.strategies[0], options.millions, ranks)
        found = next(stages)
        dist.barrier()
        reset_peak()
        resting = memory()["VmRSS"]
        for _ in range(2):
            found |= next(stages)  # the second save overwrites the first
        found["extra"] = memory()["VmHWM"] - resting
        for stage in stages:
            found |= stage
    print("RESULT " + json.dumps({"rank": ranks.rank, **found}), flush=True)
    dist.destroy_process_group()


def run(
    system: str,
    strategy: str,
    count: int,
    options: argparse.Namespace,
    folder: Path,
    state: str,
    *,
    elsewhere: bool = False,
) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(options.before).resolve() if system == "before" else HERE.parents[1]
    command = [
        sys.executable,
        str(HERE),
        "--child",
        str(folder),
        "--systems",
        system,
        "--strategies",
        strategy,
    ]
    command += ["--millions", str(options.millions), *(["--elsewhere"] if elsewhere else [])]
    running = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "CHECKPOINTS_STATE": state,
        }  # fmt: skip
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in running):
        raise SystemExit(f"{system} {strategy} on {count} ranks failed")
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return sorted(found, key=lambda result: result["rank"])


def print_table(results: list[dict[str, Any]]) -> None:
    """The medians of the rounds; of each round the largest of all ranks. Bytes in MB."""
    import common  # not in the ranks: it puts this checkout on the path, and theirs may be another

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("parameters", "strategy", "ranks", "system"))
        groups.setdefault(key, []).append(result)
    rows = []
    for (parameters, strategy, count, system), rounds in sorted(groups.items()):

        def most(key: str, rounds: list[dict[str, Any]] = rounds) -> float:
            return statistics.median(max(each.get(key, math.nan) for each in r["each"]) for r in rounds)

        whole = 12 * parameters / 1e6
        part, extra, written = whole / count, most("extra") / 1e6, most("written") / 1e6
        main = statistics.median(r["each"][0]["extra"] for r in rounds) / 1e6
        times = [most("copy"), most("stall"), most("durable"), most("load")]
        times.append(statistics.median(r["load_elsewhere"] for r in rounds))
        rows.append([
            f"{parameters / 1e6:.0f} M", strategy, count, system, len(rounds), f"{part:.0f}", f"{extra:.0f}",
            f"{extra / part:.2f}", f"{main:.0f}", f"{written:.0f}", f"{written / whole:.3f}",
            *("-" if math.isnan(value) else f"{value:.2f}" for value in times),
        ])  # fmt: skip
    header = ["model", "strategy", "ranks", "system", "rounds", "part", "extra", "extra / part", "rank 0", "written",
              "of all", "a copy", "stall", "durable", "load", "load elsewhere"]  # fmt: skip
    print(common.table(rows, header))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2", "zero1", "zero3"])
    parser.add_argument(
        "--systems", nargs="+", default=["lmcore"], choices=["lmcore", "before", "dcp", "dcp-kept"]
    )
    parser.add_argument("--before", help="a checkout of lmcore of before")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", default=None, help="on the disk to be measured")
    parser.add_argument("--out", default=None, help="a JSON file for the results")
    parser.add_argument("--table", default=None, help="only print the table of such a file")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--elsewhere", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print_table(json.loads(Path(options.table).read_text()))
        return
    if options.child:
        rank_main(options)
        return
    parameters = sum(math.prod(shape) for shape in shapes(options.millions).values())
    results: list[dict[str, Any]] = []
    if options.out and Path(options.out).exists():
        results = json.loads(Path(options.out).read_text())
    done = {(r["system"], r["strategy"], r["ranks"], r["parameters"], r["round"]) for r in results}
    import common

    machine = common.machine()
    for turn in range(options.rounds):
        for count in options.ranks:
            for strategy in options.strategies:
                for system in options.systems[:: -1 if turn % 2 else 1]:
                    only = system.startswith("dcp") and strategy != "fsdp2"
                    if only or (system, strategy, count, parameters, turn) in done:
                        continue
                    with (
                        tempfile.TemporaryDirectory(dir=options.folder) as name,
                        tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="checkpoints-") as state,
                    ):
                        found = run(system, strategy, count, options, Path(name), state.name)
                        other: list[dict[str, Any]] = []
                        if system != "before":
                            fewer = max(1, count // 2 + 1)
                            other = run(
                                system, strategy, fewer, options, Path(name), state.name, elsewhere=True
                            )
                    elsewhere = max((result["load_elsewhere"] for result in other), default=math.nan)
                    results.append({"system": system, "strategy": strategy, "ranks": count, "parameters": parameters,
                                    "round": turn, "load_elsewhere": elsewhere, "each": found, "machine": machine})  # fmt: skip
                    print_table(results[-1:])
                    sys.stdout.flush()
                    if options.out:
                        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
