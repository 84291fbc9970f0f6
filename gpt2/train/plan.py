"""What a run will do, worked out before the first step: every derived number, and a refusal of what can't work."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.loss import chunk_size
from gpt2.tokens.dataset import Dataset
from gpt2.tokens.loader import Blocks
from gpt2.train.validation import count_val_blocks

STATE_BYTES = 16
"""A parameter's weight, gradient and AdamW's two moments, fp32."""


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from a configuration, the data and the machine; see `lines` for their meaning."""

    parameters: int
    flops_per_token: float
    grad_accum_steps: int
    tokens_per_step: int
    total_steps: int
    train_tokens: int
    blocks_per_epoch: int
    leftover_tokens: int
    val_tokens: int
    memory_bytes: float
    device_memory_bytes: float | None

    @property
    def total_tokens(self) -> int:
        """Tokens the run trains on, repeated ones too."""
        return self.total_steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        """Passes over the blocks of the train split."""
        return self.total_steps * self.tokens_per_step / max(self.train_tokens - 1 - self.leftover_tokens, 1)

    def lines(self, config: Config, world_size: int, device: str, dtype: str) -> list[str]:
        """The plan as a table to print."""
        model, data = config.model, config.data
        memory = f"{self.memory_bytes / 2**30:.1f} GiB a process expected"
        if self.device_memory_bytes is not None:
            memory += f", of {self.device_memory_bytes / 2**30:.1f} GiB"
        rows = {
            "model": f"{self.parameters:,} parameters: {model.n_layer} blocks, {model.n_head} heads, "
            f"width {model.n_embd}, context {model.block_size}, vocabulary {model.vocab_size:,}",
            "device": f"{world_size} × {device}, {dtype}" + (", compiled" if config.run.compile else ""),
            "data": f"{data.data}: {self.train_tokens:,} tokens to train on, in {self.blocks_per_epoch:,} sequences"
            + (f" ({self.leftover_tokens} left over)" if self.leftover_tokens else ""),
            "step": f"{self.tokens_per_step:,} tokens = {data.micro_batch_size} × {model.block_size} tokens "
            f"× {world_size} processes × {self.grad_accum_steps} micro-steps",
            "run": f"{self.total_steps:,} steps = {self.total_tokens:,} tokens = {self.epochs:.2f} epochs",
            "compute": f"{self.flops_per_token / 1e6:.3g} MFLOP a token, "
            f"{self.flops_per_token * self.total_tokens:.2e} FLOP in all",
            "memory": memory,
            "validation": f"{self.val_tokens:,} tokens"
            + (f" every {config.run.eval_every} steps" if config.run.eval_every else ", never"),
        }
        return [f"{name:<11}{text}" for name, text in rows.items()]


def make_plan(
    config: Config,
    dataset: Dataset,
    train: Blocks,
    val: Blocks,
    world_size: int,
    dtype: str,
    device_type: str,
    device_memory_bytes: float | None,
) -> Plan:
    """Work out what a run will do.

    Args:
        config: the run's.
        dataset: it reads.
        train: its train split in blocks.
        val: its validation split in blocks.
        world_size: processes that share a step.
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
        device_type: such as "cuda".
        device_memory_bytes: what the device has; None: unknown.

    Raises:
        UserError: the plan can't work.
    """
    model, data = config.model, config.data
    if dataset.vocab_size is not None and dataset.vocab_size != model.vocab_size:
        raise UserError(
            f"{dataset.directory} is tokenized with a vocabulary of {dataset.vocab_size:,}, the model has "
            f"{model.vocab_size:,}; use --vocab-size {dataset.vocab_size} or other data"
        )
    per_micro_step = data.micro_batch_size * model.block_size * world_size
    if data.total_batch_tokens % per_micro_step != 0:
        below = data.total_batch_tokens // per_micro_step * per_micro_step
        raise UserError(
            f"total_batch_tokens {data.total_batch_tokens:,} is not a multiple of micro_batch_size "
            f"{data.micro_batch_size} × block_size {model.block_size} × {world_size} processes = {per_micro_step:,}; "
            f"use --total-batch-tokens {max(below, per_micro_step)}" + _fitting_micro_batch(config, world_size)
        )
    with torch.device("meta"):  # shapes only, no memory
        network = GPT(model)
    parameters = network.num_parameters()
    shards = world_size if config.run.parallel == "fsdp" else 1
    state = STATE_BYTES * parameters / shards
    if device_memory_bytes is not None and state > device_memory_bytes:
        raise UserError(
            f"weights, gradients and moments of {parameters:,} parameters are {state / 2**30:.1f} GiB a process, "
            f"but the device has {device_memory_bytes / 2**30:.1f} GiB; use a smaller model"
            + (" or more processes" if shards > 1 else " or --parallel fsdp over several GPUs")
        )
    return Plan(
        parameters=parameters,
        flops_per_token=network.flops_per_token(),
        grad_accum_steps=data.total_batch_tokens // per_micro_step,
        tokens_per_step=data.total_batch_tokens,
        total_steps=config.run.max_steps,
        train_tokens=len(dataset.train),
        blocks_per_epoch=train.count,
        leftover_tokens=train.leftover,
        val_tokens=count_val_blocks(val, data.val_tokens) * model.block_size,
        memory_bytes=expected_memory(config, parameters, world_size, dtype, device_type),
        device_memory_bytes=device_memory_bytes,
    )


def _fitting_micro_batch(config: Config, world_size: int) -> str:
    """ ", or --micro-batch-size N" with the largest one that divides the step, if any does."""
    sequences = config.sequences_per_step
    if sequences % world_size:
        return ""
    share = sequences // world_size
    size = max(b for b in range(1, min(share, config.data.micro_batch_size) + 1) if share % b == 0)
    return f" or --micro-batch-size {size}"


def expected_memory(config: Config, parameters: int, world_size: int, dtype: str, device_type: str) -> float:
    """Bytes a process will hold at most, to about a fifth.

    Weights, gradients and AdamW's two moments are 16 bytes a parameter, sharded under FSDP; autocast holds a copy in
    bf16. A block keeps about 36 bytes of activations per token and unit of width in bf16 (the residual stream and two
    normalised copies, q, k, v, the attention's output, the MLP's hidden layer twice), 64 in fp32; with checkpointing
    only its input. The head holds a chunk of logits, which become their gradient in place, and its matrix's gradient
    twice; without the compiler a GPU also holds the chunk and its softmax in fp32.
    """
    model = config.model
    shards = world_size if config.run.parallel == "fsdp" else 1
    state = STATE_BYTES * parameters / shards + (2 * parameters if dtype == "bf16" else 0)
    tokens = config.data.micro_batch_size * model.block_size
    per_block = (36 if dtype == "bf16" else 64) * model.n_embd
    if config.run.activation_checkpointing:
        activations = tokens * (4 * model.n_embd * model.n_layer + per_block)
    else:
        activations = tokens * per_block * model.n_layer
    per_logit = 2 if dtype == "bf16" else 4
    if device_type != "cpu" and not config.run.compile:
        per_logit += 8
    logits = min(tokens, chunk_size(device_type)) * model.padded_vocab_size * per_logit
    head_gradient = 8 * model.padded_vocab_size * model.n_embd
    return state + activations + logits + head_gradient


def device_memory(device: torch.device) -> float | None:
    """Bytes a device has in all; of the host for a CPU; None where it can't be told."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None
