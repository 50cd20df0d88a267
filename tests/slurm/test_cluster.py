"""The templates of ``slurm/``, unmodified but for their variables, on a real Slurm with two nodes.

The slow ones (real time limits) are submitted first and looked at last, so that they overlap with the others.
All runs train the same small model on the CPU; runs of the same world size must agree to the last digit.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lmcore.report.metrics import read_metrics

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # cluster.py: the helper of these tests only

from cluster import ENDED, Cluster, missing  # noqa: E402 - after the path

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]

STEPS = 120
WORDS = (
    "slow",
    "brown",
    "tide",
    "seven",
    "quiet",
    "boats",
    "past",
    "old",
    "stones",
    "rain",
    "rings",
    "dark",
    "water",
)


class Lab:
    """The cluster, a folder for all runs, and what the tests ask about a run by its name."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.jobs: dict[str, int] = {}
        random = Random(1)
        text = "\n".join(" ".join(random.choices(WORDS, k=20)) for _ in range(800))
        (folder / "text.txt").write_text(text)
        self.recipe: dict[str, Any] = {
            "data": {
                "train": [str(folder / "text.txt")],
                "store_dir": str(folder / "stores"),
                "valid_fraction": 0.02,
                "block_size": 16,
                "processes": 1,
            },
            "tokenizer": {"vocab_size": 300},
            "model": {"factory": "paced:build"},
            "optim": {"lr": 0.01},
            "train": {"duration": f"{STEPS} steps", "global_batch_blocks": 8, "micro_batch_blocks": 2},
            "checkpoint": {"every": "50 steps"},
            "evaluate": {"every": "never", "at_end": False},
            "report": {"every": "1 steps", "trackers": []},
            "guard": {"stop_before_deadline_seconds": 5},
        }

    def submit(
        self,
        name: str,
        *options: str,
        script: str = "train.sbatch",
        run: str = "",
        seconds: float = 0.0,
        hold: dict[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        **environment: str,
    ) -> int:
        """Submit; ``seconds``: the length of a micro-batch; ``hold``: see paced.py. ``run``: its folder, if not
        ``name``."""
        recipe = self.folder / f"{name}.yaml"
        model = self.recipe["model"] | {"config": {"seconds": seconds, **(hold or {})}}
        recipe.write_text(json.dumps(self.recipe | {"model": model}))  # JSON is YAML
        settings = {
            "CPU": "1",
            "CONFIG": str(recipe),
            "RUN_DIR": str(self.folder / (run or name)),
            "VENV": sys.prefix,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
        }
        if not self.cluster.isolated:
            settings["MASTER_ADDR"] = "127.0.0.1"  # the nodes' names mean nothing on one host
        self.jobs[name] = self.cluster.sbatch(
            PROJECT / "slurm" / script,
            "--cpus-per-task=2",
            "--mem=2G",  # without it a job gets all memory of its nodes, and nobody can join it there
            f"--output={self.folder / name}.out",
            *options,
            arguments=arguments,
            environment=settings | environment,
        )
        return self.jobs[name]

    def said(self, name: str) -> str:
        """What the job's script has written; shown when a test fails."""
        log = self.folder / f"{name}.out"
        return log.read_text(errors="replace") if log.exists() else ""

    def step(self, name: str) -> int:
        """The last step that the run has logged; 0 before the first."""
        metrics = self.folder / name / "metrics.jsonl"
        records = read_metrics(metrics, kind="train") if metrics.exists() else []
        return records[-1]["step"] if records else 0

    def reach(self, name: str, step: int, seconds: float = 300) -> None:
        """Wait until the run has logged ``step``."""
        deadline = time.monotonic() + seconds
        while self.step(name) < step:
            state = self.cluster.state(self.jobs[name])
            late = state in ENDED or time.monotonic() > deadline
            if late and self.step(name) < step:
                raise AssertionError(
                    f"{name} is {state} at step {self.step(name)}, wanted step {step}\n"
                    f"{self.said(name)}\n{self.node_logs(name)}"
                )
            time.sleep(0.4)

    def finish(self, name: str, *states: str, seconds: float = 400) -> None:
        """Wait for the end of the job."""
        try:
            self.cluster.wait(self.jobs[name], *(states or ("COMPLETED",)), seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said(name)}\n{self.node_logs(name)}") from None

    def requeued(self, name: str, times: int, seconds: float = 200) -> None:
        """Wait until the job has been requeued so many times."""
        job = self.jobs[name]
        what = f"requeue {times} of {name}\n{self.said(name)}"
        self.cluster.wait_for(lambda: self.cluster.restarts(job) >= times, what, seconds=seconds)
        assert self.cluster.restarts(job) == times

    def node_logs(self, name: str) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}"
            for log in sorted((self.folder / name / "logs").glob("slurm-*.log"))
        )

    def losses(self, name: str) -> dict[int, float]:
        """The loss of every step, as the run went on with it."""
        records = read_metrics(self.folder / name / "metrics.jsonl", kind="train")
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return {record["step"]: record["loss"] for record in records}

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """All events of this kind, also of pieces whose steps were thrown away."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record.get("event") == event]

    def status(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "status.json").read_text())


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Cluster(nodes=2) as cluster:
        folder = cluster.folder / "runs"  # seen by all nodes, short, and removed with the cluster
        folder.mkdir()
        lab = Lab(cluster, folder)
        # The text is tokenized once, by two jobs that share the work; every run below opens the result.
        lab.submit("prepare", "--array=0-1", script="prepare.sbatch", run="prepared")
        for element in (0, 1):
            cluster.wait(f"{lab.jobs['prepare']}_{element}", "COMPLETED", seconds=300)
        # The slow ones: most of their time they wait, so they go along with everything else; on a node of their
        # own, because a guest that preempts them would give their next piece a new clock.
        one = ("--partition=apart", "--nodes=1", "--gpus-per-node=1")
        tracked = ("--report.trackers", "tensorboard")
        lab.submit("limit", *one, "--time=3", "--signal=B:USR1@60", seconds=0.3, arguments=tracked)
        deadline = ("--guard.stop_before_deadline_seconds", "58")
        lab.submit("deadline", *one, "--time=2", "--signal=B:CONT@1", seconds=0.15, arguments=deadline)
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> dict[int, float]:
    """The losses of a run on two nodes, one process on each, to which nothing happens."""
    lab.submit("undisturbed", "--nodes=2", "--gpus-per-node=1")
    lab.finish("undisturbed")
    return lab.losses("undisturbed")


@pytest.fixture(scope="module")
def alone(lab: Lab) -> dict[int, float]:
    """The losses of one process to which nothing happens."""
    lab.submit("alone", "--nodes=1", "--gpus-per-node=1")
    lab.finish("alone")
    return lab.losses("alone")


def test_two_nodes_train_like_one_node_with_as_many_processes(lab: Lab) -> None:
    lab.submit("two_nodes", "--nodes=2", "--gpus-per-node=2")
    lab.submit("one_node", "--nodes=1", "--gpus-per-node=4")
    lab.finish("two_nodes")
    lab.finish("one_node")
    two, one = lab.losses("two_nodes"), lab.losses("one_node")
    assert len(two) == STEPS
    assert two == one
    assert two[STEPS] < two[1] - 1, "it learns"


@pytest.mark.long
def test_soak_losses_equal_an_uninterrupted_run(lab: Lab, undisturbed: dict[int, float]) -> None:
    """Signals to ranks and script, a requeue, preemption, and a node that fails during preemption."""
    command = lab.cluster.command
    # After twelve steps of each piece all is slow, so that none comes to the end while it is looked at.
    hold = {"hold_after": 24, "hold_seconds": 0.5, "told": str(lab.folder / "morning")}
    job = lab.submit("night", "--nodes=2", "--gpus-per-node=1", seconds=0.05, hold=hold)

    lab.reach("night", 10)
    command("scancel", "--signal=USR1", str(job))  # to the ranks only
    lab.requeued("night", 1)
    first = lab.step("night")
    assert "back into the queue" in lab.said("night")

    lab.reach("night", first + 10)
    command("scancel", "--batch", "--signal=USR1", str(job))  # to the script only, like --signal=B:USR1@...
    lab.requeued("night", 2)
    assert "early signal: asking the ranks to save" in lab.said("night")

    lab.reach("night", lab.step("night") + 10)
    command("scontrol", "requeue", str(job))
    lab.requeued("night", 3)

    lab.reach("night", lab.step("night") + 10)
    guest = lab.cluster.sbatch(
        _sleeper(lab.folder, 15), "--partition=high", "--nodes=2", "--exclusive", environment={}
    )
    lab.requeued("night", 4)
    lab.cluster.wait(guest, "COMPLETED", seconds=200)

    lab.reach("night", lab.step("night") + 10)
    guest = lab.cluster.sbatch(
        _sleeper(lab.folder, 15),
        "--partition=high",
        "--nodes=1",
        "--nodelist=node1",
        "--exclusive",
        environment={},
    )
    command("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    lab.requeued("night", 5)
    command("scontrol", "update", "nodename=node2", "state=resume", check=False)  # it may be back already
    (lab.folder / "morning").touch()

    lab.finish("night")
    assert lab.losses("night") == undisturbed
    assert lab.status("night")["state"] == "finished"
    # The run knows where it was: the job, and how often it was restarted.
    starts = lab.events("night", "start") + lab.events("night", "resume")
    assert {record["job_id"] for record in starts} == {str(job)}
    assert [record["restart_count"] for record in starts] == [0, 1, 2, 3, 4, 5]
    assert {record["nodes"] for record in starts} == {"node[1-2]"}


def test_requeued_job_goes_on_from_a_bucket_with_an_empty_disk(lab: Lab, alone: dict[int, float]) -> None:
    hold = {"hold_after": 12, "hold_seconds": 0.5, "told": str(lab.folder / "on_the_second_disk")}
    url = f"file://{lab.folder}/bucket/spot"
    one = ("--nodes=1", "--gpus-per-node=1")
    job = lab.submit("spot", *one, seconds=0.05, hold=hold, RUN_DIR=url, LOCAL_DIR=str(lab.folder / "spot"))
    lab.reach("spot", 10)
    lab.cluster.command("scontrol", "requeuehold", str(job))
    lab.cluster.wait(job, "PENDING", seconds=60)
    (lab.folder / "spot").rename(lab.folder / "lost")  # the disk of the machine that was taken away
    (lab.folder / "on_the_second_disk").touch()
    lab.cluster.command("scontrol", "release", str(job))
    lab.finish("spot")
    assert lab.losses("spot") == alone
    assert lab.status("spot")["state"] == "finished"
    assert [record["restart_count"] for record in lab.events("spot", "resume")] == [1]


def test_failing_rank_ends_the_job_within_seconds(lab: Lab) -> None:
    arguments = (
        "--model.config.exit_code",
        "7",
        "--model.config.exit_rank",
        "3",
        "--model.config.after",
        "20",
    )
    job = lab.submit("failing", "--nodes=2", "--gpus-per-node=2", seconds=0.02, arguments=arguments)
    lab.reach("failing", 15)
    # A launcher that asked the others to save, and waited, would give them 120 s.
    lab.finish("failing", "FAILED", seconds=90)
    said = lab.said("failing")
    assert "the cause of it all" in said
    assert "NOT REQUEUED" in said
    assert lab.cluster.restarts(job) == 0
    _gone(lab, job)


def test_scancel_ends_at_once_and_leaves_a_run_that_goes_on(lab: Lab, undisturbed: dict[int, float]) -> None:
    two = ("--nodes=2", "--gpus-per-node=1")
    job = lab.submit("cancelled", *two, seconds=0.05)
    lab.reach("cancelled", 10)
    lab.cluster.command("scancel", str(job))
    lab.finish("cancelled", "CANCELLED", seconds=60)
    _gone(lab, job)
    again = lab.submit("cancelled", *two, seconds=0.05)
    assert again != job
    lab.finish("cancelled")
    assert lab.losses("cancelled") == undisturbed


def test_job_chain_finishes_in_three_jobs_and_the_fourth_ends_at_once(
    lab: Lab, alone: dict[int, float]
) -> None:
    job = lab.submit(
        "chain", "--array=1-4%1", "--nodes=1", "--gpus-per-node=1", script="train_chain.sbatch", seconds=0.05
    )
    for piece in (1, 2):
        lab.reach("chain", lab.step("chain") + 20)
        # Of an array, Slurm asks twice and then complains that the piece has ended, which is what was wanted.
        lab.cluster.command("scancel", "--batch", "--signal=USR1", f"{job}_{piece}", check=False)
        lab.cluster.wait(f"{job}_{piece}", "COMPLETED", seconds=200)
    lab.cluster.wait(f"{job}_3", "COMPLETED", seconds=300)
    assert lab.status("chain")["state"] == "finished"
    lab.cluster.wait(f"{job}_4", "COMPLETED", seconds=200)
    assert "piece 4 of 4: the run is finished: nothing to do" in lab.said("chain")
    assert lab.losses("chain") == alone


def test_two_jobs_on_one_node_and_two_jobs_on_one_run(lab: Lab) -> None:
    two = ("--nodes=1", "--nodelist=node1", "--gpus-per-node=2")
    lab.submit("left", *two, seconds=1.0)
    lab.submit("right", *two, seconds=1.0)
    lab.reach("left", 1)
    lab.reach("right", 1)  # both train at the same time: their ports differ
    holder = lab.status("left")
    intruder = lab.submit("intruder", "--nodes=1", "--gpus-per-node=1", run="left", seconds=0.5)
    lab.finish("intruder", "FAILED")
    assert "is in use by" in lab.said("intruder")
    assert lab.cluster.restarts(intruder) == 0
    assert lab.cluster.state(lab.jobs["left"]) == lab.cluster.state(lab.jobs["right"]) == "RUNNING"
    assert lab.status("left")["job_id"] == holder["job_id"], (
        "the second job must not touch the first one's run"
    )
    for name in ("left", "right"):
        lab.cluster.command("scancel", str(lab.jobs[name]))
        lab.finish(name, "CANCELLED")


def test_evaluate(lab: Lab, alone: dict[int, float]) -> None:
    result = lab.folder / "result.json"
    arguments = (
        "--data",
        f"all={lab.folder / 'text.txt'}",
        "--json",
        str(result),
        "--factory",
        "paced:build",
    )
    lab.submit("evaluate", "--gpus-per-node=0", script="evaluate.sbatch", run="alone", arguments=arguments)
    lab.finish("evaluate")
    assert "loss" in json.dumps(json.loads(result.read_text())), lab.said("evaluate")
    assert "loss" in lab.said("evaluate")


@pytest.mark.parametrize(
    "template", ["train.sbatch", "train_chain.sbatch", "prepare.sbatch", "evaluate.sbatch"]
)
def test_slurm_accepts_every_template(lab: Lab, template: str) -> None:
    options = [] if template == "prepare.sbatch" else ["--cpus-per-task=16"]  # what these nodes have
    if template == "prepare.sbatch":
        options = ["--cpus-per-task=8"]
    result = lab.cluster.command(
        "sbatch", "--test-only", *options, str(PROJECT / "slurm" / template), check=False
    )
    assert result.returncode == 0, result.stderr


def test_time_limit_costs_nothing(lab: Lab, alone: dict[int, float]) -> None:
    """Submitted first of all; its early signal came from Slurm itself, by the clock."""
    lab.finish("limit", seconds=600)
    assert lab.cluster.restarts(lab.jobs["limit"]) >= 1
    assert "early signal: asking the ranks to save" in lab.said("limit")
    assert lab.losses("limit") == alone
    # The tracker has gone on with the same run: every step once, whichever piece wrote it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(lab.folder / "limit" / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_training_stops_before_the_end_of_the_job(lab: Lab, alone: dict[int, float]) -> None:
    lab.finish("deadline", seconds=600)
    assert lab.cluster.restarts(lab.jobs["deadline"]) >= 1
    assert "the job's end time is near" in lab.said("deadline")
    assert "early signal" not in lab.said("deadline")
    assert lab.losses("deadline") == alone


def test_nothing_is_left_running(lab: Lab) -> None:
    """Last of all: no job, no process of a job, no node that is down."""
    lab.finish("limit", seconds=500)  # still running only where their own tests were not selected
    lab.finish("deadline", seconds=500)
    # A job is said to have ended a moment before its last process has.
    command = lab.cluster.command
    lab.cluster.wait_for(lambda: command("squeue", "-h").stdout == "", "an empty queue", seconds=90)
    lab.cluster.wait_for(lambda: not lab.cluster.processes(), "no process to be left", seconds=90)
    lab.cluster.wait_for(
        lambda: "down" not in command("sinfo", "-h", "-o", "%T").stdout, "all nodes to be up", seconds=90
    )


def test_slurm_cluster_leaves_no_processes() -> None:
    cluster = Cluster(nodes=1)
    with cluster:
        job = cluster.sbatch(_sleeper(cluster.folder, 600), environment={})
        cluster.wait(job, "RUNNING", seconds=90)
        # The controller says so before the node has started the script.
        cluster.wait_for(cluster.processes, "a process of the job", seconds=90)
    assert not cluster.folder.exists()
    assert cluster.processes() == []
    shutil.rmtree(cluster.folder, ignore_errors=True)


def _sleeper(folder: Path, seconds: int) -> Path:
    script = folder / "sleep.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --output=/dev/null\nsleep {seconds}\n")
    return script


def _gone(lab: Lab, job: int) -> None:
    """Its processes are: at most some seconds after the job is said to have ended."""
    lab.cluster.wait_for(lambda: not lab.cluster.processes(job=job), "the processes to be gone", seconds=60)
