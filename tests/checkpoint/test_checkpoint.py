"""Laws 13 to 15: a checkpoint is complete or absent, verified to the last byte, and never unpickled."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import shutil
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lmcore.checkpoint import manifest as manifests
from lmcore.checkpoint import tensors as tensor_files
from lmcore.checkpoint import writer
from lmcore.checkpoint.manifest import difference, manifest_bytes
from lmcore.checkpoint.tensors import TensorFile, plan
from lmcore.checkpoint.writer import Checkpoint, Checkpoints, abandon_after, find, listing, open_checkpoint
from lmcore.disk import Call, Disk
from lmcore.errors import FaultError, RequestError
from tests.support.checkpoints import Member, Threads, checkpoints, whole
from tests.support.disk_faults import Counter, FailAt, FullAt, KillAt, PowerCut, PoweredDisk, damage, forked

SHAPES = {
    "wte.weight": ((7, 4), torch.float32),
    "h.0.attn.weight": ((4, 3), torch.bfloat16),
    "h.0.odd": ((3,), torch.bfloat16),  # 6 bytes: whatever follows in the same file would not be aligned
    "h.0.scale": ((), torch.float32),
    "h.0.empty": ((0, 4), torch.float32),
    "mask": ((5,), torch.bool),
}
PACKAGE = Path(writer.__file__).parents[1]


def weights(step: int) -> dict[str, Tensor]:
    """The weights that a run would have at this step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.rand(shape, generator=generator).mul(4).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def tensors(step: int) -> Iterator[tuple[str, str, str | None, Tensor]]:
    of_step = weights(step)
    for kind, slot in (("model", None), ("optim", "exp_avg")):
        for name, tensor in of_step.items():
            yield kind, name, slot, tensor


def save(saves: Checkpoints, step: int, **more: Any) -> None:
    saves.save(step, tensors=whole(tensors(step)), state={"cursor": {"position": step * 8}}, **more)


def saved(folder: Path, steps: list[int], **options: Any) -> Checkpoints:
    saves = checkpoints(folder, **options)
    for step in steps:
        save(saves, step)
    saves.wait(final=True)
    return saves


def check(checkpoint: Checkpoint | None, step: int) -> None:
    """Exactly the content of that step."""
    assert checkpoint is not None
    assert checkpoint.step == step == checkpoint.state["step"]
    assert checkpoint.state["cursor"] == {"position": step * 8}
    for kind, name, slot, tensor in tensors(step):
        found = checkpoint.read(kind, name, slot)
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    saved(tmp_path / "two", [1, 2], keep=2, background=False)
    return tmp_path / "two"


@pytest.fixture
def heard() -> list[str]:
    return []


# ---- format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40])
def test_checkpoint_roundtrip(tmp_path: Path, background: bool, shard_bytes: int) -> None:
    saved(tmp_path, [5], background=background, shard_bytes=shard_bytes)
    with find(tmp_path) as checkpoint:
        check(checkpoint, 5)
        assert sorted(checkpoint.keys("model")) == sorted(SHAPES)
        assert "h.0.odd/exp_avg" in checkpoint.keys("optim")
        assert checkpoint.read("model", "nowhere") is None
        assert checkpoint.read("ema", "wte.weight") is None


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40])
def test_safetensors_library_opens_checkpoint_files(tmp_path: Path, shard_bytes: int) -> None:
    saved(tmp_path, [3], shard_bytes=shard_bytes)
    found: dict[str, Tensor] = {}
    for path in (tmp_path / "step-00000003").glob("model*.safetensors"):
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in weights(3).items()
    }


def test_background_save_copies_live_and_strided_tensors(tmp_path: Path) -> None:
    live = torch.arange(12.0).view(3, 4)
    saves = checkpoints(tmp_path, note=lambda _: None)
    gate = threading.Event()
    saves._disk = Disk(lambda call: None if call.operation != "create" else _wait(gate))
    saves.save(1, tensors=whole([("model", "a", None, live.t())]), state={})
    live.zero_()  # training goes on while the file is not even made
    gate.set()
    saves.wait(final=True)
    checkpoint = find(tmp_path)
    assert checkpoint is not None
    read = checkpoint.read("model", "a")
    assert read is not None
    assert torch.equal(read, torch.arange(12.0).view(3, 4).t())


def _wait(gate: threading.Event) -> None:
    assert gate.wait(240)


def test_tensors_that_no_checkpoint_can_hold_raise() -> None:
    a = ("model", "a", None, (2,), torch.float32)
    with pytest.raises(ValueError, match="two tensors of one name"):
        plan([a, a], shard_bytes=100)
    with pytest.raises(ValueError, match="safetensors"):
        plan([("model", "a", None, (1,), torch.complex64)], shard_bytes=100)
    with pytest.raises(ValueError, match="file name"):
        plan([("../m", "a", None, (1,), torch.float32)], shard_bytes=100)


