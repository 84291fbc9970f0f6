"""Train a GPT-2.

    python train_gpt2.py                                           # GPT-2 124M on this machine's one device
    torchrun --standalone --nproc_per_node=8 train_gpt2.py         # the same run on eight GPUs
    python train_gpt2.py quickstart --max-steps 50                 # a preset, and any setting as a flag
    python train_gpt2.py gpt2-xl --plan --on 8xH100 --price 2.5    # what it takes: memory, hours, money

`--help` lists the presets and settings. The run's directory receives its configuration, metrics, samples and
checkpoints; the same command resumes a run that was stopped. Exit codes: 0 finished, or stopped by SIGTERM, SIGUSR1 or
SIGHUP and ready to resume; 130 stopped by Ctrl-C and ready to resume; 2 something for you to fix; 3 a loss or gradient
that is not finite, or five skipped updates in a row.

Read on from here: `train_step` is one update of the weights, `train` is the loop around it, `main` is how it starts.
Then gpt2/model/gpt.py is the network, gpt2/tokens/loader.py says which tokens a step sees, and gpt2/train/ has a file
for each thing a run does: setup.py opens it, divergence.py judges a step, saving.py and ending.py are what they say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from gpt2.distributed.hang import enable_flight_recorder
from gpt2.distributed.parallel import accumulating, whole
from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import WholeErrorFile, World, joined_world, shorten_timeout
from gpt2.errors import run_cli
from gpt2.metrics.recorder import EndReason
from gpt2.model.attention_kernels import training_backends
from gpt2.precision import autocast
from gpt2.presets import parse_args
from gpt2.train.divergence import PendingStep, digest
from gpt2.train.ending import run_to_its_end
from gpt2.train.forecast import print_plan
from gpt2.train.guard import StepGuard
from gpt2.train.length import fix_length
from gpt2.train.optim import set_learning_rates, step_unless
from gpt2.train.out_of_memory import record_allocations
from gpt2.train.profile import profiled
from gpt2.train.run import Run
from gpt2.train.saving import minutes_are_up, save
from gpt2.train.schedule import lr_factor, plot_schedule
from gpt2.train.setup import what_must_agree
from gpt2.train.step import Flags, MicroBatches, PendingNumbers, reads_late, seed_step, share_numbers


def train_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: MicroBatches,
    guard: StepGuard,
    world: World,
    *,
    dtype: str,
    tokens_per_step: int,
    grad_clip: float,
    flags: Callable[[], Flags],
) -> PendingNumbers:
    """Update the weights once, by the gradient of the mean loss over the step's tokens in all processes.

    Args:
        model: returns the sum of the losses of (B, T) targets; wrapped by `parallelize`.
        optimizers: their learning rates are set.
        batches: this process's micro-batches.
        guard: may veto the update.
        world: the processes.
        dtype: precision of matrix products.
        tokens_per_step: over all processes and micro-batches.
        grad_clip: largest global gradient norm; 0: any.
        flags: what this process wants all of them to know, once its micro-batches are done.
    """
    # Forward and backward, one micro-batch at a time; gradients add up in each parameter's .grad.
    own_loss = torch.zeros((), device=world.device)
    for number, (tokens, targets) in enumerate(batches):  # (B, T) each
        with accumulating(model, last=number == len(batches) - 1):  # under DDP the last one sums over processes
            with autocast(world.device, dtype), training_backends(world.device):
                loss = model(tokens, targets) / tokens_per_step
            (loss * world.size).backward()  # DDP and FSDP average over processes, where the loss is a sum over them
        own_loss += loss.detach()

    # The loss over all processes, and in the same message whether one of them must stop, save, or has no data.
    shared = share_numbers(own_loss, flags(), world)

    # Clip the gradient to a global norm.
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    grad_norm = whole(norm)

    # Update, unless the loss or the norm is not finite or a spike. The device decides; the host does not wait.
    veto, nonfinite = guard.veto(shared[0], grad_norm)
    step_unless(optimizers, veto)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return PendingNumbers(torch.cat([torch.stack([shared[0], grad_norm, veto, nonfinite]), shared[1:]]))


def train(run: Run, signals: StopSignals) -> EndReason:
    """Train to the last step, or to a reason to stop."""
    config, settings, world = run.config, run.config.run, run.world  # but for the length, which may yet be fixed

    def evaluation_is_due() -> bool:
        every = settings.eval_every
        return every > 0 and (run.step % every == 0 or run.step == run.total_steps)

    def must_stop() -> bool:
        run.stopping = run.stopping or world.any(signals.received is not None)
        return run.stopping

    def evaluate() -> None:
        with run.metrics.phase("eval"):
            run.evaluated(run.evaluator.evaluate(run.step, run.metrics, must_stop))
            must_stop()  # while it drew samples

    if evaluation_is_due() and run.val_loss is None:  # before the first step, or where a stop did not wait for it
        evaluate()
    if run.step >= run.total_steps:
        run.say(f"the run is finished: {run.step} steps are done; --max-steps N --allow-config-change goes further")
        return "finished"

    pending: PendingStep | None = None  # the step whose numbers the host has not read yet
    first = True
    with run.open_loader() as loader, profiled(run) as profile_step:
        while run.step < run.total_steps and not run.stopping:
            run.watch.arm(starting=first)

            # 1. The step's tokens: a pure function of the seed and the step, whatever the number of processes.
            with run.metrics.phase("data"):
                batches = loader.next()

            # 2. The learning rates and the random numbers, pure functions of the step, too.
            factor = lr_factor(run.step, run.total_steps, config.optim)
            set_learning_rates(run.optimizers, factor)
            seed_step(settings.seed, run.step, world.rank)

            # 3. Forward, backward, clip, update.
            numbers = train_step(
                run.trained,
                run.optimizers,
                batches,
                run.guard,
                world,
                dtype=run.dtype,
                tokens_per_step=config.data.total_batch_tokens,
                grad_clip=config.optim.grad_clip,
                flags=lambda: Flags(signals.received is not None, minutes_are_up(run), loader.failed, loader.waiting),
            )
            run.advance()
            fix_length(run)

            # 4. Log, skip or stop by what the step came to; on a GPU one step late, so that the host never waits.
            if pending is not None:
                digest(run, pending, loader)
            pending = PendingStep(run.step, factor * config.optim.learning_rate, numbers, batches)
            evaluation = evaluation_is_due()
            checkpoint = settings.checkpoint_every > 0 and run.step % settings.checkpoint_every == 0
            last = run.step == run.total_steps
            at_once = first or last or not reads_late(world.device)
            if at_once or evaluation or checkpoint or run.stopping or run.save_due:
                digest(run, pending, loader)
                pending = None
            if first:
                shorten_timeout()
                record_allocations(world.device, on=False)
                first = False
            profile_step()
            run.watch.disarm()

            # 5. Now and then: evaluate, and save.
            if evaluation and not run.stopping:  # a stop does not wait for an evaluation; the next start makes it
                evaluate()
            if checkpoint or last or run.stopping or run.save_due:
                save(run)
    return "stopped" if run.stopping else "finished"


@partial(record, error_handler=WholeErrorFile())
def main() -> int:
    """Run the command line."""
    config = parse_args(sys.argv[1:])
    if config.run.plot_schedule is not None:
        plot_schedule(config.run.plot_schedule, config.run.total_steps, config.optim)
        print(f"drew the learning rate of {config.run.total_steps} steps in {config.run.plot_schedule}")
        return 0
    if config.run.plan:
        print_plan(config)
        return 0
    enable_flight_recorder(config.run.run_dir / "hang")
    with joined_world(config.run.device, partial(what_must_agree, config)) as this:
        return run_to_its_end(train, config, this)


if __name__ == "__main__":
    run_cli(main)
