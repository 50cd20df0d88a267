"""What ``slurm/train.sbatch`` decides, without a Slurm: small scripts that take notes stand for its commands.

The same decisions are shown on a real Slurm in ``test_cluster.py``; here each branch is reached in a moment.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((PROJECT / "slurm").glob("*.sbatch"))
JOB = "4711"

STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$NOTES"
case "$(basename "$0") $1" in
  "scontrol show") printf 'alpha\\nbeta\\n' ;;
  "scontrol requeue") kill -TERM 0 ;;  # Slurm ends the whole job
  squeue*) echo 2031-02-03T04:05:06 ;;
  scancel*) exit 1 ;;
esac
"""
SRUN = """#!/bin/bash
# Start the command "on both nodes"; then do what the test wants of the trainer.
while [ "$1" != bash ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done
. "$TRAINER"
"""


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``submit(trainer, *arguments, **environment)`` runs the template; ``trainer``: what the ranks do."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("scontrol", "squeue", "scancel", "accelerate", "python"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (stubs / "srun").write_text(SRUN)
    (stubs / "srun").chmod(0o755)
    (stubs / "python3").symlink_to(shutil.which("python3") or "/usr/bin/python3")

    def run(trainer: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "trainer").write_text(trainer)
        settings = {
            "PATH": f"{stubs}:/usr/bin:/bin",
            "NOTES": str(tmp_path / "notes"),
            "TRAINER": str(tmp_path / "trainer"),
            "RUN_DIR": str(tmp_path / "run"),
            "VENV": "none",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "32",
        }
        return subprocess.run(
            ["bash", str(PROJECT / "slurm" / "train.sbatch"), *arguments],
            env=settings | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            start_new_session=True,  # the stub of `scontrol requeue` signals its whole group
        )

    return run


def notes(tmp_path: Path, command: str) -> list[str]:
    """What the stub of this command was called with."""
    lines = (tmp_path / "notes").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(f"{command} ")]


def status(state: str, *, job: str = JOB, step: int = 10, checkpoint: bool = True, **more: object) -> str:
    """Shell lines of a trainer that ends in this state, having written a checkpoint at ``step``."""
    word = json.dumps({"state": state, "step": step, "job_id": f"SLURM_JOB_ID={job}.0"} | more)
    made = f"mkdir -p $RUN_DIR/checkpoints/step-{step:08d}\n" if checkpoint else ""
    code = more.get("exit_code", 0)
    return f"{made}echo {shlex.quote(word)} > $RUN_DIR/status.json\nexit {1 if code else 0}\n"


SAVED = {"exit_code": 75, "reason": "SIGUSR1"}


def test_finished_run_exits_with_zero(submit, tmp_path: Path) -> None:
    result = submit(status("finished", exit_code=0))
    assert result.returncode == 0, result.stdout
    assert "requeue 4711" not in notes(tmp_path, "scontrol")


def test_saved_run_is_requeued(submit, tmp_path: Path) -> None:
    result = submit(status("saved", **SAVED))
    assert f"requeue {JOB}" in notes(tmp_path, "scontrol"), result.stdout
    assert "saved at step-00000010: back into the queue" in result.stdout


@pytest.mark.parametrize(
    ("trainer", "code", "words"),
    [
        pytest.param(status("failed", exit_code=70, reason="loss is nan"), 70, "loss is nan", id="fault"),
        pytest.param(status("failed", exit_code=2, reason="no such key"), 2, "no such key", id="request"),
        pytest.param(status("running") + "\nexit 7", 1, "a crash", id="crash"),
        pytest.param("exit 9", 9, "before it wrote anything", id="silent"),
        pytest.param(status("saved", job="12", **SAVED), 1, "before it wrote anything", id="other_job"),
    ],
)
def test_failure_is_not_requeued(submit, tmp_path: Path, trainer: str, code: int, words: str) -> None:
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / f"slurm-{JOB}-alpha.log").write_text("the cause\n")
    result = submit(trainer.replace("exit 0", "exit 1"))
    assert result.returncode == code, result.stdout
    assert words in result.stdout
    assert "NOT REQUEUED" in result.stdout
    assert "the cause" in result.stdout
    assert f"requeue {JOB}" not in notes(tmp_path, "scontrol")


def test_status_of_the_previous_job_is_not_read_as_an_answer(submit, tmp_path: Path) -> None:
    """A trainer that crashes at the start leaves the words of its predecessor, which had the same job id."""
    submit(status("saved", **SAVED))
    result = submit("exit 1", SLURM_RESTART_COUNT="1")
    assert result.returncode == 1
    assert "before it wrote anything" in result.stdout


