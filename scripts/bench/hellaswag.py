"""HellaSwag examples per second: this project's evaluator against two baselines and against the machine's limit.

The sides take turns on the same slices of the validation split, completion convention, with the same random weights,
each in a process of its own; a side's speed-up is the median over slices, so that what else the machine does weighs
on all. Where the sides' scores differ by more than rounding, nothing is reported.

  ours           packed rows, contexts once, the head where it is scored
  kv             the same by the other way to share a context: its keys and values, then four rows of endings
  build-nanogpt  as that project evaluates while it trains: an example at a time, four padded rows, the head everywhere
  lm-eval        lm-evaluation-harness's own `hf` model on the same requests
  ...-compiled   either of the last two with its model compiled, for any length

"limit" is arithmetic: the operations our rows need, at the rate this machine multiplies large matrices.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common import Worker, matmul_flops, positive, require_package, summary
from gpt2.config import GPTConfig
from gpt2.distributed.world import World, pick_device
from gpt2.errors import UserError
from gpt2.files import user_path
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example, spread
from gpt2.hellaswag.rows import make_rows, render
from gpt2.hellaswag.score import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, Head, evaluate_hellaswag
from gpt2.model.attention import KVCache
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.presets import presets
from gpt2.tokens.tokenizer import GPT2Tokenizer, gpt2_tokenizer

SIDES = ("ours", "kv", "build-nanogpt", "build-nanogpt-compiled", "lm-eval", "lm-eval-compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 3.0}
"""Nats by which the sum over an ending may differ between sides; lm-eval's weights are bf16 too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--data", type=user_path, metavar="FILE", help="HellaSwag .jsonl [the published val split]")
    parser.add_argument("--preset", default="gpt2", help="size of the model, of train_gpt2.py [gpt2]")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="[bf16]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="[all]")
    parser.add_argument("--examples", type=positive, default=500, help="in all, evenly spaced [500]")
    parser.add_argument("--slices", type=positive, default=5, help="turns of each side [5]")
    parser.add_argument("--lm-eval-batch", type=positive, default=4, help="rows lm-eval takes at a time [4]")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")


