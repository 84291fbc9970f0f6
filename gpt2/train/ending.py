"""How a run ends: with which words, which exit code, and everything closed."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.config import Config
from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import World
from gpt2.errors import UserError, first_line, is_out_of_memory, outliving_output
from gpt2.metrics.history import METRICS_FILE, read_metrics, time_spent
from gpt2.metrics.recorder import EndReason
from gpt2.progress import duration
from gpt2.train.divergence import Diverged
from gpt2.train.out_of_memory import explain
from gpt2.train.run import Run
from gpt2.train.setup import set_up

DIVERGED_EXIT = 3
ROOT = Path(__file__).resolve().parents[2]


def run_to_its_end(train: Callable[[Run, StopSignals], EndReason], config: Config, world: World) -> int:
    """Set a run up, train it, and end it, whatever happens.

    Args:
        train: trains to the last step, or to a reason to stop.
        config: the run's.
        world: its processes, which all call this.

    Returns:
        The exit code: 0 finished, or stopped by a signal; 2 the last checkpoint could not be written; 3 diverged.

    Raises:
        UserError: the run cannot start, or ran out of memory or data.
        KeyboardInterrupt: Ctrl-C stopped it, and it is saved; not below torchrun, which would start it again.
    """
    # Signals are heeded from here on: a process that waits for others to join could not heed them.
    # And nobody has to be there to read what is printed.
    with StopSignals() as signals, outliving_output():
        try:
            run = set_up(config, world)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"rank {world.rank}: the model does not fit on {world.device} ({first_line(error)}); is somebody else "
                "using it? Otherwise use a smaller model, or --parallel fsdp over more processes",
                alone=True,
            ) from None
        try:
            reason = train(run, signals)
            code = finish(run, reason, signals)
        except Diverged as failure:
            return _diverged(run, failure)
        except KeyboardInterrupt:  # the second one: at once
            close(run, "error")
            raise
        except BaseException as error:
            line = run.watch.explain(error)
            if line is not None:
                print(f"error: {line}", file=sys.stderr)
            run.writer.wait()
            close(run, "error")
            if is_out_of_memory(error):
                raise explain(error, run.config, run.plan, world) from None
            raise
    if reason == "stopped" and code == 0 and signals.interrupted and world.memory is None:
        raise KeyboardInterrupt
    return code


def finish(run: Run, reason: EndReason, signals: StopSignals) -> int:
    """Wait for the last checkpoint and close everything; returns the exit code."""
    code = 0
    run.writer.wait()
    if run.writer.failed_step == run.step:
        run.say(f"error: step {run.step} is not saved; make room, then resume with: {resume_command(run)}")
        code = 2
    elif reason == "stopped":
        name = signals.received or "a signal to another process"
        run.say(f"stopped by {name} after step {run.step}; resume with: {resume_command(run)}")
    run.writer.close()
    close(run, reason)
    if reason == "finished" and code == 0 and run.world.is_main:
        with suppress(OSError, UserError):  # what was recorded cannot be read: the run is finished all the same
            print("\n".join(made(run)), flush=True)
    return code


def made(run: Run) -> list[str]:
    """What a run that is finished has made, and what to do with it."""
    history, directory = read_metrics(run.directory / METRICS_FILE), shlex.quote(str(run.directory))
    val = [(record["loss"], record["step"]) for record in history.live if record["kind"] == "val"]
    seconds, device_seconds = time_spent(history.everything)
    lines = [f"{'done':<11}{run.step:,} steps in {duration(seconds)}, {device_seconds / 3600:,.2f} device-hours"]
    if run.config.run.price is not None:
        price = run.config.run.price
        lines.append(f"{'cost':<11}{device_seconds / 3600 * price:,.2f} at {price:g} per device-hour")
    if val:
        loss, step = min(val, key=lambda pair: pair if pair[0] == pair[0] else (math.inf, 0))
        best = "the best of all evaluations" if step == val[-1][1] else f"the best was {loss:.4f} at step {step:,}"
        lines.append(f"{'loss':<11}{val[-1][0]:.4f} on the validation split at step {val[-1][1]:,}; {best}")
    kept = list_checkpoints(run.directory / "checkpoints")
    if kept:
        lines.append(f"{'checkpoint':<11}{kept[-1]}" + (f", the newest of {len(kept)}" if len(kept) > 1 else ""))
    commands = (f"sample.py -m {directory}", f"report.py {directory}", f"export.py {directory}@best DIR")
    return lines + [f"{'next' if i == 0 else '':<11}python scripts/{words}" for i, words in enumerate(commands)]


def close(run: Run, reason: EndReason) -> None:
    """Let go of everything, without waiting."""
    run.metrics.close(reason)
    run.watch.close()
    if run.lock is not None:
        run.lock.close()


def _diverged(run: Run, failure: Diverged) -> int:
    """Say what is not finite and how to continue; returns the exit code."""
    last = run.writer.newest()
    run.say(f"error: {failure}")
    for line in failure.circumstances:
        run.say(f"  {line}")
    if failure.hint:
        run.say(failure.hint)
    run.say(
        f"the last good checkpoint is {last}; this goes back to it: {resume_command(run)}"
        if last is not None
        else f"there is no checkpoint to go back to; this starts over: {resume_command(run)}"
    )
    if failure.flags:
        run.say("by itself that takes the same steps again; add one of")
        for flag, effect in failure.flags.items():
            run.say(f"  {flag:<44} {effect}")
    run.writer.close()
    close(run, failure.reason)
    return DIVERGED_EXIT


def resume_command(run: Run) -> str:
    """The words that resume this run, from any directory."""
    size = run.world.size
    start = "python" if size == 1 else f"torchrun --standalone --nproc_per_node={size}"
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        start = "torchrun, with the same words as now on each machine,"
    script, config = ROOT / "train_gpt2.py", run.directory.absolute() / "config.json"
    return f"{start} {shlex.quote(str(script))} --config {shlex.quote(str(config))}"
