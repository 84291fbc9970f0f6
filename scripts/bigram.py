"""What the loss of a language model is made of: baselines that know one character or none, beside a GPT.

python scripts/bigram.py tinyshakespeare.txt
python scripts/bigram.py tinyshakespeare.txt --model runs/shakespeare-char --out bigram.png

The first 90 % of the text train, the rest validates; losses are nats a character. A bigram model sees one character
and predicts the next, so all it can learn of a text is how often each character follows each: a table of counts. With
that table the MLPs here are trained exactly, on the whole text in every step.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.distributed.world import pick_device
from gpt2.errors import UserError, run_cli
from gpt2.figures import save_figure
from gpt2.generation.generate import generate
from gpt2.model.gpt import GPT, load_pretrained
from gpt2.model.loss import IGNORE
from gpt2.model.sampling import row_generators, seed_number
from gpt2.tokens.tokenizer import CharTokenizer

HIDDEN = 8
MAX_VOCABULARY = 4096


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("text", type=Path, help="a text file, UTF-8")
    add("--model", help="a GPT over the same characters to put beside them: a run of train_gpt2.py shakespeare-char")
    add("--steps", type=int, default=1500, help="of training the MLPs [1500]")
    add("--seed", type=seed_number, default=0, help="of their weights and the samples [0]")
    add("--out", type=Path, default=Path("bigram.png"), metavar="FILE", help="the plot [bigram.png]")
    add("--device", default="auto", help="for the GPT: auto, cuda, mps or cpu [auto]")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    return args


@dataclass(frozen=True)
class Baseline:
    """A row of the table."""

    name: str
    parameters: int
    loss: float
    """On the validation split, nats a character."""
    sample: str


def count_pairs(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often b follows a in (N,) ids: (V, V), fp64."""
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double()


def mean_loss(counts: Tensor, log_probabilities: Tensor) -> Tensor:
    """Cross-entropy over counted pairs, nats a pair, of log p(b | a), both (V, V) or the latter (V,)."""
    return -(counts * log_probabilities).sum() / counts.sum()


def entropy_floor(counts: Tensor) -> float:
    """Conditional entropy H(next | current) of counted pairs: no bigram model has a lower loss on that text."""
    probabilities = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return float(-(counts * probabilities.clamp(min=1e-300).log()).sum() / counts.sum())


class OneHotMLP(nn.Module):
    """Two linear layers over one-hot characters: 1 of V, to 8, LeakyReLU, to V logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.inner, self.outer = nn.Linear(vocab_size, HIDDEN), nn.Linear(HIDDEN, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) ids to (N, V) logits."""
        one_hot = F.one_hot(tokens, self.vocab_size).float()  # (N, V): a product with it picks a column of weights
        logits: Tensor = self.outer(F.leaky_relu(self.inner(one_hot)))
        return logits


class EmbeddingMLP(nn.Module):
    """The same over a learned embedding: 8 numbers a character, to 8, LeakyReLU, to V logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, HIDDEN)
        self.inner, self.outer = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) ids to (N, V) logits."""
        logits: Tensor = self.outer(F.leaky_relu(self.inner(self.embedding(tokens))))
        return logits


