"""Validation loss over a fixed number of tokens: the same number for any machine, world size and micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.distributed.world import World
from gpt2.model.attention_kernels import training_backends
from gpt2.model.loss import IGNORE
from gpt2.tokens.loader import Blocks, on_host, to_device
from gpt2.tokens.tokenizer import Tokenizer, token_bytes

_READ_TOKENS = 2**20


def count_val_blocks(blocks: Blocks, val_tokens: int) -> int:
    """Blocks that make up the first `val_tokens` tokens of the split, or all of them, and at least one."""
    return min(max(val_tokens // blocks.block_size, 1), blocks.count)


def count_val_bytes(blocks: Blocks, val_tokens: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that `validation_loss` predicts, for bits per byte.

    Bits per byte = total nats / ln 2 / total bytes: a loss that tokenizers can be compared by. Ids beyond the
    tokenizer's, which the data should not hold, count as no text.

    Args:
        blocks: the validation split.
        val_tokens: the number of targets that are scored.
        tokenizer: the data's.

    Raises:
        UserError: the tokens cannot be read.
    """
    lengths = np.append(token_bytes(tokenizer), 0)
    count, total = count_val_blocks(blocks, val_tokens) * blocks.block_size, 0
    for start in range(1, count + 1, _READ_TOKENS):  # the first token is never a target
        tokens = blocks.stream.read(start, min(start + _READ_TOKENS, count + 1))
        total += int(lengths[np.minimum(tokens, tokenizer.n_vocab)].sum())
    return total


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    blocks: Blocks,
    val_tokens: int,
    micro_batch_size: int,
    world: World,
    autocast: Callable[[], AbstractContextManager[None]],
    progress: Callable[[], None] = lambda: None,
) -> float:
    """Mean negative log-likelihood per token, in nats, over the first `val_tokens` tokens of the validation split.

    Every process takes the same number of equal micro-batches, filled up with positions that do not count, so shapes
    are static and collectives inside the model pair up.

    Args:
        model: GPT or its wrapper: (tokens, targets) to the sum of the losses.
        blocks: the validation split.
        val_tokens: how many; of `count_val_blocks`.
        micro_batch_size: sequences a forward pass.
        world: the processes that share the work.
        autocast: makes the precision context the run trains under.
        progress: called after each micro-batch, by all processes; may raise to stop.

    Raises:
        UserError: the tokens cannot be read, in every process.
    """
    count = count_val_blocks(blocks, val_tokens)
    stride = micro_batch_size * world.size
    total = torch.zeros((), device=world.device, dtype=torch.float32 if world.device.type == "mps" else torch.float64)
    rows = np.arange(-(-count // stride) * stride).reshape(-1, world.size, micro_batch_size)
    mine = rows[:, world.rank]  # (batches, B)
    # Read in one go, so that a shard that one process cannot read stops all of them here and not within the model.
    read = world.agree(lambda: blocks.read(np.minimum(mine.reshape(-1), count - 1)))
    was_training = model.training
    model.eval()
    try:
        for numbers, ids in zip(mine, read.reshape(*mine.shape, -1), strict=True):
            tokens = to_device(on_host(ids, world.device), world.device)
            padding = torch.from_numpy(numbers >= count).to(world.device)  # (B,)
            targets = tokens[:, 1:].masked_fill(padding[:, None], IGNORE)
            with autocast(), training_backends(world.device):
                loss: Tensor = model(tokens[:, :-1], targets)
            total += loss
            progress()
    finally:
        model.train(was_training)
    return world.sum_(total).item() / (count * blocks.block_size)
