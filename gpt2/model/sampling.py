"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p, min-p and a repetition penalty."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import UserError


def seed_number(text: str) -> int:
    """A seed on a command line: from 0 to 2**63 - 1, as PyTorch's generators take."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return seed


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The filters apply in the order of the fields, as in `transformers`.

    Raises:
        UserError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens already in the text, multiplies the negative (Keskar et al. 2019)."""
    temperature: float = 1.0
    """Divides logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens (Fan et al. 2018), and those as likely as the k-th."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach probability p (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float | None = None
    """Only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {rule}")

        # Outside of these limits fp32 overflows: to logits of NaN, which are no choice.
        require(1e-3 <= self.repetition_penalty <= 1e3, "repetition_penalty", "from 0.001 to 1000 (1: none)")
        rule = "0 (the likeliest token) or from 1e-6 to 1e6"
        require(self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "temperature", rule)
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "between 0 and 1")


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V), fp32, after all of `sampling`; tokens that it excludes have -inf.

    Args:
        logits: (B, V).
        sampling: what to apply; a temperature of 0 is left to `choose`.
        seen: (B, V) bool, tokens already in each text; needed for a repetition penalty.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # of all likelier tokens; 0 for the likeliest
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, float("-inf"))
    if sampling.min_p is not None:
        probabilities = logits.softmax(dim=-1)
        likeliest = probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < sampling.min_p * likeliest, float("-inf"))
    return logits


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int) -> None:
    """Refuse what no model can continue.

    Raises:
        UserError: no prompt, an empty one, an id outside the vocabulary, or nothing to add.
    """
    if not prompts:
        raise UserError("there is no prompt to continue")
    for prompt in prompts:
        if len(prompt) == 0:
            raise UserError("a prompt is empty; give it at least one token, such as end-of-text to begin a document")
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} in a prompt is outside the model's vocabulary of {vocab_size}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


def row_generators(seed: int, rows: int, device: torch.device) -> list[torch.Generator]:
    """One random generator per row, so that what a row draws does not depend on how many others there are."""
    seeds = torch.Generator().manual_seed(seed)
    return [
        torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=seeds).item())) for _ in range(rows)
    ]


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, (B,) ids.

    Args:
        logits: (B, V) of `filter_logits`.
        sampling: only its temperature matters here.
        generators: B of `row_generators`; not advanced at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # The largest p / e with e ~ Exponential(1) is a draw from p, and needs no sum over the vocabulary.
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)
