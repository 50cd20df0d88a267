"""Durable writes: a file is complete or absent, after a kill or an error at any call of the disk."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lmcore.checkpoint.manifest import state_bytes
from lmcore.disk import CHUNK_BYTES, DISK, Call, Disk, temporary_folder
from lmcore.errors import EXIT_REQUEST, RequestError
from tests.support.disk_faults import Counter, FailAt, KillAt, PowerCut, PoweredDisk, forked

ROOT = Path(__file__).resolve().parents[1]


def test_no_temporary_folder_is_a_refusal_that_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was "No usable temporary directory found in [...]", without a remedy."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(RequestError, match=r"/nowhere.*TMPDIR"):
        temporary_folder("lmcore-")


def test_write_json_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    disk = Disk()
    disk.write_json(path, {"state": "running", "名": "前"})
    disk.write_json(path, {"file": "caf\udce9"})  # the bytes of this name are not UTF-8
    assert json.loads(path.read_text()) == {"file": "caf\udce9"}
    disk.write_json(path, {"state": "finished"})
    assert json.loads(path.read_text()) == {"state": "finished"}
    assert os.listdir(tmp_path) == ["status.json"]


def test_error_of_a_full_disk_names_the_file() -> None:
    file = DISK.create("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full:
        DISK.write(file, b"x")
    DISK.close(file)
    assert full.value.filename == "/dev/full"
    assert full.value.errno == errno.ENOSPC


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


PACKAGE = Path(__file__).resolve().parent.parent / "lmcore"
CHANGES = {
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "makedirs",
    "write_text",
    "write_bytes",
    "symlink",
    "symlink_to",
}
CHANGES |= {
    "rmtree",
    "copyfile",
    "copytree",
    "copyfileobj",
    "hardlink_to",
    "touch",
    "truncate",
    "ftruncate",
    "pwrite",
}
NOT_THROUGH_DISK = {
    "disk": "it is the disk",
    "report/console": "train.log is only appended to, and a line may be lost",
    "report/metrics": "metrics.jsonl is only appended to; a torn line is skipped and never glued to the next",
    "run/folder": "the lock file is written in place, under the lock that it holds",
    "run/watchdog": "signs of life between processes, worth nothing after a restart",
    "cli/data": "a lock file without content",
    "cli/remote": "a lock file without content",
    "process": "a file of the kernel, under /proc",
    "data/store/build": "copies and leftovers of parts; a store is committed by its manifest, through Disk",
    "data/store/verification": "a cache of which parts were verified, not the state of a run",
    "data/store/claims": "claims of processes on parts of a store, worth nothing after they have ended",
    "data/store/remote": "a lock file without content, and parts that were not downloaded to their end",
    "data/tokenizer/huggingface": "a temporary folder for transformers to read",
    "storage": "a cache: without it the next start compares, or reads, again",
    "run/children": "output of short runs, and the file STOP that was obeyed",
    "run/size_search": "a picture",
    "run/bucket": "a scratch copy of a file that is being uploaded",
    "errors": "the launcher's own file for the error of a process",
}
"""Modules that change the disk by themselves, and why they may."""


def changes_of_the_disk(text: str) -> list[str]:
    """Calls in a module that change the disk without a ``Disk``, with their lines."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        through_disk = owner.lower().endswith("disk")
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = {
            value.value
            for value in values
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        }
        flags = " ".join(ast.unparse(value) for value in values)
        opens = called == "open" or (name == "open" and owner.endswith(("Path", "path", "folder")))
        if (
            (name in CHANGES and not through_disk)
            or called in ("os.replace", "shutil.move", "shutil.copy", "shutil.copy2")
            or (
                name == "replace"
                and len(values) == 1
                and not through_disk
                and owner != "dataclasses"
                and owner
            )
            or (opens and any(re.fullmatch(r"[wax]b?\+?|r\+b?|rb\+", mode) for mode in modes))
            or (called == "os.open" and "O_CREAT" in flags)
        ):
            found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_everything_is_written_through_disk(path: Path) -> None:
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    found = changes_of_the_disk(path.read_text(encoding="utf-8"))
    if name in NOT_THROUGH_DISK:
        assert found, f"{name} needs no exception any more"
    else:
        assert not found, f"{name} changes the disk without lmcore.disk: {found}"


def test_durability_check_finds_direct_writes() -> None:
    around = """
os.replace(a, b); shutil.rmtree(a); path.write_text("x"); open(path, "w"); open(path, mode="ab"); path.unlink()
os.open(path, os.O_WRONLY | os.O_CREAT); temporary.replace(target); path.open("x"); os.mkdir(path)
"""
    assert len(changes_of_the_disk(around)) == 10
    through = """
DISK.write_text(path, "x"); self._disk.rename(a, b); open(path, "rb"); text.replace("a", "b"); replace(config, a=1)
os.open(path, os.O_RDONLY); disk.mkdir(path); open(path, encoding="utf-8"); dataclasses.replace(config, a=1)
"""
    assert changes_of_the_disk(through) == []


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
        lambda: Disk().write_file(tmp_path / "log", b"new"),
    ):
        with pytest.raises(OSError, match="symbolic links"):
            work()
    assert outside.read_text() == "x"
    Disk().write_text(tmp_path / "log", "new")  # replaces the link
    assert outside.read_text() == "x"
    assert not (tmp_path / "log").is_symlink()


def test_json_holds_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"data.train": [os.fsdecode(b"caf\xe9.txt"), "日本語.txt"]}
    DISK.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert json.loads(state_bytes(value).decode("utf-8")) == value


def test_removed_current_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    """By the training and by the commands; every relative path would fail somewhere inside."""
    for words in (
        [
            str(ROOT / "train_lm.py"),
            "--data.train",
            str(ROOT / "README.md"),
            "--run_dir",
            str(tmp_path / "run"),
        ],
        ["-m", "lmcore", "checkpoints", str(tmp_path)],
    ):
        gone = tmp_path / "gone"
        gone.mkdir()
        done = subprocess.run(
            ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", sys.executable, *words],
            cwd=gone,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == EXIT_REQUEST, done.stderr
        assert "the current folder cannot be found" in done.stderr
        assert done.stderr.count("\n") == 1
