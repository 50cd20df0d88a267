"""Kill a rank at a chosen place of its work, from inside: hooks on the functions that it passes.

In a forked rank :func:`arm` is called before the script begins. In a rank that a real launcher starts,
``inject/sitecustomize.py`` calls :func:`arm_by_environment` at the start of the interpreter; it waits for the module
that has the place, so that nothing is imported earlier or in another order than in an undisturbed run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "LMCORE_FAULT"
"""JSON of the arguments of :func:`arm`, with ``only_rank``; for ranks of a real launcher."""

PLACES: dict[str, tuple[str, str]] = {
    # at the start
    "rendezvous": ("lmcore.run.setup", "open_engine"),
    "after the rendezvous": ("lmcore.run.guard", "Guard.install"),
    "opening the tokenizer": ("lmcore.run.setup", "open_tokenizer"),
    "training the tokenizer": ("lmcore.run.setup", "train_on_texts"),
    "opening the corpus": ("lmcore.data.corpus", "open_corpus"),
    "model build": ("lmcore.run.setup", "open_model"),
    "wrapping the model": ("lmcore.engine.engine", "Engine.prepare"),
    "restore": ("lmcore.run.trainer", "Run.restore"),
    "reading a checkpoint": ("lmcore.checkpoint.reader", "Checkpoint.stored"),
    "start table": ("lmcore.run.trainer", "Run.announce"),
    # in training
    "forward": ("lmcore.engine.engine", "Engine.forward"),
    "backward": ("lmcore.engine.engine", "Engine.backward"),
    "update": ("lmcore.engine.engine", "Engine.update"),
    "save": ("lmcore.run.trainer", "Run.save"),
    "evaluation": ("lmcore.run.trainer", "Run.evaluate"),
    "end": ("lmcore.run.trainer", "Run.finish"),
}
"""Place -> the function at whose beginning it lies, at its ``number``-th call (from 0)."""
DISK_PLACES: dict[str, str] = {
    "writing the tokenizer": "/tokenizer/",
    "store build": "/token_stores/",
    "inside a save": "/checkpoints",
    "writing the run folder": "/run/",
}
"""Place -> part of the path of the ``number``-th call that changes the disk."""
IMPORTS = (
    "numpy",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "lmcore.run.trainer",
    "lmcore.engine.engine",
)
"""``import NAME`` is a place too, for ranks of a real launcher."""


def fire(mark: Path, alone: bool) -> None:
    """Say that the place is reached, and die; if others are to die too, wait for whoever kills all."""
    aside = mark.with_name(f"{mark.name}.{os.getpid()}")
    aside.write_text(
        json.dumps({"pid": os.getpid(), "rank": os.environ.get("RANK", "0"), "time": time.monotonic()})
    )
    os.replace(aside, mark)
    if alone:
        os.kill(os.getpid(), signal.SIGKILL)
    if threading.current_thread() is not threading.main_thread():
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
    os._exit(99)


def arm(place: str, number: int, mark: Path, *, alone: bool = True) -> None:
    """Hang the kill into this process: at call ``number`` of ``place`` the file ``mark`` appears and the process dies.

    Args:
        alone: it kills itself. Otherwise it waits there to be killed together with the others.
    """
    count = 0
    if place in DISK_PLACES:
        from lmcore import disk

        part, before = DISK_PLACES[place], disk.DISK.before

        def hook(call: Any) -> None:
            nonlocal count
            if part in call.path:
                if count == number:
                    fire(mark, alone)
                count += 1
            if before is not None:
                before(call)

        disk.DISK.before = hook
        return
    module, name = PLACES[place]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def reached(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == number:
            fire(mark, alone)
        count += 1
        return real(*args, **kwargs)

    setattr(owner, last, reached)


def arm_first_save(number: int, mark: Path, action: Callable[[], None]) -> None:
    """Hang ``action`` into this process: before call ``number`` (from 0) of its first save that changes the checkpoints.

    The file ``mark`` then says "reached", or "passed" when that save had fewer calls: a save lasts until the ranks meet for
    the next one, or at the end.
    """
    from lmcore import disk
    from lmcore.checkpoint.writer import Checkpoints

    part, before, settle = DISK_PLACES["inside a save"], disk.DISK.before, Checkpoints._settle_together
    count, meetings = 0, 0

    def say(word: str) -> None:
        if not mark.exists():
            aside = mark.with_name(f"{mark.name}.{os.getpid()}")
            aside.write_text(word)
            os.replace(aside, mark)

    def hook(call: Any) -> None:
        nonlocal count
        if meetings == 1 and part in call.path:
            count += 1
            if count == number + 1:
                say("reached")
                action()
        if before is not None:
            before(call)

    def meeting(self: Any, *args: Any) -> Any:
        nonlocal meetings
        result = settle(self, *args)
        meetings += 1
        if meetings == 2:
            say("passed")
        return result

    disk.DISK.before = hook
    Checkpoints._settle_together = meeting


def kill_launcher() -> None:
    """SIGKILL to the parent; returns when it is dead and the kernel has told this process so."""
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)


# ---- ranks of a real launcher ------------------------------------------------------------------------------


class _AtImport(importlib.abc.MetaPathFinder):
    """Do something when a module is imported: before its code runs, or after."""

    def __init__(self, name: str, action: Callable[[], None], *, after: bool) -> None:
        self.name, self.action, self.after = name, action, after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        if not self.after:
            self.action()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None or not self.after:
            return spec
        real, action = spec.loader.exec_module, self.action

        def exec_module(module: ModuleType) -> None:
            real(module)
            action()

        spec.loader.exec_module = exec_module
        return spec


def arm_by_environment() -> None:
    """What :data:`VARIABLE` asks for, if this process runs ``train_lm.py`` as the rank that is meant."""
    asked = json.loads(os.environ[VARIABLE])
    script = [word for word in sys.orig_argv if word.endswith("train_lm.py")]
    if not script or {"accelerate.commands.launch", "torch.distributed.run"} & {*sys.orig_argv}:
        return
    pretend = asked.get("pretend_gpus", False)
    mine = int(os.environ.get("RANK", "0")) in asked["ranks"]
    place, mark = asked["place"], Path(asked["mark"])

    def after_trainer() -> None:
        if pretend:
            from tests.support.engine_runs import pretend_gpus

            pretend_gpus()
        if mine and place in (*PLACES, *DISK_PLACES):
            arm(place, asked["number"], mark, alone=asked["alone"])

    sys.meta_path.insert(0, _AtImport("lmcore.run.trainer", after_trainer, after=True))
    if mine and place.startswith("import "):
        sys.meta_path.insert(
            0, _AtImport(place.removeprefix("import "), lambda: fire(mark, asked["alone"]), after=False)
        )
