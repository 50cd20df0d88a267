"""TensorBoard, Weights & Biases and their like, and a webhook: told about the run, never able to harm it.

Comes in: values by group (``train``, ``valid``, ``test``) and step, hyper-parameters, a word at the end.
Goes out: event files, tracker calls, HTTP posts. What always holds: each tracker lives in a thread of its
own behind a bounded queue, so that one that hangs or fails loses its own values and nothing else; a failure
is said once; after a resume a tracker goes on with the run that it had.

TensorBoard and Weights & Biases are called directly and tested; any other name is opened through the engine
(accelerate's ``log_with``: mlflow, trackio, comet_ml, aim, clearml, dvclive, swanlab) and passed through
untested.

    >>> trackers = Trackers(["tensorboard"], "runs/demo", hyper_parameters={"lr": 3e-4}, note=print)
    >>> trackers.log("train", {"loss": 9.01, "epoch": 0.1}, step=1)
    >>> trackers.close()
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import math
import os
import queue
import secrets
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lmcore.errors import RequestError

QUEUE_RECORDS = 1000
"""Values that wait for a slow tracker; more are dropped, and counted."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for its trackers, all together."""
WEBHOOK_SECONDS = 10.0
WEBHOOK_VARIABLE = "LMCORE_WEBHOOK"


class Tracker(Protocol):
    """What a tracker's thread calls; :func:`_open_tensorboard` and :func:`_open_wandb` make one."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by key (``train/loss``)."""

    def text(self, key: str, text: str, step: int) -> None:
        """Samples and notes; may do nothing."""

    def finish(self) -> None:
        """Write what is left."""


def default_names() -> list[str]:
    """What ``report.trackers: auto`` means: TensorBoard where it is installed."""
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []


def sanitised(values: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Hyper-parameters as every tracker takes them: one level, plain scalars, the rest as text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in sanitised(value).items()})
        elif isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            flat[str(key)] = value
        else:
            flat[str(key)] = str(value)
    return flat


def code_version(folder: str | os.PathLike[str] = ".") -> str:
    """The git commit of ``folder`` (``-dirty`` if changed), or ``unknown``."""
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


