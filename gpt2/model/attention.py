"""Causal self-attention and its variants: grouped queries, sliding windows, rotary positions, a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.config import ModelConfig
from gpt2.model.attention_kernels import tiled_attention

MAX_SCORES = 2**26
"""Of `masked_attention`, which has them all in memory at a time: 128 MiB in bf16."""


class KVCache:
    """Keys and values of the tokens seen so far, for every block; filled in place.

    Args:
        config: the model's.
        batch_size: rows.
        max_length: tokens a row can hold.
        dtype: of the keys and values kept, in which later tokens attend to them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        shape = (config.n_layer, batch_size, config.kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.zeros(batch_size, max_length, device=device, dtype=torch.long)
        self.length = 0  # tokens held; the model advances it once all its blocks have appended

    @property
    def max_length(self) -> int:
        """Tokens a row can hold."""
        return self.keys.size(3)

    def append_positions(self, positions: Tensor) -> Tensor:
        """Note where in the text the next (B or 1, T) tokens stand; returns (B, S), with those held already."""
        end = self.length + positions.size(1)
        self.positions[:, self.length : end] = positions
        return self.positions[:, :end]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, n_kv_head, T, head_dim) behind what block `layer` holds; returns all of it, in the cache's type.

        The first keys and values come back as they are: what attends to them comes in their type.
        """
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        if self.length == 0:
            return k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, each (block_size, head_dim / 2), fp32. Su et al. 2021, equation 15."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of (B, n, T, head_dim) by angles (B or 1, 1, T, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


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
        v: as k.
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
        v: as k.
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
        v: as k.
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


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context every forward pass appends its attention weights, one (B, n_head, T, S) a block, fp32.

    Attention is computed by `plain_attention` there.
    """
    weights: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    for layer in layers:
        layer.recorder = weights
    try:
        yield weights
    finally:
        for layer in layers:
            layer.recorder = None


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, from the residual stream back into it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.window = config.layer_window(layer)
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.recorder: list[Tensor] | None = None  # of `recorded_weights`
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Mix (B, T, C) over time.

        Args:
            x: (B, T, C).
            rotary: cos and sin (B or 1, 1, T, head_dim / 2); None without RoPE.
            mask: (B or 1, 1, T, S) bool of `attention_mask`; None: every token sees its past in this block's window.
            cache: earlier keys and values, extended by this call.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, (nh + 2 nkv) hs)
        q, k, v = qkv.split([n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)], dim=-1)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        dtype = v.dtype
        k = k.to(dtype)  # autocast computes norms and rotations in fp32
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.attend(q.to(k.dtype), k, v, mask).to(dtype)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Pick the backend for (B, nh, T, hs) queries over (B, nkv, S, hs) keys; the one place that does.

        Without a mask the queries are the last T of the S tokens.
        """
        T, S = q.size(2), k.size(2)
        window = None if self.window is not None and self.window >= S else self.window
        dropout = self.dropout if self.training else 0.0
        training = mask is None and 1 < T == S and torch.compiler.is_compiling() and not dropout
        # Products take less time than the flash kernel there, and only there.
        products = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T > 1 and not dropout
        if self.recorder is not None:
            y, weights = plain_attention(q, k, v, self._mask(T, S, q.device) if mask is None else mask)
            self.recorder.append(weights)
            return y
        if mask is None and T == 1 and window is not None:  # a last token sees the last keys
            k, v = k[:, :, -window:], v[:, :, -window:]
        elif training and q.is_cuda and window is not None:
            return flex_window_attention(q, k, v, window)
        elif training and products:
            return tiled_attention(q, k, v, window)
        elif mask is None and T > 1 and (window is not None or T < S):
            mask = self._mask(T, S, q.device)
        few = q.size(0) * self.n_head * T * S <= MAX_SCORES
        if mask is not None and products and few and not torch.is_grad_enabled():
            return masked_attention(q, k, v, mask)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,  # a single last token sees everything
            dropout_p=dropout,
            enable_gqa=self.n_kv_head != self.n_head,
        )

    def _mask(self, T: int, S: int, device: torch.device) -> Tensor:
        """(1, 1, T, S) bool for queries that are the last T of the S tokens."""
        positions = torch.arange(S, device=device)[None]
        return attention_mask(positions[:, S - T :], positions, self.window)
