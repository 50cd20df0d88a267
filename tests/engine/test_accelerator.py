"""What a launcher asked for is compared with what accelerate has built, on accelerators that are not really built."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType

from lmcore.engine import accelerator, launch, zero
from lmcore.errors import RequestError


def built(kind: DistributedType, **more: Any) -> Any:
    """An accelerator, as far as it is asked."""
    return SimpleNamespace(
        **{"distributed_type": kind, "is_fsdp2": False, "num_processes": 2, "mixed_precision": "no"} | more,
        device=SimpleNamespace(type="cuda"),
    )


@pytest.mark.parametrize(
    ("made", "strategy", "precision", "words"),
    [
        # ZeRO on a CPU without gloo, FSDP2 with nothing but it: every process believes that it is alone, or is.
        (built(DistributedType.DEEPSPEED, num_processes=1), "zero2", "fp32", "2 processes but accelerate sees 1"),
        (built(DistributedType.NO), "fsdp2", "fp32", "fsdp2 was asked for but accelerate built single"),
        (built(DistributedType.FSDP), "fsdp2", "fp32", "accelerate built fsdp1.*fsdp2.yaml"),
        (built(DistributedType.MULTI_GPU), "fsdp2", "fp32", "accelerate built ddp.*fsdp2.yaml"),
        (built(DistributedType.MULTI_GPU), "zero3", "fp32", "accelerate built ddp.*zero3.yaml"),
        (built(DistributedType.MULTI_GPU), "ddp", "bf16", "precision bf16 was asked for but accelerate built no"),
    ],
)  # fmt: skip
def test_strategy_or_precision_other_than_asked_for_is_refused(
    made: Any, strategy: str, precision: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        accelerator.check(made, launch.Request(strategy=strategy, world_size=2), precision)


def test_strategy_as_asked_for_is_accepted() -> None:
    asked = launch.Request(strategy="fsdp2", world_size=2)
    made = built(DistributedType.FSDP, is_fsdp2=True, mixed_precision="bf16")
    assert accelerator.check(made, asked, "bf16") == "fsdp2"
    alone = built(DistributedType.NO, num_processes=1)
    assert accelerator.check(alone, launch.Request(strategy="ddp", world_size=1), "fp32") == "single"


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("env", "content", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, "exclude each other"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "other.json"}, {}, "engine.deepspeed is .* launcher says other.json"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"zero_optimization": {"stage": 2}}, "zero_stage 3 but .* says 2"),
        ({}, {"zero_optimization": {"stage": 0}}, "stage is 0: use 1, 2 or 3"),
        ({}, {}, "stage is None: use 1, 2 or 3"),
        ({}, {"zero_optimization": {"stage": 1}, "scheduler": {}}, "section 'scheduler': remove it"),
        ({}, {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is False: remove it"),
        ({}, "{", "is not valid JSON"),
    ],
)  # fmt: skip
def test_deepspeed_file_and_launcher_that_disagree_are_refused(
    tmp_path: Path, env: dict[str, str], content: Any, words: str
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RequestError, match=words):
        launch.request({**DEEPSPEED, **env}, str(path))


def test_deepspeed_without_a_file_takes_the_launchers_fields() -> None:
    """Plain ``--use_deepspeed``: accelerate's own default is stage 2; its offloading is taken over."""
    assert launch.request(DEEPSPEED, None).strategy == "zero2"
    fields = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    asked = launch.request(DEEPSPEED | fields, None)
    assert (asked.strategy, zero.offloads(asked.deepspeed or {})) == ("zero3", True)
