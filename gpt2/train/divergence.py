"""What a step's numbers mean for the run: log them, skip an update, or stop because it diverged."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.fsdp import FSDPModule

from gpt2.metrics.recorder import EndReason
from gpt2.tokens.loader import Loader
from gpt2.train.run import Run
from gpt2.train.step import MicroBatches, PendingNumbers, StepNumbers, ranks_with_bad_gradient, seed_step

MAX_SKIPS_IN_A_ROW = 5


class Diverged(Exception):
    """The run cannot continue: a loss or gradient is not finite, or update after update was skipped.

    Args:
        message: what happened, and in which step.
        reason: how `run_end` records it.
        hint: what may help.
    """

    def __init__(self, message: str, reason: EndReason, hint: str):
        super().__init__(message)
        self.reason: EndReason = reason
        self.hint = hint


@dataclass(frozen=True)
class PendingStep:
    """A step whose numbers the host has not read yet.

    Attributes:
        step: steps finished, this one included.
        lr: AdamW's learning rate in it.
        numbers: on their way to the host.
        batches: this process's part of what it was trained on.
    """

    step: int
    lr: float
    numbers: PendingNumbers
    batches: MicroBatches


def digest(run: Run, pending: PendingStep, loader: Loader) -> None:
    """Read a step's numbers: log them, and notice what must stop the run. All processes come to the same conclusion.

    Raises:
        Diverged: a value is not finite, or too many updates in a row were skipped.
        UserError: a process has no data, in every process.
    """
    numbers = pending.numbers.read()
    run.stopping |= numbers.flags.stop
    run.save_due |= numbers.flags.save
    if numbers.flags.failed:
        run.world.agree(loader.raise_failure)
    run.writer.busy()  # reports a checkpoint that has been written meanwhile
    if numbers.updated:
        run.skips_in_a_row = 0
    else:
        _judge_skip(run, pending, numbers)
    if pending.step % run.config.run.log_every == 0 or pending.step == run.config.run.max_steps:
        run.metrics.train(pending.step, loss=numbers.loss, lr=pending.lr, grad_norm=numbers.grad_norm)


def _judge_skip(run: Run, pending: PendingStep, numbers: StepNumbers) -> None:
    """Stop, or record that an update was left out."""
    if numbers.nonfinite and run.config.run.on_nonfinite == "stop":
        raise Diverged(
            _describe_nonfinite(run, pending, numbers.bad_ranks),
            "nonfinite",
            "--on-nonfinite skip --allow-config-change, added to it, leaves such steps out",
        )
    run.skips_in_a_row += 1
    reason: EndReason = "nonfinite" if numbers.nonfinite else "spike"
    run.metrics.skip(pending.step, reason, numbers.loss, numbers.grad_norm)
    if run.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
        raise Diverged(
            f"{run.skips_in_a_row} updates in a row were skipped, the last at step {pending.step} "
            f"(loss {numbers.loss}, gradient norm {numbers.grad_norm})",
            reason,
            "a lower --learning-rate"
            + (" or a higher --spike-zscore" if reason == "spike" else "")
            + " may help; --allow-config-change lets this run continue with it",
        )


def _describe_nonfinite(run: Run, pending: PendingStep, bad_ranks: list[int]) -> str:
    """Where a value that is not finite came from; every process must ask together."""
    what = "the loss"
    if not bad_ranks:
        what = "the gradient"
        if not isinstance(run.model, FSDPModule):  # no process has the gradient of a sharded model by itself
            seed_step(run.config.run.seed, pending.step - 1, run.world.rank)
            bad_ranks = ranks_with_bad_gradient(run.model, pending.batches, run.world, run.dtype)
    where = f" on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else " after it was summed over all ranks"
    return f"{what} is not finite{where} in step {pending.step}; the weights were not updated"
