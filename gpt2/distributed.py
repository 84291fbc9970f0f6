"""The processes of a run: who we are, which device is ours, what is summed over all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.errors import UserError

STARTUP_TIMEOUT = timedelta(minutes=30)
"""How long a process may wait for the others until the first step is done: compiling takes minutes."""
STEP_TIMEOUT = timedelta(minutes=5)
"""How long it may wait afterwards; past it, one of them hangs."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone if there is no torchrun."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its element-wise maximum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; waits for the device."""
        if self.size == 1:
            return flag
        return bool(self.max_(torch.tensor(int(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(choice: str, local_rank: int = 0) -> torch.device:
    """The device a process computes on.

    Args:
        choice: "auto" (CUDA, else MPS, else CPU), or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
        local_rank: which of the machine's processes this is; it takes the CUDA device of that number.

    Raises:
        UserError: the device does not exist here.
    """
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise UserError(f"unknown device {choice!r}; choose auto, cuda, mps or cpu") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not available here; use --device cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise UserError(
                f"device cuda:{index} is not available: this machine shows {count} CUDA device(s); "
                "use --device cpu or start fewer processes"
            )
        device = torch.device("cuda", index)
    return device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes torchrun started, nccl between GPUs and gloo between CPUs, and leave them at the end.

    Args:
        device: of `pick_device`.
    """
    rank, local_rank, size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    this = World(rank, local_rank, size, pick_device(device, local_rank))
    if this.device.type == "cuda":
        torch.cuda.set_device(this.device)
    if "RANK" not in os.environ:
        yield this
        return
    on_gpu = this.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=STARTUP_TIMEOUT, device_id=this.device if on_gpu else None
    )
    try:
        yield this
    finally:
        dist.destroy_process_group()
