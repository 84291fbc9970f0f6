"""Say which settings are better, and whether that is more than chance.

python scripts/compare.py runs/rates
python scripts/compare.py runs/a runs/b runs/muon --target 3.28
python scripts/compare.py runs/variants --metric tok_s --baseline runs/variants/position=learned

Each argument is a run or a folder of runs. Runs that differ in nothing but the seed are one group: its mean, standard
error and 95 % confidence interval are given, and a one-sided p value of its being better than the baseline (paired by
seed where both have the same seeds, Welch's test otherwise) or, with --target, than the target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.figures import check_picture, label, save_figure
from gpt2.files import check_output, user_path, write_whole
from gpt2.progress import duration
from gpt2.report.compare import (
    LOWER_IS_BETTER,
    TITLES,
    Comparison,
    Group,
    bands,
    central,
    compared,
    differing,
    estimate,
    group_runs,
    names_of,
    reaches,
    value,
)
from gpt2.report.runs import RecordedRun, find_runs, open_run

SIGNIFICANT = 0.05


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN_OR_GROUP", help="a run's directory, or a folder of runs")
    add("--metric", choices=list(TITLES), default="val", help="; ".join(f"{k}: {v}" for k, v in TITLES.items()))
    add("--target", type=float, help="test each group against this figure, and say when it was reached")
    add("--tokens", type=int, metavar="N", help="compare at N training tokens instead of at the end")
    add("--baseline", type=user_path, metavar="RUN", help="a run of the group to compare with, or its folder [the"
        " settings that differ least from all others]")  # fmt: skip
    add("--json", type=user_path, metavar="FILE", help="write everything as JSON too; - for standard output, alone")
    add("--picture", type=user_path, metavar="FILE", help="draw the groups' mean losses and the runs' figures")
    args = parser.parse_args(argv)
    if args.tokens is not None and (args.tokens < 1 or args.metric == "tok_s"):
        raise UserError(f"--tokens is {args.tokens}; it must be at least 1, and has no meaning for --metric tok_s")
    if args.target is not None and not math.isfinite(args.target):
        raise UserError(f"--target is {args.target}; it must be a finite number")
    if args.target is not None and args.metric == "tok_s":
        raise UserError("--target is not for --metric tok_s; compare groups, or use --metric val, bits or hellaswag")
    if str(args.json) != "-":
        check_output(args.json, "--json")
    if args.picture is not None:
        check_picture(args.picture, "--picture")
    return args


def find(paths: Sequence[Path]) -> list[RecordedRun]:
    """The runs at or below the paths, each once."""
    found: dict[Path, RecordedRun] = {}
    for path in paths:
        inside = list(find_runs(path)) if path.is_dir() else []
        if not inside:
            raise UserError(f"{path} is neither a run nor a folder of runs; give a directory that train_gpt2.py made")
        for directory in inside:
            found.setdefault(directory.resolve(), open_run(directory))
    return list(found.values())


def choose_baseline(groups: Sequence[Group], path: Path | None) -> Group:
    """The group that the others are compared with."""
    if path is None:
        return central(groups)
    within = path.resolve()
    for group in groups:
        if any(within in (d := run.directory.resolve(), *d.parents) for run in group.runs.values()):
            return group
    raise UserError(f"--baseline {path} is none of the compared runs, nor a folder of one")


def verdict(comparison: Comparison | None) -> str:
    """What a comparison allows to say."""
    if comparison is None:
        return "-"
    if comparison.p is None:
        return "n is too small to say" if comparison.difference.stderr is None else "no spread: not tested"
    if comparison.p < SIGNIFICANT:
        return "better"
    return "worse" if comparison.p > 1 - SIGNIFICANT else "not told apart"


def notes(groups: Sequence[Group], left_out: Sequence[RecordedRun], tested: int, args: argparse.Namespace) -> list[str]:
    """What a reader must know before believing the table."""
    runs = [run for group in groups for run in group.runs.values()]
    said = []
    single = sum(len(group.runs) == 1 for group in groups)
    if single:
        said.append(f"{single} of {len(groups)} groups are of one run: nothing tells their difference from chance; "
                    "scripts/sweep.py --seeds 3 adds seeds")  # fmt: skip
    for run in left_out:
        said.append(f"{run.directory} is left out: another run has its settings and its seed")
    for run in runs:
        if value(run, args.metric, args.tokens) is None:
            said.append(
                f"{run.directory} does not count ({run.status()}, step {run.step}): it has no finite "
                f"{TITLES[args.metric]} {'at its end' if args.tokens is None else 'there'}"
            )
    if len({str(run.start.get("dataset")) + str(run.config.get("data", {}).get("data")) for run in runs}) > 1:
        said.append("the runs were trained on different data sets: their losses do not compare")
    elif args.metric == "val" and len({str(run.config.get("model", {}).get("vocab_size")) for run in runs}) > 1:
        said.append("the runs have different vocabularies, whose nats per token do not compare; use --metric bits")
    if args.tokens is None and args.metric != "tok_s" and len(ends := sorted({run.tokens for run in runs})) > 1:
        said.append(f"the runs end at different places, {ends[0]:,} to {ends[-1]:,} tokens; --tokens N compares at one")
    for name in ("commit", *(("device", "world_size") if args.metric == "tok_s" else ())):
        if len(found := {str(run.start.get(name)) for run in runs}) > 1:
            said.append(f"the runs' {name} differs: {', '.join(sorted(found))}")
    if tested > 1:
        said.append(
            f"{tested} comparisons: chance alone puts {SIGNIFICANT * tested:.2g} of them below p = {SIGNIFICANT}"
        )
    return said


def analyse(args: argparse.Namespace) -> tuple[dict[str, Any], list[Group]]:
    """Everything the command says, as values."""
    groups, left_out = group_runs(find(args.runs))
    baseline = choose_baseline(groups, args.baseline)
    lower = args.metric in LOWER_IS_BETTER
    by_seed = [
        {seed: x for seed, run in group.runs.items() if (x := value(run, args.metric, args.tokens)) is not None}
        for group in groups
    ]
    base = by_seed[groups.index(baseline)]
    rows = []
    for group, name, values in zip(groups, names_of(groups, baseline), by_seed, strict=True):
        against = args.target if args.target is not None else None if group is baseline else base
        possible = bool(values) and against is not None and against != {}
        comparison = compared(values, against, lower_is_better=lower) if possible else None
        row: dict[str, Any] = {
            "name": name,
            "settings": differing(group, baseline),
            "runs": {str(seed): str(run.directory) for seed, run in group.runs.items()},
            "values": {str(seed): x for seed, x in values.items()},
            "estimate": dataclasses.asdict(estimate(list(values.values()))) if values else None,
            "comparison": dataclasses.asdict(comparison) if comparison else None,
            "verdict": verdict(comparison),
        }
        if args.target is not None:
            reached = [reaches(run, args.target, args.metric) for run in group.runs.values()]
            times = [both for both in reached if both is not None]
            row["to_target"] = {
                "reached": len(times),
                "of": len(reached),
                "steps": dataclasses.asdict(estimate([step for step, _ in times])) if times else None,
                "seconds": dataclasses.asdict(estimate([seconds for _, seconds in times])) if times else None,
            }
        rows.append(row)
    sign = 1 if lower else -1
    rows.sort(key=lambda row: math.inf if row["estimate"] is None else sign * row["estimate"]["mean"])
    shared = {name: x for name, x in baseline.settings.items() if all(g.settings.get(name) == x for g in groups)}
    tested = sum(row["comparison"] is not None and row["comparison"]["p"] is not None for row in rows)
    return {
        "metric": args.metric,
        "lower_is_better": lower,
        "tokens": args.tokens,
        "target": args.target,
        "groups": rows,
        "notes": notes(groups, left_out, tested, args),
        "shared_settings": shared,
        "baseline_settings": {name: x for name, x in baseline.settings.items() if name not in shared},
    }, groups


def table(result: dict[str, Any]) -> str:
    """The groups as a Markdown table."""
    digits = {"tok_s": ",.0f", "hellaswag": ".4f"}.get(result["metric"], ".4f")

    def number(x: float | None, form: str = digits) -> str:
        return "-" if x is None else f"{x:{form}}"

    other = "target" if result["target"] is not None else "baseline"
    head = ["group", "n", "mean ± stderr", "95 % interval", f"minus {other}", "p", "verdict", "could have seen"]
    lines = []
    for row in result["groups"]:
        e, c = row["estimate"], row["comparison"]
        cells = [row["name"], str(len(row["values"])), "-", "-", "-", "-", row["verdict"], "-"]
        if e is not None:
            cells[2] = f"{number(e['mean'])} ± {number(e['stderr'])}"
            cells[3] = "-" if e["interval"] is None else " to ".join(map(number, e["interval"]))
        if c is not None:
            cells[4] = f"{number(c['difference']['mean'], '+' + digits)} ± {number(c['difference']['stderr'])}"
            cells[5] = "-" if c["p"] is None else f"{c['p']:.2g} ({c['kind']})"
            cells[7] = number(c["smallest"])
        if result["target"] is not None:
            reached = row["to_target"]
            cells.append(f"{reached['reached']} of {reached['of']}")
            for name, shown in (("steps", lambda x: f"{x:,.0f}"), ("seconds", duration)):
                s = reached[name]
                spread = "" if s is None or s["stderr"] is None else f" ± {shown(s['stderr'])}"
                cells.append("-" if s is None else shown(s["mean"]) + spread)
        lines.append(cells)
    if result["target"] is not None:
        head += ["reached", "steps to it", "time to it"]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def draw(result: dict[str, Any], groups: Sequence[Group], names: Sequence[str], path: Path) -> None:
    """The groups' mean curves, and beside them every run's figure with its group's mean and 95 % interval."""
    from matplotlib.figure import Figure

    from gpt2.report.plots import draw_bands, group_style, short

    rows = [row for row in result["groups"] if row["estimate"] is not None]
    figure = Figure(figsize=(11, max(4.2, 0.28 * len(rows) + 1)), dpi=100, layout="constrained")
    curves, figures = figure.subplots(1, 2, width_ratios=(1, 1.2))
    order = [names.index(row["name"]) for row in rows]
    draw_bands(curves, bands([groups[i] for i in order], [names[i] for i in order]))
    curves.get_legend().remove()  # the right half names the colours
    curves.set_xlabel("training tokens")
    curves.xaxis.set_major_formatter(lambda x, _: short(x))
    for place, row in enumerate(rows):
        color = group_style(place)[0]
        e, own = row["estimate"], list(row["values"].values())
        if e["interval"] is not None:
            figures.plot(e["interval"], [place, place], color=color, linewidth=1.2)
        figures.plot(own, [place] * len(own), ".", color=color, alpha=0.5)
        figures.plot(e["mean"], place, "o", color=color)
    values = [x for row in rows for x in row["values"].values()]
    margin = 0.1 * (max(values) - min(values)) or 1.0
    figures.set_xlim(min(values) - margin, max(values) + margin)  # an interval of two runs may be wider than all else
    figures.set_yticks(range(len(rows)), [label(f"{row['name']} ({len(row['values'])})") for row in rows], fontsize=9)
    for place, tick in enumerate(figures.get_yticklabels()):
        tick.set_color(group_style(place)[0])
    figures.invert_yaxis()
    figures.set_xlabel(TITLES[result["metric"]])
    for ax in (curves, figures):
        ax.grid(color="#eceff3")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> int:
    """Compare, and print the table."""
    args = parse(sys.argv[1:])
    result, groups = analyse(args)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if args.json is not None and str(args.json) != "-":
        try:
            write_whole(args.json, text)
        except OSError as error:
            raise UserError(f"cannot write --json {args.json}: {error.strerror}; choose another file") from None
    if args.picture is not None and any(row["estimate"] is not None for row in result["groups"]):
        draw(result, groups, names_of(groups, choose_baseline(groups, args.baseline)), args.picture)
    if str(args.json) == "-":
        print(text, end="")
        return 0
    at = "" if args.tokens is None else f" after {args.tokens:,} tokens"
    print(f"{TITLES[args.metric]}{at}; {'lower' if result['lower_is_better'] else 'higher'} is better\n")
    print(table(result) + "\n" * bool(result["baseline_settings"]))
    if result["baseline_settings"]:
        print(visible("baseline: " + ", ".join(f"{name}={x}" for name, x in result["baseline_settings"].items())))
    for note in result["notes"]:
        print(visible(f"note: {note}"))
    return 0


if __name__ == "__main__":
    run_cli(main)
