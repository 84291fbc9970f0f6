"""Checkpoints: a directory that `transformers` opens, beside it what training needs to go on as if it had not stopped.

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

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.files import sha256_file, sync_directory, sync_file, write_whole
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import state_dict_from_hf
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import Tokenizer

FORMAT = 1
LATEST = "latest"
TRAINING = "training.json"
TEMPORARY = ".writing-"


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


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, below the run's `checkpoints`."""
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below a run's `checkpoints`, oldest first."""
    return sorted(path for path in directory.glob("step_*") if (path / TRAINING).is_file())


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
        write_whole(temporary / TRAINING, json.dumps(training, indent=1))
        sync_directory(temporary)
        if final.exists():
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
    """Rename the checkpoints of later steps than the one a run goes on from, so that it never goes on from them.

    Args:
        start: RUN/checkpoints/step_...

    Returns:
        Their new names.
    """
    later = [path for path in list_checkpoints(start.parent) if path.name > start.name]
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


def read_training(path: Path) -> dict[str, Any]:
    """What training.json of a checkpoint says, without a look at the other files.

    Raises:
        UserError: it is missing or unreadable.
    """
    try:
        training = json.loads((path / TRAINING).read_text())
        if training["format"] != FORMAT:
            raise UserError(f"{path} is of checkpoint format {training['format']}; this version reads {FORMAT}")
        if not {"step", "files"} <= training.keys():
            raise KeyError("step or files missing")
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint of a run: it holds no {TRAINING}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / TRAINING} is damaged ({error})") from None
    return dict(training)


def verify_checkpoint(path: Path) -> None:
    """Read every file and compare it with its checksum.

    Raises:
        UserError: a file is missing or not what was written.
    """
    for name, expected in read_training(path)["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})") from None
        if size != expected["bytes"]:
            raise UserError(f"{file} has {size:,} bytes, but {expected['bytes']:,} were written")
        if sha256_file(file) != expected["sha256"]:
            raise UserError(f"{file} is not what was written: its checksum differs")


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
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is unreadable ({error})") from None
    rows = config.padded_vocab_size - config.softmax_size
    padded = {
        name: F.pad(t, (0, 0) * (t.ndim - 1) + (0, rows)) if _is_vocabulary(name, t) else t
        for name, t in optimizer.items()
    }
    return Checkpoint(model, padded, training)


def newest_checkpoint(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint below a run's `checkpoints`; None if there is none at all.

    Args:
        directory: RUN/checkpoints.
        say: prints a line about each damaged one that is passed over.

    Raises:
        UserError: there are checkpoints, but every one is damaged.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            say(f"warning: passing over a damaged checkpoint: {error}")
    if found:
        raise UserError(
            f"every checkpoint in {directory} is damaged; move the run's directory away to start over in a new one"
        )
    return None


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, safe from later steps."""
    return tensor.detach().to("cpu", copy=True)
