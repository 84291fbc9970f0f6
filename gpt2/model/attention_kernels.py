"""Ways to compute attention: its definition, masked products, FlexAttention, tiles; the order of SDPA's kernels.

`gpt2.model.attention` chooses among them, and PyTorch's `scaled_dot_product_attention`, by what it computes where.

**Tiles**, for training on a CPU in bf16 under torch.compile. PyTorch's flash kernel for CPUs multiplies 32 × 512 blocks
one at a time, at a fifth of the rate of a large product. Here a *tile* of queries meets all the keys it may see in one
product, and the compiler makes one kernel of what lies between two products. As in flash attention (Dao et al. 2022),
what is kept for the backward pass is one number per query, the logarithm of its softmax's denominator; weights are
computed again from it, never kept. A tile does not multiply the keys that none of its queries sees: not the future, nor
what a sliding window has left behind.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

TILE = 256
"""Queries at a time. Smaller ones skip more of the future, but take longer to compile, and multiply more slowly."""


def attention_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None, mask: Tensor | None = None
) -> Tensor:
    """Which key each query sees: not the future, not what lies `window` or more tokens back, only what `mask` allows.

    Args:
        query_positions: (B or 1, T).
        key_positions: (B or 1, S).
        window: keys a query sees, itself included; None: all before it.
        mask: (B or 1, T, S) bool, a further condition (True: may see), such as padding or packed sequences.

    Returns:
        (B or 1, 1, T, S) bool.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if mask is not None:
        visible = visible & mask
    return visible[:, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, as slow as it is readable: softmax(q kᵀ / √head_dim) v in fp32. The oracle of the tests.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, S, head_dim); each serves n_head / n_kv_head neighbouring query heads.
        v: values, of the same shape as k.
        mask: (B or 1, 1, T, S) bool, True where a query may look.

    Returns:
        The mixed values (B, n_head, T, head_dim) in q's dtype, and the weights (B, n_head, T, S), fp32.
    """
    groups = q.size(1) // k.size(1)
    k = k.float().repeat_interleave(groups, dim=1)
    v = v.float().repeat_interleave(groups, dim=1)
    scores = q.float() @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, nh, T, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v).to(q.dtype), weights


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`plain_attention` in the inputs' type: two products, and a softmax that sums in fp32.

    On a CPU in bf16 it takes two thirds of the flash kernel's time, which gains nothing from being given a mask.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, S, head_dim).
        v: values, of the same shape as k.
        mask: (B or 1, 1, T, S) bool, True where a query may look. One that may look nowhere gets something finite.
    """
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
    # Not -∞, of which a whole row makes NaN; half, so that no score added to it makes one.
    low = torch.finfo(q.dtype).min / 2
    scores += torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, low)
    return scores.softmax(dim=-1) @ v


def flex_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Sliding-window attention by FlexAttention, which skips the blocks of keys that no query of a block sees.

    Fast only under torch.compile, on CUDA. Dong et al. 2024.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, T, head_dim), of the same tokens.
        v: values, of the same shape as k.
        window: keys a query sees, itself included.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    T = q.size(2)
    blocks = create_block_mask(visible, None, None, T, T, device=q.device)
    y = flex_attention(q, k, v, block_mask=blocks, enable_gqa=k.size(1) != q.size(1))
    assert isinstance(y, Tensor)  # it returns more only when asked to
    return y


def training_backends(device: torch.device) -> AbstractContextManager[None]:
    """The context to train in: which of SDPA's kernels come first.

    On Hopper and Blackwell (sm_90, sm_100) cuDNN's comes first: it was written for their tensor cores, PyTorch's flash
    kernel for the generation before. It plans anew for every shape, so the context is for batches that all look alike;
    others have `varying_backends`.

    Args:
        device: computed on; other than CUDA there is nothing to choose.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        order[:2] = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    context: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return context


def varying_backends(device: torch.device) -> AbstractContextManager[None]:
    """The context to score and sample in, where shapes change from call to call: without cuDNN, which plans for each.

    Args:
        device: computed on; other than CUDA there is nothing to choose.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return context


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """softmax(q kᵀ / √head_dim) v over each query's past, itself included; softmax in fp32.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, T, head_dim); each serves n_head / n_kv_head neighbouring query heads.
        v: values, of the same shape as k.
        window: keys a query sees, itself included; None: all of its past.

    Returns:
        (B, n_head, T, head_dim).
    """
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bias = causal_bias(q.size(2), window)
    y: Tensor = _TiledAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, window)
    return y.view(q.shape)


