"""What the report of one or more runs says, as plain values: `scripts/report.py` turns it into a page and pictures."""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from gpt2.errors import visible
from gpt2.metrics import reference
from gpt2.report.compare import bands, central, group_runs, names_of
from gpt2.report.runs import Record, RecordedRun, bits_per_byte, distinct_names

MAX_POINTS = 1500
"""Points a training curve is drawn with; longer ones are cut into so many parts of equal length."""
LONG_RUN = 1000
"""Steps from which the loss chart leaves out the first drop, which would press the rest flat."""
DROP = 0.02
"""Part of all tokens that counts as the first drop."""
MAX_SAMPLES = 240
"""Samples a page carries for a run; more are thinned by step, first and last kept."""

CURVES: Mapping[str, tuple[str, bool]] = {
    "loss": ("loss", False),
    "lr": ("lr", False),
    "grad_norm": ("grad_norm", True),
    "tokens_per_second": ("tokens_per_second", False),
    "mfu": ("mfu", False),
}
"""Curve's name: field of a train line, and whether a part shows its largest value instead of its mean."""


def report(runs: Sequence[RecordedRun], *, price: float | None = None, now: float | None = None) -> dict[str, Any]:
    """Everything the page shows, as JSON values; what is not finite becomes None.

    Args:
        runs: to overlay, in order.
        price: what one device costs per hour, in any currency; None: no cost is shown.
        now: Unix seconds; None: the clock.
    """
    names = [visible(name) for name in distinct_names([run.directory for run in runs])]
    corpora = {run.start.get("dataset", "") for run in runs}
    return {
        "title": names[0] if len(names) == 1 else f"{len(names)} runs",
        "time": time.time() if now is None else now,
        "price": price,
        "mixed": len(corpora) > 1,
        "long": max((run.step for run in runs), default=0) >= LONG_RUN,
        "drop": DROP,
        "runs": [_run(run, name, price, now) for run, name in zip(runs, names, strict=True)],
        "baselines": baselines(runs),
        "hellaswag_lines": hellaswag_lines(runs),
        "milestones": milestones(runs),
        "groups": _groups(runs),
        "differences": differences([run.config for run in runs]),
    }