# ---- killed, without power, full ---------------------------------------------------------------------------


def test_killed_at_every_call_of_a_save(tmp_path: Path, two: Path) -> None:
    """The old one, the new one, or both; and the next save clears up whatever was left."""
    counter = Counter()
    shutil.copytree(two, tmp_path / "count")
    saved(tmp_path / "count", [3], keep=2, disk=Disk(counter), background=False)
    assert {"create", "write", "fsync", "fsync_dir", "rename", "unlink", "mkdir", "rmdir"} <= set(
        counter.calls
    )
    outcomes = set()
    for number, operation in enumerate(counter.calls):
        for background in (False, True):
            folder = tmp_path / "run"
            shutil.copytree(two, folder)
            disk = Disk(KillAt(number, torn=operation == "write" and background))
            options: dict[str, Any] = {"keep": 2, "disk": disk, "background": background}
            assert forked(lambda o=options, f=folder: saved(f, [3], **o)) == -9, (number, operation)
            heard: list[str] = []
            checkpoint = find(folder, note=heard.append)
            assert checkpoint is not None
            check(checkpoint, checkpoint.step)
            assert checkpoint.step in (2, 3)
            assert not any("damaged" in line for line in heard), (
                "a kill must not leave a wreck under a good name"
            )
            outcomes.add((checkpoint.step, bool(heard)))
            saved(folder, [4], keep=2, background=False)
            assert sorted(os.listdir(folder)) == ["step-0000000" + str(checkpoint.step), "step-00000004"]
            check(find(folder), 4)
            shutil.rmtree(folder)
    assert outcomes == {(2, False), (3, True), (3, False)}  # before, whole but unnamed, after


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # the power is out there, too
@pytest.mark.parametrize("background", [False, True])
def test_power_cut_at_every_call_of_a_save(tmp_path: Path, two: Path, background: bool) -> None:
    counter = Counter()
    shutil.copytree(two, tmp_path / "count")
    saved(tmp_path / "count", [3], keep=2, disk=Disk(counter), background=False)
    for number in range(len(counter.calls) + 1):
        root = tmp_path / f"run-{number}"
        shutil.copytree(two, root)
        model = PoweredDisk(root, stop_at=number)
        committed = False
        try:
            saved(root, [3], keep=2, disk=Disk(model), background=background)
            committed = True
        except (PowerCut, FaultError):
            pass
        for seed in range(4):
            outcome = tmp_path / f"after-{number}-{seed}"
            model.after_power_cut(outcome, seed)
            checkpoint = find(outcome, note=lambda _: None)
            assert checkpoint is not None
            check(checkpoint, checkpoint.step)
            assert checkpoint.step in ((3,) if committed else (2, 3))
            saved(outcome, [4], keep=2, background=False)
            check(find(outcome), 4)
            shutil.rmtree(outcome)
        shutil.rmtree(root)


def test_killed_while_metrics_are_added(tmp_path: Path, two: Path) -> None:
    best = {"k": 1, "metric": "valid/loss", "mode": "min"}

    def record(folder: Path, disk: Disk) -> None:
        checkpoints(folder, keep=2, keep_best=best, disk=disk).record(2, {"valid/loss": 1.5})

    counter = Counter()
    shutil.copytree(two, tmp_path / "count")
    record(tmp_path / "count", Disk(counter))
    assert "link" in counter.calls
    for number in range(len(counter.calls)):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(two, folder, symlinks=True)
        assert forked(lambda n=number, f=folder: record(f, Disk(KillAt(n, torn=True)))) == -9
        check(find(folder), 2)
        saved(folder, [3], keep=2, keep_best=best)
        check(find(folder), 3)


