"""Runs of a tiny model for the tests: in this process, as a command, and under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from repository import ROOT
from safetensors.torch import load_file

from gpt2.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig
from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import World
from gpt2.train.ending import close
from gpt2.train.ending import finish as end
from gpt2.train.run import Run
from gpt2.train.setup import set_up
from train_gpt2 import train as train_loop

ALONE = World(0, 0, 1, torch.device("cpu"))

SMALL = Config(
    model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=59),
    data=DataConfig(micro_batch_size=8, total_batch_tokens=512, val_tokens=1500),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=5),
    run=RunConfig(
        max_steps=30,
        dtype="fp32",
        device="cpu",
        compile=False,
        deterministic=True,
        log_every=1,
        eval_every=0,
        hellaswag_limit=0,
        num_samples=0,
        checkpoint_every=0,
        wandb="disabled",
    ),
)


def small(data: Path, run: Path, /, **changes: Any) -> Config:
    """The small run's configuration, with fields of any part changed by name."""
    changes = {"data": data, "run_dir": run, **changes}
    parts = {}
    for part in dataclasses.fields(Config):
        old = getattr(SMALL, part.name)
        names = {field.name for field in dataclasses.fields(old)} & changes.keys()
        parts[part.name] = dataclasses.replace(old, **{name: changes.pop(name) for name in names})
    assert not changes, f"no such settings: {changes}"
    return Config(**parts)


def flags(config: Config) -> list[str]:
    """A configuration as the words of a command line."""
    words = ["debug"]
    for part in dataclasses.fields(Config):
        for name, value in dataclasses.asdict(getattr(config, part.name)).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def train(
    config: Config, stop_after: int | None = None, prepare: Callable[[Run], None] | None = None, world: World = ALONE
) -> Run:
    """Run to the end in this process, or until it is told to stop while it takes a later step than `stop_after`."""
    signals = StopSignals()
    run = set_up(config, world)
    if stop_after is not None:
        advance = run.advance

        def advance_and_stop() -> None:
            advance()
            if run.step == stop_after - 1:
                signals.received = "SIGTERM"

        run.advance = advance_and_stop  # type: ignore[method-assign]
    if prepare is not None:
        prepare(run)
    try:
        assert end(run, train_loop(run, signals), signals) == 0
    finally:
        close(run, "error")
    return run


def records(run: Path, kind: str = "train", restarts: int = 0) -> list[dict[str, Any]]:
    """Whole lines of a kind in a run's metrics file, from so many restarts on; none if there is no file yet."""
    if not (run / "metrics.jsonl").exists():
        return []
    found: list[dict[str, Any]] = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            found.append(json.loads(text))
    starts = [i for i, line in enumerate(found) if line["kind"] == "run_start"]
    first = starts[restarts] if restarts < len(starts) else len(found)
    return [line for line in found[first:] if line["kind"] == kind]


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    """The loss of each step; of a repeated one the last."""
    return {line["step"]: line["loss"] for line in records(run, kind)}


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, by name."""
    path = run / "checkpoints" / f"step_{step:08d}"
    weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    assert moments
    return {name: tensor.clone() for name, tensor in (weights | moments).items()}  # not the file's own memory


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Two sets of tensors are equal in every bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def environment() -> dict[str, str]:
    """Of a process a test starts: torchrun's own variables do not reach it, this project's modules do."""
    own = ("TORCHELASTIC", "TORCH_FR", "TORCH_NCCL", "RANK", "WORLD", "LOCAL", "MASTER")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**kept, "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def command(script: Path, words: list[str], processes: int = 0, torchrun: tuple[str, ...] = ()) -> list[str]:
    """The words that start a script, under torchrun where it is to have processes; alone if that is told no other."""
    if not processes:
        return [sys.executable, str(script), *words]
    alone = () if any(word.startswith("--rdzv") for word in torchrun) else ("--standalone",)
    launcher = [sys.executable, "-m", "torch.distributed.run", *alone, f"--nproc_per_node={processes}"]
    return [*launcher, *torchrun, str(script), *words]


class Started:
    """A script that runs beside the test, its output in a file: a pipe nobody reads would fill up and stop it."""

    def __init__(self, script: Path, words: list[str], processes: int = 0, torchrun: tuple[str, ...] = ()):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed by __exit__
        self.process = subprocess.Popen(
            command(script, words, processes, torchrun),
            cwd=ROOT,
            env=environment(),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()

    def output(self) -> str:
        """Everything it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def finish(self, seconds: float = 600) -> tuple[int, str]:
        """Wait for its end; returns its exit code and everything it printed."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.output()}") from None
        return code, self.output()

    def until(self, condition: Callable[[], object], seconds: float = 600) -> bool:
        """Wait until something is so; False if the process ended first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        raise AssertionError(f"waited in vain: {self.output()}")

    def workers(self) -> list[int]:
        """Process ids of torchrun's workers, in the order of their start."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return [int(child) for child in children]
        return []


def finish(script: Path, words: list[str], processes: int = 0, torchrun: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a script to its end; returns its exit code and everything it printed."""
    with Started(script, words, processes, torchrun) as started:
        return started.finish()
