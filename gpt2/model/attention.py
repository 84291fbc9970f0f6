"""Causal self-attention and its variants: grouped queries, sliding windows, rotary positions, a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import GPTConfig
from gpt2.model.attention_kernels import (
    attention_mask,
    flex_window_attention,
    masked_attention,
    plain_attention,
    tiled_attention,
)

MAX_SCORES = 2**26
"""Scores up to which `masked_attention` is used, which holds all of them in memory: 128 MiB in bf16."""


class KVCache:
    """Keys and values of the tokens seen so far, for every block; filled in place.

    Args:
        config: the model's.
        batch_size: rows.
        max_length: most tokens a row can hold.
        dtype: type of the stored keys and values, in which later tokens attend to them.
    """

    def __init__(
        self,
        config: GPTConfig,
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
        """The most tokens a row can hold."""
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


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, each (block_size, head_dim / 2), fp32. Su et al. 2021, equation 15.

    Pairs that `rope_fraction` leaves alone have the angle 0.
    """
    pairs = config.head_dim // 2
    turning = round(config.rope_fraction * pairs)
    frequencies = torch.zeros(pairs, dtype=torch.float64)
    frequencies[:turning] = config.rope_theta ** (-torch.arange(turning, dtype=torch.float64) / turning)
    if config.rope_clockwise:
        frequencies = -frequencies
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of (B, n, T, head_dim) by angles (B or 1, 1, T, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context every forward pass appends its attention weights, one (B, n_head, T, S) per block, fp32.

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

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.window = config.layer_window(layer)
        self.qk_norm = config.qk_norm
        # The kernels divide scores by √head_dim; queries make up for another scale.
        self.query_scale = None
        if config.attention_scale is not None:
            self.query_scale = config.attention_scale * config.head_dim**0.5
        self.dropout = config.dropout
        self.recorder: list[Tensor] | None = None  # of `recorded_weights`
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    @property
    def qkv_widths(self) -> list[int]:
        """Rows of `c_attn` that make queries, keys and values, in this order."""
        return [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]

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
        q, k, v = qkv.split(self.qkv_widths, dim=-1)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.query_scale is not None:
            q = q * self.query_scale
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
