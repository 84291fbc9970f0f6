"""How much memory training takes, by counting what is held; and which micro-batch fits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from gpt2.config import Config, GPTConfig
from gpt2.hardware import available_memory
from gpt2.model.gpt import GPT
from gpt2.model.loss import chunk_size

PROCESS_BYTES = 0.4 * 2**30
"""Host memory of a process before it has a model: Python, PyTorch and its libraries; measured with torch 2.13."""
COMPILER_BYTES = 0.15 * 2**30
"""What compiling adds to it."""
CUDA_BYTES = 0.6 * 2**30
"""GPU memory that is nobody's tensor: the CUDA context, cuBLAS's workspace, the allocator's rounding."""
HEADROOM = 0.95
"""Part of a device's memory that a micro-batch said to fit may fill."""


@dataclass(frozen=True)
class MemoryNeed:
    """The most bytes that one process holds, as a function of its micro-batch.

    Attributes:
        fixed: whatever the micro-batch: weights, gradients, moments, their copies.
        per_token: activations kept for the backward pass.
        per_logits_row: bytes of one position's logits, while their chunk passes through the head.
        chunk: positions in such a chunk.
        saving: while a checkpoint is copied and written, when there are no activations.
        block_size: tokens of a sequence.
    """

    fixed: float
    per_token: float
    per_logits_row: float
    chunk: int
    saving: float
    block_size: int

    def bytes(self, micro_batch_size: int) -> float:
        """Bytes with a micro-batch of so many sequences."""
        tokens = micro_batch_size * self.block_size
        return max(self.fixed + tokens * self.per_token + min(tokens, self.chunk) * self.per_logits_row, self.saving)

    def largest_micro_batch(self, share: int, limit: float, below: int | None = None) -> int | None:
        """The largest micro-batch that divides a process's part of a step and needs no more than a limit.

        Args:
            share: sequences of a step that are the process's.
            limit: bytes.
            below: the result is smaller than this.
        """
        sizes = sorted({d for b in range(1, math.isqrt(share) + 1) if share % b == 0 for d in (b, share // b)})
        return max((b for b in sizes if (below is None or b < below) and self.bytes(b) <= limit), default=None)


def memory_need(config: Config, world_size: int, dtype: str, device_type: str) -> MemoryNeed:
    """Count what training holds: to within a fifth on a CPU, where it was measured, and more closely on a GPU.

    Args:
        config: the run's.
        world_size: processes that share a step.
        dtype: precision of matrix products: "bf16", "tf32" or "fp32".
        device_type: "cuda", "cpu" or "mps".
    """
    model, run = config.model, config.run
    with torch.device("meta"):  # shapes only, no memory
        network = GPT(model)
    parameters = sum(p.numel() for p in network.parameters())
    matrices = sum(p.numel() for p in network.h.parameters() if p.ndim == 2)
    shards = world_size if run.parallel == "fsdp" else 1
    # fp32: a weight and its gradient, AdamW's two moments, of which Muon has one.
    moments = 2 * parameters - (matrices if config.optim.optimizer == "muon" else 0)
    state = 4 * (2 * parameters + moments) / shards
    if shards > 1:  # gathered: all outside the blocks' matrices, and two blocks' weights and gradients
        state += 4 * (2 * (parameters - matrices) + 4 * matrices / model.n_layer)
    elif dtype == "bf16":
        state += 2 * parameters  # autocast's copies, which last a forward pass
    size = 2 if dtype == "bf16" else 4
    per_block = activation_bytes(model, size, compiled=run.compile)
    kept = 4 * model.n_embd * model.n_layer + per_block if run.activation_checkpointing else per_block * model.n_layer
    logits = size  # become their gradient in place
    if device_type != "cpu" and not run.compile:
        logits += 8  # without the compiler: the chunk and its softmax in fp32
    head_gradient = 2 * 4 * model.padded_vocab_size * model.n_embd  # summed over chunks, and the next chunk's
    fixed, saving = state + head_gradient, 0.0
    if device_type == "cpu":
        process = PROCESS_BYTES + COMPILER_BYTES * run.compile
        fixed += process
        # A checkpoint copies weights and moments, and lays its matrices out as `transformers` does.
        saving = process + 4 * (2 * parameters + moments) + 4 * (parameters + moments) + 4 * matrices
    elif device_type == "cuda":
        fixed += CUDA_BYTES
    return MemoryNeed(
        fixed=fixed,
        per_token=kept,
        per_logits_row=model.padded_vocab_size * logits,
        chunk=chunk_size(device_type),
        saving=saving,
        block_size=model.block_size,
    )


def activation_bytes(model: GPTConfig, size: int, compiled: bool) -> float:
    """Bytes a block keeps for the backward pass, per token.

    The residual stream is fp32 twice, before either norm; the norms' outputs, queries, keys and values, the attention's
    output and the MLP's hidden layer before and after its activation are in the matrix products' type. GPT-2: 36
    bytes per unit of width in bf16, 64 in fp32. The compiler keeps a norm's input alone and computes the rest again.

    Args:
        model: its shape.
        size: bytes of a number in a matrix product, 2 or 4.
        compiled: whether the compiler chooses what is kept.
    """
    C, heads = model.n_embd, model.head_dim * (model.n_head + 2 * model.kv_heads)
    # Hidden layers kept: before and after the activation; ReLU's result serves for both, swiglu keeps four.
    hidden = model.mlp_hidden * {"relu": 1, "swiglu": 4}.get(model.activation, 2)
    numbers = 2 * C + heads + C + hidden  # both norms' outputs; q, k, v; attention's output
    if model.position == "rope" or model.qk_norm:
        numbers += model.head_dim * (model.n_head + model.kv_heads)  # q and k as they enter the product
    if compiled:
        numbers -= 2 * C + model.mlp_hidden
    return 2 * 4 * C + size * numbers


def device_memory(device: torch.device) -> float | None:
    """Bytes a process may use of a device; of the host, shared with its other processes, for a CPU; None: unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    host = available_memory()
    if host is None or device.type != "cpu":
        return host
    return host / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
