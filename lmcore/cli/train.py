"""``lmcore train``: start ``accelerate launch`` with the configuration that fits this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from lmcore.config.parse import parse
from lmcore.data.text.sources import without_run_files
from lmcore.errors import RequestError
from lmcore.run import own_text
from lmcore.run.preflight import preflight

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE / "accelerate_configs"
USAGE = """\
usage: lmcore train [--config_file FILE] [--processes N] [options of train_lm.py]

Starts accelerate launch: on the CPU where there is no GPU, on one GPU, or with DDP on all GPUs of this machine. It
ends with the exit code of the run and adds no traceback to what the run says.

  --config_file FILE     another configuration of accelerate: a file, or a name such as fsdp2
  --processes N          number of processes (default: one for each GPU, or one on the CPU; with --config_file the number
                         in FILE, but on a single machine no more than it has GPUs)

lmcore train --help all lists the options of train_lm.py.
"""


def script() -> Path:
    """Path of ``train_lm.py``: installed as a module next to the package, or in the repository."""
    beside = PACKAGE.parent / "train_lm.py"
    if beside.is_file():
        return beside
    found = importlib.util.find_spec("train_lm")
    if found is None or found.origin is None:
        raise RequestError("train_lm is not installed: pip install lmcore, or run in the repository")
    return Path(found.origin)


def launch_command(
    words: list[str], *, gpus: int, config_file: str | None = None, processes: int | None = None
) -> list[str]:
    """The arguments of ``accelerate launch``.

    Args:
        words: options of ``train_lm.py``, passed on as they are.
        gpus: number of GPUs of this machine.
        config_file: a configuration of accelerate, by path or by its name in ``accelerate_configs/``.
        processes: default: the number of GPUs; with ``config_file`` the number in it, but for a single machine at most the
            number of GPUs, because the files in ``accelerate_configs/`` have 8.

    Raises:
        RequestError: there is no such configuration, or there are more processes than GPUs.

    >>> launch_command(["--seed", "1"], gpus=0)[:2]
    ['--config_file', '.../accelerate_configs/cpu.yaml']
    """
    if config_file is not None:
        file = Path(config_file)
        if not file.is_file():
            file = CONFIGS / f"{Path(config_file).name.removesuffix('.yaml')}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
            raise RequestError(f"--config_file {config_file}: no such file; by name there are {known}")
        if processes is None and gpus and _processes_of(file) > gpus:
            processes = gpus
        count = [] if processes is None else ["--num_processes", str(processes)]
        return ["--config_file", str(file), *count, str(script()), *words]
    if gpus and processes is not None and processes > gpus:
        raise RequestError(f"--processes {processes}: this machine has {gpus} GPUs, one for each process")
    wanted = processes or max(1, gpus)
    if wanted == 1:
        name, count = "gpu" if gpus else "cpu", []
    else:
        name, count = "ddp" if gpus else "cpu_2", ["--num_processes", str(wanted)]
    return ["--config_file", str(CONFIGS / f"{name}.yaml"), *count, str(script()), *words]


def _processes_of(file: Path) -> int:
    """``num_processes`` of an accelerate configuration; 0 if it is for several machines or does not set it."""
    fields = dict(
        re.findall(r"^(num_machines|num_processes):\s*(\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
    return int(fields.get("num_processes", 0)) if int(fields.get("num_machines", 1)) == 1 else 0


def train(words: list[str]) -> int:
    """Train, on all GPUs of this machine or on the CPU; all options of train_lm.py."""
    from lmcore.cli.options import taken  # shared by the commands that accept options of train_lm.py

    if words in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if words[:1] == ["--help"] and words[1:] == ["all"]:
        words = ["--help"]
    config_file, number = taken(words, "config_file"), taken(words, "processes")
    if number is not None and not (number.isdecimal() and len(number) < 10 and 0 < int(number) < 100_000):
        raise RequestError(f"--processes must be a number of at least 1 (got {number})")
    # Refuse a wrong option before anything is started.
    config = parse(words, own_text=own_text.defaults, own_entries=without_run_files)
    processes = None if number is None else int(number)
    checked = config_file is None and not config.fast_dev_run
    if checked and processes is not None:
        preflight(config, processes=processes)
    import torch  # lazily, to count the GPUs, after all checks that do not need it

    arguments = launch_command(
        words, gpus=torch.cuda.device_count(), config_file=config_file, processes=processes
    )
    if checked and processes is None:
        here = arguments.index("--num_processes") if "--num_processes" in arguments else -1
        preflight(config, processes=int(arguments[here + 1]) if here >= 0 else 1)
    print(f"accelerate launch {shlex.join(arguments)}", flush=True)
    # Block Ctrl-C until the launcher can handle it, because a starting interpreter would print a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # accelerate's launcher, except that it ends with the run's exit code and without its own traceback.
    os.execv(sys.executable, [sys.executable, "-m", "lmcore.engine.launcher", *arguments])
