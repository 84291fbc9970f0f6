"""Copies of a run's metrics for Weights & Biases and TensorBoard.

Neither may stop a training run: each is called through `Guarded`, which drops a tracker at its first failure and says
so once.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args
from urllib.parse import urlsplit

WandbMode = Literal["online", "offline", "disabled"]
WandbChoice = Literal["auto", "online", "offline", "disabled"]

WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Its public servers, old name and new; WANDB_BASE_URL names another."""
INIT_SECONDS = 30
"""How long wandb may take to reach its server before the run is recorded offline."""
FINISH_SECONDS = 120
"""How long wandb may take at the end to upload what is left; the rest stays on disk for `wandb sync`."""


class Tracker(Protocol):
    """A place that metrics are copied to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, by name such as "train/loss"."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A generated text."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Record a checkpoint's path."""

    def close(self, reason: str) -> None:
        """The run ends."""


class Guarded:
    """A tracker whose failures are said once and end it, never the run.

    Args:
        name: the tracker's name in the message.
        make: builds the tracker; it may fail too.
        say: prints a line.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name = name
        self.say = say
        self.tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "tracker", make()))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a third party's client throws
            self.tracker = None
            cause = str(error).strip().splitlines()
            self.say(f"{self.name} failed and is off for the rest of this run: {cause[0] if cause else repr(error)}")

    def tell(self, action: Callable[[Tracker], None]) -> None:
        """Call the tracker, if it still lives."""
        tracker = self.tracker
        if tracker is not None:
            self._attempt(lambda: action(tracker))


def wandb_key_configured() -> bool:
    """Whether wandb would find a key: in the environment, or in a netrc file for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(own).netloc] if own else WANDB_HOSTS
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
        return any(file.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def resolve_wandb_mode(choice: WandbChoice, say: Callable[[str], None]) -> WandbMode:
    """Turn "auto" into "online" or "disabled", and say once what was chosen and why.

    Args:
        choice: "auto", "online", "offline" or "disabled".
        say: prints a line.
    """
    if choice != "auto":
        return choice
    told = os.environ.get("WANDB_MODE", "").lower()  # wandb's own variable
    for mode in get_args(WandbMode):
        if mode == told:
            return cast("WandbMode", mode)
    if importlib.util.find_spec("wandb") is None:
        return "disabled"
    if not wandb_key_configured():
        say("wandb: no key configured, so disabled (`wandb login`, or --wandb offline to record without one)")
        return "disabled"
    return "online"


def new_run_id() -> str:
    """An id for wandb, kept in `metrics.jsonl` so that a restart continues the same wandb run."""
    return secrets.token_hex(4)


class Wandb:
    """Weights & Biases: configuration, curves over the step, samples as a table, checkpoints by reference.

    wandb uploads in a process of its own and records GPU, CPU and memory use by itself.

    Args:
        run: the run's directory; wandb's files go to RUN/wandb.
        mode: "online" or "offline".
        project: on the server.
        run_id: made by `new_run_id`; a run with that id is resumed.
        config: the run's configuration and environment.
        samples: (step, prompt, text) of earlier starts.
        say: prints a line.
    """

    def __init__(
        self,
        run: Path,
        *,
        mode: WandbMode,
        project: str,
        run_id: str,
        config: Mapping[str, Any],
        samples: Sequence[tuple[int, str, str]],
        say: Callable[[str], None],
    ) -> None:
        import wandb

        self.wandb = wandb
        settings: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": INIT_SECONDS}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):  # newer than 0.19
            settings["finish_timeout"] = FINISH_SECONDS

        def start(mode: WandbMode, run_id: str) -> Any:
            return wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=run.name,
                dir=run,
                mode=mode,
                config=dict(config),
                settings=wandb.Settings(**settings),
            )

        try:
            self.run = start(mode, run_id)
        except Exception as error:
            if mode == "offline":
                raise
            cause = str(error).strip().splitlines()
            say(f"wandb: no connection ({cause[0] if cause else error!r}); recording offline, for `wandb sync` later")
            self.run = start("offline", f"{run_id}-offline")  # the failed attempt holds the id itself
        # A restart repeats steps, which wandb's own step counter would refuse.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.samples = list(samples)
        if not self.run.offline:
            say(f"wandb: {self.run.url}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log points over our own step."""
        self.run.log({"step": step, **values})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Log the table of all samples so far: wandb's tables cannot grow."""
        self.samples.append((step, prompt, text))
        table = self.wandb.Table(columns=["step", "prompt", "text"], data=[list(row) for row in self.samples])
        self.run.log({"step": step, "samples": table})

    def checkpoint(self, step: int, path: Path) -> None:
        """Log an artifact that points to the checkpoint, without uploading it."""
        artifact = self.wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": step})
        artifact.add_reference(path.resolve().as_uri(), checksum=False)  # hashing would read every weight again
        self.run.log_artifact(artifact)
        self.run.summary["checkpoint"] = str(path)

    def close(self, reason: str) -> None:
        """Wait for the upload, with a limit; anything but an orderly end is marked failed."""
        self.run.summary["end"] = reason
        self.run.finish(exit_code=0 if reason in ("finished", "stopped") else 1)


class TensorBoard:
    """TensorBoard's event files, by PyTorch's own writer.

    Args:
        directory: the event files' directory.
        start_step: points of later steps, from before a restart, are hidden.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add points."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Add a text."""
        self.writer.add_text("samples", f"{prompt}{text}", step)

    def checkpoint(self, step: int, path: Path) -> None:
        """Add the path as text."""
        self.writer.add_text("checkpoint", str(path), step)

    def close(self, reason: str) -> None:
        """Flush."""
        self.writer.close()
