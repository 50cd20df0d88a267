"""Train a causal language model on your own text: raw text in, a folder that transformers opens out.

    accelerate launch train_lm.py                                              # the demo: no data to fetch
    accelerate launch train_lm.py --data.train 'mytext/*.txt'                  # your own text, on what the machine has
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train_lm.py --config recipes/gpt2_small.yaml
    sbatch --nodes 2 slurm/train.sbatch --config recipes/gpt2_small.yaml       # two nodes
    python train_lm.py --help                                                  # every option

The same command again resumes from the newest good checkpoint, on any number of devices. Exit codes: 0 finished,
2 a wrong request, 70 ended by a numerical or data problem (``guard.*``), 75 saved at a signal or deadline: run the same
command again. ``<run_dir>/status.json`` holds the same for scripts.

Where things happen: options lmcore/config, text to batches lmcore/data, model and loss lmcore/model, DDP, FSDP2 and
ZeRO lmcore/engine, checkpoints lmcore/checkpoint, everything around a step lmcore/run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lmcore.errors import one_line_errors
from lmcore.run.start import parse_or_exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcore.config.schema import RunConfig
    from lmcore.run.trainer import Run


def train(run: Run) -> None:
    """Train until the budget is spent or there is a reason to stop."""
    from lmcore.run.trainer import LossSum

    engine = run.engine
    for batch in run.batches():  # from the cursor on; after a rewind, from the checkpoint's cursor
        # The rates come first: DeepSpeed updates inside the last backward.
        engine.set_learning_rate(run.learning_rate())
        engine.set_momentum(run.momentum())
        engine.set_weight_decay(run.weight_decay())

        # The gradient of the mean over all labels of all ranks. Losses travel as sums:
        #     sum over ranks and micro-batches of the loss sums / labels of the step
        # is one number, however the global batch is cut. The one division is in engine.backward; a mean of means
        # would weigh a label by how full its micro-batch is.
        loss = LossSum(engine.device)
        for micro_batch, key in zip(batch.micro_batches, batch.keys):
            # The key is the micro-batch's place in the whole run: it seeds dropout, whichever rank computes it.
            loss_sum, count = engine.forward(micro_batch, key)
            engine.backward(loss_sum, batch.label_count)
            loss.add(loss_sum, count)

        # Clip, and update unless the norm is not finite: decided on the device, the host waits for nothing.
        grad_norm, applied = engine.update(run.norm_limit)
        run.record(batch, loss=loss, grad_norm=grad_norm, applied=applied)

        due = run.due()  # the same answer on every rank: clocks and signals differ between them
        # Too many steps were not finite: back to the last good checkpoint, and past their blocks
        if due.rewind:
            run.rewind(due.rewind)
        # Its steps were found sound; and it comes before the evaluation, so that an interruption costs only that.
        if due.save:
            run.save(due.save)
        if due.evaluate:
            run.evaluate()
    run.finish()


def main(config: RunConfig, loop: Callable[[Run], None] = train) -> int:
    """Set the run up and train by ``loop``. Returns the exit code."""
    with one_line_errors(show_traceback=config.debug):
        if config.dry_run:
            from lmcore.cli.plan import dry_run

            return dry_run(config)

        from lmcore.run.trainer import Run

        with Run(config) as run:  # processes, run folder, signals; on leaving: status.json, exit code
            run.open_data()  # text -> tokenizer -> token stores -> blocks
            run.build_model()  # model and loss, budget, optimizer, all wrapped by the strategy
            run.restore()  # the newest verified checkpoint, or step 0
            run.announce()  # the start table
            loop(run)
        return run.exit_code


if __name__ == "__main__":
    # The options first: --help, a typo and --print_config answer before torch is imported, which takes seconds.
    sys.exit(main(parse_or_exit()))
