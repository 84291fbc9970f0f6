"""The state of a run while it trains: what `gpt2.train.setup` opens, and where the run stands."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2.checkpoint.writer import CheckpointWriter, NoWriter
from gpt2.config import Config
from gpt2.distributed.hang import HangWatch
from gpt2.distributed.world import World
from gpt2.metrics.recorder import Metrics, NoMetrics
from gpt2.model.gpt import GPT
from gpt2.tokens.dataset import Dataset
from gpt2.tokens.loader import Blocks, Loader
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.train.evaluation import Evaluator
from gpt2.train.guard import StepGuard
from gpt2.train.plan import Plan


@dataclass
class Run:
    """A run, as every process has one; what prints and writes does so in rank 0 only.

    Attributes:
        config: with the model's shape resolved.
        world: the processes.
        dtype: precision of matrix products: "bf16", "tf32" or "fp32".
        environment: versions and hardware, for the checkpoints.
        dataset: the tokens; `train_blocks` and `val_blocks` are its splits, cut into sequences.
        tokenizer: the data's.
        plan: every number that follows from the configuration.
        model: the GPT itself, for evaluation, sampling and checkpoints.
        trained: the same model as `parallelize` wrapped it, to call for a loss.
        optimizers: their learning rates are set in each step.
        guard: decides whether an update happens.
        evaluator: validation loss, HellaSwag, samples.
        watch: writes stacks down when a step takes too long.
        metrics: records what happens.
        writer: writes checkpoints in the background.
        lock: held by rank 0 until the run ends.
        began: when this start began, in seconds of `time.monotonic`.
        step: optimizer steps finished.
        sequences_read: sequences of the run's order that its steps have used.
        val_loss: validation loss of this very step, if it was evaluated.
        best_val_loss: the lowest one so far.
        saved_step: the step last saved or restored; -1: none.
        saved_at: when that was, in seconds of `time.monotonic`.
        skips_in_a_row: updates left out since the last one that was made.
        last_norms: gradient norms of the last updates, before clipping.
        stopping: a signal asked for the end.
        save_due: a process asked for a checkpoint.
        pace_from: after the first step of this start: when, the seconds of evaluation until then, and which step.
        told_of_waiting: it has been said that steps wait for their data.
    """

    config: Config
    world: World
    dtype: str
    environment: dict[str, Any]
    dataset: Dataset
    tokenizer: Tokenizer
    train_blocks: Blocks
    val_blocks: Blocks
    plan: Plan
    model: GPT
    trained: nn.Module
    optimizers: list[torch.optim.Optimizer]
    guard: StepGuard
    evaluator: Evaluator
    watch: HangWatch
    metrics: Metrics | NoMetrics
    writer: CheckpointWriter | NoWriter
    lock: FileIO | None
    began: float
    step: int = 0
    sequences_read: int = 0
    val_loss: float | None = None
    best_val_loss: float = math.inf
    saved_step: int = -1
    saved_at: float = field(default_factory=lambda: time.monotonic())
    skips_in_a_row: int = 0
    last_norms: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    stopping: bool = False
    save_due: bool = False
    pace_from: tuple[float, float, int] | None = None
    told_of_waiting: bool = False

    @property
    def directory(self) -> Path:
        """The directory that the run writes to."""
        return self.config.run.run_dir

    @property
    def total_steps(self) -> int:
        """Steps the run takes, as far as that is fixed."""
        return self.config.run.total_steps

    def say(self, text: str) -> None:
        """Print a line, in rank 0."""
        self.metrics.message(text)

    def open_loader(self) -> Loader:
        """This process's part of every step from here on."""
        return Loader(
            self.train_blocks,
            self.config.sequences_per_step,
            self.sequences_read,
            self.world.rank,
            self.world.size,
            self.config.data.micro_batch_size,
            self.world.device,
        )

    def evaluated(self, val_loss: float | None) -> None:
        """Remember an evaluation of this step, None if it was stopped; where it is the best, a checkpoint is due."""
        self.val_loss = val_loss
        if val_loss is not None and val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            trained = self.step > max(self.saved_step, 0)
            self.save_due |= trained and self.config.run.checkpoint_every > 0

    def advance(self) -> None:
        """Count a step, and say where an epoch ended in it."""
        before = self.sequences_read
        self.step += 1
        self.sequences_read += self.config.sequences_per_step
        self.val_loss = None
        blocks = self.train_blocks.count
        for epoch in range(before // blocks + 1, self.sequences_read // blocks + 1):
            self.say(f"epoch {epoch} ended in step {self.step}: each of {blocks:,} sequences was read once")
