"""The fork server is safe: a rank is as good as a fresh interpreter, and failures are told, not hung on."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.fork_server import RankFailure, run_ranks

COMPUTATION = """
import torch
torch.set_num_threads(2)
torch.manual_seed(5)
a = torch.randn(300, 300, requires_grad=True)
loss = torch.nn.functional.gelu(a @ a).square().mean()
loss.backward()
value = (float(loss), float(a.grad.double().abs().sum()))
"""


def compute() -> tuple[float, float]:
    names: dict = {}
    exec(COMPUTATION, names)
    return names["value"]


def server_threads() -> int:
    return int(os.environ["SERVER_THREADS"])


def summed(value: float) -> tuple[float, int]:
    dist.init_process_group("gloo")
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total), torch.initial_seed()


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        print("a last word")
        raise ValueError("on purpose")
    time.sleep(3600)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(3600)


def sleep() -> None:
    time.sleep(3600)


def test_fork_server_has_one_thread_when_it_forks() -> None:
    """Also after many forks and with work going on in the ranks: the condition under which fork is safe."""
    run_ranks(compute, 1)
    assert run_ranks(server_threads, 3) == [1, 1, 1]


def test_forked_rank_computes_what_a_fresh_interpreter_computes() -> None:
    """Bit for bit, with several threads and a backward pass: thread pools start anew in the fork."""
    fresh = subprocess.run(
        [sys.executable, "-c", COMPUTATION + "print(*map(repr, value))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run_ranks(compute, 1)[0] == tuple(map(float, fresh.stdout.split()))


def test_ranks_communicate_and_share_no_state() -> None:
    (total_0, seed_0), (total_1, seed_1) = run_ranks(summed, 2, 1.5)
    assert total_0 == total_1 == 4.5
    assert seed_0 == seed_1  # torch's own default: nothing was drawn or seeded in the server


def test_failure_in_a_child_carries_its_traceback_and_output() -> None:
    """Rank 0 sleeps for an hour: if it were waited for, the time would be up."""
    with pytest.raises(RankFailure, match=r"rank 1 raised(?s:.*)on purpose(?s:.*)a last word"):
        run_ranks(fail_on_rank_one, 2)


def test_dead_and_hanging_ranks_are_reported() -> None:
    with pytest.raises(RankFailure, match="rank 1 died"):
        run_ranks(die_on_rank_one, 2)
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] did not end within 1 s"):
        run_ranks(sleep, 2, timeout=1)
