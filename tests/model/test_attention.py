"""gpt2/model/attention.py against the definition written out, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from gpt2.config import GPTConfig
from gpt2.model import attention
from gpt2.model.attention import CausalSelfAttention, KVCache, recorded_weights, rotary_tables, rotate
from gpt2.model.attention_kernels import (
    attention_mask,
    flex_window_attention,
    masked_attention,
    plain_attention,
    training_backends,
    varying_backends,
)
from gpt2.model.gpt import GPT


def one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention as sums over visible keys: no mask, no matrix product. (B, n, T, hs)."""
    B, n_head, T, head_dim = q.shape
    share = n_head // k.size(1)
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(n_head):
            for t in range(T):
                first = 0 if window is None else max(0, t - window + 1)
                scores = [
                    float((q[b, h, t] * k[b, h // share, s]).sum()) / math.sqrt(head_dim) for s in range(first, t + 1)
                ]
                weights = [math.exp(x - max(scores)) for x in scores]
                for s, w in zip(range(first, t + 1), weights, strict=True):
                    y[b, h, t] += w / sum(weights) * v[b, h // share, s]
    return y


def layer(n_head: int = 4, n_kv_head: int = 4, window: int | None = None, dropout: float = 0.0) -> CausalSelfAttention:
    config = GPTConfig(
        n_layer=1, n_head=n_head, n_embd=8 * n_head, block_size=64, n_kv_head=n_kv_head, window=window, dropout=dropout
    )
    return CausalSelfAttention(config, 0).eval()


def heads(n_head: int, n_kv_head: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_head * 100 + n_kv_head * 10 + T)
    return tuple(torch.randn(2, n, T, 8, generator=generator) for n in (n_head, n_kv_head, n_kv_head))  # type: ignore[return-value]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 100])
def test_backend_and_oracle_equal_the_sums(n_kv_head: int, window: int | None) -> None:
    q, k, v = heads(4, n_kv_head, 7)
    expected = one_query_at_a_time(q, k, v, window)
    torch.testing.assert_close(layer(4, n_kv_head, window).attend(q, k, v, None), expected)
    positions = torch.arange(7)[None]
    plain, weights = plain_attention(q, k, v, attention_mask(positions, positions, window))
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 7))
    distance = positions[0][:, None] - positions[0][None, :]
    hidden = (distance < 0) | (distance >= (window or 100))
    assert (weights[..., hidden] == 0).all()
    assert (weights[..., ~hidden] > 0).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_queries_behind_a_cache_are_the_last_tokens(window: int | None, T: int) -> None:
    q, k, v = heads(4, 2, 7)
    full = layer(4, 2, window).attend(q, k, v, None)
    torch.testing.assert_close(layer(4, 2, window).attend(q[:, :, -T:], k, v, None), full[:, :, -T:])


@settings(max_examples=30)
@given(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 10)), st.integers(0, 2**31))
def test_mask_says_who_sees_whom(T: int, window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    extra = torch.rand(2, T, T, generator=generator) < 0.5
    positions = torch.randint(0, 5, (2, T), generator=generator)
    mask = attention_mask(positions, positions, window, extra)
    for b in range(2):
        for t in range(T):
            for s in range(T):
                back = int(positions[b, t] - positions[b, s])
                assert bool(mask[b, 0, t, s]) == (
                    back >= 0 and (window is None or back < window) and bool(extra[b, t, s])
                )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flex_attention_sees_the_same_window(n_kv_head: int) -> None:
    q, k, v = heads(4, n_kv_head, 16)
    torch.testing.assert_close(flex_window_attention(q, k, v, 5), one_query_at_a_time(q, k, v, 5), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_window_on_cuda_is_flex_attention_and_right() -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=64, window=32)
    model = GPT(config).init_weights(0).cuda()
    tokens = torch.randint(0, 64, (2, 256), device="cuda")
    expected = model(tokens, tokens)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = torch.compile(model)(tokens, tokens)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("capability", "first"), [((8, 0), "FLASH"), ((9, 0), "CUDNN"), ((10, 0), "CUDNN"), ((12, 0), "FLASH")]
)
def test_cudnn_comes_first_on_hopper_and_blackwell_data_center_chips(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: str
) -> None:
    chosen: list[list[SDPBackend]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("gpt2.model.attention_kernels.sdpa_kernel", lambda order, set_priority: chosen.append(order))
    training_backends(torch.device("cuda"))
    assert chosen[0][0].name == f"{first}_ATTENTION"
    assert SDPBackend.MATH in chosen[0]  # something that computes every shape
    with training_backends(torch.device("cpu")):
        pass
    assert len(chosen) == 1
    varying_backends(torch.device("cuda"))  # cuDNN would plan for every shape
    assert [backend.name for backend in chosen[1]] == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_masked_attention_is_the_definition(n_kv_head: int) -> None:
    q, k, v = heads(4, n_kv_head, 12)
    mask = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    nowhere = masked_attention(q, k, v, torch.zeros_like(mask))
    assert nowhere.isfinite().all()
    expected = plain_attention(q, k, v, mask)[0]
    torch.testing.assert_close(masked_attention(q, k, v, mask), expected)
    half = masked_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.02)


