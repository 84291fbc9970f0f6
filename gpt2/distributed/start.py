"""How the processes of one start find one another, in a store that has seen other starts.

torchrun's store lives as long as its agents do, and holds what processes that died have written. Neither the number of
restarts that an agent counts nor the number of processes names a start: each agent counts its own failures alone, and
a machine may leave and come back. So rank 0 draws a name, and gives it only to processes that have just answered:

    rank r → hello/r: a number drawn by this very process, and what it will compute with
    rank 0 → ping/NUMBER for each hello: the START it has drawn; a process that is alive answers with pong/START/NUMBER
    rank 0 → go/NUMBER for all of them, once all have answered: that start, or why there is none
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from gpt2.errors import UserError

_POLL_SECONDS = 0.05  # of rank 0 alone; the others wait in the store
_RECHECK_SECONDS = 10.0


def agree_on_start(
    store: Store, rank: int, size: int, facts: Mapping[str, str], problem: str | None, timeout: timedelta
) -> str:
    """Wait for all processes of this start, and make sure that they will compute alike.

    Args:
        store: shared by all of them, and with earlier starts.
        rank: this process's.
        size: how many there are.
        facts: what must be the same in all processes, by name.
        problem: why this process cannot take part; no process starts then.
        timeout: how long to wait for the others.

    Returns:
        A name that no other start has.

    Raises:
        UserError: some process has a problem, or differs from rank 0, in every process; or some did not come.
    """
    number = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    store.set(f"hello/{rank}", json.dumps({"number": number, "facts": dict(facts), "problem": problem}))
    if rank == 0:
        hellos = _gather(store, number, size, deadline)
        answer = {"start": number, "refusal": _refusal(hellos)}
        for hello in hellos:
            store.set(f"go/{hello['number']}", json.dumps(answer))
    else:
        if not _answer_pings(store, number, deadline):
            raise UserError(
                f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0, or for rank 0 to find all {size} "
                "processes; look at the other machines' logs, and start again",
                alone=True,
            )
        answer = json.loads(store.get(f"go/{number}"))
    if answer["refusal"] is not None:
        raise UserError(answer["refusal"])
    return str(answer["start"])


def _answer_pings(store: Store, number: str, deadline: float) -> bool:
    """Answer rank 0 until it lets this process go; whether it did so in time."""
    answered = ""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(dist.DistStoreError):  # nothing yet: look whether another rank 0 has come meanwhile
            seconds = math.ceil(
                min(left, _RECHECK_SECONDS)
            )  # some stores take less than one for none, and wait for ever
            store.wait([f"{'go' if answered else 'ping'}/{number}"], timedelta(seconds=seconds))
            if answered:
                return True
        if store.check([f"ping/{number}"]) and (start := store.get(f"ping/{number}").decode()) != answered:
            store.set(f"pong/{start}/{number}", "")
            answered = start
    return False


def _gather(store: Store, own: str, size: int, deadline: float) -> list[dict[str, Any]]:
    """Every rank's hello, each of a process that has answered; rank 0 alone."""
    keys = [f"hello/{rank}" for rank in range(size)]
    pinged = {own}
    store.set(f"pong/{own}/{own}", "")
    while True:
        if store.check(keys):
            hellos = [json.loads(text) for text in store.multi_get(keys)]
            if hellos[0]["number"] != own:
                raise UserError("another process has started as rank 0 of this run; end one of them", alone=True)
            for number in {hello["number"] for hello in hellos} - pinged:
                pinged.add(number)
                store.set(f"ping/{number}", own)
            if store.check([f"pong/{own}/{hello['number']}" for hello in hellos]):
                return hellos
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise UserError(
                f"of {size} processes, rank {', '.join(map(str, missing[:20]))} did not come"
                if missing
                else f"some of {size} processes no longer answer; look at the other machines' logs, and start again",
                alone=True,
            )
        time.sleep(_POLL_SECONDS)


def _refusal(hellos: list[dict[str, Any]]) -> str | None:
    """Why these processes cannot train together, None if they can."""
    for rank, hello in enumerate(hellos):
        if hello["problem"] is not None:
            return hello["problem"] if rank == 0 else f"rank {rank}: {hello['problem']}"
    first = hellos[0]["facts"]
    for rank, hello in enumerate(hellos):
        different = [name for name in first if hello["facts"].get(name) != first[name] and name != "host"]
        if different:
            rows = [
                f"rank {number} on {facts['host']} has " + ", ".join(f"{name} {facts.get(name)}" for name in different)
                for number, facts in ((0, first), (rank, hello["facts"]))
            ]
            return f"{rows[0]}; {rows[1]}: every process must have the same; start them alike"
    return None
