"""What tests/end_to_end/test_ranks.py looks at, done by two real processes:

    torchrun --nproc_per_node=2 two_ranks.py DATA OUT

Starting processes takes longer than all of these runs, so one start serves them all. Each process leaves its findings
in OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_runs import small
from torch.distributed.tensor import DTensor

from gpt2.config import Config
from gpt2.distributed.signals import StopSignals
from gpt2.distributed.world import World, joined_world
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.tokens.loader import Blocks
from gpt2.train.divergence import Diverged
from gpt2.train.ending import close, finish
from gpt2.train.run import Run
from gpt2.train.setup import set_up
from train_gpt2 import train

TABLE = {
    "ddp_2x4x1": {"micro_batch_size": 4},
    "ddp_2x1x4": {"micro_batch_size": 1},
    "fsdp_2x4x1": {"micro_batch_size": 4, "parallel": "fsdp"},
    "fsdp_2x1x4": {"micro_batch_size": 1, "parallel": "fsdp", "activation_checkpointing": True},
}
BF16 = {
    **{"dtype": "bf16", "micro_batch_size": 2, "max_steps": 5, "eval_every": 5, "learning_rate": 1e-3},
    **{"num_samples": 1, "sample_prompt": "A", "sample_tokens": 3},
}
STOPPED_AT = 9
POISONED_STEP = 3


@contextlib.contextmanager
def running(config: Config, this: World) -> Iterator[tuple[Run, StopSignals]]:
    run = set_up(config, this)
    try:
        yield run, StopSignals()
    finally:
        close(run, "error")


def train_to_its_end(run: Run, signals: StopSignals) -> int:
    return finish(run, train(run, signals), signals)


class Poison(torch.autograd.Function):
    """A loss that is finite, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan


def poison(run: Run, after_step: int) -> None:
    """Spoil this process's gradients from a step on."""
    forward = run.model.forward

    def poisoned(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = forward(tokens, targets)
        return Poison.apply(loss) if run.step >= after_step and torch.is_grad_enabled() else loss

    run.model.forward = poisoned  # type: ignore[method-assign, assignment]


def weights(model: GPT) -> list[torch.Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for _, p in model.named_parameters()]


def weights_after(run: Run, step: int) -> list[torch.Tensor]:
    """The weights that a run will have had after a step; those it has now if that is 0."""
    before = weights(run.model)
    advance = run.advance

    def advance_and_look() -> None:
        advance()
        if run.step == step:
            before[:] = weights(run.model)

    run.advance = advance_and_look  # type: ignore[method-assign]
    return before


def signal_after(run: Run, signals: StopSignals, step: int) -> None:
    """Let this process be told to stop after a step."""
    advance = run.advance

    def advance_and_signal() -> None:
        advance()
        if run.step == step:
            signals.received = "SIGTERM"

    run.advance = advance_and_signal  # type: ignore[method-assign]


def types_in_a_block(model: GPT) -> set[str]:
    """What training finds the last block's tensors to be."""
    found: set[str] = set()
    block = model.h[-1]

    def look(name: str, *tensors: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            found.add(" ".join([name, *(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)]))

    block.ln_2.register_forward_hook(lambda norm, args, y: look("stream, gain, normed", args[0], norm.weight, y))
    block.mlp.register_forward_hook(lambda mlp, args, y: look("update", y))
    return found


def gradients_held(run: Run) -> list[float]:
    """Parts of the model's gradient that this process holds at the beginning of each micro-step."""
    forward, parts = run.model.forward, []
    parameters = list(run.model.parameters())  # as they are between steps: within one, FSDP puts whole ones in place

    def counted(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            grads = [p.grad for p in parameters if p.grad is not None]
            local = sum((g.to_local() if isinstance(g, DTensor) else g).numel() for g in grads)
            parts.append(local / sum(p.numel() for p in parameters))
        return forward(tokens, targets)

    run.model.forward = counted  # type: ignore[method-assign, assignment]
    return parts


def lose_data(blocks: Blocks) -> None:
    """Make the second read of a split fail."""
    read, calls = blocks.read, []

    def unreadable(numbers: Any) -> Any:
        calls.append(numbers)
        if len(calls) == 2:
            raise UserError("this shard is gone")
        return read(numbers)

    blocks.read = unreadable  # type: ignore[method-assign]


def caught(work: Callable[[], object], *kinds: type[Exception]) -> str:
    try:
        work()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {}
    work = {"files of the data set opened": 0, "git started": 0}

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and str(arguments[0]).startswith(str(data))
        work["files of the data set opened"] += opens
        work["git started"] += event == "subprocess.Popen" and arguments[0] == "git"

    sys.addaudithook(count)
    with joined_world("cpu") as this:
        with running(small(data, out / "work", micro_batch_size=4), this):
            found["work at start"] = dict(work)
        for name, changes in TABLE.items():
            with running(small(data, out / name, eval_every=15, **changes), this) as (run, signals):
                found[name] = train_to_its_end(run, signals)

        for parallel in ("ddp", "fsdp"):
            with running(small(data, out / f"bf16_{parallel}", parallel=parallel, **BF16), this) as (run, signals):
                types, held = types_in_a_block(run.model), gradients_held(run)
                found[f"bf16_{parallel}"] = [train_to_its_end(run, signals), sorted(types), sorted(set(held))]

        # A signal that reaches rank 1 alone stops both, after the same step.
        for parallel in ("ddp", "fsdp"):
            config = small(data, out / f"stopped_{parallel}", micro_batch_size=4, parallel=parallel)
            with running(config, this) as (run, signals):
                if this.rank == 1:
                    signal_after(run, signals, STOPPED_AT - 1)
                found[f"stopped_{parallel}"] = [train_to_its_end(run, signals), run.step]

        for name, changes in {**TABLE, "first_step": {"micro_batch_size": 4}}.items():
            step = 1 if name == "first_step" else POISONED_STEP
            with running(small(data, out / f"poisoned_{name}", **changes), this) as (run, signals):
                before = weights_after(run, step - 1)
                if this.rank == 1:
                    poison(run, after_step=step - 1)
                message = caught(partial(train_to_its_end, run, signals), Diverged)
                unchanged = all(map(torch.equal, before, weights(run.model)))
                found[f"poisoned_{name}"] = [message, unchanged]

        # Data that rank 1 alone can't read, in a step and in an evaluation.
        for name in ("train_blocks", "val_blocks"):
            with running(small(data, out / f"unreadable_{name}", micro_batch_size=2, eval_every=3), this) as (
                run,
                signals,
            ):
                if this.rank == 1:
                    lose_data(getattr(run, name))
                found[f"unreadable_{name}"] = [
                    caught(partial(train_to_its_end, run, signals), UserError),
                    run.step,
                ]

        def alone_on(rank: int) -> int:
            if this.rank == rank:
                raise UserError(f"rank {rank} has a problem")
            return this.rank

        found["agreed"] = this.agree(lambda: this.rank * 10)
        found["one_disagrees"] = caught(lambda: this.agree(lambda: alone_on(1)), UserError)
        found["main_fails"] = caught(lambda: this.on_main(lambda: alone_on(0)), UserError)
        found["main_has_a_bug"] = caught(lambda: this.on_main(lambda: {}["key"]), UserError, KeyError)
        found["main_says"] = this.on_main(lambda: this.rank + 7)
        mine = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(4)} if this.is_main else None
        found["shared"] = {name: tensor.tolist() for name, tensor in this.share(mine)}
        found["any"] = [this.any(False), this.any(this.rank == 1)]
        (out / f"rank{this.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
