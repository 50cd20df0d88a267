"""The campaign of kills and store faults against a run folder in a bucket, in its short form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fork_server import run_ranks


def run_campaign(kills: int, faults: int, manifest_first: bool) -> dict[str, Any]:
    """In a process of one thread, whose forks are safe."""
    from benchmarks.faults import bucket
    from lmcore.checkpoint.manifest import MANIFEST
    from lmcore.checkpoint.remote import FOLDER, RemoteCheckpoints

    real = RemoteCheckpoints.put

    def put(self, folder, **options):
        self.store.write(f"{FOLDER}/{folder.name}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        return real(self, folder, **options)

    if manifest_first:
        RemoteCheckpoints.put = put
    return bucket.campaign(kills=kills, faults=faults, max_seconds=200)


@pytest.mark.slow
def test_no_checkpoint_is_lost_or_mixed() -> None:
    [found] = run_ranks(run_campaign, 1, 20, 100, False)
    assert (found["lost"], found["mixed"]) == (0, 0)
    assert found["kills"] >= 20
    assert sum(found["faults"].values()) >= 100


@pytest.mark.long
@pytest.mark.slow
def test_manifest_that_is_put_first_is_found_by_the_campaign() -> None:
    """The campaign can fail: with the manifest ahead of the files it counts mixed checkpoints."""
    [found] = run_ranks(run_campaign, 1, 30, 0, True)
    assert found["mixed"] > 0
