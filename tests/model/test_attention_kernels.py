"""gpt2/model/attention_kernels.py against the definition: values, gradients, windows, grouped heads, uneven tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.model import attention
from gpt2.model import attention_kernels as module
from gpt2.model.attention_kernels import attention_mask, plain_attention, tiled_attention
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT


def heads(T: int, n_head: int = 4, n_kv_head: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(2, n, T, 16) for n in (n_head, n_kv_head, n_kv_head)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    positions = torch.arange(q.size(2))[None]
    return plain_attention(q, k, v, attention_mask(positions, positions, window))[0]


@pytest.mark.parametrize("T", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 11, 30, 100])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, T: int, window: int | None, n_kv_head: int) -> None:
    monkeypatch.setattr(module, "TILE", 8)
    y_grad = torch.randn(2, 4, T, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (definition, tiled_attention):
        inputs = heads(T, 4, n_kv_head)
        y = function(*inputs, window)
        y.backward(y_grad)
        results.append([y, *(x.grad for x in inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("T", [128, 256, 700])
def test_at_the_real_tile(T: int) -> None:
    inputs = heads(T)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(tiled_attention(*inputs), expected, rtol=1e-5, atol=2e-6)


def test_a_window_multiplies_only_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 8)
    keys = [(k.start, k.stop) for _, k in module._tiles(30, 5)]
    assert keys == [(0, 8), (4, 16), (12, 24), (20, 30)]
    assert [(k.start, k.stop) for _, k in module._tiles(30, None)] == [(0, 8), (0, 16), (0, 24), (0, 30)]


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.detach() * 100 for x in heads(20))
    y = tiled_attention(q, k, v)
    assert y.isfinite().all()
    torch.testing.assert_close(y, definition(q, k, v), rtol=1e-4, atol=1e-3)


def test_bf16_errs_no_more_than_plain_products() -> None:
    """Against fp32; plain: bf16 products and the softmax in fp32, as every implementation without a kernel has it."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).float() / q.size(-1) ** 0.5
        hidden = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype) @ v

    y_grad = torch.randn(2, 4, 300, 16, generator=torch.Generator().manual_seed(0))
    reference = heads(300)
    F.scaled_dot_product_attention(*reference, is_causal=True).backward(y_grad)
    errors = {}
    for function in (plain, tiled_attention):
        inputs = heads(300, dtype=torch.bfloat16)
        function(*inputs).backward(y_grad.bfloat16())
        errors[function] = [
            ((x.grad.float() - r.grad).norm() / r.grad.norm()).item()  # type: ignore[union-attr]
            for x, r in zip(inputs, reference, strict=True)
        ]
    for ours, theirs in zip(errors[tiled_attention], errors[plain], strict=True):
        assert ours < 1.25 * theirs < 0.02


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="bf16 on this CPU is emulated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_in_bf16_has_the_eager_models_gradients(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    lengths: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        lengths.append(q.size(2))
        return tiled_attention(q, k, v, window)

    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(attention, "tiled_attention", spy)
    config = GPTConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=64,
        block_size=48,
        vocab_size=70,
        window=20,
        full_attention_every=2,
        position="rope",
    )
    tokens = torch.randint(70, (2, 48), generator=torch.Generator().manual_seed(0))
    gradients: list[dict[str, Tensor]] = []
    for compiled in (False, True):
        model = GPT(config).init_weights(0)
        if compiled:
            assert not lengths  # what is not compiled does without
            torch.compiler.reset()
            compile_model(model)
            model.activation_checkpointing = checkpointing
        for T in (30, 48):  # the second needs a larger mask, and every second block one of another window
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                model(tokens[:, :T], tokens[:, :T].roll(-1, 1)).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(lengths) == {30, 48}
    for eager, fast in zip(gradients[:2], gradients[2:], strict=True):
        assert eager.keys() == fast.keys()
        for name, gradient in eager.items():
            assert (fast[name] - gradient).norm() < 0.03 * gradient.norm(), name
