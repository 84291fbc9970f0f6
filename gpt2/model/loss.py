"""The output head and the cross-entropy in one, so that the logits never exist all at once.

For 64 × 1024 positions and 50,304 rows of vocabulary, logits in fp32 are 13 GB, and the plain way keeps them, their
log-softmax and their gradient. Here a chunk of positions passes through the head at a time, and its gradient is formed
at once, in the forward pass: the softmax minus the target's one-hot is all that backward needs, so each logit is
computed once, used three times, and forgotten. What stays are the gradients of the inputs, which `backward` scales.

Two sizes matter. A *chunk* is what a matrix product sees: many rows, or the products are slow. A *tile* is what is in
fp32 at a time: on a CPU few rows, so that the passes of softmax over it stay in cache; on a GPU, where memory is fast
and every launch costs, the whole chunk. `torch.compile` makes the passes one kernel that needs no fp32 copy and no
tiles; `gpt2.model.compile` puts that kernel in place of `softmax_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import SoftcapForm

IGNORE = -100
"""The target of a position that does not count."""


def chunk_size(device_type: str) -> int:
    """Positions that pass through the head at a time: 103 MB of GPT-2's logits in bf16 on a CPU, 824 MB elsewhere."""
    return 1024 if device_type == "cpu" else 8192


class Softcap(NamedTuple):
    """Squash logits smoothly into (-limit, limit).

    Attributes:
        limit: None leaves logits as they are.
        form: "tanh": limit · tanh(z / limit) (Gemma Team 2024, section 2); "algebraic": limit · z / √(z² + limit²)
            (modded-nanogpt).
    """

    limit: float | None = None
    form: SoftcapForm = "tanh"

    def __call__(self, logits: Tensor) -> Tensor:
        """The squashed logits."""
        if self.limit is None:
            return logits
        if self.form == "algebraic":
            return self.limit * logits * torch.rsqrt(logits.square() + self.limit**2)
        return self.limit * torch.tanh(logits / self.limit)

    def slope(self, capped: Tensor) -> Tensor:
        """The derivative, from what a limit made of the logits: 1 - u², or (1 - u²)^1.5, with u = capped / limit."""
        assert self.limit is not None
        slope = 1 - (capped / self.limit).square()
        return slope if self.form == "tanh" else slope * slope.clamp_min(0).sqrt()


NO_CAP = Softcap()

Softmax = Callable[[Tensor, Tensor, int, Softcap], Tensor]
"""Type of `softmax_` and of its compiled form."""


