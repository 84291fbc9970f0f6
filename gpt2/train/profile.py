"""A trace of a few training steps by PyTorch's profiler, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpt2.train.run import Run

WAIT = 3
"""Steps left alone at first, so that compilation and the first allocations are not in the trace."""
WARMUP = 2
"""Steps that the profiler runs without keeping them: its own start is slow."""


class StepProfiler:
    """Traces a run's steps number WAIT + WARMUP + 1 and after, counted from this start.

    Args:
        directory: RUN/profile; receives one file.
        steps: to trace.
        device: its kernels are traced beside the host's calls.
        first_step: steps finished before the first one.
    """

    def __init__(self, directory: Path, steps: int, device: torch.device, first_step: int):
        self.steps = steps
        self.directory, self.first = directory, first_step + WAIT + WARMUP + 1
        self.path = directory
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()
        self._seen = 0
        self.written = False

    @property
    def done(self) -> bool:
        """Whether all its steps are traced."""
        return self._seen >= WAIT + WARMUP + self.steps

    def step(self) -> None:
        """A step has ended."""
        if not self.done:
            self._seen += 1
            self._profile.step()
            if self.done:
                self._profile.stop()

    def close(self) -> None:
        """Stop, also before all steps are traced; what there is of them is written."""
        if not self.done:
            self.steps = self._seen - WAIT - WARMUP
            self._profile.stop()

    def _write(self, trace: profile) -> None:
        self.path = self.directory / f"steps_{self.first}_to_{self.first + self.steps - 1}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.path))
        self.written = True


@contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """Trace the steps of the block if the run's settings ask for it; the value is to be called after each step."""
    steps = run.config.run.profile
    if not steps or not run.world.is_main:
        yield lambda: None
        return
    profiler = StepProfiler(run.directory / "profile", steps, run.world.device, run.step)
    yield profiler.step
    profiler.close()
    run.say(f"the profiler's trace is {profiler.path}" if profiler.written else "too few steps to profile")
