"""Which settings are better, with statistics: runs that differ in nothing but the seed are one group.

Means of few runs differ by chance alone. A group's values are taken as draws from a normal distribution, each group
with a spread of its own (Welch 1947); where two groups were run with the same seeds, the differences seed by seed
are, which removes what a seed does to both (paired t test).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean, stdev
from typing import Any, Literal

from gpt2.config import Config
from gpt2.errors import UserError, visible
from gpt2.report.runs import RecordedRun, bits_per_byte

Metric = Literal["val", "bits", "hellaswag", "tok_s"]

TITLES: Mapping[Metric, str] = {
    "val": "validation loss, nats per token",
    "bits": "validation loss, bits per byte",
    "hellaswag": "HellaSwag acc_norm",
    "tok_s": "tokens per second",
}
LOWER_IS_BETTER: tuple[Metric, ...] = ("val", "bits")
CONFIDENCE = 0.95

INCIDENTAL = {
    *("run_dir", "seed", "resume", "allow_config_change", "device", "plot_schedule", "profile", "hellaswag_data"),
    *("log_every", "eval_every", "num_samples", "sample_tokens", "sample_prompt", "wandb", "wandb_project"),
    *("tensorboard", "checkpoint_every", "checkpoint_minutes", "keep", "keep_every", "fitted_steps"),
}
"""Settings that change neither what a run learns nor how fast, but the seed, by which runs of a group differ."""


@dataclass(frozen=True)
class Group:
    """Runs with the same settings, one for each seed."""

    settings: Mapping[str, Any]
    runs: Mapping[int, RecordedRun]
    """The runs by seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and how well it is known."""

    n: int
    mean: float
    stderr: float | None
    """Standard error; None where there is one value alone, which has no spread."""
    interval: tuple[float, float] | None
    """95 % confidence interval."""


@dataclass(frozen=True)
class Comparison:
    """Whether a group is better than a target or another group."""

    kind: Literal["target", "paired", "Welch"]
    difference: Estimate
    """Difference of the means: the group's less the other's."""
    p: float | None
    """One-sided: how often chance alone would make it seem better by as much. None: too few runs to say."""
    smallest: float | None
    """The smallest difference that these runs could have told from chance, at p = 0.05."""


def settings_of(run: RecordedRun) -> dict[str, Any]:
    """What makes two runs comparable seed by seed: every setting but the incidental ones, and the data set's name."""
    try:
        config: Mapping[str, Any] = Config.from_dict(dict(run.config)).to_dict()  # fills in what an old version lacked
    except (UserError, ValueError, TypeError, AttributeError):
        config = run.config
    flat = {name: value for part in config.values() for name, value in part.items() if name not in INCIDENTAL}
    return flat | {"data": PurePath(str(flat.get("data", ""))).name, "dataset": str(run.start.get("dataset", ""))}


def group_runs(runs: Sequence[RecordedRun]) -> tuple[list[Group], list[RecordedRun]]:
    """Runs by their settings, in the order of their first; and those left out, since their group has their seed."""
    groups: list[tuple[dict[str, Any], dict[int, RecordedRun]]] = []
    left_out = []
    for run in runs:
        settings, seed = settings_of(run), run.config.get("run", {}).get("seed")
        seed = seed if type(seed) is int else 0  # the line that says it is lost or damaged
        found = next((members for other, members in groups if other == settings), None)
        if found is None:
            groups.append((settings, {seed: run}))
        elif seed in found:
            left_out.append(run)
        else:
            found[seed] = run
    return [Group(settings, members) for settings, members in groups], left_out


def differing(a: Group, b: Group) -> dict[str, Any]:
    """Settings of `a` that `b` has another value of; None where `a` lacks it."""
    names = sorted(a.settings.keys() | b.settings.keys())
    return {name: a.settings.get(name) for name in names if a.settings.get(name) != b.settings.get(name)}


def names_of(groups: Sequence[Group], baseline: Group) -> list[str]:
    """Each group by the settings in which it differs from the baseline."""
    return [
        visible(", ".join(f"{name}={value}" for name, value in differing(group, baseline).items())) or "baseline"
        for group in groups
    ]


def central(groups: Sequence[Group]) -> Group:
    """The group that differs from the others in the fewest settings: what a sweep of single changes started from."""
    return min(groups, key=lambda group: sum(len(differing(group, other)) for other in groups))


