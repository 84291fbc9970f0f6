"""What happens to a model before it trains, in one readable place: checkpointing, compilation, DDP or FSDP2."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import RunConfig
from gpt2.distributed.world import World
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT


def parallelize(model: GPT, config: RunConfig, world: World, dtype: str, grad_accum_steps: int) -> nn.Module:
    """What happens to a model before it trains, in the one order that works: checkpoint, compile, distribute.

    Args:
        model: on its device, all weights in place; the optimizer is made afterwards, of its parameters.
        config: says what is wanted.
        world: the processes.
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
        grad_accum_steps: forward and backward passes per step.

    Returns:
        The module to call for a loss; `model` itself still serves evaluation, sampling and checkpoints.
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
    """FSDP2: a block's matrices are gathered when it runs, in the matrix products' type; gradients are summed in fp32.

    The rest stays gathered from a step's first use of it to its end: embeddings, head, and the norms' gains, which are
    few. It is in the type it is stored in, as under DDP, where autocast turns nothing but a product's factors into
    bf16; so one process, DDP and FSDP compute the same, and the residual stream is fp32 in all of them.
    """
    matrices = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bf16" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard([block.get_submodule("attn"), block.get_submodule("mlp")], mp_policy=matrices)
    if model.wte.weight.dtype != model.dtype:  # FSDP gathers tensors of one type together
        fully_shard(model.wte, mp_policy=rest)
    fully_shard(model, mp_policy=rest)
    register_fsdp_forward_method(model, "hidden")  # evaluation and sampling enter there
    return model


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-step's forward and backward pass.

    DDP reduces gradients in a step's last one only. FSDP does in each: gradients that wait would be whole ones, 4 bytes
    per parameter in every process, where it keeps 4 bytes divided by the processes.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
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
