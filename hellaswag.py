"""Evaluate models on HellaSwag by both conventions, exactly.

    python hellaswag.py -m runs/gpt2 -m gpt2
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl --dtype bf16

GPT-2 124M scores 29.55 by the completion convention (build-nanogpt, llm.c) and 31.14 by the harness's
(lm-evaluation-harness): say which one a figure is of, and compare it with the reference printed beside it.
The validation split takes seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2.distributed.world import World, joined_world
from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import check_output, user_path, write_whole
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example, spread
from gpt2.hellaswag.rows import CONVENTIONS
from gpt2.hellaswag.score import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, Result, evaluate_hellaswag
from gpt2.metrics.reference import (
    GPT2_HELLASWAG,
    GPT2_HELLASWAG_HARNESS,
    GPT3_HELLASWAG,
    HELLASWAG_CHANCE,
    SHAPES,
    wilson,
)
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT, load_pretrained
from gpt2.model.pretrained import resolve_model
from gpt2.precision import resolve_dtype
from gpt2.progress import columns_of, duration, table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="a run (its newest checkpoint), a checkpoint, a transformers GPT-2 directory, or a name on the Hub "
        "(gpt2 … gpt2-xl); give -m several times for one table",
    )
    parser.add_argument("-d", "--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    parser.add_argument(
        "--data", type=user_path, metavar="FILE", help="HellaSwag .jsonl or .parquet [the published split]"
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="published split [val]")
    parser.add_argument("--convention", choices=(*CONVENTIONS, "both"), default="both", help="[both]")
    parser.add_argument("--limit", type=int, metavar="N", help="N examples, evenly spaced over the file [all]")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of matrix products; bf16 is several times faster and turns a few close calls [fp32]",
    )
    parser.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help=f"tokens a device holds at a time [{CPU_TOKEN_BUDGET} on a CPU, else {GPU_TOKEN_BUDGET}]",
    )
    parser.add_argument("--compile", action="store_true", help="compile the model first, for a few fixed shapes")
    parser.add_argument("--json", type=user_path, metavar="OUT", help="write the results there")
    parser.add_argument("--per-example", type=user_path, metavar="OUT", help="write a line of JSON an example there")
    return parser.parse_args()


class Progress:
    """One line: on a terminal a bar that redraws itself, in a log a line every 15 seconds; nothing on other ranks."""

    def __init__(self, label: str, examples: int, shown: bool):
        self.label = label
        self.examples = examples
        self.shown = shown
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else 15.0  # seconds
        self.began = self.last = time.perf_counter()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` rows are scored."""
        now = time.perf_counter()
        if not self.shown or (now - self.last < self.interval):
            return
        self.last = now
        fraction = done / total
        rate = fraction * self.examples / (now - self.began)
        left = duration((1 - fraction) / fraction * (now - self.began))
        line = f"{self.label}  {fraction:4.0%}  {rate:,.1f} examples/s  {left} left"
        if self.terminal:
            bar = "█" * round(24 * fraction)
            line = f"{bar:░<24} {line}"
            line = f"\r\x1b[K{line[: (columns_of(sys.stderr) or 200) - 1]}"  # one that wraps could not be wiped
        print(line, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.shown and self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def number(value: float) -> float | None:
    """The result as JSON can hold it: NaN (no example has a label) is null."""
    return None if math.isnan(value) else value


def entry(spec: str, directory: Path, model: GPT, result: Result) -> dict[str, Any]:
    """What --json holds of one model by one convention; the table is made of the same."""
    config = model.config
    size = SHAPES.get((config.n_layer, config.n_head, config.n_embd))
    gpt2_acc: float | None = None
    gpt2_acc_norm: float | None = None
    if size is not None:
        if result.convention == "harness":
            gpt2_acc, gpt2_acc_norm = GPT2_HELLASWAG_HARNESS[size]
        else:
            gpt2_acc_norm = GPT2_HELLASWAG[size]
    return {
        "model": spec,
        "directory": str(directory),
        "parameters": model.num_parameters(),
        "convention": result.convention,
        "acc": number(result.acc),
        "acc_stderr": number(result.acc_stderr),
        "acc_norm": number(result.acc_norm),
        "acc_norm_stderr": number(result.acc_norm_stderr),
        "examples": result.examples,
        "labelled": result.labelled,
        "truncated": result.truncated,
        "tokens": result.tokens,
        "scored_positions": result.scored,
        "seconds": result.seconds,
        "examples_per_second": result.examples / result.seconds,
        "reference": {
            "size": size,
            "gpt2_acc": gpt2_acc,
            "gpt2_acc_norm": gpt2_acc_norm,
            "gpt3": None if size is None else GPT3_HELLASWAG[size],
            "chance": HELLASWAG_CHANCE,
        },
    }


def percent(value: float | None, examples: int = 0) -> str:
    """28.92, of so many examples 28.92 (28.04 to 29.81), or – where there is nothing to tell."""
    if value is None:
        return "–"
    low, high = wilson(value, examples)
    return f"{100 * value:.2f}" + (f" ({100 * low:.2f} to {100 * high:.2f})" if examples else "")


def results_table(entries: list[dict[str, Any]], columns: int | None = None) -> str:
    """The results in columns that a terminal has room for; in percent."""
    header = ["model", "convention", "acc", "acc_norm", "GPT-2 acc", "GPT-2 acc_norm", "GPT-3", "examples/s"]
    lines = [header]
    for e in entries:
        reference = e["reference"]
        lines.append(
            [
                f"{e['model']} ({e['parameters'] / 1e6:,.1f} M)",
                e["convention"],
                percent(e["acc"], e["labelled"]),
                percent(e["acc_norm"], e["labelled"]),
                percent(reference["gpt2_acc"]),
                percent(reference["gpt2_acc_norm"]),
                percent(reference["gpt3"]),
                f"{e['examples_per_second']:,.1f}",
            ]
        )
    return table(lines, columns, left=2)


def notes(entries: list[dict[str, Any]]) -> list[str]:
    """What one must know to read the table."""
    lines = [f"Percent, with 95 % intervals; guessing gives {100 * HELLASWAG_CHANCE:.2f}."]
    if any(e["reference"]["size"] for e in entries):
        lines[0] += " GPT-2 and GPT-3: published models of the same size, GPT-2 by the same convention."
    unlabelled = max(e["examples"] - e["labelled"] for e in entries)
    if unlabelled:
        lines.append(f"{unlabelled:,} examples have no label; they count in neither figure.")
    for e in entries:
        if e["truncated"]:
            lines.append(
                f"{e['model']}, {e['convention']}: {e['truncated']:,} examples are longer than the model's context "
                "and lost their beginning."
            )
    return lines


def example_lines(spec: str, examples: tuple[Example, ...], results: list[Result]) -> list[str]:
    """One JSON object an example, with what each convention made of it."""
    lines = []
    for i, example in enumerate(examples):
        line: dict[str, Any] = {"model": spec, "ind": example.ind, "label": example.label}
        for result in results:
            line[result.convention] = {
                "log_probs": result.log_probs[i].tolist(),
                "lengths": result.lengths[i].tolist(),
                "acc_prediction": int(result.predictions[i]),
                "acc_norm_prediction": int(result.predictions_norm[i]),
            }
        lines.append(json.dumps(line) + "\n")
    return lines


def run(args: argparse.Namespace, this: World) -> None:
    """Evaluate and report; called by every process."""
    # Models first: they may be misspelt, and are found sooner than the data is fetched.
    directories = [this.on_main(partial(resolve_model, spec)) for spec in args.model]
    examples = spread(load_examples(args.data, args.split, world=this), args.limit)
    conventions = CONVENTIONS if args.convention == "both" else (args.convention,)
    dtype = torch.bfloat16 if resolve_dtype(args.dtype, this.device) == "bf16" else torch.float32
    entries: list[dict[str, Any]] = []
    per_example: list[str] = []
    for spec, directory in zip(args.model, directories, strict=True):
        # A Hub name was downloaded where rank 0 is; elsewhere it may still have to be.
        model, tokenizer = load_pretrained(directory if directory.exists() else spec, this.device)
        if args.compile:
            compile_model(model)
        results = []
        for convention in conventions:
            progress = Progress(f"{spec}, {convention}", len(examples), this.is_main)
            results.append(
                evaluate_hellaswag(
                    model,
                    examples,
                    tokenizer,
                    world=this,
                    convention=convention,
                    dtype=dtype,
                    token_budget=args.token_budget,
                    compiled=args.compile,
                    progress=progress.update,
                )
            )
            progress.close()
        entries += [entry(spec, directory, model, result) for result in results]
        per_example += example_lines(spec, examples, results) if args.per_example is not None else []
    if not this.is_main:
        return
    source = str(args.data) if args.data is not None else args.split
    processes = f", {this.size} processes" if this.size > 1 else ""
    print(f"HellaSwag {source}: {len(examples):,} examples, {args.dtype} on {this.device.type}{processes}\n")
    print(results_table(entries, columns_of(sys.stdout)) + "\n")
    print("\n".join(notes(entries)))
    if args.json is not None:
        summary = {
            "schema": 1,
            "data": source,
            "limit": args.limit,
            "dtype": args.dtype,
            "device": this.device.type,
            "processes": this.size,
            "results": entries,
        }
        write_whole(args.json, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    if args.per_example is not None:
        write_whole(args.per_example, "".join(per_example))


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    if args.token_budget is not None and args.token_budget < 1:
        raise UserError(f"--token-budget is {args.token_budget}; it must be at least 1")
    check_output(args.json, "--json")
    check_output(args.per_example, "--per-example")
    with joined_world(args.device) as this:
        run(args, this)


if __name__ == "__main__":
    run_cli(main, when_full="use a smaller --token-budget, --dtype bf16, or a smaller model")
