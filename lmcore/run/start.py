"""The first moments of ``train_lm.py``, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcore.errors import EXIT_SAVED, one_line_errors
from lmcore.run.guard import die_with_parent, left_on_request
from lmcore.run.peers import connect

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig


def parse_or_exit(argv: Sequence[str] | None = None) -> RunConfig:
    """The options of a run. ``--help`` and ``--print_config`` print and exit with 0, a wrong request with 2.

    A rank that torch's launcher starts again (``--max_restarts``) after the run was stopped on purpose exits with 75:
    such restarts are meant for crashes.
    """
    # At once: a rank that still imports, or waits for the others, is an orphan too if its launcher dies, and must end
    # when another rank dies.
    die_with_parent()
    connect(os.environ)
    from lmcore.config.parse import parse  # these take a second
    from lmcore.report.console import protect_output
    from lmcore.run import own_text
    from lmcore.run.preflight import preflight

    protect_output()
    is_main = os.environ.get("RANK", "0") == "0"
    with one_line_errors():
        config = parse(
            None if argv is None else list(argv),
            note=print if is_main else lambda line: None,
            own_text=own_text.defaults,
        )
        if not config.fast_dev_run:  # which has its own text and sizes
            preflight(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if left_on_request(config.run_dir or ""):
        raise SystemExit(EXIT_SAVED)
    return config
