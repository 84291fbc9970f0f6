"""The chunked head and loss against the definition, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import SoftcapForm
from gpt2.model.loss import IGNORE, NO_CAP, Softcap, linear_cross_entropy, plain_cross_entropy, softmax_, softmax_tiled_

N, C, VOCAB, PADDED = 70, 48, 185, 192
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])

Loss = Callable[..., Tensor]


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, C), weight (PADDED, C) with zero rows past VOCAB, targets (N,) of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator)
    weight = torch.randn(PADDED, C, generator=generator) / 3
    weight[VOCAB:] = 0
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[::7] = IGNORE
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        targets.to(device),
    )


def value_and_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> list[Tensor]:
    value = loss(hidden, weight, targets, VOCAB, **options)
    # A factor, as the trainer has one: 1 / tokens.
    return [value.detach(), *torch.autograd.grad(value * 0.01, (hidden, weight))]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("cap", [NO_CAP, Softcap(3.0), Softcap(3.0, "algebraic")])
@pytest.mark.parametrize("chunk", [1, 32, N, 1000], ids="chunk{}".format)
@pytest.mark.parametrize("softmax", [softmax_, softmax_tiled_])
def test_fp32_agrees_with_the_definition(device: str, cap: Softcap, chunk: int, softmax: object) -> None:
    want = value_and_gradients(plain_cross_entropy, *inputs(device), cap=cap)
    got = value_and_gradients(linear_cross_entropy, *inputs(device), cap=cap, chunk=chunk, softmax=softmax)
    for one, other in zip(got, want, strict=True):
        assert error(one, other) < 1e-5


def test_the_definition_is_the_one_of_the_books() -> None:
    hidden, weight, targets = inputs()
    total = 0.0
    for row, target in zip(hidden.detach().double(), targets.tolist(), strict=True):
        if target != IGNORE:
            logits = 3 * torch.tanh(weight.detach().double()[:VOCAB] @ row / 3)
            total -= float((logits[target].exp() / logits.exp().sum()).log())
    assert plain_cross_entropy(hidden, weight, targets, VOCAB, cap=Softcap(3.0)).item() == pytest.approx(
        total, rel=1e-5
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("cap", [NO_CAP, Softcap(3.0), Softcap(3.0, "algebraic")])
def test_bf16_is_no_worse_than_plain(device: str, cap: Softcap) -> None:
    exact = value_and_gradients(plain_cross_entropy, *inputs(device, torch.float64), cap=cap)
    with torch.autocast(device, dtype=torch.bfloat16):
        plain = value_and_gradients(plain_cross_entropy, *inputs(device), cap=cap)
        fast = value_and_gradients(linear_cross_entropy, *inputs(device), cap=cap, chunk=32)
    for got, usual, want in zip(fast, plain, exact, strict=True):
        # Rounding is a matter of luck element by element; over a tensor it may differ by a tenth.
        assert error(got, want) < 1.1 * error(usual, want) + 1e-6


def test_confident_predictions_keep_their_small_gradients_in_bf16() -> None:
    # p - 1 formed from a p already rounded to bf16 would be 0 for every p above 0.998.
    hidden = torch.tensor([[1.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[9.0, 0.0], [0.0, 1.0]] + [[0.0, 0.0]] * 2).requires_grad_()
    targets = torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=2)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad[0, 0].item() == pytest.approx(-1 / (1 + torch.tensor(9.0).exp().item()), rel=1e-2)


def test_padded_rows_take_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        weight[VOCAB:] = 100.0  # would win every softmax
    value, _, weight_grad = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    logits = F.linear(hidden, weight[:VOCAB])
    assert value.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
    assert (weight_grad[VOCAB:] == 0).all()


def test_ignored_positions_add_nothing_even_if_not_finite() -> None:
    hidden, weight, targets = inputs()
    counted = targets != IGNORE
    want = value_and_gradients(linear_cross_entropy, hidden[counted], weight, targets[counted])[0]
    with torch.no_grad():
        hidden[~counted] = float("nan")
    value, hidden_grad, weight_grad = value_and_gradients(linear_cross_entropy, hidden, weight, targets, chunk=32)
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    assert (hidden_grad[~counted] == 0).all()
    assert weight_grad.isfinite().all()


def test_all_positions_ignored() -> None:
    hidden, weight, targets = inputs()
    value, hidden_grad, weight_grad = value_and_gradients(
        linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE)
    )
    assert value.item() == 0
    assert not hidden_grad.any()
    assert not weight_grad.any()


def test_values_that_are_not_finite_are_seen() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[1, 0] = float("inf")  # its target counts
    assert not linear_cross_entropy(hidden, weight, targets, VOCAB).isfinite()


@pytest.mark.parametrize("frozen", ["none", "hidden", "weight"])
def test_gradients_go_only_where_they_are_wanted(frozen: str) -> None:
    hidden, weight, targets = inputs()
    want = value_and_gradients(plain_cross_entropy, hidden, weight, targets)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    (linear_cross_entropy(hidden, weight, targets, VOCAB) * 0.01).backward()
    for tensor, grad in zip((hidden, weight), want[1:], strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert error(tensor.grad, grad) < 1e-5
        else:
            assert tensor.grad is None


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk=32)
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk=32)
    assert loss.item() == alone.item()
    assert not alone.requires_grad


def test_weights_in_bf16_get_a_gradient_summed_in_fp32() -> None:
    # As FSDP passes them: 70 chunks of one position, each too small to count beside the sum in bf16.
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    want = value_and_gradients(plain_cross_entropy, hidden, weight, targets)[2]
    got = value_and_gradients(linear_cross_entropy, hidden, weight, targets, chunk=1)[2]
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 6e-3  # about bf16's 2^-8


def test_logits_of_any_size_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, -3e38, -3e38]])
    log_probs = softmax_(logits, torch.tensor([[0], [1]]), 3, NO_CAP)
    torch.testing.assert_close(log_probs, torch.tensor([[0.0], [-torch.tensor(3.0).log()]]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("cap", [NO_CAP, Softcap(5.0), Softcap(5.0, "algebraic")])
def test_columns_past_the_vocabulary_take_no_probability(cap: Softcap) -> None:
    # As a GPU's kernel gets them, whole rows; a CPU's gets the real columns alone.
    logits = 10 * torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    logits[:, 59:] = 1e4  # would take all of it
    index = torch.arange(6)[:, None]
    real, tiled, compiled = logits[:, :59].clone(), logits.clone(), logits.clone()
    want = softmax_(real, index, 59, cap)
    torch.testing.assert_close(softmax_(logits, index, 59, cap), want, rtol=0, atol=0)
    torch.testing.assert_close(logits[:, :59], real, rtol=0, atol=0)
    assert not logits[:, 59:].any()
    torch.testing.assert_close(torch.compile(softmax_, dynamic=False)(compiled, index, 59, cap), want)
    torch.testing.assert_close(compiled, logits)
    torch.testing.assert_close(softmax_tiled_(tiled, index, 59, cap), want)
    torch.testing.assert_close(tiled[:, :59], real)


@pytest.mark.parametrize("form", ["tanh", "algebraic"])
def test_softcap_is_the_identity_near_zero_and_bounded(form: SoftcapForm) -> None:
    x = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6])
    expected = torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0])
    torch.testing.assert_close(Softcap(30.0, form)(x), expected, rtol=1e-5, atol=1e-6)
    assert NO_CAP(x) is x


def test_the_two_forms_of_softcap_are_their_definitions() -> None:
    z = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    for form, literal in (("tanh", 15 * torch.tanh(z / 15)), ("algebraic", 15 * z / (z * z + 225).sqrt())):
        cap = Softcap(15.0, form)  # type: ignore[arg-type]
        torch.testing.assert_close(cap(z), literal, rtol=1e-12, atol=1e-12)
        (slope,) = torch.autograd.grad(literal.sum(), z, retain_graph=True)
        torch.testing.assert_close(cap.slope(cap(z)), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cap", [NO_CAP, Softcap(3.0), Softcap(3.0, "algebraic")])
@pytest.mark.parametrize("chunk", [1, 32, 1000])
def test_a_bias_and_its_gradient(cap: Softcap, chunk: int) -> None:
    hidden, weight, targets = inputs()
    bias = torch.randn(PADDED, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for loss in (
        plain_cross_entropy(hidden, weight, targets, VOCAB, cap, bias),
        linear_cross_entropy(hidden, weight, targets, VOCAB, cap, chunk, bias=bias),
    ):
        found.append([loss.detach(), *torch.autograd.grad(loss * 0.01, (hidden, weight, bias))])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < 1e-5
    assert (found[1][3][VOCAB:] == 0).all()
