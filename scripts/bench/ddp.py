"""Several processes against one: the trainer's step under DDP, with the same micro-batch per process.

On a CPU every process has one core (gloo); on GPUs each has one (nccl). Process 0 alone and all of them take turns, in
the same processes, while the others wait, so that what else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bench.common import Worker, add_model_arguments, configuration, positive, seconds, summary
from gpt2.config import Config
from gpt2.distributed.parallel import parallelize
from gpt2.distributed.world import World, joined_world
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.precision import resolve_dtype, set_matmul_precision
from gpt2.train.guard import StepGuard
from gpt2.train.optim import make_optimizers
from gpt2.train.step import Flags
from train_gpt2 import train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_model_arguments(parser)
    parser.set_defaults(preset="quickstart")
    parser.add_argument("--processes", type=positive, help="[2; on CUDA all GPUs]")
    parser.add_argument("--grad-accum-steps", type=positive, default=1, help="micro-batches per step and process [1]")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each side [5]")
    parser.add_argument("--steps", type=positive, default=2, help="steps a turn [2]")


def _cores() -> list[int]:
    """Cores this process may use, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return medians, spread and the speed-up.

    Raises:
        UserError: fewer cores or devices than processes.
    """
    config = configuration(args)
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    available = torch.cuda.device_count() if on_gpu else len(_cores())
    processes = args.processes or (available if on_gpu else 2)
    if processes < 2 or processes > available:
        raise UserError(
            f"{processes} processes on {available} {'GPUs' if on_gpu else 'cores'}: it takes 2 to {available}"
        )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        environment = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
        workers.append(Worker(Side, config, args.device, args.dtype, args.grad_accum_steps, environment=environment))
    times: dict[str, list[float]] = {"one": [], "all": []}
    for number in range(args.rounds + 1):
        for side, found in times.items():
            for worker in workers:
                worker.start("turn", side, args.steps)
            taken = max(worker.result() for worker in workers) / args.steps
            if number:  # the first turn compiles
                found.append(taken)
    for worker in workers:
        worker.start("leave")
    for worker in workers:
        worker.result()
        worker.close()

    tokens = config.data.total_batch_tokens * args.grad_accum_steps
    result: dict[str, Any] = {"processes": processes, "configuration": config.to_dict(), "sides": {}}
    print(f"{tokens} tokens per step and process, {args.grad_accum_steps} micro-batches")
    print(f"{'processes':<12}{'ms/step':>11}{'(low-high)':>19}{'tok/s':>11}")
    for side, count in (("one", 1), ("all", processes)):
        each = summary(times[side])
        rate = tokens * count / each["median"]
        result["sides"][side] = {"seconds": each, "tokens_per_second": rate}
        spread = f"({each['low'] * 1e3:.0f}-{each['high'] * 1e3:.0f})"
        print(f"{count:<12}{each['median'] * 1e3:>11.1f}{spread:>19}{rate:>11,.0f}")
    ratios = [processes * one / several for one, several in zip(times["one"], times["all"], strict=True)]
    result["speedup"] = summary(ratios)
    print(
        f"{processes} processes are {statistics.median(ratios):.2f} times as fast as one "
        f"({min(ratios):.2f}-{max(ratios):.2f})"
    )
    return result


class Side:
    """One of the processes.

    Args:
        config: model and batch.
        device: "auto", or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
        grad_accum_steps: micro-batches per step.
    """

    def __init__(self, config: Config, device: str, dtype: str, grad_accum_steps: int):
        self.stack = ExitStack()
        self.world = self.stack.enter_context(joined_world(device))
        if self.world.device.type == "cpu":
            torch.set_num_threads(1)
            if hasattr(os, "sched_setaffinity"):  # Linux
                os.sched_setaffinity(0, {_cores()[self.world.rank]})
        self.config, self.grad_accum_steps = config, grad_accum_steps
        self.dtype = resolve_dtype(dtype, self.world.device)
        set_matmul_precision(self.dtype)
        shape = (config.data.micro_batch_size, config.model.block_size + 1)
        tokens = torch.randint(
            config.model.vocab_size, shape, generator=torch.Generator().manual_seed(self.world.rank)
        ).to(self.world.device)
        self.batch = tokens[:, :-1], tokens[:, 1:].contiguous()
        alone = World(0, self.world.local_rank, 1, self.world.device)
        self.sides = {"all": self.stepper(self.world)}
        if self.world.is_main:
            self.sides["one"] = self.stepper(alone)

    def stepper(self, world: World) -> Callable[[], object]:
        """What makes a step over the processes of a world."""
        model = GPT(self.config.model).init_weights(0).to(world.device)
        run = replace(self.config.run, compile=True, parallel="ddp")
        trained = parallelize(model, run, world, self.dtype, self.grad_accum_steps)
        optimizers = make_optimizers(model, self.config.optim, world.device)
        guard = StepGuard(world.device, "stop")
        return lambda: train_step(
            trained,
            optimizers,
            [self.batch] * self.grad_accum_steps,
            guard,
            world,
            dtype=self.dtype,
            tokens_per_step=self.config.data.total_batch_tokens * self.grad_accum_steps * world.size,
            grad_clip=self.config.optim.grad_clip,
            flags=Flags,
        ).read()

    def turn(self, side: str, steps: int) -> float:
        """Seconds that some steps took; 0 for a process that has none to make."""
        dist.barrier()
        if side not in self.sides:
            return 0.0
        step = self.sides[side]
        return seconds(lambda: [step() for _ in range(steps)], self.world.device)

    def leave(self) -> None:
        """Take leave of the other processes."""
        self.stack.close()
