"""What the HellaSwag tests share: examples that exercise every convention, real ones where they are, and an oracle."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from repository import SHARED_DATA

from gpt2.config import GPTConfig
from gpt2.hellaswag.examples import Example, parse_file
from gpt2.hellaswag.rows import Convention, render
from gpt2.model.gpt import GPT
from gpt2.tokens.tokenizer import GPT2Tokenizer

REAL = SHARED_DATA / "hellaswag_val.jsonl"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=f"the real validation split is not at {REAL}")

SHAPES = {
    "gpt2": GPTConfig(n_layer=2, n_head=2, n_embd=32),
    # Rotary positions, windows and shared keys must not notice that endings share a row.
    "variant": GPTConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        position="rope",
        window=12,
        norm="rmsnorm",
        qk_norm=True,
        tie_embeddings=False,
        logit_softcap=8.0,
    ),
    "short": GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=24),
}


def make_examples(n: int, seed: int = 0) -> tuple[Example, ...]:
    """Invented examples with the marks, lengths and odd spaces of the real ones."""
    draw = random.Random(seed)
    words = [
        "a",
        "man",
        "is",
        "sitting",
        "on",
        "the",
        "roof",
        "pulling",
        "up",
        "smiles",
        "café",
        "3",
        ",",
        '"',
        "don't",
    ]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    examples = []
    for i in range(n):
        ctx_a, ctx_b = text(3, 30) + ".", draw.choice(["", "he", "the lady"])
        if i % 3 == 0:
            ctx_a = f"[header] How to {ctx_a} [title] {text(2, 5)} [step] {text(2, 9)}."
        if i % 3 == 1:
            ctx_a, ctx_b = f"{ctx_a} [step]", ""  # leaves a space at the end once it is deleted
        endings = tuple(draw.choice(["", "", "[substeps] "]) + text(1, 20) + draw.choice([".", ""]) for _ in range(4))
        examples.append(Example(i, text(1, 3), ctx_a, ctx_b, f"{ctx_a} {ctx_b}".rstrip(), endings, draw.randrange(4)))
    return tuple(examples)


def real_examples(n: int) -> tuple[Example, ...]:
    """Every k-th of the real ones."""
    examples = parse_file(REAL)
    return examples[:: len(examples) // n][:n]


def make_model(config: GPTConfig, scale: float = 8.0) -> GPT:
    """Random weights, large enough that predictions are far from ties."""
    model = GPT(config).init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= scale
    return model.eval()


@torch.no_grad()
def naive_log_probs(
    model: GPT, examples: tuple[Example, ...], tokenizer: GPT2Tokenizer, convention: Convention
) -> np.ndarray:
    """The definition: each ending a row of its own, without padding, in fp32. (examples, 4)."""
    block_size = model.config.block_size
    sums = []
    for example in examples:
        context, continuations = render(example, convention)
        for continuation in map(tokenizer.encode, continuations):
            row = (tokenizer.encode(context) + continuation)[-(block_size + 1) :]
            hidden = model.hidden(torch.tensor([row[:-1]]))[0]  # (T, C)
            log_probs = model.logits(hidden[-len(continuation) :]).log_softmax(-1)  # (m, V)
            targets = torch.tensor(row[1:][-len(continuation) :])  # (m,)
            sums.append(log_probs.gather(1, targets[:, None]).double().sum().item())
    return np.array(sums).reshape(-1, 4)
