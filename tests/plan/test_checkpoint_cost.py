"""The arithmetic of a checkpoint's cost, against checkpoints that were written, and the table in the docs."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.checkpoint.manifest import read_manifest
from lmcore.checkpoint.pieces import Box, Held, cut
from lmcore.plan.checkpoint_cost import checkpoint_cost
from tests.support.checkpoints import Member, Threads, checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "checkpoints.json"
SHAPE, TENSORS = (64, 500), 10


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_written_checkpoints_cost_what_the_arithmetic_says(tmp_path: Path, world_size: int) -> None:
    weight = torch.rand(SHAPE)

    def work(member: Member) -> int:
        rows = SHAPE[0] // world_size
        part = Box((member.rank * rows, 0), (rows, SHAPE[1]))
        held = [
            Held(kind, f"layer.{number}.weight", slot, SHAPE, part, cut(weight, part))
            for kind, slot in (("model", ""), ("optim", "exp_avg"), ("optim", "exp_avg_sq"))
            for number in range(TENSORS)
        ]
        saves = checkpoints(tmp_path, ranks=member)
        saves.save(1, tensors=held, state={})
        saves.wait(final=True)
        return sum(map(len, saves._buffers.values()))

    copied = Threads(world_size).together(work)
    cost = checkpoint_cost(
        parameters=TENSORS * weight.numel(),
        tensors=TENSORS,
        ranks=world_size,
        ranks_per_node=world_size,
        node_bytes_per_second=1e9,
    )
    assert copied == [cost.rank_bytes] * world_size
    files = read_manifest(tmp_path / "step-00000001")["files"]
    for rank in range(world_size):
        mine = [
            name for name in files if f"-r{rank:05d}" in name or (world_size == 1 and "safetensors" in name)
        ]
        written = sum(files[name]["bytes"] for name in mine)
        assert cost.rank_bytes < written < cost.rank_bytes + 5000, "the rest is the headers"
    pieces = (tmp_path / "step-00000001" / "manifest.json").stat().st_size
    # 120 bytes for the name, type and shape of each tensor, 130 for each file.
    assert pieces == pytest.approx(cost.manifest_bytes + 30 * 120 + 130 * 2 * world_size, rel=0.35)


def test_table_in_the_docs_is_the_arithmetic() -> None:
    rows = re.findall(
        r"^\| (\d+) B on (\d+) ranks \((\d+) tensors\) \|(.*)\|$", PAGE.read_text(), re.MULTILINE
    )
    assert [(row[0], row[1]) for row in rows] == [("8", "8"), ("70", "64"), ("405", "512")]
    for billions, ranks, tensors, cells in rows:
        cost = checkpoint_cost(
            parameters=int(billions) * 10**9,
            tensors=int(tensors),
            ranks=int(ranks),
            ranks_per_node=8,
            node_bytes_per_second=2e9,
        )
        expected = [
            f"{cost.total_bytes / 1e9:,.0f} GB",
            f"{cost.rank_bytes / 1e9:.1f} GB",
            f"{cost.manifest_bytes / 1e6:.1f} MB",
            f"{cost.write_seconds:.0f} s",
            f"{cost.write_seconds + cost.readback_seconds:.0f} s",
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected


def measured() -> list[dict[str, Any]]:
    """What benchmarks/checkpoints.py has measured of models of about 300 million parameters."""
    return [
        row
        for row in json.loads(MEASURED.read_text())
        if row["system"] == "lmcore" and row["parameters"] > 250e6
    ]


def test_measured_checkpoints_cost_what_the_arithmetic_says() -> None:
    """Every rank of every strategy, on 4 and 8 ranks: bytes written, memory, and seconds by the node's bytes alone."""
    rows = measured()
    assert {(row["strategy"], row["ranks"]) for row in rows} == {
        (strategy, ranks) for strategy in ("ddp", "fsdp2", "zero1", "zero3") for ranks in (4, 8)
    }
    speeds = []
    for row in rows:
        cost = checkpoint_cost(
            parameters=row["parameters"],
            tensors=290,
            ranks=row["ranks"],
            ranks_per_node=row["ranks"],
            node_bytes_per_second=1.0,
        )
        for rank in row["each"]:
            assert cost.rank_bytes * 0.99 < rank["written"] < cost.rank_bytes * 1.01
            assert rank["extra"] < 1.1 * cost.rank_bytes
        seconds = max(rank["durable"] for rank in row["each"])
        speeds.append((cost.write_seconds + cost.readback_seconds) / seconds)
    assert min(speeds) > 0.5 * statistics.median(speeds)
    assert max(speeds) < 2.0 * statistics.median(speeds)
