"""What a run measures and where that goes: `metrics.jsonl`, the console, wandb, TensorBoard.

`RUN/metrics.jsonl` holds one JSON object per line. Every line has "kind", "step" (optimizer steps finished) and "time"
(Unix seconds); docs/metrics.md lists the rest. `gpt2.metrics.jsonl` writes it, `gpt2.metrics.history` reads it
back as one curve over all restarts.

Nothing here may stop training: a full disk or an unreachable server is said once.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from gpt2.config import Config, config_difference
from gpt2.errors import UserError, visible
from gpt2.hardware import environment, memory_bytes, peak_flops
from gpt2.metrics import reference
from gpt2.metrics.console import Status, open_console
from gpt2.metrics.history import METRICS_FILE
from gpt2.metrics.jsonl import MetricsFile
from gpt2.metrics.phase_clock import PHASES, Phase, PhaseClock
from gpt2.metrics.trackers import Guarded, TensorBoard, Tracker, Wandb, new_run_id, resolve_wandb_mode

EndReason = Literal["finished", "stopped", "nonfinite", "spike", "error"]

SMOOTHING = 0.9
"""Weight of the past in the bar's smoothed loss, a logged step."""


def readable(text: str) -> str:
    """A text as a person can read it in a terminal: control characters written out, blank lines left out."""
    return re.sub(r"\s*\n", "\n", visible(text, keep="\n\t").strip()) or repr(text)