def test_requeues_without_progress_end(submit, tmp_path: Path) -> None:
    results = [
        submit(status("saved", time=str(i), **SAVED), SLURM_RESTART_COUNT=str(i)).stdout for i in range(3)
    ]
    assert [("back into the queue" in text) for text in results] == [True, True, False]
    assert "without one new checkpoint" in results[2]
    moved = submit(status("saved", step=20, **SAVED), SLURM_RESTART_COUNT="3")
    assert "back into the queue" in moved.stdout


def test_job_chain_without_progress_ends(submit, tmp_path: Path) -> None:
    """A margin as long as the piece: one step each time, for ever, would be a waste that looks like progress."""
    late = {"exit_code": 75, "reason": "the job's end time is near"}
    ends = str(int(time.time()) + 10_000)
    results = [
        submit(status("saved", step=i, **late), SLURM_RESTART_COUNT=str(i), SLURM_JOB_END_TIME=ends).stdout
        for i in range(1, 4)
    ]
    assert [("back into the queue" in text) for text in results] == [True, True, False]
    assert "with more than half of it left" in results[2]
    used = submit(status("saved", step=9, **late), SLURM_JOB_END_TIME=str(int(time.time())))
    assert "back into the queue" in used.stdout


def test_restarts_are_bounded(submit, tmp_path: Path) -> None:
    result = submit(status("saved", **SAVED), SLURM_RESTART_COUNT="5", MAX_RESTARTS="5")
    assert result.returncode == 75
    assert f"requeue {JOB}" not in notes(tmp_path, "scontrol")


def test_crash_is_retried_only_on_request_and_after_progress(submit, tmp_path: Path) -> None:
    crash = "exit 1\n"
    first = submit(status("running").replace("exit 0", crash), CRASH_RESTARTS="2")
    assert "crash at step-00000010: back into the queue" in first.stdout
    same = submit(status("running", time="later").replace("exit 0", crash), CRASH_RESTARTS="2")
    assert "a crash before the first new checkpoint" in same.stdout
    further = submit(status("running", step=20).replace("exit 0", crash), CRASH_RESTARTS="2")
    assert "crash at step-00000020: back into the queue" in further.stdout
    third = submit(status("running", step=30).replace("exit 0", crash), CRASH_RESTARTS="2")
    assert "a crash (CRASH_RESTARTS=2)" in third.stdout
    assert third.returncode == 1


def test_stopped_run_ends_the_chain(submit, tmp_path: Path) -> None:
    result = submit(status("saved", exit_code=75, reason="the file STOP"), SLURM_ARRAY_JOB_ID="99")
    assert result.returncode == 0
    assert f"requeue {JOB}" not in notes(tmp_path, "scontrol")
    assert "--quiet --state=PENDING 99" in notes(tmp_path, "scancel"), "the chain must not go on"


def test_job_of_a_chain_ends_where_it_saved(submit, tmp_path: Path) -> None:
    result = submit(status("saved", **SAVED), AFTER_SAVE="end")
    assert result.returncode == 0
    assert f"requeue {JOB}" not in notes(tmp_path, "scontrol")


def test_job_ended_by_slurm_is_not_requeued_twice(submit, tmp_path: Path) -> None:
    result = submit("kill -TERM $PPID; sleep 0.2; " + status("saved", **SAVED))
    assert result.returncode == 0, result.stdout
    assert "Slurm decides" in result.stdout
    assert f"requeue {JOB}" not in notes(tmp_path, "scontrol")


def test_run_in_a_bucket_is_judged_by_its_local_folder(submit, tmp_path: Path) -> None:
    trainer = status("saved", **SAVED).replace("$RUN_DIR", "$LOCAL_DIR")
    local = tmp_path / "local"
    result = submit(trainer, "--seed", "3", RUN_DIR="s3://bucket/run", LOCAL_DIR=str(local))
    assert f"requeue {JOB}" in notes(tmp_path, "scontrol"), result.stdout
    assert (local / "logs").is_dir()
    for launched in notes(tmp_path, "accelerate"):
        assert launched.endswith(f"--run_dir s3://bucket/run --local_dir {local} --seed 3")


def test_early_signal_is_forwarded_and_the_ranks_are_awaited(submit, tmp_path: Path) -> None:
    begin = time.monotonic()
    result = submit("kill -USR1 $PPID; sleep 1; " + status("saved", **SAVED))
    assert time.monotonic() - begin >= 1
    assert f"--quiet --signal=USR1 {JOB}" in notes(tmp_path, "scancel"), result.stdout
    assert f"requeue {JOB}" in notes(tmp_path, "scontrol")


