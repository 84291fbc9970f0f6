"""Checkpoints: a directory that `transformers` opens, beside it what training needs to resume as if it had not stopped.

    RUN/checkpoints/latest               name of the newest complete checkpoint
    RUN/checkpoints/step_00001000/
        model.safetensors, config.json, tokenizer files      of `gpt2.model.pretrained`
        optimizer.safetensors                                `<state>.<parameter>`, without the vocabulary's padding
        training.json                                        step, position in the data, configuration, checksums

A checkpoint is written to a temporary sibling, synced to disk and renamed, so a directory of that name is a complete
one; training.json's checksums tell whether it still is what was written. Random numbers have no state to save: every
step seeds its own from the run's seed, the step and the process. One that a run no longer builds on, because it was
damaged or the run went back behind it, is renamed to `superseded_step_...` and otherwise left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import LaterVersion, UserError, first_line
from gpt2.files import (
    FORBID,
    Count,
    Number,
    Sha256,
    check,
    read_json,
    sha256_file,
    sync_directory,
    sync_file,
    write_whole,
)
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import state_dict_from_hf
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import Tokenizer

FORMAT = 1
LATEST = "latest"
TRAINING = "training.json"
TEMPORARY = ".writing-"
_NEVER_NEGATIVE = ("step.", "exp_avg_sq.", "second_momentum_buffer.")


@dataclass(frozen=True)
class Checkpoint:
    """A run's state between two steps, on the host.

    Attributes:
        model: `GPT.state_dict()`'s tensors, whole.
        optimizer: its state by name, whole, as `gpt2.train.optim.state_tensors` returns it.
        training: JSON values: "step" (steps finished) and whatever the trainer wants back.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    training: Mapping[str, Any]


@dataclass(frozen=True)
class _File:
    """What training.json says of another file."""

    __pydantic_config__ = FORBID

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class _Training:
    """What training.json holds, as far as it is there."""

    format: Count
    step: Count
    files: dict[Annotated[str, Field(pattern=r"\A[A-Za-z0-9_][\w.-]*\z")], _File]
    sample: Count = 0
    tokens: Count = 0
    val_loss: Number | None = None
    best_val_loss: Number | None = None
    guard: Annotated[tuple[Number, ...], Field(min_length=6, max_length=6)] | None = None
    """State of `gpt2.train.guard.StepGuard`."""
    data_fingerprint: str = ""
    metrics_position: Count = 0
    config: dict[str, dict[str, Any]] | None = None
    environment: dict[str, Any] | None = None
    digest: Sha256 | None = None


def step_directory(directory: Path, step: int) -> Path:
    """The path of a step's checkpoint, below the run's `checkpoints`."""
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints below a run's `checkpoints`, oldest first; damaged ones too.

    Raises:
        UserError: the directory is there, but cannot be read.
    """
    try:
        found = [path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,18}", path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot read {directory}: {error.strerror}; put that right, so that the run continues from its checkpoints"
        ) from None
    return sorted(found, key=lambda path: int(path.name[len("step_") :]))


def write_checkpoint(directory: Path, checkpoint: Checkpoint, config: GPTConfig, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint below `directory`, whole or not at all, and point `latest` to it.

    Raises:
        OSError: it could not be written; nothing is left of it, and older ones are as they were.
    """
    from safetensors.torch import save_file

    step = checkpoint.training["step"]
    final = step_directory(directory, step)
    temporary = directory / f"{TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_pretrained(temporary, checkpoint.model, config, tokenizer)
        trimmed = {
            name: tensor[: config.softmax_size].contiguous() if _is_vocabulary(name, tensor) else tensor.contiguous()
            for name, tensor in checkpoint.optimizer.items()
        }
        save_file(trimmed, temporary / "optimizer.safetensors")
        for path in temporary.glob("*.safetensors"):  # which that library makes readable to their owner alone
            shutil.copymode(temporary / "config.json", path)
        files = {path.name: _describe_file(path) for path in sorted(temporary.iterdir())}
        training = {"format": FORMAT, **checkpoint.training, "files": files}
        write_whole(temporary / TRAINING, json.dumps({**training, "digest": _digest(training)}, indent=1))
        sync_directory(temporary)
        if os.path.lexists(final):
            _supersede(final)
        os.replace(temporary, final)
        _point_to(final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error  # safetensors has an exception of its own
    return final


def _point_to(path: Path) -> None:
    """Make `latest` name a checkpoint, and bring that and the checkpoint's own name to disk."""
    write_whole(path.with_name(LATEST), f"{path.name}\n")


def _supersede(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"superseded_{path.name}" + (f".{number}" if number > 1 else ""))).exists():
        number += 1
    os.replace(path, target)
    return target


def supersede_later(start: Path) -> list[Path]:
    """Rename the checkpoints of later steps than the one a run resumes from, so that it never resumes from them.

    Args:
        start: RUN/checkpoints/step_...

    Returns:
        Their new names.
    """
    later = [path for path in list_checkpoints(start.parent) if int(path.name[5:]) > int(start.name[5:])]
    renamed = [_supersede(path) for path in later]
    if renamed:
        _point_to(start)
    return renamed