class Metrics:
    """Records a run; rank 0 alone has one, in its main thread.

    Args:
        run: the run's directory, which exists.
        config: the run's.
        flops_per_token: forward and backward, for MFU.
        device: this process's; the other processes are taken to have the same.
        world_size: processes of the run.
        start_step: steps finished when this start begins; what was recorded of later steps is superseded. 0: a new
            life, which supersedes all there is.
        start_tokens: tokens trained on until then; None: start_step times today's tokens per step.
        position: what `position()` returned when the checkpoint was saved that this start resumes; None: found from
            start_step, which is the same unless the run once went back to an older checkpoint.
        dataset: name or source of the data set, which chooses the baselines.
        peak: FLOP/s of one device; None: the datasheet's, and no MFU where that is unknown.
    """

    def __init__(
        self,
        run: Path,
        *,
        config: Config,
        flops_per_token: float,
        device: torch.device,
        world_size: int,
        start_step: int = 0,
        start_tokens: int | None = None,
        position: int | None = None,
        dataset: str = "",
        peak: float | None = None,
    ) -> None:
        self.run = run
        self.config = config
        self.device = device
        self.tokens_per_step = config.data.total_batch_tokens
        self.start_step = start_step
        self.start_tokens = start_step * self.tokens_per_step if start_tokens is None else start_tokens
        self.total_steps = config.run.total_steps
        self.flops_per_token = flops_per_token
        self.corpus = reference.corpus_of(dataset)
        self.published = reference.published(self.corpus, config.to_dict())
        self.size = reference.size_of(config.model.n_layer, config.model.n_head, config.model.n_embd)
        facts = environment(device, world_size)
        peak = peak_flops(facts["device"]) if peak is None and device.type == "cuda" else peak
        self.peak = None if peak is None else peak * world_size

        self.console = open_console(self.total_steps, start_step)
        try:
            self.file = MetricsFile(run / METRICS_FILE, self.message)
        except UserError:
            self.console.close()  # or the bar would swallow the message
            raise
        self.closed = False
        self.last_step = start_step  # logged last
        self.newest_step = start_step
        self.smoothed: float | None = None
        self._pace: tuple[float, int] | None = None  # (time, step) of the first logged step: before it, compilation
        self.clock = PhaseClock()

        settings = config.run
        mode = resolve_wandb_mode(settings.wandb, self.message)
        start: dict[str, Any] = {"resumes_at": self.file.resume(start_step, position), **facts}
        previous: Mapping[str, Any] = next((r for r in reversed(self.file.kept) if r["kind"] == "run_start"), {})
        start |= {"dataset": dataset, "config": config.to_dict(), "total_steps": self.total_steps}
        if "config" in previous:
            start["config_changed"] = config_difference(previous["config"], start["config"])
        if mode != "disabled":
            start["wandb_id"] = previous.get("wandb_id") or new_run_id()
        self._write("run_start", start_step, start)

        self.trackers: list[Guarded] = []
        if mode != "disabled":
            kept = [r for r in self.file.kept if r["kind"] == "sample"]
            samples = [(r["step"], r.get("prompt", ""), r.get("text", "")) for r in kept]
            described = {**start["config"], "environment": facts, "dataset": dataset}
            self.trackers.append(
                Guarded(
                    "wandb",
                    lambda: Wandb(
                        run,
                        mode=mode,
                        project=settings.wandb_project,
                        run_id=start["wandb_id"],
                        config=described,
                        samples=samples,
                        say=self.message,
                    ),
                    self.message,
                )
            )
        if settings.tensorboard:
            self.trackers.append(
                Guarded("TensorBoard", lambda: TensorBoard(run / "tensorboard", start_step), self.message)
            )
        self.clock.read()  # what starting took is no step's

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self.console.say(text)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time inside as `name`, not as training; of nested phases the outer one counts.

        Evaluation and saving wait for the device at both ends, so that queued training steps are not billed to them.
        """
        waits = name != "data" and self.clock.phase is None
        if waits:
            self._synchronize()
            self.console.activity(name)
        with self.clock.during(name):
            try:
                yield
            finally:
                if waits:
                    self._synchronize()
                    self.console.activity(None)

    def train(self, step: int, *, loss: float, lr: float, grad_norm: float) -> None:
        """Record a step, with the speed since the last recorded one.

        Args:
            step: steps finished, this one included.
            loss: mean over the step's tokens, nats.
            lr: learning rate of the update.
            grad_norm: global gradient norm before clipping.
        """
        now = time.perf_counter()
        seconds = self.clock.read()
        wall = sum(seconds.values())
        tokens = (step - self.last_step) * self.tokens_per_step
        speed = tokens / max(seconds["train"], 1e-9)
        mfu = None if self.peak is None else speed * self.flops_per_token / self.peak
        if math.isfinite(loss):
            self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        memory = memory_bytes(self.device)
        if self._pace is None:
            self._pace, seconds_left = (now, step), None
        else:
            pace = (now - self._pace[0]) / max(step - self._pace[1], 1)
            seconds_left = pace * (self.total_steps - step)
        self.last_step = step
        self._write(
            "train",
            step,
            {
                "tokens": self._tokens(step),
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_second": speed,
                "mfu": mfu,
                "memory_bytes": memory,
                "seconds": seconds,
            },
        )
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        if mfu is not None:
            values["mfu"] = mfu
        self._scalars(step, {f"train/{name}": value for name, value in values.items()})
        every, left = self.config.run.eval_every, self.total_steps - step
        self.console.show(
            Status(
                step=step,
                total_steps=self.total_steps,
                loss=loss,
                smoothed_loss=loss if self.smoothed is None else self.smoothed,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_second=speed,
                mfu=mfu,
                memory_bytes=memory,
                seconds_left=seconds_left,
                next_eval=min(every - step % every, left) if every and left > 0 else None,
                shares={name: seconds[name] / wall for name in PHASES} if wall > 0 else {},
            )
        )

    def length(self, step: int, total_steps: int) -> None:
        """Record how many steps the run has, where that was fixed after its start."""
        self.total_steps = total_steps
        self._write("length", step, {"total_steps": total_steps})

    def val(self, step: int, loss: float, val_tokens: int, val_bytes: int) -> None:
        """Record a validation loss.

        Args:
            step: steps finished.
            loss: mean over `val_tokens` tokens, nats.
            val_tokens: tokens it is a mean over.
            val_bytes: UTF-8 bytes of their text.
        """
        bits = loss * val_tokens / math.log(2) / val_bytes if val_bytes else math.nan
        values = {"loss": loss, "bits_per_byte": bits}
        self._write("val", step, {"tokens": self._tokens(step), **values, "val_tokens": val_tokens})
        self._scalars(step, {f"val/{name}": value for name, value in values.items()})
        text = f"validation loss {loss:.4f} ({bits:.4f} bits per byte)"
        beside = [
            reference.loss_beside_gpt2(self.corpus, self.size, loss, val_tokens),
            self.published.beside(step, loss) if self.published is not None else None,
        ]
        self._stand_out(step, " | ".join([text, *filter(None, beside)]))

    def hellaswag(
        self, step: int, *, convention: str, acc: float, acc_norm: float, stderr: float, examples: int
    ) -> None:
        """Record a HellaSwag evaluation.

        Args:
            step: steps finished.
            convention: "completion" or "harness".
            acc: accuracy by the sum of log-probabilities.
            acc_norm: accuracy after dividing by the ending's length.
            stderr: standard error of acc_norm.
            examples: how many were scored.
        """
        self._write(
            "hellaswag",
            step,
            {
                "tokens": self._tokens(step),
                "acc": acc,
                "acc_norm": acc_norm,
                "stderr": stderr,
                "examples": examples,
                "convention": convention,
            },
        )
        self._scalars(step, {"hellaswag/acc": acc, "hellaswag/acc_norm": acc_norm})
        low, high = reference.wilson(acc_norm, examples)
        text = f"HellaSwag {acc_norm:.2%} ({low:.2%} to {high:.2%}), {examples:,} examples"
        beside = None
        if convention == "completion":
            beside = reference.hellaswag_beside_gpt2(self.size, acc_norm)
        self._stand_out(step, text if beside is None else f"{text} | {beside}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a generated text.

        Args:
            prompt: what it continues.
            text: the new text alone.
        """
        tokens = self._tokens(step)
        self._write("sample", step, {"tokens": tokens, "prompt": prompt, "text": text})
        self._tell(lambda sink: sink.sample(step, prompt, text))
        self.message(f"   sample: {readable(prompt + text)}".replace("\n", "\n   "))

    def checkpoint(self, step: int, path: Path) -> None:
        """Record that a checkpoint is complete, and say so."""
        self._write("checkpoint", step, {"path": os.path.relpath(path, self.run)})
        self._tell(lambda sink: sink.checkpoint(step, path))
        self.message(f"step {step:>{len(str(self.total_steps))}} | checkpoint {path}")

    def skip(self, step: int, reason: str, loss: float, grad_norm: float) -> None:
        """Record an update that was not made.

        Args:
            step: steps finished, the skipped one included.
            reason: such as "nonfinite" or "spike".
            loss: the step's mean, nats.
            grad_norm: the step's, before clipping.
        """
        self._write("skip", step, {"reason": reason, "loss": loss, "grad_norm": grad_norm})
        self._stand_out(step, f"update skipped ({reason}): loss {loss:.4f}, gradient norm {grad_norm:.2f}")

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far, on disk for good; a checkpoint keeps it."""
        return self.file.sync()

    def close(self, reason: EndReason) -> None:
        """Record the end and let everything go; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self._write("run_end", self.newest_step, {"reason": reason, "seconds": self.clock.read()})
        self.console.close()
        self._tell(lambda sink: sink.close(reason))
        self.file.close()

    def _tokens(self, step: int) -> int:
        """Tokens trained on after a step, also where an earlier start of the run took larger or smaller steps."""
        return self.start_tokens + (step - self.start_step) * self.tokens_per_step

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.newest_step = max(self.newest_step, step)
        self.file.write({"kind": kind, "step": step, "time": round(time.time(), 3), **values})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(lambda sink: sink.scalars(step, values))

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        """Do something to every tracker; what holds training up is billed to saving."""
        began = time.perf_counter()
        for tracker in self.trackers:
            tracker.tell(action)
        if self.clock.phase is None:
            self.clock.bill("save", time.perf_counter() - began)

    def _stand_out(self, step: int, text: str) -> None:
        self.console.say(f"step {step:>{len(str(self.total_steps))}} | {text}", strong=True)


class NoMetrics:
    """What every process but rank 0 has in place of `Metrics`: it records nothing and prints nothing."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Time nothing."""
        return nullcontext()

    def position(self) -> int:
        """No bytes."""
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Any other method of `Metrics`, doing nothing."""
        if not callable(getattr(Metrics, name, None)):
            raise AttributeError(name)
        return lambda *args, **values: None
