"""Train a GPT-2.

    python train_gpt2.py                                           # GPT-2 124M on this machine's one device
    torchrun --standalone --nproc_per_node=8 train_gpt2.py         # the same run on eight GPUs
    python train_gpt2.py quickstart --max-steps 50                 # a preset, and any setting as a flag

`--help` lists the presets and settings. The run's directory receives its configuration, metrics, samples and
checkpoints; the same command continues a run that was stopped. Exit codes: 0 finished, or stopped by a signal and ready
to go on; 2 something to be put right; 3 a loss or gradient that is not finite, or five skipped updates in a row.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule

from gpt2.checkpoint.directory import Checkpoint, host_copy, read_checkpoint
from gpt2.checkpoint.resume import Origin, find_origin, find_start, is_own, load_weights, write_config
from gpt2.checkpoint.writer import CheckpointWriter
from gpt2.config import Config
from gpt2.distributed.hang import HangWatch, enable_flight_recorder
from gpt2.distributed.parallel import parallelize, place_like, whole
from gpt2.distributed.world import WholeErrorFile, World, shorten_timeout, world
from gpt2.errors import UserError, first_line, run_cli
from gpt2.hardware import device_name, environment
from gpt2.metrics.phase_clock import Phase
from gpt2.metrics.recorder import EndReason, Metrics
from gpt2.model.gpt import GPT
from gpt2.precision import make_deterministic, resolve_dtype, set_matmul_precision
from gpt2.presets import parse_args
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks, Loader
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.train.divergence import MAX_SKIPS_IN_A_ROW, StepGuard, StopSignals, lock_run
from gpt2.train.evaluation import Evaluator
from gpt2.train.optim import describe_groups, load_state_tensors, make_optimizers, set_learning_rates, state_tensors
from gpt2.train.out_of_memory import explain, is_out_of_memory, record_allocations
from gpt2.train.plan import Plan, device_memory, make_plan
from gpt2.train.profile import StepProfiler
from gpt2.train.schedule import lr_factor, plot_schedule
from gpt2.train.step import Flags, MicroBatches, PendingNumbers, ranks_with_bad_gradient, seed_step, train_step

DIVERGED_EXIT = 3


class Diverged(Exception):
    """The run can't go on like this: a loss or gradient is not finite, or update after update was skipped.

    Args:
        message: what happened, and in which step.
        reason: as `run_end` records it.
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
        numbers: on their way.
        batches: what it was trained on, this process's part.
    """

    step: int
    lr: float
    numbers: PendingNumbers
    batches: MicroBatches


class Run:
    """A run from its settings to its last checkpoint. Every process has one; rank 0's prints and writes."""

    def __init__(self, config: Config, world: World, signals: StopSignals):
        self.world, self.signals = world, signals
        self.directory = config.run.run_dir
        self.metrics: Metrics | None = None
        self.writer: CheckpointWriter | None = None
        self.say = print if world.is_main else _silent
        self.step = 0  # optimizer steps finished
        self.sample = 0  # sequences of the run's order used up
        self.val_loss: float | None = None  # of this step, if it was evaluated
        self.stopping = self.save_due = False
        self.skips_in_a_row = 0
        self.failure: UserError | None = None  # why this process has no data

        self.dtype = world.agree(lambda: resolve_dtype(config.run.dtype, world.device))
        set_matmul_precision(self.dtype)
        if config.run.deterministic:
            make_deterministic()
        record_allocations(world.device, on=True)
        self.open_data(config)
        origin = world.on_main(lambda: find_origin(config))  # downloads, if anything
        self.config = replace(config, model=origin.model)
        self.plan = world.agree(self.make_plan)
        self.restored: Checkpoint | None = None  # on rank 0, which reads for all
        self.environment = environment(world.device, world.size)
        start, training = world.on_main(self.claim_directory)
        self.watch = HangWatch(self.directory / "hang", world.rank)
        self.build(origin, training)
        self.restored = None
        self.saved_step = self.step if training else -1
        self.saved_at = time.monotonic()
        self.announce()
        self.evaluator = Evaluator(
            self.config, self.model, world, self.dtype, self.val_blocks, self.tokenizer, self.say
        )
        own = start is not None and is_own(start, self.directory)
        world.on_main(lambda: self.open_outputs(training["metrics_position"] if own else 0))

    def open_data(self, config: Config) -> None:
        """Open the data set, the same one in every process."""
        self.dataset = self.world.agree(lambda: open_dataset(config.data.data))
        self.tokenizer: Tokenizer = self.world.agree(self.dataset.tokenizer)
        fingerprint = self.world.on_main(lambda: self.dataset.fingerprint)

        def compare() -> None:
            if self.dataset.fingerprint != fingerprint:
                raise UserError(
                    f"{config.data.data} holds other data for rank {self.world.rank} than for rank 0; copy rank 0's"
                )

        self.world.agree(compare)

    def make_plan(self) -> Plan:
        """What follows from the settings, the data and the machine; refuses what can't work."""
        config, world = self.config, self.world
        if config.run.parallel == "fsdp" and not torch.distributed.is_initialized():
            raise UserError(
                "--parallel fsdp shards the model over the processes torchrun starts; start it with torchrun, or use "
                "--parallel ddp"
            )
        blocks = partial(Blocks, block_size=config.model.block_size, vocab_size=config.model.vocab_size)
        self.train_blocks = blocks(self.dataset.train, seed=config.run.seed if config.data.shuffle else None)
        self.val_blocks = blocks(self.dataset.val)
        memory = device_memory(world.device)
        plan = make_plan(
            config,
            self.dataset,
            self.train_blocks,
            self.val_blocks,
            world.size,
            self.dtype,
            world.device.type,
            memory,
        )
        prompt = self.tokenizer.encode(config.run.sample_prompt) if config.run.num_samples else []
        if config.run.num_samples and not 0 < len(prompt) <= config.model.block_size:
            raise UserError(
                f"sample_prompt has {len(prompt)} tokens; it must have between 1 and block_size "
                f"{config.model.block_size}"
            )
        return plan

    def claim_directory(self) -> tuple[Path | None, dict[str, Any]]:
        """Lock the run's directory, read the checkpoint to go on from, store the settings; rank 0 alone.

        Returns:
            The checkpoint's path, None to start anew, and its training.json.
        """
        self.lock = lock_run(self.directory)
        start = find_start(self.config, self.dataset.fingerprint, self.say)
        if start is not None:
            self.restored = read_checkpoint(start, self.config.model)
        # What the next start is told by this file: go on, whatever this one was told.
        foreign = start is not None and not is_own(start, self.directory)
        next_run = replace(self.config.run, resume=str(start) if foreign else "auto", allow_config_change=False)
        try:
            write_config(replace(self.config, run=next_run), self.directory / "config.json")
            (self.directory / "environment.json").write_text(json.dumps(self.environment, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.directory}: {error.strerror}; choose another --run"
            ) from None
        return start, {} if self.restored is None else dict(self.restored.training)

    def build(self, origin: Origin, training: dict[str, Any]) -> None:
        """Make the model, the optimizers and the guard, in the state they are to go on from."""
        config, world = self.config, self.world
        self.model = GPT(config.model)
        if origin.weights is None and not training:
            self.model.init_weights(config.run.seed)
        self.model.to(world.device)
        parameters = dict(self.model.named_parameters())
        state: dict[str, Tensor] = {}
        if self.restored is not None:
            state = dict(self.restored.model)
        elif origin.weights is not None and not training:
            world.on_main(lambda: state.update(load_weights(origin)))
        with torch.no_grad():
            for name, tensor in world.share({name: state[name] for name in parameters} if state else None):
                parameters[name].copy_(tensor)
        self.trained = parallelize(self.model, config.run, world, self.dtype, self.plan.grad_accum_steps)
        self.optimizers = make_optimizers(self.model, config.optim, world.device)
        self.guard = StepGuard(world.device, config.run.on_nonfinite, config.run.spike_zscore)
        if training:
            moments = world.share(self.restored.optimizer if self.restored is not None else None)
            load_state_tensors(self.model, self.optimizers, moments, place_like)
            self.guard.state.copy_(torch.tensor(training["guard"]))
            self.step, self.sample, self.val_loss = training["step"], training["sample"], training["val_loss"]

    def announce(self) -> None:
        """Print what is about to happen."""
        for line in self.plan.lines(self.config, self.world.size, device_name(self.world.device), self.dtype):
            self.say(line)
        for line in describe_groups(self.optimizers):
            self.say(f"{'optimizer':<11}{line}")
        self.say(f"{'run':<11}{self.directory}" + (f", going on at step {self.step}" if self.step else ""))
        if self.world.size > 1:
            self.say(
                f"{'hang':<11}if a process keeps the others waiting, {self.watch.directory} will tell where it was"
            )

    def open_outputs(self, metrics_position: int) -> None:
        """Open what rank 0 writes to."""
        self.metrics = Metrics(
            self.directory,
            config=self.config,
            flops_per_token=self.plan.flops_per_token,
            device=self.world.device,
            world_size=self.world.size,
            start_step=self.step,
            start_tokens=self.sample * self.config.model.block_size,
            position=metrics_position,
            dataset=self.dataset.manifest.name if self.dataset.manifest else self.config.data.data.name,
        )
        self.say = self.metrics.message
        self.writer = CheckpointWriter(
            self.directory / "checkpoints",
            self.config.model,
            self.tokenizer,
            self.config.run.keep,
            self.config.run.keep_every,
            saved=self.metrics.checkpoint,
            failed=self.metrics.message,
        )

    def train(self) -> int:
        """Run to the last step, or to a reason to stop; returns the exit code."""
        settings, total_steps = self.config.run, self.config.run.max_steps
        if self.evaluation_is_due() and self.val_loss is None:  # a stop does not wait for its step's
            self.evaluate()
        if self.step >= total_steps:
            self.say(
                f"the run is finished: {self.step} of {total_steps} steps are done; "
                "--max-steps N --allow-config-change goes further"
            )
            return self.finish("finished")
        profiler: StepProfiler | None = None
        if settings.profile and self.world.is_main:
            profiler = StepProfiler(self.directory / "profile", settings.profile, self.world.device, self.step)
        pending: PendingStep | None = None
        first = True
        with Loader(
            self.train_blocks,
            self.config.sequences_per_step,
            self.sample,
            self.world.rank,
            self.world.size,
            self.config.data.micro_batch_size,
            self.world.device,
        ) as loader:
            while self.step < total_steps and not self.stopping:
                self.watch.arm(starting=first)
                with self.phase("data"):
                    batches = self.next_batches(loader)
                factor = lr_factor(self.step, total_steps, self.config.optim)
                set_learning_rates(self.optimizers, factor)
                seed_step(settings.seed, self.step, self.world.rank)
                numbers = train_step(
                    self.trained,
                    self.optimizers,
                    batches,
                    self.guard,
                    self.world,
                    dtype=self.dtype,
                    tokens_per_step=self.config.data.total_batch_tokens,
                    grad_clip=self.config.optim.grad_clip,
                    flags=Flags(
                        stop=self.signals.received is not None,
                        save=self.minutes_are_up(),
                        failed=self.failure is not None,
                    ),
                )
                self.advance()
                if pending is not None:
                    self.digest(pending)
                pending = PendingStep(self.step, factor * self.config.optim.learning_rate, numbers, batches)
                evaluate = self.evaluation_is_due()
                save = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
                at_once = first or not reads_late(self.world.device) or self.step == total_steps
                if at_once or evaluate or save or self.stopping or self.save_due:
                    self.digest(pending)
                    pending = None
                if first:
                    shorten_timeout()
                    record_allocations(self.world.device, on=False)
                    first = False
                if profiler is not None:
                    profiler.step()
                self.watch.disarm()
                if evaluate and not self.stopping:  # a stop must not wait for long; the next start evaluates
                    self.evaluate()
                if save or self.save_due or self.stopping or self.step == total_steps:
                    self.save()
        if profiler is not None:
            profiler.close()
            self.say(f"the profiler's trace is {profiler.path}" if profiler.written else "too few steps to profile")
        return self.finish("stopped" if self.stopping else "finished")

    def next_batches(self, loader: Loader) -> MicroBatches:
        """This process's part of the next step; a made-up one if it can't be read, until all processes know."""
        if self.failure is None:
            try:
                return loader.next()
            except UserError as error:
                self.failure = error
        return loader.blank()

    def advance(self) -> None:
        """Count a step, and say where an epoch ended in it."""
        before = self.sample
        self.step += 1
        self.sample += self.config.sequences_per_step
        self.val_loss = None
        blocks = self.train_blocks.count
        for epoch in range(before // blocks + 1, self.sample // blocks + 1):
            self.say(f"epoch {epoch} ended in step {self.step}: each of {blocks:,} sequences was read once")

    def evaluation_is_due(self) -> bool:
        """Whether this step is one that evaluates: every `eval_every`-th, the first and the last."""
        every = self.config.run.eval_every
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.max_steps)

    def digest(self, pending: PendingStep) -> None:
        """Read a step's numbers: log them, and notice what must stop the run. The same in every process."""
        numbers = pending.numbers.read()
        self.stopping |= numbers.flags.stop
        self.save_due |= numbers.flags.save
        if numbers.flags.failed:
            self.world.agree(self.raise_failure)
        if self.writer is not None:
            self.writer.busy()  # reports a checkpoint that has been written meanwhile
        if numbers.updated:
            self.skips_in_a_row = 0
        elif numbers.nonfinite and self.config.run.on_nonfinite == "stop":
            raise Diverged(
                self.describe_failure(pending, numbers.bad_ranks),
                "nonfinite",
                "--on-nonfinite skip --allow-config-change, added to it, leaves such steps out",
            )
        else:
            self.skips_in_a_row += 1
            reason: EndReason = "nonfinite" if numbers.nonfinite else "spike"
            if self.metrics is not None:
                self.metrics.skip(pending.step, reason, numbers.loss, numbers.grad_norm)
            if self.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
                raise Diverged(
                    f"{self.skips_in_a_row} updates in a row were skipped, the last at step {pending.step} "
                    f"(loss {numbers.loss}, gradient norm {numbers.grad_norm})",
                    reason,
                    "a lower --learning-rate"
                    + (" or a higher --spike-zscore" if reason == "spike" else "")
                    + " may help; --allow-config-change lets this run go on with it",
                )
        log_every = self.config.run.log_every
        if self.metrics is not None and (pending.step % log_every == 0 or pending.step == self.config.run.max_steps):
            self.metrics.train(pending.step, loss=numbers.loss, lr=pending.lr, grad_norm=numbers.grad_norm)

    def raise_failure(self) -> None:
        """Raise why this process has no data, if so."""
        if self.failure is not None:
            raise self.failure

    def describe_failure(self, pending: PendingStep, bad_ranks: list[int]) -> str:
        """Where a value that is not finite came from; every process must ask together."""
        what = "the loss"
        if not bad_ranks:
            what = "the gradient"
            if not isinstance(self.model, FSDPModule):  # of a sharded model no process has a gradient of its own
                seed_step(self.config.run.seed, pending.step - 1, self.world.rank)
                bad_ranks = ranks_with_bad_gradient(self.model, pending.batches, self.world, self.dtype)
        where = f" on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else " after it was summed over all ranks"
        return f"{what} is not finite{where} in step {pending.step}; the weights were not updated"

    def minutes_are_up(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = self.config.run.checkpoint_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def evaluate(self) -> None:
        """Evaluate the model as it is now."""
        with self.phase("eval"):
            self.val_loss = self.evaluator.evaluate(self.step, self.metrics)
            self.stopping |= self.world.any(self.signals.received is not None)

    def save(self) -> None:
        """Copy the state to the host and begin to write it."""
        self.save_due, self.saved_at = False, time.monotonic()
        if self.saved_step == self.step:
            return
        self.saved_step = self.step
        with self.phase("save"):
            # A disk may be slow. The others wait for rank 0 here, asking often enough not to think that it hangs.
            while self.world.any(self.writer is not None and self.writer.busy(seconds=10)):
                pass
            model = {name: self.gather(parameter) for name, parameter in self.model.named_parameters()}
            optimizer = state_tensors(self.model, self.optimizers, self.gather)
            if self.writer is None or self.metrics is None:
                return
            training: dict[str, Any] = {
                "step": self.step,
                "sample": self.sample,
                "tokens": self.sample * self.config.model.block_size,
                "val_loss": self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else None,
                "guard": self.guard.state.tolist(),
                "data_fingerprint": self.dataset.fingerprint,
                "metrics_position": self.metrics.position(),
                "config": self.config.to_dict(),
                "environment": self.environment,
            }
            self.writer.save(Checkpoint(model, optimizer, training))

    def gather(self, tensor: Tensor) -> Tensor:
        """A tensor whole and on the host, in rank 0; the others, who must ask together, get nothing to keep."""
        full = whole(tensor)
        return host_copy(full) if self.world.is_main else torch.empty(0)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Time something that is not training."""
        return self.metrics.phase(name) if self.metrics is not None else nullcontext()

    def finish(self, reason: EndReason) -> int:
        """Wait for the last checkpoint and close everything; returns the exit code."""
        code = 0
        if self.writer is not None:
            self.writer.wait()
            if reason in ("finished", "stopped") and self.writer.failed_step == self.step:
                self.say(f"error: step {self.step} is not saved; make room, then go on with: {self.resume_command()}")
                code = 2
            elif reason == "stopped":
                name = self.signals.received or "a signal to another process"
                self.say(f"stopped by {name} after step {self.step}; resume with: {self.resume_command()}")
        self.close(reason)
        return code

    def close(self, reason: EndReason) -> None:
        """Let go of everything, without waiting."""
        if self.metrics is not None:
            self.metrics.close(reason)
        self.watch.close()

    def diverged(self, failure: Diverged) -> int:
        """Say what is not finite and how to go on; returns the exit code."""
        last = self.writer.newest() if self.writer is not None else None
        self.say(f"error: {failure}")
        self.say(
            f"the last good checkpoint is {last}; go back to it with: {self.resume_command()}"
            if last is not None
            else f"there is no checkpoint to go back to; start over with: {self.resume_command()}"
        )
        if failure.hint:
            self.say(failure.hint)
        self.finish(failure.reason)
        return DIVERGED_EXIT

    def resume_command(self) -> str:
        """The words that continue this run."""
        start = "python" if self.world.size == 1 else f"torchrun --standalone --nproc_per_node={self.world.size}"
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size)) != self.world.size:
            start = "torchrun, with the same words as now on each machine,"
        return f"{start} train_gpt2.py --config {shlex.quote(str(self.directory / 'config.json'))}"


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read while the next step runs: of a GPU, which would else wait for the host."""
    return device.type == "cuda"


def _silent(text: str) -> None:
    pass


@partial(record, error_handler=WholeErrorFile())
def main() -> int:
    """Run the command line."""
    config = parse_args(sys.argv[1:])
    if config.run.plot_schedule is not None:
        plot_schedule(config.run.plot_schedule, config.run.max_steps, config.optim)
        print(f"drew the learning rate of {config.run.max_steps} steps in {config.run.plot_schedule}")
        return 0
    enable_flight_recorder(config.run.run_dir / "hang")
    # Signals afterwards: a process that waits for others to join could not heed them.
    with world(config.run.device) as this, StopSignals() as signals:
        try:
            run = Run(config, this, signals)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"rank {this.rank}: the model does not fit on {this.device} ({first_line(error)}); is somebody else "
                "using it? Else use a smaller model, or --parallel fsdp over more processes",
                alone=True,
            ) from None
        try:
            return run.train()
        except Diverged as failure:
            return run.diverged(failure)
        except KeyboardInterrupt:  # the second one: at once
            run.close("error")
            raise
        except BaseException as error:
            line = run.watch.explain(error)
            if line is not None:
                print(f"error: {line}", file=sys.stderr)
            run.finish("error")
            if is_out_of_memory(error):
                raise explain(error, run.config, run.plan.parameters, this, run.dtype) from None
            raise


if __name__ == "__main__":
    run_cli(main)
