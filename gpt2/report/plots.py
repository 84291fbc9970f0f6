"""The report's charts as PNG, for a README or a paper. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import UserError
from gpt2.figures import label, save_figure
from gpt2.files import read_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6feb", "#d1433f", "#1d8a4f", "#8250df", "#b26a00", "#0d7d8c")
MUTED = "#5d6675"
DPI = 110
SIGNATURE = b"gpt2 report"
"""In the pictures' metadata: a file without it is not overwritten."""


def save_plots(report: Mapping[str, Any], page: Path, *, log_tokens: bool = False) -> list[Path]:
    """Draw a page's pictures beside it: of report.html, report-loss.png, report-training.png, and report-hellaswag.png
    where it was evaluated, report-seeds.png where runs differ in nothing else.

    Returns their paths.

    Args:
        report: what `gpt2.report.content.report` returned.
        page: the page that shows the pictures; their names begin with its name.
        log_tokens: draw tokens on a logarithmic axis.

    Raises:
        ImportError: matplotlib is not installed.
        UserError: they cannot be written there, or a picture of that name is not of a report.
    """
    from matplotlib.figure import Figure

    def save(name: str, rows: int, draw: Callable[[list[Axes]], None]) -> Path:
        figure = Figure(figsize=(8.4, 4.8 if rows == 1 else 2.1 * rows), dpi=DPI, layout="constrained")
        axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        for ax in axes:
            ax.grid(color="#eceff3")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes[-1].set_xlabel("training tokens")
        if log_tokens:
            axes[-1].set_xscale("log")
        else:
            axes[-1].xaxis.set_major_formatter(lambda value, _: short(value))
        path = page.with_name(f"{page.stem}-{name}")
        if path.exists() and SIGNATURE not in read_plain(path)[:4096]:
            raise UserError(f"{path} is not a report's picture and is left as it is; choose another --out, or --no-png")
        return save_figure(figure, path, SIGNATURE.decode())

    paths = [save("loss.png", 1, lambda axes: _loss(axes[0], report))]
    if any(run["hellaswag"]["step"] for run in report["runs"]):
        paths.append(save("hellaswag.png", 1, lambda axes: _hellaswag(axes[0], report)))
    if report["groups"]:
        paths.append(save("seeds.png", 1, lambda axes: draw_bands(axes[0], report["groups"])))
    paths.append(save("training.png", 3, lambda axes: _training(axes, report)))
    return paths


def short(value: float) -> str:
    """1234567 as "1.23 M"."""
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g}"


def _numbers(values: list[float | None]) -> list[float]:
    """The values, with NaN, which breaks a line, where there is no number."""
    return [math.nan if value is None else value for value in values]


def _prefix(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    return "" if len(report["runs"]) == 1 else label(f"{run['name']}: ")


def _tint(report: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """A reference for one run among several takes its colour; a shared one stays grey."""
    shared = len(report["runs"]) == 1 or len(entry["runs"]) > 1
    return MUTED if shared else COLORS[entry["runs"][0] % len(COLORS)]


def _reference_line(ax: Axes, report: Mapping[str, Any], entry: Mapping[str, Any], text: str) -> None:
    ax.axhline(entry["value"], color=_tint(report, entry), linestyle=(0, (5, 4)), linewidth=1)
    ax.annotate(
        f"{entry['label']} {text}",
        (1, entry["value"]),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=_tint(report, entry),
    )


def _legend(ax: Axes, fontsize: float = 9, **place: str) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=fontsize, **place)
    else:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=MUTED)


