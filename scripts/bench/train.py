"""Tokens per second of a training step: this project's against a plain model and transformers.

Every side starts from the same weights, takes the same batch under the same autocast, clips and updates with the same
optimizer; each runs in a process of its own, and they take turns, so that what else the machine does weighs on all.
Compilation and warm-up are not counted. If the losses of the first steps differ by more than rounding, nothing is
reported: the sides would not compute the same thing. With two optimizers each side runs once with each.

  ours                   the trainer's own step, as train_gpt2.py makes it
  plain                  the same network eager, with all logits at once and without this project's tricks
  plain-compiled         plain under torch.compile
  transformers           GPT2LMHeadModel (its loss function: all logits in fp32), eager
  transformers-compiled  the same under torch.compile
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import (
    Worker,
    add_model_arguments,
    configuration,
    matmul_flops,
    positive,
    require_package,
    seconds,
    summary,
)
from gpt2.config import Config
from gpt2.distributed.parallel import parallelize
from gpt2.distributed.world import World, pick_device
from gpt2.errors import UserError, first_line
from gpt2.files import user_path
from gpt2.hardware import device_name, memory_bytes, peak_flops
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import config_to_hf, not_in_transformers, state_dict_to_hf
from gpt2.model.loss import plain_cross_entropy
from gpt2.precision import autocast, resolve_dtype, set_matmul_precision
from gpt2.train.optim import make_optimizers

SIDES = ("ours", "plain", "plain-compiled", "transformers", "transformers-compiled")
LEARNING_RATE = 1e-4
MUON_LEARNING_RATE = 1e-3
CHECKED_STEPS = 4
PARTS = (
    ("attention", "aten::_scaled_dot_product"),
    ("attention", "aten::bmm"),  # on a CPU; what lies between its products is inside the compiled blocks
    ("head and loss", "_LinearCrossEntropy"),
    ("optimizer", "Optimizer.step#"),
)
"""Beginnings of the profiler's names for operations, without those they are made of."""
Step = Callable[[], Callable[[], float]]
"""Makes a step, and returns what waits for its loss."""
# Losses of the first steps may differ by this fraction. Adam's first updates have the size of the learning rate
# whatever the gradient's, so rounding that changes a small gradient's sign is seen in the loss.
TOLERANCE = {"bf16": 2e-3, "tf32": 1e-3, "fp32": 1e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--sides", nargs="+", type=side_name, choices=SIDES, help="[all that can use the optimizer]")
    parser.add_argument(
        "--optimizer", nargs="+", choices=("adamw", "muon"), default=["adamw"], help="one, or both compared [adamw]"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each side [5]")
    parser.add_argument("--steps", type=positive, help="steps a turn [1, on a GPU 10]")
    parser.add_argument("--profile", type=user_path, metavar="TRACE", help="write a Chrome trace of one of our steps")
    parser.add_argument(
        "--first-step", action="store_true", help="also time our first step with an empty and a filled compile cache"
    )


def side_name(text: str) -> str:
    """A side as the command line names it; plain-compiled was compiled in earlier versions."""
    return "plain-compiled" if text == "compiled" else text


def choose_cells(sides: Sequence[str] | None, optimizers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is measured: for each row of the table its side and optimizer.

    Args:
        sides: asked for; None: all.
        optimizers: asked for.

    Raises:
        UserError: a side asked for can use none of them.
    """
    theirs = [side for side in sides or () if side.startswith("transformers")]
    if theirs and "adamw" not in optimizers:
        raise UserError(
            f"side {theirs[0]} cannot use Muon: transformers' GPT-2 stores its matrices transposed, q, k and v in "
            "columns; leave it out of --sides"
        )
    pairs = [
        (side, optimizer)
        for side in dict.fromkeys(sides or SIDES)
        for optimizer in dict.fromkeys(optimizers)
        if optimizer == "adamw" or not side.startswith("transformers")
    ]
    alone = len(set(optimizers)) == 1
    return {side if alone else f"{side}, {optimizer}": (side, optimizer) for side, optimizer in pairs}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return medians, spread, ratios and the breakdown of our step.

    Raises:
        UserError: the sides' losses differ, or an option is impossible.
    """
    config = configuration(args)
    device = pick_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    on_gpu = device.type == "cuda"
    cells = choose_cells(args.sides, args.optimizer)
    if any(side.startswith("transformers") for side, _ in cells.values()):
        if odd := not_in_transformers(config.model):
            raise UserError(f"transformers has no model with {', '.join(odd)}; leave it out of --sides")
        require_package("transformers", "transformers")
    sides = list(cells)
    steps = args.steps or (10 if on_gpu else 1)
    tokens = config.data.total_batch_tokens

    configs = {name: replace(config, optim=replace(config.optim, optimizer=cells[name][1])) for name in sides}
    workers = {name: Worker(Side, cells[name][0], configs[name], args.device, dtype) for name in sides}
    first = {}
    for side, worker in workers.items():
        first[side] = worker.call("steps", 1)
        if "seconds" in first[side]:
            print(f"{side}: first step {first[side]['seconds']:.1f} s", flush=True)
    # What does not fit beside the others' weights is left out, and said.
    full = [side for side in sides if "out_of_memory" in first[side]]
    for side in full:
        print(f"{side}: out of memory with --micro-batch-size {config.data.micro_batch_size}; left out", flush=True)
        workers.pop(side).close()
    sides = [side for side in sides if side not in full]
    if not sides:
        raise UserError(f"no side fits on {device_name(device)}; give a smaller --micro-batch-size")
    losses = {
        side: first[side]["losses"] + worker.call("steps", CHECKED_STEPS - 1)["losses"]
        for side, worker in workers.items()
    }
    for optimizer in args.optimizer:
        compare_losses({name: losses[name] for name in sides if cells[name][1] == optimizer}, TOLERANCE[dtype])
    times: dict[str, list[float]] = {side: [] for side in sides}
    cpu_times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side, worker in workers.items():
            turn = worker.call("steps", steps, int(on_gpu))
            times[side].append(turn["seconds"] / steps)
            cpu_times[side].append(turn["cpu_seconds"] / steps)
        print(
            f"round {number + 1}: " + ", ".join(f"{side} {times[side][-1] * 1e3:.1f} ms" for side in sides), flush=True
        )

    result: dict[str, Any] = {
        "configuration": config.to_dict(),
        "dtype": dtype,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "losses": losses,
        "out_of_memory": {side: first[side]["out_of_memory"] for side in full},
        "sides": {},
    }
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    set_matmul_precision(dtype)
    product = matmul_flops(device, torch_dtype, 8192 if on_gpu else 2048)
    peak = peak_flops(device_name(device))
    flops = flops_per_token(config) * tokens
    result["flops_per_token"], result["matmul_flops"], result["datasheet_flops"] = flops / tokens, product, peak
    print(f"\n{device_name(device)}, {dtype}, {tokens} tokens and {flops / 1e12:.2f} TFLOP per step")
    print(f"measured matrix product {product / 1e12:.3f} TFLOP/s: at most {tokens * product / flops:,.0f} tok/s")
    print(f"{'':<23}{'ms/step':>11}{'(low-high)':>19}{'tok/s':>11}{'TFLOP/s':>9}{'of product':>12}{'MFU':>7}{'GiB':>7}")
    for side, worker in workers.items():
        each = summary(times[side])
        rate = tokens / each["median"]
        memory = worker.call("memory")
        entry = {
            "seconds": each,
            "cpu_seconds": summary(cpu_times[side]),
            "tokens_per_second": rate,
            "flops": rate * flops / tokens,
            "of_measured_product": rate * flops / tokens / product,
            "mfu": rate * flops / tokens / peak if peak else None,
            "peak_memory_bytes": memory,
            "first_step_seconds": first[side]["seconds"],
        }
        result["sides"][side] = entry
        spread = f"({each['low'] * 1e3:.0f}-{each['high'] * 1e3:.0f})"
        mfu = f"{entry['mfu']:.1%}" if entry["mfu"] is not None else "-"
        print(
            f"{side:<23}{each['median'] * 1e3:>11.1f}{spread:>19}{rate:>11,.0f}{entry['flops'] / 1e12:>9.3f}"
            f"{entry['of_measured_product']:>12.1%}{mfu:>7}{(memory or 0) / 2**30:>7.2f}"
        )
    ours = next((name for name in sides if cells[name][0] == "ours"), None)
    if ours is not None:
        kinds = {"ratios": ("", times)}
        if device.type == "cpu" and torch.get_num_threads() == 1:
            # What a thread computed is counted apart from what it waited for others to leave the processor.
            kinds["cpu_time_ratios"] = (" in processor time", cpu_times)
        for kind, (name, measured) in kinds.items():
            for side in sides:
                if side != ours:
                    # Within a round, so that what else the machine does meanwhile weighs on both sides.
                    pairs = [theirs / own for own, theirs in zip(measured[ours], measured[side], strict=True)]
                    ratio = result.setdefault(kind, {})[side] = summary(pairs)
                    print(
                        f"{ours} is {ratio['median']:.2f} times {side}{name} ({ratio['low']:.2f}-{ratio['high']:.2f})"
                    )
        result["breakdown"] = workers[ours].call("breakdown", str(args.profile) if args.profile else None)
        total = result["breakdown"]["total"]
        parts = ", ".join(
            f"{part} {value / total:.0%}" for part, value in result["breakdown"].items() if part != "total"
        )
        print(f"one of our steps, profiled: {parts}")
    for worker in workers.values():
        worker.close()
    if args.first_step:
        result["first_step"] = first_steps(next(iter(configs.values())), args.device, dtype)
    return result


def flops_per_token(config: Config) -> float:
    """Operations to train on one token."""
    with torch.device("meta"):
        return GPT(config.model).flops_per_token()


def compare_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Stop if the sides' losses of the same steps differ by more than rounding.

    Raises:
        UserError: they do.
    """
    reference, *others = losses or [""]
    for side in others:
        for step, (one, other) in enumerate(zip(losses[reference], losses[side], strict=True)):
            if not abs(one - other) <= tolerance * abs(other):
                raise UserError(
                    f"the sides do not compute the same thing: in step {step + 1} the loss is {one:.5f} with "
                    f"{reference} and {other:.5f} with {side}; their speeds are not to be compared"
                )


def first_steps(config: Config, device: str, dtype: str) -> dict[str, float]:
    """Seconds from a new process's model to the end of its first step, with an empty and a filled compile cache."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-inductor-") as cache:
        for what in ("cold", "warm"):
            worker = Worker(Side, "ours", config, device, dtype, environment={"TORCHINDUCTOR_CACHE_DIR": cache})
            worker.call("memory")  # the model is built
            found[what] = worker.call("steps", 1)["seconds"]
            worker.close()
    print(f"first step: {found['cold']:.1f} s with an empty compile cache, {found['warm']:.1f} s with a filled one")
    return found


class Side:
    """One side of the comparison, in its own process.

    Args:
        side: one of SIDES.
        config: model and batch.
        device: "auto", or a device of PyTorch's: "cuda", "cuda:1", "mps", "cpu".
        dtype: precision of matrix products, "bf16", "tf32" or "fp32".
    """

    def __init__(self, side: str, config: Config, device: str, dtype: str):
        self.device, self.dtype, self.stepped = pick_device(device), dtype, False
        set_matmul_precision(dtype)
        generator = torch.Generator().manual_seed(0)
        shape = (config.data.micro_batch_size, config.model.block_size + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(self.device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        model = GPT(config.model).init_weights(0).to(self.device)
        # Learning rates at which rounding stays small; a preset's others would move tensors in great steps.
        others = dict.fromkeys(("embedding_learning_rate", "head_learning_rate", "vector_learning_rate"))
        rates = {"learning_rate": LEARNING_RATE, "muon_learning_rate": MUON_LEARNING_RATE, **others}
        config = replace(config, optim=replace(config.optim, **rates))  # type: ignore[arg-type]
        self.step = self._ours(model, config) if side == "ours" else self._baseline(model, config, side)

    def steps(self, count: int, untimed: int = 0) -> dict[str, Any]:
        """Make some steps; returns the wall and CPU seconds that `count` of them took, and all losses.

        Where memory runs out in the process's first step, what the device said, and nothing else.
        """
        try:
            readers = [self.step() for _ in range(untimed)]
            before = time.process_time()
            taken = seconds(lambda: readers.extend(self.step() for _ in range(count)), self.device)
        except torch.OutOfMemoryError as error:
            if self.stepped:
                raise
            return {"out_of_memory": first_line(error)}
        self.stepped = True
        cpu = time.process_time() - before
        losses = [read() for read in readers]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the others' activations need the room
        return {"seconds": taken, "cpu_seconds": cpu, "losses": losses}

    def memory(self) -> int | None:
        """Largest memory held so far, bytes."""
        return memory_bytes(self.device)

    def breakdown(self, trace: str | None) -> dict[str, float]:
        """Seconds one step spends where, by the profiler.

        Args:
            trace: file to write a Chrome trace to, if any.
        """
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        self.step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with profile(activities=activities, acc_events=True) as profiler:
            total = seconds(self.step, self.device)
        if trace is not None:
            profiler.export_chrome_trace(trace)
        parts = dict.fromkeys(("attention", "head and loss", "optimizer"), 0.0)
        for event in profiler.events():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # kernels, which the operations that launched them count too
            for part, prefix in PARTS:
                if event.name.startswith(prefix) and not _in_optimizer(event):  # Muon has products of its own
                    parts[part] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        return {"total": total, **parts, "other": total - sum(parts.values())}

    def _ours(self, model: GPT, config: Config) -> Step:
        from gpt2.allocator import keep_freed_memory
        from gpt2.train.guard import StepGuard
        from gpt2.train.step import Flags
        from train_gpt2 import train_step

        if self.device.type == "cpu":
            keep_freed_memory()  # as gpt2.train.setup does
        world = World(0, 0, 1, self.device)
        trained = parallelize(model, replace(config.run, compile=True), world, self.dtype, 1)
        optimizers = make_optimizers(model, config.optim, self.device, self.dtype)
        guard = StepGuard(self.device, "stop")

        def step() -> Callable[[], float]:
            numbers = train_step(
                trained,
                optimizers,
                [(self.inputs, self.targets)],
                guard,
                world,
                dtype=self.dtype,
                tokens_per_step=config.data.total_batch_tokens,
                grad_clip=config.optim.grad_clip,
                flags=Flags,
            )
            return lambda: numbers.read().loss

        return step

    def _baseline(self, model: GPT, config: Config, side: str) -> Step:
        tokens, vocab_size = config.data.total_batch_tokens, config.model.vocab_size
        network: torch.nn.Module = model
        theirs = side.startswith("transformers")
        if theirs:
            import transformers

            network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config_to_hf(config.model, None)))
            network.load_state_dict(state_dict_to_hf(model.state_dict(), config.model), strict=False)
            network.to(self.device)

        def loss() -> Tensor:
            if theirs:
                logits = network(self.inputs).logits.float()  # as transformers' loss functions do
                return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
            hidden = model.hidden(self.inputs).flatten(0, 1)
            total = plain_cross_entropy(hidden, model.lm_head.weight, self.targets.flatten(), vocab_size, model.softcap)
            return total / tokens

        forward = torch.compile(loss) if side.endswith("compiled") else loss
        optimizers = make_optimizers(network, config.optim, self.device, self.dtype)

        def step() -> Callable[[], float]:
            with autocast(self.device, self.dtype):
                value = forward()
            value.backward()
            if config.optim.grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.optim.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return value.detach().item

        return step


def _in_optimizer(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("Optimizer.step#"):
            return True
        parent = parent.cpu_parent
    return False
