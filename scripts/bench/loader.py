"""The data loader: how soon the first batch is there, and what share of a training step the data costs.

Shards of random ids are written to a temporary directory in build-nanogpt's format. Two times are taken: to make a
step's batch, with no training between, so that nothing is hidden; and what a step waits for a batch in a run, where a
thread makes it while the step before computes (here: sleeps). With --latency each file that is opened and each read
takes so much longer, as on storage across a network. One of eight H100 on a data set of 300 shards there:

    python scripts/benchmark.py loader --latency 3 --shards 300 --total-batch-tokens 65536 --tokens-per-second 464794
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Worker, positive, summary
from gpt2.distributed.world import pick_device
from gpt2.errors import UserError
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import PREFETCH_STEPS, Blocks, Loader

VOCAB_SIZE = 50257


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shards", type=positive, default=100, help="[100]")
    parser.add_argument("--shard-tokens", type=positive, default=1_000_000, help="tokens each [1,000,000]")
    parser.add_argument("--block-size", type=positive, default=1024, help="[1024]")
    parser.add_argument("--micro-batch-size", type=positive, default=64, help="[64]")
    parser.add_argument("--total-batch-tokens", type=positive, default=524_288, help="a step's tokens [524,288]")
    parser.add_argument("--rounds", type=positive, default=20, help="steps timed [20]")
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds that a read takes longer [0]")
    parser.add_argument(
        "--tokens-per-second", type=positive, default=600_000, help="of the training that it feeds [600,000, one H100]"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return start-up time, rate and share of a step.

    Raises:
        UserError: the step is no multiple of a micro-batch.
    """
    if args.total_batch_tokens % (args.micro_batch_size * args.block_size):
        raise UserError(
            f"--total-batch-tokens {args.total_batch_tokens} is not a multiple of --micro-batch-size × --block-size = "
            f"{args.micro_batch_size * args.block_size}"
        )
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as directory:
        write_shards(Path(directory), args.shards, args.shard_tokens)
        worker = Worker(
            Side, directory, args.block_size, args.micro_batch_size, args.total_batch_tokens, args.latency / 1000
        )
        worker.call("ready")
        startup = worker.call("start")
        step_seconds = args.total_batch_tokens / args.tokens_per_second
        made = summary(worker.call("batches", args.rounds, 0.0))
        waits = worker.call("batches", args.rounds, step_seconds)
        worker.close()
    waited, share = summary(waits), sum(waits) / len(waits) / step_seconds
    rate = args.total_batch_tokens / made["median"]
    print(f"{args.shards} shards of {args.shard_tokens:,} tokens, {args.total_batch_tokens:,} tokens per step")
    print(f"from opening the data set to the first batch: {startup:.3f} s")
    for what, each in (("to make a step's batch", made), ("a step waits for it", waited)):
        print(f"{what}: {each['median'] * 1e3:.2f} ms ({each['low'] * 1e3:.2f}-{each['high'] * 1e3:.2f})")
    print(f"made at {rate / 1e6:.1f} M tok/s; training at {args.tokens_per_second:,} tok/s waits {share:.2%} of a step")
    return {
        "startup_seconds": startup,
        "make_seconds": made,
        "wait_seconds": waited,
        "tokens_per_second": rate,
        "share_of_step": share,
    }


def write_shards(directory: Path, shards: int, tokens: int) -> None:
    """Write shards of random ids, and one for validation."""
    generator = np.random.default_rng(0)
    for number in range(shards + 1):
        split = "train" if number else "val"
        np.save(
            directory / f"bench_{split}_{number:06d}.npy", generator.integers(VOCAB_SIZE, size=tokens, dtype=np.uint16)
        )


def late(call: Callable[..., int], seconds: float) -> Callable[..., int]:
    """A call that takes so much longer."""

    def wrapped(*args: Any, **options: Any) -> int:
        time.sleep(seconds)
        return call(*args, **options)

    return wrapped


class Side:
    """The loader in a process of its own, with cold imports behind it.

    Args:
        directory: the shards' directory.
        block_size: tokens a sequence.
        micro_batch_size: sequences.
        total_batch_tokens: tokens per step.
        latency: seconds that opening a file, and reading from it, takes longer.
    """

    def __init__(self, directory: str, block_size: int, micro_batch_size: int, total_batch_tokens: int, latency: float):
        self.directory, self.block_size = directory, block_size
        self.micro_batch_size, self.sequences = micro_batch_size, total_batch_tokens // block_size
        if latency:
            os.open, os.preadv = late(os.open, latency), late(os.preadv, latency)  # type: ignore[assignment]

    def ready(self) -> None:
        """Nothing: an answer says that the process is up."""

    def start(self) -> float:
        """Seconds from opening the data set to the first batch."""
        before = time.perf_counter()
        blocks = Blocks(open_dataset(self.directory).train, self.block_size, VOCAB_SIZE, seed=0)
        device = pick_device("auto")
        self.loader = Loader(blocks, self.sequences, 0, 0, 1, self.micro_batch_size, device)
        self.loader.__enter__()
        self.loader.next()
        return time.perf_counter() - before

    def batches(self, count: int, pause: float) -> list[float]:
        """Seconds that each of some batches was waited for.

        Args:
            count: how many batches.
            pause: seconds before each, for a step that computes.
        """
        waits = []
        for number in range(-PREFETCH_STEPS - 1, count):  # those made ahead come first, uncounted
            time.sleep(pause)
            before = time.perf_counter()
            self.loader.next()
            if number >= 0:
                waits.append(time.perf_counter() - before)
        return waits
