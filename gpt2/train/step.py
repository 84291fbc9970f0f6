"""One optimizer step over all processes, and the numbers it leaves for the host to read while the next one runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2.distributed.parallel import accumulating, whole
from gpt2.distributed.world import World
from gpt2.model.attention_kernels import training_backends
from gpt2.precision import autocast
from gpt2.train.divergence import StepGuard
from gpt2.train.optim import step_unless

MicroBatches = Sequence[tuple[Tensor, Tensor]]


class Flags(NamedTuple):
    """What one process wants all of them to know; of all of them: whether any does.

    Attributes:
        stop: it was told to stop.
        save: it wants a checkpoint.
        failed: it could not read its data, and took part in the step with a made-up batch.
    """

    stop: bool = False
    save: bool = False
    failed: bool = False


@dataclass(frozen=True)
class StepNumbers:
    """What a step came to, equal in all processes.

    Attributes:
        loss: mean over the step's tokens, nats.
        grad_norm: global, before clipping.
        updated: whether the weights were updated.
        nonfinite: whether loss or norm was not finite.
        flags: of all processes.
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
    """Seed PyTorch's generators for a step, as a pure function: dropout needs no saved state to go on the same."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: MicroBatches,
    guard: StepGuard,
    world: World,
    *,
    dtype: str,
    tokens_per_step: int,
    grad_clip: float,
    flags: Flags,
) -> PendingNumbers:
    """Accumulate the gradient of the mean loss over the step's tokens in all processes, clip it, update the weights.

    Args:
        model: of `parallelize`.
        optimizers: their learning rates set.
        batches: this process's micro-batches.
        guard: may veto the update.
        world: the processes.
        dtype: of `gpt2.precision.resolve_dtype`.
        tokens_per_step: over all processes.
        grad_clip: largest global norm; 0: any.
        flags: this process's; a failed one vetoes the update.
    """
    own_loss = torch.zeros((), device=world.device)
    for number, (tokens, targets) in enumerate(batches):
        with accumulating(model, last=number == len(batches) - 1):
            with autocast(world.device, dtype), training_backends(world.device):
                loss = model(tokens, targets) / tokens_per_step
            # DDP and FSDP average gradients over the processes, where the loss is a sum over them.
            (loss * world.size).backward()
        own_loss += loss.detach()

    if flags.failed:
        own_loss.fill_(torch.nan)
    # The loss, the flags, and whose loss is not finite travel together; no process waits for another a second time.
    own = [False] * world.size
    own[world.rank] = True
    mine = torch.tensor([*flags, *own], dtype=torch.float32).to(world.device, non_blocking=True)
    mine[len(flags) :] *= ~own_loss.isfinite()
    shared = world.sum_(torch.cat([own_loss[None], mine]))
    parameters = list(model.parameters())
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    grad_norm = whole(norm)
    veto, nonfinite = guard.veto(shared[0], grad_norm)
    step_unless(optimizers, veto)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return PendingNumbers(torch.cat([torch.stack([shared[0], grad_norm, veto, nonfinite]), shared[1:]]))


def ranks_with_bad_gradient(model: nn.Module, batches: MicroBatches, world: World, dtype: str) -> list[int]:
    """Processes whose own gradient of a step is not finite: the step is done again, without reduction or update.

    Args:
        model: the GPT itself, not sharded; random numbers seeded as in the step.
        batches: this process's part of the step.
        world: the processes.
        dtype: as in the step.
    """
    for tokens, targets in batches:
        with autocast(world.device, dtype), training_backends(world.device):
            loss = model(tokens, targets)
        loss.backward()
    bad = torch.zeros(world.size, device=world.device)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    bad[world.rank] = ~torch.nn.utils.get_total_norm(grads).isfinite()
    model.zero_grad(set_to_none=True)
    return [rank for rank, value in enumerate(world.sum_(bad).tolist()) if value]
