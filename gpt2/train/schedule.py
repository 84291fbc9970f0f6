"""The learning rate as a pure function of the step: there is no scheduler, and no state of one to save."""

from __future__ import annotations

import math
from pathlib import Path

from gpt2.config import OptimConfig
from gpt2.figures import save_figure


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """What the peak learning rates are multiplied by at a step.

    Linear warm-up to 1 over `warmup_steps`, then by `schedule`, down to `min_lr_ratio` at `total_steps`: half a cosine
    wave (Loshchilov & Hutter 2017), a line, a plateau with a linear end (wsd, Hu et al. 2024), or no change.

    Args:
        step: number of the step, from 0.
        total_steps: the run's; past them the last factor holds.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)  # 0 to 1
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        remaining = 1.0 - progress
    else:  # wsd; the decay is a fraction of all steps, and never reaches into the warm-up
        decay_steps = min(config.decay_fraction * total_steps, total_steps - config.warmup_steps)
        remaining = min((total_steps - step) / max(decay_steps, 1), 1.0) if step < total_steps else 0.0
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * remaining


def plot_schedule(path: Path, total_steps: int, config: OptimConfig) -> None:
    """Draw the learning rate over the run's steps. UserError where the picture cannot be written."""
    from matplotlib.figure import Figure

    points = sorted(
        {round(i * (total_steps - 1) / 2000) for i in range(2001)} | {min(config.warmup_steps, total_steps)}
    )
    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(points, [config.learning_rate * lr_factor(step, total_steps, config) for step in points])
    axes.set(xlabel="step", ylabel="learning rate", title=f"{config.schedule}, {config.warmup_steps} steps of warm-up")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    save_figure(figure, path)
