"""What a run opens before its first step: data, plan, directory, model, optimizers, outputs; every refusal is here."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.allocator import keep_freed_memory
from gpt2.checkpoint.directory import Checkpoint, list_checkpoints, read_checkpoint, step_directory
from gpt2.checkpoint.mirror import Mirror, NoMirror
from gpt2.checkpoint.resume import (
    Origin,
    find_origin,
    find_start,
    is_own,
    load_weights,
    settle_length,
    settle_optim,
    store_settings,
)
from gpt2.checkpoint.writer import CheckpointWriter, NoWriter, worth_keeping
from gpt2.config import Config, RunConfig
from gpt2.distributed.hang import HangWatch
from gpt2.distributed.parallel import parallelize, place_like
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.files import lock, open_own
from gpt2.generation.prompt import prompt_tokens
from gpt2.hardware import device_name, environment
from gpt2.metrics.history import METRICS_FILE, read_metrics
from gpt2.metrics.recorder import Metrics, NoMetrics
from gpt2.metrics.reference import corpus_of
from gpt2.model.compile import cannot_compile
from gpt2.model.gpt import GPT
from gpt2.precision import make_deterministic, resolve_dtype, set_matmul_precision
from gpt2.presets import presets
from gpt2.progress import columns_of, wrapped
from gpt2.tokens.dataset import Dataset, open_dataset, outline
from gpt2.tokens.loader import Blocks
from gpt2.tokens.tokenizer import Tokenizer
from gpt2.train.evaluation import Evaluator
from gpt2.train.guard import StepGuard
from gpt2.train.memory import device_memory
from gpt2.train.optim import describe_groups, load_state_tensors, make_optimizers
from gpt2.train.out_of_memory import record_allocations
from gpt2.train.plan import Plan, make_plan, measure_data, with_datas_vocabulary
from gpt2.train.run import Run

MAY_DIFFER = {
    *("device", "dtype", "resume", "log_every", "checkpoint_minutes", "keep", "keep_every", "wandb", "wandb_project"),
    *("mirror", "tensorboard", "profile", "price", "allow_config_change"),
}
"""Settings of a run that only rank 0 follows, or each process for itself; of the precision that they name, what comes
out is compared."""


def what_must_agree(config: Config, device: torch.device) -> dict[str, str]:
    """What every process must have the same: precision, and the settings that change what it computes."""
    settings = {
        name: str(value)
        for part in (config.model, config.data, config.optim, config.run)
        for name, value in vars(part).items()
        if not isinstance(value, Path) and name not in MAY_DIFFER
    }
    return {"dtype": resolve_dtype(config.run.dtype, device), **settings}


def set_up(config: Config, world: World) -> Run:
    """Open everything, in the state the run is to continue from; all processes together.

    Nothing is written before everything that can be refused has been looked at.

    Raises:
        UserError: the settings, the data, the machine or the run's directory do not allow it; in every process.
    """
    began = time.monotonic()
    say: Callable[[str], None] = print if world.is_main else _silent
    dtype = resolve_dtype(config.run.dtype, world.device)  # `what_must_agree` has asked every process
    set_matmul_precision(dtype)
    if config.run.deterministic:
        make_deterministic()
    record_allocations(world.device, on=True)
    if world.device.type == "cpu":
        keep_freed_memory()

    dataset, tokenizer = open_data(config, world)
    world.on_main(lambda: restore_from_mirror(config, world, say))
    config = with_datas_vocabulary(config, dataset, say)
    origin = world.on_main(lambda: find_origin(config))  # downloads, if anything has to be
    run = world.on_main(lambda: settle_length(config))
    if run.max_minutes != config.run.max_minutes:
        say(f"{'length':<11}the run was begun without --max-minutes, and keeps its {run.max_steps:,} steps")
    optim = world.on_main(lambda: settle_optim(config))
    config = replace(config, model=origin.model, optim=optim, run=with_possible_prompt(run, tokenizer, say))
    train_blocks, val_blocks, plan = world.agree(lambda: plan_run(config, world, dataset, tokenizer, dtype))

    facts = world.on_main(lambda: environment(world.device, world.size))  # runs git
    claimed: list[tuple[FileIO, Checkpoint | None]] = []  # what stays in rank 0

    # The newest checkpoint that any machine has: without a shared directory, rank 0's may be behind.
    reached = -1
    with suppress(UserError):  # rank 0 refuses what it cannot read
        reached = max([reached, *(int(p.name[5:]) for p in list_checkpoints(config.run.run_dir / "checkpoints"))])
    newest = int(world.max_(torch.tensor(reached, device=world.device)).item())

    def claim() -> tuple[Path | None, Mapping[str, Any]]:
        if newest > reached and config.run.mirror is None:
            own = f"up to step {reached}" if reached >= 0 else "nothing"
            raise UserError(
                f"{config.run.run_dir} holds this run up to step {newest} on another machine, and on rank 0's, "
                f"{platform.node()}, {own}; give --run-dir a directory that all machines share, or copy it there"
            )
        lock_file, start, checkpoint = claim_directory(config, world, dataset, say)
        claimed.append((lock_file, checkpoint))
        return start, {} if checkpoint is None else dict(checkpoint.training)

    start, training = world.on_main(claim)
    lock_file, checkpoint = claimed[0] if claimed else (None, None)
    watch = HangWatch(config.run.run_dir / "hang", world.rank)

    asked = config  # is what is stored: the next start may be on a machine that compiles
    obstacle = cannot_compile(world.device) if config.run.compile else None
    if world.any(obstacle is not None):
        say(f"compile    left out, the run is slower: {obstacle or 'it does not work in another process'}")
        config = replace(config, run=replace(config.run, compile=False))
    model, trained = build_model(config, world, plan, dtype, origin, checkpoint, resuming=bool(training))
    optimizers = make_optimizers(model, config.optim, world.device, dtype)
    guard = StepGuard(world.device, config.run.on_nonfinite, config.run.spike_zscore)
    if training:
        moments = world.share(None if checkpoint is None else checkpoint.optimizer)
        try:
            load_state_tensors(model, optimizers, moments, place_like)
        except UserError as error:
            raise UserError(f"{start}/optimizer.safetensors: {error}") from None
        guard.state.copy_(torch.tensor(training["guard"]))
    claimed.clear()
    del checkpoint  # a second copy of the state, on the host
    step, sequences_read = training.get("step", 0), training.get("sample", 0)

    lines = plan.lines(config, world.size, device_name(world.device), dtype, start)
    for line in [*lines, *(f"{'optimizer':<11}{group}" for group in describe_groups(optimizers))]:
        say(wrapped(line, 11, columns_of(sys.stdout)))
    say(f"{'run':<11}{config.run.run_dir}" + (f", resumed at step {step}" if step else ""))
    if world.size > 1:
        say(f"{'hang':<11}if a process keeps the others waiting, {watch.directory} will tell where it was")

    evaluator = Evaluator(config, model, world, dtype, val_blocks, tokenizer, say)
    own = start is not None and is_own(start, config.run.run_dir)
    position = training["metrics_position"] if own else 0
    opened: list[tuple[Metrics, CheckpointWriter]] = []

    def begin() -> None:
        store_settings(asked, start, facts, say)
        world.note(f"claimed {config.run.run_dir}", platform.node())
        opened.append(open_outputs(config, world, plan, dataset, tokenizer, step, sequences_read, position))

    world.on_main(begin)
    metrics, writer = opened[0] if opened else (NoMetrics(), NoWriter())
    return Run(
        config=config,
        world=world,
        dtype=dtype,
        environment=facts,
        dataset=dataset,
        tokenizer=tokenizer,
        train_blocks=train_blocks,
        val_blocks=val_blocks,
        plan=plan,
        model=model,
        trained=trained,
        optimizers=optimizers,
        guard=guard,
        evaluator=evaluator,
        watch=watch,
        metrics=metrics,
        writer=writer,
        lock=lock_file,
        began=began,
        step=step,
        sequences_read=sequences_read,
        val_loss=training.get("val_loss"),
        best_val_loss=min(
            (loss for name in ("best_val_loss", "val_loss") if (loss := training.get(name)) is not None),
            default=math.inf,
        ),
        saved_step=step if training else -1,
    )


def with_possible_prompt(run: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> RunConfig:
    """The run's settings, with an empty prompt where a preset's has characters that the vocabulary lacks.

    A prompt that was asked for is refused later, by the same characters.
    """
    if not run.num_samples or run.sample_prompt not in {config.run.sample_prompt for _, config in presets().values()}:
        return run
    try:
        tokenizer.encode(run.sample_prompt)
        return run
    except UserError as error:
        start = repr(tokenizer.decode(prompt_tokens(tokenizer, "")))
        say(f"samples begin behind {start}, not with {run.sample_prompt!r}: {str(error).split(';')[0]}")
        return replace(run, sample_prompt="")


def open_data(config: Config, world: World) -> tuple[Dataset, Tokenizer]:
    """Open the data set, the same one in every process, and its tokenizer.

    Rank 0 reads the manifest and thousands of headers, and tells the others, who would queue for them on a shared
    disk. One process of each machine makes sure that its own copy is the same.
    """
    directory = config.data.data

    def open_once() -> tuple[Dataset, str]:
        dataset = open_dataset(directory)
        if dataset.manifest is not None:  # of which megabytes describe shards that are open now
            dataset = replace(dataset, manifest=replace(dataset.manifest, shards=()))
        return dataset, outline(directory)

    def compare() -> None:
        alike = world.is_main or world.local_rank > 0 or outline(directory) == expected
        if not alike and open_dataset(directory).fingerprint != dataset.fingerprint:
            raise UserError(f"{directory} holds other data for rank {world.rank} than for rank 0; copy rank 0's")

    dataset, expected = world.on_main(open_once)
    world.agree(compare)
    return dataset.at(directory), world.agree(dataset.tokenizer)


def plan_run(
    config: Config, world: World, dataset: Dataset, tokenizer: Tokenizer, dtype: str
) -> tuple[Blocks, Blocks, Plan]:
    """The splits cut into sequences, and what follows from settings, data and machine; refuses what cannot work."""
    if config.run.parallel == "fsdp" and not torch.distributed.is_initialized():
        raise UserError(
            "--parallel fsdp shards the model over the processes torchrun starts; start it with torchrun, or use "
            "--parallel ddp"
        )
    blocks = partial(Blocks, block_size=config.model.block_size, vocab_size=config.model.vocab_size)
    train = blocks(
        dataset.train,
        seed=config.run.seed if config.data.shuffle else None,
        step_tokens=config.data.total_batch_tokens if config.data.drop_shard_tails else None,
    )
    val = blocks(dataset.val, needed=config.run.eval_every > 0)
    sizes = measure_data(config, dataset, train, val)
    plan = make_plan(config, sizes, world.size, dtype, world.device.type, device_memory(world.device))
    plan.refuse_what_does_not_fit(config)
    prompt = prompt_tokens(tokenizer, config.run.sample_prompt) if config.run.num_samples else []
    if len(prompt) > config.model.block_size:
        raise UserError(f"sample_prompt has {len(prompt)} tokens; at most block_size {config.model.block_size} fit")
    return train, val, plan


def lock_run(run: Path) -> FileIO:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    Raises:
        UserError: it cannot be written to, or another process holds it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open_own(run / ".lock")
    except OSError as error:
        raise UserError(f"cannot write to the run directory {run}: {error.strerror}; choose another --run") from None
    if not lock(file):
        file.close()
        raise UserError(f"another process is training in {run}; wait for it or choose another --run")
    return file


def open_mirror(run: RunConfig, say: Callable[[str], None]) -> Mirror | None:
    """The run's second copy; None where it has none."""

    def retained(trainings: Mapping[str, Any]) -> set[str]:
        newest = sorted(trainings, key=lambda name: int(trainings[name]["step"]))[-run.keep :]
        return {*newest, *worth_keeping(trainings, run.keep_every)}

    return None if run.mirror is None else Mirror(run.mirror, run.run_dir, retained, say)


