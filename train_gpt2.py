"""Train a GPT-2.

    python train_gpt2.py                                           # GPT-2 124M on this machine's one device
    torchrun --standalone --nproc_per_node=8 train_gpt2.py         # the same run on eight GPUs
    python train_gpt2.py quickstart --max-steps 50                 # a preset, and any setting as a flag

`--help` lists the presets and settings. The run's directory receives its configuration, metrics, samples and
checkpoints; the same command continues a run that was stopped. Exit codes: 0 finished, or stopped by a signal and ready
to go on; 2 something to be put right; 3 a loss or gradient that is not finite.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule

from gpt2.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint, snapshot
from gpt2.config import Config, ModelConfig
from gpt2.distributed import World, parallelize, place_like, shorten_timeout, whole, world
from gpt2.errors import UserError, run_cli
from gpt2.evaluate import validation_loss
from gpt2.generate import generate
from gpt2.guards import MAX_SKIPS_IN_A_ROW, StepGuard, StopSignals, lock_run
from gpt2.hardware import device_name, environment
from gpt2.hellaswag import evaluate as evaluate_hellaswag
from gpt2.hellaswag_data import Example, load_examples
from gpt2.huggingface import load_model, resolve_model
from gpt2.loader import Blocks, Loader
from gpt2.metrics import EndReason, Metrics, Phase
from gpt2.model import GPT
from gpt2.optim import describe_groups, load_state_tensors, make_optimizers, set_learning_rates, state_tensors
from gpt2.plan import device_memory, make_plan
from gpt2.precision import autocast, make_deterministic, resolve_dtype, set_matmul_precision
from gpt2.presets import parse_args
from gpt2.resume import find_start, write_config
from gpt2.schedule import lr_factor, plot_schedule
from gpt2.shards import open_dataset
from gpt2.step import MicroBatches, PendingNumbers, ranks_with_bad_gradient, seed_step, train_step
from gpt2.tokenizer import Tokenizer

NONFINITE_EXIT = 3


class Diverged(Exception):
    """A loss or gradient is not finite, and the run was to stop then."""


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
        self.lock: IO[str] | None = None
        self.metrics: Metrics | None = None
        self.say = print if world.is_main else _silent

        # The machine.
        self.dtype = resolve_dtype(config.run.dtype, world.device)
        set_matmul_precision(self.dtype)
        if config.run.deterministic:
            make_deterministic()

        # The data, and the plan that follows from it.
        self.dataset = open_dataset(config.data.data)
        self.tokenizer: Tokenizer = self.dataset.tokenizer()
        initial: GPT | None = None
        if config.run.init_from is not None:
            initial = load_initial(config.run.init_from, config.model, world)
            config = replace(config, model=initial.config)
        self.config = config
        blocks = partial(Blocks, block_size=config.model.block_size, vocab_size=config.model.vocab_size)
        self.train_blocks = blocks(self.dataset.train, seed=config.run.seed if config.data.shuffle else None)
        self.val_blocks = blocks(self.dataset.val)
        plan = make_plan(
            config,
            self.dataset,
            self.train_blocks,
            self.val_blocks,
            world.size,
            self.dtype,
            device_memory(world.device),
        )
        self.prompt = self.tokenizer.encode(config.run.sample_prompt) if config.run.num_samples else []
        if config.run.num_samples and not 0 < len(self.prompt) <= config.model.block_size:
            raise UserError(
                f"sample_prompt has {len(self.prompt)} tokens; it must have between 1 and block_size "
                f"{config.model.block_size}"
            )

        # The run's directory, and where in the run we are.
        self.directory = config.run.run_dir
        start = world.on_main(self.claim_directory)
        self.model = (initial or GPT(config.model).init_weights(config.run.seed)).to(world.device)
        self.step = 0  # optimizer steps finished
        self.sample = 0  # sequences of the run's order used up
        restored: Checkpoint | None = None
        if start is not None:
            restored = read_checkpoint(start, config.model)
            if restored.training["data_fingerprint"] != self.dataset.fingerprint:
                raise UserError(
                    f"{start} was trained on other data than {config.data.data} now holds (fingerprint "
                    f"{restored.training['data_fingerprint'][:12]}, now {self.dataset.fingerprint[:12]}); "
                    "restore the data or choose another --run"
                )
            self.model.load_state_dict(restored.model)
            self.step, self.sample = restored.training["step"], restored.training["sample"]

        # The model in the form that trains, and its optimizers.
        self.trained = parallelize(self.model, config.run, world, self.dtype, plan.grad_accum_steps)
        self.optimizers = make_optimizers(self.model, config.optim, world.device)
        self.guard = StepGuard(world.device, config.run.on_nonfinite, config.run.spike_zscore)
        if restored is not None:
            load_state_tensors(self.model, self.optimizers, restored.optimizer, place_like)
            self.guard.state.copy_(torch.tensor(restored.training["guard"]))

        # What is shown and written.
        for line in plan.lines(config, world.size, device_name(world.device), self.dtype):
            self.say(line)
        for line in describe_groups(self.optimizers):
            self.say(f"{'optimizer':<11}{line}")
        self.say(f"{'run':<11}{self.directory}" + (f", going on at step {self.step}" if self.step else ""))
        self.examples = self.hellaswag_examples()
        if world.is_main:
            self.metrics = Metrics(
                self.directory,
                config=config,
                flops_per_token=plan.flops_per_token,
                device=world.device,
                world_size=world.size,
                start_step=self.step,
                position=restored.training["metrics_position"] if restored is not None else None,
                dataset=self.dataset.manifest.name if self.dataset.manifest else config.data.data.name,
            )
            self.say = self.metrics.message
        self.writer: CheckpointWriter | None = None
        if self.metrics is not None:
            self.writer = CheckpointWriter(
                self.directory / "checkpoints",
                config.model,
                self.tokenizer,
                config.run.keep,
                config.run.keep_every,
                saved=self.metrics.checkpoint,
                failed=self.metrics.message,
            )
        self.saved_step = self.step if start is not None else -1
        self.saved_at = time.monotonic()
        self.val_loss: float | None = None  # of the step just evaluated
        self.stopping = False
        self.save_due = False
        self.skips_in_a_row = 0

    def claim_directory(self) -> Path | None:
        """Lock the run's directory and store the settings; returns the checkpoint to go on from. Rank 0 only."""
        self.lock = lock_run(self.directory)
        start = find_start(self.directory, self.config, self.say)
        try:
            # What the next start is told by this file: go on, whatever this one was told.
            stored = replace(self.config, run=replace(self.config.run, resume="auto", allow_config_change=False))
            write_config(stored, self.directory / "config.json")
            facts = environment(self.world.device, self.world.size)
            (self.directory / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.directory}: {error.strerror}; choose another --run"
            ) from None
        return start

    def hellaswag_examples(self) -> tuple[Example, ...]:
        """The examples evaluations score; none if that is not wanted or they are not to be had."""
        limit = self.config.run.hellaswag_limit
        if limit == 0 or self.config.run.eval_every == 0:
            return ()
        if self.tokenizer.name != "gpt2":
            self.say(f"HellaSwag is left out: it needs GPT-2's tokens, and these are of {self.tokenizer.name!r}")
            return ()
        try:
            return load_examples(self.config.run.hellaswag_data, world=self.world)[:limit]
        except UserError as error:
            if self.config.run.hellaswag_data is not None:
                raise
            self.say(f"HellaSwag is left out: {error}")
            return ()

    def train(self) -> int:
        """Run to the last step, or to a reason to stop; returns the exit code."""
        settings, total_steps = self.config.run, self.config.run.max_steps
        if self.step >= total_steps:
            self.say(f"the run is finished: {self.step} of {total_steps} steps are done; --max-steps goes further")
            return self.finish("finished", 0)
        if self.step == 0:
            self.evaluate()
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
                with self.phase("data"):
                    batches = loader.next()
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
                    stop=self.signals.received is not None,
                    save=self.minutes_are_up(),
                )
                self.step += 1
                self.sample += self.config.sequences_per_step
                # A GPU's numbers are read while its next step runs, so that it never waits for the host.
                if pending is not None:
                    self.digest(pending)
                pending = PendingStep(self.step, factor * self.config.optim.learning_rate, numbers, batches)
                at_once = first or self.world.device.type != "cuda"
                evaluate = settings.eval_every and self.step % settings.eval_every == 0
                save = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
                if at_once or evaluate or save or self.stopping or self.save_due or self.step == total_steps:
                    self.digest(pending)
                    pending = None
                if first:
                    shorten_timeout()
                    first = False
                if evaluate or self.step == total_steps:
                    self.evaluate()
                if save or self.save_due or self.stopping or self.step == total_steps:
                    self.save()
        if self.stopping:
            name = self.signals.received or "a signal to another process"
            self.say(f"stopped by {name} after step {self.step}; resume with: {self.resume_command()}")
            return self.finish("stopped", 0)
        return self.finish("finished", 0)

    def digest(self, pending: PendingStep) -> None:
        """Read a step's numbers: log them, and notice what must stop the run. The same in every process."""
        numbers = pending.numbers.read()
        self.stopping |= numbers.stop
        self.save_due |= numbers.save
        if numbers.updated:
            self.skips_in_a_row = 0
        elif numbers.nonfinite and self.config.run.on_nonfinite == "stop":
            raise Diverged(self.describe_failure(pending, numbers.bad_ranks))
        else:
            self.skips_in_a_row += 1
            if self.metrics is not None:
                reason = "nonfinite" if numbers.nonfinite else "spike"
                self.metrics.skip(pending.step, reason, numbers.loss, numbers.grad_norm)
            if self.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
                raise Diverged(
                    f"{self.skips_in_a_row} updates in a row were skipped, the last at step {pending.step} "
                    f"(loss {numbers.loss}, gradient norm {numbers.grad_norm})"
                )
        log_every = self.config.run.log_every
        if self.metrics is not None and (pending.step % log_every == 0 or pending.step == self.config.run.max_steps):
            self.metrics.train(pending.step, loss=numbers.loss, lr=pending.lr, grad_norm=numbers.grad_norm)

    def describe_failure(self, pending: PendingStep, bad_ranks: list[int]) -> str:
        """Where a value that is not finite came from; every process must ask together."""
        what = "the loss"
        if not bad_ranks:
            what = "the gradient"
            if self.trained is not self.model or self.world.size == 1:  # else sharded: no process has one of its own
                bad_ranks = ranks_with_bad_gradient(self.model, pending.batches, self.world, self.dtype)
        where = f" on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else " after it was summed over all ranks"
        return f"{what} is not finite{where} in step {pending.step}; the weights were not updated"

    def minutes_are_up(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = self.config.run.checkpoint_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    @torch.no_grad()
    def evaluate(self) -> None:
        """Validation loss, HellaSwag and samples of the model as it is now."""
        config, settings = self.config, self.config.run
        if settings.eval_every == 0:
            return
        sharded = settings.parallel == "fsdp"
        with self.phase("eval"):
            self.val_loss = validation_loss(
                self.model,
                self.val_blocks,
                config.data.val_tokens,
                config.data.micro_batch_size,
                self.world,
                partial(autocast, self.world.device, self.dtype),
            )
            if self.metrics is not None:
                self.metrics.val(self.step, self.val_loss, config.data.val_tokens)
            if self.examples:
                dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
                result = evaluate_hellaswag(self.model, self.examples, self.tokenizer, world=self.world, dtype=dtype)
                if self.metrics is not None:
                    self.metrics.hellaswag(self.step, result)
            if settings.num_samples and (self.world.is_main or sharded):
                with autocast(self.world.device, self.dtype):
                    texts = generate(
                        self.model,
                        [self.prompt] * settings.num_samples,
                        max_new_tokens=settings.sample_tokens,
                        top_k=50,
                        eot_token=self.tokenizer.eot_token,
                        seed=settings.seed,
                    )
                if self.metrics is not None:
                    for text in texts:
                        self.metrics.sample(self.step, settings.sample_prompt, self.tokenizer.decode(text))
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # evaluation gathered weights that the next update makes stale
            self.stopping |= self.world.any(self.signals.received is not None)

    def save(self) -> None:
        """Copy the state to the host and begin to write it."""
        self.save_due, self.saved_at = False, time.monotonic()
        if self.saved_step == self.step:
            return
        self.saved_step = self.step
        with self.phase("save"):
            model = {name: whole(parameter) for name, parameter in self.model.named_parameters()}
            optimizer = state_tensors(self.model, self.optimizers, whole)
            if self.writer is None or self.metrics is None:
                return
            training: dict[str, Any] = {
                "step": self.step,
                "sample": self.sample,
                "tokens": self.step * self.config.data.total_batch_tokens,
                "val_loss": self.val_loss,
                "guard": self.guard.state.tolist(),
                "data_fingerprint": self.dataset.fingerprint,
                "metrics_position": self.metrics.position(),
                "config": self.config.to_dict(),
                "environment": environment(self.world.device, self.world.size),
            }
            self.writer.save(Checkpoint(snapshot(model), snapshot(optimizer), training))

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Time something that is not training."""
        return self.metrics.phase(name) if self.metrics is not None else nullcontext()

    def finish(self, reason: EndReason, code: int) -> int:
        """Wait for the last checkpoint and close everything; returns the exit code."""
        if self.writer is not None:
            self.writer.wait()
        if self.metrics is not None:
            self.metrics.close(reason)
        return code

    def resume_command(self) -> str:
        """The words that continue this run."""
        start = "python" if self.world.size == 1 else f"torchrun --standalone --nproc_per_node={self.world.size}"
        return f"{start} train_gpt2.py --config {shlex.quote(str(self.directory / 'config.json'))}"


def load_initial(spec: str, config: ModelConfig, world: World) -> GPT:
    """The model `--init-from` names, cut to a shorter context if `config` has one; its dropout is `config`'s.

    Raises:
        UserError: there is no such model, or its context is shorter than asked for.
    """
    path = world.on_main(lambda: resolve_model(spec))  # rank 0 alone downloads
    loaded = load_model(path)
    if config.block_size > loaded.config.block_size:
        raise UserError(
            f"{spec} has a context of {loaded.config.block_size} tokens, shorter than block_size {config.block_size}; "
            f"use --block-size {loaded.config.block_size}"
        )
    model = GPT(replace(loaded.config, block_size=config.block_size, dropout=config.dropout))
    state = loaded.state_dict()
    if loaded.wpe is not None:
        state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model.load_state_dict(state)
    return model


def _silent(text: str) -> None:
    pass


@record
def main() -> int:
    """Run the command line."""
    config = parse_args(sys.argv[1:])
    if config.run.plot_schedule is not None:
        plot_schedule(config.run.plot_schedule, config.run.max_steps, config.optim)
        print(f"drew the learning rate of {config.run.max_steps} steps in {config.run.plot_schedule}")
        return 0
    with world(config.run.device) as this, StopSignals() as signals:
        run = Run(config, this, signals)
        try:
            return run.train()
        except Diverged as failure:
            last = run.writer.newest() if run.writer is not None else None
            run.say(f"error: {failure}")
            run.say(
                f"the last good checkpoint is {last}; go back to it with: {run.resume_command()}"
                if last is not None
                else "there is no checkpoint to go back to"
            )
            return run.finish("nonfinite", NONFINITE_EXIT)
        except BaseException:
            run.finish("error", 1)
            raise


if __name__ == "__main__":
    run_cli(main)