def _is_vocabulary(name: str, tensor: Tensor) -> bool:
    return tensor.ndim > 0 and name.endswith(("wte.weight", "lm_head.weight", "lm_head.bias"))


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, which is synced to disk."""
    sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _digest(training: Mapping[str, Any]) -> str:
    """SHA-256 of what training.json says, but for itself, however it is spelt."""
    content = {name: value for name, value in training.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_training(path: Path) -> dict[str, Any]:
    """What training.json of a checkpoint says, without a look at the other files.

    Raises:
        LaterVersion: a later version of this program wrote it.
        UserError: it is missing, unreadable, or not what was written.
    """
    file = path / TRAINING
    try:
        training: dict[str, Any] = read_json(file, dict)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a checkpoint of a run: it holds no {TRAINING}") from None
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    found = training.get("format")
    if type(found) is int and found > FORMAT:
        raise LaterVersion(f"{path} is of checkpoint format {found}; this version reads {FORMAT}: update it")
    checked = check(training, _Training, f"{file} is damaged")
    if checked.format != FORMAT:
        raise UserError(f"{file} is damaged: format is {found}; it must be {FORMAT}")
    # Checkpoints had no digest before; what can be told of those without one is checked all the same.
    if checked.digest is not None and checked.digest != _digest(training):
        raise UserError(f"{file} is damaged: it is not what was written (its digest differs)")
    named = re.fullmatch(r"step_(\d+)", path.name)
    if named is not None and int(named[1]) != checked.step:
        raise UserError(f"{file} is damaged: step is {checked.step}; the directory's name says {int(named[1])}")
    if "sample" in training and not (checked.sample >= checked.step and (checked.sample == 0) == (checked.step == 0)):
        raise UserError(f"{file} is damaged: sample is {checked.sample}, which step {checked.step} cannot have reached")
    model = (checked.config or {}).get("model", {})
    if "tokens" in training and checked.tokens != checked.sample * model.get("block_size", 0):
        raise UserError(f"{file} is damaged: tokens is {checked.tokens}; sample and block_size say otherwise")
    return training


def verify_checkpoint(path: Path) -> None:
    """Read every file and compare it with its checksum.

    Raises:
        UserError: a file is missing or not what was written.
    """
    files = read_training(path)["files"]
    for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
        if name not in files:
            raise UserError(f"{path / TRAINING} is damaged: files.{name} is missing")
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise UserError(f"{file} has {size:,} bytes, but {expected['bytes']:,} were written")
            if sha256_file(file) != expected["sha256"]:
                raise UserError(f"{file} is not what was written: its checksum differs")
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})") from None


def read_checkpoint(path: Path, config: GPTConfig) -> Checkpoint:
    """Load a checkpoint into host memory.

    Args:
        path: a directory that `verify_checkpoint` passed.
        config: the model it is for.

    Raises:
        UserError: it is of another shape, or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    training = read_training(path)
    try:
        model = state_dict_from_hf(load_file(path / "model.safetensors"), config, GPT.state_shapes(config))
        optimizer = load_file(path / "optimizer.safetensors")
    except UserError as error:
        raise UserError(f"{path / 'model.safetensors'}: {error}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the checkpoint {path} is unreadable ({first_line(error)})") from None
    for name, tensor in optimizer.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path / 'optimizer.safetensors'}: {name} holds values that are not finite numbers")
        if name.startswith(_NEVER_NEGATIVE) and tensor.numel() and tensor.min() < 0:
            raise UserError(f"{path / 'optimizer.safetensors'}: {name} holds negative values, which it cannot have")
    rows = config.padded_vocab_size - config.softmax_size
    padded = {
        name: F.pad(t, (0, 0) * (t.ndim - 1) + (0, rows)) if _is_vocabulary(name, t) else t
        for name, t in optimizer.items()
    }
    return Checkpoint(model, padded, training)


def newest_checkpoint(
    directory: Path, say: Callable[[str], None], accept: Callable[[Path], None] = verify_checkpoint
) -> Path | None:
    """The newest undamaged checkpoint below a run's `checkpoints`; None if there is none at all.

    Args:
        directory: RUN/checkpoints.
        say: prints a line about each one that is passed over.
        accept: raises UserError for one to pass over.

    Raises:
        LaterVersion: the newest is of a later version; it is no damage.
        UserError: there are checkpoints, but none to accept.
    """
    problems = []
    for path in reversed(list_checkpoints(directory)):
        try:
            accept(path)
            return path
        except LaterVersion:
            raise
        except UserError as error:
            problems.append(str(error))
            say(f"warning: passing over a checkpoint: {error}")
    if problems:
        raise UserError(
            f"no checkpoint in {directory} can be resumed ({problems[0]}); put a good one back, or start anew with "
            "another --run"
        )
    return None


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, safe from later steps."""
    return tensor.detach().to("cpu", copy=True)
