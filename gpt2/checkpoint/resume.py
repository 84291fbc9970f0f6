"""What a run starts from: its own newest checkpoint, another one, other weights, or nothing; and whether it may."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2.checkpoint.directory import (
    list_checkpoints,
    newest_checkpoint,
    read_training,
    supersede_later,
    verify_checkpoint,
)
from gpt2.config import Config, GPTConfig, OptimConfig, RunConfig, config_difference
from gpt2.errors import UserError
from gpt2.files import read_json, write_whole
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import config_from_hf
from gpt2.model.pretrained import resolve_model

CHANGEABLE = {
    *("data.total_batch_tokens", "data.val_tokens", "run.dtype", "run.deterministic", "run.parallel"),
    *("run.max_steps", "run.max_minutes", "run.fitted_steps", "run.on_nonfinite", "run.spike_zscore", "model.dropout"),
}
"""Settings that change what comes out of a run, and may change within it when that is asked for; so may the
optimizer's, but for its kind."""
FIXED = {"data.shuffle", "data.drop_shard_tails", "run.seed", "optim.optimizer", "optim.normuon"}
"""Settings that cannot change within a run, as the model's cannot: the order of the data would repeat and leave out
tokens, the optimizer's state would not fit. Everything else (the machine, the log, where the data is) changes freely:
which data it is, their fingerprint tells."""

LEFT_BY_ANY_RANK = (".", "hang", "out_of_memory_rank")
"""Beginnings of the names of what any process may leave in its machine's run directory, without rank 0's run there."""


def check_config_change(old: Config, new: Config, where: Path) -> None:
    """Refuse settings that cannot change within a run, and those that change its results unless that was asked for.

    Args:
        old: the run's.
        new: asked for.
        where: the run's directory, for the message.

    Raises:
        UserError: naming each difference.
    """
    difference = config_difference(old.to_dict(), new.to_dict())
    # Where shards' tails are dropped, what is a tail goes by the tokens of a step.
    immutable = FIXED | ({"data.total_batch_tokens"} if new.data.drop_shard_tails else set())
    changeable = {name for name in difference if name in CHANGEABLE or name.startswith("optim.")} - immutable
    fixed = {name for name in difference if name in immutable or name.startswith("model.")} - changeable

    def describe(names: set[str]) -> str:
        return ", ".join(
            f"{name.split('.')[1]} {difference[name][0]} → {difference[name][1]}" for name in sorted(names)
        )

    if fixed:
        raise UserError(f"{where} holds a run with other settings: {describe(fixed)}; choose another --run for these")
    if changeable and not new.run.allow_config_change:
        raise UserError(
            f"{where} holds a run with other settings: {describe(changeable)}; choose another --run, or change this "
            "one with --allow-config-change"
        )


def settle_optim(config: Config) -> OptimConfig:
    """The optimizer's settings with `muon_qkv` decided where it is auto: a run keeps what it began with."""
    optim = config.optim
    if optim.optimizer != "muon" or optim.muon_qkv != "auto":
        return optim
    before = _before(config.run)
    together = before is not None and before.optim.optimizer == "muon" and before.optim.muon_qkv == "together"
    return replace(optim, muon_qkv="together" if together else "apart")


def settle_length(config: Config) -> RunConfig:
    """The run's settings with the length that it was given before, where nothing is to change it."""
    run, before = config.run, _before(config.run)
    if before is None or run.max_steps != before.run.max_steps or run.fitted_steps is not None:
        return run
    if before.run.max_minutes == 0 and not run.allow_config_change:  # as the runs of versions without that setting
        return replace(run, max_minutes=0.0)
    return replace(run, fitted_steps=before.run.fitted_steps) if run.max_minutes == before.run.max_minutes else run


def _before(run: RunConfig) -> Config | None:
    """The settings a run has stored, or the checkpoint that it is told to resume; None where it begins."""
    if (run.run_dir / "config.json").exists():
        return Config.load(run.run_dir / "config.json")
    if run.resume not in ("auto", "never"):
        return Config.from_dict(read_training(Path(run.resume)).get("config", {}))
    return None


def write_config(config: Config, path: Path) -> None:
    """Write RUN/config.json, whole or not at all."""
    write_whole(path, json.dumps(config.to_dict(), indent=1) + "\n")


@dataclass(frozen=True)
class Origin:
    """What a run's model is, before its first step.

    Attributes:
        model: its configuration.
        weights: directory of the weights `--init-from` names; None: they are drawn, or a checkpoint's.
    """

    model: GPTConfig
    weights: Path | None


def find_origin(config: Config) -> Origin:
    """Find the model that a run starts from; nothing is written, and nothing downloaded that a checkpoint replaces.

    Raises:
        UserError: `--init-from` names no model, or one with a context shorter than asked for.
    """
    spec = config.run.init_from
    if spec is None:
        return Origin(config.model, None)
    asked = config.model
    stored = config.run.run_dir / "config.json"
    if stored.exists() and list_checkpoints(config.run.run_dir / "checkpoints"):
        before = Config.load(stored)
        if before.run.init_from == spec:
            return Origin(replace(before.model, block_size=asked.block_size, dropout=asked.dropout), None)
    path = resolve_model(spec)
    try:
        found = config_from_hf(read_json(path / "config.json", dict))
    except FileNotFoundError:
        raise UserError(f"{path} holds no config.json; give another --init-from") from None
    if asked.block_size > found.block_size:
        raise UserError(
            f"{spec} has a context of {found.block_size} tokens, shorter than block_size {asked.block_size}; "
            f"use --block-size {found.block_size}"
        )
    return Origin(replace(found, block_size=asked.block_size, dropout=asked.dropout), path)


