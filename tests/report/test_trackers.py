"""Trackers get what happened, are read back, and can neither block nor end a run."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmcore.errors import RequestError
from lmcore.report import trackers as room
from lmcore.report.trackers import Trackers, code_version, default_names, sanitised


@contextmanager
def web_server(answer_after: float = 0.0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A local server that keeps the JSON it is sent, and answers after a while."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            stop.wait(answer_after)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Silence."""

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/secret-token", received
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


class Recorder:
    """Accelerate's tracker interface, with faults to order."""

    def __init__(self, *, fail_at: int | None = None, hang: threading.Event | None = None) -> None:
        self.calls: list[Any] = []
        self.fail_at, self.hang = fail_at, hang

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        if self.hang is not None:
            self.hang.wait()
        if step == self.fail_at:
            raise ConnectionError("the server is gone")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: 7 bytes of header, then LevelDB's log format (blocks of 32 KiB)."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def written(path: Path) -> bytes:
    """The file when wandb's helper has written its end: on a busy machine a moment after ``finish`` returns."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(1200):
        kinds = []
        for data in wandb_records(content := path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kinds.append(record.WhichOneof("record_type"))
        if "exit" in kinds:
            return content
        time.sleep(0.1)
    raise AssertionError(f"{path.name} has no end: {kinds}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_is_read_back_and_a_resume_hides_the_abandoned_past(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, hyper_parameters={"optim": {"lr": 3e-4}}, note=pytest.fail)
    for step in (1, 10, 20, 30):
        trackers.log("train", {"loss": 9.0 / step, "grad_norm": None, "mfu": math.nan}, step)
    trackers.log("valid", {"loss": 3.5, "perplexity": math.inf}, 30)
    trackers.text("samples", "def f():\n    return 1", 30)
    trackers.close()
    resumed = Trackers(["tensorboard"], tmp_path, resume_step=20, note=pytest.fail)
    resumed.log("train", {"loss": 0.25}, 40)
    resumed.close()
    scalars = read_tensorboard(tmp_path / "tensorboard")
    assert scalars["train/loss"] == [
        (1, 9.0),
        (10, pytest.approx(0.9)),
        (20, pytest.approx(0.45)),
        (40, 0.25),
    ]
    assert scalars.pop("valid/loss") == [], "30 was abandoned"
    assert set(scalars) == {"train/loss"}, "values that are no finite numbers are left out"


def test_wandb_offline_is_read_back_with_the_same_id_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    notes: list[str] = []
    first = Trackers(
        ["wandb"],
        tmp_path,
        project="mine",
        name="try",
        tags=["a", "b"],
        hyper_parameters={"lr": 3e-4, "betas": (0.9, 0.95)},
        note=notes.append,
    )
    first.log("train", {"loss": 9.0, "epoch": 0.5}, 1)
    first.log("valid", {"loss": 3.5}, 10)
    first.close(120)
    second = Trackers(["wandb"], tmp_path, run_ids=first.state(), note=notes.append)
    second.log("train", {"loss": 8.0}, 5)  # an earlier step: a rewind
    second.close(120)
    assert notes == []
    assert first.state() == second.state()
    rows, configs = [], {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for path in files:
        for data in wandb_records(written(path)):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                assert record.run.run_id == first.state()["wandb"]
                configs.update({u.key: u.value_json for u in record.run.config.update})
                if path == files[0]:
                    assert (record.run.project, record.run.display_name) == ("mine", "try")
                    assert list(record.run.tags) == ["a", "b"]
            if record.HasField("history"):
                items = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    assert rows == [
        {"train/loss": 9.0, "train/epoch": 0.5, "step": 1},
        {"valid/loss": 3.5, "step": 10},
        {"train/loss": 8.0, "step": 5},
    ]
    assert json.loads(configs["betas"]) == "(0.9, 0.95)"
    assert "code_version" in configs


def test_others_pass_through_the_door_and_a_failing_one_is_said_once(tmp_path: Path) -> None:
    notes: list[str] = []
    good, bad = Recorder(), Recorder(fail_at=2)
    doors = {"mlflow": good, "trackio": bad}
    trackers = Trackers(
        ["mlflow", "trackio"],
        tmp_path,
        hyper_parameters={"lr": 1.0},
        note=notes.append,
        open_other=lambda name, project, folder: doors[name],
    )
    for step in range(1, 6):
        trackers.log("train", {"loss": float(step)}, step)
    trackers.close()
    assert good.calls[0][1]["lr"] == 1.0
    assert good.calls[1:] == [(s, {"train/loss": float(s)}) for s in range(1, 6)] + ["finish"]
    assert bad.calls[1:] == [(1, {"train/loss": 1.0})]
    assert len(notes) == 1
    assert "trackio failed" in notes[0]
    assert "the server is gone" in notes[0]


def test_a_hanging_tracker_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "QUEUE_RECORDS", 10)
    notes: list[str] = []
    release = threading.Event()
    trackers = Trackers(
        ["hung"], tmp_path, note=notes.append, open_other=lambda *arguments: Recorder(hang=release)
    )
    [thread] = [worker._thread for worker in trackers._workers]
    try:
        for step in range(200):
            trackers.log("train", {"loss": 1.0}, step)
        trackers.close(seconds=0.5)
        assert thread.is_alive(), "it hangs all the time: who had waited for it would wait still"
    finally:
        release.set()
    assert any("does not keep up" in note for note in notes)
    assert any("did not finish" in note for note in notes)
    assert len(notes) == 2


def test_the_webhook_is_told_and_one_that_hangs_or_refuses_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with web_server() as (url, received):
        for webhook in (url, None):
            monkeypatch.setenv("LMCORE_WEBHOOK", url)
            trackers = Trackers([], tmp_path, webhook=webhook, note=notes.append)
            trackers.notify("run demo finished: 完了")
            trackers.close(120)
    assert received == [{"text": "run demo finished: 完了"}] * 2
    assert notes == []
    monkeypatch.setattr(room, "WEBHOOK_SECONDS", 3600)
    with web_server(answer_after=3600) as (url, received):
        trackers = Trackers([], tmp_path, webhook=url, note=notes.append)
        trackers.notify("failed")
        [post] = trackers._posts
        trackers.close(seconds=0.5)
        assert post.is_alive(), "nobody has waited for the answer"
    post.join()
    monkeypatch.setattr(room, "WEBHOOK_SECONDS", 0.3)
    with web_server(answer_after=3600) as (url, received):
        trackers = Trackers([], tmp_path, webhook=url, note=notes.append)
        trackers.notify("failed")
        trackers.close(seconds=120)
    assert "was not reached" in notes[-1]
    assert all("secret-token" not in note for note in notes), "the address is a secret"


def test_wrong_requests_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not one of"):
        Trackers(["wandbb"], tmp_path)
    with pytest.raises(RequestError, match="http"):
        Trackers([], tmp_path, webhook="file:///etc/passwd")


def test_hyper_parameters_become_plain_scalars() -> None:
    values = {"a": {"b": None, "c": [1, 2]}, "d": True, "e": math.inf, "f": "x", "g": 1}
    assert sanitised(values) == {"a.b": "None", "a.c": "[1, 2]", "d": True, "e": "inf", "f": "x", "g": 1}
    assert "tensorboard" in default_names()
    assert code_version("/") == "unknown"
