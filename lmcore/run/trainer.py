"""One training run: from the options to the exit code.

``train_lm.py`` calls the methods of :class:`Run` in this order: ``open_data``, ``build_model``, ``restore``, ``announce``; in
each step ``learning_rate``, ``record``, ``due`` and what is due; at the end ``finish``. All ranks call the same methods in the
same order. The state that changes from step to step is a :class:`~lmcore.run.state.State`, which is saved with every
checkpoint. A step is saved before it is evaluated, and only after all steps up to it were checked for numerical faults.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lmcore.checkpoint import reader, writer
from lmcore.checkpoint.manifest import Hashes
from lmcore.config import yaml
from lmcore.config.schema import RunConfig, flatten, ranges, to_dict
from lmcore.conventions import IGNORED_LABEL
from lmcore.data.batches import Batches, StepBatch, merge_cursors
from lmcore.data.cursor import Cursor, merge_skips
from lmcore.disk import DISK
from lmcore.engine.gradients import first_names
from lmcore.engine.ranks import hashing_together, on_main
from lmcore.errors import (
    EXIT_CRASHED,
    EXIT_FAULT,
    EXIT_FINISHED,
    EXIT_SAVED,
    LAUNCHERS_TRACEBACK,
    DivergedError,
    FaultError,
    RequestError,
    launcher_adds_traceback,
)
from lmcore.model.config import context_length
from lmcore.model.module import multiplied_parameters, parameter_counts
from lmcore.plan import plan
from lmcore.process import resident_bytes
from lmcore.report.redact import redact, redact_settings
from lmcore.report.report import Report, silence_other_bars
from lmcore.report.trackers import Trackers
from lmcore.run import advice, dev_run, setup
from lmcore.run.agreement import Agreement, numbers_of
from lmcore.run.anomalies import Action
from lmcore.run.bucket import END_SECONDS, RECORD, Bucket
from lmcore.run.budget import horizon
from lmcore.run.early_stopping import EarlyStopping
from lmcore.run.ema import MovingAverage
from lmcore.run.ending import Status, full_disk, of_compiler, out_of_memory, unusable_place
from lmcore.run.evaluation import Evaluator, prompts_of
from lmcore.run.finish import write_results
from lmcore.run.folder import LOCK_WAIT_SECONDS, RunFolder, local_run_dir, place, refuse_separate_disks
from lmcore.run.guard import (
    FAULT,
    Guard,
    Verdict,
    leaving,
    let_rank_0_speak,
    report_dead_rank,
    report_reason_of_other_rank,
)
from lmcore.run.intervals import EPOCH, EVALUATE, LOG, SAVE, Due, Intervals
from lmcore.run.late_numbers import LateNumbers
from lmcore.run.planning import auto_micro_batch, plan_here, refuse_early
from lmcore.run.profiler import ProfileWindow
from lmcore.run.replicas import odd_ranks, parameter_hash
from lmcore.run.resume import (
    find_checkpoint,
    kept_before,
    measured_otherwise,
    other_data_is_allowed,
    precision_so_far,
    skips_left_out,
    state_of,
    stop_values_of,
    with_sources_of,
)
from lmcore.run.state import State, differences, topology
from lmcore.saved.export import refuse_foreign_folder
from lmcore.saved.load import describe
from lmcore.storage import is_url

if TYPE_CHECKING:
    from lmcore.report.meters import Metrics


@final
class LossSum:
    """The loss of a step on this rank, as a sum and the number of labels, on the device.

    ``values`` is (2,) float64, so that the sum of many float32 losses keeps the digits by which two runs are compared.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss_sum: Tensor, count: Tensor) -> None:
        """Add a micro-batch. ``loss_sum`` and ``count`` are 0-d tensors; nothing waits for their values."""
        self.values += torch.stack([loss_sum.detach().double(), count.double()])


