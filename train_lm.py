"""Train a causal language model on your own text. The input is raw text, the output a folder that transformers opens.

    accelerate launch train_lm.py                                              # the demo: no data to fetch
    accelerate launch train_lm.py --data.train 'mytext/*.txt'                  # your own text, on what the machine has
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train_lm.py --config recipes/gpt2_small.yaml
    sbatch --nodes 2 slurm/train.sbatch --config recipes/gpt2_small.yaml       # two nodes
    python train_lm.py --help                                                  # every option

The same command again resumes from the newest good checkpoint, on any number of devices. Exit codes: 0 finished,
2 a wrong request, 70 ended by a fault (of the numbers, the data or the disk), 75 saved at a signal or deadline: run the same
command again. ``<run_dir>/status.json`` says the same for scripts.

Where to find things: options in lmcore/config, text to batches in lmcore/data, model and loss in lmcore/model, DDP, FSDP2 and
ZeRO in lmcore/engine, checkpoints in lmcore/checkpoint, everything around a step in lmcore/run.
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
        # Set them before the backward passes: DeepSpeed updates the weights inside the last one.
        engine.set_learning_rate(run.learning_rate())
        engine.set_momentum(run.momentum())
        engine.set_weight_decay(run.weight_decay())

        # The gradient is that of the mean over all labels of all ranks. The model returns sums of losses, because
        #     sum over ranks and micro-batches of the loss sums / labels of the step
        # does not depend on how the global batch is split. The only division is in engine.backward. A mean of means would
        # weight a label by the number of labels in its micro-batch.
        loss = LossSum(engine.device)
        for micro_batch, key in zip(batch.micro_batches, batch.keys):
            # The key is the position of the micro-batch in the run. It seeds dropout, so that the rank does not matter.
            loss_sum, count = engine.forward(micro_batch, key)
            engine.backward(loss_sum, batch.label_count)
            loss.add(loss_sum, count)

        # Clip, and update if the norm is finite. This is decided on the device, so the host does not wait.
        grad_norm, applied = engine.update(run.norm_limit)
        run.record(batch, loss=loss, grad_norm=grad_norm, applied=applied)

        due = run.due()  # the same answer on every rank: clocks and signals differ between them
        # Too many steps were not finite, or the loss jumped: go back to the last good checkpoint, and skip these blocks.
        if due.rewind:
            run.rewind(due.rewind)
        # All steps up to here were checked. Save before the evaluation, so that an interruption costs only the evaluation.
        if due.save:
            run.save(due.save)
        if due.evaluate:
            run.evaluate()
    run.finish()


def main(config: RunConfig, loop: Callable[[Run], None] = train) -> int:
    """Set up the run and train with ``loop``. Returns the exit code."""
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
    # Parse the options before torch is imported, which takes seconds, so that --help and typos are answered at once.
    sys.exit(main(parse_or_exit()))
