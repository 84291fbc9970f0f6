"""When a device's memory runs out: which micro-batch would fit, and a picture of what filled it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from gpt2.config import Config
from gpt2.distributed.world import World
from gpt2.errors import UserError, first_line
from gpt2.train.memory import HEADROOM
from gpt2.train.plan import Plan

# Of MPS, of the CPU allocator on Linux and on Windows; CUDA has an exception of its own.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def smaller_micro_batch(config: Config, plan: Plan, world_size: int) -> int | None:
    """The largest smaller micro-batch that divides a process's part of the step and should fit; None if none does.

    What the plan's estimate is short of what has just proved not to fit counts as the micro-batch's. Where the
    device's memory is unknown, half the micro-batch is as good a guess as any.

    Args:
        config: configuration of the run that did not fit.
        plan: that run's plan.
        world_size: its processes.
    """
    size, has = config.data.micro_batch_size, plan.device_memory_bytes
    share = config.sequences_per_step // world_size
    if has is None:
        return plan.memory.largest_micro_batch(share, math.inf, below=size // 2 + 1)
    missed = max(has - plan.memory.bytes(size), 0.0) / size
    smaller = (b for b in range(size - 1, 0, -1) if share % b == 0)
    return next((b for b in smaller if plan.memory.bytes(b) + missed * b <= HEADROOM * has), None)


def record_allocations(device: torch.device, on: bool) -> None:
    """Remember where CUDA memory is allocated from, or stop to; it costs a little time an allocation."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history("state" if on else None, context="state", stacks="python")


def write_snapshot(path: Path, device: torch.device) -> bool:
    """Write what holds CUDA memory now, to be opened at https://pytorch.org/memory_viz; whether it was written."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        return False
    return True


def explain(error: BaseException, config: Config, plan: Plan, world: World) -> UserError:
    """What to do now that this process's memory is full; a picture of it goes to the run's directory.

    Args:
        error: one that `is_out_of_memory`.
        config: configuration of the run that did not fit.
        plan: that run's plan.
        world: the run's processes.
    """
    fitting = smaller_micro_batch(config, plan, world.size)
    snapshot = config.run.run_dir / f"out_of_memory_rank{world.rank}.pickle"
    written = write_snapshot(snapshot, world.device)
    picture = f"; {snapshot} shows what filled it (https://pytorch.org/memory_viz)" if written else ""
    return UserError(
        f"rank {world.rank} is out of memory on {world.device} with --micro-batch-size {config.data.micro_batch_size} "
        f"({first_line(error)}); {plan.advice(fitting, config)}{picture}",
        alone=True,
    )