class Side:
    """One way to score; lives in a process of its own."""

    def __init__(self, side: str, directory: str, config: GPTConfig, device: str, dtype: str, settings: Any):
        self.side = side
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.tokenizer = gpt2_tokenizer()
        self.settings = settings
        compiled = side.endswith("-compiled")
        if side.startswith("lm-eval"):
            os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
            from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped, unused-ignore]

            name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
            self.harness = HFLM(directory, device=device, dtype=name, batch_size=settings.lm_eval_batch)
            if compiled:
                self.harness.model.forward = torch.compile(self.harness.model.forward, dynamic=True)
        else:
            self.model = GPT(config).init_weights(0).to(self.device).eval()
            if side == "ours" and settings.compile:
                compile_model(self.model)
            elif compiled:
                self.model = torch.compile(self.model, dynamic=True)  # type: ignore[assignment]

    def score(self, examples: tuple[Example, ...]) -> dict[str, Any]:
        """Sums of log-probabilities (examples, 4), and the seconds and processor seconds they took."""
        score = {"ours": self.ours, "kv": self.kv, "build-nanogpt": self.build_nanogpt, "lm-eval": self.lm_eval}
        start, processor = time.perf_counter(), time.process_time()
        with torch.no_grad():
            log_probs, counts = score[self.side.removesuffix("-compiled")](examples)
        return {
            "log_probs": log_probs,
            "seconds": time.perf_counter() - start,  # every side has read its scores back
            "processor": time.process_time() - processor,
            **counts,
        }

    def ours(self, examples: tuple[Example, ...]) -> tuple[np.ndarray, dict[str, int]]:
        """The evaluator."""
        make_rows.cache_clear()  # a first evaluation
        world = World(0, 0, 1, self.device)
        compiled = self.settings.compile
        result = evaluate_hellaswag(
            self.model, examples, self.tokenizer, world=world, dtype=self.dtype, compiled=compiled
        )
        return result.log_probs, {"tokens": result.tokens, "scored": result.scored}

    def kv(self, examples: tuple[Example, ...]) -> tuple[np.ndarray, dict[str, int]]:
        """Contexts of a batch padded to the longest, then four rows of endings an example behind their keys."""
        rows = sorted(make_rows(examples, self.tokenizer, "completion", 1024).rows, key=lambda row: -row.length)
        device, config = self.device, self.model.config
        cpu = device.type == "cpu"
        head = Head(self.model, self.dtype, chunk=1024 if cpu else 2048, tile=16 if cpu else 2048)
        budget = CPU_TOKEN_BUDGET if cpu else GPU_TOKEN_BUDGET
        result = np.zeros(4 * len(examples))
        start = 0
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            while start < len(rows):
                batch = rows[start : start + max(1, budget // rows[start].length)]
                start += len(batch)
                B, C = len(batch), max(len(row.context) for row in batch)
                endings = [ending for row in batch for ending in row.endings]
                E = max(len(ending) - 1 for ending in endings)
                lengths = torch.tensor([len(row.context) for row in batch], device=device)  # (B,)
                context = torch.tensor([[*row.context, *[0] * (C - len(row.context))] for row in batch], device=device)
                cache = KVCache(config, B, C, device, self.dtype)
                states = self.model.hidden(context, cache=cache)  # (B, C, width)
                last = states[torch.arange(B, device=device), lengths - 1].repeat_interleave(4, 0)[:, None]

                wide = KVCache(config, 4 * B, C + E, device, self.dtype)
                wide.keys[:, :, :, :C] = cache.keys.repeat_interleave(4, 1)
                wide.values[:, :, :, :C] = cache.values.repeat_interleave(4, 1)
                wide.positions[:, :C] = torch.arange(C, device=device)
                wide.length = C
                after = lengths.repeat_interleave(4)[:, None]  # (4B, 1)
                inputs = torch.tensor([[*end[:-1], *[0] * (E - len(end) + 1)] for end in endings], device=device)
                keys = torch.arange(C + E, device=device)
                real = ((keys < after) | (keys >= C))[:, None, :].expand(-1, E, -1)  # (4B, E, C + E)
                position = (after + torch.arange(E, device=device)).clamp(max=config.block_size - 1)
                states = self.model.hidden(inputs, position, real, wide)
                states = torch.cat((last, states), 1)  # (4B, 1 + E, width)
                counts = torch.tensor([len(ending) for ending in endings], device=device)
                scored = torch.arange(1 + E, device=device) < counts[:, None]  # (4B, 1 + E)
                targets = torch.tensor(np.concatenate(endings), dtype=torch.long, device=device)
                with torch.autocast(device.type, enabled=False):
                    log_probs = head.log_probs(states[scored], targets[:, None])[:, 0].cpu().numpy()
                owner = np.repeat(np.arange(4 * B), counts.cpu().numpy())
                slots = [slot[0] for row in batch for slot in row.slots]
                result[slots] = np.bincount(owner, log_probs.astype(np.float64), 4 * B)
        return result.reshape(-1, 4), {}

    def build_nanogpt(self, examples: tuple[Example, ...]) -> tuple[np.ndarray, dict[str, int]]:
        """An example at a time."""
        result = np.zeros((len(examples), 4))
        for i, example in enumerate(examples):
            context, endings = render(example, "completion")
            start = self.tokenizer.encode(context)
            rows = [start + self.tokenizer.encode(ending) for ending in endings]
            tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for j, row in enumerate(rows):
                tokens[j, : len(row)] = torch.tensor(row)
                mask[j, len(start) : len(row)] = 1
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(tokens)  # (4, T, V)
            shifted = logits[:, :-1].contiguous()
            losses = F.cross_entropy(shifted.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
            result[i] = -(losses * mask[:, 1:]).sum(1).float().cpu().numpy()
        return result, {}

    def lm_eval(self, examples: tuple[Example, ...]) -> tuple[np.ndarray, dict[str, int]]:
        """The harness's model, asked for the same continuations."""
        from lm_eval.api.instance import Instance  # type: ignore[import-untyped, unused-ignore]

        requests = []
        for i, example in enumerate(examples):
            context, endings = render(example, "completion")
            requests += [
                Instance("loglikelihood", {}, (context, ending), j, ("", i, 1)) for j, ending in enumerate(endings)
            ]
        answers = self.harness.loglikelihood(requests, disable_tqdm=True)
        return np.array([log_prob for log_prob, _ in answers]).reshape(-1, 4), {}


def flops(config: GPTConfig, tokenizer: GPT2Tokenizer, examples: tuple[Example, ...]) -> float:
    """Operations that scoring the examples needs: 2 per weight and token, attention over what a token may see."""
    rows = make_rows(examples, tokenizer, "completion", config.block_size).rows
    body = sum(p.numel() for p in GPT(config).h.parameters() if p.ndim == 2)
    total = 0.0
    for row in rows:
        context = len(row.context)
        read = [len(ending) - 1 for ending in row.endings]
        pairs = context * (context + 1) / 2 + sum(n * context + n * (n + 1) / 2 for n in read)
        total += 2 * body * row.length + 4 * config.n_layer * config.n_embd * pairs
        total += 2 * config.n_embd * config.vocab_size * (1 + sum(read))
    return total


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return medians, spread and ratios.

    Raises:
        UserError: no such preset, fewer examples than slices, or sides that disagree.
    """
    if args.preset not in presets():
        raise UserError(f"unknown preset {args.preset!r}; choose one of {', '.join(presets())}")
    harness = {"lm-eval", "lm-eval-compiled"} & set(args.sides)
    if harness:
        require_package("lm_eval", "lm-eval")
    config = replace(presets()[args.preset][1].model, block_size=1024)  # no example is longer
    device = pick_device(args.device)
    tokenizer = gpt2_tokenizer()
    examples = spread(load_examples(args.data), args.examples)
    if len(examples) < 2 * args.slices:
        raise UserError(f"{len(examples)} examples are too few for {args.slices} slices; give more, or fewer slices")
    slices = [examples[i :: args.slices] for i in range(args.slices)]
    with tempfile.TemporaryDirectory() as directory:
        if harness:
            save_pretrained(Path(directory), GPT(config).init_weights(0).state_dict(), config, tokenizer)
        workers = {
            side: Worker(Side, side, directory, config, str(device), args.dtype, args)
            for side in SIDES
            if side in args.sides
        }
        for side, worker in workers.items():  # builds the model; the first shapes, and what is compiled
            compiled = args.compile if side == "ours" else side.endswith("-compiled")
            worker.call("score", examples if compiled else slices[0][:2])
        measured: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        rates = []
        for number, part in enumerate(slices, 1):
            rates.append(matmul_flops(device, DTYPES[args.dtype], 2048))
            for side, worker in workers.items():
                measured[side].append(worker.call("score", part))
            turn = ", ".join(f"{side} {turns[-1]['seconds']:.2f} s" for side, turns in measured.items())
            print(f"slice {number} of {len(slices)}, {len(part)} examples: {turn}", file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.close()
    _compare(measured, TOLERANCE[args.dtype])
    needed = flops(config, tokenizer, examples)
    return _report(args, examples, slices, measured, needed, max(rates))


def _compare(measured: dict[str, list[dict[str, Any]]], tolerance: float) -> None:
    first, *others = measured
    for side in others:
        for a, b in zip(measured[first], measured[side], strict=True):
            difference = np.abs(a["log_probs"] - b["log_probs"]).max()
            if not difference < tolerance:
                raise UserError(f"{side} and {first} differ by {difference:.3g} nats: they do not compute the same")


def _report(
    args: argparse.Namespace,
    examples: tuple[Example, ...],
    slices: list[tuple[Example, ...]],
    measured: dict[str, list[dict[str, Any]]],
    needed: float,
    rate: float,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "configuration": {
            "preset": args.preset,
            "dtype": args.dtype,
            "examples": len(examples),
            "slices": len(slices),
            "threads": torch.get_num_threads(),
            "compiled": args.compile,
            "lm_eval_batch": args.lm_eval_batch,
        },
        "matmul_flops": rate,
        "needed_flops": needed,
        "limit_examples_per_second": len(examples) * rate / needed,
        "sides": {},
        "speedup": {},
    }
    print(f"{args.preset}, {args.dtype}, {len(examples)} examples in {len(slices)} slices, in turn\n")
    print(f"{'examples per second':<24}{'median':>9}{'low':>9}{'high':>9}{'GFLOP/s':>9}   needed operations only")
    for side, turns in measured.items():
        speeds = summary([len(part) / turn["seconds"] for part, turn in zip(slices, turns, strict=True)])
        speeds["processor_ms_per_example"] = summary(
            [1e3 * turn["processor"] / len(part) for part, turn in zip(slices, turns, strict=True)]
        )
        result["sides"][side] = speeds
        useful = speeds["median"] * needed / len(examples)
        print(f"{side:<24}{speeds['median']:9.2f}{speeds['low']:9.2f}{speeds['high']:9.2f}{useful / 1e9:9.0f}")
    print(f"{'limit':<24}{result['limit_examples_per_second']:9.2f}{'':18}{rate / 1e9:9.0f}\n")
    for side, turns in measured.items():
        if side == "ours" or "ours" not in measured:
            continue
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(turns, measured["ours"], strict=True)]
        processor = [a["processor"] / b["processor"] for a, b in zip(turns, measured["ours"], strict=True)]
        result["speedup"][side] = {"wall": summary(ratios), "processor": summary(processor)}
        wall, cpu = result["speedup"][side]["wall"], result["speedup"][side]["processor"]
        print(
            f"ours is {wall['median']:.2f} × {side}  ({wall['low']:.2f} to {wall['high']:.2f}); "
            f"by processor time {cpu['median']:.2f} ×"
        )
    return result
