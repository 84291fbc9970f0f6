"""What a run shows while it goes: a live bar on a terminal, plain lines in a log.

Both are told the same things; `open_console` chooses.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from gpt2.errors import visible
from gpt2.progress import duration

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

PHASE_TITLES: Mapping[str, str] = {"data": "waiting for data", "eval": "evaluating", "save": "saving a checkpoint"}


@dataclass(frozen=True)
class Status:
    """A logged training step."""

    step: int
    """Optimizer steps finished."""
    total_steps: int
    loss: float
    smoothed_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int | None
    seconds_left: float | None
    next_eval: int | None
    """Steps until the next evaluation."""
    shares: Mapping[str, float]
    """Parts of the wall time since the last logged step that went into each phase, training aside."""


def parts(status: Status, *, smoothed: bool) -> list[str]:
    """The figures of a step as short texts, those that are unknown left out.

    Args:
        smoothed: give the smoothed loss beside the step's own.
    """
    loss = f"loss {status.loss:.4f}" + (f" (mean {status.smoothed_loss:.4f})" if smoothed else "")
    texts = [loss, f"lr {status.lr:.2e}", f"norm {status.grad_norm:.2f}", f"{status.tokens_per_second:,.0f} tok/s"]
    if status.mfu is not None:
        texts.append(f"mfu {status.mfu:.1%}")
    if status.memory_bytes is not None:
        texts.append(f"{status.memory_bytes / 2**30:.1f} GiB")
    texts += [f"{name} {share:.0%}" for name, share in status.shares.items() if share >= 0.01]
    return texts


class LogLines:
    """One line a logged step, for a file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, status: Status) -> None:
        """Write the step's line."""
        width = len(str(status.total_steps))
        texts = parts(status, smoothed=False)
        if status.seconds_left is not None:
            texts.append(f"{duration(status.seconds_left)} left")
        self.say(f"step {status.step:>{width}}/{status.total_steps} | " + " | ".join(texts))

    def say(self, text: str, *, strong: bool = False) -> None:
        """Write a line; a strong one stands out by an arrow."""
        print(("=> " if strong else "") + visible(text, "\n\t"), file=self.stream, flush=True)

    def activity(self, phase: str | None) -> None:
        """Phases are not shown in a log: the step's line gives their shares."""

    def close(self) -> None:
        """Nothing to put back."""


class LiveBar:
    """A bar with its figures at the bottom of a terminal; messages scroll by above it."""

    def __init__(self, console: RichConsole, total_steps: int, start_step: int) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=start_step, left="")
        self.figures = Text()
        # Not refreshed by a thread of rich's: what it draws while a line is printed would stay behind above the bar.
        self.live = Live(Group(self.progress, self.figures), console=console, auto_refresh=False)
        self.live.start(refresh=True)
        self.drawn = time.monotonic()

    def show(self, status: Status) -> None:
        """Move the bar to this step and renew its figures."""
        left = "" if status.seconds_left is None else f"{duration(status.seconds_left)} left"
        self.progress.update(self.task, completed=status.step, total=status.total_steps, left=left)
        texts = parts(status, smoothed=True)
        if status.next_eval is not None:
            texts.append(f"evaluation in {status.next_eval} step{'s' * (status.next_eval != 1)}")
        self.figures.plain = " | ".join(texts)
        if time.monotonic() - self.drawn > 0.1:  # drawing takes a millisecond, steps may take less
            self.draw()

    def draw(self) -> None:
        """Bring the bar's state to the screen."""
        self.live.refresh()
        self.drawn = time.monotonic()

    def say(self, text: str, *, strong: bool = False) -> None:
        """Print above the bar; a strong line in bold."""
        from rich.text import Text

        # rich would cut a path longer than a line into pieces that cannot be copied; the terminal wraps it whole.
        width = self.live.console.width
        wrapped = "\n".join(
            textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
            for line in visible(text, "\n\t").split("\n")
        )
        # As a Text: a style given to print would colour the bar as well.
        self.live.console.print(Text(wrapped, style="bold green" if strong else ""), soft_wrap=True)

    def activity(self, phase: str | None) -> None:
        """Name what runs in place of training; None: training again."""
        self.progress.update(self.task, description="training" if phase is None else PHASE_TITLES[phase])
        self.draw()

    def close(self) -> None:
        """Give the terminal back, with the bar's last state left standing."""
        self.live.stop()


def open_console(total_steps: int, start_step: int, stream: TextIO | None = None) -> LogLines | LiveBar:
    """A live bar where `stream` is a terminal and rich is installed, else plain lines.

    Args:
        total_steps: steps of the whole run.
        start_step: steps finished before this start.
        stream: None: standard output.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            from rich.console import Console
        except ImportError:
            return LogLines(stream)
        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveBar(console, total_steps, start_step)
    return LogLines(stream)
