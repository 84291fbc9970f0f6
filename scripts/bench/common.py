"""What the benchmarks share: the configuration asked for, workers that take turns, medians with their spread."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.presets import presets


def positive(text: str) -> int:
    """A command-line count, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose a model and its batch; see `configuration`."""
    parser.add_argument("--preset", default="gpt2", help="of train_gpt2.py [gpt2]")
    parser.add_argument("--micro-batch-size", type=positive, help="sequences a forward pass [the preset's]")
    for name in ("n-layer", "n-head", "n-embd", "block-size"):
        parser.add_argument(f"--{name}", type=positive, help="in place of the preset's")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "tf32", "fp32"], help="[auto]")


def configuration(args: argparse.Namespace) -> Config:
    """The preset with what the command line changes; one micro-batch per step.

    Raises:
        UserError: no such preset, or an impossible value.
    """
    if args.preset not in presets():
        raise UserError(f"unknown preset {args.preset!r}; choose one of {', '.join(presets())}")
    config = presets()[args.preset][1]
    changes = {
        name: value
        for name in ("n_layer", "n_head", "n_embd", "block_size")
        if (value := getattr(args, name)) is not None
    }
    model = replace(config.model, **changes)
    micro_batch_size = args.micro_batch_size or config.data.micro_batch_size
    data = replace(
        config.data, micro_batch_size=micro_batch_size, total_batch_tokens=micro_batch_size * model.block_size
    )
    return replace(config, model=model, data=data)


def require_package(name: str, side: str) -> None:
    """Refuse a comparison with a package that is not installed, before anything is measured.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"side {side} needs the package {name}; pip install -e '.[full,test]', or leave it out of --sides"
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Rate of a large square matrix product on this machine, FLOP/s, the best of five: the ceiling of a step.

    Args:
        device: to measure.
        dtype: precision of the product.
        size: rows and columns of the matrices.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(6))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "all": list(values)}


class Worker:
    """A process that keeps an object and does what it is told, so that sides of a comparison share no memory.

    Args:
        make: called in the new process; importable by name.
        arguments: what `make` is called with; can be pickled.
        environment: variables set there first.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, arguments, environment or {}), daemon=True, name=make.__name__
        )
        self._process.start()
        theirs.close()

    def start(self, method: str, *arguments: Any) -> None:
        """Tell the process to call a method; `result` waits for it."""
        self._connection.send((method, arguments))

    def result(self) -> Any:
        """What the method returned.

        Raises:
            UserError: of the method.
            RuntimeError: the method failed otherwise, or the process died.
        """
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a benchmark's process died with exit code {self._process.exitcode}") from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"in a benchmark's process:\n{value}")
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """`start`, then `result`."""
        self.start(method, *arguments)
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    served: Any = None
    while True:
        try:
            method, values = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if served is None:
                served = make(*arguments)
            reply = ("result", getattr(served, method)(*values))
        except UserError as error:
            reply = ("user error", str(error))
        except Exception:
            reply = ("error", traceback.format_exc())
        connection.send(reply)
