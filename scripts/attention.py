"""Draw what every head of a layer looks at while it reads a prompt.

python scripts/attention.py -m gpt2 --prompt "The cat sat on the mat because it was tired" --layer 5
python scripts/attention.py -m runs/shakespeare-char --prompt "ROMEO: But soft!" --layer 0 --out attention.png

Row t of a picture is a token, column s one before it; the darker the cell, the more t takes from s. Each row sums to 1,
and the upper triangle, the future, is left white.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.distributed.world import pick_device
from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.figures import check_picture, save_figure
from gpt2.files import user_path
from gpt2.model.attention import recorded_weights
from gpt2.model.gpt import GPT, load_pretrained

MAX_TOKENS = 48
"""Longest prompt whose labels can still be read."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="a run, a checkpoint, a transformers directory, or a name on the Hub")
    add("--prompt", required=True, metavar="TEXT", help=f"1 to {MAX_TOKENS} tokens")
    add("--layer", type=int, default=0, help="from 0; negative ones count from the last [0]")
    add("--out", type=user_path, default=Path("attention.png"), metavar="FILE", help="[attention.png]")
    add("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    return parser.parse_args(argv)


def layer_weights(model: GPT, tokens: Sequence[int], layer: int) -> Tensor:
    """Attention weights of one layer on one text, (n_head, T, T), on the CPU.

    Raises:
        UserError: no such layer, no tokens, or more than the model's context or a picture holds.
    """
    config = model.config
    if not -config.n_layer <= layer < config.n_layer:
        raise UserError(f"--layer is {layer}; this model has layers 0 to {config.n_layer - 1}")
    if not tokens:
        raise UserError("the prompt is empty; give at least one token")
    limit = min(MAX_TOKENS, config.block_size)
    if len(tokens) > limit:
        raise UserError(f"the prompt has {len(tokens)} tokens; a picture can show {limit}, give a shorter one")
    with torch.no_grad(), recorded_weights(model) as weights:
        model.hidden(torch.tensor([tokens], device=model.wte.weight.device))
    return weights[layer][0].cpu()


def label(text: str) -> str:
    """A token's text with its white space made visible; bytes that are no character alone as U+FFFD."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    return shown if shown.isprintable() and shown else repr(text)[1:-1] or "∅"


def draw(weights: Tensor, labels: Sequence[str], title: str, out: Path) -> None:
    """One map per head, side by side, as PNG.

    Args:
        weights: (n_head, T, T).
        labels: T of them.
        title: above all.
        out: the file; its folder is made.
    """
    from matplotlib.figure import Figure

    n_head, T, _ = weights.shape
    columns = min(n_head, 4 if T <= 24 else 3)
    rows = math.ceil(n_head / columns)
    longest = max(map(len, labels))
    side = 0.17 * T + 0.085 * longest + 0.7  # inches: cells a label of 8 points fits beside, and the labels themselves
    figure = Figure(figsize=(columns * side, rows * side + 0.5), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for head, ax in enumerate(axes.flat):
        if head >= n_head:
            ax.axis("off")
            continue
        image = ax.imshow(weights[head].masked_fill(future, float("nan")).numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(f"head {head}", fontsize=9)
        ax.set_xticks(range(T), labels, rotation=90, fontsize=7)
        ax.set_yticks(range(T), labels, fontsize=7)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.plot(
            [0.5 + t // 2 for t in range(2 * T - 1)],
            [0.5 + (t - 1) // 2 for t in range(2 * T - 1)],
            color="0.7",
            lw=0.6,
        )
    figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / (rows * side)), label="weight", pad=0.01)
    figure.suptitle(title, fontsize=11)
    figure.supylabel("a token …", fontsize=9)
    figure.supxlabel("… looks at", fontsize=9)
    save_figure(figure, out)


def main() -> int:
    """Draw as the command line says."""
    args = parse(sys.argv[1:])
    check_picture(args.out, "--out")
    model, tokenizer = load_pretrained(args.model, pick_device(args.device))
    tokens = tokenizer.encode(args.prompt)
    weights = layer_weights(model, tokens, args.layer)
    layer = args.layer % model.config.n_layer
    window = model.config.layer_window(layer)
    title = f"Attention in layer {layer} (0 to {model.config.n_layer - 1})" + (f", window {window}" if window else "")
    draw(weights, [label(tokenizer.decode([token])) for token in tokens], title, args.out)
    print(f"{args.out}: {weights.size(0)} heads over {len(tokens)} tokens")
    return 0


if __name__ == "__main__":
    run_cli(main)
