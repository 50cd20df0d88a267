"""Trackers get what happened and are read back; none can block or end a run."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.config.schema import ReportConfig
from lmcore.errors import RequestError
from lmcore.report import trackers as trackers_module
from lmcore.report.report import Report
from lmcore.report.trackers import Trackers, check, code_version, flat_scalars
from tests.support.trackers import read_tensorboard, web_server


def options(*names: str, **values: Any) -> ReportConfig:
    return ReportConfig(trackers=list(names), **values)


class Recorder:
    """A tracker of accelerate's interface that fails or hangs on request."""

    calls: list[Any]

    def __init__(self, project: str, logging_dir: str) -> None:
        self.calls = RECORDED.setdefault(project, [])

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


class Failing(Recorder):
    def log(self, values: dict[str, float], step: int) -> None:
        if step == 2:
            raise ConnectionError("the server is gone")
        super().log(values, step)


class Hanging(Recorder):
    release = threading.Event()

    def log(self, values: dict[str, float], step: int) -> None:
        self.release.wait()


RECORDED: dict[str, list[Any]] = {}


@pytest.fixture
def other_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above under names of accelerate's."""
    import accelerate.tracking

    kinds = {"mlflow": Recorder, "trackio": Failing, "aim": Hanging}
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", kinds)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: list(kinds))
    RECORDED.clear()


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
def test_tensorboard_resume_hides_the_abandoned_past(tmp_path: Path) -> None:
    trackers = Trackers(
        options("tensorboard"), tmp_path, hyper_parameters={"optim": {"lr": 3e-4}}, note=pytest.fail
    )
    for step in (1, 10, 20, 30):
        trackers.log("train", {"loss": 9.0 / step, "grad_norm": None, "mfu": math.nan}, step)
    trackers.log("valid", {"loss": 3.5, "perplexity": math.inf}, 30)
    trackers.text("samples", "def f():\n    return 1", 30)
    trackers.close()
    resumed = Trackers(options("tensorboard"), tmp_path, resume_step=20, note=pytest.fail)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_hides_what_a_rewind_and_a_new_start_have_given_up(tmp_path: Path) -> None:
    def report_of(trackers: Trackers, steps: list[int], rewind: int | None = None) -> None:
        with Report(tmp_path, stream=io.StringIO()) as report:
            report.begin(total_steps=9, trackers=trackers)
            kept = report.state()
            for step in steps:
                sums: dict[str, Any] = {"loss_sum": torch.tensor(float(step)), "count": 1}
                report.step(step=step, epoch=step / 2, tokens=step, position=step, lr=1.0, due=True, **sums)
                if step % 2 == 0:
                    report.end_epoch(epoch=step // 2, step=step)
                    report.epoch()
                if step == rewind:
                    report.rewind(step=1, tokens=1, state=kept)

    def steps_of(tag: str) -> list[int]:
        return [step for step, _ in read_tensorboard(tmp_path / "tensorboard")[tag]]

    report_of(Trackers(options("tensorboard"), tmp_path, note=pytest.fail), [1, 2, 3, 4], rewind=4)
    assert steps_of("train/loss") == [1]
    assert steps_of("epoch/train_loss") == [], "epochs are logged by their last step"
    report_of(Trackers(options("tensorboard"), tmp_path, resume_step=1, note=pytest.fail), [2, 3])
    assert steps_of("train/loss") == [1, 2, 3]
    assert steps_of("epoch/train_loss") == [2]
    # Killed before its first checkpoint, or --resume never: the run starts anew.
    report_of(Trackers(options("tensorboard"), tmp_path, note=pytest.fail), [1])
    assert steps_of("train/loss") == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_shows_every_hyper_parameter_in_its_row(tmp_path: Path) -> None:
    """A pipe or a line break in a value would end its cell or its table."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    values = {"prompts": "a | b\nc\r\nd", "a|b": "\\|", "secret": "<hidden>", "plain": 1}
    Trackers(options("tensorboard"), tmp_path, hyper_parameters=values, note=pytest.fail).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [event] = events.Tensors("config/text_summary")
    shown = markdown_to_safe_html(event.tensor_proto.string_val[0])
    cells = re.findall("<td>(.*?)</td>", shown)
    assert cells[:8] == ["prompts", "a | b c d", "a|b", "\\|", "secret", "&lt;hidden&gt;", "plain", "1"]


def test_wandb_offline_is_read_back_with_the_same_id_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MY_TOKEN", "canary-of-the-environment")
    monkeypatch.setattr(
        sys, "argv", ["train_lm.py", "--report.webhook", "https://x.org/canary-of-the-command-line"]
    )
    notes: list[str] = []
    first = Trackers(
        options("wandb", project="mine", name="try", tags=["a", "b"]),
        tmp_path,
        hyper_parameters={"lr": 3e-4, "betas": (0.9, 0.95)},
        note=notes.append,
    )
    first.log("train", {"loss": 9.0, "epoch": 0.5}, 1)
    first.log("valid", {"loss": 3.5}, 10)
    first.close(120)
    named = options("wandb", project="canary-of-the-environment")
    second = Trackers(named, tmp_path, run_ids=first.state(), note=notes.append)
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
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"canary" not in path.read_bytes(), path


def test_failing_tracker_is_noted_once_and_others_go_on(tmp_path: Path, other_trackers: None) -> None:
    notes: list[str] = []
    for name in ("mlflow", "trackio"):
        trackers = Trackers(
            options(name, project=name), tmp_path, hyper_parameters={"lr": 1.0}, note=notes.append
        )
        for step in range(1, 6):
            trackers.log("train", {"loss": float(step)}, step)
        trackers.text("samples", "some text", 5)
        trackers.close()
    good, bad = RECORDED["mlflow"], RECORDED["trackio"]
    assert good[0][1]["lr"] == 1.0
    assert good[1:] == [(s, {"train/loss": float(s)}) for s in range(1, 6)] + ["finish"]
    assert bad[1:] == [(1, {"train/loss": 1.0})]
    assert len(notes) == 1
    assert "trackio failed" in notes[0]
    assert "the server is gone" in notes[0]


def test_failing_thread_of_a_tracker_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard writes in a thread of its own, which prints a traceback when the disk is full."""
    program = "raise OSError(28, 'No space left on device')"
    code = compile(program, os.path.join(os.sep, "x", "tensorboard", "writer.py"), "exec")
    notes: list[str] = []
    before = threading.excepthook
    trackers = Trackers(options("tensorboard"), tmp_path, note=notes.append)
    thread = threading.Thread(target=exec, args=(code, {}))
    thread.start()
    thread.join()
    trackers.close()
    assert [note for note in notes if "tensorboard: OSError: [Errno 28] No space left on device" in note]
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is before


def test_hanging_tracker_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_trackers: None
) -> None:
    monkeypatch.setattr(trackers_module, "QUEUE_RECORDS", 10)
    notes: list[str] = []
    trackers = Trackers(options("aim"), tmp_path, note=notes.append)
    try:
        started = time.monotonic()
        for step in range(200):
            trackers.log("train", {"loss": 1.0}, step)
        trackers.close(seconds=0.5)
        assert time.monotonic() - started < 60, "it hangs for ever: waiting for it would not end"
    finally:
        Hanging.release.set()
    assert any("does not keep up" in note for note in notes)
    assert any("did not finish" in note for note in notes)
    assert len(notes) == 2


