"""Muon: as its author's code and PyTorch's, however matrices are stacked and shared out, and what a run needs of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from small_runs import assert_same_bits, finish, losses, saved, small, train
from torch import Tensor, nn
from two_muons import CASES, RUNS, SHAPES, SPLITS, random, steps

from gpt2.config import Config, GPTConfig, OptimConfig
from gpt2.distributed.parallel import place_like
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.train import muon
from gpt2.train.muon import Muon, newton_schulz
from gpt2.train.optim import load_state_tensors, make_optimizers, state_tensors, step_unless
from gpt2.train.run import Run

CPU = torch.device("cpu")
JORDAN, CONVERGING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
TINY = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=8, vocab_size=20)


@pytest.fixture(autouse=True)
def batch_elements() -> Iterator[None]:
    """`two_muons.steps` makes batches small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "BATCH_ELEMENTS", muon.BATCH_ELEMENTS)
        yield


# Keller Jordan's definition, https://github.com/KellerJordan/Muon: steps, coefficients and the type are his constants.


def zeropower(gradient: Tensor, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype) -> Tensor:
    a, b, c = coefficients
    x = gradient.to(dtype)
    if gradient.size(-2) > gradient.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if gradient.size(-2) > gradient.size(-1):
        x = x.mT
    return x


def literal_update(
    gradient: Tensor,
    momentum: Tensor,
    second_momentum: Tensor | None,
    mu: float,
    steps: int = 5,
    coefficients: tuple[float, float, float] = JORDAN,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One matrix's update; the momenta are changed in place. With a second one: normuon_update of its authors."""
    momentum.lerp_(gradient, 1 - mu)
    update = zeropower(gradient.lerp(momentum, mu), steps, coefficients, dtype).float()
    if second_momentum is not None:
        norm = update.norm()
        second_momentum.lerp_((update * update).mean(dim=-1, keepdim=True), 1 - 0.95)
        update = update * (1 / (second_momentum.sqrt() + 1e-10))
        update = update * (norm / (update.norm() + 1e-10))
    return update * max(1, gradient.size(-2) / gradient.size(-1)) ** 0.5


# Newton-Schulz iterations multiply a small singular value, and what rounding has added to it, by up to a⁵ = 485.
FP32 = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 6, 20), (1, 1, 7)])
@pytest.mark.parametrize(("iterations", "coefficients"), [(5, JORDAN), (12, CONVERGING), (1, CONVERGING)])
def test_a_stack_is_orthogonalised_as_one_by_one(
    shape: tuple[int, ...], iterations: int, coefficients: tuple[float, float, float]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, shape[0])[:, None, None]
    stacked = newton_schulz(x, iterations, coefficients)
    for matrix, result in zip(x, stacked, strict=True):
        torch.testing.assert_close(newton_schulz(matrix[None], iterations, coefficients)[0], result, **FP32)
        torch.testing.assert_close(zeropower(matrix, iterations, coefficients, torch.float32), result, **FP32)


def test_what_it_does_to_singular_values() -> None:
    u, _, v = torch.linalg.svd(random(0, (8, 8)).double())
    values = torch.tensor([1, 0.9, 0.5, 0.3, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)
    x = (u * values) @ v
    for iterations, coefficients, low, high in ((5, JORDAN, 0.65, 1.25), (20, CONVERGING, 1 - 1e-6, 1 + 1e-6)):
        found = newton_schulz(3 * x[None], iterations, coefficients)[0]
        new = torch.linalg.svdvals(found)
        assert low < new.min() <= new.max() < high
        if coefficients == CONVERGING:
            torch.testing.assert_close(found, u @ v)  # the vectors are the same
    assert newton_schulz(torch.zeros(1, 2, 3), 5, JORDAN).eq(0).all()


@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize(("iterations", "coefficients"), [(5, JORDAN), (12, CONVERGING)])
def test_many_steps_as_written_out(
    normuon: bool, iterations: int, coefficients: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 100)  # several batches of a shape
    ours = {name: nn.Parameter(random(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())}
    theirs = {name: parameter.detach().clone() for name, parameter in ours.items()}
    first = {name: torch.zeros_like(w) for name, w in theirs.items()}
    second = {name: torch.zeros(w.shape[0], 1) for name, w in theirs.items()}
    splits = {name: SPLITS.get(name, [shape[0]]) for name, shape in SHAPES.items()}
    optimizer = Muon(
        [{"params": list(ours.values()), "splits": list(splits.values())}],
        lr=0.05,
        weight_decay=0.3,
        momentum=0.9,
        steps=iterations,
        coefficients=coefficients,
        normuon=normuon,
    )
    for step in range(10):
        optimizer.param_groups[0]["lr"] = lr = 0.05 / (step + 1)
        for i, (name, parameter) in enumerate(ours.items()):
            gradient = random(50 * step + i, SHAPES[name])
            parameter.grad = gradient.clone()
            parts = [x.split(splits[name]) for x in (theirs[name], gradient, first[name], second[name])]
            for weight, g, m, v in zip(*parts, strict=True):
                update = literal_update(g, m, v if normuon else None, 0.9, iterations, coefficients)
                weight.mul_(1 - lr * 0.3).sub_(lr * update)
        optimizer.step()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.detach(), theirs[name], **FP32)
            torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], first[name])
            if normuon:
                torch.testing.assert_close(optimizer.state[parameter]["second_momentum_buffer"], second[name], **FP32)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has its own since 2.9")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("iterations", "coefficients"), [(5, JORDAN), (12, CONVERGING)])
