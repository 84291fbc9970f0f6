"""The processes of a run: who we are, which device is ours, what is summed over all."""

from __future__ import annotations

import inspect
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt2.allocator import keep_freed_memory
from gpt2.config import RunConfig
from gpt2.errors import UserError
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT

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
        device: of `pick_device`.
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
            with open(path + ".writing", "w", encoding="utf-8") as file:
                json.dump({"message": message}, file)
            os.replace(path + ".writing", path)


def shorten_timeout() -> None:
    """From now on wait STEP_TIMEOUT for the others, not STARTUP_TIMEOUT; to be called after the first step."""
    if dist.is_initialized():
        # No public function changes a living group's time-out; torchtitan calls this one too.
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, dist.group.WORLD)


def parallelize(model: GPT, config: RunConfig, world: World, dtype: str, grad_accum_steps: int) -> nn.Module:
    """What happens to a model before it trains, in the one order that works: checkpoint, compile, distribute.

    Args:
        model: on its device, all weights in place; the optimizer is made afterwards, of its parameters.
        config: says what is wanted.
        world: the processes.
        dtype: of `gpt2.precision.resolve_dtype`.
        grad_accum_steps: forward and backward passes a step.

    Returns:
        The module to call for a loss; `model` itself goes on serving evaluation, sampling and checkpoints.
    """
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        compile_model(model)
    if config.parallel == "fsdp":
        return _shard(model, dtype)
    if world.size == 1:
        return model
    # The buffers are constants, RoPE's angles. PyTorch 2.13 renamed the option that leaves them alone.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # After a start's first step DDP puts gradients into other buckets, in the order in which they came: over more than
    # two processes sums then round differently, and a resumed run would not be bitwise the same. It leaves the buckets
    # alone where it looks for parameters without a gradient; there are none, of which it warns once.
    fixed_buckets = config.deterministic
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        **keep_buffers,
        gradient_as_bucket_view=True,
        find_unused_parameters=fixed_buckets,
        static_graph=grad_accum_steps == 1 and not fixed_buckets,  # no_sync changes what a backward pass does
    )


def _shard(model: GPT, dtype: str) -> nn.Module:
    """FSDP2: each block's weights are gathered when it runs, gradients are summed in fp32."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bf16" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")  # evaluation and sampling enter there
    return model


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-step's forward and backward pass: gradients are reduced in the step's last one only."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, on a parameter's device and sharded as it is."""
    moved = tensor.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return moved