class _TiledAttention(torch.autograd.Function):
    """Tiled attention over (N, T, head_dim) queries, keys and values; N counts the heads of all rows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int | None) -> Tensor:
        outputs, denominators = [], []
        for queries, keys in _tiles(q.size(1), window):
            scores = _scores(q, k, queries, keys, bias)  # (N, t, s), fp32
            denominators.append(scores.logsumexp(dim=-1, keepdim=True))  # (N, t, 1)
            weights = (scores - denominators[-1]).exp()
            outputs.append(weights.to(v.dtype) @ v[:, keys])
        y, denominator = torch.cat(outputs, dim=1), torch.cat(denominators, dim=1)  # (N, T, head_dim), (N, T, 1)
        ctx.save_for_backward(q, k, v, y, denominator, bias)
        ctx.window = window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, denominator, bias = ctx.saved_tensors
        T = q.size(1)
        # What a softmax's gradient takes off all of a query's scores: Σ weight · weight's gradient.
        shift = (y_grad.float() * y.float()).sum(dim=-1, keepdim=True)  # (N, T, 1)
        q_grads = []
        k_grad, v_grad = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for queries, keys in _tiles(T, ctx.window):
            scores = _scores(q, k, queries, keys, bias)
            weights = (scores - denominator[:, queries]).exp()  # (N, t, s)
            weights_grad = (y_grad[:, queries] @ v[:, keys].transpose(1, 2)).float()
            scores_grad = weights * (weights_grad - shift[:, queries]) * q.size(-1) ** -0.5
            scores_grad = scores_grad.to(q.dtype)
            q_grads.append(scores_grad @ k[:, keys])
            behind = (0, 0, keys.start, T - keys.stop)  # of the keys that this tile does not see
            k_grad = k_grad + F.pad(scores_grad.transpose(1, 2) @ q[:, queries], behind)
            v_grad = v_grad + F.pad(weights.to(v.dtype).transpose(1, 2) @ y_grad[:, queries], behind)
        return torch.cat(q_grads, dim=1), k_grad.to(k.dtype), v_grad.to(v.dtype), None, None


def _tiles(T: int, window: int | None) -> list[tuple[slice, slice]]:
    """Tiles of T queries, each with the keys that any of its queries sees."""
    starts = range(0, T, TILE)
    return [
        (slice(start, min(start + TILE, T)), slice(max(0, start + 1 - (window or T)), min(start + TILE, T)))
        for start in starts
    ]


def causal_bias(T: int, window: int | None) -> Tensor:
    """What is added to the scores of the last tile, were it full: 0, or -inf where a query must not look.

    Other tiles' are parts of it. `gpt2.model.compile` marks it as a constant, computed once and read by the compiled
    kernels, which take two thirds to three quarters of the time that they take with comparisons of places in the text.

    Returns:
        (t, past + t), for t = min(T, TILE) queries, the keys before them and their own; fp32.
    """
    t, past = min(T, TILE), (T - 1) // TILE * TILE
    query, key = torch.arange(t)[:, None], torch.arange(-past, t)
    hidden = key > query
    if window is not None:
        hidden |= query - key >= window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _scores(q: Tensor, k: Tensor, queries: slice, keys: slice, bias: Tensor) -> Tensor:
    """(N, t, s) scaled products of a tile in fp32, -inf where a query must not look (NaN if the product is +inf)."""
    scores = (q[:, queries] @ k[:, keys].transpose(1, 2)).float() * q.size(-1) ** -0.5
    rows, past = queries.stop - queries.start, bias.size(1) - bias.size(0)
    return scores + bias[:rows, past + keys.start - queries.start : past + keys.stop - queries.start]
