"""Durable writes: a file is complete or absent, after a kill or an error at any call of the disk."""

from __future__ import annotations

import ast
import errno
import json
import os
from pathlib import Path

import pytest

from lmcore.disk import CHUNK_BYTES, Call, Disk, refuse_links_out
from lmcore.errors import RequestError
from tests.support.disk_faults import Counter, FailAt, KillAt, PowerCut, PoweredDisk, forked


def test_write_json_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    disk = Disk()
    disk.write_json(path, {"state": "running", "名": "前"})
    disk.write_json(path, {"state": "finished"})
    assert json.loads(path.read_text()) == {"state": "finished"}
    assert os.listdir(tmp_path) == ["status.json"]


def test_kill_at_every_call_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
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
            Disk().write_text(path, "next")  # leftovers of a kill do not disturb the next write
            assert path.read_text() == "next"
            assert os.listdir(tmp_path) == ["a.txt"]


def test_power_cut_at_every_call_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
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


def test_power_cut_without_fsync_tears_the_file(tmp_path: Path) -> None:
    """The model of the power cut finds a missing fsync."""
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
def test_io_error_leaves_the_old_file(tmp_path: Path, error: int) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    for number in range(4):
        with pytest.raises(OSError, match=os.strerror(error)):
            Disk(FailAt(number, error, lasting=False)).write_text(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]


def test_large_and_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(CHUNK_BYTES + 12345)
    counter = Counter()
    Disk(counter).write_file(tmp_path / "a", data)
    assert counter.calls.count("write") == 2
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, piece: real(fd, piece[: max(1, len(piece) // 3)]))
    Disk().write_file(tmp_path / "b", data)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == data


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
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


def test_fsync_dir_ignores_file_systems_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_before_is_called_ahead_of_each_change(tmp_path: Path) -> None:
    seen: list[Call] = []
    Disk(seen.append).write_bytes(tmp_path / "a", b"xyz")
    assert [(call.operation, Path(call.path).name) for call in seen[:3]] == [
        ("create", ".a.tmp"),
        ("write", ".a.tmp"),
        ("fsync", ".a.tmp"),
    ]
    assert seen[3].target == str(tmp_path / "a")


def test_files_are_not_written_through_links(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("x")
    (tmp_path / "log").symlink_to(outside)
    for work in (
        lambda: Disk().create(tmp_path / "log"),
        lambda: Disk().append(tmp_path / "log"),
        lambda: Disk().write_file(tmp_path / "log", b"new"),
    ):
        with pytest.raises(OSError, match="symbolic links"):
            work()
    assert outside.read_text() == "x"
    Disk().write_text(tmp_path / "log", "new")  # replaces the link
    assert outside.read_text() == "x"
    assert not (tmp_path / "log").is_symlink()


def test_append_adds_to_the_end(tmp_path: Path) -> None:
    for word in ("a\n", "名\n"):
        with Disk().append(tmp_path / "log") as file:
            file.write(word)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a\n名\n"


@pytest.mark.parametrize(
    "name", [".lock", "train.log", "logs", "logs/rank-00001.log", "tokenizer", "tokenizer/a"]
)
def test_links_that_lead_out_of_a_run_folder_are_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "tokenizer").mkdir()
    (run / "checkpoints").symlink_to(tmp_path)
    (run / "inside").symlink_to("logs")
    (tmp_path / "linked").symlink_to(run)
    for folder in (run, tmp_path / "linked", tmp_path / "missing"):
        refuse_links_out(folder)
    place = run / name
    if place.is_dir():
        place.rmdir()
    place.symlink_to(tmp_path / "outside")
    for folder in (run, tmp_path / "linked"):
        with pytest.raises(RequestError, match=r"is a link to .*, outside of the run folder"):
            refuse_links_out(folder)