def test_webhook_gets_the_text_and_a_hanging_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with web_server() as (url, received):
        for webhook in (url, None):
            monkeypatch.setenv("LMCORE_WEBHOOK", url)
            trackers = Trackers(options(webhook=webhook), tmp_path, note=notes.append)
            trackers.notify("run demo finished: 完了")
            trackers.close(120)
    assert received == [{"text": "run demo finished: 完了"}] * 2
    assert notes == []
    monkeypatch.setattr(trackers_module, "WEBHOOK_SECONDS", 3600)
    with web_server(answer_after=3600) as (url, received):
        trackers = Trackers(options(webhook=url), tmp_path, note=notes.append)
        trackers.notify("failed")
        [post] = trackers._posts
        trackers.close(seconds=0.5)
        assert post.is_alive(), "nobody has waited for the answer"
    post.join()
    monkeypatch.setattr(trackers_module, "WEBHOOK_SECONDS", 0.3)
    with web_server(answer_after=3600) as (url, received):
        trackers = Trackers(options(webhook=url), tmp_path, note=notes.append)
        trackers.notify("failed")
        trackers.close(seconds=120)
    assert "was not reached" in notes[-1]
    assert all("secret-token" not in note for note in notes), "the address is a secret"


@pytest.mark.parametrize(
    "address",
    ["http://localhost:secret/x", "http://localhost/secret x", "http://例え.jp/secret", "http://[secret/x"],
)
def test_webhook_whose_address_cannot_be_one_is_a_line(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    trackers_module.tell(address, "failed", note=notes.append)
    [note] = notes
    assert re.fullmatch(r"warning: the webhook was not reached \(\w+\); check its URL", note)
    assert capsys.readouterr().err == "", "no traceback of a thread"


def test_webhook_that_answers_no_http_is_a_line() -> None:
    notes: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        trackers_module.tell(f"http://127.0.0.1:{server.getsockname()[1]}/", "failed", note=notes.append)
    assert notes == ["warning: the webhook was not reached (BadStatusLine); check its URL"]


def test_unknown_trackers_and_webhooks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"unknown tracker 'wandbb'.*did you mean 'wandb'"):
        Trackers(options("wandbb"), tmp_path)
    with pytest.raises(RequestError, match="is not installed: pip install comet-ml"):
        check(["comet_ml"])
    with pytest.raises(RequestError, match="http"):
        Trackers(options(webhook="file:///etc/passwd"), tmp_path)


def test_hyper_parameters_become_plain_scalars() -> None:
    values = {"a": {"b": None, "c": [1, 2]}, "d": True, "e": math.inf, "f": "x", "g": 1}
    assert flat_scalars(values) == {"a.b": "None", "a.c": "[1, 2]", "d": True, "e": "inf", "f": "x", "g": 1}
    assert code_version("/") == "unknown"