def restore_from_mirror(config: Config, world: World, say: Callable[[str], None]) -> None:
    """Fetch what the mirror has and the run's directory lacks; rank 0 alone."""
    run = config.run
    if (mirror := open_mirror(run, say)) is None:
        return
    lock_file = lock_run(run.run_dir)
    try:
        mirror.restore(anew=run.resume == "never" and world.recall(f"claimed {run.run_dir}") is None)
    finally:
        lock_file.close()


def claim_directory(
    config: Config, world: World, dataset: Dataset, say: Callable[[str], None]
) -> tuple[FileIO, Path | None, Checkpoint | None]:
    """Lock the run's directory, read the checkpoint to continue from; rank 0 alone, and nothing is written.

    Returns:
        The lock, and the checkpoint's path and content; None to start anew.
    """
    run = config.run
    lock_file = lock_run(run.run_dir)
    start = find_start(config, dataset.fingerprint, say, started_on=world.recall(f"claimed {run.run_dir}"))
    look_for_lost_checkpoint(run.run_dir, start, say)
    return lock_file, start, None if start is None else read_checkpoint(start, config.model)


def look_for_lost_checkpoint(run: Path, start: Path | None, say: Callable[[str], None]) -> None:
    """Compare the checkpoint a run is to continue from with those its history records: some may have been taken away.

    Raises:
        UserError: none is left, and the run would begin again in silence.
    """
    path = run / METRICS_FILE
    try:
        saved = [record["step"] for record in read_metrics(path).live if record["kind"] == "checkpoint"]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put that right, or choose another --run") from None
    if not saved:
        return
    lost = step_directory(run / "checkpoints", saved[-1])
    if start is None or not is_own(start, run):
        raise UserError(
            f"{path} records {lost.name}, but {lost.parent} holds no checkpoint; put it back to continue, or start "
            f"anew with another --run, or after moving {run} away"
        )
    if lost.name > start.name and not lost.exists():
        say(f"warning: {path} records {lost.name}, which is not in {lost.parent}; the run continues from {start.name}")


