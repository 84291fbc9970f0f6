"""Picture of how long a data set's documents are."""

from __future__ import annotations

from pathlib import Path

from gpt2.figures import label, save_figure
from gpt2.tokens.manifest import Manifest, merge_lengths, percentile


def plot_lengths(manifest: Manifest, path: Path) -> Path:
    """Draw the histogram of document lengths (tokens, logarithmic) with its median and 90th percentile as PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    lengths = merge_lengths(entry.lengths for entry in manifest.shards)
    values = np.array([max(edge, 1) for edge in lengths], float)
    counts = np.array(list(lengths.values()), float)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    # Four bins an octave: wider than the manifest's own, so none is empty for want of resolution.
    top = max(np.ceil(np.log2(values.max(initial=2))), 1)
    axes.hist(values, bins=list(2.0 ** np.arange(0, top + 0.25, 0.25)), weights=counts, color="#4878a8")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for percent, style in ((50, "--"), (90, ":")):
        value = percentile(lengths, percent)
        if value is not None:
            axes.axvline(max(value, 1), color="black", linestyle=style, linewidth=1, label=f"p{percent}: {value:,}")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.set_title(label(manifest.name) + f": {int(counts.sum()):,} documents")
    axes.spines[["top", "right"]].set_visible(False)
    if lengths:
        axes.legend(frameon=False)
    return save_figure(figure, path)