def _loss(ax: Axes, report: Mapping[str, Any]) -> None:
    for index, run in enumerate(report["runs"]):
        color, prefix = COLORS[index % len(COLORS)], _prefix(report, run)
        train, val = run["train"], run["val"]
        if train["tokens"]:
            losses = _numbers(train["loss"])
            ax.plot(train["tokens"], losses, color=color, alpha=0.4, linewidth=1, label=f"{prefix}train")
        if val["tokens"]:
            marker = "o" if len(val["tokens"]) <= 60 else None
            losses = _numbers(val["loss"])
            ax.plot(val["tokens"], losses, color=color, linewidth=2, marker=marker, ms=3.5, label=f"{prefix}validation")
    last = max((run["tokens"] for run in report["runs"]), default=0)
    for entry in report["milestones"]:
        points = [point for point in entry["points"]["tokens"] if point[0] <= last * 1.02]
        if points:
            xs, ys = zip(*points, strict=True)
            ax.scatter(xs, ys, marker="D", facecolors="none", edgecolors=_tint(report, entry), label=entry["label"])
    if any(run["train"]["tokens"] or run["val"]["tokens"] for run in report["runs"]):
        for entry in report["baselines"]:
            _reference_line(ax, report, entry, f"{entry['value']:.4f}")
    if report["long"]:
        _skip_first_drop(ax, report, report["drop"] * last)
    ax.set_ylabel("loss, nats per token")
    _legend(ax, loc="upper right")


def _skip_first_drop(ax: Axes, report: Mapping[str, Any], after: float) -> None:
    """Limit the y axis to the losses from `after` tokens on, and the baselines."""
    curves = [run[name] for run in report["runs"] for name in ("train", "val")]
    points = [point for curve in curves for point in zip(curve["tokens"], curve["loss"], strict=True)]
    heights = [loss for tokens, loss in points if tokens >= after and loss is not None]
    if heights:
        heights += [entry["value"] for entry in report["baselines"]]
        margin = 0.05 * (max(heights) - min(heights)) or 1.0
        ax.set_ylim(min(heights) - margin, max(heights) + margin)


def group_style(index: int) -> tuple[str, str]:
    """Colour and dashes of the index-th of up to 18 groups."""
    return COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]


def draw_bands(ax: Axes, groups: Sequence[Mapping[str, Any]]) -> None:
    """Mean validation losses of `gpt2.report.compare.bands`, a standard error to both sides.

    The evaluation before the first step, which would press the rest flat, is left out.
    """
    for index, group in enumerate(groups):
        first = int(len(group["tokens"]) > 1 and group["tokens"][0] == 0)
        losses, errors = _numbers(group["loss"])[first:], group["stderr"][first:]
        (color, dashes), name = group_style(index), label(f"{group['name']} ({group['n']})")
        ax.plot(group["tokens"][first:], losses, dashes, marker=".", color=color, linewidth=1.8, label=name)
        low, high = ([x + sign * e for x, e in zip(losses, errors, strict=True)] for sign in (-1, 1))
        ax.fill_between(group["tokens"][first:], low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_ylabel("validation loss, nats per token")
    _legend(ax, loc="upper right", fontsize=9 if len(groups) <= 6 else 7)


def _hellaswag(ax: Axes, report: Mapping[str, Any]) -> None:
    for index, run in enumerate(report["runs"]):
        scores = run["hellaswag"]
        if not scores["tokens"]:
            continue
        color = COLORS[index % len(COLORS)]
        middle, low, high = (_numbers(scores[name]) for name in ("acc_norm", "low", "high"))
        name = f"{_prefix(report, run)}acc_norm and its 95 % interval"
        ax.plot(scores["tokens"], middle, color=color, linewidth=2, marker="o", ms=3.5, label=name)
        ax.fill_between(scores["tokens"], low, high, color=color, alpha=0.15, linewidth=0)
    for entry in report["hellaswag_lines"]:
        _reference_line(ax, report, entry, f"{entry['value']:.2%}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("HellaSwag")
    _legend(ax, loc="upper left")


def _training(axes: list[Axes], report: Mapping[str, Any]) -> None:
    panels = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens per second"))
    for ax, (name, title) in zip(axes, panels, strict=True):
        for index, run in enumerate(report["runs"]):
            train = run["train"]
            if train["tokens"]:
                values, whose = _numbers(train[name]), label(run["name"])
                ax.plot(train["tokens"], values, color=COLORS[index % len(COLORS)], linewidth=1.3, label=whose)
        ax.set_ylabel(title)
        ax.set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[2].yaxis.set_major_formatter(lambda value, _: short(value))
    if len(report["runs"]) > 1 or not report["runs"][0]["train"]["tokens"]:
        _legend(axes[0])
