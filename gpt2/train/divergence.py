"""What a step's numbers mean for the run: log them, skip an update, or stop because it diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.fsdp import FSDPModule

from gpt2.metrics.recorder import EndReason
from gpt2.tokens.loader import WAITING, Loader
from gpt2.train.nan_report import first_nonfinite
from gpt2.train.run import Run
from gpt2.train.step import MicroBatches, PendingNumbers, StepNumbers, seed_step

MAX_SKIPS_IN_A_ROW = 5


class Diverged(Exception):
    """The run cannot continue: a loss or gradient is not finite, or update after update was skipped.

    Args:
        message: what happened, and in which step.
        reason: how `run_end` records it.
        circumstances: lines about where it happened.
        flags: what to add to the command that resumes the run, each with what it does.
        hint: what to do where no such flag helps.
    """

    def __init__(
        self,
        message: str,
        reason: EndReason,
        circumstances: Sequence[str] = (),
        flags: Mapping[str, str] | None = None,
        hint: str = "",
    ):
        super().__init__(message)
        self.reason: EndReason = reason
        self.circumstances, self.flags, self.hint = circumstances, dict(flags or {}), hint


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
    if numbers.flags.waiting and not run.told_of_waiting:
        run.told_of_waiting = True
        run.say(
            f"warning: steps wait for their data for more than {WAITING:.0%} of the time; is "
            f"{run.dataset.directory} on slow storage? Copy it to a local disk"
        )
    run.writer.busy()  # reports a checkpoint that has been written meanwhile
    if numbers.updated:
        run.skips_in_a_row = 0
        run.last_norms.append(numbers.grad_norm)
    else:
        _judge_skip(run, pending, numbers)
    if pending.step % run.config.run.log_every == 0 or pending.step == run.config.run.total_steps:
        run.metrics.train(pending.step, loss=numbers.loss, lr=pending.lr, grad_norm=numbers.grad_norm)


def _judge_skip(run: Run, pending: PendingStep, numbers: StepNumbers) -> None:
    """Stop, or record that an update was left out."""
    if numbers.nonfinite and run.config.run.on_nonfinite == "stop":
        raise _diverged(run, pending, numbers)
    run.skips_in_a_row += 1
    reason: EndReason = "nonfinite" if numbers.nonfinite else "spike"
    run.metrics.skip(pending.step, reason, numbers.loss, numbers.grad_norm)
    if run.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
        raise _diverged(run, pending, numbers)


def _diverged(run: Run, pending: PendingStep, numbers: StepNumbers) -> Diverged:
    """What happened in a step that ends the run, and what may help; every process must ask together."""
    settings, optim, step = run.config.run, run.config.optim, pending.step
    norms = ", ".join(f"{norm:.3g}" for norm in run.last_norms) or "none"
    circumstances = [f"learning rate {pending.lr:.3g} in that step; gradient norms of the last updates: {norms}"]
    change = " --allow-config-change"
    flags = {f"--learning-rate {optim.learning_rate / 2:.3g}{change}": "half the learning rate"}
    if optim.grad_clip == 0:
        flags[f"--grad-clip 1{change}"] = "no gradient is longer than 1"
    reason: EndReason = "nonfinite" if numbers.nonfinite else "spike"
    message = (
        f"{run.skips_in_a_row} updates in a row were skipped, the last at step {step} "
        f"(loss {numbers.loss}, gradient norm {numbers.grad_norm})"
    )
    if not numbers.nonfinite:
        flags["--spike-zscore " + f"{2 * (settings.spike_zscore or 0):g}{change}"] = "more is no spike"
        return Diverged(message, reason, circumstances, flags)
    seed_step(settings.seed, step - 1, run.world.rank)
    places = first_nonfinite(run.model, pending.batches, run.world, run.dtype)
    bad_ranks = numbers.bad_ranks or [rank for rank, place in enumerate(places) if place is not None]
    if settings.on_nonfinite == "stop":
        what = "loss" if numbers.bad_ranks else "gradient"
        where = f"on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "after it was summed over all ranks"
        message = f"the {what} is not finite {where} in step {step}; the weights were not updated"
    first = [f"{place} (rank {rank})" for rank, place in enumerate(places) if place is not None]
    if first:
        circumstances.append(f"done again, the step is first not finite in {', '.join(first[:4])}")
    elif isinstance(run.model, FSDPModule):
        circumstances.append("done again, the step's forward pass is finite in every process")
    elif settings.compile:
        circumstances.append("done again without the compiler, the step is finite: --no-compile may help")
    else:
        circumstances.append("done again, the step is finite: what went wrong is not in the weights or the data")
    if any(place is not None and place.startswith("the weight") for place in places):
        hint = "the weights themselves are not finite, so every step from here on fails: start from earlier ones"
        return Diverged(message, reason, circumstances, hint=hint)
    if run.dtype == "bf16":
        flags[f"--dtype fp32{change}"] = "matrix products in fp32"
    if settings.on_nonfinite == "stop":
        flags[f"--on-nonfinite skip{change}"] = "leaves such steps out"
    return Diverged(message, reason, circumstances, flags)
