"""Optimizers: every parameter once, AdamW as PyTorch's reference and as the paper, vetoed updates, state and back."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

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
    assert all("bias" in n or "ln_" in n for n in groups["AdamW vectors"])
    matrices = groups[f"{'Muon' if optimizer == 'muon' else 'AdamW'} matrices"]
    assert {"h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"} <= set(matrices)
    assert groups["AdamW embedding"] == ["wpe.weight", "wte.weight"]
    assert groups.get("AdamW head", []) == ([] if tied else ["lm_head.weight"])
    decay = {f"{type(o).__name__} {g['name']}": g["weight_decay"] for o in optimizers for g in o.param_groups}
    assert decay.pop("AdamW vectors") == 0
    assert set(decay.values()) == {0.1}
    lines = describe_groups(optimizers)
    assert len(lines) == len(groups)
    shown = [int(re.search(r"([\d,]+) parameters", line)[1].replace(",", "")) for line in lines]  # type: ignore[index]
    assert sum(shown) == model.num_parameters()  # without the vocabulary's padding, as everywhere
    assert "AdamW vectors: 18 tensors, 448 parameters, peak lr 0.0006, weight decay 0" in lines


def test_each_group_has_its_own_learning_rate_and_decay() -> None:
    model = GPT(replace(TINY, tie_embeddings=False, head_bias=True))
    config = OptimConfig(
        optimizer="muon",
        learning_rate=1.0,
        embedding_learning_rate=2.0,
        head_learning_rate=3.0,
        vector_learning_rate=4.0,
        muon_learning_rate=5.0,
        weight_decay=0.1,
        embedding_weight_decay=0.2,
        head_weight_decay=0.3,
        vector_weight_decay=0.4,
        muon_weight_decay=0.5,
    )
    found = {
        group["name"]: (group["initial_lr"], group["lr"], group["weight_decay"])
        for optimizer in make_optimizers(model, config, CPU)
        for group in optimizer.param_groups
    }
    assert found == {
        "embedding": (2.0, 2.0, 0.2),
        "head": (3.0, 3.0, 0.3),
        "vectors": (4.0, 4.0, 0.4),
        "matrices": (5.0, 5.0, 0.5),
    }
    adamw = make_optimizers(model, replace(config, optimizer="adamw"), CPU)[0]
    assert {g["name"]: g["lr"] for g in adamw.param_groups}["matrices"] == 1.0


def test_the_biases_count_as_the_field_counts_them() -> None:
    # build-nanogpt prints 50 decayed tensors with 124,354,560 parameters and 98 with 121,344; ours pads the vocabulary.
    with torch.device("meta"):
        model = GPT(GPTConfig())
    (adamw,) = make_optimizers(model, OptimConfig(), torch.device("meta"))
    counts: dict[float, list[int]] = {}
    for group in adamw.param_groups:
        tensors, parameters = counts.get(group["weight_decay"], [0, 0])
        counts[group["weight_decay"]] = [
            tensors + len(group["params"]),
            parameters + sum(p.numel() for p in group["params"]),
        ]
    assert counts == {0.1: [50, 124_318_464 + 47 * 768], 0.0: [98, 121_344]}


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
    with pytest.raises(UserError, match=r"holds 'exp_avg\.h\.9\.x', which this run's does not"):
        load_state_tensors(model, optimizers, [("exp_avg.h.9.x", torch.ones(1))], place_like)
    with pytest.raises(UserError, match=r"holds no optimizer state 'exp_avg.*another --optimizer"):
        load_state_tensors(model, optimizers, [("exp_avg.wte.weight", torch.zeros(64, 16))], place_like)
    for name, tensor, words in (
        ("exp_avg.wte.weight", torch.zeros(3), "is torch.float32 of shape (3,), not torch.float32 of shape (64, 16)"),
        ("step.wte.weight", torch.zeros(2), "of shape (2,), not torch.float32 of shape ()"),
        ("exp_avg.wte.weight", torch.zeros(64, 16, dtype=torch.float64), "is torch.float64 of shape (64, 16), not"),
        ("momentum_buffer.wte.weight", torch.zeros(64, 16), "which this run's does not"),
        ("novel.wte.weight", torch.zeros(64, 16), "which this run's does not"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            load_state_tensors(model, optimizers, [(name, tensor)], place_like)
