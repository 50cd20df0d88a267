"""A user's own function or class, named in an option as ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of, short_repr


def check_import_path(path: str, option: str) -> None:
    """Raises :class:`RequestError` if ``path`` does not have the form ``package.module:name``. Nothing is imported."""
    module, colon, name = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise RequestError(
            f"{option} {short_repr(path)} is not an import path: write package.module:function, such as my_model:build"
        )


def import_path(path: str, option: str) -> Callable[..., Any]:
    """Import the callable that ``path`` names. Modules in the working directory are found too.

    Args:
        path: ``package.module:name``; ``name`` may be dotted (``module:Class.method``).
        option: the name of the option, for the error message.

    Raises:
        RequestError: the form is wrong, the module cannot be imported, or it has no such callable.

    >>> import_path("collections:OrderedDict", "data.factory")
    <class 'collections.OrderedDict'>
    """
    check_import_path(path, option)
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `accelerate launch` adds the script's folder, not this one
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        reason = message_of(error)
        raise RequestError(
            f"{option} {path!r}: cannot import {module_name}: {type(error).__name__}: {reason}"
        ) from error
    for part in name.split("."):
        owner, target = target, getattr(target, part, None)
        if target is None:
            hint = did_you_mean(part, [known for known in vars(owner) if not known.startswith("_")])
            raise RequestError(f"{option} {path!r}: {module_name} has no {name}{hint}")
    if not callable(target):
        raise RequestError(
            f"{option} {path!r} is a {type(target).__name__}, not a function or class that can be called"
        )
    return target
