"""`--plan`: what a run would take on some machine, without its data and without that machine."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from functools import partial

import torch

from gpt2.checkpoint.resume import find_origin
from gpt2.config import Config
from gpt2.distributed.world import pick_device
from gpt2.errors import UserError
from gpt2.hardware import device_name, peak_flops
from gpt2.precision import resolve_dtype
from gpt2.progress import columns_of, duration, wrapped
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks
from gpt2.train.memory import device_memory
from gpt2.train.plan import DataSizes, Plan, make_plan, measure_data, with_datas_vocabulary

MEMORY_GB = {"B200": 180, "H200": 141, "GH200": 96, "H100": 80, "H800": 80, "A100": 80, "A100-40GB": 40, "L40S": 48}
"""GPUs that can be planned for, with the memory on their data sheets in 10^9 bytes."""
PUBLISHED_MFU = {"H100": 0.38, "A100": 0.56}
"""What llm.c's CUDA code reaches with the 124M model on eight of them."""
HELLASWAG_TOKENS = 1_780_261
"""Tokens of HellaSwag's validation split: contexts once, and their endings."""
CPU_FRACTION = 0.6
"""Part of a large matrix product's rate that training reaches on a CPU; 0.5 to 0.7 in benchmarks/."""


def print_plan(config: Config) -> None:
    """Print what a run would do and take; nothing is written.

    Raises:
        UserError: the run would be refused, after its plan was printed; or the settings make no sense.
    """
    if os.environ.get("RANK", "0") != "0":
        return

    def say(line: str) -> None:
        print(wrapped(line, 11, columns_of(sys.stdout)))

    if config.data.data.exists():
        config = with_datas_vocabulary(config, open_dataset(config.data.data), say)
    config = replace(config, model=find_origin(config).model)
    world_size, name, device_type, memory, dtype = _machine(config)
    sizes = _sizes(config)
    plan = make_plan(config, sizes, world_size, dtype, device_type, memory)
    for line in plan.lines(config, world_size, name, dtype):
        say(line)
    speed, source = _speed(config, plan, world_size, name, dtype)
    if speed is None:
        say(f"{'speed':<11}unknown: {source}")
    else:
        evaluated = _evaluated_tokens(config, sizes) / 3  # a forward pass is a third of a step
        seconds = (plan.total_tokens + evaluated) / speed
        say(f"{'speed':<11}{speed:,.0f} tokens per second: {source}")
        say(f"{'time':<11}{duration(seconds)}, {evaluated / speed / seconds:.0%} of it evaluations")
        hours = seconds / 3600 * world_size
        price = config.run.price
        cost = (
            "--price P, of one for an hour, gives the cost" if price is None else f"{hours * price:,.2f} at {price:g}"
        )
        say(f"{'cost':<11}{hours:,.1f} device-hours: {cost}")
    plan.refuse_what_does_not_fit(config)


def _machine(config: Config) -> tuple[int, str, str, float | None, str]:
    """Processes, the device's name and type, its memory in bytes, and the precision: of `--on`, or of this machine."""
    if config.run.on is None:
        device = pick_device(config.run.device)
        dtype = resolve_dtype(config.run.dtype, device)
        return int(os.environ.get("WORLD_SIZE", "1")), device_name(device), device.type, device_memory(device), dtype
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(\S+)", config.run.on.strip(), re.IGNORECASE)
    names = {name.upper(): name for name in MEMORY_GB}
    if match is None or match[2].upper() not in names or match[1] == "0":
        raise UserError(f"--on is {config.run.on!r}; give a number of GPUs and one of {', '.join(MEMORY_GB)}: 8xH100")
    name = names[match[2].upper()]
    dtype = "bf16" if config.run.dtype == "auto" else config.run.dtype
    return int(match[1] or 1), name, "cuda", 1e9 * MEMORY_GB[name], dtype


def _sizes(config: Config) -> DataSizes | None:
    """Sizes of the data, if it is here."""
    if not config.data.data.exists():
        return None
    dataset = open_dataset(config.data.data)
    cut = partial(Blocks, block_size=config.model.block_size, vocab_size=config.model.vocab_size)
    return measure_data(config, dataset, cut(dataset.train), cut(dataset.val, needed=config.run.eval_every > 0))


def _evaluated_tokens(config: Config, sizes: DataSizes | None) -> float:
    """Tokens that all evaluations together pass forward."""
    run = config.run
    if run.eval_every == 0:
        return 0.0
    hellaswag = HELLASWAG_TOKENS * (1.0 if run.hellaswag_limit is None else min(run.hellaswag_limit / 10_042, 1))
    once = (config.data.val_tokens if sizes is None else sizes.val_tokens) + hellaswag
    return (1 + -(-run.total_steps // run.eval_every)) * once


def _speed(config: Config, plan: Plan, world_size: int, name: str, dtype: str) -> tuple[float | None, str]:
    """Tokens per second of all devices, and where that figure is from; None, and why it is unknown."""
    peak, mfu = peak_flops(name), config.run.mfu
    if peak is not None and dtype == "bf16":
        source = "as --mfu says"
        if mfu is None:
            known = next((key for key in PUBLISHED_MFU if key in name), None)
            mfu = PUBLISHED_MFU[known or "H100"]
            source = f"what llm.c reports for 124M on {known}" if known else "what llm.c reports on H100; set your own"
        flops = mfu * peak * world_size
        return flops / plan.flops_per_token, f"{mfu:.0%} of {world_size} × {peak / 1e12:.0f} TFLOP/s ({source}: --mfu)"
    if config.run.on is not None or pick_device(config.run.device).type != "cpu":
        return None, f"no data-sheet rate of {name} in {dtype} is known here"
    rate = _product_rate(torch.bfloat16 if dtype == "bf16" else torch.float32)
    flops = (CPU_FRACTION if mfu is None else mfu) * rate  # the processes of one machine share its cores
    return (
        flops / plan.flops_per_token,
        f"{flops / rate:.0%} of {rate / 1e9:,.0f} GFLOP/s, a large matrix product's now",
    )


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this CPU, timed for a second."""
    a = torch.randn(2048, 1024, dtype=dtype)
    b = torch.randn(1024, 2048, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 * 1024 * 2048 / best