@final
class Run:
    """A training run as a context manager. Entering it joins the processes and locks the run folder. Leaving it for any reason
    writes ``status.json``, tells the webhook, and releases the folder and the process group.

    Attributes:
        config: the options.
        engine: the strategy.
        data: the training, validation and test data.
        state: the training state.
        exit_code: the exit code for the process: 0 finished, 75 saved and to be started again.

    Raises:
        RequestError: the options, the data or a checkpoint cannot be used.
        FaultError: the training was ended by policy (see ``guard.*``).

    Example::

        with Run(RunConfig(...)) as run:
            run.open_data()
            run.build_model()
            run.restore()
            run.announce()
            train(run)                        # the loop of train_lm.py
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.exit_code = EXIT_CRASHED
        self._close = ExitStack()
        self._ending: tuple[str, str] | None = None
        self._status = Status(config.report.webhook)
        self._training = False
        self.trackers: Trackers | None = None
        self.saves: Any = None
        self.state: State

    # ---- before the data: processes, folder, signals, the checkpoint to resume from

    def __enter__(self) -> Run:
        try:
            self._enter()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _enter(self) -> None:
        silence_other_bars()
        config = self.config
        assert config.run_dir is not None  # the command line has filled it in
        self.engine = setup.open_engine(config, began_in=precision_so_far(config))
        self._close.callback(self.engine.close)
        local = local_run_dir(config.run_dir, config.local_dir)
        self.folder = RunFolder(local, private=config.checkpoint.private)
        self._close.callback(self.folder.unlock)
        on_main(self.engine, partial(self.folder.lock, wait_seconds=LOCK_WAIT_SECONDS))
        refuse_separate_disks(self.folder.path, self.engine)
        if self.engine.is_main:
            self._status.take(self.folder)
        self._open_bucket()
        self.report = self._close.enter_context(
            Report(
                self.folder.path,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                on_full_disk=config.checkpoint.on_full_disk,
            )
        )
        self.guard = Guard(
            config.guard,
            run_dir=self.folder.path,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            max_minutes=config.train.max_minutes,
            note=self.report.note,
        )
        if config.fast_dev_run:
            on_main(self.engine, partial(dev_run.write_sample, config, self.folder.path))
            self.config = config = dev_run.shortened(config, self.folder.path)
        # There is nothing to save yet, so a signal ends the process at once.
        self.guard.install(training=False, on_end=self._end_by_rank)
        self.report.capture_logging()
        if config.model.factory is None:
            on_main(self.engine, partial(refuse_foreign_folder, self.folder.path / "export"))
        self._found = hashing_together(self.engine, self._find_checkpoint)
        on_main(self.engine, partial(refuse_early, config))
        self._status.going_on("preparing", step=self._past.get("step", 0))

    def _open_bucket(self) -> None:
        """If ``run_dir`` is a URL, take the lease and download the files of the run, before anything opens them."""
        config = self.config
        self.bucket = None
        if not is_url(config.run_dir):
            return
        if self.engine.is_main:
            self.bucket = Bucket(
                str(config.run_dir),
                self.folder.path,
                keep=config.checkpoint.keep,
                keep_best=asdict(config.checkpoint.keep_best) if config.checkpoint.keep_best.k else None,
                keeps=None,
                stop_on_failure=config.checkpoint.on_upload_failure == "stop",
            )
            self._close.callback(self._close_bucket, self.bucket)
        on_main(self.engine, lambda: self.bucket.open() if self.bucket else None)
        if not all(self.engine.gather_object((self.folder.path / RECORD).exists())):
            raise RequestError(
                f"local folder {self.folder.path} is not the same on all machines of this run: give one that they share "
                "with --local_dir"
            )

    def _close_bucket(self, bucket: Bucket) -> None:
        """Wait for the last upload, which includes the final status.json, as long as time is left."""
        guard = getattr(self, "guard", None)  # the run may have ended before there was a guard
        left = self.config.checkpoint.upload_wait_seconds
        bucket.note = print
        bucket.close(limit_seconds=left if guard is None else max(0.0, min(left, guard.seconds_left())))

    def _find_checkpoint(self, hashes: Hashes) -> tuple[str, dict[str, Any]] | None:
        """On rank 0: the checkpoint to resume from, on the disk or in the bucket."""
        if self.bucket is None:
            return find_checkpoint(self.config, self.folder, self.report, hashes)
        self.bucket.note = self.report.note
        found = find_checkpoint(self.config, self.folder, self.report, hashes, fetch=self.bucket.fetch)
        self.bucket.abandon_after(-1 if found is None else int(found[1]["step"]))
        self.bucket.start()
        return found

    @property
    def _past(self) -> Mapping[str, Any]:
        """The state of the checkpoint that is resumed; empty for a new run."""
        return self._found[1] if self._found else {}

    # ---- setup

    def open_data(self) -> None:
        """Text -> tokenizer -> token stores -> blocks. Every rank does its share of the work."""
        self.data = setup.open_data(
            with_sources_of(self.config, self._past),
            self.folder.path / "tokenizer",
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            on_main=partial(on_main, self.engine),
            note=self.report.note,
            task=self.report.task,
        )
        if self.engine.world_size > 1:
            setup.compare_data(self.data, gather=self.engine.gather_object, note=self.report.note)

    def build_model(self) -> None:
        """Build the model with its loss, choose the sizes of a step, and wrap model and optimizer by the strategy.

        The data loaders are not passed to accelerate; docs/architecture.md says why.
        """
        config, engine, data = self.config, self.engine, self.data
        self._bytes_before = resident_bytes()
        self.module = setup.open_model(config, data, engine, note=self.report.note)
        self._context = setup.context_of(config, engine, self.module, note=self.report.note)
        self._counts = parameter_counts(self.module)
        self._multiplied = multiplied_parameters(self.module)
        self._flops_per_token = plan.model_flops_per_token(self.module, data.block_size)
        self._micro_batch = self._past.get("micro_batch_blocks") or auto_micro_batch(
            config, engine, self.module, data.block_size
        )
        with state_of(self._found[0]) if self._found else nullcontext():
            self._set_sizes(self._past, Cursor.from_json(self._past["cursor"]) if self._past else None)
            self._kept_before = kept_before(self._past, config)
        self._plan = plan_here(config, engine, self.module, self.sizes, data, note=self.report.note)
        engine.prepare(
            self.module,
            partial(setup.make_optimizer, config, self.module, note=self.report.warn_once),
            gradient_accumulation=self.sizes.accumulation,
            micro_batch_blocks=self.sizes.micro_batch_blocks,
            clip_norm=config.optim.clip_norm,
        )

    def _set_sizes(self, past: Mapping[str, Any], cursor: Cursor | None) -> None:
        """Set the steps of the run and its schedules, continuing from a checkpoint's state and cursor (empty for a new run)."""
        config, block_size = self.config, self.data.block_size
        self.sizes = horizon(
            config,
            block_size=block_size,
            epoch_blocks=getattr(self.data.train, "epoch_blocks", None),
            world_size=self.engine.data_world_size,
            micro_batch_blocks=self._micro_batch,
            step=past.get("step", 0),
            blocks=past.get("tokens", 0) // block_size,
            position=cursor.position if cursor else None,
            skips=cursor.skips if cursor else (),
            planned_from=tuple(past.get("planned_from", (0, 0))),
        )
        self._schedule, self._momenta, self._weight_decays = setup.schedules_of(config, self.sizes)
        # A checkpoint that is kept permanently must be saved first, and the two intervals need not have a step in common.
        saves = [*config.checkpoint.every, *config.checkpoint.keep_every]
        self._intervals = Intervals(
            self.sizes, log=config.report.every, evaluate=config.evaluate.every, save=saves
        )

    def restore(self) -> None:
        """Load the checkpoint to resume from, or create the state of step 0."""
        config, engine, data, sizes = self.config, self.engine, self.data, self.sizes
        self._average = MovingAverage(self._weights, decay=config.optim.ema_decay, strategy=engine.strategy)
        self._evaluator = Evaluator(
            config,
            data=data,
            engine=engine,
            sizes=sizes,
            average=self._average,
            guard=self.guard,
            report=self.report,
            context=self._context,
        )
        asked = config.evaluate.early_stopping
        epoch_tokens = sizes.epoch_blocks and sizes.epoch_blocks * sizes.block_size
        self._passes = advice.passes(sizes.run_tokens, epoch_tokens)
        patience = advice.patience_of(
            asked.patience,
            repeats=self._passes,
            validated=bool(data.valid) and bool(config.evaluate.every),
            began_with=self._past.get("config", {}).get("evaluate.early_stopping.patience"),
        )
        self._early_stopping = EarlyStopping(**asdict(asked) | {"patience": patience})
        self.saves = writer.Checkpoints(
            config.checkpoint,
            self.folder.checkpoints,
            ranks=engine,
            keeps=self._is_kept,
            copies=engine.copies,
            progress=lambda: self.guard.beat("save", self.state.step),
            note=self.report.note,
        )
        if self.bucket is not None:
            self.bucket.keeps = self._is_kept
        self._skips = merge_skips(ranges(config.data.skip_positions, "data.skip_positions"))
        self._model = describe(self.module.model, factory=config.model.factory, arguments=config.model.config)
        self._topology = topology(
            world_size=engine.world_size,
            strategy=engine.strategy,
            precision=engine.precision,
            residual_dtype=engine.residual_dtype,
            device=engine.device.type,
            compiled=engine.compiled,
            context_parallel=engine.context_parallel,
            tensor_parallel=engine.tensor_parallel,
            micro_batch_blocks=sizes.micro_batch_blocks,
        )
        self._profile: ProfileWindow | None = None
        if config.train.profile and engine.is_main:
            ((first, stop),) = ranges([config.train.profile], "train.profile")
            self._profile = ProfileWindow(self.folder.path / "profile", first, stop - 1)
        self.state = State(
            cursor=Cursor(
                fingerprint=data.train.fingerprint,
                seed=config.seed,
                phases=data.phases,
                skips=self._skips,
                stream={"lanes": data.train.lanes} if hasattr(data.train, "lanes") else {},
            )
        )
        self._unchecked: list[tuple[int, tuple[int, int], LateNumbers]] = []
        self._verdict, self._flags = Verdict(), 0
        self._agreement = Agreement(several=engine.world_size > 1)
        self._recorded = time.monotonic()
        self._stop_early: str | None = None
        self._epoch = 0.0
        self._gradients_known = False
        # With a stream, or the user's own iterable, each rank knows only what it has read itself.
        self._same_epochs = getattr(data.train, "epoch_blocks", None) is not None
        if self._found:
            past = self._load(self._found[0])
            with state_of(self._found[0]):
                self.guard.load_state_dict(past["guard"])
        home = self.folder.path / "tokenizer"
        on_main(engine, partial(setup.keep_tokenizer, home, data, note=self.report.note))

    def _load(self, path: str) -> dict[str, Any]:
        """Load weights, optimizer and training state from a verified checkpoint. Returns the content of ``state.json``."""
        with reader.open_checkpoint(path, verify_bytes=False) as saved:
            self.engine.load_state(saved.stored)
            self._average.load(saved.read)
            self.saves.resumed(saved)
            kept = saved.state
        with state_of(path):
            valid = self._fingerprints_of_valid()
            other_data = measured_otherwise(kept, self.config, valid)
            self.saves.measured_after = kept["step"] if other_data else kept.get("measured_after", -1)
            if other_data and kept["stop_values"]:
                self.report.warn_once(
                    f"evaluations up to step {kept['step']} were of other data than those from now on: they are not compared, "
                    "neither for early stopping nor for the best checkpoint"
                )
            self.engine.load_optimizer_scalars(kept["optimizer_scalars"])
            self.state = State(
                cursor=Cursor.from_json(kept["cursor"])
                .check(
                    fingerprint=self.data.train.fingerprint,
                    former=getattr(self.data.train, "former_fingerprints", ()),
                    seed=self.config.seed,
                    accept=other_data_is_allowed(kept["config"], self.config),
                    accept_seed="seed" in self.config.allow_changes,
                )
                .with_phases(self.data.phases)
                .with_skips(self._skips),
                metrics={} if other_data else kept["metrics"],
                metrics_step=-1 if other_data else kept.get("metrics_step", -1),
                stop_values=stop_values_of(kept, self.config, valid),
                **{name: kept[name] for name in ("step", "tokens")},
            )
            self._epoch = self.data.train.epoch_of(self.state.cursor)
            left_out = skips_left_out(kept["config"].get("data.skip_positions"), self._skips)
            if left_out:
                self.report.warn_once(
                    f"data.skip_positions {', '.join(left_out)} stay skipped: they were given before, and a run cannot take "
                    "them back"
                )
            for line in differences(kept["topology"], self._topology):
                self.report.warn_once(
                    f"{line}: what follows is close to the same run, not bit for bit the same"
                )
        return kept

    def announce(self) -> None:
        """Write config.yaml, open the trackers, print the start table, and start the clocks."""
        config, engine, report = self.config, self.engine, self.report
        sizes, state = self.sizes, self.state
        patience = self._early_stopping.patience or 0
        self._status.going_on("running", step=state.step)
        if engine.is_main:
            DISK.write_text(
                self.folder.path / "config.yaml", yaml.dump(redact_settings(to_dict(config, secrets=False)))
            )
            self.trackers = Trackers(
                config.report,
                self.folder.path,
                hyper_parameters=redact(flatten(config)),
                resume_step=state.step if self._found else None,
                run_ids=self._past.get("trackers"),
                note=report.note,
            )
        report.start(
            [
                ("run folder", self._describe_folder()),
                ("job", ", ".join(f"{name} {value}" for name, value in place().items())),
                ("model", setup.describe_model(config, self.module.model, self._counts)),
                *self.data.rows,
                *sizes.rows(config),
                *setup.describe_optimizer(config, sizes),
                *advice.law_row(
                    config,
                    parameters=self._multiplied,
                    run_tokens=sizes.run_tokens,
                    unique_tokens=sizes.epoch_blocks and sizes.epoch_blocks * sizes.block_size,
                ),
                *advice.early_stopping_row(config.evaluate.early_stopping.patience, patience, self._passes),
                *engine.describe(),
                *(self._plan.beside_the_budget() if self._plan else []),
                ("starting at", f"step {state.step:,}, position {state.cursor.position:,}"),
            ]
        )
        repeated = advice.repetition_warning(
            config, self._passes, validated=bool(self.data.valid), patience=patience
        )
        lines = sizes.warnings(config, validated=bool(self.data.valid), step=state.step)
        if repeated is not None and state.step < sizes.total_steps:
            lines.append(repeated)
        context = context_length(self.module.model)
        beyond = advice.context_warning(config, context=context, block_size=self.data.block_size)
        lines += [beyond] if beyond is not None else []
        for line in lines:
            report.warn_once(line)
        report.begin(
            step=state.step,
            total_steps=sizes.total_steps,
            progress=lambda step: self.sizes.progress(step),
            tokens=state.tokens,
            reduce=engine.sum_over_ranks,
            summed_ranks=engine.world_size // engine.tensor_parallel,
            trackers=self.trackers,
            flops_per_token=self._flops_per_token,
            peak_flops_per_device=plan.peak_flops(engine.device_name, engine.precision),
            device=engine.device,
            bytes_before=self._bytes_before,
        )
        if self._found:
            with state_of(self._found[0]):
                report.load_state(self._past["report"])
        planned = self._plan.numbers() if self._plan else {}
        facts = {"position": state.cursor.position, **place(), "plan": planned}
        report.event("resume" if self._found else "start", step=state.step, **facts)
        self.guard.begin()  # from here on a signal only sets a flag, because there is something to save
        self.guard.watch()

    # ---- the loop

    def batches(self) -> Iterator[StepBatch]:
        """The remaining steps, from the cursor on; after a rewind, from the checkpoint's cursor.

        Ends when the budget is spent, when there is a reason to stop (a signal, a deadline, early stopping), or at the end of
        the data. ``label_count`` of a batch is the number of labels of the whole step over all ranks.
        """
        self._training = True
        if self._found:
            self._stop_early = self._early_stopping.reason(self.state.stop_values)
        if self._evaluation_is_missing():
            self.evaluate()
        self.report.epoch(valid_loss=self.state.metrics.get("loss"), valid_step=self.state.metrics_step)
        if self._profile is not None:
            self._profile.step(self.state.step)
        gc.collect()
        gc.freeze()  # existing objects live as long as the run, so the garbage collector need not scan them
        reading = self._read()
        while not self._ends() and (batch := next(reading, None)) is not None:
            step = self.state.step
            self.engine.set_accumulation(len(batch.micro_batches))
            yield replace(batch, label_count=self._label_count(batch))
            if self.state.step <= step:  # rewound
                reading = self._read()
            else:  # after the evaluation, because its loss is in the same line
                self.report.epoch(
                    valid_loss=self.state.metrics.get("loss"), valid_step=self.state.metrics_step
                )

    def _ends(self) -> bool:
        return self.state.step >= self.sizes.total_steps or self._verdict.stop or self._stop_early is not None

    def _evaluation_is_missing(self) -> bool:
        """Whether the step to start from is due for an evaluation but was interrupted after its save, which comes first."""
        options, step = self.config.evaluate, self.state.step
        if not self._found:
            return options.at_start
        if self.state.metrics_step == step:  # the checkpoint was saved after the evaluation
            return False
        if step == self.sizes.total_steps:
            return options.at_end
        return self._intervals.reached(step, options.every)

    def _read(self) -> Iterator[StepBatch]:
        """The batches of this rank from the cursor on."""
        options = self.config.data
        return iter(
            Batches(
                self.data.train,
                cursor=self.state.cursor,
                global_batch_blocks=self.sizes.steps,
                micro_batch_blocks=self.sizes.micro_batch_blocks,
                step=self.state.step,
                rank=self.engine.data_rank,
                world_size=self.engine.data_world_size,
                end_position=self.sizes.end_position,
                workers=options.workers,
                prefetch=options.prefetch,
                pin_memory=options.pin_memory,
                device=self.engine.device,
                context=self._context,
                collate=self.data.collate,
            )
        )

    def _label_count(self, batch: StepBatch) -> Any:
        """The number of labels of the whole step over all ranks: by arithmetic, or by counting for the user's own data."""
        if batch.label_count is not None:
            return batch.label_count
        counts = [(micro_batch["labels"] != IGNORED_LABEL).sum() for micro_batch in batch.micro_batches]
        return self.engine.sum_over_ranks(torch.stack(counts).sum().to(self.engine.device))

    def learning_rate(self) -> float:
        """The learning rate of the next step: a pure function of the position."""
        return self._schedule(self.state.step)

    def momentum(self) -> float:
        """The momentum of the next step, for an optimizer that has one."""
        return self._momenta(self.state.step)

    def weight_decay(self) -> float:
        """The weight decay of the next step."""
        return self._weight_decays(self.state.step)

    @property
    def norm_limit(self) -> float:
        """The gradient norm above which the next update is not applied; infinity unless ``guard.spike`` is skip."""
        return self.guard.norm_limit(self.state.step + 1)

    def record(
        self,
        batch: StepBatch,
        *,
        loss: LossSum,
        grad_norm: Tensor,
        applied: Tensor,
        metrics: Metrics | None = None,
    ) -> None:
        """Call after the update of each step: advances the state, and logs when that is due.

        Args:
            loss: sum over this rank's micro-batches.
            grad_norm: 0-d tensor.
            applied: 0-d bool tensor: whether the update was applied to the weights.
            metrics: your own numbers of the step by name, for metrics.jsonl, console and trackers: a number or 0-d tensor
                of this rank (the mean over ranks and steps is logged), or a pair (sum, count) that is summed over ranks
                and steps like the loss. Tensors stay on the device until a line is due.

        Example::

            correct, labels = correct + hits, labels + count      # in each micro-batch; both of this rank
            run.record(batch, loss=loss, grad_norm=grad_norm, applied=applied,
                       metrics={"accuracy": (correct, labels)})
        """
        state, rate, engine = self.state, self.learning_rate(), self.engine
        state.step, state.cursor = state.step + 1, batch.cursor
        if not self._gradients_known:
            self._gradients_known = True
            if names := engine.without_gradient:
                self.report.note(
                    f"no gradient in step {state.step}: {first_names(names)}; parameters that take no part in the loss are not "
                    "trained"
                )
        state.tokens += batch.n_blocks * self.sizes.block_size
        first, last = batch.positions
        ended, self._epoch = int(batch.epoch) > int(self._epoch), batch.epoch
        # Signals and clocks differ between the ranks, so the ranks combine their flags and all act on the same bits.
        mine = self._own_flags()
        if ended and engine.is_main and not self._same_epochs:
            mine |= EPOCH
        flags = None if engine.world_size == 1 else numbers_of(mine, engine.device)
        sums = engine.sum_over_ranks(loss.values, own=flags)
        own = torch.stack([grad_norm.double(), applied.double()])
        numbers = LateNumbers(torch.cat([own, sums]))
        self._unchecked.append((state.step, (first, last + 1), numbers))
        self._average.update()
        self.guard.beat("step", state.step)
        if self._profile is not None and (written := self._profile.step(state.step)):
            self.report.note(f"profile: {written}")
        if self._intervals.reached(state.step, self.config.guard.hash_every):
            self._compare_replicas()

        due = self._intervals.flags(state.step)
        waits = bool(due & SAVE) or state.step == self.sizes.total_steps
        self._flags = due | self._agreement.after_step(mine, numbers, first=4, at_once=waits)
        if self._flags & EVALUATE and self.saves.keep_best:
            self._flags |= SAVE  # only a saved checkpoint can be kept as the best
        if ended and self._same_epochs:  # no need to wait for rank 0's flag, which comes late from a GPU
            self._flags |= EPOCH
        self._verdict = self.guard.verdict(self._flags)
        self.report.step(
            step=state.step,
            epoch=batch.epoch,
            tokens=state.tokens,
            position=state.cursor.position,
            loss_sum=loss.values[0],
            count=loss.values[1],
            lr=rate,
            norm=grad_norm,
            applied=applied,
            wait_seconds=batch.wait_seconds,
            metrics=metrics,
            due=bool(self._flags & LOG),
        )
        if self._flags & EPOCH:  # before a save: the sums of the next epoch start at zero
            self.report.end_epoch(epoch=int(self._epoch), step=state.step)

    def _own_flags(self) -> int:
        """The flags of this rank: signals, deadlines, failed saves, and on rank 0 the clock. Called once per step."""
        now, several = time.monotonic(), self.engine.world_size > 1
        step_seconds, self._recorded = now - self._recorded, now
        late_seconds = step_seconds if several and self.engine.device.type == "cuda" else 0.0
        upload_seconds = self.bucket.upload_seconds if self.bucket is not None else 0.0
        flags = self.guard.flags(reserve_seconds=self.saves.save_seconds + upload_seconds + late_seconds)
        if self.engine.is_main:
            flags |= self._intervals.clock_flags(saving=self.saves.busy)
        failed = self.saves.failed or self.report.failed or (self.bucket is not None and self.bucket.failed)
        return flags | (FAULT if failed else 0)

    def due(self) -> Due:
        """What to do after a step is recorded; the same on every rank.

        Steps are checked one step late, so that the host does not wait for the device. But before a save or an evaluation,
        after which the run may end, all steps up to it are checked.

        Raises:
            FaultError: too many steps were not finite (``guard.*``).
        """
        last = self.state.step == self.sizes.total_steps
        saving = self._verdict.save or bool(self._flags & SAVE) or last
        evaluating = self.config.evaluate.at_end if last else bool(self._flags & EVALUATE)
        action = self._check_steps(lag_steps=0 if saving or evaluating else 1)
        if action.kind == "stop":
            raise DivergedError(action.reason)
        if action.kind == "rewind":
            return Due(rewind=action)
        reason = self._verdict.checkpoint_reason or ("end" if last else "interval")
        return Due(
            save=reason if saving else None,
            evaluate=evaluating and not self._verdict.stop,  # the remaining time is for the save
        )

    def _check_steps(self, *, lag_steps: int) -> Action:
        """Pass the guard the steps that are at least ``lag_steps`` behind the current one."""
        action = Action()
        while self._unchecked and self._unchecked[0][0] <= self.state.step - lag_steps:
            step, positions, numbers = self._unchecked.pop(0)
            norm, applied, loss_sum, labels = numbers.tolist()[:4]
            loss = loss_sum / max(labels, 1)
            self.report.latest(step=step, loss=loss)
            action = self.guard.after_step(step, positions, loss, norm, bool(applied))
            if action.kind != "go":
                self.report.note(f"{action.kind}: {action.reason}")
                self.report.event(action.kind, step=step, reason=action.reason, positions=action.positions)
            if action.kind in ("rewind", "stop"):
                break
        return action

    def rewind(self, fault: Action) -> None:
        """Go back to the newest checkpoint before the fault, and skip the positions of the fault from now on.

        Raises:
            FaultError: there is no such checkpoint.
        """
        folder, note = self.folder.checkpoints, self.report.note
        skips = self.state.cursor.skips  # including those of an earlier rewind to the same checkpoint

        def find(hashes: Hashes) -> str:
            found = reader.find(folder, before_step=fault.before_step, note=note, hashes=hashes)
            if found is None and fault.or_before is not None:
                found = reader.find(folder, before_step=fault.or_before, note=note, hashes=hashes)
            if found is None:
                raise DivergedError(
                    f"{fault.reason}: no checkpoint before step {fault.before_step} to rewind to"
                )
            with found:
                reader.abandon_after(folder, found.step, note=note)
                if self.bucket is not None:
                    self.bucket.abandon_after(found.step)
                return str(found.path)

        self.saves.wait()
        kept = self._load(hashing_together(self.engine, find))
        self.state.cursor = self.state.cursor.with_skips([*skips, *fault.positions])
        self._set_sizes(kept, self.state.cursor)
        self.guard.rewound(kept["guard"])
        self._unchecked.clear()
        self.report.rewind(
            step=self.state.step,
            tokens=self.state.tokens,
            state=kept["report"],
            total_steps=self.sizes.total_steps,
        )
        self._notify(f"rewound to step {self.state.step}: {fault.reason}")
        last = self.state.step >= self.sizes.total_steps  # all remaining positions are skipped
        if last:
            self.saves.last_step = None  # save this step again: its checkpoint does not have these skips
        every = self.config.evaluate.every
        if self.config.evaluate.at_end if last else self._intervals.reached(self.state.step, every):
            self.evaluate()

    def save(self, reason: str) -> None:
        """Save a checkpoint: all ranks copy their state, and write it in the background.

        On a GPU the copy overlaps with the next step, and ``engine.update`` waits for it on the device. If your own code
        changes weights before the next update, it must call ``run.engine.copies.before_writing()`` first.
        """
        state, engine = self.state, self.engine
        on_main(engine, self.folder.check_owner)
        self.guard.beat("save", state.step)
        with self.report.task("saving"):
            cursor = merge_cursors(engine.gather_object(state.cursor))
            begun = self.saves.save(
                state.step,
                tensors=[*engine.state_parts(), *self._average.parts(engine.rank, engine.world_size)],
                state={
                    **asdict(replace(state, cursor=cursor)),
                    "cursor": cursor.to_json(),
                    "version": 1,
                    "config": redact(flatten(self.config)),
                    "optimizer_scalars": engine.optimizer_scalars(),
                    "micro_batch_blocks": self.sizes.micro_batch_blocks,
                    "planned_from": self.sizes.steps.stretches[0][:2],
                    "kept_before": self._kept_before,
                    "measured_after": self.saves.measured_after,
                    "valid": self._fingerprints_of_valid(),
                    "guard": self.guard.state_dict(),
                    "model": self._model,
                    "tokenizer": self.data.encoder.fingerprint if self.data.encoder else None,
                    "report": self.report.state(),
                    "topology": self._topology,
                    "trackers": self.trackers.state() if self.trackers else {},
                },
                metrics=self.report.logged | (state.metrics if state.step == state.metrics_step else {}),
                reason=reason,
                epoch=self.epoch,
                tokens=state.tokens,
            )
        if begun:  # the last step is saved when it is due, and finish() asks for it once more
            self.report.event("checkpoint", step=state.step, reason=reason)
        self._status.remember(checkpoint_step=self.saves.last_step)
        self._status.going_on("running", step=state.step)
        self.guard.done(self._flags)  # removes the file that asked for this save

    def evaluate(self) -> None:
        """Evaluate the validation sets, write samples, and decide on early stopping."""
        state = self.state
        if self.data.valid:
            state.metrics = self._evaluator.validate(state, self.epoch)
            state.metrics_step = state.step
            if state.step == self.saves.measured_after:  # the checkpoint's own step was evaluated again
                self.saves.measured_after = state.step - 1
            self.saves.record(state.step, state.metrics)
            state.stop_values.append(state.metrics[self._early_stopping.metric])
        self._evaluator.samples(state.step)
        self._stop_early = self._early_stopping.reason(state.stop_values)

    # ---- the end

    def finish(self) -> None:
        """Wait until the last checkpoint is committed and verified; then test, export and report, unless the run was interrupted.

        Raises:
            FaultError: the run was stopped by a fault, for example a failed save.
        """
        step, total, report = self.state.step, self.sizes.total_steps, self.report
        if self._profile is not None and (told := self._profile.end()):
            report.note(f"profile: {told}")
        if self._verdict.stop:
            self.saves.wait(final=True)
            reason = self._verdict.reason
            report.event("signal", step=step, reason=reason)
            if self._verdict.exit_code == EXIT_FAULT:
                if self.bucket is not None:
                    self.bucket.poll()
                raise FaultError(f"stopped at step {step}: {reason}")
            report.end(f"saved at step {step:,}: {reason}; run the same command to resume", [])
            if "SIGINT" in reason and launcher_adds_traceback():
                report.note(LAUNCHERS_TRACEBACK)
            self._ending, self.exit_code = ("saved", reason), self._verdict.exit_code
            return
        stopped = self._stop_early if step < total else None  # at the last step it is not early any more
        if stopped is not None:
            report.note(f"stopped early at step {step:,} of {total:,}: {stopped}")
        reason = stopped or "reached train.duration"
        self.save("end")
        self.saves.wait(final=True)  # exit code 0 only after the last checkpoint is committed and verified
        self._evaluator.score(self.data.test, self.state, self.epoch)
        report.event("end", step=step, reason=reason)
        averaged, prompts = bool(self._average), prompts_of(self.config.evaluate.prompts, self.data)
        hashing_together(
            self.engine,
            lambda hashes: write_results(
                self.config, self.folder, report, averaged=averaged, prompts=prompts, hashes=hashes
            ),
        )
        on_main(self.engine, self._finish_uploads)
        self._notify(f"finished at step {step}: {reason}")
        self._ending, self.exit_code = ("finished", reason), EXIT_FINISHED

    def _finish_uploads(self) -> None:
        """Wait for the uploads: the exit code is 0 only when the last checkpoint is in the bucket as well."""
        if self.bucket is None:
            return
        done = self.bucket.wait(
            limit_seconds=END_SECONDS, progress=lambda: self.guard.beat("upload", self.state.step)
        )
        self.bucket.poll()
        if not done:
            raise FaultError(
                f"the training is finished, but {self.config.run_dir} takes no uploads; its checkpoint and export are in "
                f"{self.folder.path}: the same command on this machine uploads them"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                leaving(None)
                if self.saves is not None and self.engine.world_size > 1:
                    self.saves.abandon()
            if error is not None and self._training and self.guard.signalled and of_compiler(error):
                self._save_at_failure(error)
                self.exit_code = EXIT_SAVED
                self._status.ended(
                    "saved", step=self.state.step, exit_code=EXIT_SAVED, reason="a signal while compiling"
                )
                raise SystemExit(EXIT_SAVED) from None
            failure = self._failure_of(error) if error is not None else None
            if failure is not None:
                leaving(failure)
            if failure is not None and failure is not error:
                raise failure from error
            if isinstance(error, SystemExit) and error.code == EXIT_SAVED and self._status.taken:
                self._interrupted_early()
            elif isinstance(error, RequestError | FaultError):
                self._failed(error.exit_code, str(error), diverged=isinstance(error, DivergedError))
            elif isinstance(error, Exception):
                # From the launcher's variable, because the error may occur before there is an engine.
                several = int(os.environ.get("WORLD_SIZE", "1")) > 1
                # A lost connection's traceback is not printed if another rank has sent the reason.
                known = report_reason_of_other_rank(error) if several else None
                code = report_dead_rank() if several and known is None else known
                if code is None:
                    code = EXIT_CRASHED
                    self._failed(code, f"{type(error).__name__}: {error}")
                if several:
                    # Print the traceback first, because leaving the process group may wait for the other ranks.
                    if known is None:
                        sys.excepthook(type(error), error, trace)
                    self._close.close()
                    let_rank_0_speak()
                    raise SystemExit(code) from error
            elif error is None:
                self._succeeded()
        finally:
            self._close.close()

    def _interrupted_early(self) -> None:
        """After a signal before the first step of this process: write status.json, and a line that says what is kept."""
        self.exit_code = EXIT_SAVED
        signals = self.guard.signals if hasattr(self, "guard") else ""
        self._status.ended("saved", exit_code=EXIT_SAVED, reason="a signal before the first step")
        if not signals:  # the launcher has died, so nobody would read the line
            return
        step = self._past.get("step", 0) if hasattr(self, "_found") else 0
        if step:
            kept = f"before step {step + 1:,}: the checkpoint of step {step:,} is kept"
        elif self.config.data.factory is not None:
            kept = "before the first step: nothing to save"
        else:
            kept = "before the first step: the tokenizer and the parts of the token stores that are finished are kept"
        self.report.note(f"interrupted ({signals}) {kept}; run the same command to resume")
        if "SIGINT" in signals and launcher_adds_traceback():
            self.report.note(LAUNCHERS_TRACEBACK)

    def _succeeded(self) -> None:
        state, reason = self._ending or ("failed", "left before the training was finished")
        self.guard.close()  # first, so that a tracker that hangs does not look like a dead rank
        if self.trackers:
            self.trackers.close()
        self.report.close()
        self._status.remember(checkpoint_step=self.saves.last_step)
        self._status.ended(state, step=self.state.step, exit_code=self.exit_code, reason=reason)

    def _failure_of(self, error: BaseException) -> BaseException:
        """The error to end with. A training in one process is saved first, and running out of memory gets advice."""
        failure: RequestError | FaultError | None
        if not self._training:
            if (failure := unusable_place(error)) is None:
                return error
            engine = getattr(self, "engine", None)
            if engine is not None and not engine.is_main:  # rank 0 does not know of this error
                print(f"rank {engine.rank}: {failure}", file=sys.stderr)
        elif not isinstance(error, Exception) or isinstance(error, RequestError | FaultError):
            return error
        elif (failure := full_disk(error, step=self.state.step + 1)) is None:
            self._save_at_failure(error)
            sizes = self.sizes
            failure = out_of_memory(
                error,
                step=self.state.step + 1,
                micro_batch_blocks=sizes.micro_batch_blocks,
                block_size=sizes.block_size,
            )
            if failure is None:
                return error
        self._failed(failure.exit_code, str(failure))
        return failure

    def _save_at_failure(self, error: BaseException) -> None:
        """Save the steps that were complete before the error.

        Only with one process: with several, the others wait in a collective that this one will never join.
        """
        step = self.state.step
        if self.engine.world_size > 1 or self.engine.updating or step == 0:
            return
        try:
            self._check_steps(lag_steps=0)
            self.save("exception")
            self.saves.wait()
            self.report.note(f"saved step {step} after {type(error).__name__}")
        except Exception as second:
            # A device that has failed will fail again: report the first error.
            self.report.note(
                f"step {step} could not be saved after {type(error).__name__}: {type(second).__name__}: {second}"
            )

    def _end_by_rank(self, line: str, code: int) -> None:
        """Called when another rank is dead, stuck or has refused, on rank 0 (or rank 1 if it is rank 0): write the status."""
        self._status.take(self.folder)
        self._failed(code, line)

    def _failed(self, exit_code: int, reason: str, *, diverged: bool = False) -> None:
        self.exit_code = exit_code
        self._status.failed(exit_code=exit_code, reason=reason, diverged=diverged)

    def _notify(self, text: str) -> None:
        if self.trackers:
            self.trackers.notify(f"{self.folder.path.name}: {text}")

    # ---- small things

    @property
    def epoch(self) -> float:
        """The number of epochs trained so far, as this rank counts them."""
        return self._epoch

    def _describe_folder(self) -> str:
        local = str(self.folder.path)
        return f"{self.config.run_dir}, local copy {local}" if is_url(self.config.run_dir) else local

    def _weights(self) -> list[tuple[str, Tensor]]:
        """Names and full weights of the trained parameters (for strategies that do not shard)."""
        return [(n, p) for n, p in self.module.model.named_parameters() if p.requires_grad]

    def _fingerprints_of_valid(self) -> dict[str, str]:
        return {name: dataset.fingerprint for name, dataset in self.data.valid.items()}

    def _is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept permanently. If it was saved under another plan of steps or another meaning
        of ``checkpoint.keep_every``, this is no longer known, so it is kept."""
        every = self.config.checkpoint.keep_every
        if step <= self._kept_before or not every:
            return step <= self._kept_before
        return step < self.sizes.steps.stretches[0].step or self._intervals.reached(step, every)

    def _compare_replicas(self) -> None:
        """Raise ``FaultError`` if the weights of a rank differ from those of most ranks (silent data corruption)."""
        if self.engine.sharded:
            under = self.engine.strategy if self.engine.tensor_parallel == 1 else "train.tensor_parallel"
            self.report.warn_once(f"guard.hash_every: under {under} no rank holds all weights")
            return
        odd = odd_ranks(self.engine.gather_object(parameter_hash(self._weights())))
        if odd:
            raise FaultError(
                f"the weights of rank {', '.join(map(str, odd))} differ from the others' at step {self.state.step}: "
                f"check that device; the last checkpoint before it is good if its hash was compared"
            )