def test_each_launcher_gets_its_own_rank_and_the_arguments_as_they_are(submit, tmp_path: Path) -> None:
    prompt = "a 'b' \"c\" $d  e"
    submit(
        status("finished"), "--evaluate.prompts", prompt, ACCELERATE_CONFIG="x/fsdp2.yaml", CONFIG="r.yaml"
    )
    first, second = notes(tmp_path, "accelerate")
    assert "--num_machines 2 --machine_rank 0 --main_process_ip alpha" in first
    assert "--num_processes 8" in first
    assert first.replace("--machine_rank 0", "--machine_rank 1") == second
    assert first.endswith(f"train_lm.py --config r.yaml --run_dir {tmp_path}/run --evaluate.prompts {prompt}")


def test_one_process_needs_no_launcher(submit, tmp_path: Path) -> None:
    submit(status("finished"), SLURM_NNODES="1", PROCESSES_PER_NODE="1")
    assert notes(tmp_path, "python")[0].startswith("train_lm.py --config")


def test_ports_differ_between_jobs_and_between_restarts(submit, tmp_path: Path) -> None:
    for job, restart in (("4711", "0"), ("4712", "0"), ("4711", "1"), ("24711", "2")):
        submit(status("finished", job=job), SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart)
    ports = [int(line.split("--main_process_port ")[1].split()[0]) for line in notes(tmp_path, "accelerate")]
    assert len(set(ports)) == 4
    assert all(10_000 <= port < 30_000 for port in ports)


def test_ranks_ignore_no_signal_but_the_launcher_ignores_usr1(submit, tmp_path: Path) -> None:
    """The launcher inherits SIG_IGN for USR1; the environment holds the end of the job and the threads."""
    probe = tmp_path / "bin" / "accelerate"
    probe.write_text('#!/bin/bash\nenv > "$NOTES.env"\ngrep SigIgn /proc/$$/status > "$NOTES.ignored"\n')
    submit(status("finished"), TZ="UTC")
    ignored = int((tmp_path / "notes.ignored").read_text().split()[1], 16)
    assert ignored & (1 << (signal.SIGUSR1 - 1))
    assert not ignored & (1 << (signal.SIGTERM - 1))
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "notes.env").read_text().splitlines() if "=" in line
    )
    assert environment["SLURM_JOB_END_TIME"] == "1927857906"
    assert environment["OMP_NUM_THREADS"] == "8"
    assert environment["SRUN_CPUS_PER_TASK"] == "32"
    assert environment["PET_SHUTDOWN_TIMEOUT"] == "120"
    assert "USR1" not in environment["PET_SIGNALS_TO_HANDLE"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_directives_stand_before_the_first_command(template: Path) -> None:
    """sbatch stops reading ``#SBATCH`` at the first command: one that stands later is silently ignored."""
    lines = template.read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[command:])
    assert os.access(template, os.R_OK)
    assert subprocess.run(["bash", "-n", str(template)], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script", [*TEMPLATES, PROJECT / "tests" / "slurm" / "install.sh"], ids=lambda p: p.name
)
def test_shellcheck(script: Path) -> None:
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("answer", ["exit 1", "exit 0", "echo N/A"])
def test_end_of_the_job_that_is_not_known_is_not_invented(submit, tmp_path: Path, answer: str) -> None:
    """``date`` takes an empty word for this morning's midnight: the run would think that its time is over."""
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/bash\n{answer}\n")
    submit('env > "$NOTES.env"')
    assert "SLURM_JOB_END_TIME" not in (tmp_path / "notes.env").read_text()


def test_end_of_the_job_is_asked_of_the_controller(submit, tmp_path: Path) -> None:
    submit('env > "$NOTES.env"', TZ="UTC")
    assert "SLURM_JOB_END_TIME=1927857906" in (tmp_path / "notes.env").read_text().splitlines()


def test_checkpoints_that_were_put_aside_are_no_progress(submit, tmp_path: Path) -> None:
    """A run that resumed from an older checkpoint goes on below the number that it put aside."""
    for suffix in ("abandoned-1", "damaged-1"):
        (tmp_path / "run" / "checkpoints" / f"step-00000900.{suffix}").mkdir(parents=True)
    for step in (400, 500, 600, 700):
        result = submit(status("saved", step=step, **SAVED))
        assert f"saved at step-{step:08d}: back into the queue" in result.stdout


def test_logs_are_shown_of_a_folder_with_a_space(submit, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / f"slurm-{JOB}-alpha.log").write_text("the cause\n")
    result = submit("exit 9", RUN_DIR=str(folder))
    assert "the cause" in result.stdout
    assert "can't read" not in result.stdout + result.stderr