def build_model(
    config: Config,
    world: World,
    plan: Plan,
    dtype: str,
    origin: Origin,
    checkpoint: Checkpoint | None,
    resuming: bool,
) -> tuple[GPT, nn.Module]:
    """The model with its first weights: a checkpoint's, those that `--init-from` names, or drawn from the seed.

    Args:
        checkpoint: rank 0's, where the run resumes.
        resuming: whether rank 0 has one.

    Returns:
        The model, and what is called for a loss.
    """
    model = GPT(config.model)
    if origin.weights is None and not resuming:
        model.init_weights(config.run.seed)
    model.to(world.device)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    if checkpoint is not None:
        state = dict(checkpoint.model)
    elif origin.weights is not None and not resuming:
        world.on_main(lambda: state.update(load_weights(origin)))
    world.on_main(lambda: refuse_nonfinite(state, config))
    with torch.no_grad():
        for name, tensor in world.share({name: state[name] for name in parameters} if state else None):
            parameters[name].copy_(tensor)
    return model, parallelize(model, config.run, world, dtype, plan.grad_accum_steps)


def name_of_data(dataset: Dataset) -> str:
    """The name that tells which baselines hold: the data set's own, or its source where that alone is known."""
    if dataset.manifest is None:
        return dataset.directory.name
    name, source = dataset.manifest.name, str(dataset.manifest.source.get("description", ""))
    return source if corpus_of(name) is None and corpus_of(source) is not None else name


