"""Whether a run may go on with the settings it is given, and from where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from gpt2.checkpoint import list_checkpoints, newest_checkpoint, read_training, verify_checkpoint
from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.history import config_difference

MATTERS = {
    *("data.total_batch_tokens", "data.val_tokens", "data.shuffle", "run.max_steps", "run.seed"),
    *("run.dtype", "run.deterministic", "run.on_nonfinite", "run.spike_zscore"),
}
"""Settings that change what comes out of a run, beside all of the model's and the optimizer's; the others change where
and how it goes. (Which data it reads is told by their fingerprint, not by their place.)"""


def matters(name: str) -> bool:
    """Whether a setting, such as "run.seed", changes what comes out of a run."""
    return name in MATTERS or name.startswith(("model.", "optim."))


def check_config_change(old: Config, new: Config, where: Path) -> None:
    """Refuse settings that can't be changed in a run, and those that change its results unless that was asked for.

    Args:
        old: the run's.
        new: asked for.
        where: the run's directory, for the message.

    Raises:
        UserError: naming each difference.
    """
    changed = {k: v for k, v in config_difference(old.to_dict(), new.to_dict()).items() if matters(k)}
    text = ", ".join(f"{name.split('.')[1]} {before} → {after}" for name, (before, after) in changed.items())
    fixed = [name for name in changed if name.startswith("model.") or name == "optim.optimizer"]
    if fixed:
        raise UserError(f"{where} holds a run with other settings: {text}; choose another --run for these")
    if changed and not new.run.allow_config_change:
        raise UserError(
            f"{where} holds a run with other settings: {text}; choose another --run, or go on in this one with "
            "--allow-config-change"
        )


def write_config(config: Config, path: Path) -> None:
    """Write RUN/config.json, whole or not at all."""
    text = json.dumps(config.to_dict(), indent=1)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def find_start(run: Path, config: Config, say: Callable[[str], None]) -> Path | None:
    """The checkpoint a run goes on from, None to start at step 0.

    Args:
        run: its directory.
        config: asked for.
        say: told of damaged checkpoints.

    Raises:
        UserError: the directory holds a run that can't be gone on with like this.
    """
    checkpoints = run / "checkpoints"
    stored = run / "config.json"
    if config.run.resume == "never":
        if stored.exists() or list_checkpoints(checkpoints):
            raise UserError(f"{run} already holds a run, and --resume never would write over it; choose another --run")
        return None
    if not stored.exists() and run.is_dir() and any(p.name != ".lock" for p in run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another --run")
    if stored.exists():
        check_config_change(Config.load(stored), config, run)
    if config.run.resume == "auto":
        return newest_checkpoint(checkpoints, say)
    path = Path(config.run.resume)
    read_training(path)
    verify_checkpoint(path)
    return path