def plain_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: Softcap = NO_CAP,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition, with all logits at once. The oracle of the tests and the baseline of the benchmark.

    Arguments and result are those of `linear_cross_entropy`.
    """
    logits = cap(F.linear(hidden, weight, bias)[:, :vocab_size].float())
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def softmax_(logits: Tensor, targets: Tensor, vocab_size: int, cap: Softcap) -> Tensor:
    """Turn logits into the gradient of the negative log-likelihood, in place but for the targets' own elements.

    Args:
        logits: (n, V) in any floating type; becomes the softmax times the derivative of `cap`. All arithmetic is
            in fp32.
        targets: (n, 1) ids below `vocab_size`.
        vocab_size: columns that are real; the others, if there are any, take no probability.
        cap: squashes the logits first.

    Returns:
        Log-probabilities of the targets, (n, 1), fp32.
    """
    capped = cap(logits.float())
    real = capped
    if vocab_size < logits.size(-1):
        real = torch.where(torch.arange(logits.size(-1), device=logits.device) < vocab_size, capped, float("-inf"))
    log_probs = F.log_softmax(real, dim=-1)
    picked = log_probs.gather(1, targets)
    grad = log_probs.exp_()
    if cap.limit is not None:
        grad.mul_(cap.slope(capped))
    logits.copy_(grad)
    return picked


def softmax_tiled_(logits: Tensor, targets: Tensor, vocab_size: int, cap: Softcap) -> Tensor:
    """`softmax_` of the real columns, a few rows at a time on a CPU: 16 rows of GPT-2's vocabulary are 3 MB in fp32."""
    tile = 16 if logits.device.type == "cpu" else logits.size(0)
    tiles = zip(logits[:, :vocab_size].split(tile), targets.split(tile), strict=True)
    return torch.cat([softmax_(rows, index, vocab_size, cap) for rows, index in tiles])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: Softcap = NO_CAP,
    chunk: int | None = None,
    softmax: Softmax = softmax_tiled_,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum of the negative log-likelihoods of `targets` under softmax(cap(hidden weightᵀ + bias)), with its gradients.

    Under autocast the products are in its type, everything else is in fp32.

    Args:
        hidden: (N, C).
        weight: (V, C), V ≥ vocab_size; rows past the vocabulary take no probability and get no gradient.
        targets: (N,) ids below vocab_size, or IGNORE.
        vocab_size: rows of `weight` that are real.
        cap: squashes the logits.
        chunk: positions that pass through the head at a time; None: `chunk_size`.
        softmax: `softmax_` in the form that is fastest here.
        bias: (V,), added to the logits; None: 0.

    Returns:
        Scalar, nats, fp32.
    """
    device = hidden.device.type
    chunk = chunk_size(device) if chunk is None else chunk
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = (vocab_size, cap, chunk, softmax, dtype, needs_gradient)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, *options)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocab_size: int,
        cap: Softcap,
        chunk: int,
        softmax: Softmax,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> Tensor:
        N = hidden.size(0)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        w = weight.to(dtype)  # (V, C)
        b = None if bias is None else bias.to(dtype)  # (V,)
        # One buffer for all chunks: a new one each time costs a CPU a page fault per 4 kB.
        buffer = torch.empty(min(chunk, N), w.size(0), dtype=dtype, device=hidden.device)
        if needs_gradient:
            hidden_grad = torch.empty_like(hidden)
            # FSDP hands over weights in bf16; the sum over chunks would lose its small terms in that.
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
            bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, N, chunk):
                rows = slice(start, start + chunk)
                ignored = targets[rows, None] == IGNORE  # (n, 1)
                index = targets[rows, None].masked_fill(ignored, 0)  # (n, 1)
                # A position that does not count enters the products as zeros: cheaper than masking its logits.
                h = hidden[rows].to(dtype).masked_fill(ignored, 0)  # (n, C)

                out = buffer[: h.size(0)]
                logits = torch.mm(h, w.t(), out=out) if b is None else torch.addmm(b, h, w.t(), out=out)  # (n, V)
                target_logits = logits.gather(1, index).float()  # (n, 1), before they are overwritten
                # A GPU's kernel reads whole rows, whose length is a multiple of 64, several elements at once; a CPU's
                # is slowed down by comparing columns.
                seen = logits if logits.device.type == "cuda" else logits[:, :vocab_size]
                log_probs = softmax(seen, index, vocab_size, cap)  # (n, 1)
                loss -= log_probs.masked_fill(ignored, 0).sum()
                if not needs_gradient:
                    continue

                grad = logits  # (n, V), the softmax by now, which still lacks minus the one-hot
                grad[:, vocab_size:] = 0
                target_grad = torch.expm1(log_probs)  # p - 1 without cancellation, in fp32
                if cap.limit is not None:
                    target_grad *= cap.slope(cap(target_logits))
                each = torch.arange(grad.size(0), device=grad.device)
                grad[each, index[:, 0]] = target_grad[:, 0].to(dtype)  # scatter_ would copy all of it on a CPU
                hidden_grad[rows] = (grad @ w).masked_fill_(ignored, 0)
                weight_grad += grad.t() @ h
                if bias_grad is not None:
                    bias_grad += grad.masked_fill_(ignored, 0).sum(dim=0, dtype=torch.float32)
        if needs_gradient:
            ctx.save_for_backward(
                hidden_grad,
                weight_grad.to(weight.dtype),
                None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
            )
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        grads = (hidden_grad * loss_grad, weight_grad * loss_grad, None if bias_grad is None else bias_grad * loss_grad)
        return *grads, *[None] * 7