def test_disk_full_at_any_byte_keeps_the_previous_checkpoint(tmp_path: Path, two: Path) -> None:
    counter = Counter()
    shutil.copytree(two, tmp_path / "count")
    saved(tmp_path / "count", [3], disk=Disk(counter), background=False)
    draw = random.Random(1)
    for trial in range(20):
        folder = tmp_path / f"run-{trial}"
        shutil.copytree(two, folder)
        heard: list[str] = []
        policy = ("stop", "continue")[trial % 2]
        disk = Disk(FullAt(draw.randrange(counter.bytes)))
        saves = checkpoints(
            folder, disk=disk, on_full_disk=policy, background=trial % 4 < 2, note=heard.append
        )
        save(saves, 3)
        if policy == "stop":
            with pytest.raises(FaultError, match="No space left"):
                saves.wait()
            assert saves.failed
        else:
            saves.wait()
            assert not saves.failed
            assert any("No space left" in line for line in heard)
        with pytest.raises(FaultError, match="No space left"):
            saves.wait(final=True)
        assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002"]
        check(find(folder), 2)
        disk.before = None  # somebody made room
        save(saves, 4)
        saves.wait(final=True)
        check(find(folder), 4)


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS, errno.EDQUOT])
def test_io_error_at_any_call_keeps_a_good_checkpoint(tmp_path: Path, two: Path, error: int) -> None:
    counter = Counter()
    shutil.copytree(two, tmp_path / "count")
    saved(tmp_path / "count", [3], keep=2, disk=Disk(counter), background=False)
    for number in range(0, len(counter.calls), 1 if error == errno.EIO else 5):
        for lasting in (False, True):
            folder = tmp_path / "run"
            shutil.copytree(two, folder)
            saves = checkpoints(
                folder, keep=2, disk=Disk(FailAt(number, error, lasting=lasting)), note=lambda _: None
            )
            save(saves, 3)
            try:
                saves.wait(final=True)
                expected = 3
            except FaultError:
                expected = 2
            # Failing in the last fsync of the parent: renamed, but not said to be committed.
            checkpoint = find(folder, note=lambda _: None)
            assert checkpoint is not None
            assert checkpoint.step in (expected, 3)
            check(checkpoint, checkpoint.step)
            shutil.rmtree(folder)


