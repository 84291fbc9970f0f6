"""Sampling with a key-value cache beside `transformers.generate`, on the same random weights.

Every round times all sides, one after the other, on the same prompt; a table gives the median tokens per second of
each, and the median of the rounds' ratios. Loading, copying and laying out the weights is done before, and compiling:
"transformers-compiled" has the cache of fixed size that its documentation compiles with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import positive, summary, synchronize
from gpt2.distributed.world import pick_device
from gpt2.errors import UserError
from gpt2.generation.generate import generate
from gpt2.model.cpu_inference import decoding_copy
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.presets import presets

SIDES = ("ours", "transformers", "transformers-compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--preset", default="gpt2", help="of train_gpt2.py, for the model's shape [gpt2]")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 8], help="texts at a time [1 8]")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"], help="[fp32 bf16]")
    parser.add_argument("--prompt-tokens", type=positive, default=16, help="[16]")
    parser.add_argument("--new-tokens", type=positive, default=32, help="[32]")
    parser.add_argument("--rounds", type=positive, default=5, help="of which one more is not counted [5]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="beside ours [all]")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu [auto]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return rates and ratios.

    Raises:
        UserError: no such preset, a text longer than its context, or no `transformers` to compare with.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("this benchmark compares with transformers; `pip install transformers`") from None
    if args.preset not in presets():
        raise UserError(f"unknown preset {args.preset!r}; choose one of {', '.join(presets())}")
    config = presets()[args.preset][1].model
    if args.prompt_tokens + args.new_tokens > config.block_size:
        raise UserError(f"--prompt-tokens + --new-tokens is more than the context of {config.block_size}")
    device = pick_device(args.device)
    model = GPT(config).init_weights(0).eval().to(device)
    results = []
    sides = [side for side in SIDES if side == "ours" or side in args.sides]
    print(f"tokens per second, and ours as a multiple (lowest to highest of {args.rounds} rounds)\n")
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as directory:
        save_pretrained(Path(directory), model.state_dict(), config, None)
        for name in args.dtypes:
            theirs = {
                side: transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=DTYPES[name]).eval().to(device)
                for side in sides[1:]
            }
            if compiled := theirs.get("transformers-compiled"):
                compiled.generation_config.cache_implementation = "static"
                compiled.forward = torch.compile(compiled.forward)
            for rows in args.rows:
                result = _compare(model, theirs, DTYPES[name], rows, args)
                results.append({"dtype": name, "rows": rows, **result})
                print(f"{name}, {rows} row{'s' * (rows > 1)}")
                for side in sides:
                    ratio = result["speedup"].get(side)
                    print(
                        f"  {side:<23}{result[side]['median']:>9.1f}"
                        + (f"{ratio['median']:>8.2f} ×  ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "")
                    )
    return {"results": results}


def _compare(
    model: GPT, theirs: dict[str, Any], dtype: torch.dtype, rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    device = model.wte.weight.device
    ours = decoding_copy(model, dtype, rows)
    prompt = torch.randint(
        model.config.vocab_size, (rows, args.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )

    def our_side() -> int:
        new = generate(ours, prompt.tolist(), max_new_tokens=args.new_tokens, temperature=0)
        return sum(map(len, new))

    def their_side(side: str) -> int:
        new = theirs[side].generate(
            prompt.to(device),
            attention_mask=torch.ones_like(prompt, device=device),
            do_sample=False,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            pad_token_id=0,
        )
        return new.numel() - prompt.numel()

    calls: dict[str, Callable[[], int]] = {"ours": our_side, **{side: partial(their_side, side) for side in theirs}}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(args.rounds + 1):
        for name, side in calls.items():
            synchronize(device)
            start = time.perf_counter()
            tokens = side()
            synchronize(device)
            if round_number:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    speedup = {
        side: summary([ours / other for ours, other in zip(rates["ours"], rates[side], strict=True)]) for side in theirs
    }
    return {**{name: summary(values) for name, values in rates.items()}, "speedup": speedup}
