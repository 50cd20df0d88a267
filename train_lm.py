"""Train a causal language model on your own text: raw text in, a folder that transformers opens out.

    accelerate launch train_lm.py                                          # the demo: no data to fetch
    accelerate launch train_lm.py --config recipes/gpt2_small.yaml --data.train 'corpus/*.jsonl.zst'
    python train_lm.py --help                                              # every option

The script reads top to bottom: request, engine, data, model, restore, loop, close. The same command again goes on
from the newest good checkpoint. Exit codes: 0 finished, 2 a wrong request, 70 a fault that policy ends, 75 saved at
a signal or deadline (start me again); ``<run_dir>/status.json`` says the same for scripts.
"""

from __future__ import annotations

import os
import sys

from lmcore import command_line
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, FaultError, RequestError

IS_RANK_0 = os.environ.get("RANK", "0") == "0"

if __name__ == "__main__":  # --help, a typo and --print_config must not wait for torch, which takes seconds
    try:
        CONFIG = command_line.parse(say=print if IS_RANK_0 else lambda line: None)
    except RequestError as refusal:
        if IS_RANK_0:
            print(f"train_lm.py: {refusal}", file=sys.stderr)
        sys.exit(refusal.exit_code)

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmcore import assemble, checkpoint, generate, guard, optim
from lmcore.batches import Batches, EvalBatches, StepBatch, merge_cursors
from lmcore.config import RunConfig, changes, flatten, ranges, refuse_changes, to_yaml
from lmcore.duration import is_due
from lmcore.engine import Engine
from lmcore.evaluate import EarlyStopping, evaluate
from lmcore.export import export
from lmcore.html import read_run, write_report
from lmcore.model import parameter_counts
from lmcore.order import Cursor, merge_skips
from lmcore.report import Report, silence_other_bars
from lmcore.run_folder import RunFolder
from lmcore.saved import describe
from lmcore.trackers import Trackers

# Bits beside those of lmcore.guard that the ranks combine at a step boundary, because their clocks differ.
LOG_DUE, EVALUATE_DUE, SAVE_DUE = 1 << 16, 1 << 17, 1 << 18


@dataclass(kw_only=True)
class State:
    """What changes from step to step, beside the weights and the optimizer: all of it is in a checkpoint."""

    cursor: Cursor
    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stop_values: list[float] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- around a training


def run(config: RunConfig) -> int:
    """The processes, the run folder, and how it ended. Returns the exit code."""
    silence_other_bars()
    engine = Engine(
        precision=config.train.precision,
        param_dtype=config.train.param_dtype,
        deepspeed=config.engine.deepspeed,
        timeout_seconds=config.engine.timeout_seconds,
        compile="regional" if config.train.compile else "none",
        activation_checkpointing=config.train.activation_checkpointing,
        seed=config.seed,
        deterministic=config.train.deterministic,
        tf32=config.train.tf32,
    )
    folder = RunFolder(config.run_dir, private=config.checkpoint.private)
    try:
        on_main(engine, folder.lock)
        with Report(folder.path, rank=engine.rank, world_size=engine.world_size) as report:
            code, state, reason = train(config, engine, folder, report)
        if engine.is_main:
            folder.write_status(state, exit_code=code, reason=reason)
        return code
    except (RequestError, FaultError) as error:
        if engine.is_main and (folder.path / "status.json").exists():
            folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
        raise
    finally:
        folder.unlock()
        engine.close()


def on_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work; every rank gets its result, or the same refusal."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if engine.is_main:
        try:
            outcome = (work(), None)
        except (RequestError, FaultError) as error:
            outcome = (None, error)
    result, error = engine.broadcast_object(outcome)
    if error is not None:
        raise error
    return result


# ------------------------------------------------------------------------------------------------------- one training


