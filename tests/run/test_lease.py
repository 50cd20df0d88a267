"""The lease of a run folder in a bucket: one holder, taken over from the dead, found when it is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lmcore.errors import FaultError, RequestError
from lmcore.run import lease as leases
from lmcore.run.lease import Lease
from lmcore.storage import Store

BEAT_SECONDS = 0.1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield Store(f"memory://{tmp_path.name}/run", attempts=2, sleep=lambda _: None)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def lease_of(store: Store, host: str, notes: list[str] | None = None) -> Lease:
    """A lease of another machine."""
    made = Lease(
        store, note=(notes if notes is not None else []).append, beat_seconds=BEAT_SECONDS, silent_beats=4
    )
    made.holder |= {"host": host, "boot": host, "job_id": None}
    return made


def test_living_holder_is_not_replaced(store: Store) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.take(*first.last())
    first.start()
    with pytest.raises(RequestError, match=r"in use by pid \d+ on one"):
        second.take(*second.last())
    first.check()
    first.release()


def test_released_lease_is_taken_at_once(store: Store) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.take(*first.last())
    first.release()
    begin = time.monotonic()
    second.take(*second.last())
    assert time.monotonic() - begin < BEAT_SECONDS
    assert second.number == 2


def test_silent_holder_is_replaced_and_finds_out(store: Store) -> None:
    notes: list[str] = []
    first, second = lease_of(store, "one"), lease_of(store, "two", notes)
    first.take(*first.last())  # and never beats: its machine is gone
    second.take(*second.last())
    assert "took over the lease of" in notes[-1]
    with pytest.raises(FaultError, match=r"taken over by .* on two"):
        first.check()
    assert first.lost
    first.release()  # says nothing to the new holder
    second.check()


def test_beats_of_a_lost_lease_stop(store: Store) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.take(*first.last())
    first.start()
    second.take(first.number, {"released": True})
    until = time.monotonic() + 5
    while not first.lost and time.monotonic() < until:
        time.sleep(0.01)
    assert first.lost


def test_of_many_that_start_at_once_one_holds_it(store: Store) -> None:
    taken: list[str] = []
    barrier = threading.Barrier(8)

    def start(host: str) -> None:
        lease = lease_of(store, host)
        found = lease.last()
        barrier.wait()
        try:
            lease.take(*found)
            taken.append(host)
        except RequestError:
            pass

    threads = [threading.Thread(target=start, args=(f"host-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert json.loads(store.read("lease/00000001.json"))["host"] == taken[0]


def test_listing_that_is_out_of_date_does_not_give_the_lease_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.take(*first.last())
    first.start()
    monkeypatch.setattr(Store, "names", lambda *_: [])
    with pytest.raises(RequestError, match="in use"):
        second.take(*second.last())
    first.release()


def test_clocks_that_differ_by_days_do_not_matter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.take(*first.last())
    first.start()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(RequestError, match="in use"):
        second.take(*second.last())
    first.release()


@pytest.mark.parametrize("same_pids", [True, False])
def test_pid_of_another_container_says_nothing(store: Store, same_pids: bool) -> None:
    """With the network of the machine, two containers have one host name and one boot, and each has a process 1."""
    first, second = Lease(store, beat_seconds=BEAT_SECONDS), Lease(store, beat_seconds=BEAT_SECONDS)
    first.holder["job_id"] = second.holder["job_id"] = None
    if not same_pids:
        first.holder["pids"] = "pid:[1]"
    first.take(*first.last())
    first.start()
    if same_pids:  # the pid is this process's own: whoever had it is gone
        second.take(*second.last())
        assert second.number == 2
    else:
        with pytest.raises(RequestError, match="in use"):
            second.take(*second.last())
    first.release()


def test_same_job_takes_its_own_lease(store: Store) -> None:
    first, second = lease_of(store, "one"), lease_of(store, "two")
    first.holder["job_id"] = second.holder["job_id"] = "SLURM_JOB_ID=7"
    first.take(*first.last())
    begin = time.monotonic()
    second.take(*second.last())
    assert time.monotonic() - begin < BEAT_SECONDS


def test_without_conditional_puts_a_warning_and_the_last_writer_wins(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.01)
    notes: list[str] = []
    first, second = lease_of(store, "one", notes), lease_of(store, "two")
    store.exclusive = False
    found = first.last()
    first.take(*found)
    assert "cannot decide between two runs" in notes[0]
    # The second has looked before the first wrote, and writes over it.
    real = Store.create

    def overwrite(self: Store, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(Store, "create", overwrite)
    second.take(*found)
    monkeypatch.setattr(Store, "create", real)
    second.check()
    with pytest.raises(FaultError, match=r"taken over by .* on two"):
        first.check()


def test_damaged_lease_object_is_watched_like_any_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("lease/00000001.json", b"{torn")
    lease = lease_of(store, "two")
    lease.take(*lease.last())
    assert lease.number == 2


@pytest.mark.parametrize("flipped", range(0, 200, 7))
def test_byte_that_flips_on_the_way_does_not_make_a_dead_holder_live(
    store: Store, monkeypatch: pytest.MonkeyPatch, flipped: int
) -> None:
    """In the number of beats, in a name, or in what makes it JSON; in the first reading, or in a later one."""
    first = lease_of(store, "one")
    first.take(*first.last())
    real, count = Store.read, 0

    def read(self: Store, name: str) -> bytes:
        nonlocal count
        data = real(self, name)
        count += 1
        place = flipped % len(data)
        return data if count % 3 else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    monkeypatch.setattr(Store, "read", read)
    second = lease_of(store, "two")
    second.take(*second.last())
    assert second.number == 2
