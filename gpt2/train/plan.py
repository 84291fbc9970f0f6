"""What a run will do, worked out before the first step: every derived number, and a refusal of what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.presets import presets
from gpt2.tokens.dataset import Dataset, makers_command
from gpt2.tokens.loader import Blocks
from gpt2.train.memory import HEADROOM, MemoryNeed, memory_need
from gpt2.train.validation import count_val_blocks

ERROR = 1.25
"""An estimate of memory this many times what there is cannot come true; up to it, one may try."""
MANY_EPOCHS = 40
"""Repeating data more often than this teaches next to nothing (Muennighoff et al. 2023, figure 5)."""


@dataclass(frozen=True)
class DataSizes:
    """How much there is to read.

    Attributes:
        train_tokens: tokens of the training split.
        blocks_per_epoch: sequences it is cut into.
        leftover_tokens: that fill no sequence.
        val_tokens: that an evaluation reads.
    """

    train_tokens: int
    blocks_per_epoch: int
    leftover_tokens: int
    val_tokens: int


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from a configuration, the data and the machine; see `lines` for their meaning."""

    parameters: int
    flops_per_token: float
    grad_accum_steps: int
    tokens_per_step: int
    total_steps: int
    sizes: DataSizes | None
    """None: there is no data yet."""
    memory: MemoryNeed
    device_memory_bytes: float | None
    largest_micro_batch: int | None
    """That is expected to fit; None: not one, or the device's memory is unknown."""

    @property
    def total_tokens(self) -> int:
        """Tokens the run trains on, repeated ones too."""
        return self.total_steps * self.tokens_per_step

    @property
    def epochs(self) -> float | None:
        """Passes over the blocks of the train split; None without data."""
        if self.sizes is None:
            return None
        return self.total_tokens / max(self.sizes.train_tokens - 1 - self.sizes.leftover_tokens, 1)

    def lines(
        self, config: Config, world_size: int, device: str, dtype: str, checkpoint: Path | None = None
    ) -> list[str]:
        """The plan as a table to print, then its warnings.

        Args:
            config: the run's.
            world_size: processes that share a step.
            device: its name.
            dtype: precision of matrix products.
            checkpoint: that the run resumes; None: it begins.
        """
        model, data, sizes = config.model, config.data, self.sizes
        if sizes is None:
            gigabytes = 2 * self.total_tokens / 1e9
            tokens = f" is not here: {makers_command(data.data)} makes it; the run reads {gigabytes:.3g} GB of it"
        else:
            tokens = f": {sizes.train_tokens:,} tokens to train on, in {sizes.blocks_per_epoch:,} sequences" + (
                f" ({sizes.leftover_tokens} left over)" if sizes.leftover_tokens else ""
            )
        need = self.memory.bytes(data.micro_batch_size)
        open_end = config.run.max_minutes > 0 and config.run.fitted_steps is None
        memory = f"{need / 2**30:.1f} GiB per process expected"
        if self.device_memory_bytes is not None:
            memory += f", of {self.device_memory_bytes / 2**30:.1f} GiB"
            if self.largest_micro_batch is not None:
                memory += f"; the largest micro-batch expected to fit is {self.largest_micro_batch}"
        weights = f"drawn from seed {config.run.seed}"
        if checkpoint is not None:
            weights = f"of {checkpoint}"
        elif config.run.init_from is not None:
            weights = f"of {config.run.init_from}"
        rows = {
            "model": f"{self.parameters:,} parameters: {model.n_layer} blocks, {model.n_head} heads, "
            f"width {model.n_embd}, context {model.block_size}, vocabulary {model.vocab_size:,}",
            "weights": weights,
            "device": f"{world_size} × {device}, {dtype}" + (", compiled" if config.run.compile else ""),
            "data": f"{data.data}{tokens}",
            "step": f"{self.tokens_per_step:,} tokens = {data.micro_batch_size} × {model.block_size} tokens "
            f"× {world_size} processes × {self.grad_accum_steps} micro-steps",
            "run": ("at most " if open_end else "")
            + f"{self.total_steps:,} steps = {self.total_tokens:,} tokens"
            + ("" if self.epochs is None else f" = {self.epochs:,.2f} epochs")
            + (f"; the first steps show how many fit into {config.run.max_minutes:g} min" if open_end else ""),
            "compute": f"{self.flops_per_token / 1e6:.3g} MFLOP per token, "
            f"{self.flops_per_token * self.total_tokens:.2e} FLOP in all",
            "memory": memory,
        }
        if sizes is not None:
            every = f" every {config.run.eval_every} steps" if config.run.eval_every else ", never"
            rows["validation"] = f"{sizes.val_tokens:,} tokens{every}"
        return [f"{name:<11}{text}" for name, text in rows.items()] + self.warnings(need)

    def warnings(self, need: float) -> list[str]:
        """What may well go wrong."""
        found = []
        if self.device_memory_bytes is not None and need > HEADROOM * self.device_memory_bytes:
            found.append("warning: the memory may not suffice")
        if self.epochs is not None and self.epochs > MANY_EPOCHS:
            fewer = max(round(MANY_EPOCHS / self.epochs * self.total_steps), 1)
            found.append(
                f"warning: each token is read {self.epochs:,.0f} times, and past {MANY_EPOCHS} times a model hardly "
                f"learns from it; use more data, or --max-steps {fewer}"
            )
        return found

    def refuse_what_does_not_fit(self, config: Config) -> None:
        """Stop now rather than in the first step.

        Raises:
            UserError: more memory is needed than the device has.
        """
        need, has = self.memory.bytes(config.data.micro_batch_size), self.device_memory_bytes
        if has is None or need <= ERROR * has:
            return
        raise UserError(
            f"training {self.parameters:,} parameters with --micro-batch-size {config.data.micro_batch_size} takes "
            f"about {need / 2**30:.1f} GiB per process, but there are {has / 2**30:.1f} GiB; "
            + self.advice(self.largest_micro_batch, config)
        )

    def advice(self, micro_batch_size: int | None, config: Config) -> str:
        """What to do where memory does not suffice, in the words of the command line.

        Args:
            micro_batch_size: one that fits; None: there is none.
            config: the run's.
        """
        if micro_batch_size is not None:
            return f"use --micro-batch-size {micro_batch_size}, which trains the same in more micro-steps"
        if self.device_memory_bytes is not None and self.memory.bytes(0) > self.device_memory_bytes:
            return "use a smaller model, or --parallel fsdp over more GPUs"
        if not config.run.activation_checkpointing:
            return "use --activation-checkpointing, a smaller --block-size or a smaller model"
        return "use a smaller --block-size, a smaller model, or --parallel fsdp over more processes"


