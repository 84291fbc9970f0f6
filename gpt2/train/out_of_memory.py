"""When a device's memory runs out: which micro-batch would fit, and a picture of what filled it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gpt2.config import Config
from gpt2.distributed.world import World
from gpt2.errors import UserError, first_line
from gpt2.train.plan import device_memory, expected_memory

# Of MPS, of the CPU allocator on Linux and on Windows; CUDA has an exception of its own.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fitting_micro_batch(
    config: Config,
    parameters: int,
    world_size: int,
    dtype: str,
    device_type: str,
    device_memory_bytes: float | None,
) -> int | None:
    """The largest smaller micro-batch that divides a process's part of the step and should fit; None if none does.

    The estimate of `gpt2.train.plan` is first raised to what has just proved not to fit.

    Args:
        config: the run that did not fit.
        parameters: how many the model has.
        world_size: processes of the run.
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
        device_type: such as "cuda".
        device_memory_bytes: what the device has; None: unknown, and half the micro-batch is as good a guess as any.
    """
    size = config.data.micro_batch_size
    share = config.sequences_per_step // world_size
    smaller = [b for b in range(size - 1, 0, -1) if share % b == 0]
    if device_memory_bytes is None:
        return next((b for b in smaller if 2 * b <= size), None)

    def needed(micro_batch_size: int) -> float:
        smaller = replace(config, data=replace(config.data, micro_batch_size=micro_batch_size))
        return expected_memory(smaller, parameters, world_size, dtype, device_type)

    scale = max(1.0, device_memory_bytes / needed(size))
    return next((b for b in smaller if scale * needed(b) <= 0.95 * device_memory_bytes), None)


def advice(micro_batch_size: int | None, config: Config) -> str:
    """What to do about it, in the words of the command line.

    Args:
        micro_batch_size: one that should fit; None: none does.
        config: the run that did not fit.
    """
    if micro_batch_size is not None:
        return f"use --micro-batch-size {micro_batch_size}, which trains the same in more micro-steps"
    if not config.run.activation_checkpointing:
        return "use --activation-checkpointing, a smaller --block-size or a smaller model"
    return "use a smaller --block-size, a smaller model, or --parallel fsdp over more processes"


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


def explain(error: BaseException, config: Config, parameters: int, world: World, dtype: str) -> UserError:
    """What to do now that this process's memory is full; a picture of it goes to the run's directory.

    Args:
        error: one that `is_out_of_memory`.
        config: the run that did not fit.
        parameters: how many the model has.
        world: the run's processes.
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
    """
    device = world.device
    fitting = fitting_micro_batch(config, parameters, world.size, dtype, device.type, device_memory(device))
    snapshot = config.run.run_dir / f"out_of_memory_rank{world.rank}.pickle"
    picture = f"; {snapshot} shows what filled it (https://pytorch.org/memory_viz)"
    return UserError(
        f"rank {world.rank} is out of memory on {device} with --micro-batch-size {config.data.micro_batch_size} "
        f"({first_line(error)}); {advice(fitting, config)}" + (picture if write_snapshot(snapshot, device) else ""),
        alone=True,
    )