def value(run: RecordedRun, metric: Metric, tokens: int | None = None) -> float | None:
    """A run's figure: that of its last evaluation, or of the last one within the first `tokens` training tokens.

    None where there is no such evaluation, where the figure is not finite, and where the run has not come that far.
    """
    if metric == "tok_s":
        return run.tokens_per_second
    total = run.start.get("total_steps")
    if (type(total) is int and run.step < total) if tokens is None else run.tokens < tokens:
        return None
    records = run.records("hellaswag" if metric == "hellaswag" else "val")
    records = [record for record in records if tokens is None or record["tokens"] <= tokens]
    if not records:
        return None
    last = records[-1]
    found = {"val": last.get("loss"), "hellaswag": last.get("acc_norm"), "bits": bits_per_byte(last)}[metric]
    return found if found is not None and math.isfinite(found) else None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one or more values with its standard error and Student's confidence interval."""
    from scipy.stats import t

    n, mean = len(values), fmean(values)
    if n < 2:
        return Estimate(n, mean, None, None)
    stderr = stdev(values) / math.sqrt(n)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stderr
    return Estimate(n, mean, stderr, (mean - reach, mean + reach))


def compared(values: Mapping[int, float], other: Mapping[int, float] | float, *, lower_is_better: bool) -> Comparison:
    """Test whether the mean of `values` is better than a target or the mean of other values.

    Args:
        values: one value per seed.
        other: a target, or another group's values by seed; paired where both have the same two or more seeds.
        lower_is_better: whether a lower value of the metric is better.
    """
    from scipy.stats import t

    df: float
    if not isinstance(other, Mapping):
        kind: Literal["target", "paired", "Welch"] = "target"
        difference = estimate([x - other for x in values.values()])
        df = len(values) - 1
    elif values.keys() == other.keys() and len(values) > 1:
        kind, difference = "paired", estimate([values[seed] - other[seed] for seed in values])
        df = len(values) - 1
    else:
        kind = "Welch"
        a, b = estimate(list(values.values())), estimate(list(other.values()))
        n, mean, df = a.n + b.n, a.mean - b.mean, 0.0
        if a.stderr is None or b.stderr is None:
            difference = Estimate(n, mean, None, None)
        else:
            stderr = math.hypot(a.stderr, b.stderr)
            spread = a.stderr**4 / (a.n - 1) + b.stderr**4 / (b.n - 1)
            df = stderr**4 / spread if spread else math.inf  # Welch-Satterthwaite
            reach = float(t.ppf((1 + CONFIDENCE) / 2, df)) * stderr
            difference = Estimate(n, mean, stderr, (mean - reach, mean + reach))
    if not difference.stderr:  # one run, or values without any spread: chance has no measure here
        return Comparison(kind, difference, None, None)
    statistic = difference.mean / difference.stderr
    p = float(t.cdf(statistic if lower_is_better else -statistic, df))
    return Comparison(kind, difference, p, float(t.ppf(CONFIDENCE, df)) * difference.stderr)


def reaches(run: RecordedRun, target: float, metric: Metric) -> tuple[int, float] | None:
    """Step and seconds of training at which an evaluation first was as good as the target; None: never.

    The seconds count training alone, up to the last logged step before that evaluation.
    """
    for record in run.records("hellaswag" if metric == "hellaswag" else "val"):
        found = {"val": record.get("loss"), "hellaswag": record.get("acc_norm"), "bits": bits_per_byte(record)}[metric]
        if found is not None and (found <= target if metric in LOWER_IS_BETTER else found >= target):
            step = record["step"]
            spent = [r.get("seconds") for r in run.records("train") if r["step"] <= step]
            return step, sum(float(seconds.get("train", 0.0)) for seconds in spent if isinstance(seconds, dict))
    return None


def bands(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    """Each group's mean validation loss with its standard error, at each place where all of its runs were evaluated."""
    result = []
    for group, name in zip(groups, names, strict=True):
        curves = [{r["tokens"]: r["loss"] for r in run.records("val")} for run in group.runs.values()]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        points = [[curve[tokens] for curve in curves] for tokens in shared]
        points = [losses if all(map(math.isfinite, losses)) else [] for losses in points]
        means = [fmean(losses) if losses else None for losses in points]
        errors = [stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0 for losses in points]
        result.append({"name": name, "n": len(curves), "tokens": shared, "loss": means, "stderr": errors})
    return result
