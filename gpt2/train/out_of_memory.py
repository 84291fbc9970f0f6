"""When a device's memory runs out: what ran, which micro-batch would fit, and a picture of what filled it."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import torch

from gpt2.config import Config
from gpt2.distributed.world import World
from gpt2.errors import UserError, first_line
from gpt2.train.memory import HEADROOM
from gpt2.train.plan import Plan

_PARTS = {
    "torch._dynamo.convert_frame": ("compiling the model", "--no-compile leaves that out"),
    "gpt2.hellaswag.score": (
        "scoring HellaSwag",
        "--hellaswag-limit 0 leaves that out, and hellaswag.py does it later",
    ),
    "gpt2.generation.generate": ("sampling", "use a smaller --num-samples or --sample-tokens"),
    "gpt2.train.saving": ("saving a checkpoint", "it takes a copy of weights and optimizer in the host's memory"),
    "gpt2.train.validation": ("evaluating the validation loss", None),
}
"""What ran, and what helps, by the module whose function was at work; None: what helps a training step, too."""


def what_ran(error: BaseException) -> tuple[str, str | None]:
    """What a run was doing when it raised an error, told from the traceback, and what helps if that is its own."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((_PARTS[module] for module in reversed(frames) if module in _PARTS), ("training", None))


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
    ran, remedy = what_ran(error)
    snapshot = config.run.run_dir / f"out_of_memory_rank{world.rank}.pickle"
    written = write_snapshot(snapshot, world.device)
    picture = f"; {snapshot} shows what filled it (https://pytorch.org/memory_viz)" if written else ""
    return UserError(
        f"rank {world.rank} is out of memory on {world.device}, {ran} with --micro-batch-size "
        f"{config.data.micro_batch_size} ({first_line(error)}); "
        f"{remedy or plan.advice(smaller_micro_batch(config, plan, world.size), config)}{picture}",
        alone=True,
    )
