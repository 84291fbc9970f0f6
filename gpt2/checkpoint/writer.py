"""Checkpoints written while training continues, and which of the old ones stay."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2.checkpoint.directory import (
    TEMPORARY,
    Checkpoint,
    list_checkpoints,
    read_training,
    verify_checkpoint,
    write_checkpoint,
)
from gpt2.checkpoint.mirror import Mirror, NoMirror
from gpt2.config import GPTConfig
from gpt2.distributed.signals import seconds_to_stop
from gpt2.errors import UserError
from gpt2.tokens.tokenizer import Tokenizer


def worth_keeping(trainings: Mapping[str, Mapping[str, Any]], keep_every: int) -> set[str]:
    """The best checkpoint by validation loss and every `keep_every`-th step, of training.json by directory."""
    losses = {name: loss for name, t in trainings.items() if (loss := t.get("val_loss")) is not None}
    best = {min(losses, key=lambda name: losses[name])} if losses else set()
    return best | {name for name, t in trainings.items() if keep_every and t["step"] % keep_every == 0}


def prune_checkpoints(directory: Path, keep: int, keep_every: int) -> None:
    """Remove old checkpoints, but the newest `keep`, the best by validation loss, and every `keep_every`-th step.

    Nothing is removed unless the newest one proves undamaged.
    """
    found = list_checkpoints(directory)
    trainings = {}
    for path in found:
        with contextlib.suppress(UserError):  # damaged; it may go when it is old
            trainings[path.name] = read_training(path)
    kept = worth_keeping(trainings, keep_every)
    superfluous = [path for path in found[:-keep] if path.name not in kept]
    if not superfluous:
        return
    try:
        verify_checkpoint(found[-1])
    except UserError:
        return
    for path in superfluous:
        if path.is_symlink():  # it was moved elsewhere, where it stays
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time.

    Args:
        directory: RUN/checkpoints.
        config: the model's.
        tokenizer: the model's.
        keep: newest checkpoints that stay.
        keep_every: checkpoints at multiples of this many steps stay, too; 0: none.
        saved: called with the step and path of each complete checkpoint.
        warn: called with a line about each that could not be written, or takes too long; training continues.
        mirror: the run's second copy, where it has one.

    `saved` and `warn` are called by whoever calls `busy` or `wait` next, not by the thread.
    """

    def __init__(
        self,
        directory: Path,
        config: GPTConfig,
        tokenizer: Tokenizer,
        keep: int,
        keep_every: int,
        saved: Callable[[int, Path], None],
        warn: Callable[[str], None],
        mirror: Mirror | NoMirror,
    ):
        self.directory, self.config, self.tokenizer = directory, config, tokenizer
        self.keep, self.keep_every = keep, keep_every
        self.saved, self.warn, self.mirror = saved, warn, mirror
        self.failed_step: int | None = None
        """Step of the last checkpoint, if that could not be written."""
        self._step = -1
        self._began = self._took = 0.0
        self._warned = False
        self._thread: threading.Thread | None = None
        self._outcome: Path | OSError | None = None
        for leftover in directory.glob(f"{TEMPORARY}*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, once nothing is being written."""
        self.wait()
        return self._last()

    def _last(self) -> Path | None:
        with contextlib.suppress(UserError):  # somebody made the directory unreadable
            return next(reversed(list_checkpoints(self.directory)), None)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, whose tensors must not change any more; waits for the one before it."""
        self.wait()
        self._step, self._began = checkpoint.training["step"], time.perf_counter()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint", daemon=True)
        self._thread.start()

    def busy(self, seconds: float = 0) -> bool:
        """Whether a checkpoint is still being written after so many seconds."""
        if self._thread is None:
            return False
        self._thread.join(seconds)
        if self._thread.is_alive():
            return True
        self._thread = None
        self._report()
        return False

    def wait(self) -> None:
        """Return when nothing is being written."""
        while self.busy(seconds=60):
            pass

    def close(self) -> None:
        """Return when nothing is being written or copied."""
        self.wait()
        self.mirror.finish()

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._outcome = write_checkpoint(self.directory, checkpoint, self.config, self.tokenizer)
        except OSError as error:  # reported in the main thread
            self._outcome = error
            return
        self._took = time.perf_counter() - self._began
        with contextlib.suppress(UserError):
            prune_checkpoints(self.directory, self.keep, self.keep_every)

    def _report(self) -> None:
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Path):
            self.failed_step = None
            self.saved(self._step, outcome)
            self.mirror.wake()
            limit = seconds_to_stop()
            if limit is not None and self._took > limit and not self._warned:
                self._warned = True
                self.warn(
                    f"warning: writing a checkpoint took {self._took:.0f} s, but torchrun kills its processes "
                    f"{limit:.0f} s after a signal, saved or not; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to more seconds"
                )
            return
        self.failed_step = self._step
        last = self._last()
        kept = f"the last good one is {last}" if last else "there is no earlier one"
        self.warn(f"warning: the checkpoint of step {self._step} could not be written ({outcome}); {kept}")


class NoWriter:
    """What every process but rank 0 has in place of a `CheckpointWriter`."""

    failed_step: int | None = None

    def newest(self) -> Path | None:
        """No checkpoint that this process knows of."""
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Leave it to rank 0."""

    def busy(self, seconds: float = 0) -> bool:
        """Never."""
        return False

    def wait(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """Nothing is open."""
