"""Train a causal language model on your own text: raw text in, a folder that transformers opens out.

    accelerate launch train_lm.py                                          # the demo: no data to fetch
    accelerate launch train_lm.py --config recipes/gpt2_small.yaml --data.train 'corpus/*.jsonl.zst'
    python train_lm.py --help                                              # every option

The script reads top to bottom: request, engine, data, model, restore, loop, close. The same command again
goes on from the newest good checkpoint. Exit codes: 0 finished, 2 a wrong request, 70 a fault that policy
ends, 75 saved at a signal or deadline (start me again); ``<run_dir>/status.json`` says the same for scripts.
"""

from __future__ import annotations

import os
import sys

from lmcore.config import parse
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_SAVED, FaultError, RequestError
from lmcore.run.guard import die_with_parent, left_on_request

IS_RANK_0 = os.environ.get("RANK", "0") == "0"

if __name__ == "__main__":  # --help, a typo and --print_config must not wait for torch, which takes seconds
    die_with_parent()  # from the first moment: a rank that still imports, or waits for the others, is an orphan too
    try:
        CONFIG = parse.parse(say=print if IS_RANK_0 else lambda line: None)
    except RequestError as refusal:
        if IS_RANK_0:
            print(f"train_lm.py: {refusal}", file=sys.stderr)
        sys.exit(refusal.exit_code)
    if left_on_request(CONFIG.run_dir or ""):  # a launcher's --max_restarts must not undo a wanted stop
        sys.exit(EXIT_SAVED)

import gc
import time
from functools import partial
from pathlib import Path

import torch

from lmcore.config.schema import RunConfig, flatten, to_yaml
from lmcore.engine.engine import Engine
from lmcore.model import schedules
from lmcore.model.module import parameter_counts
from lmcore.plan import plan
from lmcore.process import resident_bytes
from lmcore.report.redact import redact
from lmcore.report.report import Report, silence_other_bars
from lmcore.report.trackers import Trackers, tell
from lmcore.run import dev_run, setup
from lmcore.run.budget import horizon
from lmcore.run.folder import RunFolder, place
from lmcore.run.guard import EXIT_STUCK, FAULT, Guard, Verdict
from lmcore.run.planning import auto_micro_batch, plan_here, refuse_early
from lmcore.run.resume import find_checkpoint
from lmcore.run.setup import on_main
from lmcore.run.trainer import EVALUATE_DUE, LOG_DUE, SAVE_DUE, Session


def run(config: RunConfig) -> int:
    """Around one training: the processes, the run folder, and how it ended. Returns the exit code."""
    silence_other_bars()
    if config.dry_run:
        return dry_run(config)
    engine = setup.open_engine(config)
    assert config.run_dir is not None  # the command line has filled it in
    folder = RunFolder(config.run_dir, private=config.checkpoint.private)
    ours = False  # until the lock is had, status.json may be another job's
    try:
        on_main(engine, folder.lock)
        ours = engine.is_main
        with Report(folder.path, rank=engine.rank, world_size=engine.world_size) as report:
            code, state, reason, step = train(config, engine, folder, report)
        if engine.is_main:
            folder.write_status(state, step=step, exit_code=code, reason=reason)
        return code
    except (RequestError, FaultError) as error:
        if ours and (folder.path / "status.json").exists():
            failed(config, folder, error.exit_code, str(error))
        raise
    except Exception as error:  # a crash: Python's own exit code, and its traceback
        if ours:
            failed(config, folder, 1, f"{type(error).__name__}: {error}")
        raise
    except SystemExit as left:  # a signal while there was nothing to save yet: start me again
        if ours and left.code == EXIT_SAVED:
            folder.write_status("saved", exit_code=EXIT_SAVED, reason="a signal before the first step")
        raise
    finally:
        folder.unlock()
        engine.close()


def failed(config: RunConfig, folder: RunFolder, exit_code: int, reason: str) -> None:
    """The last word of a run that has failed: for scripts, and for whoever listens to the webhook."""
    try:
        folder.write_status("failed", exit_code=exit_code, reason=reason)
    finally:  # a full disk is a failure to tell of, too
        tell(config.report.webhook, redact(f"{folder.path.name}: failed: {reason}"))


def dry_run(config: RunConfig) -> int:
    """The plan, and nothing else; only a budget in epochs needs the token store, which is then built."""
    if IS_RANK_0:
        from lmcore.cli.plan import disk, plan_rows
        from lmcore.humanize import table

        home = Path(config.run_dir or "") / "tokenizer"
        given = {"processes": os.environ.get("WORLD_SIZE", "1")}
        rows = plan_rows(config, given, open_data=partial(setup.open_data, config, home))
        print(table([("run folder", str(home.parent)), *rows, disk(home.parent)]))
    return EXIT_FINISHED


def train(config: RunConfig, engine: Engine, folder: RunFolder, report: Report) -> tuple[int, str, str, int]:
    """One training. Returns the exit code; and the state, the reason and the step for ``status.json``."""
    guard = Guard(
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
    if config.fast_dev_run:
        on_main(engine, partial(dev_run.write_sample, config, folder.path))
        config = dev_run.shortened(config, folder.path)
    guard.install(training=False)  # nothing can be saved before the loop: a signal leaves at once
    report.capture_logging()
    found = on_main(engine, partial(find_checkpoint, config, folder, report))
    past = found[1] if found else {}

    on_main(engine, partial(refuse_early, config))

    # ---- data: text -> tokenizer -> token stores -> blocks; every rank takes its share of the work
    if engine.is_main:
        folder.write_status("preparing", step=past.get("step", 0))
    data = setup.open_data(
        config,
        folder.path / "tokenizer",
        rank=engine.rank,
        world_size=engine.world_size,
        on_main=partial(on_main, engine),
        note=report.note,
        task=report.task,
    )

    # ---- model and optimizer; the loaders are ours and are never given to accelerate (README: why)
    bytes_before = resident_bytes()
    module = setup.open_model(config, data, engine, note=report.note)
    counts = parameter_counts(module)
    flops_per_token = plan.model_flops_per_token(module, data.block_size)
    micro_batch = past.get("micro_batch_blocks") or auto_micro_batch(config, engine, module, data.block_size)
    sizes = horizon(
        config,
        block_size=data.block_size,
        epoch_blocks=getattr(data.train, "epoch_blocks", None),
        world_size=engine.world_size,
        micro_batch_blocks=micro_batch,
    )
    planned = plan_here(config, engine, module, sizes, data, note=report.note)
    engine.prepare(
        module,
        partial(setup.make_optimizer, config, module),
        gradient_accumulation=sizes.accumulation,
        micro_batch_blocks=sizes.micro_batch_blocks,
        clip_norm=config.optim.clip_norm,
    )
    learning_rate = partial(
        schedules.learning_rate,
        schedule=config.optim.schedule,
        peak=config.optim.lr,
        warmup_steps=sizes.steps_of(config.optim.warmup),
        total_steps=sizes.total_steps,
        decay_steps=sizes.steps_of(config.optim.decay),
        min_ratio=config.optim.min_lr_ratio,
    )

    # ---- restore, and say what is about to happen
    session = Session(
        config,
        engine=engine,
        folder=folder,
        report=report,
        guard=guard,
        data=data,
        sizes=sizes,
        module=module,
    )
    if found:
        past = session.restore(found[0])
        guard.load_state_dict(past["guard"])
    home = folder.path / "tokenizer"
    on_main(engine, partial(setup.keep_tokenizer, config, home, data, note=report.note))
    begin = session.state
    if engine.is_main:
        folder.write_status("running", step=begin.step)
        (folder.path / "config.yaml").write_text(redact(to_yaml(config)), encoding="utf-8")
        session.trackers = Trackers(
            config.report.trackers,
            folder.path,
            project=config.report.project,
            name=config.report.name,
            tags=config.report.tags,
            hyper_parameters=redact(flatten(config)),
            save_code=config.report.save_code,
            resume_step=begin.step if found else None,
            run_ids=past.get("trackers"),
            webhook=config.report.webhook,
            note=report.note,
        )
    report.start(
        [
            ("run folder", str(folder.path)),
            ("job", ", ".join(f"{name} {value}" for name, value in place().items())),
            ("model", f"{setup.model_name(config)}, {counts['total']:,} parameters"),
            *data.rows,
            *sizes.rows(config, engine.world_size),
            *engine.describe(),
            *(planned.beside_the_budget() if planned else []),
            ("begins at", f"step {begin.step:,}, position {begin.cursor.position:,}"),
        ]
    )
    report.begin(
        step=begin.step,
        total_steps=sizes.total_steps,
        tokens=begin.tokens,
        reduce=engine.sum_over_ranks,
        trackers=session.trackers,
        flops_per_token=flops_per_token,
        peak_flops_per_device=plan.peak_flops(engine.device_name, engine.precision),
        device=engine.device,
        bytes_before=bytes_before,
    )
    if found:
        report.load_state(past["report"])
    facts = {"position": begin.cursor.position, **place(), "plan": planned.numbers() if planned else {}}
    report.event("resume" if found else "start", step=begin.step, **facts)
    guard.begin()  # from here on a signal sets a flag: there is something to save
    guard.watch(
        session=engine.broadcast_object(str(time.time_ns())),
        on_end=partial(failed, config, folder, EXIT_STUCK),
    )
    why = None
    ended = begin.step == sizes.total_steps
    if found and (config.evaluate.at_end if ended else session.owes_a_look()):
        why = session.look()  # the run was ended between the save of this step and its evaluation
    elif config.evaluate.at_start and not found:
        session.look()
    gc.collect()
    gc.freeze()  # what stands now lives as long as the run: the collector need not look at it again

    # ---- the loop
    verdict, batches = Verdict(), session.read()
    with session.rescue():
        while (
            why is None
            and session.state.step < sizes.total_steps
            and (batch := next(batches, None)) is not None
        ):
            # 1. the rate, before any backward: DeepSpeed updates inside the last one
            rate = learning_rate(session.state.step)
            engine.set_learning_rate(rate)
            labels = session.label_count(batch)

            # 2. every micro-batch; the gradient is that of the mean over all labels of all ranks
            sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
            for micro_batch, key in zip(batch.micro_batches, batch.keys):
                loss_sum, count = engine.forward(micro_batch, key)
                engine.backward(loss_sum, labels)
                sums += torch.stack([loss_sum.detach().double(), count.double()])

            # 3. clip, finite gate, optimizer: on the device, nothing waits for a number
            epochs = int(session.epoch)
            norm, applied = engine.update(guard.norm_limit(session.state.step + 1))
            session.advance(batch, sums, norm, applied)
            step = session.state.step
            ends = step == sizes.total_steps

            # 4. what is due, agreed over the ranks: signals and clocks differ between them
            flags = guard.flags(reserve_seconds=session.saves.save_seconds) | session.due()
            flags = engine.agree(flags | (FAULT if session.saves.failed else 0))
            verdict = guard.verdict(flags)
            report.step(
                step=step,
                epoch=batch.epoch,
                tokens=session.state.tokens,
                position=session.state.cursor.position,
                loss_sum=sums[0],
                count=sums[1],
                lr=rate,
                norm=norm,
                applied=applied,
                wait_seconds=batch.wait_seconds,
                due=bool(flags & LOG_DUE),
            )

            # 5. was the step sound? Known one step late, so that nothing waits; but before anything is saved
            saving = verdict.save or bool(flags & SAVE_DUE) or ends
            action = session.judge(lag_steps=0 if saving else 1)
            if action.kind == "stop":
                raise FaultError(action.reason)
            if action.kind == "rewind":
                session.rewind(action)
                why = session.look() if session.owes_a_look() else None
                batches = session.read()
                continue

            # 6. save, then evaluate; leave if asked to
            if saving:
                session.save(verdict.checkpoint_reason or ("end" if ends else "interval"))
                guard.done(flags)
            if verdict.stop:
                break
            if config.evaluate.at_end if ends else flags & EVALUATE_DUE:
                why = session.look()
            if int(session.epoch) > epochs:
                known = session.state.metrics.get("loss"), session.state.metrics_step
                report.epoch(epoch=int(session.epoch), step=step, valid_loss=known[0], valid_step=known[1])
            if why is not None:
                break

    # ---- close
    if verdict.stop:
        session.saves.wait(final=True)
        report.event("signal", step=session.state.step, reason=verdict.reason)
        if verdict.exit_code == EXIT_FAULT:
            raise FaultError(f"stopped at step {session.state.step}: {verdict.reason}")
        report.end(f"saved at step {session.state.step:,}: {verdict.reason}; the same command goes on", [])
        session.close()
        return verdict.exit_code, "saved", verdict.reason, session.state.step
    if why is not None:
        report.note(f"stopped early, at step {session.state.step:,} of {sizes.total_steps:,}: {why}")
    why = why or "the horizon is reached"
    session.save("end")
    session.saves.wait(final=True)  # code 0 only after the last checkpoint is committed and verified
    tests = session.score(data.test)
    report.event("end", step=session.state.step, reason=why)
    session.finish(tests)
    session.notify(f"finished at step {session.state.step}: {why}")
    session.close()
    return EXIT_FINISHED, "finished", why, session.state.step


def main(config: RunConfig) -> int:
    """Run, and turn what was refused into one line for a person and an exit code for a script."""
    try:
        return run(config)
    except (RequestError, FaultError) as error:
        if config.debug:
            raise
        if IS_RANK_0:
            print(f"train_lm.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(CONFIG))