class Trackers:
    """All trackers of a run, and its webhook. Build it on rank 0 only."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: str | os.PathLike[str],
        *,
        project: str = "lmcore",
        name: str | None = None,
        tags: Sequence[str] = (),
        hyper_parameters: Mapping[str, Any] | None = None,
        save_code: bool = False,
        resume_step: int | None = None,
        run_ids: Mapping[str, str] | None = None,
        webhook: str | None = None,
        note: Callable[[str], None] = print,
        open_other: Callable[[str, str, str], Any] | None = None,
    ) -> None:
        """
        Args:
            names: ``tensorboard``, ``wandb``, or any name that accelerate's ``log_with`` knows.
            name: how the run is called there; the run folder's name by default.
            hyper_parameters: nested or flat; sanitised here. The code version is added.
            save_code: Weights & Biases also keeps the source of the script.
            resume_step: after a resume, TensorBoard hides what an abandoned past wrote beyond this step.
            run_ids: :meth:`state` of the run that is resumed.
            webhook: URL that takes a JSON object with ``text`` (Slack, Mattermost, Discord's ``/slack``); by
                default the variable ``LMCORE_WEBHOOK``.
            note: says a failure, once for each tracker.
            open_other: opens other trackers; :func:`open_tracker` by default.

        Raises:
            RequestError: a tracker that is not installed, or a webhook that is not http(s).
        """
        folder = Path(run_dir)
        name = name or folder.resolve().name
        known = dict(run_ids or {})
        self._note = note
        self._webhook = webhook = webhook or os.environ.get(WEBHOOK_VARIABLE) or None
        self._posts: list[threading.Thread] = []
        self._ids: dict[str, str] = {}
        settings = sanitised({**(hyper_parameters or {}), "code_version": code_version()})
        _check_webhook(webhook)
        openers: dict[str, Callable[[], Tracker]] = {}
        for tracker in dict.fromkeys(names):
            if tracker == "tensorboard":
                _need("tensorboard")
                openers[tracker] = partial(_TensorBoard, folder / "tensorboard", settings, resume_step)
            elif tracker == "wandb":
                _need("wandb")
                run_id = self._ids["wandb"] = known.get("wandb") or secrets.token_hex(4)
                openers[tracker] = partial(_WandB, folder, project, name, tags, settings, run_id, save_code)
            else:
                opened = (open_other or open_tracker)(tracker, project, os.fspath(folder))
                openers[tracker] = partial(_Other, opened, settings)
        self._workers = [_Worker(tracker, opener, note) for tracker, opener in openers.items()]

    def log(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Numbers of one group at one step; returns at once. What is not a finite number is left out."""
        numbers = {
            f"{group}/{key}": float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.put("log", numbers, step)

    def text(self, key: str, text: str, step: int) -> None:
        """Samples, for trackers that show text."""
        for worker in self._workers:
            worker.put("text", key, text, step)

    def state(self) -> dict[str, str]:
        """Run ids, for ``state.json``; give them back as ``run_ids``."""
        return dict(self._ids)

    def notify(self, text: str) -> None:
        """Tell the webhook: at the end, on a rewind; :func:`tell` on failure. Returns at once."""
        if self._webhook is None:
            return
        thread = threading.Thread(target=_post, args=(self._webhook, text, self._note), daemon=True)
        thread.start()
        self._posts.append(thread)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the trackers finish, for so long at most; one that hangs is left behind, and said."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.put("finish")
        for worker in self._workers:
            if not worker.join(deadline):
                self._note(f"warning: {worker.name} did not finish within {seconds:.0f} s and is left behind")
                if worker.name == "wandb":
                    _kill_children(b"wandb-core")
        for post in self._posts:
            post.join(max(0.0, deadline - time.monotonic()))
        self._workers, self._posts = [], []


def tell(webhook: str | None, text: str, *, note: Callable[[str], None] = print) -> None:
    """The last word of a process, to the webhook (or the one of ``LMCORE_WEBHOOK``), if there is one.

    Returns when it was delivered, and after ``WEBHOOK_SECONDS`` at the latest.
    """
    address = webhook or os.environ.get(WEBHOOK_VARIABLE) or ""
    if _is_web(address):
        thread = threading.Thread(target=_post, args=(address, text, note), daemon=True)
        thread.start()
        thread.join(WEBHOOK_SECONDS)


class _Worker:
    """One tracker, its queue and its thread. A daemon: a tracker that hangs cannot keep the process alive."""

    def __init__(self, name: str, opener: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self.name = name
        self._opener = opener
        self._note = note
        self._queue: queue.Queue[tuple[Any, ...]] = queue.Queue(maxsize=QUEUE_RECORDS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, method: str, *arguments: Any) -> None:
        while True:
            try:
                return self._queue.put_nowait((method, arguments))
            except queue.Full:
                self._dropped += 1
            if self._dropped == 1:
                self._note(f"warning: {self.name} does not keep up: values are dropped from now on")
            if method != "finish":
                return
            with contextlib.suppress(queue.Empty):  # the thread was faster
                self._queue.get_nowait()  # make room: the end must arrive

    def join(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._opener()
        except BaseException as error:  # wandb raises what is not an Exception (its own interrupts) too
            self._fail(error)
        while True:
            method, arguments = self._queue.get()
            if tracker is not None:
                try:
                    getattr(tracker, method)(*arguments)
                except BaseException as error:
                    self._fail(error)
                    tracker = None  # and go on emptying the queue
            if method == "finish":
                return

    def _fail(self, error: BaseException) -> None:
        why = f"{type(error).__name__}: {error}"
        self._note(f"warning: {self.name} failed and gets nothing more; the run goes on ({why})")


class _TensorBoard:
    """``tensorboard --logdir runs`` shows the run."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # lazily: optional

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purge)
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        self._writer.add_text("config", f"| name | value |\n|---|---|\n{rows}", resume_step or 0)
        self._writer.flush()

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def text(self, key: str, text: str, step: int) -> None:
        self._writer.add_text(key, "    " + text.replace("\n", "\n    "), step)  # indented: shown as it is

    def finish(self) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases; ``WANDB_MODE=offline`` keeps everything under ``<run folder>/wandb`` for ``wandb
    sync``.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        tags: Sequence[str],
        settings: dict[str, Any],
        run_id: str,
        save_code: bool,
    ) -> None:
        import wandb  # lazily: optional

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            dir=os.fspath(folder),
            tags=list(tags),
            config=settings,
            id=run_id,
            resume="allow",
            save_code=save_code,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # The step is a value, not wandb's own counter: that one refuses to go back after a rewind.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def text(self, key: str, text: str, step: int) -> None:
        self._run.log({key: self._wandb.Html(f"<pre>{_escaped(text)}</pre>"), "step": step})

    def finish(self) -> None:
        self._run.finish()


class _Other:
    """A tracker of accelerate's, opened by the engine."""

    def __init__(self, tracker: Any, settings: dict[str, Any]) -> None:
        self._tracker = tracker
        start = getattr(tracker, "start", None)  # accelerate >= 1.9 opens the connection here
        if start is not None:
            start()
        tracker.store_init_configuration(settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def text(self, key: str, text: str, step: int) -> None:
        """accelerate's trackers share no way to log text."""

    def finish(self) -> None:
        self._tracker.finish()


def _kill_children(command: bytes) -> None:
    """End our own child processes of this name: at exit, wandb waits for its helper however long that hangs.

    What the helper had not sent yet is in its file, for ``wandb sync``.
    """
    for entry in Path("/proc").glob("[0-9]*"):  # no /proc (macOS): the exit may then wait for a minute
        with contextlib.suppress(OSError):  # gone meanwhile
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and command in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RequestError(f"report.trackers: {module} is not installed: pip install {module}")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def check_tracker(name: str) -> None:
    """Raises ``RequestError`` if accelerate does not know the tracker, or its package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # lazily: it imports torch

    known = sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise RequestError(f"report.trackers: {name!r} is not one of {', '.join(known)}")
    if name not in [str(kind) for kind in get_available_trackers()]:
        raise RequestError(f"report.trackers: {name} is not installed: pip install {name.replace('_', '-')}")


def open_tracker(name: str, project: str, folder: str) -> Any:
    """The tracker ``name`` of accelerate. Nothing is connected before its own thread starts it.

    Raises:
        RequestError: see :func:`check_tracker`.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    check_tracker(name)
    tracker = LOGGER_TYPE_TO_CLASS[name]
    if "logging_dir" in inspect.signature(tracker.__init__).parameters:
        return tracker(project, logging_dir=folder)
    return tracker(project)


def check(names: Sequence[str], webhook: str | None) -> None:
    """What :class:`Trackers` would refuse, as soon as it can be known."""
    _check_webhook(webhook or os.environ.get(WEBHOOK_VARIABLE) or None)
    for name in names:
        if name in ("tensorboard", "wandb"):
            _need(name)
        else:
            check_tracker(name)


def _check_webhook(webhook: str | None) -> None:
    if webhook is not None and not _is_web(webhook):
        raise RequestError("report.webhook: not a http:// or https:// address: give the full URL")


def _is_web(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _post(url: str, text: str, note: Callable[[str], None]) -> None:
    request = urllib.request.Request(
        url, data=json.dumps({"text": text}).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS) as answer:
            answer.read(1024)
    except OSError as error:  # URLError and timeouts are OSErrors
        # The address is a secret (Slack's carries the token): it is never repeated here.
        note(f"warning: the webhook was not reached ({type(error).__name__}: {error})")
