"""``lmcore plan`` and ``--dry_run``: parameters, steps, memory and time of a run from its configuration alone.

No weights are allocated and no text is read, except that ``--tokenize`` counts the tokens of the text and ``--probe`` trains
two steps, of which only the measurements are kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lmcore.cli.options import configured, run_dir_of, taken
from lmcore.cli.saved import tasks
from lmcore.disk import DISK
from lmcore.errors import EXIT_FINISHED, RequestError
from lmcore.humanize import did_you_mean, duration, size, table
from lmcore.run.preflight import preflight

USAGE = """\
usage: lmcore plan [--probe] [--tokenize] [--processes N] [--strategy S] [--device_gib G] [--tokens_per_second R]
                             [options of train_lm.py]

  --probe                train two real steps here and measure: tokens/s, time, memory against the plan
  --tokenize             tokenize the text to count the blocks of an epoch (default: estimated from its size)
  --processes N          devices that will train (default 1)
  --strategy S           single, ddp, fsdp2, zero1, zero2, zero3 (default: single, or ddp for several)
  --device_gib G         memory of each GPU (default: this machine's GPU; without one, the run is planned for its
                         CPU and judged by the memory that is free here)
  --tokens_per_second R  of all devices together, for the time
"""
STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
Rows = list[tuple[str, str]]


def plan(words: list[str]) -> None:
    """Plan a run before it starts: parameters, steps, memory and time."""
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    probed, tokenized = "--probe" in words, "--tokenize" in words
    words = [word for word in words if word not in ("--probe", "--tokenize")]
    given = {"tokenize": "true"} if tokenized else {}
    for name in ("processes", "strategy", "device_gib", "tokens_per_second"):
        value = taken(words, name)
        if value is not None:
            given[name] = value
    config = configured(words, "plan", "")
    processes = given.get("processes", "1")
    preflight(
        config,
        processes=int(processes) if processes.isdecimal() and len(processes) < 10 and int(processes) else 1,
    )
    display = tasks()  # first, because it silences the libraries
    from lmcore.run import setup

    opened = partial(
        setup.open_data, config, run_dir_of(config) / "tokenizer", note=display.note, task=display.task
    )
    rows_of = probe_rows if probed else plan_rows
    rows = rows_of(config, given, open_data=opened, note=display.note)
    display.close()
    if rows:  # under a launcher only one process prints
        print(table([*rows, disk(run_dir_of(config))]))


def plan_rows(
    config: Any,
    given: dict[str, str],
    *,
    open_data: Callable[[], Any],
    note: Callable[[str], None] = print,
) -> Rows:
    """The plan of a configuration as rows.

    Args:
        given: the options of :data:`USAGE` with their values as text.
        open_data: opens the data of the run; called for ``--tokenize`` and for the user's own dataset.

    Raises:
        RequestError: the run itself would be refused.
    """
    asked = _PlannedRun(config, given, open_data=open_data, note=note)
    return asked.plan(tokens_per_second=_number(given, "tokens_per_second", 0) or None).rows()


def probe_rows(
    config: Any,
    given: dict[str, str],
    *,
    open_data: Callable[[], Any],
    note: Callable[[str], None] = print,
) -> Rows:
    """:func:`plan_rows` with the measurements of two real steps on this machine. Under a launcher every rank calls it.

    The measurements are saved in the run folder, for the run's report.
    """
    from lmcore.plan import probe
    from lmcore.run import setup
    from lmcore.run.planning import PLAN_FILE

    engine = setup.open_engine(config)
    try:
        asked = _PlannedRun(config, given, open_data=open_data, note=note, engine=engine)
        sizes, here = asked.sizes, asked.setting_here(probe.MICRO_BATCHES)
        measured = probe.probe(
            engine,
            partial(asked.build, note=lambda line: None),
            partial(setup.make_optimizer, config),
            asked.batch_for,
            accumulation=sizes.accumulation,
            micro_batch_blocks=sizes.micro_batch_blocks,
            clip_norm=config.optim.clip_norm,
        )
        rate = sizes.tokens_per_step / measured.step_seconds
        made = asked.plan(tokens_per_second=rate)
        expected = asked.plan(setting=here, device_type=engine.device.type).memory.total
        kind = "tensors" if engine.device.type == "cuda" else "resident, above what Python and torch take"
        part = "" if measured.micro_batches == sizes.accumulation else f" of {sizes.accumulation}"
        assumed = ["no wait for data", "no evaluation, no checkpoints"]
        if made.setting.world_size != engine.world_size:
            assumed.append(
                f"{made.setting.world_size} devices are {made.setting.world_size / engine.world_size:g} times as "
                f"fast as {engine.world_size}, assuming that communication takes no time"
            )
        rows = [
            (
                "probe",
                f"2 steps of {measured.micro_batches}{part} micro-batches on {engine.world_size} x "
                f"{engine.device_name}, {engine.strategy}, {engine.precision}: "
                f"{measured.step_seconds:.3g} s a whole step; the first took {duration(measured.first_seconds)} "
                f"and warmed up",
            ),
            (
                "memory of the probe",
                f"{size(measured.peak_bytes)} ({kind}), {measured.peak_bytes / expected:.2f} of the "
                f"{size(expected)} planned for it",
            ),
            ("assumed", "; ".join(assumed)),
        ]
        if engine.is_main:
            kept = {"signature": made.signature(), "tokens_per_second": rate}
            folder = run_dir_of(config)
            DISK.makedirs(folder)
            DISK.write_json(folder / PLAN_FILE, kept)
        return [*made.rows(), *rows] if engine.is_main else []
    finally:
        engine.close()


class _PlannedRun:
    """A configuration with its model on the meta device and its budget in steps; no weights are allocated."""

    def __init__(
        self,
        config: Any,
        given: dict[str, str],
        *,
        open_data: Callable[[], Any],
        note: Callable[[str], None],
        engine: Any = None,
    ) -> None:
        import torch

        from lmcore.model.products import cpu_bf16
        from lmcore.run import planning, setup
        from lmcore.run.budget import horizon
        from lmcore.run.setup import schedules_of

        number = _number(given, "processes", engine.world_size if engine else 1)
        processes = int(number)
        strategy = given.get("strategy")
        if processes < 1 or processes != number:
            raise RequestError(
                f"--processes must be a whole number of at least 1 (got {given.get('processes')})"
            )
        if strategy not in (None, *STRATEGIES):
            raise RequestError(
                f"--strategy must be one of {', '.join(STRATEGIES)} (got {strategy}){did_you_mean(strategy, STRATEGIES)}"
            )
        self.config, self.engine = config, engine
        on_gpu = engine.device.type == "cuda" if engine else torch.cuda.is_available()
        here = planning.device_bytes_of(torch.device("cuda" if on_gpu else "cpu"))
        self.device_bytes = int(_number(given, "device_gib", 0) * 2**30) or here
        precision = config.train.precision
        if precision == "auto":
            on_cpu = "bf16" if cpu_bf16() else "fp32"
            precision = engine.precision if engine else "bf16" if self.device_bytes else on_cpu
        self.block_size = setup.block_size_of(config)
        own_data = config.data.factory is not None
        wanted = not own_data or config.tokenizer.path is not None
        self.encoder = setup.given_tokenizer(config) if wanted else None
        in_epochs = config.train.duration.unit == "epochs"
        data = open_data() if own_data or "tokenize" in given else None
        self.encoder = data.encoder if data else self.encoder
        self.vocab_size = None if own_data else config.tokenizer.vocab_size
        if self.encoder is not None:
            self.vocab_size = self.encoder.vocab_size
        self.module = planning.model_without_weights(
            config, vocab_size=self.vocab_size, block_size=self.block_size, note=note
        )
        setting = planning.setting_of(
            config,
            precision=precision,
            world_size=processes,
            strategy=strategy,
            cuda=self.device_bytes is not None,
        )
        self.epoch_blocks = getattr(data.train, "epoch_blocks", None) if data else None
        if in_epochs and data is None and config.data.mode == "store":
            self.epoch_blocks = self._estimated_epoch(note)
        self.sizes = horizon(
            config,
            block_size=self.block_size,
            epoch_blocks=self.epoch_blocks,
            world_size=setting.data_world_size,
            micro_batch_blocks=planning.fitting(
                config, self.module, setting, block_size=self.block_size, device_bytes=self.device_bytes
            ),
        )
        schedules_of(config, self.sizes)  # refuses a schedule that does not fit, as the run would
        self.setting = planning.with_micro_batch(setting, self.sizes)
        self.batch = planning.first_batch(config, data, self.sizes.micro_batch_blocks) if data else None

    def _estimated_epoch(self, note: Callable[[str], None]) -> int:
        """The number of blocks in an epoch, estimated from the size of the files without reading them."""
        from lmcore.run import own_text

        data = self.config.data
        found = own_text.text_bytes(
            data.train or ["stdlib"], unit="line", text_field=data.text_field, encoding=data.encoding
        )
        blocks = max(1, found // own_text.BYTES_PER_TOKEN // self.block_size)
        note(
            f"epoch: about {blocks:,} blocks, estimated from {size(found)} of text at "
            f"{own_text.BYTES_PER_TOKEN} bytes a token (lmcore plan --tokenize counts the tokens)"
        )
        return blocks

    def plan(self, *, setting: Any = None, device_type: str | None = None, **known: Any) -> Any:
        """The plan, with another setting or device if given."""
        from lmcore.run import planning

        return planning.plan_of(
            self.config,
            self.module,
            setting=setting or self.setting,
            sizes=self.sizes,
            device_bytes=self.device_bytes,
            device_type=device_type or ("cuda" if self.device_bytes else "cpu"),
            batch=self.batch,
            epoch_tokens=self.epoch_blocks * self.block_size if self.epoch_blocks else None,
            **known,
        )

    def setting_here(self, micro_batches: int) -> Any:
        """The setting of the probe: the engine's strategy and processes, and at most ``micro_batches`` per step."""
        from lmcore.run import planning

        engine = self.engine
        setting = planning.setting_of(
            self.config,
            precision=engine.precision,
            world_size=engine.world_size,
            cuda=engine.device.type == "cuda",
        )
        return replace(
            setting,
            micro_batch_blocks=self.sizes.micro_batch_blocks,
            accumulation=min(micro_batches, self.sizes.accumulation),
        )

    def build(self, *, note: Callable[[str], None]) -> Any:
        """Build the model with its weights, as the run would."""
        from lmcore.run import setup

        return setup.build_model(
            self.config,
            vocab_size=self.vocab_size,
            special_ids=self.encoder.special_ids if self.encoder else {},
            block_size=self.block_size,
            weights=self.engine.needs_weights,
            note=note,
        )

    def batch_for(self, module: Any) -> Any:
        """A micro-batch of the user's own data, or of random tokens from the model's vocabulary."""
        from lmcore.plan import probe
        from lmcore.run import setup

        if self.batch is not None:
            return self.batch
        known = module.vocab_size or self.vocab_size or 2
        context = setup.context_of(self.config, self.engine, module)
        return probe.text_batch(known, self.sizes.micro_batch_blocks, self.block_size, context)


def _number(given: dict[str, str], name: str, default: float) -> float:
    """The value of ``--name``: a finite number of at least 0. Raises :class:`RequestError`."""
    text = given.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e15:
        raise RequestError(f"--{name} must be a number of at least 0 (got {text})")
    return value


def disk(folder: str | os.PathLike[str]) -> tuple[str, str]:
    """A row with the free space on the disk of the checkpoints."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return "disk", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free at {place}"


def dry_run(config: Any) -> int:
    """``train_lm.py --dry_run``: print the plan and nothing else. Returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        from lmcore.run import setup

        run_dir = run_dir_of(config)
        given = {"processes": os.environ.get("WORLD_SIZE", "1")}
        rows = plan_rows(config, given, open_data=partial(setup.open_data, config, run_dir / "tokenizer"))
        print(table([("run folder", str(run_dir)), *rows, disk(run_dir)]))
    return EXIT_FINISHED
