"""TensorBoard, Weights & Biases and the other trackers of accelerate, and a webhook.

Each tracker runs in its own thread behind a bounded queue: if it hangs or fails, only its own values are lost, and the failure
is reported once. After a resume a tracker continues the same run. TensorBoard hides what was logged beyond the step of a resume
or rewind; the other trackers keep it, so that a step has two values there (metrics.jsonl has both as well, and its readers use
the last).

TensorBoard and Weights & Biases are tested; mlflow, trackio, comet_ml, aim, clearml, dvclive and swanlab are passed
through untested.

    >>> trackers = Trackers(config.report, "runs/demo", hyper_parameters={"lr": 3e-4}, note=print)
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
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean
from lmcore.report.redact import hide_values, redact

if TYPE_CHECKING:
    from lmcore.config.schema import ReportConfig

QUEUE_RECORDS = 1000
"""How many values wait for a slow tracker; further ones are dropped and counted."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for all its trackers together."""
WEBHOOK_SECONDS = 10.0
WEBHOOK_VARIABLE = "LMCORE_WEBHOOK"


def flat_scalars(values: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Hyper-parameters in a form that every tracker accepts: one level, plain scalars, everything else as text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in flat_scalars(value).items()})
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
    """All trackers of a run, and its webhook. Create it on rank 0 only."""

    def __init__(
        self,
        options: ReportConfig,
        run_dir: str | os.PathLike[str],
        *,
        hyper_parameters: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        run_ids: Mapping[str, str] | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            options: the trackers (names of accelerate's ``log_with``), the name of the run in them, and the webhook (a URL
                that accepts a JSON object with ``text``: Slack, Mattermost, Discord's ``/slack``; default: the variable
                ``LMCORE_WEBHOOK``).
            hyper_parameters: nested or flat; the version of the code is added.
            resume_step: the step of the checkpoint that was resumed, or ``None`` for a new start; TensorBoard hides what was
                written beyond it.
            run_ids: :meth:`state` of the run that is resumed.
            note: called with one line for each tracker that fails.

        Raises:
            RequestError: see :func:`check`.
        """
        folder = Path(run_dir)
        name = redact(options.name or folder.resolve().name)
        self._note = note
        self._webhook = options.webhook or os.environ.get(WEBHOOK_VARIABLE) or None
        self._posts: list[threading.Thread] = []
        self._ids: dict[str, str] = {}
        check(options.trackers, self._webhook)
        settings = flat_scalars(redact({**(hyper_parameters or {}), "code_version": code_version()}))
        self._workers = []
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_failed
        for tracker in dict.fromkeys(options.trackers):
            own: dict[str, Any] = {}
            if tracker == "tensorboard":
                # Hides what was written beyond the step before the resume; for a new start in the same folder, everything.
                own = {"purge_step": 0 if resume_step is None else resume_step + 1}
            elif tracker == "wandb":
                run_id = self._ids["wandb"] = (run_ids or {}).get("wandb") or secrets.token_hex(4)
                own = {"name": name, "id": run_id, "resume": "allow", "dir": os.fspath(folder)}
                own |= {
                    "tags": redact(list(options.tags)),
                    "save_code": options.save_code,
                    "config": settings,
                }
            opener = partial(
                TrackerAdapter, tracker, redact(options.project), folder, settings, own, resume_step or 0
            )
            self._workers.append(_Worker(tracker, opener, note))

    def log(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Log the numbers of one group at one step; returns at once. Values that are not finite numbers are left out."""
        numbers = {
            redact(f"{group}/{key}"): float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.put("log", numbers, step)

    def text(self, key: str, text: str, step: int) -> None:
        """Log samples, for trackers that show text. Names in them are not redacted: "--password" is only a prompt."""
        for worker in self._workers:
            worker.put("text", key, hide_values(text), step)

    def rewind(self, step: int) -> None:
        """Call when training continues from an earlier step: TensorBoard then hides what was written beyond it."""
        for worker in self._workers:
            worker.put("rewind", step)

    def state(self) -> dict[str, str]:
        """The run ids, for ``state.json``; pass them as ``run_ids`` after a resume."""
        return dict(self._ids)

    def notify(self, text: str) -> None:
        """Send a message to the webhook, at the end and on a rewind; returns at once. For a failure use :func:`tell`."""
        if self._webhook is None:
            return
        thread = threading.Thread(target=_post, args=(self._webhook, redact(text), self._note), daemon=True)
        thread.start()
        self._posts.append(thread)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Print a line instead of the traceback if a tracker's own thread fails, such as TensorBoard's writer on a full disk."""
        frame, files = failed.exc_traceback, list[str]()
        while frame is not None:
            files.append(frame.tb_frame.f_code.co_filename)
            frame = frame.tb_next
        for worker in self._workers:
            if any(f"{os.sep}{worker.name}{os.sep}" in file for file in files):
                self._note(
                    f"warning: {worker.name}: {failed.exc_type.__name__}: {failed.exc_value}; the run goes on"
                )
                return
        self._excepthook(failed)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait at most ``seconds`` until the trackers have finished; a tracker that hangs is abandoned with a note."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.put("finish")
        for worker in self._workers:
            if not worker.join(deadline):
                self._note(f"warning: {worker.name} did not finish within {seconds:.0f} s and is left behind")
        for post in self._posts:
            post.join(max(0.0, deadline - time.monotonic()))
        self._workers, self._posts = [], []
        threading.excepthook = self._excepthook


def tell(webhook: str | None, text: str, *, note: Callable[[str], None] = print) -> None:
    """Send ``text`` to the webhook (or that of ``LMCORE_WEBHOOK``), if there is one, and wait at most ``WEBHOOK_SECONDS`` until
    it is delivered.
    """
    address = webhook or os.environ.get(WEBHOOK_VARIABLE) or ""
    if _is_web(address):
        thread = threading.Thread(target=_post, args=(address, redact(text), note), daemon=True)
        thread.start()
        thread.join(WEBHOOK_SECONDS)


class _Worker:
    """One tracker with its queue and its thread. It is a daemon thread, so that a tracker that hangs cannot keep the process
    alive."""

    def __init__(self, name: str, opener: Callable[[], TrackerAdapter], note: Callable[[str], None]) -> None:
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
            with contextlib.suppress(queue.Empty):  # the thread may have emptied it meanwhile
                self._queue.get_nowait()  # drop the oldest: the final record must arrive

    def join(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        tracker: TrackerAdapter | None = None
        try:
            tracker = self._opener()
        except BaseException as error:  # wandb may raise what is not an Exception (its own interrupts)
            self._fail(error)
        while True:
            method, arguments = self._queue.get()
            if tracker is not None:
                try:
                    getattr(tracker, method)(*arguments)
                except BaseException as error:
                    self._fail(error)
                    tracker = None  # but continue to empty the queue
            if method == "finish":
                return

    def _fail(self, error: BaseException) -> None:
        why = f"{type(error).__name__}: {error}"
        self._note(f"warning: {self.name} failed and gets nothing more; the run goes on ({why})")


class TrackerAdapter:
    """One opened tracker of accelerate, with what accelerate does not do itself. Used only in its worker's thread."""

    def __init__(
        self,
        name: str,
        project: str,
        folder: Path,
        settings: dict[str, Any],
        options: dict[str, Any],
        first_step: int,
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # lazily: it imports torch

        self._name = name
        make = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            self._tracker = make("tensorboard", logging_dir=os.fspath(folder), **options)
            self._tracker.start()
            # accelerate's store_init_configuration would add a second run to TensorBoard's list at every start.
            rows = "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in settings.items())
            self._tracker.log({"config": f"| name | value |\n|---|---|\n{rows}"}, step=first_step)
        elif name == "wandb":
            import wandb  # lazily: optional

            quiet = wandb.Settings(
                silent=True,
                console="off",
                finish_timeout=CLOSE_SECONDS,
                # The metadata that wandb collects about machine and code includes the command line with its secrets.
                x_disable_meta=redact(sys.argv) != sys.argv,
            )
            self._tracker = make(project, settings=quiet, **options)
            self._tracker.start()
            # The step is logged as a value, because wandb's own step counter cannot go back after a rewind.
            self._tracker.tracker.define_metric("step")
            self._tracker.tracker.define_metric("*", step_metric="step")
        else:
            needs_folder = "logging_dir" in inspect.signature(make.__init__).parameters
            self._tracker = make(project, **({"logging_dir": os.fspath(folder)} if needs_folder else {}))
            if hasattr(self._tracker, "start"):
                self._tracker.start()
            self._tracker.store_init_configuration(settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._name == "wandb":
            self._tracker.log({**values, "step": step})
        else:
            self._tracker.log(values, step=step)

    def text(self, key: str, text: str, step: int) -> None:
        if self._name == "tensorboard":  # which renders Markdown: indented text is shown verbatim
            self.log({key: "    " + text.replace("\n", "\n    ")}, step)
        elif self._name == "wandb":
            import wandb  # lazily: optional

            self.log({key: wandb.Html(f"<pre>{escape(text)}</pre>")}, step)
        # There is no common way to log text with the other trackers.

    def rewind(self, step: int) -> None:
        if self._name == "tensorboard":  # there is no common way to withdraw values from the others
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # lazily: optional

            start = SessionLog(status=SessionLog.START)  # what a new writer with purge_step writes first
            self._tracker.tracker.file_writer.add_event(Event(step=step + 1, session_log=start))

    def finish(self) -> None:
        self._tracker.finish()


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table: on one line, without characters that would end the cell or start HTML."""
    text = " ".join(str(value).splitlines()).replace("\\", "\\\\").replace("|", "\\|")
    return escape(text, quote=False)


def check(names: Sequence[str], webhook: str | None = None) -> None:
    """Check early what :class:`Trackers` would refuse.

    Raises:
        RequestError: a tracker that accelerate does not know, one whose package is missing, or a webhook that is not an
            http(s) address.
    """
    _check_webhook(webhook or os.environ.get(WEBHOOK_VARIABLE) or None)
    for name in names:
        if name in ("tensorboard", "wandb"):  # known without importing accelerate, and torch with it
            if importlib.util.find_spec(name) is None:
                raise RequestError(f"report.trackers: {name} is not installed: pip install {name}")
            continue
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS)
        if name not in known:
            raise RequestError(
                f"report.trackers: unknown tracker {name!r}; choose from {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if name not in [str(kind) for kind in get_available_trackers()]:
            package = name.replace("_", "-")
            raise RequestError(f"report.trackers: {name} is not installed: pip install {package}")


def _check_webhook(webhook: str | None) -> None:
    if webhook is not None and not _is_web(webhook):
        raise RequestError("report.webhook: not a http:// or https:// address: give the full URL")


def _is_web(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _post(url: str, text: str, note: Callable[[str], None]) -> None:
    data, headers = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS) as answer:
            answer.read(1024)
    except OSError as error:  # URLError and timeouts are OSErrors
        # The address may contain a secret (Slack's has the token), so the message does not include it.
        note(f"warning: the webhook was not reached ({type(error).__name__}: {error})")
    except (HTTPException, ValueError) as error:
        # An answer that is no HTTP, or an address that cannot be one, which these errors quote
        note(f"warning: the webhook was not reached ({type(error).__name__}); check its URL")