def _groups(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Mean curves of runs that differ in their seed alone; none where every run is one of its kind."""
    groups, _ = group_runs(runs)
    if all(len(group.runs) == 1 for group in groups):
        return []
    return bands(groups, names_of(groups, central(groups)))


def baselines(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """GPT-2's validation loss for each corpus and size among the runs, each with the runs it is for."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for index, run in enumerate(runs):
        loss = reference.gpt2_val_loss(run.corpus, run.size)
        if loss is not None and run.corpus is not None and run.size is not None:
            label = f"GPT-2 {run.size} on {reference.CORPUS_TITLES[run.corpus]}"
            lines.setdefault((run.corpus, run.size), {"label": label, "value": loss, "runs": []})["runs"].append(index)
    return list(lines.values())


def milestones(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Points of the published runs that the runs are held against."""
    found: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        published = reference.published(run.corpus, run.config)
        if published is not None:
            at = {"tokens": reference.RECIPE_TOKENS_PER_STEP, "step": 1}
            points = {key: [[step * each, loss] for step, loss in published.points] for key, each in at.items()}
            entry = {"label": published.label, "points": points, "runs": []}
            found.setdefault(published.label, entry)["runs"].append(index)
    return list(found.values())


def hellaswag_lines(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Published acc_norm for each size and convention among the runs that were scored, and chance."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    scored = False
    for index, run in enumerate(runs):
        for convention in sorted({str(r.get("convention", "completion")) for r in run.records("hellaswag")}):
            scored = True
            if run.size is None:
                continue
            if convention == "completion":
                gpt2 = reference.GPT2_HELLASWAG[run.size]
                entries = {f"GPT-2 {run.size}": gpt2, f"GPT-3 {run.size}": reference.GPT3_HELLASWAG[run.size]}
            else:
                entries = {f"GPT-2 {run.size} (harness)": reference.GPT2_HELLASWAG_HARNESS[run.size][1]}
            for label, value in entries.items():
                entry = {"label": label, "value": value, "runs": []}
                lines.setdefault((label, convention), entry)["runs"].append(index)
    chance = {"label": "chance", "value": reference.HELLASWAG_CHANCE, "runs": list(range(len(runs)))}
    return [*lines.values(), chance] if scored else []


def differences(configs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Settings in which the runs differ, where they write to aside: [{"name", "values": one per run}]."""
    flat = [
        {f"{part}.{name}": value for part, values in config.items() for name, value in values.items()}
        for config in configs
    ]
    names = sorted({name for config in flat for name in config} - {"run.run_dir"})
    rows = [{"name": name, "values": [config.get(name) for config in flat]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def thin(values: Sequence[float], parts: int, *, largest: bool = False) -> list[float]:
    """Cut a curve into `parts` of equal length, each its mean or its largest value; short ones stay as they are.

    Values that are not finite do not count towards a mean; a part of nothing else is NaN.
    """
    if len(values) <= parts:
        return list(values)
    edges = [len(values) * part // parts for part in range(parts + 1)]
    result = []
    for first, stop in itertools.pairwise(edges):
        finite = [value for value in values[first:stop] if math.isfinite(value)]
        result.append((max(finite) if largest else fmean(finite)) if finite else math.nan)
    return result


def json_number(value: float | None) -> float | int | None:
    """The number with six digits, None for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _elapsed(train: Sequence[Record]) -> Callable[[int], float]:
    """Hours that a run had taken at a step, with all it does between steps, as far as its train lines tell."""
    steps = [record["step"] for record in train]
    parts = [record.get("seconds") for record in train]
    spent = [sum(map(float, part.values())) / 3600 if isinstance(part, dict) else 0.0 for part in parts]
    hours = [0.0, *itertools.accumulate(spent)]
    return lambda step: float(f"{hours[bisect_right(steps, step)]:.6g}")


def _seconds_left(run: RecordedRun) -> float | None:
    """Until the last step, at the pace of the last lines; None where they do not tell."""
    last, total = run.records("train")[-50:], run.start.get("total_steps")
    if len(last) < 2 or type(total) is not int:
        return None
    pace = (last[-1]["time"] - last[0]["time"]) / (last[-1]["step"] - last[0]["step"])
    return max(pace * (total - run.step), 0.0)


def _curve(records: Sequence[Record], elapsed: Callable[[int], float]) -> dict[str, list[Any]]:
    """Train lines as parallel lists; "tokens" is the end of each part, as are "step" and "hours"."""
    count = min(len(records), MAX_POINTS)
    ends = [len(records) * (part + 1) // count - 1 for part in range(count)] if count else []
    curve: dict[str, list[Any]] = {
        "tokens": [int(records[end]["tokens"]) for end in ends],
        "step": [records[end]["step"] for end in ends],
        "hours": [elapsed(records[end]["step"]) for end in ends],
    }
    for name, (field, largest) in CURVES.items():
        values = [math.nan if record.get(field) is None else float(record[field]) for record in records]
        curve[name] = [json_number(value) for value in thin(values, MAX_POINTS, largest=largest)]
    return curve


def _samples(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Samples by step, several of one step kept together, thinned by whole steps."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        texts = by_step.setdefault(record["step"], [])
        sample: dict[str, Any] = {"prompt": str(record.get("prompt", "")), "text": str(record.get("text", ""))}
        sample |= {"step": record["step"], "tokens": int(record["tokens"])}
        if sample not in texts:  # an evaluation made again after a restart at its step
            texts.append(sample)
    steps = sorted(by_step)
    most = max((len(texts) for texts in by_step.values()), default=1)
    room = max(MAX_SAMPLES // most, 2)
    if len(steps) > room:
        steps = [steps[round(index * (len(steps) - 1) / (room - 1))] for index in range(room)]
    return [sample for step in steps for sample in by_step[step]]


def _run(run: RecordedRun, name: str, price: float | None, now: float | None) -> dict[str, Any]:
    hours = run.device_seconds / 3600
    val = run.records("val")
    hellaswag = run.records("hellaswag")
    baseline = reference.gpt2_val_loss(run.corpus, run.size)
    intervals = [reference.wilson(r["acc_norm"], int(r["examples"])) for r in hellaswag]
    elapsed = _elapsed(run.records("train"))
    return {
        "name": name,
        "status": run.status(now),
        "step": run.step,
        "total_steps": run.start.get("total_steps"),
        "tokens": run.tokens,
        "size": run.size,
        "corpus": None if run.corpus is None else reference.CORPUS_TITLES[run.corpus],
        "dataset": str(run.start.get("dataset", "")),
        "baseline": baseline,
        "best_loss": json_number(run.best_loss),
        "best_bits_per_byte": json_number(run.best_bits_per_byte),
        "tokens_per_second": json_number(run.tokens_per_second),
        "mfu": json_number(run.mfu),
        "device_hours": json_number(hours),
        "cost": None if price is None else json_number(hours * price),
        "seconds_left": json_number(_seconds_left(run)) if run.status(now) == "running" else None,
        "seconds": {phase: json_number(value) for phase, value in run.seconds.items()},
        "train": _curve(run.records("train"), elapsed),
        "val": {
            "tokens": [int(r["tokens"]) for r in val],
            "step": [r["step"] for r in val],
            "hours": [elapsed(r["step"]) for r in val],
            "loss": [json_number(r["loss"]) for r in val],
            "bits_per_byte": [json_number(bits_per_byte(r)) for r in val],
            "val_tokens": sorted({int(r["val_tokens"]) for r in val}),
        },
        "hellaswag": {
            "tokens": [int(r["tokens"]) for r in hellaswag],
            "step": [r["step"] for r in hellaswag],
            "hours": [elapsed(r["step"]) for r in hellaswag],
            **{key: [json_number(r[key]) for r in hellaswag] for key in ("acc", "acc_norm")},
            **{key: [json_number(i[end]) for i in intervals] for end, key in enumerate(("low", "high"))},
            "examples": sorted({int(r["examples"]) for r in hellaswag}),
            "convention": sorted({str(r.get("convention", "completion")) for r in hellaswag}),
        },
        "samples": _samples([r for r in run.history.live if r["kind"] == "sample"]),
        "config": run.config,
        "environment": {
            key: run.start[key]
            for key in ("device", "world_size", "host", "platform", "cpu_count", "commit", "versions")
            if key in run.start
        },
        "starts": [
            {
                "step": start["step"],
                "hours": elapsed(start["step"]),
                "time": start["time"],
                "world_size": start.get("world_size"),
                "changed": start.get("config_changed", {}),
            }
            for start in run.starts
        ],
        "repeated": run.repeated,
        "torn": run.history.torn,
        "skips": [
            {
                "step": r["step"],
                "reason": str(r.get("reason", "")),
                "loss": json_number(r["loss"]),
                "grad_norm": json_number(r["grad_norm"]),
            }
            for r in run.records("skip")
        ],
    }
