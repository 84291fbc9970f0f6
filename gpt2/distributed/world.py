"""The processes of a run: who we are, which device is ours, what is summed over all."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.distributed.rendezvous import rendezvous

from gpt2.allocator import keep_freed_memory
from gpt2.errors import UserError
from gpt2.files import write_whole

T = TypeVar("T")

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

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something that may fail, and give every process its result.

        Args:
            work: done by rank 0 alone; its result can be pickled.

        Raises:
            UserError: rank 0's, in every process; where rank 0 fails in another way, the others are told so by one.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                failure = error
                outcome[1] = str(error) if isinstance(error, UserError) else f"rank 0 failed: {error!r}"
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: T = outcome[0]
        return result

    def agree(self, work: Callable[[], T]) -> T:
        """Let every process do its own part of something that may fail: all of them succeed, or all raise.

        Args:
            work: done by every process, without waiting for others; its result stays here.

        Raises:
            UserError: of the first process that failed, in every process; a process that fails in another way raises
                that itself.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        message: str | None = None
        failure: Exception | None = None
        try:
            result = work()
        except UserError as error:
            message = str(error)
        except Exception as error:
            failure, message = error, f"rank {self.rank} failed: {error!r}"
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message)
        if failure is not None:
            raise failure
        for found in messages:
            if found is not None:
                raise UserError(found)
        return cast("T", result)

    def share(self, tensors: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """Rank 0's tensors in every process, on its device, one after the other; all must take all of them.

        Args:
            tensors: rank 0's; the others' are ignored.
        """
        named = self.on_main(lambda: [(name, tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()])
        for name, shape, dtype in named:
            if self.is_main and tensors is not None:
                tensor = tensors[name].to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if self.size > 1:
                dist.broadcast(tensor, src=0)
            yield name, tensor


def pick_device(choice: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device a process computes on. Processes of one machine are refused together or not at all.

    Args:
        choice: "auto" (CUDA, else MPS, else CPU), or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
        local_rank: which of the machine's processes this is; it takes the CUDA device of that number.
        local_size: the machine's processes.

    Raises:
        UserError: the device does not exist here, or not for all of the machine's processes.
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
        if device.index is not None and local_size > 1:
            raise UserError(
                f"{local_size} processes can't share device {choice}; use --device cuda, which gives each its own"
            )
        last = local_size - 1 if device.index is None else device.index
        if last >= count:
            raise UserError(
                f"device cuda:{last} is not available: this machine shows {count} CUDA device(s); "
                "use --device cpu or start fewer processes"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
    return device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes torchrun started, nccl between GPUs and gloo between CPUs, and leave them at the end.

    Args:
        device: "auto", or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
    """
    rank, local_rank, size, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    this = World(rank, local_rank, size, pick_device(device, local_rank, local_size))
    if this.device.type == "cuda":
        torch.cuda.set_device(this.device)
    elif this.device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        yield this
        return
    on_gpu = this.device.type == "cuda"
    # torchrun's store outlives a restart, with the addresses of the processes that died: each start uses names of its
    # own. (PyTorch 2.13 leaves that out, and then no restart over gloo finds its peers.)
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=STARTUP_TIMEOUT)))
    start = f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}_of_{size}"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(start, store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=STARTUP_TIMEOUT,
        device_id=this.device if on_gpu else None,
    )
    yield this
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


class WholeErrorFile(ErrorHandler):
    """Tells torchrun why this process failed by a file that is there whole or not at all.

    PyTorch's own handler writes it in place. torchrun ends with the whole run, restarts left or not, when it finds half
    a file of a process that was killed while it wrote; and a process whose peer was killed does write one.
    """

    def record_exception(self, e: BaseException) -> None:
        """Write what `@record` caught, in the layout torchrun reads."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path is None:
            return
        extra = {"py_callstack": "".join(traceback.format_exception(e)), "timestamp": str(int(time.time()))}
        message = {"message": f"{type(e).__name__}: {e}", "extraInfo": extra}
        with suppress(OSError):  # the error itself matters more
            write_whole(Path(path), json.dumps({"message": message}), sync=False)


def shorten_timeout() -> None:
    """From now on wait STEP_TIMEOUT for the others, not STARTUP_TIMEOUT; to be called after the first step."""
    if dist.is_initialized():
        # No public function changes a living group's time-out; torchtitan calls this one too.
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, dist.group.WORLD)
