"""What happens between the steps of a run: restore, read on, save, evaluate, judge, rewind, finish.

Comes in: the parts of a run (engine, data, sizes, report, guard) and its configuration. Goes out: a :class:`Session`,
whose methods ``train_lm.py`` calls at step boundaries. What always holds: all ranks call the same methods in the same
order; what changes from step to step stands in one :class:`State`, and all of it is in every checkpoint; a save comes
before the evaluation of its step; every step is judged before it is saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor

from lmcore.checkpoint import writer
from lmcore.config.checks import METRICS, check_metrics
from lmcore.config.durations import is_due
from lmcore.config.schema import RunConfig, flatten, ranges
from lmcore.data.batches import Batches, EvalBatches, StepBatch, merge_cursors
from lmcore.data.order import Cursor, merge_skips
from lmcore.engine.engine import Engine
from lmcore.errors import FaultError, RequestError
from lmcore.model.evaluate import evaluate
from lmcore.model.module import ModelWithLoss
from lmcore.report.html import read_run, write_report
from lmcore.report.redact import redact
from lmcore.report.report import Report
from lmcore.report.trackers import Trackers
from lmcore.run.budget import Sizes
from lmcore.run.early_stopping import EarlyStopping
from lmcore.run.ema import MovingAverage
from lmcore.run.folder import RunFolder
from lmcore.run.guard import Action, Guard
from lmcore.run.late_values import LateNumbers
from lmcore.run.profiler import ProfileWindow
from lmcore.run.replicas import odd_ranks, parameter_hash
from lmcore.run.resume import cursor_of, differences, topology
from lmcore.run.setup import Data, on_main
from lmcore.saved import generate
from lmcore.saved.export import export
from lmcore.saved.load import describe

# Bits beside those of lmcore.run.guard that the ranks combine at a step boundary, because their clocks differ.
LOG_DUE, EVALUATE_DUE, SAVE_DUE = 1 << 16, 1 << 17, 1 << 18


@dataclass(kw_only=True)
class State:
    """What changes from step to step, beside the weights and the optimizer: all of it is in a checkpoint."""

    cursor: Cursor
    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_step: int = -1
    """The step that was evaluated so; a checkpoint's manifest has no other step's."""
    stop_values: list[float] = field(default_factory=list)


@final
class Session:
    """One run between its steps. Made on every rank, after ``engine.prepare``."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        folder: RunFolder,
        report: Report,
        guard: Guard,
        data: Data,
        sizes: Sizes,
        module: ModelWithLoss,
    ) -> None:
        self.config, self.engine, self.folder, self.report = config, engine, folder, report
        self.guard, self.data, self.sizes = guard, data, sizes
        self._module = module
        self.trackers: Trackers | None = None
        self.saves = writer.Checkpoints(
            folder.checkpoints,
            keep=config.checkpoint.keep,
            keep_best=asdict(config.checkpoint.keep_best) if config.checkpoint.keep_best.k else None,
            keep_every=sizes.steps_of(config.checkpoint.keep_every[0])
            if config.checkpoint.keep_every
            else None,
            background=config.checkpoint.background,
            on_full_disk=config.checkpoint.on_full_disk,
            is_main=engine.is_main,
            note=report.note,
        )
        self._skips = merge_skips(ranges(config.data.skip_positions, "data.skip_positions"))
        self.state = State(
            cursor=Cursor(
                fingerprint=data.train.fingerprint,
                seed=config.seed,
                phases=data.phases,
                skips=self._skips,
                stream={"lanes": data.train.lanes} if hasattr(data.train, "lanes") else {},
            )
        )
        self._model = describe(module.model, factory=config.model.factory, arguments=config.model.config)
        self._topology = topology(
            world_size=engine.world_size,
            strategy=engine.strategy,
            precision=engine.precision,
            device=engine.device.type,
            compiled=config.train.compile,
            micro_batch_blocks=sizes.micro_batch_blocks,  # dropout is keyed by the micro-batch
        )
        self._byte_lengths = data.encoder.byte_lengths() if data.encoder else None
        check_metrics(config, list(data.valid), with_bytes=self._byte_lengths is not None)
        self._stopper = EarlyStopping(**asdict(config.evaluate.early_stopping))
        self._intervals = {
            LOG_DUE: config.report.every,
            EVALUATE_DUE: config.evaluate.every,
            SAVE_DUE: config.checkpoint.every,
        }
        self._clock = dict.fromkeys(self._intervals, time.monotonic())
        self._unjudged: list[tuple[int, tuple[int, int], LateNumbers]] = []
        self._profile: ProfileWindow | None = None
        if config.train.profile and engine.is_main:
            ((first, stop),) = ranges([config.train.profile], "train.profile")
            self._profile = ProfileWindow(folder.path / "profile", first, stop - 1)
        self._average = MovingAverage(self._weights, decay=config.optim.ema_decay, strategy=engine.strategy)
        if config.guard.spike == "skip" and engine.strategy.startswith("zero") and engine.precision == "fp16":
            raise RequestError(
                "guard.spike skip: DeepSpeed would halve fp16's loss scale too; use bf16 or rewind"
            )

    def _weights(self) -> list[tuple[str, Tensor]]:
        """Names and whole weights of the user's model (strategies that do not shard)."""
        return [
            (name, parameter)
            for name, parameter in self._module.model.named_parameters()
            if parameter.requires_grad
        ]

    @property
    def epoch(self) -> float:
        """Epochs behind the cursor."""
        return self.data.train.epoch_of(self.state.cursor)

    # ---- restore and read

    def restore(self, path: str) -> dict[str, Any]:
        """Weights, optimizer and state of a checkpoint that is known to be good. Returns what was kept."""
        with writer.open_checkpoint(path, verify_bytes=False) as saved:
            self.engine.load_state(saved.read)
            self._average.load(saved.read)
            self.saves.resumed(saved)
            kept = saved.state
        self.engine.load_optimizer_scalars(kept["optimizer_scalars"])
        self.state = State(
            cursor=cursor_of(
                kept,
                fingerprint=self.data.train.fingerprint,
                seed=self.config.seed,
                phases=self.data.phases,
                skips=self._skips,
                accept_other_data="data.train" in self.config.allow_changes,
            ),
            metrics_step=kept.get("metrics_step", -1),
            **{name: kept[name] for name in ("step", "tokens", "metrics", "stop_values")},
        )
        for line in differences(kept["topology"], self._topology):
            self.report.warn_once(f"{line}: what follows is close to the same run, not bit for bit the same")
        return kept

    def read(self) -> Iterator[StepBatch]:
        """The batches of this rank from the cursor on."""
        return iter(
            Batches(
                self.data.train,
                cursor=self.state.cursor,
                global_batch_blocks=self.sizes.global_batch_blocks,
                micro_batch_blocks=self.sizes.micro_batch_blocks,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                end_position=self.sizes.end_position,
                workers=self.config.data.workers,
                prefetch=self.config.data.prefetch,
                pin_memory=self.config.data.pin_memory,
                device=self.engine.device,
                collate=self.data.collate,
            )
        )

    def label_count(self, batch: StepBatch) -> int | Tensor:
        """Labels of the whole step over all ranks: by arithmetic, or, for the user's own data, by counting."""
        if batch.label_count is not None:
            return batch.label_count
        counts = [(micro_batch["labels"] != -100).sum() for micro_batch in batch.micro_batches]
        return self.engine.sum_over_ranks(torch.stack(counts).sum().to(self.engine.device))

    # ---- a step boundary

    def advance(self, batch: StepBatch, sums: Tensor, norm: Tensor, applied: Tensor) -> None:
        """One more step is done. ``sums`` (2,) float64: this rank's loss sum and label count; nothing waits."""
        state = self.state
        state.step, state.cursor = state.step + 1, batch.cursor
        state.tokens += self.sizes.tokens_per_step
        first, last = batch.positions
        numbers = LateNumbers(
            torch.stack([*self.engine.sum_over_ranks(sums), norm.double(), applied.double()])
        )
        self._unjudged.append((state.step, (first, last + 1), numbers))
        self._average.update()
        self.guard.beat("step", state.step)
        if self._profile is not None and (written := self._profile.step(state.step)):
            self.report.note(f"profile: {written}")
        if is_due(state.step, self.config.guard.hash_every, **self._units()):
            self._compare_replicas()

    def _compare_replicas(self) -> None:
        """Raises ``FaultError`` if a rank holds other weights than most: silent data corruption."""
        if self.engine.strategy not in ("single", "ddp", "zero1", "zero2"):
            self.report.warn_once(f"guard.hash_every: under {self.engine.strategy} no rank holds all weights")
            return
        odd = odd_ranks(self.engine.gather_object(parameter_hash(self._weights())))
        if odd:
            raise FaultError(
                f"the weights of rank {', '.join(map(str, odd))} differ from the others' at step {self.state.step}: "
                f"suspect that device; the last checkpoint before it is good if its hash was compared"
            )

    def _units(self) -> dict[str, Any]:
        """What turns a duration into steps."""
        return {
            "tokens_per_step": self.sizes.tokens_per_step,
            "steps_per_epoch": self.sizes.steps_per_epoch,
            "total_steps": self.sizes.total_steps,
        }

    def due(self) -> int:
        """The bits of what is due after this step, by this rank's clock."""
        now, flags = time.monotonic(), 0
        for bit, every in self._intervals.items():
            waits = bit == SAVE_DUE and self.saves.busy
            minutes = 0.0 if waits else (now - self._clock[bit]) / 60
            if is_due(self.state.step, every, **self._units(), minutes_since_last=minutes):
                flags |= bit
                self._clock[bit] = now
        if flags & EVALUATE_DUE and self.saves.keep_best:
            flags |= SAVE_DUE  # what is best must be there to be kept
        return flags

    def owes_a_look(self) -> bool:
        """Whether the step that was restored is one to evaluate: its save came first, and does not hold that."""
        return is_due(self.state.step, self.config.evaluate.every, **self._units(), minutes_since_last=0.0)

    def judge(self, *, lag_steps: int) -> Action:
        """Hand the guard the steps whose numbers are ``lag_steps`` old, so that nothing waits for the device."""
        action = Action()
        while self._unjudged and self._unjudged[0][0] <= self.state.step - lag_steps:
            step, positions, numbers = self._unjudged.pop(0)
            loss_sum, labels, norm, applied = numbers.tolist()
            action = self.guard.after_step(step, positions, loss_sum / max(labels, 1), norm, bool(applied))
            if action.kind != "go":
                self.report.note(f"{action.kind}: {action.reason}")
                self.report.event(action.kind, step=step, reason=action.reason, positions=action.positions)
            if action.kind in ("rewind", "stop"):
                break
        return action

    def rewind(self, action: Action) -> None:
        """Back to the newest checkpoint before the fault, never to see its positions again.

        Raises:
            FaultError: there is none.
        """

        def find() -> str:
            found = writer.find(
                self.folder.checkpoints, before_step=action.before_step, note=self.report.note
            )
            if found is None:
                raise FaultError(
                    f"{action.reason}: no checkpoint before step {action.before_step} to rewind to"
                )
            with found:
                writer.abandon_after(self.folder.checkpoints, found.step, note=self.report.note)
                return str(found.path)

        self.saves.wait()
        kept = self.restore(on_main(self.engine, find))
        self.guard.rewound(kept["guard"])
        self.state.cursor = self.state.cursor.with_skips(action.positions)
        self._unjudged.clear()
        self.report.rewind(step=self.state.step, state=kept["report"])
        self.notify(f"rewound to step {self.state.step}: {action.reason}")

    # ---- save and evaluate

    def save(self, reason: str) -> None:
        """Gathered on all ranks, written in the background; its evaluation comes after it."""
        state, engine = self.state, self.engine
        self.guard.beat("save", state.step, allow_seconds=self.config.guard.stuck_seconds)
        with self.report.task("saving"):  # gathering; the writing goes on beside the training
            cursor = merge_cursors(engine.gather_object(state.cursor))
            self.saves.save(
                state.step,
                layout=[*engine.state_layout(), *self._average.layout()],
                tensors=chain(engine.state(), self._average.tensors()),
                state={
                    **asdict(replace(state, cursor=cursor)),
                    "cursor": cursor.to_json(),
                    "version": 1,
                    "config": redact(flatten(self.config)),
                    "optimizer_scalars": engine.optimizer_scalars(),
                    "micro_batch_blocks": self.sizes.micro_batch_blocks,
                    "guard": self.guard.state_dict(),
                    "model": self._model,
                    "report": self.report.state(),
                    "topology": self._topology,
                    "trackers": self.trackers.state() if self.trackers else {},
                },
                metrics=self.report.logged | (state.metrics if state.step == state.metrics_step else {}),
                reason=reason,
                epoch=self.epoch,
                tokens=state.tokens,
            )
        self.report.event("checkpoint", step=state.step, reason=reason)
        if engine.is_main:
            self.folder.write_status("running", step=state.step)

    def look(self) -> str | None:
        """Evaluate and write samples. Why to stop early, or ``None``."""
        if self.data.valid:
            self.state.metrics = self.score(self.data.valid, self.config.evaluate.blocks)
            if self._average:
                with self._average.in_place():
                    sets = {f"{name}-ema": held_out for name, held_out in self.data.valid.items()}
                    averaged = self.score(sets, self.config.evaluate.blocks)
                self.state.metrics |= {key: value for key, value in averaged.items() if "/" in key}
            self.state.metrics_step = self.state.step
            self.saves.record(self.state.step, self.state.metrics)
            self.state.stop_values.append(self.state.metrics[self._stopper.metric])
        prompts, encoder = self.config.evaluate.prompts, self.data.encoder
        if prompts and encoder:
            with self.report.pause(), self.engine.full_model() as whole:
                if whole is not None and self.engine.is_main:
                    count, seed = self.config.evaluate.sample_tokens, self.config.seed
                    texts = generate.sample(whole, encoder, prompts, count, seed=seed)
                    self.report.samples(self.state.step, list(zip(prompts, texts)))
        return self._stopper.reason(self.state.stop_values)

    def score(self, sets: dict[str, Any], blocks: int | None = None) -> dict[str, float]:
        """The loss on every held-out set; "loss" and the like are those of the first."""
        metrics: dict[str, float] = {}
        for name, held_out in sets.items():
            batches = EvalBatches(
                held_out,
                micro_batch_blocks=self.config.evaluate.micro_batch_blocks or self.sizes.micro_batch_blocks,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                limit=blocks,
                device=self.engine.device,
            )
            self.guard.beat("evaluate", self.state.step, allow_seconds=self.config.guard.stuck_seconds)
            with self.report.task(f"evaluating {name}", total=len(batches)) as advance:
                result = evaluate(
                    self.engine, batches, byte_lengths=self._byte_lengths, on_micro_batch=advance
                )
            values: dict[str, Any] = {metric: getattr(result, metric) for metric in METRICS}
            where = dict[str, Any](step=self.state.step, epoch=self.epoch, tokens=self.state.tokens)
            self.report.evaluation(set=name, **where, **values)
            known = {key: value for key, value in values.items() if value is not None}
            metrics = {**known, **metrics, **{f"{name}/{key}": value for key, value in known.items()}}
        return metrics

    # ---- the end

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """What fails inside is saved first, if the weights are those of the last whole step; then it goes on failing.

        Only for one process: of several, the others are inside a collective that this one will never join.
        """
        try:
            yield
        except (RequestError, FaultError):
            raise
        except Exception as error:
            if self.engine.world_size == 1 and not self.engine.updating and self.state.step > 0:
                self.judge(lag_steps=0)
                self.save("exception")
                self.saves.wait()
                self.report.note(f"saved step {self.state.step} before it fails: {type(error).__name__}")
            unallocated = "can't allocate memory" in str(error)
            if unallocated or isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise FaultError(
                    f"out of memory in step {self.state.step + 1} with {self.sizes.micro_batch_blocks} blocks of "
                    f"{self.sizes.block_size} tokens at a time: try --train.micro_batch_blocks "
                    f"{max(1, self.sizes.micro_batch_blocks // 2)}, --train.activation_checkpointing true, or "
                    f"--config_file accelerate_configs/fsdp2.yaml on several devices"
                ) from error
            raise

    def notify(self, text: str) -> None:
        """To the webhook, if there is one."""
        if self.trackers:
            self.trackers.notify(f"{self.folder.path.name}: {text}")

    def close(self) -> None:
        """Let go of signals, then of trackers: one that hangs must not look like a dead rank."""
        self.guard.close()
        if self.trackers:
            self.trackers.close()

    def finish(self, tests: dict[str, float]) -> None:
        """The export, the report, and the panel that says how to go on; rank 0 works."""
        on_main(self.engine, partial(self._finish, tests))

    def _finish(self, tests: dict[str, float]) -> None:
        config, path, report = self.config, self.folder.path, self.report
        best = "best" if config.checkpoint.export == "best" else "auto"
        chosen = writer.find(self.folder.checkpoints, best, note=report.note)
        if chosen is None:
            raise FaultError(f"{self.folder.checkpoints} has no checkpoint to export")
        with chosen:
            place = chosen.path
            if config.model.factory is None:
                place = export(
                    chosen,
                    path / "export",
                    run_dir=path,
                    dtype=config.checkpoint.export_dtype,
                    weights="ema" if self._average else "model",
                    note=report.note,
                )
        page = write_report([read_run(path)], path / "report.html")
        results = [(f"held out, {k}", f"{v:.4f}") for k, v in self.state.metrics.items() if "/" not in k]
        scores = {k.removeprefix("test/"): v for k, v in tests.items() if k.startswith("test/")}
        results += [(f"test (last weights), {k}", f"{v:.4f}") for k, v in scores.items()]
        commands = [
            ("go on", f"accelerate launch train_lm.py --config {path}/config.yaml --train.duration N")
        ]
        if config.model.factory is None:
            prompt = (config.evaluate.prompts or ["..."])[0]
            commands = [
                ("generate", f"python -m lmcore generate {path} --prompt {prompt!r}"),
                ("load", f'AutoModelForCausalLM.from_pretrained("{place}")'),
                *commands,
            ]
        report.end("finished", [("model", str(place)), *results, ("report", str(page))], commands=commands)