def test_as_pytorchs(
    dtype: torch.dtype,
    iterations: int,
    coefficients: tuple[float, float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # the one type PyTorch's knows
    ours, theirs = ([nn.Parameter(random(i, shape)) for i, shape in enumerate(SHAPES.values())] for _ in range(2))
    group = {"params": ours, "splits": [[p.shape[0]] for p in ours]}
    settings = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9}
    mine = Muon([group], **settings, steps=iterations, coefficients=coefficients, dtype=dtype)  # type: ignore[arg-type]
    reference = torch.optim.Muon(theirs, **settings, ns_steps=iterations, ns_coefficients=coefficients)
    for step in range(6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad, b.grad = (random(50 * step + i, tuple(a.shape)) for _ in range(2))
        mine.step()
        reference.step()
    # bf16 has 8 bits: each product rounds by up to 0.4 %, and products of a stack round elsewhere than one by one. Six
    # updates of 0.05 move weights by up to 0.3.
    tolerance = FP32 if dtype == torch.float32 else {"atol": 0.02, "rtol": 0}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def backward(model: GPT, seed: int) -> None:
    tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(seed))
    (model(tokens[:, :-1], tokens[:, 1:]) / 16).backward()


@pytest.mark.parametrize("choice", ["auto", "apart", "together"])
def test_queries_keys_and_values(choice: str) -> None:
    model = GPT(TINY).init_weights(0)
    config = OptimConfig(optimizer="muon", weight_decay=0.0, muon_qkv=choice)  # type: ignore[arg-type]
    optimizer = make_optimizers(model, config, CPU)[1]
    weight = model.h[1].attn.c_attn.weight
    before = weight.detach().clone()
    backward(model, 0)
    assert weight.grad is not None
    rows = [32] if choice == "together" else [16, 8, 8]
    expected = torch.cat([literal_update(g, torch.zeros_like(g), None, 0.95) for g in weight.grad.split(rows)])
    optimizer.step()
    torch.testing.assert_close((before - weight).detach() / 0.02, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "native", "expected"),
    [
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
        ("fp32", True, torch.float32),
        ("tf32", True, torch.float32),
    ],
)
def test_the_type_it_computes_in(
    dtype: str, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2.train.optim.multiplies_bf16", lambda device: native)
    seen = set()
    real = muon.newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *rest: seen.add(x.dtype) or real(x, *rest))
    model = GPT(TINY).init_weights(0)
    optimizers = make_optimizers(model, OptimConfig(optimizer="muon"), CPU, dtype)
    backward(model, 0)
    step_unless(optimizers, torch.tensor(0.0))
    assert seen == {expected}


@pytest.mark.parametrize("normuon", [False, True])
def test_the_host_reads_nothing(normuon: bool) -> None:
    with torch.device("meta"):
        parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
        optimizer = Muon(
            [{"params": parameters, "splits": [SPLITS.get(name, [s[0]]) for name, s in SHAPES.items()]}],
            lr=0.1,
            weight_decay=0.1,
            momentum=0.9,
            normuon=normuon,
        )
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.found_inf = veto = torch.zeros(())
    optimizer.step()  # a tensor on the meta device has no values
    with pytest.raises(RuntimeError, match="meta"):
        veto.item()


