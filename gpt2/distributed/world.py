"""The processes of a run: who we are, which device is ours, what is summed over all."""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.distributed.rendezvous import rendezvous

from gpt2.distributed.last_word import leave_last_word
from gpt2.distributed.start import agree_on_start
from gpt2.errors import UserError, visible
from gpt2.files import write_whole

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

STARTUP_TIMEOUT = timedelta(minutes=30)
"""How long a process may wait for the others until the first step is done: compiling takes minutes."""
STEP_TIMEOUT = timedelta(minutes=5)
"""How long it may wait afterwards; past it, one of them hangs."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone if there is no torchrun.

    Attributes:
        rank: this process's among all.
        local_rank: among those of its machine.
        size: processes in all.
        device: this process's.
        memory: what all starts of one torchrun remember together; None without torchrun.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    memory: Store | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def recall(self, key: str) -> str | None:
        """What an earlier start of the same torchrun has noted under a key; None without one."""
        if self.memory is None or not self.memory.check([key]):
            return None
        return self.memory.get(key).decode()

    def note(self, key: str, value: str) -> None:
        """Leave something to the next start of the same torchrun."""
        if self.memory is not None:
            self.memory.set(key, value)

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
    if choice == "auto":  # a Mac has one GPU, which processes cannot share: several of them compute on its CPU
        mps = torch.backends.mps.is_available() and local_size == 1
        choice = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise UserError(f"unknown device {choice!r}; choose auto, cuda, mps or cpu") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not available here; use --device cpu")
    if device.type == "mps" and local_size > 1:
        raise UserError(f"{local_size} processes cannot share device mps; start one, or use --device cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None and local_size > 1:
            raise UserError(
                f"{local_size} processes cannot share device {choice}; use --device cuda, which gives each its own"
            )
        last = local_size - 1 if device.index is None else device.index
        if last >= count:
            raise UserError(
                f"device cuda:{last} is not available: this machine shows {count} CUDA device(s); "
                "use --device cpu or start fewer processes"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
    return device


def processes() -> tuple[int, int, int, int] | None:
    """This process's rank, its rank on this machine, how many there are, and how many on this machine.

    Returns:
        What torchrun's variables say; None where there are none.

    Raises:
        UserError: some are set and others not, or one is not a number of that kind.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given.keys() - {"MASTER_ADDR", "MASTER_PORT"}:  # which alone say nothing: some images set them
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing:
        raise UserError(
            f"the environment holds {', '.join(sorted(given))}, but not {', '.join(missing)}; start with torchrun, "
            "which sets all of them, or unset them for one process alone"
        )
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank = int(given.get("LOCAL_RANK", 0))
        local_size = int(given.get("LOCAL_WORLD_SIZE", local_rank + 1))  # some launchers do not say
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size and int(given["MASTER_PORT"])):
            raise ValueError
    except ValueError:
        values = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{values} do not describe a process among others; start with torchrun") from None
    return rank, local_rank, size, local_size


@contextmanager
def joined_world(
    device: str = "auto", facts: Callable[[torch.device], Mapping[str, str]] = lambda device: {}
) -> Iterator[World]:
    """Join the processes torchrun started, nccl between GPUs and gloo between CPUs, and leave them at the end.

    Args:
        device: "auto", or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
        facts: what this process will compute with on its device, by name; refused where processes differ.

    Raises:
        UserError: a process has no such device or cannot compute like that, or they differ; in every process.
    """
    found = processes()
    if found is None:
        this = World(0, 0, 1, pick_device(device))
        facts(this.device)
        _prepare(this.device)
        yield this
        return
    rank, local_rank, size, local_size = found
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=STARTUP_TIMEOUT)))
    mine, problem, own = {"host": platform.node()}, None, torch.device("cpu")
    try:
        own = pick_device(device, local_rank, local_size)
        mine |= {"device": own.type, "torch": torch.__version__, **facts(own)}
    except UserError as error:
        problem = str(error)
    start = agree_on_start(PrefixStore("starts", store), rank, size, mine, problem, STARTUP_TIMEOUT)
    _prepare(own)
    on_gpu = own.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(start, store),
        rank=rank,
        world_size=size,
        timeout=STARTUP_TIMEOUT,
        device_id=own if on_gpu else None,
    )
    yield World(rank, local_rank, size, own, PrefixStore("memory", store))
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def _prepare(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


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
        extra = {"timestamp": str(int(time.time()))}
        if isinstance(e, UserError):  # whose line is all there is to say: torchrun shows the callstack where it has one
            message: dict[str, Any] = {"message": f"error: {e}", "extraInfo": extra}
            if e.alone or os.environ.get("LOCAL_RANK", "0") == "0":
                leave_last_word(f"error: {visible(str(e))}")
        else:
            extra["py_callstack"] = "".join(traceback.format_exception(e))
            message = {"message": f"{type(e).__name__}: {e}", "extraInfo": extra}
        with suppress(OSError):  # the error itself matters more
            write_whole(Path(path), json.dumps({"message": message}), sync=False)


def shorten_timeout() -> None:
    """Wait STEP_TIMEOUT for the others from now on, not STARTUP_TIMEOUT; called after the first step."""
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    assert group is not None
    if hasattr(group, "set_timeout"):  # PyTorch 2.9 may lack it; 2.14 warns of the other one
        group.set_timeout(STEP_TIMEOUT)
    else:
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)
