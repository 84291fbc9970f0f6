"""Optimizers: every parameter once, AdamW as PyTorch's reference and as the paper, vetoed updates, state and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gpt2.config import GPTConfig, OptimConfig
from gpt2.distributed.parallel import place_like
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train.optim import (
    describe_groups,
    load_state_tensors,
    make_optimizers,
    set_learning_rates,
    state_tensors,
    step_unless,
)

CPU = torch.device("cpu")
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=20)


def backward(model: GPT, seed: int) -> None:
    tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(seed))
    (model(tokens[:, :-1], tokens[:, 1:]) / 16).backward()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(optimizer: str, tied: bool) -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=20, tie_embeddings=tied))
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer), CPU)  # type: ignore[arg-type]
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {
        f"{type(o).__name__} {g['name']}": sorted(names.pop(id(p)) for p in g["params"])
        for o in optimizers
        for g in o.param_groups
    }
    assert not names
    assert all("bias" in n or "ln_" in n for n in groups["AdamW not decayed"])
    matrices = groups["Muon blocks' matrices" if optimizer == "muon" else "AdamW decayed"]
    assert {"h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"} <= set(matrices)
    if optimizer == "muon":
        assert groups["AdamW decayed"] == ([] if tied else ["lm_head.weight"]) + ["wpe.weight", "wte.weight"]
    decay = {f"{type(o).__name__} {g['name']}": g["weight_decay"] for o in optimizers for g in o.param_groups}
    assert decay.pop("AdamW not decayed") == 0
    assert set(decay.values()) == {0.1}
    lines = describe_groups(optimizers)
    assert len(lines) == len(groups)
    assert "AdamW not decayed: 18 tensors, 448 parameters, peak lr 0.0006, weight decay 0" in lines


def test_the_biases_count_as_the_field_counts_them() -> None:
    # build-nanogpt prints 50 decayed tensors with 124,354,560 parameters and 98 with 121,344; ours pads the vocabulary.
    with torch.device("meta"):
        model = GPT(GPTConfig())
    lines = describe_groups(make_optimizers(model, OptimConfig(), torch.device("meta")))
    assert [line.split(", peak")[0] for line in lines] == [
        f"AdamW decayed: 50 tensors, {124_318_464 + 47 * 768:,} parameters",
        "AdamW not decayed: 98 tensors, 121,344 parameters",
    ]


def test_adamw_is_pytorchs_and_the_papers_over_50_steps() -> None:
    ours = GPT(TINY).init_weights(0)
    reference, written_out = copy.deepcopy(ours), copy.deepcopy(ours)
    config = OptimConfig(learning_rate=3e-3, beta1=0.8, beta2=0.95, adam_eps=1e-7, weight_decay=0.2)
    optimizers = make_optimizers(ours, config, CPU)
    assert optimizers[0].defaults["fused"]
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.2},
            {"params": [p for p in reference.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.95),
        eps=1e-7,
        foreach=False,
        fused=False,
    )
    m = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in written_out.named_parameters()}
    v = copy.deepcopy(m)
    weights = {n: p.detach().double() for n, p in written_out.named_parameters()}
    for step in range(50):
        factor = 1 / (step + 1)
        set_learning_rates(optimizers, factor)
        for group in plain.param_groups:
            group["lr"] = 3e-3 * factor
        for model in (ours, reference, written_out):
            backward(model, step)
        step_unless(optimizers, torch.tensor(0.0))
        plain.step()
        # Loshchilov & Hutter 2019, algorithm 2, in fp64.
        for name, p in written_out.named_parameters():
            assert p.grad is not None
            g, lr = p.grad.double(), 3e-3 * factor
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.2 if p.ndim >= 2 else 0.0
            weights[name] = weights[name] * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + 1e-7)
            p.data.copy_(weights[name])
        for model in (ours, reference, written_out):
            model.zero_grad()
    for (name, a), b, c in zip(ours.named_parameters(), reference.parameters(), written_out.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
        # A bias of no effect, the keys', has a gradient of rounding errors alone, which AdamW makes steps of.
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(a, c, atol=2e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_vetoed_update_leaves_weights_and_state_alone(optimizer: str) -> None:
    model = GPT(TINY).init_weights(0)
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer), CPU)  # type: ignore[arg-type]
    for veto in (1.0, 0.0, 1.0, 0.0):  # the first one too, before there is a state
        backward(model, 0)
        before = [p.detach().clone() for p in model.parameters()]
        state = {n: t.clone() for n, t in state_tensors(model, optimizers, lambda t: t).items()}
        if veto:
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= torch.nan
        step_unless(optimizers, torch.tensor(veto))
        assert all(map(torch.equal, before, model.parameters())) == bool(veto)
        after = state_tensors(model, optimizers, lambda t: t)
        if veto and state:
            assert all(torch.equal(state[n], after[n]) for n in state)
        assert all(t.isfinite().all() for t in after.values())
        model.zero_grad()
    steps = {t.item() for n, t in after.items() if n.startswith("step.")}
    assert steps == {2}


def test_learning_rates_scale_each_groups_peak() -> None:
    optimizers = make_optimizers(GPT(TINY), OptimConfig(optimizer="muon", learning_rate=1, muon_learning_rate=3), CPU)
    set_learning_rates(optimizers, 0.5)
    set_learning_rates(optimizers, 0.25)  # of the peak, not of the last one
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.25, 0.25, 0.75]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_and_back(optimizer: str) -> None:
    config = OptimConfig(optimizer=optimizer)  # type: ignore[arg-type]
    one, other = GPT(TINY).init_weights(0), GPT(TINY)
    other.load_state_dict(one.state_dict())
    first = make_optimizers(one, config, CPU)
    for seed in range(3):
        backward(one, seed)
        step_unless(first, torch.tensor(0.0))
        one.zero_grad()
    other.load_state_dict(one.state_dict())
    second = make_optimizers(other, config, CPU)
    tensors = {name: t.clone() for name, t in state_tensors(one, first, lambda t: t).items()}
    load_state_tensors(other, second, tensors.items(), place_like)
    for seed in range(3, 6):
        for model, optimizers in ((one, first), (other, second)):
            backward(model, seed)
            step_unless(optimizers, torch.tensor(0.0))
            model.zero_grad()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(tensors["exp_avg.wte.weight"], first[0].state[one.wte.weight]["exp_avg"])  # copies


def test_state_that_does_not_fit() -> None:
    model = GPT(TINY)
    optimizers = make_optimizers(model, OptimConfig(), CPU)
    with pytest.raises(UserError, match=r"is of 'h\.9\.x', which this model does not have"):
        load_state_tensors(model, optimizers, [("exp_avg.h.9.x", torch.ones(1))], place_like)
    with pytest.raises(UserError, match="holds no optimizer state of"):
        load_state_tensors(model, optimizers, [("exp_avg.wte.weight", torch.zeros(64, 16))], place_like)


def test_muon_needs_a_pytorch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match="has no Muon; use --optimizer adamw"):
        make_optimizers(GPT(TINY), OptimConfig(optimizer="muon"), CPU)
    model: Any = nn.Linear(2, 2)
    assert len(make_optimizers(model, OptimConfig(optimizer="muon"), CPU)) == 1  # nothing for it to do
