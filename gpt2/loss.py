"""The output head and the cross-entropy in one, so that the logits never exist all at once.

For 64 × 1024 positions and 50,304 rows of vocabulary, logits in fp32 are 13 GB, and the plain way keeps them, their
log-softmax and their gradient. Here a chunk of positions passes through the head at a time, and its gradient is formed
at once, in the forward pass: the softmax minus the target's one-hot is all that backward needs, so each logit is
computed once, used three times, and forgotten. What stays are the gradients of the inputs, which `backward` scales.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The target of a position that does not count."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits smoothly into (-cap, cap); None leaves them. Gemma Team 2024, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None = None
) -> Tensor:
    """The definition, with all logits at once. The oracle of the tests and the baseline of the benchmark.

    Arguments and result are those of `linear_cross_entropy`.
    """
    logits = softcap(F.linear(hidden, weight)[:, :vocab_size].float(), cap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Sum of the negative log-likelihoods of `targets` under softmax(hidden weightᵀ), with its gradients.

    Under autocast the products are in its type, everything else is in fp32.

    Args:
        hidden: (N, C).
        weight: (V, C), V ≥ vocab_size; rows past the vocabulary take no probability and get no gradient.
        targets: (N,) ids below vocab_size, or IGNORE.
        vocab_size: rows of `weight` that are real.
        cap: of `softcap`.
        chunk: positions that pass through the head at a time.

    Returns:
        Scalar, nats, fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, cap, chunk, dtype, needs_gradient)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        cap: float | None,
        chunk: int,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        w = weight.to(dtype)
        if needs_gradient:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros_like(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.size(0), chunk):
                rows = slice(start, start + chunk)
                h = hidden[rows].to(dtype)  # (n, C)
                counts = targets[rows] != IGNORE  # (n,)
                index = targets[rows].clamp(min=0)[:, None]  # (n, 1)

                logits = softcap(F.linear(h, w).float(), cap)  # (n, V)
                logits[:, vocab_size:] = float("-inf")
                log_normalizer = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
                nll = (log_normalizer - logits.gather(1, index)).squeeze(1)
                loss += nll.masked_fill(~counts, 0).sum()
                if not needs_gradient:
                    continue

                grad = (logits - log_normalizer).exp_()  # softmax
                grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
                grad *= counts[:, None]
                if cap is not None:  # the derivative of cap·tanh(x / cap)
                    grad *= 1 - (logits.clamp(-cap, cap) / cap).square()
                grad = grad.to(dtype)
                hidden_grad[rows] = grad @ w
                weight_grad += grad.t() @ h
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None, None, None, None, None, None
