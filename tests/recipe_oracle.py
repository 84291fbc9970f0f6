"""The 3.28 recipe, literally and slowly: its own model, optimizer, schedule and loader, for tests alone.

Written from the recipe's description, without a line of the library: what `train_gpt2.py gpt2-3.28` computes is held to
this. Everything is in fp32 but the embedding table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEADER_BYTES = 1024


def batches(shards: Sequence[Path], batch_tokens: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (rows, length) of each step: file order, a shard's tail dropped, over and over."""
    while True:
        for path in shards:
            tokens = torch.from_numpy(np.fromfile(path, dtype="<u2", offset=HEADER_BYTES).astype(np.int64))
            position = 0
            while len(tokens) - position >= batch_tokens + 1:
                part = tokens[position : position + batch_tokens + 1]
                yield part[:-1].view(-1, length), part[1:].view(-1, length)
                position += batch_tokens


def rms_norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps) * gain


def rotate(x: Tensor) -> Tensor:
    """(rows, heads, length, width): of the pairs (x_i, x_{i + width/2}) the first half turn."""
    length, width = x.shape[-2:]
    turning = width // 4
    y = x.clone()
    for j in range(turning):
        angle = torch.arange(length) * 1024.0 ** (-j / (turning - 1))
        cos, sin = torch.cos(angle), torch.sin(angle)
        one, two = x[..., j], x[..., j + width // 2]
        y[..., j] = one * cos + two * sin
        y[..., j + width // 2] = two * cos - one * sin
    return y


def summed_loss(w: Mapping[str, Tensor], tokens: Tensor, targets: Tensor, n_layer: int, n_head: int) -> Tensor:
    rows, length = tokens.shape
    x = rms_norm(F.embedding(tokens, w["embedding"]).float(), w["embedding_norm"])
    width = x.shape[-1]
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    for i in range(n_layer):
        h = rms_norm(x, w[f"{i}.norm_1"])
        q, k, v = (
            (h @ w[f"{i}.{name}"].T + w[f"{i}.{name}_bias"]).view(rows, length, n_head, width // n_head).transpose(1, 2)
            for name in "qkv"
        )
        q, k = rotate(rms_norm(q)), rotate(rms_norm(k))
        scores = (0.12 * q @ k.transpose(2, 3)).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + mixed @ w[f"{i}.out"].T + w[f"{i}.out_bias"]
        h = rms_norm(x, w[f"{i}.norm_2"])
        x = x + torch.relu(h @ w[f"{i}.up"].T + w[f"{i}.up_bias"]) ** 2 @ w[f"{i}.down"].T + w[f"{i}.down_bias"]
    z = rms_norm(x, w["last_norm"]) @ w["head"].T + w["head_bias"]
    z = 15 * z / torch.sqrt(z * z + 225)
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")


def orthogonalise(update: Tensor) -> Tensor:
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(12):
        a = x @ x.T
        x = 2 * x + (-1.5 * a + 0.5 * a @ a) @ x
    return x.T if update.shape[0] > update.shape[1] else x


def split_weights(state: Mapping[str, Tensor], n_layer: int, table: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The recipe's tensors, q, k and v apart, from a model that stacks them; leaves that require gradients."""
    w = {
        "embedding": state["wte.weight"].to(table),
        "embedding_norm": state["ln_e.weight"],
        "last_norm": state["ln_f.weight"],
        "head": state["lm_head.weight"],
        "head_bias": state["lm_head.bias"],
    }
    for i in range(n_layer):
        for name, weight, bias in zip(
            "qkv", *(state[f"h.{i}.attn.c_attn.{kind}"].chunk(3) for kind in ("weight", "bias")), strict=True
        ):
            w[f"{i}.{name}"], w[f"{i}.{name}_bias"] = weight, bias
        for name, theirs in (("out", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
            w[f"{i}.{name}"], w[f"{i}.{name}_bias"] = state[f"h.{i}.{theirs}.weight"], state[f"h.{i}.{theirs}.bias"]
        w[f"{i}.norm_1"], w[f"{i}.norm_2"] = state[f"h.{i}.ln_1.weight"], state[f"h.{i}.ln_2.weight"]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in w.items()}


def train(
    state: Mapping[str, Tensor],
    shards: Sequence[Path],
    *,
    n_layer: int,
    n_head: int,
    batch_tokens: int,
    length: int,
    steps: int,
    table: torch.dtype = torch.bfloat16,
) -> list[float]:
    """The mean loss of each step, before its update; `table` is the embedding's type."""
    w = split_weights(state, n_layer, table)
    matrices = {name: p for name, p in w.items() if p.ndim == 2 and name[0].isdigit()}
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    peaks = [0.7, 0.004, 0.015]
    vectors = [p for p in w.values() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr}
            for parameters, lr in zip(([w["embedding"]], [w["head"]], vectors), peaks, strict=True)
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.001,
        fused=True,
    )
    losses = []
    for step, (tokens, targets) in zip(range(steps), batches(shards, batch_tokens, length), strict=False):
        loss = summed_loss(w, tokens, targets, n_layer, n_head)
        losses.append(loss.item() / batch_tokens)
        loss.backward()
        factor = min((steps - step) / (0.7 * steps), 1.0)
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                assert p.grad is not None
                momenta[name].lerp_(p.grad, 0.05)
                update = orthogonalise(torch.lerp(p.grad, momenta[name], 0.95))
                p.mul_(1 - 0.025 * factor * 0.05)
                p.sub_(0.025 * factor * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update)
        for p in w.values():
            p.grad = None
    return losses