def test_free_space_is_checked_before_saving(
    tmp_path: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        f_bavail, f_frsize = 1, 4096

    counter = Counter()
    monkeypatch.setattr(os, "statvfs", lambda _: Little)
    saves = checkpoints(two, disk=Disk(counter), on_full_disk="stop")
    save(saves, 3)
    with pytest.raises(FaultError, match=r"are needed, .* are free.*--checkpoint.on_full_disk continue"):
        saves.poll()
    assert counter.calls == []
    heard: list[str] = []
    going_on = checkpoints(two, disk=Disk(counter), on_full_disk="continue", note=heard.append)
    save(going_on, 3)
    assert going_on.poll() is None
    assert "are free" in heard[0]
    assert "on_full_disk" not in heard[0], "that is what it does already"


# ---- damage ------------------------------------------------------------------------------------------------


def test_500_damaged_checkpoints_are_all_detected(tmp_path: Path, two: Path) -> None:
    draw = random.Random(7)
    good = two / "step-00000002"
    for _ in range(500):
        folder = tmp_path / "run"
        (folder).mkdir()
        os.symlink(two / "step-00000001", folder / "best")
        shutil.copytree(two / "step-00000001", folder / "step-00000001")
        shutil.copytree(good, folder / "step-00000002")
        how = damage(folder / "step-00000002", draw)
        heard: list[str] = []
        checkpoint = find(folder, note=heard.append)
        assert checkpoint is not None
        check(checkpoint, 1)
        assert len(heard) == 1, how
        assert "step-00000002 is damaged" in heard[0]
        assert (folder / "step-00000002.damaged-1").is_dir()
        shutil.rmtree(folder)


def test_find_without_repair_changes_nothing(two: Path) -> None:
    (two / "step-00000002" / "state.json").write_bytes(b"{}")
    before = sorted(os.listdir(two))
    heard: list[str] = []
    check(find(two, repair=False, note=heard.append), 1)
    assert "skipped" in heard[0]
    assert sorted(os.listdir(two)) == before
    assert [row["problem"] for row in listing(two)] == ["", "state.json has 2 bytes instead of 53"]


def test_all_checkpoints_damaged_raises(two: Path) -> None:
    for step in (1, 2):
        (two / f"step-0000000{step}" / "manifest.json").unlink()
    for _ in range(2):  # the second start finds only what the first has set aside
        with pytest.raises(RequestError, match=r"no good checkpoint is left .* --resume never"):
            find(two, note=lambda _: None)
    saved(two, [3])
    check(find(two), 3)


def test_find_in_an_empty_folder_returns_none(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") is None
    assert find(tmp_path) is None
    assert find(tmp_path, "best") is None
    assert listing(tmp_path / "nowhere") == []


def test_find_by_path(two: Path) -> None:
    check(find(two, two / "step-00000001"), 1)
    check(find(two, "step-00000001"), 1)
    with pytest.raises(RequestError, match="no such"):
        find(two, "step-00000009")
    (two / "step-00000001" / "extra").write_text("")
    with pytest.raises(RequestError, match="'extra' is not in the manifest"):
        find(two, two / "step-00000001")
    with pytest.raises(RequestError, match="damaged"):
        open_checkpoint(two / "step-00000001")


@pytest.mark.parametrize("given", ["run", "run/checkpoints"])
def test_folder_of_checkpoints_is_not_called_a_damaged_one(tmp_path: Path, two: Path, given: str) -> None:
    (tmp_path / "run").mkdir()
    two.rename(tmp_path / "run" / "checkpoints")
    with pytest.raises(RequestError, match=r"folder of checkpoints, .* such as .*/step-00000002$"):
        find(two, tmp_path / given)


def test_other_format_version_raises(two: Path) -> None:
    path = two / "step-00000002" / "manifest.json"
    path.write_bytes(manifest_bytes(json.loads(path.read_text()) | {"version": 3}))
    with pytest.raises(RequestError, match=r"version 3, this lmcore .* reads 1 and 2"):
        find(two)


def test_hostile_manifests(two: Path) -> None:
    """Hashes do not protect against someone who can compute them: names and numbers are checked as well."""
    folder = two / "step-00000002"
    good = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": 1, "sha256": "0" * 64}
    (two / "outside.json").write_text("x")
    hostile: list[dict[str, Any]] = [
        {"files": good["files"] | {name: entry}}
        for name in (
            "../outside.json",
            "/etc/passwd",
            "a/b.json",
            "manifest.json",
            "",
            ".hidden.json",
            "x.pt",
            "a\0.json",
        )
    ]
    hostile += [
        {"files": []},
        {"files": {}},
        {"files": {name: value for name, value in good["files"].items() if name != "state.json"}},
        {"files": good["files"] | {"state.json": {"bytes": True, "sha256": "0"}}},
        {"files": good["files"] | {"state.json": None}},
        {"step": 7},
        {"step": "2"},
        {"step": True},
        {"format": "other"},
        {"metrics": None},
        {"reason": {}},
    ]
    for change in hostile:
        (folder / "manifest.json").write_bytes(manifest_bytes(good | change))
        with pytest.raises(RequestError, match="damaged"):
            open_checkpoint(folder, verify_bytes=True)
    for text in (b"[" * 200_000, b"null", b"", b"{", b"\xff\xfe", b'{"a":' * 50_000):
        (folder / "manifest.json").write_bytes(text)
        with pytest.raises(RequestError, match="damaged"):
            open_checkpoint(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(two / "step-00000001" / "manifest.json")
    with pytest.raises(RequestError, match="damaged"):
        open_checkpoint(folder)


def test_linked_file_inside_a_checkpoint_is_refused(two: Path) -> None:
    model = next((two / "step-00000002").glob("model*.safetensors"))
    os.rename(model, two / "elsewhere")
    model.symlink_to(two / "elsewhere")
    with pytest.raises(RequestError, match="not a regular file"):
        open_checkpoint(two / "step-00000002", verify_bytes=True)


# ---- links and other kinds of files -------------------------------------------------------------------------


def moved_and_linked(folder: Path, step: int, elsewhere: Path) -> Path:
    """Move a checkpoint to another place and link it back."""
    path = folder / f"step-{step:08d}"
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return path


def test_linked_checkpoints_are_resumed_kept_and_removed(tmp_path: Path, two: Path) -> None:
    elsewhere = tmp_path / "disk2"
    for step in (1, 2):
        moved_and_linked(two, step, elsewhere)
    check(find(two), 2)
    assert [row["problem"] for row in listing(two, verify_bytes=True)] == ["", ""]
    saved(two, [3], keep=2, background=False)
    assert names(two) == [2, 3], "retention counts linked checkpoints"
    assert (elsewhere / "step-00000001" / "manifest.json").is_file(), "only the link is removed"
    check(find(two, "step-00000002"), 2)


def test_damaged_linked_checkpoint_is_detected_and_its_target_left(tmp_path: Path, two: Path) -> None:
    link = moved_and_linked(two, 2, tmp_path / "disk2")
    (link / "state.json").write_bytes(b"{}")
    heard: list[str] = []
    check(find(two, note=heard.append), 1)
    assert "step-00000002 is damaged" in heard[0]
    assert (two / "step-00000002.damaged-1").is_symlink()
    assert (tmp_path / "disk2" / "step-00000002").is_dir()


@pytest.mark.parametrize("name", ["step-00000002", "manifest.json", "state.json"])
def test_checkpoint_of_another_user_is_not_taken_for_a_damaged_one(
    two: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the older one resumed from without a word, which would lose what was trained since."""
    newest = two / "step-00000002"
    allowed = os.access  # root may read everywhere
    own = newest if name == newest.name else newest / name
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != own and allowed(path, mode))
    for repair in (True, False):
        with pytest.raises(RequestError, match=f"this user may not read {name}: change its owner"):
            find(two, repair=repair)
    with pytest.raises(RequestError, match="this user may not read"):
        open_checkpoint(newest)
    assert sorted(os.listdir(two)) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("what", ["one checkpoint", "the folder of all"])
def test_link_to_a_missing_disk_is_refused(tmp_path: Path, two: Path, what: str) -> None:
    """An unmounted disk must not look like a run that has not saved yet."""
    if what == "one checkpoint":
        moved_and_linked(two, 2, tmp_path / "disk2")
        shutil.rmtree(tmp_path / "disk2")
        folder = two
    else:
        folder = tmp_path / "checkpoints"
        folder.symlink_to(tmp_path / "unmounted")
    for repair in (True, False):
        with pytest.raises(RequestError, match=r"is a link to .*, which is not there: mount or restore it"):
            find(folder, repair=repair)
    assert sorted(os.listdir(two)) == ["step-00000001", "step-00000002"]


def test_checkpoints_folder_may_be_a_link(tmp_path: Path, two: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(two)
    saved(tmp_path / "checkpoints", [3], keep=2)
    check(find(tmp_path / "checkpoints"), 3)
    assert names(two) == [2, 3]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_fifo_in_a_checkpoint_is_damage(two: Path, name: str) -> None:
    path = two / "step-00000002" / name
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    heard: list[str] = []
    assert [row["problem"] for row in listing(two)][1] == f"{name} is not a regular file"
    check(find(two, note=heard.append), 1)
    assert f"{name} is not a regular file" in heard[0]


def test_numbers_that_json_lacks_survive_in_strict_json(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "losses": [float("inf"), float("-inf"), 1.5],
        "norm": {"last": float("nan")},
        "name": "NaN",
    }
    state["file"] = "caf\udce9.txt"  # the bytes of its name are not UTF-8
    saves = checkpoints(tmp_path, note=lambda _: None)
    saves.save(1, tensors=[], state=state)
    saves.wait(final=True)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "step-00000001" / "state.json").read_bytes(), parse_constant=refuse)
    checkpoint = find(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["losses"] == state["losses"]
    assert checkpoint.state["name"] == "NaN"
    assert checkpoint.state["file"] == state["file"]
    assert checkpoint.state["norm"]["last"] != checkpoint.state["norm"]["last"]


def test_hostile_tensor_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def write(header: Any, data: bytes = bytes(8)) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    pad = " " * (-len(json.dumps({"a": entry})) % 8)
    write((json.dumps({"a": entry}) + pad).encode())
    assert TensorFile(path).get("a").tolist() == [0.0, 0.0]
    bad: list[Any] = [
        b"",
        b"[]",
        b"{" * 1000,
        {},
        {"a": entry | {"dtype": "PICKLE"}},
        {"a": entry | {"dtype": ["F32"]}},
        {"a": entry | {"shape": [-2]}},
        {"a": entry | {"shape": [2.0]}},
        {"a": entry | {"shape": [1 << 62, 1 << 62]}},
        {"a": entry | {"data_offsets": [0, 1 << 60]}},
        {"a": entry | {"data_offsets": [8, 0]}},
        {"a": entry | {"data_offsets": [0]}},
        {"a": entry | {"data_offsets": [True, 8]}},
        {"a": entry, "b": entry},
        {"a": entry | {"shape": [1], "data_offsets": [4, 8]}},
        {"a": entry | {"dtype": "U16", "shape": [4]}},
        {"a": 3},
    ]
    for header in bad:
        write(header)
        with pytest.raises(ValueError, match=r"."):
            TensorFile(path)
    for raw in (b"", b"1234567", struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 100) + b"{}"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"."):
            TensorFile(path)


def test_mutated_tensor_files_raise_value_error(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    data = next((tmp_path / "step-00000001").glob("model-00001*")).read_bytes()
    draw = random.Random(3)
    path = tmp_path / "mutant"
    for _ in range(1000):
        mutant = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            mutant[draw.randrange(min(len(mutant), 400))] = draw.randrange(256)
        path.write_bytes(mutant[: draw.choice([len(mutant), draw.randrange(len(mutant))])])
        try:
            file = TensorFile(path)
        except ValueError:
            continue
        for name in file.names():
            file.get(name)


# ---- no pickle ---------------------------------------------------------------------------------------------

RESUME_PATH = [
    "checkpoint/writer",
    "checkpoint/reader",
    "checkpoint/manifest",
    "checkpoint/tensors",
    "checkpoint/pieces",
    "disk",
    "run/folder",
    "run/guard",
    "run/anomalies",
    "run/watchdog",
]


@pytest.mark.parametrize("name", RESUME_PATH)
def test_resume_path_has_no_pickle(name: str) -> None:
    banned_modules = {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "yaml",
        "importlib",
        "runpy",
    }
    banned_calls = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & banned_modules
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in banned_modules
        elif isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            assert text not in banned_calls
            assert text not in ("torch.load", "np.load", "numpy.load", "torch.save")


def test_resume_runs_no_code_of_the_checkpoint(two: Path) -> None:
    def resume() -> None:
        def audit(event: str, _args: Any) -> None:
            if event in ("pickle.find_class", "marshal.loads", "exec", "compile"):
                raise AssertionError(event)

        sys.addaudithook(audit)
        check(find(two), 2)

    assert forked(resume) == 0


# ---- retention ---------------------------------------------------------------------------------------------


def names(folder: Path) -> list[int]:
    return [row["step"] for row in listing(folder)]


def test_keep_and_keep_every(tmp_path: Path) -> None:
    saved(tmp_path, list(range(1, 12)), keep=2, keeps=lambda step: step % 4 == 0)
    assert names(tmp_path) == [4, 8, 10, 11]


def test_save_beside_many_checkpoints_opens_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is kept only the names are read: a look at the file of each took longer than the save beside 2,000."""
    saves = checkpoints(tmp_path, keep=10**6, background=False)
    calls = [0]

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, call)

    for name in ("stat", "lstat", "open"):
        counted(os, name)
    counted(writer, "read_manifest")
    each = []
    for step in range(1, 61):
        before = calls[0]
        save(saves, step)
        saves.wait()
        each.append(calls[0] - before)
    assert each[9] > 0
    assert each[59] == each[9]


def test_checkpoint_that_was_replaced_under_its_name_is_read_again(tmp_path: Path) -> None:
    saves = checkpoints(tmp_path / "run", keep=1, background=False)
    other = checkpoints(tmp_path / "other", keep=1, background=False)
    save(saves, 1, reason="interval")
    save(other, 1, reason="signal")
    saves.wait()
    other.wait()
    (tmp_path / "run" / "step-00000001").rename(tmp_path / "moved")
    (tmp_path / "other" / "step-00000001").rename(tmp_path / "run" / "step-00000001")
    save(saves, 2, reason="signal")
    saves.wait()
    assert names(tmp_path / "run") == [2]  # the one of another signal goes at once, the newest stays


def test_keep_best(tmp_path: Path) -> None:
    saves = checkpoints(
        tmp_path, keep=1, keep_best={"k": 2, "metric": "valid/loss", "mode": "min"}, note=lambda _: None
    )
    for step, loss in enumerate([5.0, 3.0, 4.0, float("nan"), 3.5, 9.0], 1):
        save(saves, step, metrics={"train/loss": loss * 2}, epoch=step / 2)
        saves.record(step, {"valid/loss": loss})  # known only after the save, as in a run
    saves.wait(final=True)
    assert names(tmp_path) == [2, 5, 6]
    assert os.readlink(tmp_path / "best") == "step-00000002"
    check(find(tmp_path, "best"), 2)
    check(find(tmp_path, "best", metric="train/loss", mode="max"), 6)
    rows = {row["step"]: row for row in listing(tmp_path, verify_bytes=True)}
    assert rows[2]["metrics"] == {"train/loss": 6.0, "valid/loss": 3.0}
    assert [rows[step]["best"] for step in (2, 5, 6)] == [True, False, False]
    assert rows[5]["epoch"] == 2.5
    with pytest.raises(RequestError, match="no checkpoint has the metric accuracy"):
        find(tmp_path, "best", metric="accuracy")


def test_best_of_other_data_stays_until_there_is_one_of_these(tmp_path: Path) -> None:
    """Step 3 is resumed with another validation text, and its evaluation made again."""
    best = {"k": 1, "metric": "valid/loss", "mode": "min"}
    saves = checkpoints(tmp_path, keep=1, keep_best=best, note=lambda _: None)
    for step, loss in enumerate([5.0, 3.0, 4.0], 1):
        save(saves, step, metrics={"valid/loss": loss})
    saves.wait(final=True)
    saves.measured_after = 3
    save(saves, 4)
    saves.wait(final=True)
    check(find(tmp_path, "best"), 2)
    saves.measured_after = 2
    saves.record(4, {"valid/loss": 9.0})
    saves.wait(final=True)
    check(find(tmp_path, "best"), 4)
    assert os.readlink(tmp_path / "best") == "step-00000004"
    assert names(tmp_path) == [4]


def test_keep_best_mode_max(tmp_path: Path) -> None:
    best = {"k": 1, "metric": "accuracy", "mode": "max"}
    saves = checkpoints(tmp_path, keep=1, keep_best=best, note=lambda _: None)
    for step, value in enumerate([0.1, 0.9, 0.9, 0.5], 1):
        save(saves, step, metrics={"accuracy": value})
    saves.wait(final=True)
    assert names(tmp_path) == [3, 4]  # of equals the newest
    check(find(tmp_path, "best"), 3)


def test_preemption_checkpoints_are_removed_by_the_next_save(tmp_path: Path) -> None:
    saves = checkpoints(tmp_path, keep=2, note=lambda _: None)
    for step, reason in enumerate(["interval", "interval", "signal", "deadline", "interval", "signal"], 1):
        save(saves, step, reason=reason)
        saves.wait()
        if step == 4:
            assert names(tmp_path) == [1, 2, 4]
    assert names(tmp_path) == [2, 5, 6]


def test_old_checkpoints_are_removed_after_the_commit_only(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []

    def before(call: Call) -> None:
        events.append((call.operation, Path(call.path).name))

    saved(tmp_path, [1, 2], keep=1, disk=Disk(before), background=False)
    commit = events.index(("rename", ".step-00000002.tmp"))
    gone = events.index(("rename", "step-00000001"))
    synced = [
        i for i, event in enumerate(events) if event == ("fsync_dir", tmp_path.name) and commit < i < gone
    ]
    assert synced, "the parent must be synced between the commit and the first removal"
    writes = [i for i, (operation, _) in enumerate(events) if operation in ("create", "write", "fsync")]
    assert max(writes) < commit
    assert events[commit - 2][1] == "manifest.json", (
        "the manifest is the last file, then its folder is synced"
    )


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("file", ["model", "optim", "state"])
@pytest.mark.parametrize("place", ["first", "middle", "last", "missing", "added"])
def test_checkpoint_that_reads_back_differently_is_not_committed(
    two: Path, place: str, file: str, background: bool
) -> None:
    def corrupt(call: Call) -> None:  # a disk that lies: the bytes change after they were hashed
        if call.operation == "fsync" and Path(call.path).name.startswith(file):
            path = Path(call.path)
            content = bytearray(path.read_bytes())
            if place == "missing":
                content.pop()
            elif place == "added":
                content.append(0)
            else:
                content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
            path.write_bytes(content)

    saves = checkpoints(two, disk=Disk(corrupt), on_full_disk="stop", background=background)
    save(saves, 3)
    with pytest.raises(FaultError, match=f"{file}.* reads back differently"):
        saves.wait()
    assert names(two) == [1, 2]


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 7], [4096, 3], [3, 9000]])
def test_difference_of_a_file_is_found_at_every_byte(
    tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "CHUNK_BYTES", 4096)
    parts = [memoryview(os.urandom(size)) for size in sizes]
    content = b"".join(parts)
    path = tmp_path / "a"
    path.write_bytes(content)
    assert difference(path, parts) == ""
    for at in {*range(0, len(content), 997), *range(max(0, len(content) - 9), len(content))}:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "another byte" in difference(path, parts)
        path.write_bytes(content[:at])
        assert difference(path, parts) == f"{at:,} bytes instead of {len(content):,}"
    path.write_bytes(content + b"x")
    assert difference(path, parts) == f"longer than {len(content):,} bytes"
    path.unlink()
    assert difference(path, parts).startswith("unreadable")


def test_disk_begins_before_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a file but the last segment is begun, in order, while the rest is hashed."""
    monkeypatch.setattr(tensor_files, "SEGMENT_BYTES", 100)
    begun: list[tuple[int, int]] = []

    class Watched(Disk):
        def start_writing(self, file: Any, start: int, size: int) -> None:
            begun.append((start, size))
            super().start_writing(file, start, size)

    file = tensor_files.HashedFile(Watched(), tmp_path / "a")
    for _ in range(7):
        file.write(bytes(60))
    assert begun == [(0, 120), (120, 120), (240, 120)]
    assert file.finish()["bytes"] == 420
    file.close()


def test_saving_the_same_step_twice_writes_once(tmp_path: Path) -> None:
    saves = saved(tmp_path, [1])
    stamp = (tmp_path / "step-00000001" / "manifest.json").stat().st_mtime_ns
    save(saves, 1, reason="signal")
    saves.wait()
    assert (tmp_path / "step-00000001" / "manifest.json").stat().st_mtime_ns == stamp
    again = checkpoints(tmp_path, note=lambda _: None)
    checkpoint = find(tmp_path)
    assert checkpoint is not None
    again.resumed(checkpoint)
    save(again, 1)
    assert (tmp_path / "step-00000001" / "manifest.json").stat().st_mtime_ns == stamp


def test_abandon_after_moves_later_checkpoints_aside(tmp_path: Path, heard: list[str]) -> None:
    saved(tmp_path, [1, 2, 3], keep=3)
    abandon_after(tmp_path, 1, note=heard.append)
    assert len(heard) == 2
    check(find(tmp_path), 1)
    saved(tmp_path, [2], keep=3)  # the same number again, of the new past
    check(find(tmp_path), 2)
    abandon_after(tmp_path, -1, note=heard.append)
    assert find(tmp_path) is None
    assert (tmp_path / "step-00000002.abandoned-2").is_dir()


def test_find_before_step(tmp_path: Path) -> None:
    saved(tmp_path, [2, 4, 6], keep=3)
    check(find(tmp_path, before_step=6), 4)
    check(find(tmp_path, before_step=7), 6)
    assert find(tmp_path, before_step=2) is None


# ---- background --------------------------------------------------------------------------------------------


def test_background_save_does_not_block(tmp_path: Path) -> None:
    gate = threading.Event()
    priorities = []
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def before(call: Call) -> None:
        if call.operation == "create":
            priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            _wait(gate)

    saves = checkpoints(tmp_path, disk=Disk(before), note=lambda _: None)
    save(saves, 1)  # the gate is shut: what waited for the disk would be here in four minutes, with an error
    assert saves.poll() is None
    assert saves.last_step is None
    assert not saves.failed
    assert saves.busy
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    save(saves, 2)  # waits for the first: never two at a time
    assert saves.last_step == 1
    assert saves.wait(final=True) == 2
    assert not saves.busy
    assert checkpoints(tmp_path, ranks=Member(Threads(2), 1)).busy, (
        "the clocks of other ranks ask for no save"
    )
    opener.join()
    assert names(tmp_path) == [1, 2]
    assert min(priorities) >= writer.BACKGROUND_NICE
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_background_buffers_are_reused(tmp_path: Path) -> None:
    saves = saved(tmp_path, [1])
    first = {name: buffer.data_ptr() for name, buffer in saves._buffers.items()}
    save(saves, 2)
    saves.wait()
    assert first
    assert {name: buffer.data_ptr() for name, buffer in saves._buffers.items()} == first


def test_save_falls_back_to_the_foreground_without_memory(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "available_bytes", lambda: 100)
    saves = checkpoints(tmp_path, note=heard.append)
    save(saves, 1)
    assert saves.poll() == 1
    assert "written in the foreground" in heard[0]
    check(find(tmp_path), 1)


def test_save_falls_back_to_the_foreground_if_the_copy_cannot_be_allocated(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate says yes and the system says no (RLIMIT_AS, a control group)."""
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            raise RuntimeError("can't allocate memory: you tried to allocate 344948736 bytes")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    saves = checkpoints(tmp_path, note=heard.append)
    save(saves, 1)
    assert saves.poll() == 1
    assert "written in the foreground: can't allocate memory" in heard[0]
    check(find(tmp_path), 1)


def test_save_falls_back_to_the_foreground_if_no_thread_can_start(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "Thread", NoThread)
    saves = checkpoints(tmp_path, note=heard.append)
    save(saves, 1)
    assert saves.poll() == 1
    monkeypatch.undo()
    assert "can't start new thread" in heard[0]
    check(find(tmp_path), 1)


def test_foreground_save_reports_progress(tmp_path: Path) -> None:
    beats: list[None] = []
    saves = checkpoints(tmp_path, background=False, progress=lambda: beats.append(None), note=lambda _: None)
    save(saves, 1)
    assert len(beats) >= 2 * len(SHAPES), "at each tensor: a watchdog must not take a long save for a hang"
    in_thread: list[None] = []
    saves = checkpoints(tmp_path, progress=lambda: in_thread.append(None), note=lambda _: None)
    save(saves, 2)
    saves.wait(final=True)
    assert not in_thread, "a save in the background says nothing about the training"


def test_save_reads_only_changed_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of kept checkpoints a save must not read all of them again."""
    best = {"k": 1, "metric": "loss", "mode": "min"}
    saves = saved(tmp_path, list(range(1, 9)), keep=100, keep_best=best)
    read: list[str] = []
    real = writer.read_manifest
    monkeypatch.setattr(writer, "read_manifest", lambda path: read.append(path.name) or real(path))
    save(saves, 9, metrics={"loss": 1.0})
    saves.wait(final=True)
    assert read == ["step-00000009"]
    saves.record(4, {"loss": 0.5})
    assert set(read) == {"step-00000009", "step-00000004"}
    assert os.readlink(tmp_path / "best") == "step-00000004"
    shutil.rmtree(tmp_path / "step-00000005")
    save(saves, 10)
    saves.wait(final=True)
    assert names(tmp_path) == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_background_exception_is_raised_by_wait(tmp_path: Path) -> None:
    def before(call: Call) -> None:
        if call.operation == "fsync":
            raise RuntimeError("a fault of our own")

    saves = checkpoints(tmp_path, disk=Disk(before), note=lambda _: None, on_full_disk="stop")
    save(saves, 1)
    with pytest.raises(FaultError, match="a fault of our own"):
        saves.wait()
    assert find(tmp_path) is None


def test_interpreter_exit_waits_for_the_background_save(tmp_path: Path) -> None:
    """An exception in the trainer does not tear the save that is on its way: the interpreter waits for it."""
    script = f"""
import sys, time; sys.path.insert(0, {str(PACKAGE.parent)!r})
from tests.checkpoint import test_checkpoint as t
saves = t.checkpoints({str(tmp_path)!r}, disk=t.Disk(lambda call: time.sleep(0.01)))
t.save(saves, 1)
raise SystemExit(3)
"""
    code = os.waitstatus_to_exitcode(os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", script) << 8)
    assert code == 3
    check(find(tmp_path), 1)
