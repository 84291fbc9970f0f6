"""Runs as a trainer leaves them, without training: metric files with the shape of real ones."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt2.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig
from gpt2.metrics.recorder import Metrics

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)
GPT2 = GPTConfig()
WORDS = "the|of|and|model|language|a|is|<b>|&|</script>|to|in|that|it|can|people|1995|with|you"


def curve(step: int) -> float:
    """A loss like the 124M recipe's on FineWeb-Edu: 10.9 at first, 4.15 after 1,000 steps, 3.3 at the end."""
    return 3.05 + 7.85 / (1 + step / 55) ** 0.75


def lines(
    *,
    dataset: str = "HuggingFaceFW/fineweb-edu",
    model: GPTConfig = GPT2,
    steps: int = 19073,
    until: int | None = None,
    first: int = 0,
    log_every: int = 10,
    eval_every: int = 250,
    hellaswag: bool = True,
    samples: bool = True,
    seed: int = 0,
    offset: float = 0.0,
    learning_rate: float = 6e-4,
    world_size: int = 8,
    end: str | None = "finished",
    resumes_at: int = 0,
    with_bits: bool = True,
) -> list[dict[str, Any]]:
    """The lines of one start, from step `first` to `until`."""
    config = Config(
        model, DataConfig(), OptimConfig(learning_rate=learning_rate), RunConfig(max_steps=steps, seed=seed)
    )
    tokens_per_step = config.data.total_batch_tokens
    rng = random.Random(seed * 1_000_003 + first)
    clock = 1_760_000_000.0 + 0.14 * first

    def line(kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "step": step, "time": clock, **values}

    out = [
        line(
            "run_start",
            first,
            resumes_at=resumes_at,
            device="NVIDIA H100 80GB HBM3",
            device_type="cuda",
            world_size=world_size,
            cpu_count=208,
            host="node-0",
            platform="Linux",
            commit="0123456789abcdef",
            versions={"python": "3.11.7", "torch": "2.13.0"},
            dataset=dataset,
            config=config.to_dict(),
            total_steps=steps,
        )
    ]
    until = steps if until is None else until

    def evaluate(step: int) -> None:
        tokens = step * tokens_per_step
        loss = curve(step) + offset + 0.01
        bits = {"bits_per_byte": loss / math.log(2) / 4.5} if with_bits else {}
        out.append(line("val", step, tokens=tokens, loss=loss, val_tokens=10_485_760, **bits))
        if hellaswag:
            acc = 0.25 + 0.055 * (1 - math.exp(-step / 7000)) + rng.gauss(0, 0.0015) - offset / 10
            values = {"acc": acc - 0.01, "acc_norm": acc, "stderr": 0.0045, "examples": 10042}
            out.append(line("hellaswag", step, tokens=tokens, convention="completion", **values))
        if samples:
            words = WORDS.split("|")
            for prompt in ("Hello, I'm a language model,", "The sea"):
                text = " " + " ".join(rng.choice(words[: 2 + min(step // 100, 16)]) for _ in range(24))
                out.append(line("sample", step, tokens=tokens, prompt=prompt, text=text))

    if first == 0 and eval_every:
        evaluate(0)
    for step in range(first + 1, until + 1):
        clock += 0.14
        evaluated = eval_every > 0 and (step % eval_every == 0 or step == steps)
        if step % log_every == 0 or step == steps:
            speed = 3.7e6 * world_size / 8 * rng.gauss(1, 0.008) * (0.3 if step == first + log_every else 1)
            lr = learning_rate * min(step / 715, 0.55 + 0.45 * math.cos(math.pi * step / steps))
            out.append(
                line(
                    "train",
                    step,
                    tokens=step * tokens_per_step,
                    loss=curve(step) + offset + rng.gauss(0, 0.03),
                    lr=lr,
                    grad_norm=0.3
                    + 3 / (1 + step / 40)
                    + abs(rng.gauss(0, 0.03))
                    + (2.5 if rng.random() < 0.003 else 0),
                    tokens_per_second=speed,
                    mfu=speed * 8.56e8 / (world_size * 989e12),
                    memory_bytes=37_000_000_000,
                    seconds={"train": 0.14 * log_every, "data": 0.004, "eval": 0.0, "save": 0.0},
                )
            )
        if evaluated:
            evaluate(step)
            out[-1]["time"] = clock = clock + 3.5
    if end is not None:
        out.append(line("run_end", until, reason=end, seconds={"train": 0.5, "data": 0.0, "eval": 280.0, "save": 41.0}))
    return out


def encode(records: list[dict[str, Any]]) -> bytes:
    """As `metrics.jsonl` holds them."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write_run(directory: Path, **options: Any) -> Path:
    """A run of one start; options of `lines`."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_bytes(encode(lines(**options)))
    return directory


def write_restarted_run(directory: Path, **options: Any) -> Path:
    """A run that saved at step 500, died at 900 in the middle of a line, and went on from 500 on half the devices."""
    directory.mkdir(parents=True)
    until = options.pop("until", 1500)
    before = lines(until=500, end=None, **options)
    lost = lines(until=900, end=None, **options)[len(before) :]
    saved = encode(before)
    options |= {"world_size": 4, "first": 500, "resumes_at": len(saved)}
    after = lines(until=until, **options)
    after.insert(
        3,
        {
            "kind": "skip",
            "step": 503,
            "time": after[2]["time"],
            "reason": "nonfinite",
            "loss": "NaN",
            "grad_norm": "Infinity",
        },
    )
    (directory / "metrics.jsonl").write_bytes(saved + encode(lost)[:-40] + b"\n" + encode(after))
    return directory


def tiny(**options: Any) -> dict[str, Any]:
    """Options of a quick small run, of no size and data set that has baselines."""
    return {
        "model": replace(TINY),
        "dataset": "pydocs",
        "steps": 60,
        "log_every": 5,
        "eval_every": 20,
        "world_size": 1,
        **options,
    }


def make_metrics(directory: Path, *, start_step: int = 0, **run: Any) -> Metrics:
    config = Config(GPTConfig(), DataConfig(), run=RunConfig(max_steps=10, **run))
    return Metrics(
        directory,
        config=config,
        flops_per_token=1.0,
        device=torch.device("cpu"),
        world_size=1,
        start_step=start_step,
        dataset="pydocs",
    )