def load_weights(origin: Origin) -> dict[str, Tensor]:
    """The weights a run starts from, whose origin has some, as `GPT.state_dict`; positions are cut to the context."""
    assert origin.weights is not None
    state = GPT.from_pretrained(origin.weights).state_dict()
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: origin.model.block_size]
    return state


def check_own(path: Path, config: Config, fingerprint: str) -> None:
    """Demand that a checkpoint is whole and was saved by a run of these settings and this data.

    Raises:
        LaterVersion: a later version of this program wrote it.
        UserError: it is damaged, or of another run.
    """
    training = read_training(path)
    for name in ("sample", "guard", "data_fingerprint", "metrics_position", "config"):
        if name not in training:
            raise UserError(f"{path / 'training.json'}: {name} is missing")
    try:
        saved = Config.from_dict(training["config"])
    except UserError as error:
        raise UserError(f"{path / 'training.json'}: {error}") from None
    check_config_change(saved, replace(config, run=replace(config.run, allow_config_change=True)), path)
    trained_on = training["data_fingerprint"]
    if trained_on != fingerprint:
        raise UserError(
            f"{path} was trained on other data than {config.data.data} now holds (fingerprint {trained_on[:12]}, now "
            f"{fingerprint[:12]}); restore the data or choose another --run"
        )
    verify_checkpoint(path)


def find_start(
    config: Config, fingerprint: str, say: Callable[[str], None], started_on: str | None = None
) -> Path | None:
    """The checkpoint that a run resumes from; None to start at step 0.

    Args:
        config: asked for; its model is the `Origin`'s.
        fingerprint: identity of the data the run is to read.
        say: prints a line about what is passed over.
        started_on: machine on which an earlier start of the same torchrun has claimed the run's directory.

    Nothing is changed; `supersede_later` is for when all else has been found to be in order.

    Raises:
        UserError: the directory holds a run that cannot be resumed with these settings, or the checkpoint asked for
            is not one of such a run.
    """
    run, resume = config.run.run_dir, config.run.resume
    checkpoints, stored = run / "checkpoints", run / "config.json"
    # torchrun starts a failed group again with the same words; then they have been followed already.
    again = started_on is not None
    if again and not stored.exists():
        raise UserError(
            f"{run} on {platform.node()} holds nothing of this run, which was started on {started_on}; give "
            "--run-dir a directory that all machines share"
        )
    if resume == "never" and not again and (stored.exists() or list_checkpoints(checkpoints)):
        raise UserError(f"{run} already holds a run, and --resume never would write over it; choose another --run")
    if not stored.exists() and run.is_dir() and any(not p.name.startswith(LEFT_BY_ANY_RANK) for p in run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another --run")
    if stored.exists():
        check_config_change(Config.load(stored), config, run)
    try:  # now, not when the first checkpoint is due
        if os.path.lexists(checkpoints):
            with tempfile.TemporaryFile(dir=checkpoints):
                os.listdir(checkpoints)
    except OSError as error:
        raise UserError(
            f"cannot keep checkpoints in {checkpoints}: {error.strerror}; make it a directory that you can read and "
            "write, or choose another --run"
        ) from None

    def accept(path: Path) -> None:
        check_own(path, config, fingerprint)

    start: Path | None = None
    if resume not in ("auto", "never"):
        start = own_name(Path(resume), run) or Path(resume)
        if again or (stored.exists() and Config.load(stored).run.resume == resume):
            own = newest_checkpoint(checkpoints, say, accept)
            if own is not None and own.resolve() != start.resolve():
                say(f"resuming from {own}, which this run has reached since it left {start}")
                start = own
        elif not is_own(start, run) and list_checkpoints(checkpoints):
            raise UserError(
                f"{run} has checkpoints of its own, and {start} is none of them; leave --resume out to resume from the "
                "newest, or choose another --run"
            )
        accept(start)
        if not is_own(start, run):
            check_config_change(Config.from_dict(read_training(start)["config"]), config, start)
    else:
        start = newest_checkpoint(checkpoints, say, accept)
    if start is None:
        return None

    step = read_training(start)["step"]
    if step > config.run.total_steps:
        raise UserError(f"{start} is at step {step}, past --max-steps {config.run.total_steps}; give {step} or more")
    return start


def store_settings(config: Config, start: Path | None, facts: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Write config.json and environment.json, and set aside checkpoints behind which the run goes back.

    Called when everything that may refuse the start has passed, so that a refused one leaves every file as it was.

    Raises:
        UserError: the run's directory cannot be written to.
    """
    run = config.run
    # What this file tells the next start: resume, whatever this start was told.
    own = start is not None and is_own(start, run.run_dir)
    resume = "auto" if start is None or own else str(start)
    try:
        stored = replace(config, run=replace(run, resume=resume, allow_config_change=False))
        write_config(stored, run.run_dir / "config.json")
        write_whole(run.run_dir / "environment.json", json.dumps(facts, indent=1) + "\n")
        for path in supersede_later(start) if start is not None and own else []:
            say(f"set aside as {path}: the run resumes from {start.name if start else ''}")
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {run.run_dir}: {error.strerror}; choose another --run"
        ) from None


def own_name(checkpoint: Path, run: Path) -> Path | None:
    """A checkpoint's path within a run, also of one that was moved elsewhere and linked back; None of another run's."""
    found = (path for path in list_checkpoints(run / "checkpoints") if path.exists() and checkpoint.exists())
    return next((path for path in found if path.samefile(checkpoint)), None)


def is_own(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint is one of this run's."""
    return checkpoint.resolve().parent == (run / "checkpoints").resolve() or own_name(checkpoint, run) is not None
