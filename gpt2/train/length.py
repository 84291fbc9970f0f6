"""How many steps a run with `--max-minutes` takes: as many as fit, told from its first ones."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import replace

from gpt2.checkpoint.resume import write_config
from gpt2.config import Config
from gpt2.progress import duration
from gpt2.train.run import Run

TIMED_STEPS = 4
"""A pace is a mean over at least so many steps,"""
TIMED_FRACTION = 0.05
"""and over this part of the minutes there are,"""
TIMED_SECONDS = 30.0
"""which need not be more than this."""
SPARE_FRACTION = 0.05
"""Of the time left: for the last checkpoint, and for a machine that gets slower."""


def steps_that_fit(
    step: int, max_steps: int, seconds: float, step_seconds: float, eval_every: int, eval_seconds: float
) -> int:
    """The largest number of steps, at most `max_steps`, that a run comes to within some seconds.

    Args:
        step: steps finished, with no evaluation after the last one yet; the result is at least this.
        max_steps: a limit.
        seconds: that are left.
        step_seconds: time that one step takes.
        eval_every: steps between evaluations, one of which follows the last step; 0: never.
        eval_seconds: time that one evaluation takes.
    """

    def cost(total: int) -> float:
        evaluations = 0
        if eval_every:  # at multiples from `step` on, and after the last step
            evaluations = total // eval_every - -(-step // eval_every) + 1 + (total % eval_every != 0)
        return (total - step) * step_seconds + evaluations * eval_seconds

    return max(step + bisect_right(range(step, max_steps + 1), seconds, key=cost) - 1, step)


def fix_length(run: Run) -> None:
    """Fix the run's length once its first steps were timed, by rank 0's clock; all processes call it after each step.

    The length is stored at once, so that a start that resumes the run keeps it.
    """
    settings = run.config.run
    if not settings.max_minutes or settings.fitted_steps is not None:
        return
    now, evaluated = time.monotonic(), sum(run.evaluator.seconds)
    if run.pace_from is None:  # the first step of a start compiles, and is not timed
        run.pace_from = (now, evaluated, run.step)
        return
    began, evaluated_before, first = run.pace_from
    steps, seconds = run.step - first, now - began - (evaluated - evaluated_before)

    def fit() -> tuple[int, str] | None:
        """Rank 0's: the steps, and in words why so many; None: not enough of them were timed."""
        if steps < TIMED_STEPS or seconds < min(TIMED_FRACTION * 60 * settings.max_minutes, TIMED_SECONDS):
            return None
        done = run.evaluator.seconds
        if settings.eval_every and not done:  # it was made before a restart; the next one is timed
            return None
        evaluation = sum(done) / len(done) if done else 0.0
        left = (60 * settings.max_minutes - (now - run.began)) * (1 - SPARE_FRACTION)
        total = steps_that_fit(run.step, settings.max_steps, left, seconds / steps, settings.eval_every, evaluation)
        why = f"{seconds / steps:.3g} s per step" + (f", {duration(evaluation)} per evaluation" if done else "")
        return total, why

    found = run.world.on_main(fit)
    if found is None:
        return
    total, why = found
    run.config = replace(run.config, run=replace(settings, fitted_steps=total))
    run.metrics.length(run.step, total)
    run.say(
        f"{'length':<11}{total:,} of {settings.max_steps:,} steps fit into {settings.max_minutes:g} min ({why}); "
        "the learning rate follows this length, and a resumed run keeps it"
    )

    def store() -> None:
        """In config.json, whose other settings differ from this start's: they are what was asked for."""
        path = run.directory / "config.json"
        stored = Config.load(path)
        write_config(replace(stored, run=replace(stored.run, fitted_steps=total)), path)

    run.world.on_main(store)