def with_datas_vocabulary(config: Config, dataset: Dataset, say: Callable[[str], None]) -> Config:
    """The settings with the data set's vocabulary in a preset's place; one that was asked for stays, as do weights."""
    size = dataset.vocab_size
    ours = {preset.model.vocab_size for _, preset in presets().values()}
    if size in (None, config.model.vocab_size) or config.run.init_from or config.model.vocab_size not in ours:
        return config
    say(f"vocabulary {size:,} ids, as in {dataset.directory}")
    return replace(config, model=replace(config.model, vocab_size=size))


def measure_data(config: Config, dataset: Dataset, train: Blocks, val: Blocks) -> DataSizes:
    """How much there is to read.

    Args:
        config: the run's.
        dataset: it reads.
        train: its train split, cut into sequences.
        val: its validation split, cut into sequences.

    Raises:
        UserError: the data's vocabulary is not the model's.
    """
    model = config.model
    if dataset.vocab_size is not None and dataset.vocab_size != model.vocab_size:
        remedy = f"use --vocab-size {dataset.vocab_size} or other data"
        if config.run.init_from is not None:
            remedy = f"use data of its own tokenizer, or leave out --init-from {config.run.init_from}"
        raise UserError(
            f"{dataset.directory} is tokenized with a vocabulary of {dataset.vocab_size:,}, the model has "
            f"{model.vocab_size:,}; {remedy}"
        )
    val_tokens = count_val_blocks(val, config.data.val_tokens) * model.block_size
    return DataSizes(len(dataset.train), train.count, train.leftover, val_tokens)


def make_plan(
    config: Config,
    sizes: DataSizes | None,
    world_size: int,
    dtype: str,
    device_type: str,
    device_memory_bytes: float | None,
) -> Plan:
    """Work out what a run will do.

    Args:
        config: the run's configuration.
        sizes: sizes of its data; None: there is no data yet.
        world_size: processes that share a step.
        dtype: precision of matrix products: "bf16", "tf32" or "fp32".
        device_type: such as "cuda".
        device_memory_bytes: what a process may use of the device; None: unknown.

    Raises:
        UserError: a step cannot be cut into whole micro-batches.
    """
    model, data = config.model, config.data
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
    memory = memory_need(config, world_size, dtype, device_type)
    share = config.sequences_per_step // world_size
    limit = None if device_memory_bytes is None else HEADROOM * device_memory_bytes
    return Plan(
        parameters=network.num_parameters(),
        flops_per_token=network.flops_per_token(),
        grad_accum_steps=data.total_batch_tokens // per_micro_step,
        tokens_per_step=data.total_batch_tokens,
        total_steps=config.run.total_steps,
        sizes=sizes,
        memory=memory,
        device_memory_bytes=device_memory_bytes,
        largest_micro_batch=None if limit is None else memory.largest_micro_batch(share, limit),
    )


def _fitting_micro_batch(config: Config, world_size: int) -> str:
    """ " or --micro-batch-size N" with the largest one that divides the step, if any does."""
    sequences = config.sequences_per_step
    if sequences % world_size:
        return ""
    share = sequences // world_size
    at_most = min(share, config.data.micro_batch_size)
    size = next(b for b in range(min(at_most, 1 << 20), 0, -1) if share % b == 0)
    return f" or --micro-batch-size {size}"
