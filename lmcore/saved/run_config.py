"""Reads the configuration of a run folder as data: code that it names is run only if the user names it as well."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lmcore.config import parse
from lmcore.config.schema import RunConfig, flatten
from lmcore.errors import RequestError
from lmcore.humanize import runs_near
from lmcore.report.curves import read_settings

CODE = ("data.factory", "model.factory", "loss.factory", "optim.name")
"""Options that can name code (``package.module:function``)."""


def read_run_config(
    run_dir: Path, *, trusted: Collection[str] = (), uses: Collection[str] = CODE
) -> RunConfig:
    """The configuration that a run was started with.

    A run folder may come from somebody else, and ``os:system`` is a valid import path. ``--config FILE`` is different, because
    the user explicitly asks lmcore to follow that file.

    Args:
        trusted: import paths (``package.module:function``) that the user has named.
        uses: options of :data:`CODE` whose code the caller will run; the others may name anything.

    Raises:
        RequestError: there is no valid configuration, or it names code that is not in ``trusted``.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{run_dir}: no config.yaml there; give the folder of a run{runs_near(run_dir)}")
    read_settings(run_dir)
    config = parse.parse(["--config", str(path)], allow_hidden=True)
    values = flatten(config)
    for option in uses:
        named = values.get(option)
        if isinstance(named, str) and ":" in named and named not in trusted:
            raise RequestError(
                f"{path}: {option} is {named!r}, which is code: if you trust it, add --factory {named}"
            )
    return config
