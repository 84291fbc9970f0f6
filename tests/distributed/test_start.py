"""Processes of one start find one another, among what dead ones left in the store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from gpt2.distributed import start
from gpt2.distributed.start import agree_on_start
from gpt2.errors import UserError

ALIKE = {"host": "a", "dtype": "bf16", "device": "cuda"}


def meet(
    store: dist.Store,
    size: int,
    facts: Callable[[int], dict[str, str]] = lambda rank: ALIKE,
    problem: Callable[[int], str | None] = lambda rank: None,
    seconds: float = 30,
) -> list[str]:
    """What each of so many processes makes of a start: its name, or why there is none."""

    def one(rank: int) -> str:
        try:
            return agree_on_start(store, rank, size, facts(rank), problem(rank), timedelta(seconds=seconds))
        except UserError as error:
            return f"error: {error}"

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_each_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    starts = [meet(store, 3) for _ in range(3)] + [meet(store, 2), meet(store, 3)]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == 5


def test_a_new_rank_0_takes_over_who_had_answered_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_RECHECK_SECONDS", 0.2)
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(agree_on_start, store, 1, 2, ALIKE, None, timedelta(seconds=30))
        while not store.check(["hello/1"]):
            time.sleep(0.01)
        number = json.loads(store.get("hello/1"))["number"]
        store.set(f"ping/{number}", "dead")
        store.wait([f"pong/dead/{number}"])
        assert agree_on_start(store, 0, 2, ALIKE, None, timedelta(seconds=30)) == one.result()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_the_dead_have_written_is_not_met(late: int) -> None:
    # The last start's hellos are all there; whoever comes first must wait for the one that is really alive.
    store = dist.HashStore()
    before = meet(store, 3)
    names: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: names.update(
                {rank: agree_on_start(store, rank, 3, ALIKE, None, timedelta(seconds=30))}
            )
        )
        for rank in range(3)
    ]
    for rank in {0, 1, 2} - {late}:
        threads[rank].start()
    time.sleep(0.3)
    assert not names
    threads[late].start()
    for thread in threads:
        thread.join()
    assert len(set(names.values())) == 1
    assert names[0] != before[0]


def test_a_difference_is_refused_by_name_in_every_process() -> None:
    found = meet(
        dist.HashStore(), 3, lambda rank: {**ALIKE, "host": f"n{rank}", "dtype": "fp32" if rank == 2 else "bf16"}
    )
    assert set(found) == {
        "error: rank 0 on n0 has dtype bf16; rank 2 on n2 has dtype fp32: every process must have the same; "
        "start them alike"
    }


def test_one_machine_without_its_device_stops_all() -> None:
    found = meet(dist.HashStore(), 3, problem=lambda rank: "no GPU here" if rank == 1 else None)
    assert set(found) == {"error: rank 1: no GPU here"}


def test_who_does_not_come_is_named() -> None:
    store = dist.HashStore()
    with pytest.raises(UserError, match="of 3 processes, rank 1, 2 did not come"):
        agree_on_start(store, 0, 3, ALIKE, None, timedelta(seconds=0.2))
    with pytest.raises(UserError, match="rank 1 waited 0 s for rank 0, or for rank 0 to find all 3"):
        agree_on_start(dist.HashStore(), 1, 3, ALIKE, None, timedelta(seconds=0.2))


def test_a_second_rank_0_sends_the_first_away() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree_on_start, store, 0, 2, ALIKE, None, timedelta(seconds=30))
        while not store.check(["hello/0"]):
            time.sleep(0.01)
        names = meet(store, 2)
        assert len(set(names)) == 1
        with pytest.raises(UserError, match="another process has started as rank 0"):
            first.result()


def test_a_thousand_ranks_in_a_few_requests_each() -> None:
    requests: dict[int, int] = {}

    class Counting(dist.HashStore):
        """Counts what each rank asks of the store; the ranks are threads."""

        def wait(self, *args: object) -> None:
            name = threading.current_thread().name
            requests[name] = requests.get(name, 0) + 1  # type: ignore[index, call-overload]
            super().wait(*args)  # type: ignore[arg-type]

    names = meet(Counting(), 1000, seconds=600)
    assert len(set(names)) == 1, set(names)
    assert max(requests.values()) <= 12