def test_a_cpu_scores_masked_rows_in_bf16_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    def spy(q: Tensor, *rest: Tensor) -> Tensor:
        used.append(q.dtype)
        return masked_attention(q, *rest)

    monkeypatch.setattr(attention, "masked_attention", spy)
    attend, mask = layer(4, 2).attend, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in heads(4, 2, 6))
        attend(q, k, v, mask)  # may need a gradient
        with torch.no_grad():
            torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, None), atol=0.02, rtol=0.02)
    assert used == [torch.bfloat16]
    monkeypatch.setattr(attention, "MAX_SCORES", 2 * 4 * 6 * 6 - 1)
    with torch.no_grad():
        attend(q, k, v, mask)
    assert len(used) == 1


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, position="rope")
    cos, sin = rotary_tables(config)
    x = torch.randn(1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, cos, sin)
    for t in range(32):
        for i in range(4):
            angle = t * config.rope_theta ** (-2 * i / 8)
            for h in range(2):
                z = complex(x[0, h, t, i], x[0, h, t, i + 4]) * complex(math.cos(angle), math.sin(angle))
                assert complex(rotated[0, h, t, i], rotated[0, h, t, i + 4]) == pytest.approx(z, abs=1e-5)


def test_rope_scores_depend_on_the_distance_only() -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=512, position="rope")
    cos, sin = rotary_tables(config)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def score(query_position: int, key_position: int) -> float:
        a = rotate(q.view(1, 1, 1, 16), cos[query_position], sin[query_position])
        b = rotate(k.view(1, 1, 1, 16), cos[key_position], sin[key_position])
        return float((a * b).sum())

    for distance in (0, 1, 7, 100):
        scores = [score(distance + start, start) for start in (0, 1, 50, 400)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)
    assert score(8, 1) != pytest.approx(score(9, 1), abs=1e-3)  # and it does depend on it


def test_dropout_drops_attention_weights_in_training_only() -> None:
    torch.manual_seed(0)
    q, k, v = heads(4, 4, 7)
    attend = layer(dropout=0.5)
    expected = one_query_at_a_time(q, k, v, None)
    torch.testing.assert_close(attend.attend(q, k, v, None), expected)
    attend.train()
    draws = torch.stack([attend.attend(q, k, v, None) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(dim=0), expected, atol=0.35, rtol=0)  # unbiased; 5 σ of 400 draws


def test_recorded_weights_are_those_of_the_pass_and_leave_no_trace() -> None:
    config = GPTConfig(
        n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=50, n_kv_head=2, window=4, full_attention_every=3
    )
    model = GPT(config).init_weights(0).eval()
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
        with recorded_weights(model) as weights:
            during = model(tokens)
        after = model(tokens)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 9, 9)] * 3
    torch.testing.assert_close(during, before)
    assert torch.equal(after, before)
    assert len(weights) == 3  # the last pass was not recorded
    assert (weights[0][:, :, 8, :5] == 0).all()  # outside the window of 4
    assert (weights[2][:, :, 8] > 0).all()  # the full layer


def test_recording_ends_when_the_pass_fails() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=10))
    with pytest.raises(IndexError), recorded_weights(model):
        model(torch.tensor([[11, 2000]]))
    assert all(block.attn.recorder is None for block in model.h)  # type: ignore[union-attr]


def test_cache_returns_what_was_put_in() -> None:
    config = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, n_kv_head=2)
    cache = KVCache(config, 3, 6, "cpu", torch.float32)
    assert cache.max_length == 6
    first, second = torch.randn(2, 3, 2, 2, 8)
    for index in range(2):
        k, v = first + index, first - index
        keys, values = cache.append(index, k, v)
        assert keys is k  # the first ones are all there are
        assert values is v
    cache.length = 2
    for index in range(2):
        keys, values = cache.append(index, second, second)
        torch.testing.assert_close(keys, torch.cat((first + index, second), dim=2))
        torch.testing.assert_close(values, torch.cat((first - index, second), dim=2))


@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_may_be_more_precise_than_the_model(window: int | None) -> None:
    config = GPTConfig(n_layer=1, n_head=4, n_embd=32, block_size=16, n_kv_head=2, window=window)
    attn = CausalSelfAttention(config, 0).to(torch.bfloat16).eval()
    cache = KVCache(config, 2, 9, "cpu", torch.float32)
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = attn(x)
        parts = []
        for start, stop in ((0, 4), (4, 8), (8, 9)):
            parts.append(attn(x[:, start:stop], cache=cache))
            cache.length = stop
    assert cache.keys.dtype == torch.float32
    assert {part.dtype for part in parts} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=0.01, rtol=0.02)


def test_one_layer_equals_its_equations() -> None:
    """c_attn, heads, the sums, c_proj, with qk_norm and rope: the layer's wiring, not only its core."""
    config = GPTConfig(n_layer=1, n_head=4, n_embd=32, block_size=16, n_kv_head=2, qk_norm=True, position="rope")
    attn = CausalSelfAttention(config, 0).eval()
    cos, sin = rotary_tables(config)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    qkv = x @ attn.c_attn.weight.T + attn.c_attn.bias
    q, k, v = qkv[..., :32], qkv[..., 32:48], qkv[..., 48:]
    q, k, v = (z.reshape(2, 6, -1, 8).transpose(1, 2) for z in (q, k, v))
    q, k = (z / (z.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() for z in (q, k))
    q, k = (rotate(z, cos[:6], sin[:6]) for z in (q, k))
    y = one_query_at_a_time(q.detach(), k.detach(), v.detach(), None).transpose(1, 2).reshape(2, 6, 32)
    expected = F.linear(y, attn.c_proj.weight, attn.c_proj.bias)
    with torch.no_grad():
        torch.testing.assert_close(attn(x, (cos[:6][None, None], sin[:6][None, None])), expected)
