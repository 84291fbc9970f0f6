"""Whether memory stays bounded over a long job: peak resident memory at its end beside that of its first minute.

Each part runs in a process of its own, so that what one leaves behind is not counted with another:

  hellaswag  the evaluator over the validation split
  train      a run with evaluations of all kinds, on random tokens
  sample     prompts of different lengths, one after the other

The first minute is one of wall time, so a slow or busy machine has done less in it; the peak at a tenth of the work is
given beside it, and does not depend on that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Worker, add_model_arguments, configuration, positive
from gpt2.config import Config
from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import World, pick_device
from gpt2.errors import UserError
from gpt2.files import user_path
from gpt2.hardware import memory_bytes
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import spread
from gpt2.hellaswag.score import evaluate_hellaswag
from gpt2.model.cpu_inference import decoding_copy
from gpt2.model.gpt import GPT
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.tokenizer import gpt2_tokenizer
from gpt2.train.ending import close
from gpt2.train.setup import set_up
from train_gpt2 import train

PARTS = ("hellaswag", "train", "sample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    parser.add_argument("--data", type=user_path, metavar="FILE", help="HellaSwag .jsonl [the published val split]")
    parser.add_argument("--examples", type=positive, help="of HellaSwag, evenly spaced [all]")
    parser.add_argument("--steps", type=positive, default=2000, help="of training [2000]")
    parser.add_argument("--prompts", type=positive, default=200, help="to sample from [200]")
    parser.add_argument("--new-tokens", type=positive, default=32, help="behind each prompt [32]")


class Part:
    """One of the jobs; lives in a process of its own.

    Args:
        config: shape of the model, micro-batch, device and precision.
        settings: the command line's.
    """

    def __init__(self, config: Config, settings: argparse.Namespace):
        self.config, self.settings = config, settings
        self.world = World(0, 0, 1, pick_device(config.run.device))
        self.seen: list[tuple[float, float, int]] = []  # (seconds, part of the work done, peak bytes)
        self.began = time.perf_counter()

    def note(self, done: int, total: int) -> None:
        """Write down how much memory the job has taken so far."""
        self.seen.append((time.perf_counter() - self.began, done / total, memory_bytes(self.world.device) or 0))

    def measure(self, part: str) -> dict[str, Any]:
        """Do a part; peaks in bytes."""
        jobs: dict[str, Callable[[], None]] = {"hellaswag": self.hellaswag, "train": self.train, "sample": self.sample}
        jobs[part]()
        seconds, _, end = self.seen[-1]
        minute = max(peak for at, _, peak in self.seen if at <= max(60.0, self.seen[0][0]))
        tenth = min(peak for _, done, peak in self.seen if done >= 0.1)
        return {"first_minute": minute, "tenth": tenth, "end": end, "ratio": end / minute, "seconds": seconds}

    def hellaswag(self) -> None:
        """Score the split, as hellaswag.py does."""
        examples = spread(load_examples(self.settings.data), self.settings.examples)
        model = GPT(self.config.model).init_weights(0).to(self.world.device).eval()
        dtype = torch.bfloat16 if self.config.run.dtype == "bf16" else torch.float32
        evaluate_hellaswag(model, examples, gpt2_tokenizer(), world=self.world, dtype=dtype, progress=self.note)

    def train(self) -> None:
        """Train, evaluating all there is ten times."""
        with tempfile.TemporaryDirectory() as directory:
            tokens = np.random.default_rng(0).integers(0, self.config.model.vocab_size, 600_000)
            write_dataset(Path(directory) / "data", tokens[50_000:], tokens[:50_000], gpt2_tokenizer())
            config = replace(
                self.config,
                data=replace(self.config.data, data=Path(directory) / "data", val_tokens=16_384),
                run=replace(
                    self.config.run,
                    run_dir=Path(directory) / "run",
                    max_steps=self.settings.steps,
                    max_minutes=0.0,
                    eval_every=max(self.settings.steps // 10, 1),
                    hellaswag_data=self.settings.data,
                    hellaswag_limit=min(self.settings.examples or 200, 200),
                    num_samples=2,
                    wandb="disabled",
                ),
            )
            run = set_up(config, self.world)
            advance = run.advance

            def advance_and_note() -> None:
                advance()
                self.note(run.step, config.run.max_steps)

            run.advance = advance_and_note  # type: ignore[method-assign]
            train(run, StopSignals())
            run.writer.wait()
            close(run, "finished")

    def sample(self) -> None:
        """Continue prompts of random lengths, as scripts/sample.py does when it is given a line after another."""
        from gpt2.generation.generate import generate

        shape = self.config.model
        model = GPT(shape).init_weights(0).to(self.world.device).eval()
        dtype = torch.bfloat16 if self.config.run.dtype == "bf16" else torch.float32
        model = decoding_copy(model, dtype)
        draw = np.random.default_rng(0)
        for number in range(self.settings.prompts):
            prompt = draw.integers(0, shape.vocab_size, draw.integers(1, shape.block_size)).tolist()
            generate(model, [prompt], max_new_tokens=self.settings.new_tokens, seed=number)
            self.note(number + 1, self.settings.prompts)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; print a table, return it."""
    config = configuration(args)
    config = replace(config, run=replace(config.run, device=args.device, dtype=args.dtype))
    if memory_bytes(pick_device(args.device)) is None:
        raise UserError("this system does not tell how much memory a process has taken")
    print(f"{'part':<11}{'first minute':>14}{'a tenth':>10}{'end':>10}{'end / first minute':>21}{'time':>10}")
    parts = {}
    for part in args.parts:
        worker = Worker(Part, config, args)
        parts[part] = found = worker.call("measure", part)
        worker.close()
        megabytes = [f"{found[name] / 1e6:,.0f} MB" for name in ("first_minute", "tenth", "end")]
        print(
            f"{part:<11}{megabytes[0]:>14}{megabytes[1]:>10}{megabytes[2]:>10}{found['ratio']:>20.2f}×"
            f"{found['seconds']:>8,.0f} s",
            flush=True,
        )
    return {"config": config.to_dict(), "parts": parts}
