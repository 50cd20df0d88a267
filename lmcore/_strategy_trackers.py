"""Opening the trackers that accelerate knows, a part of the room ``engine`` (its one door).

Comes in: a name such as ``mlflow`` or ``trackio``. Goes out: accelerate's tracker object, for
:class:`lmcore.trackers.Trackers`, which calls it from a thread of its own. What always holds: nothing is
connected before that thread starts it. Passed through, not tested: each needs its own package and mostly its
own server.
"""

from __future__ import annotations

import inspect
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from lmcore.errors import RequestError


def check_tracker(name: str) -> None:
    """Raises ``RequestError`` if accelerate does not know the tracker, or its package is not installed."""
    known = sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise RequestError(f"report.trackers: {name!r} is not one of {', '.join(known)}")
    if name not in [str(kind) for kind in get_available_trackers()]:
        raise RequestError(f"report.trackers: {name} is not installed: pip install {name.replace('_', '-')}")


def open_tracker(name: str, project: str, folder: str) -> Any:
    """The tracker ``name`` of accelerate. Raises ``RequestError``, see :func:`check_tracker`."""
    check_tracker(name)
    tracker = LOGGER_TYPE_TO_CLASS[name]
    wanted = inspect.signature(tracker.__init__).parameters
    if "logging_dir" in wanted:
        return tracker(project, logging_dir=folder)
    return tracker(project)
