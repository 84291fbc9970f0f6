"""A run's state as a checkpoint: gathered from all processes, and written by rank 0 in the background."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gpt2.checkpoint.directory import Checkpoint, host_copy
from gpt2.distributed.parallel import whole
from gpt2.train.optim import state_tensors
from gpt2.train.run import Run


def minutes_are_up(run: Run) -> bool:
    """Whether rank 0's clock asks for a checkpoint."""
    minutes = run.config.run.checkpoint_minutes
    return run.world.is_main and minutes > 0 and time.monotonic() - run.saved_at >= 60 * minutes


def save(run: Run) -> None:
    """Copy the state to the host and begin to write it; nothing happens where this step is saved already."""
    run.save_due, run.saved_at = False, time.monotonic()
    if run.saved_step == run.step:
        return
    run.saved_step = run.step
    with run.metrics.phase("save"):
        # A disk may be slow. The others wait for rank 0 here, asking often enough not to think that it hangs.
        while run.world.any(run.writer.busy(seconds=10)):
            pass

        def gather(tensor: Tensor) -> Tensor:
            """A tensor whole and on the host, in rank 0; the others, who must ask together, get nothing to keep."""
            full = whole(tensor)
            return host_copy(full) if run.world.is_main else torch.empty(0)

        model = {name: gather(parameter) for name, parameter in run.model.named_parameters()}
        optimizer = state_tensors(run.model, run.optimizers, gather)
        training = {
            "step": run.step,
            "sample": run.sequences_read,
            "tokens": run.sequences_read * run.config.model.block_size,
            "val_loss": run.val_loss if run.val_loss is not None and math.isfinite(run.val_loss) else None,
            "best_val_loss": run.best_val_loss if math.isfinite(run.best_val_loss) else None,
            "guard": run.guard.state.tolist(),
            "data_fingerprint": run.dataset.fingerprint,
            "metrics_position": run.metrics.position(),
            "config": run.config.to_dict(),
            "environment": run.environment,
        }
        run.writer.save(Checkpoint(model, optimizer, training))
