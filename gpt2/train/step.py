"""What a step is made of: micro-batches, flags, random seeds, and the numbers it leaves for the host to read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.distributed.world import World

MicroBatches = Sequence[tuple[Tensor, Tensor]]


class Flags(NamedTuple):
    """What one process wants all of them to know; of all of them: whether any does.

    Attributes:
        stop: it was told to stop.
        save: it wants a checkpoint.
        failed: it could not read its data, and took part in the step with a made-up batch.
        waiting: its steps wait for their data more than they should.
    """

    stop: bool = False
    save: bool = False
    failed: bool = False
    waiting: bool = False


@dataclass(frozen=True)
class StepNumbers:
    """What a step came to, equal in all processes.

    Attributes:
        loss: mean over the step's tokens, nats.
        grad_norm: global, before clipping.
        updated: whether the weights were updated.
        nonfinite: whether loss or norm was not finite.
        flags: each raised if any process raised it.
        bad_ranks: processes whose own loss was not finite.
    """

    loss: float
    grad_norm: float
    updated: bool
    nonfinite: bool
    flags: Flags
    bad_ranks: list[int]


class PendingNumbers:
    """A step's numbers on their way to the host; `read` waits for them, not for what was queued since."""

    def __init__(self, numbers: Tensor):
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers.cpu()

    def read(self) -> StepNumbers:
        """The numbers, as soon as the device has them."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, veto, nonfinite, *rest = self._host.tolist()
        flags = Flags(*(count > 0 for count in rest[: len(Flags._fields)]))
        bad_ranks = [rank for rank, bad in enumerate(rest[len(Flags._fields) :]) if bad]
        return StepNumbers(loss, grad_norm, veto == 0, nonfinite != 0, flags, bad_ranks)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generators for a step, as a pure function: dropout needs no saved state to resume exactly."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def share_numbers(own_loss: Tensor, flags: Flags, world: World) -> Tensor:
    """Sum this process's loss over all processes, and tell them its flags and whether its loss is finite.

    One message carries all three, so that no process waits for another a second time. A process that failed makes the
    sum NaN, which vetoes the update everywhere.

    Args:
        own_loss: scalar; this process's part of the step's mean loss.
        flags: this process's.
        world: the processes.

    Returns:
        (1 + flags + world size,): the loss, how many processes raised each flag, and for each process whether its own
        loss is not finite.
    """
    own = [False] * world.size
    own[world.rank] = True
    mine = torch.tensor([*flags, *own], dtype=torch.float32).to(world.device, non_blocking=True)
    if flags.failed:
        own_loss = torch.full_like(own_loss, torch.nan)
    mine[len(flags) :] *= ~own_loss.isfinite()
    return world.sum_(torch.cat([own_loss[None], mine]))


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read while the next step runs: on a GPU, which would otherwise wait for the host."""
    return device.type == "cuda"