def train_mlp(model: nn.Module, counts: Tensor, steps: int) -> Tensor:
    """Minimise the loss over all counted pairs with Adam; returns log p(b | a), (V, V).

    Args:
        model: (N,) ids to (N, V) logits.
        counts: (V, V) of the training split.
        steps: how many, with a learning rate that falls from 0.05 to 0.
    """
    tokens = torch.arange(len(counts))
    weights = counts.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        loss = mean_loss(weights, model(tokens).log_softmax(dim=-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(tokens).double().log_softmax(dim=-1)


def draw_text(log_probabilities: Tensor, tokenizer: CharTokenizer, seed: int, length: int = 48) -> str:
    """A text from log p(b | a), beginning behind the vocabulary's first character."""
    (generator,) = row_generators(seed, 1, torch.device("cpu"))
    tokens = [0]
    for _ in range(length):
        row = log_probabilities[tokens[-1]].exp()
        tokens.append(int(torch.multinomial(row, 1, generator=generator)))
    return tokenizer.decode(tokens[1:])


@torch.no_grad()
def gpt_loss(model: GPT, tokens: Tensor, batch_size: int = 16) -> float:
    """Mean loss of a GPT over (N,) ids cut into blocks of its context, nats; every token but the first counts."""
    block_size, device = model.config.block_size, model.wte.weight.device
    count = -(-(len(tokens) - 1) // block_size)
    inputs = F.pad(tokens[:-1], (0, count * block_size - len(tokens) + 1)).view(count, block_size)
    targets = F.pad(tokens[1:], (0, count * block_size - len(tokens) + 1), value=IGNORE).view(count, block_size)
    total = 0.0
    for rows in range(0, count, batch_size):
        part = slice(rows, rows + batch_size)
        total += model(inputs[part].to(device), targets[part].to(device)).item()
    return total / (len(tokens) - 1)


def baselines(train: Tensor, val: Tensor, tokenizer: CharTokenizer, steps: int, seed: int) -> list[Baseline]:
    """Train and measure every model that sees at most one character.

    Args:
        train: (N,) ids.
        val: (M,) ids.
        tokenizer: the vocabulary of both.
        steps: how long an MLP is trained.
        seed: draws their weights and the samples.
    """
    V = tokenizer.n_vocab
    counts, val_counts = count_pairs(train, V), count_pairs(val, V)
    smooth = counts + 1  # so that no pair is impossible (Laplace)
    unigram = torch.bincount(train, minlength=V).double() + 1
    rows = {
        "uniform": (0, torch.full((V, V), -math.log(V), dtype=torch.float64)),
        "unigram": (V, (unigram / unigram.sum()).log().expand(V, V)),
        "bigram, counted": (V * V, (smooth / smooth.sum(dim=1, keepdim=True)).log()),
    }
    for name, kind in (("bigram, MLP over one-hot", OneHotMLP), ("bigram, MLP over embedding", EmbeddingMLP)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind(V)
        rows[name] = sum(p.numel() for p in model.parameters()), train_mlp(model, counts, steps)
    return [
        Baseline(name, parameters, float(mean_loss(val_counts, table)), draw_text(table, tokenizer, seed))
        for name, (parameters, table) in rows.items()
    ]


def gpt_baseline(spec: str, val: Tensor, tokenizer: CharTokenizer, seed: int, device: str) -> Baseline:
    """The row of a trained GPT. UserError where it was trained on other characters."""
    model, its = load_pretrained(spec, pick_device(device))
    if not isinstance(its, CharTokenizer) or its.chars != tokenizer.chars:
        raise UserError(f"{spec} was not trained on the characters of this text; train it with shakespeare-char")
    tokens = generate(model, [[0]], max_new_tokens=48, seed=seed)[0]
    name = f"GPT, {model.config.n_layer} layers × {model.config.n_embd}"
    return Baseline(name, model.num_parameters(), gpt_loss(model, val), tokenizer.decode(tokens))


def plot(rows: Sequence[Baseline], floor: float, out: Path) -> None:
    """Validation losses as bars, the floor of all bigram models as a line, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    bars = ax.barh([row.name for row in rows], [row.loss for row in rows], color="tab:blue")
    ax.bar_label(bars, fmt="%.3f", padding=3)
    ax.axvline(floor, color="tab:red", lw=1, ls="--", label=f"entropy floor of bigrams {floor:.3f}")
    ax.invert_yaxis()
    ax.set_xlim(0, max(row.loss for row in rows) * 1.12)
    ax.set_xlabel("validation loss, nats a character")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, out)


def main() -> int:
    """Train, print the table, draw the plot."""
    args = parse(sys.argv[1:])
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {args.text}: {error}") from None
    if len(text) < 100:
        raise UserError(f"{args.text} has {len(text)} characters; at least 100 are needed for two splits")
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    if tokenizer.n_vocab > MAX_VOCABULARY:
        raise UserError(
            f"{args.text} has {tokenizer.n_vocab} distinct characters; at most {MAX_VOCABULARY} fit a table"
        )
    tokens = torch.tensor(tokenizer.encode(text))
    border = len(text) * 9 // 10
    train, val = tokens[:border], tokens[border:]
    floor = entropy_floor(count_pairs(val, tokenizer.n_vocab))

    rows = baselines(train, val, tokenizer, args.steps, args.seed)
    if args.model:
        rows.append(gpt_baseline(args.model, val, tokenizer, args.seed, args.device))
    print(f"{len(train):,} characters to train on, {len(val):,} to validate, {tokenizer.n_vocab} distinct")
    print(f"\n| model | parameters | validation loss | perplexity | sample |\n|{' --- |' * 5}")
    for row in rows:
        sample = "`" + row.sample.replace("\n", "↵").replace("|", "¦").replace("`", "'") + "`"
        print(f"| {row.name} | {row.parameters:,} | {row.loss:.4f} | {math.exp(row.loss):.2f} | {sample} |")
    print(f"\nEntropy floor of bigrams on the validation split: {floor:.4f} nats. The plot is {args.out}.")
    plot(rows, floor, args.out)
    return 0


if __name__ == "__main__":
    run_cli(main)