@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_vetoed_step_changes_nothing(normuon: bool, bad: float) -> None:
    model = GPT(TINY).init_weights(0)
    optimizers = make_optimizers(model, OptimConfig(optimizer="muon", normuon=normuon), CPU)
    for vetoed in (True, False, True, False):  # the first one, too
        state = {"": torch.cat([p.detach().flatten() for p in model.parameters()])}
        state |= {name: tensor.clone() for name, tensor in state_tensors(model, optimizers, lambda t: t).items()}
        backward(model, 0)
        if vetoed:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad[..., -1] = bad
        step_unless(optimizers, torch.tensor(float(vetoed)))
        model.zero_grad()
        after = {"": torch.cat([p.detach().flatten() for p in model.parameters()])}
        after |= state_tensors(model, optimizers, lambda t: t)
        assert all(tensor.isfinite().all() for tensor in after.values())
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], state[name])}
        moments = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", *(["second_momentum_buffer"] if normuon else [])}
        assert changed == (set() if vetoed else {"", *moments})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_whose_first_update_was_skipped_is_saved_and_resumed(
    char_data: Path, tmp_path: Path, optimizer: str
) -> None:
    settings = {"optimizer": optimizer, "on_nonfinite": "skip", "checkpoint_every": 1, "max_steps": 4, "keep": 9}

    def spoil_first(run: Run) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            return gradient * torch.nan if run.step == 0 else gradient

        next(iter(run.model.parameters())).register_hook(spoil)

    train(small(char_data, tmp_path / "whole", **settings), prepare=spoil_first)
    first = saved(tmp_path / "whole", 1)
    assert all(first[name].eq(0).all() for name in first if name.startswith(("step.", "exp_avg", "momentum_buffer.")))
    start = str(tmp_path / "whole/checkpoints/step_00000001")
    train(small(char_data, tmp_path / "resumed", resume=start, **settings))
    assert_same_bits(saved(tmp_path / "whole", 4), saved(tmp_path / "resumed", 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has its own since 2.9")
def test_the_state_of_pytorchs_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    one, other = GPT(TINY).init_weights(0), GPT(TINY)
    config = OptimConfig(optimizer="muon", muon_qkv="together")
    adamw, ours = make_optimizers(one, config, CPU)
    theirs = torch.optim.Muon(ours.param_groups[0]["params"], lr=0.02, weight_decay=0.1, momentum=0.95)

    def step(model: GPT, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        backward(model, seed)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    for seed in range(3):
        step(one, [adamw, theirs], seed)
    other.load_state_dict(one.state_dict())
    optimizers = make_optimizers(other, config, CPU)
    stored = {name: t.clone() for name, t in state_tensors(one, [adamw, theirs], lambda t: t).items()}
    load_state_tensors(other, optimizers, stored.items(), place_like)
    for seed in range(3, 5):
        step(one, [adamw, theirs], seed)
        step(other, optimizers, seed)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **FP32)


def as_before_the_choice(run: Path) -> None:
    """Make a run's files those of a version that orthogonalised q, k and v together and had no setting for it."""
    for path in (run / "config.json", *run.glob("checkpoints/*/training.json")):
        stored = json.loads(path.read_text())
        del (stored if path.name == "config.json" else stored["config"])["optim"]["muon_qkv"]
        stored.pop("digest", None)  # which such versions did not write either
        path.write_text(json.dumps(stored))


def test_a_run_goes_on_with_q_k_and_v_as_it_began(char_data: Path, tmp_path: Path) -> None:
    settings = {"optimizer": "muon", "checkpoint_every": 2, "max_steps": 6, "keep": 9}
    for choice in ("apart", "together"):
        train(small(char_data, tmp_path / choice, muon_qkv=choice, **settings))
    train(small(char_data, tmp_path / "new", **settings))
    assert Config.load(tmp_path / "new/config.json").optim.muon_qkv == "apart"
    assert_same_bits(saved(tmp_path / "apart", 6), saved(tmp_path / "new", 6))
    assert losses(tmp_path / "apart")[4] != losses(tmp_path / "together")[4]

    old = small(char_data, tmp_path / "old", **settings)
    train(small(char_data, tmp_path / "old", muon_qkv="together", **settings), stop_after=2)
    as_before_the_choice(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "untouched")
    train(old, stop_after=4)
    assert Config.load(tmp_path / "old/config.json").optim.muon_qkv == "together"
    train(old)  # a second time
    assert_same_bits(saved(tmp_path / "together", 6), saved(tmp_path / "old", 6))
    with pytest.raises(UserError, match="muon_qkv together → apart"):
        train(small(char_data, tmp_path / "untouched", muon_qkv="apart", **settings))

    start = tmp_path / "untouched/checkpoints/step_00000002"
    train(small(char_data, tmp_path / "elsewhere", resume=str(start), **settings))
    assert_same_bits(saved(tmp_path / "together", 6), saved(tmp_path / "elsewhere", 6))


@pytest.fixture(scope="module")
def two_muons(char_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_muons")
    code, output = finish(ROOT / "tests/two_muons.py", [str(char_data), str(out)], processes=2)
    assert code == 0, output
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_as_one(two_muons: Path, name: str) -> None:
    _, normuon, dtype = CASES[name]
    alone = steps("alone", normuon, dtype)
    found = [load_file(two_muons / f"{name}_rank{rank}.safetensors") for rank in (0, 1)]
    assert_same_bits(*found)
    assert found[0].keys() == alone.keys()
    assert all(tensor.isfinite().all() for tensor in alone.values())
    tolerance = FP32 if dtype == torch.float32 else {"atol": 0.02, "rtol": 0}  # see test_as_pytorchs
    for key, tensor in alone.items():
        torch.testing.assert_close(found[0][key], tensor, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(two_muons: Path, char_data: Path, tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {**RUNS[name], "micro_batch_size": 8, "parallel": "ddp"}
    train(small(char_data, tmp_path, **changes))
    torch.testing.assert_close(
        list(losses(two_muons / name).values()), list(losses(tmp_path).values()), atol=2e-4, rtol=0
    )
    alone, together = saved(tmp_path, 30), saved(two_muons / name, 30)
    assert alone.keys() == together.keys()
    assert all(alone[key].shape == together[key].shape for key in alone)
