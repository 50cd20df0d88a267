"""The IO seam: files are whole or not there, every change passes the hook, and killing at any call shows
neither.
"""

from __future__ import annotations

import ast
import errno
import json
import os
from pathlib import Path

import pytest

from lmcore.disk import CHUNK_BYTES, Call, Disk
from tests.support.disk_faults import Counter, FailAt, KillAt, PowerCut, PoweredDisk, forked


def test_write_json_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    disk = Disk()
    disk.write_json(path, {"state": "running", "名": "前"})
    disk.write_json(path, {"state": "finished"})
    assert json.loads(path.read_text()) == {"state": "finished"}
    assert os.listdir(tmp_path) == ["status.json"]


def test_killed_at_every_call_there_is_the_old_or_the_new(tmp_path: Path) -> None:
    counter = Counter()
    path = tmp_path / "a.txt"
    Disk(counter).write_text(path, "old" * 100)
    assert counter.calls == ["create", "write", "fsync", "rename", "fsync_dir"]
    for number in range(len(counter.calls)):
        for torn in (False, True):
            path.write_text("old" * 100)
            hook = KillAt(number, torn=torn)
            assert forked(lambda hook=hook: Disk(hook).write_text(path, "new" * 200)) == -9
            assert path.read_text() in ("old" * 100, "new" * 200)
            Disk().write_text(path, "next")  # what a kill leaves behind is in nobody's way
            assert path.read_text() == "next"
            assert os.listdir(tmp_path) == ["a.txt"]


def test_a_power_cut_at_every_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for number in range(6):
        for seed in range(6):
            root = tmp_path / f"{number}-{seed}"
            root.mkdir()
            (root / "a").write_text("old")
            model = PoweredDisk(root, stop_at=number)
            try:
                Disk(model).write_text(root / "a", "newer")
                finished = True
            except PowerCut:
                finished = False
            outcome = tmp_path / f"after-{number}-{seed}"
            model.after_power_cut(outcome, seed)
            assert (outcome / "a").read_text() in (("newer",) if finished else ("old", "newer"))


def test_the_model_of_the_power_cut_can_fail(tmp_path: Path) -> None:
    """Without the fsync the same test finds the fault: the model is no rubber stamp."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "a").write_text("old")
    model = PoweredDisk(root)
    Disk(model).write_text(root / "a", "newer", durable=False)
    seen = set()
    for seed in range(2, 40):
        model.after_power_cut(tmp_path / str(seed), seed)
        seen.add((tmp_path / str(seed) / "a").read_text())
    assert seen - {"old", "newer"}, "a file that was renamed before it was synced should come out torn"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failing_call_leaves_the_old_file(tmp_path: Path, error: int) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    for number in range(4):
        with pytest.raises(OSError, match=os.strerror(error)):
            Disk(FailAt(number, error, lasting=False)).write_text(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]


def test_large_writes_come_in_pieces_and_short_writes_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(CHUNK_BYTES + 12345)
    counter = Counter()
    Disk(counter).write_file(tmp_path / "a", data)
    assert counter.calls.count("write") == 2
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, piece: real(fd, piece[: max(1, len(piece) // 3)]))
    Disk().write_file(tmp_path / "b", data)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == data


def test_remove_tree_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "link").symlink_to(outside)
    (inside / "dangling").symlink_to("nowhere")
    Disk().remove_tree(inside)
    assert not inside.exists()
    assert (outside / "precious").exists()


def test_makedirs_is_durable_and_repeatable(tmp_path: Path) -> None:
    counter = Counter()
    Disk(counter).makedirs(tmp_path / "a" / "b")
    assert counter.calls == ["mkdir", "fsync_dir", "mkdir", "fsync_dir"]
    Disk(counter).makedirs(tmp_path / "a" / "b")
    assert len(counter.calls) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Disk().makedirs(tmp_path / "file")


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int) -> None:
        raise OSError(errno.EINVAL, "no fsync of folders here")

    monkeypatch.setattr(os, "fsync", refuse)
    Disk().fsync_dir(tmp_path)


def test_nobody_goes_around_the_seam() -> None:
    """The rooms that write a run's state change the disk through ``Disk`` only."""
    forbidden = {
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "mkdir",
        "makedirs",
        "write_text",
        "write_bytes",
        "symlink",
    }
    package = Path(__file__).resolve().parent.parent / "lmcore" / "checkpoint"
    for room in ("writer", "reader", "manifest", "tensors"):
        for node in ast.walk(ast.parse((package / f"{room}.py").read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in forbidden
            ):
                owner = ast.unparse(node.func.value)
                fine = owner in ("self._disk", "disk", "dataclasses") or (
                    node.func.attr == "replace" and "disk" not in owner and not owner.startswith("os")
                )
                assert fine, f"{room}.py:{node.lineno}: {owner}.{node.func.attr}"


def test_the_hook_sees_what_is_about_to_happen(tmp_path: Path) -> None:
    seen: list[Call] = []
    Disk(seen.append).write_bytes(tmp_path / "a", b"xyz")
    assert [(call.operation, Path(call.path).name) for call in seen[:3]] == [
        ("create", ".a.tmp"),
        ("write", ".a.tmp"),
        ("fsync", ".a.tmp"),
    ]
    assert seen[3].target == str(tmp_path / "a")
