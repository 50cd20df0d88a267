"""After the last step: the export, the report page, and the panel with the commands that use the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lmcore.checkpoint import reader
from lmcore.checkpoint.manifest import Hashes, hashes_here
from lmcore.errors import FaultError
from lmcore.humanize import message_of
from lmcore.report.console import shell_command, training_command
from lmcore.report.html import expected_loss, read_run, write_report
from lmcore.saved.export import export

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig
    from lmcore.report.report import Report
    from lmcore.run.folder import RunFolder


@contextlib.contextmanager
def _trained_all_the_same(step: int, what: str, command: str) -> Iterator[None]:
    """Turn an error after the last step into a ``FaultError`` (70) that names the command to finish the work."""
    try:
        yield
    except Exception as error:  # any library that draws, converts or writes
        why = message_of(error) or type(error).__name__
        raise FaultError(
            f"the training is finished and its checkpoint of step {step} is saved, but {what} failed: {why}; when "
            f"that is fixed, this does the rest: {command}"
        ) from error


def write_results(
    config: RunConfig,
    folder: RunFolder,
    report: Report,
    *,
    averaged: bool,
    hashes: Hashes = hashes_here,
    prompts: Sequence[str] = (),
) -> None:
    """Export the model and write ``report.html``; rank 0 calls this once the last checkpoint is committed.

    Args:
        averaged: export the moving average instead of the weights, if the checkpoint has one.
        hashes: computes the hashes of files; the ranks share this work.
        prompts: the prompts of the samples; the first one is used in the suggested generate command.

    Raises:
        FaultError: there is no checkpoint, or the export or the report could not be written. The checkpoint is kept.
    """
    path = folder.path
    which = "best" if config.checkpoint.export == "best" else "auto"
    chosen = reader.find(folder.checkpoints, which, note=report.note, hashes=hashes)
    if chosen is None:
        raise FaultError(f"no checkpoint in {folder.checkpoints} to export")
    with chosen:
        place = chosen.path
        if averaged and not chosen.keys("ema"):
            report.note(
                f"the checkpoint of step {chosen.step} is from before optim.ema_decay was set and has no moving average: its weights "
                "are exported"
            )
            averaged = False
        if config.model.factory is None:
            weights = ["--weights", "ema"] if averaged else []
            dtype = (
                []
                if config.checkpoint.export_dtype == "fp32"
                else ["--dtype", config.checkpoint.export_dtype]
            )
            best = ["--checkpoint", "best"] if which == "best" else []
            command = shell_command("lmcore", "export", path, *best, *dtype, *weights)
            with _trained_all_the_same(chosen.step, "the export", command):
                place = export(
                    chosen,
                    path / "export",
                    run_dir=path,
                    dtype=config.checkpoint.export_dtype,
                    weights="ema" if averaged else "model",
                    note=report.note,
                )
        with _trained_all_the_same(chosen.step, "the report", shell_command("lmcore", "report", path)):
            found = read_run(path)
            page = write_report([found], path / "report.html")
    rows = [("model", str(place)), ("report", str(page))]
    if (expected := expected_loss(found)) is not None:
        rows.insert(0, ("expected loss", expected))
    commands = [
        ("continue", training_command("--config", path / "config.yaml", "--train.duration", "N")),
    ]
    if config.model.factory is None:
        first = next((line.strip() for text in prompts for line in text.splitlines() if line.strip()), "")
        asked = ["--prompt", first] if first else []  # without a prompt the command asks for one
        commands = [
            ("generate", shell_command("lmcore", "generate", path, *asked)),
            ("load", f"AutoModelForCausalLM.from_pretrained({str(place)!r})"),
            *commands,
        ]
    report.end("finished", rows, commands=commands)
