"""Checkpoints: a directory that `transformers` opens, beside it what training needs to go on as if it had not stopped.

    RUN/checkpoints/latest               name of the newest complete checkpoint
    RUN/checkpoints/step_00001000/
        model.safetensors, config.json, tokenizer files      of `gpt2.huggingface`
        optimizer.safetensors                                `<state>.<parameter>`, without the vocabulary's padding
        training.json                                        step, position in the data, configuration, checksums

A checkpoint is written to a temporary sibling, synced to disk and renamed, so a directory of that name is a complete
one; training.json's checksums tell whether it still is what was written. Random numbers have no state to save: every
step seeds its own from the run's seed, the step and the process.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import ModelConfig
from gpt2.errors import UserError
from gpt2.hf_format import state_dict_from_hf
from gpt2.huggingface import save_pretrained
from gpt2.manifest import sync_directory
from gpt2.shard_files import sha256_file
from gpt2.tokenizer import Tokenizer

FORMAT = 1
LATEST = "latest"
TRAINING = "training.json"
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state between two steps, on the host.

    Attributes:
        model: `GPT.state_dict()`'s tensors, whole.
        optimizer: of `gpt2.optim.state_tensors`, whole.
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


def write_checkpoint(directory: Path, checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint below `directory`, whole or not at all, and point `latest` to it.

    Raises:
        OSError: it could not be written; nothing is left of it, and older ones are as they were.
    """
    from safetensors.torch import save_file

    step = checkpoint.training["step"]
    final = step_directory(directory, step)
    temporary = directory / f"{_TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_pretrained(temporary, checkpoint.model, config, tokenizer)
        trimmed = {
            name: tensor[: config.vocab_size].contiguous() if _is_vocabulary(name, tensor) else tensor.contiguous()
            for name, tensor in checkpoint.optimizer.items()
        }
        save_file(trimmed, temporary / "optimizer.safetensors")
        for path in temporary.glob("*.safetensors"):  # which that library makes readable to their owner alone
            shutil.copymode(temporary / "config.json", path)
        files = {path.name: _describe_file(path) for path in sorted(temporary.iterdir())}
        training = {"format": FORMAT, **checkpoint.training, "files": files}
        _write_synced(temporary / TRAINING, json.dumps(training, indent=1).encode())
        sync_directory(temporary)
        if final.exists():  # a damaged one that the run went back behind
            shutil.rmtree(final)
        os.replace(temporary, final)
        pointer = directory / f"{_TEMPORARY}{LATEST}"
        _write_synced(pointer, f"{final.name}\n".encode())
        os.replace(pointer, directory / LATEST)
        sync_directory(directory)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error  # safetensors has an exception of its own
    return final


def _is_vocabulary(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(("wte.weight", "lm_head.weight"))


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, which is synced to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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


def read_checkpoint(path: Path, config: ModelConfig) -> Checkpoint:
    """Load a checkpoint into host memory.

    Args:
        path: of a directory that `verify_checkpoint` passed.
        config: of the model it is for.

    Raises:
        UserError: it is of another shape, or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    training = read_training(path)
    try:
        model = state_dict_from_hf(load_file(path / "model.safetensors"), config)
        optimizer = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is unreadable ({error})") from None
    padding = (0, 0, 0, config.padded_vocab_size - config.vocab_size)
    padded = {name: F.pad(t, padding) if _is_vocabulary(name, t) else t for name, t in optimizer.items()}
    return Checkpoint(model, padded, training)


def newest_checkpoint(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint below a run's `checkpoints`; None if there is none at all.

    Args:
        directory: RUN/checkpoints.
        say: told of each damaged one that is passed over.

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


def prune_checkpoints(directory: Path, keep: int, keep_every: int) -> None:
    """Remove old checkpoints, but the newest `keep`, the best by validation loss, and every `keep_every`-th step.

    Nothing is removed unless the newest one proves undamaged.
    """
    found = list_checkpoints(directory)
    training = {}
    for path in found:
        try:
            training[path] = read_training(path)
        except UserError:
            continue  # damaged; it may go when it is old
    losses = {path: t["val_loss"] for path, t in training.items() if t.get("val_loss") is not None}
    kept = set(found[-keep:])
    if losses:
        kept.add(min(losses, key=lambda path: losses[path]))
    if keep_every:
        kept |= {path for path, t in training.items() if t["step"] % keep_every == 0}
    superfluous = [path for path in found if path not in kept]
    if not superfluous:
        return
    try:
        verify_checkpoint(found[-1])
    except UserError:
        return
    for path in superfluous:
        shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time; a save waits for the one before it.

    Args:
        directory: RUN/checkpoints.
        config: of the model.
        tokenizer: of its tokens.
        keep: of `prune_checkpoints`.
        keep_every: of `prune_checkpoints`.
        saved: called in the thread with the step and path of each complete checkpoint.
        failed: called in the thread with a line about each that could not be written; training goes on.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        tokenizer: Tokenizer,
        keep: int,
        keep_every: int,
        saved: Callable[[int, Path], None],
        failed: Callable[[str], None],
    ):
        self.directory, self.config, self.tokenizer = directory, config, tokenizer
        self.keep, self.keep_every = keep, keep_every
        self.saved, self.failed = saved, failed
        self._thread: threading.Thread | None = None
        for leftover in directory.glob(f"{_TEMPORARY}*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
            leftover.unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, once nothing is being written."""
        self.wait()
        return next(reversed(list_checkpoints(self.directory)), None)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, whose tensors must not change any more."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.training["step"]
        try:
            self.saved(step, write_checkpoint(self.directory, checkpoint, self.config, self.tokenizer))
            prune_checkpoints(self.directory, self.keep, self.keep_every)
        except OSError as error:
            last = next(reversed(list_checkpoints(self.directory)), None)
            kept = f"the last good one is {last}" if last else "there is no earlier one"
            self.failed(f"warning: the checkpoint of step {step} could not be written ({error}); {kept}")


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, safe from later steps."""
    copies = {name: tensor.detach().to("cpu", copy=True, non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.device.type == "cuda" for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies
