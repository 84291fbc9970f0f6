"""Where the first value that is not finite is: put one in each place, and see that it is found there."""

from __future__ import annotations

import pytest
import torch
from small_runs import ALONE

from gpt2.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.train.nan_report import first_nonfinite

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=20, position="rope")
ROWS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [(ROWS[:, :-1], ROWS[:, 1:])]


class BadGradient(torch.autograd.Function):
    """Leaves a value as it is, and spoils its gradient."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.inf


def test_a_step_that_is_finite_leaves_nothing_behind() -> None:
    model = GPT(TINY).init_weights(0)
    before = [p.detach().clone() for p in model.parameters()]
    assert first_nonfinite(model, BATCHES, ALONE, "fp32") == [None]
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_comes_before_all_it_spoils() -> None:
    model = GPT(TINY).init_weights(0)
    with torch.no_grad():
        model.h[1].ln_1.weight[0] = torch.inf
        model.h[0].attn.c_attn.weight[0, 0] = torch.nan
    assert first_nonfinite(model, BATCHES, ALONE, "fp32") == ["the weight h.0.attn.c_attn.weight"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_innermost_module_is_named(checkpointing: bool) -> None:
    model = GPT(TINY).init_weights(0)
    model.activation_checkpointing = checkpointing
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.fill_(3e38)  # finite, as is all that enters it
    assert first_nonfinite(model, BATCHES, ALONE, "fp32") == ["the output of h.1.mlp.c_fc"]


def test_a_compiled_block_is_looked_into() -> None:
    model = GPT(TINY).init_weights(0)
    for block in model.h:
        block.compile(backend="eager")
    model(*BATCHES[0])
    with torch.no_grad():
        model.h[0].attn.c_attn.weight.fill_(3e38)
    assert first_nonfinite(model, BATCHES, ALONE, "fp32") == ["the output of h.0.attn.c_attn"]


def test_the_loss_and_the_second_micro_batch() -> None:
    model = GPT(TINY).init_weights(0)
    with torch.no_grad():
        model.wte.weight[7] = 3e38
        model.wte.weight[8] = -3e38
    without = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2]])
    batches = [(without, without), (without, torch.full_like(without, 7))]
    assert first_nonfinite(model, batches, ALONE, "fp32")[0] == "the loss"


def test_a_gradient_is_found_where_the_backward_pass_first_meets_it() -> None:
    model = GPT(TINY).init_weights(0)
    model.h[0].mlp.register_forward_hook(lambda _, __, output: BadGradient.apply(output))
    assert first_nonfinite(model, BATCHES, ALONE, "fp32") == ["the gradient of h.0.mlp.c_proj.bias"]
