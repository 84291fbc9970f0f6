"""One step: the gradient of the mean over its tokens, clipped; what it reports; what it never does."""

from __future__ import annotations

import copy

import pytest
import torch
from small_runs import ALONE
from torch.nn import functional as F

from gpt2.config import GPTConfig, OptimConfig
from gpt2.model.gpt import GPT
from gpt2.train.guard import StepGuard
from gpt2.train.optim import make_optimizers
from gpt2.train.step import Flags, StepNumbers, seed_step
from train_gpt2 import train_step

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)
CPU = torch.device("cpu")


def batch(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, (rows, 9), generator=torch.Generator().manual_seed(seed))


def take_step(model: GPT, micro: int, grad_clip: float = 1.0, flags: Flags = Flags()) -> StepNumbers:  # noqa: B008
    optimizers = make_optimizers(model, OptimConfig(learning_rate=0.1), CPU)
    batches = [(rows[:, :-1], rows[:, 1:]) for rows in batch(8).split(micro)]
    numbers = train_step(
        model,
        optimizers,
        batches,
        StepGuard(CPU, "stop"),
        ALONE,
        dtype="fp32",
        tokens_per_step=64,
        grad_clip=grad_clip,
        flags=lambda: flags,
    )
    assert all(p.grad is None for p in model.parameters())
    return numbers.read()


@pytest.mark.parametrize("micro", [8, 4, 1])
@pytest.mark.parametrize("clip", [0.0, 1e-3, 100.0])
def test_as_written_out(micro: int, clip: float) -> None:
    ours = GPT(TINY).init_weights(0)
    plain = copy.deepcopy(ours)
    rows = batch(8)
    loss = F.cross_entropy(plain(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for p in plain.parameters():
        assert p.grad is not None
        if clip and norm > clip:
            p.grad *= clip / norm
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    optimizer.step()

    # Seen through plain gradient descent, whose update shows the length of the gradient; AdamW's hides it.
    numbers = _sgd_step(ours, rows, micro, clip)
    assert numbers.loss == pytest.approx(loss.item(), rel=1e-6)
    assert numbers.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert numbers.updated
    assert not numbers.nonfinite
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def _sgd_step(model: GPT, rows: torch.Tensor, micro: int, clip: float) -> StepNumbers:
    batches = [(part[:, :-1], part[:, 1:]) for part in rows.split(micro)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), lr=1.0)]
    guard = StepGuard(CPU, "stop")
    return train_step(
        model,
        optimizers,
        batches,
        guard,
        ALONE,
        dtype="fp32",
        tokens_per_step=64,
        grad_clip=clip,
        flags=Flags,
    ).read()


def test_the_padding_of_the_vocabulary_stays_zero() -> None:
    model = GPT(TINY).init_weights(0)
    for _ in range(3):
        take_step(model, 4)
    assert model.wte.weight.shape == (64, 16)
    assert not model.wte.weight[20:].any()


@pytest.mark.parametrize("name", Flags._fields)
def test_flags_come_back(name: str) -> None:
    model = GPT(TINY).init_weights(0)
    before = [p.detach().clone() for p in model.parameters()]
    numbers = take_step(model, 8, flags=Flags(**{name: True}))
    assert numbers.flags == Flags(**{name: True})
    # A process without data vetoes the update of all.
    assert numbers.updated == (name != "failed")
    assert all(map(torch.equal, before, model.parameters())) == (name == "failed")
    assert numbers.bad_ranks == ([0] if name == "failed" else [])


def test_seeds_differ_by_step_rank_and_seed_and_are_a_pure_function() -> None:
    draws = {}
    for key in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1, 10, 0), (11, 0, 0), (-5, 0, 0)]:
        seed_step(*key)
        draws[key] = torch.rand(4).tolist()
        seed_step(*key)
        assert torch.rand(4).tolist() == draws[key]
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)