def refuse_nonfinite(state: Mapping[str, Tensor], config: Config) -> None:
    """Refuse weights that no step can better.

    Raises:
        UserError: naming the first tensor that holds a value that is not finite.
    """
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            source, remedy = config.run.init_from, "give other weights"
            if config.run.init_from is None:
                source, remedy = str(config.run.run_dir), "resume from an earlier checkpoint with --resume CHECKPOINT"
            raise UserError(f"the weights of {source} are not finite: {name} holds NaN or infinity; {remedy}")


def open_outputs(
    config: Config,
    world: World,
    plan: Plan,
    dataset: Dataset,
    tokenizer: Tokenizer,
    step: int,
    sequences_read: int,
    metrics_position: int,
) -> tuple[Metrics, CheckpointWriter]:
    """What rank 0 writes to."""
    run = config.run
    metrics = Metrics(
        run.run_dir,
        config=config,
        flops_per_token=plan.flops_per_token,
        device=world.device,
        world_size=world.size,
        start_step=step,
        start_tokens=sequences_read * config.model.block_size,
        position=metrics_position,
        dataset=name_of_data(dataset),
    )
    if (mirror := open_mirror(run, metrics.message)) is not None:
        mirror.start(step)
    writer = CheckpointWriter(
        run.run_dir / "checkpoints",
        config.model,
        tokenizer,
        run.keep,
        run.keep_every,
        saved=metrics.checkpoint,
        warn=metrics.message,
        mirror=mirror or NoMirror(),
    )
    return metrics, writer


def _silent(text: str) -> None:
    pass
