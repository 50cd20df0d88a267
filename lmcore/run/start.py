"""The start of ``train_lm.py``, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from lmcore.errors import (
    BEFORE_THE_FIRST_STEP,
    EXIT_SAVED,
    RequestError,
    end_at_interrupt,
    one_line_errors,
    require_docstrings,
    require_readable_arguments,
)

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig


def let_segments_grow(env: MutableMapping[str, str]) -> None:
    """Enable expandable segments in torch's CUDA allocator unless the user has configured it: evaluation and compilation
    need other sizes than training and would fragment the memory. torch reads the variable once, when it is imported."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in env:
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


LAUNCHER_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")


def check_launcher(env: Mapping[str, str]) -> None:
    """Check the environment variables that a launcher sets: ranks, world sizes and the address.

    Raises:
        RequestError: one of them is not a whole number or out of range, or the address or port is missing.
    """
    for name in LAUNCHER_NUMBERS:
        value = env.get(name, "")
        least = 1 if name.endswith("WORLD_SIZE") else 0
        if name in env and not (
            value.isascii() and value.isdecimal() and len(value) < 10 and int(value) >= least
        ):
            raise RequestError(
                f"the environment variable {name} must be a whole number of at least {least}, as a launcher sets it (got "
                f"{value[:40]!r}): unset it, or start with accelerate launch"
            )
    numbers = {name: int(env[name]) for name in LAUNCHER_NUMBERS if name in env}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in numbers and numbers.get(rank, 0) >= numbers[size]:
            raise RequestError(
                f"the environment variable {rank} is {env[rank]}, but {size} says that there are {env[size]}: unset both, or "
                f"start with accelerate launch"
            )
    if "LOCAL_RANK" not in numbers and numbers.get("WORLD_SIZE", 1) == 1:
        return
    together = "LOCAL_RANK" if "LOCAL_RANK" in numbers else "WORLD_SIZE"  # LOCAL_RANK: even for 1 process
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RequestError(
            f"the environment variable {together} says that a launcher has started this process, but {' and '.join(missing)}, "
            f"where the processes meet, {verb} not set: unset {together}, or start with accelerate launch"
        )
    port = env["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536):
        raise RequestError(
            f"the environment variable MASTER_PORT must be a whole number from 0 to 65535 (got {port[:40]!r})"
        )


def parse_or_exit(argv: Sequence[str] | None = None) -> RunConfig:
    """The options of a run. ``--help`` and ``--print_config`` print and exit with 0; a wrong request exits with 2.

    A rank that torch's launcher restarts (``--max_restarts``) after the run was stopped on purpose exits with 75, because
    such restarts are meant for crashes.
    """
    # Before all other imports; the run installs its own handler later.
    end_at_interrupt(f"train_lm.py: {BEFORE_THE_FIRST_STEP}")
    from lmcore.run.guard import die_with_parent, left_on_request, refusals_reach_other_ranks, wait_for_peers
    from lmcore.run.peers import connect

    # Do this first: a rank that is still importing, or waiting for the others, must also end when its launcher or another
    # rank dies.
    die_with_parent()
    let_segments_grow(os.environ)
    connect(os.environ)
    from lmcore.config.parse import parse  # these imports take a second
    from lmcore.data.text import listing
    from lmcore.data.text.sources import without_run_files
    from lmcore.disk import require_current_folder
    from lmcore.report.console import protect_output
    from lmcore.run import own_text
    from lmcore.run.folder import local_run_dir
    from lmcore.run.preflight import preflight

    protect_output()
    listing.remember()  # look up each file of the corpus only once until the data are open
    notes: list[str] = []
    with one_line_errors(), refusals_reach_other_ranks():
        require_current_folder()
        require_docstrings()
        require_readable_arguments(argv)
        check_launcher(os.environ)
        config = parse(
            None if argv is None else list(argv),
            note=notes.append,
            own_text=own_text.defaults,
            own_entries=without_run_files,
        )
        if not config.fast_dev_run:  # which has its own text and sizes
            preflight(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
    for line in notes if os.environ.get("RANK", "0") == "0" else []:  # none before a refusal: it is one line
        print(line)
    if left_on_request(local_run_dir(config.run_dir, config.local_dir)):
        raise SystemExit(EXIT_SAVED)
    wait_for_peers()  # so that a rank that dies while it imports libraries is named and ends the others
    return config