def train(config: RunConfig, engine: Engine, folder: RunFolder, report: Report) -> tuple[int, str, str]:
    """One training. Returns the exit code, the state for ``status.json``, and the reason in words."""
    watch = guard.Guard(
        run_dir=folder.path,
        rank=engine.rank,
        world_size=engine.world_size,
        max_minutes=config.train.max_minutes,
        stop_before_deadline_seconds=config.guard.stop_before_deadline_seconds,
        max_skips=config.guard.max_skips,
        max_rewinds=config.guard.max_rewinds,
        spike=config.guard.spike,
        spike_window=config.guard.spike_window,
        spike_sigma=config.guard.spike_sigma,
        stuck_seconds=config.guard.stuck_seconds,
        say=report.note,
    )
    watch.install(training=False)  # nothing can be saved before the loop: a signal leaves at once
    report.capture_logging()
    found = on_main(engine, partial(find_checkpoint, config, folder, report))
    past = found[1] if found else {}

    # ---- data: text -> tokenizer -> token stores -> blocks; every rank takes its share of the work
    if engine.is_main:
        folder.write_status("preparing", step=past.get("step", 0))
    data = assemble.open_data(
        config,
        folder.path / "tokenizer",
        rank=engine.rank,
        world_size=engine.world_size,
        on_main=partial(on_main, engine),
        note=report.note,
        task=report.task,
    )
    sizes = assemble.horizon(
        config, data, world_size=engine.world_size, micro_batch_blocks=past.get("micro_batch_blocks")
    )

    # ---- model and optimizer; the loaders are ours and never given to accelerate (README, "Why not prepare()")
    module = assemble.open_model(config, data, note=report.note)
    model_record = describe(module.model, factory=config.model.factory, arguments=config.model.config)
    counts = parameter_counts(module)
    engine.prepare(
        module,
        partial(assemble.make_optimizer, config, module),
        gradient_accumulation=sizes.accumulation,
        micro_batch_blocks=sizes.micro_batch_blocks,
        clip_norm=config.optim.clip_norm,
    )
    rate_of = partial(
        optim.learning_rate,
        schedule=config.optim.schedule,
        peak=config.optim.lr,
        warmup_steps=sizes.steps_of(config.optim.warmup),
        total_steps=sizes.total_steps,
        decay_steps=sizes.steps_of(config.optim.decay),
        min_ratio=config.optim.min_lr_ratio,
    )

    # ---- restore
    state = State(
        cursor=Cursor(
            fingerprint=data.train.fingerprint,
            seed=config.seed,
            phases=data.train.order.phases,
            skips=merge_skips(ranges(config.data.skip_positions, "data.skip_positions")),
        )
    )
    saves = checkpoint.Checkpoints(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        keep_best=asdict(config.checkpoint.keep_best) if config.checkpoint.keep_best.k else None,
        keep_every=sizes.steps_of(config.checkpoint.keep_every[0]) if config.checkpoint.keep_every else None,
        background=config.checkpoint.background,
        on_full_disk=config.checkpoint.on_full_disk,
        is_main=engine.is_main,
        say=report.note,
    )

    def restore(path: str) -> dict[str, Any]:
        """Weights, optimizer and state of a checkpoint that is known to be good."""
        nonlocal state
        with checkpoint.open_checkpoint(path) as saved:
            engine.load_state(saved.read)
            engine.load_optimizer_scalars(saved.state["optimizer_scalars"])
            kept = saved.state
        cursor = Cursor.from_json(kept["cursor"]).check(
            fingerprint=data.train.fingerprint,
            seed=config.seed,
            accept="data.train" in config.allow_changes,
        )
        own_skips = ranges(config.data.skip_positions, "data.skip_positions")
        state = State(
            cursor=cursor.with_skips(own_skips).with_weights(data.weights),
            **{name: kept[name] for name in ("step", "tokens", "metrics", "stop_values", "best")},
        )
        return kept

    if found:
        past = restore(found[0])
        watch.load_state_dict(past["guard"])
    trackers = None
    if engine.is_main:
        folder.write_status("running", step=state.step)
        (folder.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        trackers = Trackers(
            config.report.trackers,
            folder.path,
            project=config.report.project,
            name=config.report.name,
            tags=config.report.tags,
            hyper_parameters=flatten(config),
            save_code=config.report.save_code,
            resume_step=state.step if found else None,
            run_ids=past.get("trackers"),
            webhook=config.report.webhook,
            note=report.note,
        )
    report.start(
        [
            ("run folder", str(folder.path)),
            (
                "model",
                f"{model_name(config)}, {counts['total']:,} parameters ({counts['trained']:,} trained)",
            ),
            *data.rows,
            ("blocks", f"{data.train.epoch_blocks:,} of {data.block_size:,} tokens in an epoch"),
            (
                "global batch",
                f"{engine.world_size} processes x {sizes.accumulation} x {sizes.micro_batch_blocks} blocks = "
                f"{sizes.global_batch_blocks} blocks = {sizes.tokens_per_step:,} tokens",
            ),
            (
                "budget",
                f"{config.train.duration} = {sizes.total_steps:,} steps = "
                f"{sizes.total_steps * sizes.tokens_per_step:,} tokens = "
                f"{float(sizes.total_steps / sizes.steps_per_epoch):.2f} epochs",
            ),
            *engine.describe(),
            ("begins at", f"step {state.step:,}, position {state.cursor.position:,}"),
        ]
    )
    report.begin(
        step=state.step,
        total_steps=sizes.total_steps,
        tokens=state.tokens,
        reduce=engine.sum_over_ranks,
        trackers=trackers,
        device=engine.device,
    )
    if found:
        report.load_state(past["report"])
    report.event("resume" if found else "start", step=state.step, position=state.cursor.position)

    # ---- what happens between steps
    byte_lengths = data.encoder.byte_lengths() if data.encoder else None
    stopper = EarlyStopping(**asdict(config.evaluate.early_stopping))
    clock = dict.fromkeys((LOG_DUE, EVALUATE_DUE, SAVE_DUE), time.monotonic())
    intervals = {
        LOG_DUE: config.report.every,
        EVALUATE_DUE: config.evaluate.every,
        SAVE_DUE: config.checkpoint.every,
    }
    pending: list[tuple[int, tuple[int, int], Tensor]] = []

    def due() -> int:
        now, flags = time.monotonic(), 0
        for bit, every in intervals.items():
            if is_due(
                state.step,
                every,
                tokens_per_step=sizes.tokens_per_step,
                steps_per_epoch=sizes.steps_per_epoch,
                total_steps=sizes.total_steps,
                minutes_since_last=(now - clock[bit]) / 60,
            ):
                flags |= bit
                clock[bit] = now
        return flags

    def save(reason: str) -> None:
        """Gathered on all ranks, written in the background; its evaluation comes after it."""
        watch.beat("save", state.step, allow_seconds=config.guard.stuck_seconds)
        with report.pause():
            cursor = merge_cursors(engine.gather_object(state.cursor))
            saves.save(
                state.step,
                layout=engine.state_layout(),
                tensors=engine.state(),
                state={
                    **asdict(replace(state, cursor=cursor)),
                    "cursor": cursor.to_json(),
                    "version": 1,
                    "config": flatten(config),
                    "optimizer_scalars": engine.optimizer_scalars(),
                    "micro_batch_blocks": sizes.micro_batch_blocks,
                    "guard": watch.state_dict(),
                    "model": model_record,
                    "report": report.state(),
                    "topology": topology(engine),
                    "trackers": trackers.state() if trackers else {},
                },
                metrics=state.metrics,
                reason=reason,
                epoch=cursor.position / data.train.epoch_blocks,
                tokens=state.tokens,
            )
        report.event("checkpoint", step=state.step, reason=reason)

    def score(sets: dict[str, Any], blocks: int | None) -> dict[str, float]:
        """The loss on every held-out set; "loss" and the like are those of the first."""
        metrics: dict[str, float] = {}
        for name, held_out in sets.items():
            batches = EvalBatches(
                held_out,
                micro_batch_blocks=config.evaluate.micro_batch_blocks or sizes.micro_batch_blocks,
                rank=engine.rank,
                world_size=engine.world_size,
                limit=blocks,
                device=engine.device,
            )
            watch.beat("evaluate", state.step, allow_seconds=config.guard.stuck_seconds)
            with report.task(f"evaluating {name}", total=len(batches)) as advance:
                result = evaluate(engine, batches, byte_lengths=byte_lengths, on_micro_batch=advance)
            values = {
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
            }
            epoch = state.cursor.position / data.train.epoch_blocks
            report.evaluation(set=name, step=state.step, epoch=epoch, tokens=state.tokens, **values)
            known = {key: value for key, value in values.items() if value is not None}
            metrics = {**known, **metrics, **{f"{name}/{key}": value for key, value in known.items()}}
        return metrics

    def look() -> str | None:
        """Evaluate, show samples; why to stop early, or ``None``."""
        if data.valid:
            state.metrics = score(data.valid, config.evaluate.blocks)
            saves.record(state.step, state.metrics)
            state.stop_values.append(state.metrics[stopper.metric])
        with engine.full_model() as whole:
            if engine.is_main and data.encoder and config.evaluate.prompts:
                with report.pause():
                    count, prompts = config.evaluate.sample_tokens, config.evaluate.prompts
                    texts = generate.sample(whole, data.encoder, prompts, count, seed=config.seed)
                report.samples(state.step, list(zip(prompts, texts)))
        return stopper.reason(state.stop_values)

    def judge(*, lag_steps: int) -> guard.Action:
        """Hand the guard the steps whose numbers are ``lag_steps`` old: nothing waits for the device."""
        action = guard.Action()
        while pending and pending[0][0] <= state.step - lag_steps and action.kind not in ("rewind", "stop"):
            step, positions, numbers = pending.pop(0)
            loss_sum, labels, norm, applied = numbers.tolist()
            action = watch.after_step(step, positions, loss_sum / max(labels, 1), norm, bool(applied))
            if action.kind != "go":
                report.note(f"{action.kind}: {action.reason}")
                report.event(action.kind, step=step, reason=action.reason, positions=action.positions)
        return action

    def rewind(action: guard.Action) -> None:
        """Back to the checkpoint before the fault, never to see those positions again."""
        saves.wait()
        find = partial(find_before, folder, action.before_step, report)
        path = on_main(engine, find)
        kept = restore(path)
        watch.rewound(kept["guard"])
        state.cursor = state.cursor.with_skips(action.positions)
        pending.clear()
        report.rewind(step=state.step, state=kept["report"])
        if trackers:
            trackers.notify(f"{folder.path.name}: rewound to step {state.step}: {action.reason}")

    def read() -> Iterator[StepBatch]:
        return iter(
            Batches(
                data.train,
                cursor=state.cursor,
                global_batch_blocks=sizes.global_batch_blocks,
                micro_batch_blocks=sizes.micro_batch_blocks,
                rank=engine.rank,
                world_size=engine.world_size,
                end_position=sizes.end_position,
                workers=config.data.workers,
                prefetch=config.data.prefetch,
                pin_memory=config.data.pin_memory,
                device=engine.device,
            )
        )

    # ---- the loop
    watch.begin()  # from here on a signal sets a flag: there is something to save
    watch.watch(session=engine.broadcast_object(str(time.time_ns())))
    if config.evaluate.at_start and not found:
        look()
    gc.collect()
    gc.freeze()  # what stands now lives as long as the run: the collector need not look at it again
    verdict, why, batches = guard.Verdict(), None, read()
    while state.step < sizes.total_steps and (batch := next(batches, None)) is not None:
        # 1. the rate, before any backward: DeepSpeed updates inside the last one
        rate = rate_of(state.step)
        engine.set_learning_rate(rate)
        labels = batch.label_count
        if labels is None:  # the user's own data: only the labels themselves can tell
            labels = engine.sum_over_ranks(count_labels(batch, engine.device))

        # 2. every micro-batch; the gradient is that of the mean over all labels of all ranks
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for micro_batch, key in zip(batch.micro_batches, batch.keys):
            loss_sum, count = engine.forward(micro_batch, key)
            engine.backward(loss_sum, labels)
            sums += torch.stack([loss_sum.detach().double(), count.double()])

        # 3. clip, finite gate, optimizer: on the device, nothing waits for a number
        norm, applied = engine.update()
        state.step, state.cursor = state.step + 1, batch.cursor
        state.tokens += sizes.tokens_per_step
        first, last = batch.positions
        numbers = torch.stack([*engine.sum_over_ranks(sums), norm.double(), applied.double()])
        pending.append((state.step, (first, last + 1), numbers))

        # 4. what is due, agreed over the ranks
        watch.beat("step", state.step)
        ends = state.step == sizes.total_steps
        flags = watch.flags(reserve_seconds=saves.save_seconds) | due()
        flags = engine.agree(flags | (guard.FAULT if saves.failed else 0))
        verdict = watch.verdict(flags)
        report.step(
            step=state.step,
            epoch=batch.epoch,
            tokens=state.tokens,
            position=state.cursor.position,
            loss_sum=sums[0],
            count=sums[1],
            lr=rate,
            norm=norm,
            applied=applied,
            wait_seconds=batch.wait_seconds,
            due=bool(flags & LOG_DUE),
        )
        saving = verdict.save or bool(flags & SAVE_DUE) or ends
        action = judge(lag_steps=0 if saving else 1)
        if action.kind == "rewind":
            rewind(action)
            batches = read()
            continue
        if action.kind == "stop":
            raise FaultError(action.reason)

        # 5. save, then evaluate; leave if asked to
        if saving:
            save(verdict.checkpoint_reason or ("end" if ends else "interval"))
            watch.done(flags)
        if verdict.stop:
            break
        if (flags & EVALUATE_DUE and not ends) or (ends and config.evaluate.at_end):
            why = look()
        if int(batch.epoch) > int(batch.epoch - float(1 / sizes.steps_per_epoch)):
            report.epoch(epoch=int(batch.epoch), step=state.step, valid_loss=state.metrics.get("loss"))
        if why is not None:
            break

    # ---- close
    if verdict.stop:
        saves.wait(final=True)
        report.event("signal", step=state.step, reason=verdict.reason)
        if verdict.exit_code == EXIT_FAULT:
            raise FaultError(f"stopped at step {state.step}: {verdict.reason}")
        report.end(
            f"saved at step {state.step:,}: {verdict.reason}",
            [],
            commands=[("go on", "the same command again")],
        )
        close(watch, trackers)
        return verdict.exit_code, "saved", verdict.reason
    if why is not None:
        save("end")
        report.note(f"early stopping: {why}")
    saves.wait(final=True)  # exit code 0 only after the last checkpoint is committed and verified
    tests = score(data.test, None) if data.test else {}
    report.event("end", step=state.step, reason=why or "the horizon is reached")
    on_main(engine, partial(finish, config, folder, report, state, tests))
    if trackers:
        trackers.notify(f"{folder.path.name}: finished at step {state.step}")
    close(watch, trackers)
    return EXIT_FINISHED, "finished", why or "the horizon is reached"


def close(watch: guard.Guard, trackers: Trackers | None) -> None:
    """Let go of signals and trackers, in this order: a tracker that hangs must not hold a dead rank's alarm."""
    watch.close()
    if trackers:
        trackers.close()


def finish(
    config: RunConfig, folder: RunFolder, report: Report, state: State, tests: dict[str, float]
) -> None:
    """Rank 0: the export, the report, and the panel that says how to go on."""
    best = config.checkpoint.export == "best"
    chosen = checkpoint.find(folder.checkpoints, "best" if best else "auto", say=report.note)
    if chosen is None:
        raise FaultError(f"{folder.checkpoints} has no checkpoint to export")
    with chosen:
        exportable = config.model.factory is None
        if exportable:
            export(
                chosen,
                folder.path / "export",
                run_dir=folder.path,
                dtype=config.checkpoint.export_dtype,
                note=report.note,
            )
    page = write_report([read_run(folder.path)], folder.path / "report.html")
    results = [
        (key.replace("_", " "), f"{value:.4f}") for key, value in state.metrics.items() if "/" not in key
    ]
    results += [(f"test, {key}", f"{value:.4f}") for key, value in tests.items() if "/" in key]
    place = folder.path / "export" if exportable else chosen.path
    commands = [
        ("go on longer", f"python train_lm.py --config {folder.path}/config.yaml --train.duration ..."),
    ]
    if exportable:
        commands = [
            ("generate", f"python -m lmcore generate {folder.path} --prompt '...'"),
            ("load", f'AutoModelForCausalLM.from_pretrained("{place}")'),
            *commands,
        ]
    report.end("finished", [("model", str(place)), *results, ("report", str(page))], commands=commands)


# ------------------------------------------------------------------------------------------------------ small helpers


def find_checkpoint(
    config: RunConfig, folder: RunFolder, report: Report
) -> tuple[str, dict[str, Any]] | None:
    """Rank 0: the checkpoint to go on from and its state, verified; the past that it holds must not have changed."""
    if config.resume == "never":
        checkpoint.abandon_after(folder.checkpoints, -1, say=report.note)
        return None
    best = config.checkpoint.keep_best
    found = checkpoint.find(
        folder.checkpoints,
        config.resume,
        metric=best.metric if config.resume == "best" else None,
        mode=best.mode if config.resume == "best" else None,
        say=report.note,
    )
    if found is None:
        return None
    with found:
        changed = refuse_changes(changes(found.state["config"], flatten(config)), config.allow_changes)
        for change in changed:
            report.warn_once(
                f"{change.key} was {change.old} when step {found.step} was saved, is {change.new} now"
            )
        checkpoint.abandon_after(folder.checkpoints, found.step, say=report.note)
        return str(found.path), found.state


def find_before(folder: RunFolder, before_step: int | None, report: Report) -> str:
    """Rank 0: the newest good checkpoint before a faulty step; later ones are set aside."""
    found = checkpoint.find(folder.checkpoints, "auto", before_step=before_step, say=report.note)
    if found is None:
        raise FaultError(
            f"no checkpoint before step {before_step} to rewind to: the evidence is in metrics.jsonl"
        )
    with found:
        checkpoint.abandon_after(folder.checkpoints, found.step, say=report.note)
        return str(found.path)


def model_name(config: RunConfig) -> str:
    """What the user called the model."""
    return config.model.factory or config.model.from_pretrained or config.model.type or ""


def count_labels(batch: StepBatch, device: torch.device) -> Tensor:
    """Labels of this rank in one step, 0-dim int64."""
    counts = [(micro["labels"] != -100).sum() for micro in batch.micro_batches]
    return torch.stack(counts).sum().to(device)


def topology(engine: Engine) -> dict[str, Any]:
    """What a bit-exact continuation needs to be the same (law 13)."""
    return {
        "world_size": engine.world_size,
        "strategy": engine.strategy,
        "precision": engine.precision,
        "device": engine.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> int:
    """Run, and turn what was refused into one line for a person and an exit code for a script."""
    try:
        return run(CONFIG)
    except (RequestError, FaultError) as error:
        if CONFIG.debug:
            raise
        if IS_RANK_0:
            print(f"train_lm.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
