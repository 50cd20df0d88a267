"""Checkpoints that several ranks write: killed, full, damaged, contradicting each other. Ranks are threads or forks."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcore.checkpoint import pieces
from lmcore.checkpoint.manifest import Damaged, described, manifest_bytes, read_manifest
from lmcore.checkpoint.pieces import Box, Held, Range, cut
from lmcore.checkpoint.reader import Checkpoint, find, open_checkpoint
from lmcore.checkpoint.writer import Checkpoints, part_name
from lmcore.disk import Call, Disk
from lmcore.engine.ranks import share_files
from lmcore.errors import FaultError, RequestError
from tests.support.checkpoints import Member, Threads, checkpoints
from tests.support.disk_faults import Counter, FailAt, KillAt, damage

STRATEGIES = ("whole", "rows", "flat", "columns")


def state_of(step: int) -> dict[tuple[str, str, str], Tensor]:
    draw = torch.Generator().manual_seed(step)
    weights = {"wte": torch.rand(7, 4, generator=draw), "norm": torch.rand(5, generator=draw)}
    state = {("model", name, ""): tensor for name, tensor in weights.items()}
    state |= {("model", "empty", ""): torch.empty(0, 3), ("model", "count", ""): torch.tensor(float(step))}
    return state | {("optim", name, "exp_avg"): tensor.bfloat16() for name, tensor in weights.items()}


def part_of(
    strategy: str, shape: tuple[int, ...], rank: int, world_size: int
) -> tuple[pieces.Part, tuple[int, int]]:
    """What a rank holds under DDP, FSDP2, ZeRO, and of a tensor that is cut in columns."""
    if strategy == "whole" or not shape:
        return pieces.whole(shape), (rank, world_size)
    if strategy == "flat":
        size = torch.Size(shape).numel()
        each = -(-size // world_size)
        start = min(rank * each, size)
        return Range(start, min(each, size - start)), (0, 1)
    at = len(shape) - 1 if strategy == "columns" else 0
    each = -(-shape[at] // world_size)
    start = min(rank * each, shape[at])
    offsets, lengths = [0] * len(shape), list(shape)
    offsets[at], lengths[at] = start, min(each, shape[at] - start)
    return Box(tuple(offsets), tuple(lengths)), (0, 1)


def held(step: int, strategy: str, rank: int, world_size: int) -> list[Held]:
    found = []
    for (kind, name, slot), tensor in state_of(step).items():
        part, holders = part_of(strategy, tuple(tensor.shape), rank, world_size)
        found.append(Held(kind, name, slot, tuple(tensor.shape), part, cut(tensor, part), holders))
    return found


def save_in(member: Member, folder: Path, steps: list[int], strategy: str, **more: Any) -> Checkpoints:
    saves = checkpoints(folder, ranks=member, **more)
    for step in steps:
        tensors = held(step, strategy, member.rank, member.world_size)
        saves.save(step, tensors=tensors, state={"position": step * 8})
    saves.wait(final=True)
    return saves


def saved(folder: Path, steps: list[int], strategy: str = "rows", world_size: int = 3, **more: Any) -> Path:
    Threads(world_size).together(lambda member: save_in(member, folder, steps, strategy, **more))
    return folder


def check(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step == checkpoint.state["step"]
    assert checkpoint.state["position"] == step * 8
    for (kind, name, slot), tensor in state_of(step).items():
        found = checkpoint.read(kind, name, slot)
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), (kind, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 30])
def test_every_strategy_reads_what_every_strategy_wrote(
    tmp_path: Path, strategy: str, world_size: int, shard_bytes: int
) -> None:
    saved(tmp_path, [3], strategy, world_size, shard_bytes=shard_bytes)
    with find(tmp_path) as checkpoint:
        check(checkpoint, 3)
        for other in STRATEGIES:
            for of in (1, 2, 5):
                for rank in range(of):
                    for (kind, name, slot), tensor in state_of(3).items():
                        part, _ = part_of(other, tuple(tensor.shape), rank, of)
                        stored = checkpoint.stored(kind, name, slot)
                        assert stored is not None
                        assert stored.shape == tuple(tensor.shape)
                        assert torch.equal(stored.read(part), cut(tensor, part))
    files = [path.name for path in (tmp_path / "step-00000003").iterdir()]
    assert any("-r00000" in name for name in files) == (world_size > 1)
    assert not any(name.startswith("part-") for name in files)


def test_rank_reads_only_files_that_overlap_its_part(tmp_path: Path) -> None:
    saved(tmp_path, [1], "rows", world_size=7)
    with open_checkpoint(tmp_path / "step-00000001", verify_bytes=False) as checkpoint:
        stored = checkpoint.stored("model", "wte")
        assert stored is not None
        stored.read(Box((2, 0), (2, 4)))
        assert sorted(checkpoint._files) == ["model-r00002.safetensors", "model-r00003.safetensors"]
        with pytest.raises(ValueError, match="not within it"):
            stored.read(Range(27, 2))


# ---- killed, full ------------------------------------------------------------------------------------------


def three_processes(folder: Path, step: int, lethal: int, before: Callable[[Call], None] | None) -> list[int]:
    """A save of three forked ranks that meet through a file; exit codes. The launcher ends the others of a dead one."""

    class Forked(Member):
        def __init__(self, rank: int) -> None:
            self.rank, self.world_size, self.is_main = rank, 3, rank == 0
            self.calls = 0

        def gather_object(self, value: Any) -> list[Any]:
            self.calls += 1
            place = meeting / f"{self.calls}-{self.rank}"
            place.with_suffix(".tmp").write_text(json.dumps(value))
            os.rename(place.with_suffix(".tmp"), place)
            end = time.monotonic() + 60
            while not all((meeting / f"{self.calls}-{rank}").exists() for rank in range(3)):
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(0.002)
            return [json.loads((meeting / f"{self.calls}-{rank}").read_text()) for rank in range(3)]

        def broadcast_object(self, value: Any) -> Any:
            return self.gather_object(value)[0]

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        meeting = Path(name)
        pids = []
        for rank in range(3):
            pid = os.fork()
            if pid == 0:
                code = 1
                os.setpgid(0, pids[0] if pids else 0)  # a group of the ranks alone
                try:
                    disk = Disk(before if rank == lethal else None)
                    save_in(Forked(rank), folder, [step], "rows", keep=2, disk=disk, background=False)
                    code = 0
                finally:
                    os._exit(code)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pids[0] if pids else pid)  # here too, before the next one joins
            pids.append(pid)
        codes: list[int | None] = [None] * 3
        while None in codes:
            for rank, pid in enumerate(pids):
                if codes[rank] is None and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
                    if codes[rank]:
                        for other, victim in enumerate(pids):
                            if codes[other] is None:
                                os.kill(victim, 9)
            time.sleep(0.001)
        return [code if code is not None else 1 for code in codes]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rank_killed_at_every_call_of_its_save(tmp_path: Path, rank: int, together: bool) -> None:
    """The others end with it, as a launcher makes them, or at the same instant (``together``), as when a job is killed:
    the old checkpoint or the new one, never half of one."""
    old = saved(tmp_path / "old", [1, 2], keep=2)
    shutil.copytree(old, tmp_path / "count")
    counters = [Counter() for _ in range(3)]
    Threads(3).together(
        lambda member: save_in(
            member,
            tmp_path / "count",
            [3],
            "rows",
            keep=2,
            disk=Disk(counters[member.rank]),
            background=False,
        )
    )
    calls = counters[rank].calls
    assert len(calls) > 8
    outcomes = set()
    for number, operation in enumerate(calls):
        folder = tmp_path / "run"
        shutil.copytree(old, folder)
        kill = functools.partial(os.killpg, 0, signal.SIGKILL) if together else None
        codes = three_processes(folder, 3, rank, KillAt(number, torn=operation == "write", kill=kill))
        assert codes[rank] == -9, (number, operation, codes)
        assert not together or set(codes) == {-9}
        heard: list[str] = []
        found = find(folder, note=heard.append)
        assert found is not None
        check(found, found.step)
        assert not any("damaged" in line for line in heard), (number, operation, heard)
        outcomes.add(found.step)
        saved(folder, [4], keep=2)
        check(find(folder), 4)
        assert not list(folder.glob(".step-*")), "the next save clears up"
        shutil.rmtree(folder)
    # Another rank that dies after its list has appeared does not stop rank 0 in time.
    assert outcomes == {2, 3} or (rank > 0 and outcomes == {2})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("lasting", [False, True])
def test_error_at_every_call_of_a_rank_leaves_a_good_checkpoint(
    tmp_path: Path, rank: int, background: bool, lasting: bool
) -> None:
    old = saved(tmp_path / "old", [1, 2], keep=2)
    counter = Counter()
    shutil.copytree(old, tmp_path / "count")

    def disks(of: Callable[[Call], None]) -> Callable[[Member], Disk]:
        return lambda member: Disk(of if member.rank == rank else None)

    def attempt(member: Member, folder: Path, disk: Callable[[Member], Disk]) -> str:
        try:
            save_in(
                member,
                folder,
                [3],
                "flat",
                keep=2,
                disk=disk(member),
                background=background,
                wait_seconds=0.5,
            )
        except FaultError as failure:
            return str(failure)
        return ""

    Threads(3).together(lambda member: attempt(member, tmp_path / "count", disks(counter)))
    for number in range(len(counter.calls)):
        folder = tmp_path / "run"
        shutil.copytree(old, folder)
        fault = FailAt(number, errno.ENOSPC, lasting=lasting)
        said = Threads(3).together(lambda member: attempt(member, folder, disks(fault)))  # noqa: B023 - it has ended before the next round
        found = find(folder, note=lambda _: None)
        check(found, found.step if found else 0)
        assert found is not None
        if any(said):
            assert len(set(said)) == 1, "all ranks raise the same"
            assert "could not be written" in said[0]
            if rank and not background:
                assert "rank 1" in said[0]
        else:
            assert found.step == 3
        shutil.rmtree(folder)


def test_list_of_a_rank_is_the_last_that_it_writes(tmp_path: Path) -> None:
    """Rank 0 commits as soon as it is there: what came after it, even word of an error, would damage the checkpoint."""
    calls: list[Call] = []
    Threads(3).together(
        lambda member: save_in(
            member, tmp_path, [1], "flat", disk=Disk(calls.append if member.rank == 1 else None)
        )
    )
    assert (calls[-1].operation, Path(calls[-1].target).name) == ("rename", part_name(1))


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    """A rank whose folder is on a disk of its own: its list never comes."""

    def work(member: Member) -> str:
        folder = tmp_path / ("own" if member.rank == 2 else "shared")
        folder.mkdir(exist_ok=True)
        saves = checkpoints(folder, ranks=member, background=False, wait_seconds=0.3)
        if member.rank == 2:
            (folder / ".step-00000001.tmp").mkdir()
        tensors = held(1, "rows", member.rank, 3)
        saves.save(1, tensors=tensors, state={})
        try:
            saves.wait(final=True)
        except FaultError as failure:
            return str(failure)
        return ""

    said = Threads(3).together(work)
    assert "rank 2" in said[0]
    assert said[0] == said[1] == said[2]
    assert find(tmp_path / "shared") is None


def test_ranks_that_hold_other_tensors_are_not_committed(tmp_path: Path) -> None:
    """A hole, an overlap, another shape: found before the manifest is written."""

    def hole(given: list[Held]) -> list[Held]:
        return given[1:]

    def overlap(given: list[Held]) -> list[Held]:
        tensor = state_of(1)["model", "wte", ""]
        return [Held("model", "wte", "", (7, 4), Box((0, 0), (7, 4)), tensor), *given[1:]]

    def shape(given: list[Held]) -> list[Held]:
        return [given[0]._replace(shape=(8, 4)), *given[1:]]

    for change, problem in ((hole, "missing"), (overlap, "overlap"), (shape, "has another wte")):

        def work(member: Member, change: Callable[[list[Held]], list[Held]] = change) -> str:
            saves = checkpoints(tmp_path, ranks=member)
            tensors = held(1, "rows", member.rank, 3)
            saves.save(1, tensors=change(tensors) if member.rank == 1 else tensors, state={})
            with pytest.raises(FaultError) as failure:
                saves.wait(final=True)
            return str(failure.value)

        assert problem in Threads(3).together(work)[0]
        assert find(tmp_path) is None


def test_list_of_another_save_is_refused(tmp_path: Path) -> None:
    def before(call: Call) -> None:
        if call.operation == "rename" and "part-r00001" in call.target:
            content = json.loads(Path(call.path).read_text())
            Path(call.path).write_bytes(manifest_bytes(content | {"token": "0" * 32}))

    def work(member: Member) -> str:
        with pytest.raises(FaultError) as failure:
            save_in(member, tmp_path, [1], "rows", disk=Disk(before))
        return str(failure.value)

    assert "of another save" in Threads(2).together(work)[0]


def test_rank_that_ends_with_an_error_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcore.checkpoint.writer.ABANDON_SECONDS", 0.1)
    gone = threading.Event()

    def work(member: Member) -> None:
        block = Disk(lambda call: None if member.rank == 0 else _wait(gone))
        saves = checkpoints(tmp_path, ranks=member, disk=block)
        saves.save(1, tensors=held(1, "rows", member.rank, 2), state={})
        if member.rank == 0:
            saves.abandon()
            running = saves._running
            assert running is not None
            assert running.done.wait(60)
            assert "left nothing" in str(running.problem)
            gone.set()

    Threads(2).together(work)
    assert find(tmp_path) is None


def _wait(event: threading.Event) -> None:
    assert event.wait(100)


# ---- damage and hostile manifests -----------------------------------------------------------------------------


def test_damaged_files_of_any_rank_are_detected(tmp_path: Path) -> None:
    draw = random.Random(9)
    good = saved(tmp_path / "good", [1, 2], keep=2, world_size=3)
    for _ in range(150):
        folder = tmp_path / "run"
        shutil.copytree(good, folder)
        how = damage(folder / "step-00000002", draw)
        heard: list[str] = []
        check(find(folder, note=heard.append), 1)
        assert "step-00000002 is damaged" in heard[0], how
        shutil.rmtree(folder)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no tensors": lambda m: m.pop("tensors"),
    "no files of pieces": lambda m: m.pop("piece_files"),
    "a path": lambda m: m["piece_files"].__setitem__(0, "../outside.safetensors"),
    "an absolute path": lambda m: m["piece_files"].__setitem__(0, "/etc/passwd"),
    "a file twice": lambda m: m["piece_files"].append(m["piece_files"][0]),
    "a file less": lambda m: m["piece_files"].pop(),
    "a list as file": lambda m: m["piece_files"].__setitem__(0, []),
    "a kind": lambda m: m["tensors"].__setitem__("../x", {}),
    "a huge shape": lambda m: wte(m).update(shape=[1 << 61, 4]),
    "more dimensions": lambda m: wte(m).update(shape=[1] * 1000),
    "a negative shape": lambda m: wte(m).update(shape=[-7, -4]),
    "a fraction": lambda m: wte(m).update(shape=[7.0, 4]),
    "another shape": lambda m: wte(m).update(shape=[14, 2, 2]),
    "another dtype": lambda m: wte(m).update(dtype="I32"),
    "no dtype": lambda m: wte(m).update(dtype=["F32"]),
    "no pieces": lambda m: wte(m).update(pieces=[]),
    "a hole": lambda m: wte(m)["pieces"].pop(),
    "a doubled piece": lambda m: wte(m)["pieces"].append(wte(m)["pieces"][0]),
    "a negative offset": lambda m: wte(m)["pieces"][0].__setitem__(1, -4),
    "an overlap": lambda m: wte(m)["pieces"][1].__setitem__(1, 8),
    "a swap": lambda m: swap(wte(m)["pieces"]),
    "a file that is not there": lambda m: wte(m)["pieces"][0].__setitem__(0, 99),
    "a negative file": lambda m: wte(m)["pieces"][0].__setitem__(0, -1),
    "a file of another kind": lambda m: wte(m)["pieces"][0].__setitem__(0, 1),
    "a piece of strings": lambda m: wte(m)["pieces"].__setitem__(0, ["0", "0", "12"]),
    "a box of one number": lambda m: wte(m)["pieces"].__setitem__(0, [0, [0], [12]]),
    "a tensor more": lambda m: m["tensors"]["model"].__setitem__("more", {"dtype": "F32", "shape": [1], "pieces": [[0, 0, 1]]}),
    "a tensor less": lambda m: m["tensors"]["model"].pop("wte"),
    "no tensor": lambda m: m["tensors"]["model"].__setitem__("wte", 3),
}  # fmt: skip


def wte(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["tensors"]["model"]["wte"]


def swap(given: list[list[int]]) -> None:
    given[0][0], given[2][0] = given[2][0], given[0][0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_of_pieces(tmp_path: Path, name: str) -> None:
    """Hashes do not protect from somebody who can compute them. Nothing outside of the folder is opened."""
    folder = saved(tmp_path, [1, 2], keep=2) / "step-00000002"
    manifest = read_manifest(folder)
    HOSTILE[name](manifest)
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(RequestError, match="damaged"):
        open_checkpoint(folder)
    check(find(tmp_path, note=lambda _: None), 1)


def test_file_that_holds_other_tensors_than_the_manifest_says_is_refused_when_it_is_read(
    tmp_path: Path,
) -> None:
    """Also by ranks that do not hash it."""
    from safetensors.torch import save_file

    folder = saved(tmp_path, [1]) / "step-00000001"
    path, manifest = folder / "model-r00001.safetensors", read_manifest(folder)
    save_file({"wte": torch.zeros(2, 2), "norm": torch.zeros(2)}, path)
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    with open_checkpoint(folder, verify_bytes=False) as checkpoint:
        stored = checkpoint.stored("model", "wte")
        assert stored is not None
        stored.read(Range(0, 4))
        with pytest.raises(RequestError, match="of another type or size"):
            stored.read()


def test_many_pieces_are_checked_in_time(tmp_path: Path) -> None:
    """512 ranks and 2,000 tensors; a comparison of all pairs would take minutes."""
    begin = time.process_time()
    entry = {"dtype": "F32", "shape": [512, 8], "pieces": [[i, 8 * i, 8] for i in range(512)]}
    names = [f"model-r{rank:05d}.safetensors" for rank in range(512)]
    files = {name: {"bytes": 1 << 30, "sha256": "0" * 64} for name in names}
    tensors = {f"layer.{number}": entry for number in range(300)}
    manifest = {"version": 2, "files": files, "piece_files": names, "tensors": {"model": tensors}}
    assert len(described(manifest)) == 300
    boxes = [[i, [0, i], [512, 1]] for i in range(512)]
    columns = {"dtype": "F32", "shape": [512, 512], "pieces": boxes}
    assert len(described(manifest | {"tensors": {"model": {"w": columns}}})) == 1
    columns["pieces"] = [*boxes[:-1], [511, [0, 510], [512, 1]]]
    with pytest.raises(Damaged, match="overlap"):
        described(manifest | {"tensors": {"model": {"w": columns}}})
    assert time.process_time() - begin < 30


def test_files_are_shared_evenly_for_hashing() -> None:
    sizes = {f"{kind}-r{rank:05d}.safetensors": 100 for kind in ("model", "optim") for rank in range(8)}
    shares = share_files(sizes | {"state.json": 1}, 8)
    assert sorted(name for share in shares for name in share) == sorted([*sizes, "state.json"])
    assert all(f"model-r{rank:05d}.safetensors" in share for rank, share in enumerate(shares))
    assert max(map(len, shares)) <= 3
    assert share_files({"a": 5}, 3)[1] == ["a"]
    assert share_files({}, 2) == [[], []]
