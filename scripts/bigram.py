"""What the loss of a language model is made of: baselines that know one character or none, beside a GPT.

python scripts/bigram.py tinyshakespeare.txt
python scripts/bigram.py tinyshakespeare.txt --model runs/shakespeare-char --out bigram.png
python scripts/bigram.py tinyshakespeare.txt --characters 5000 --optimizer sgd --lr 0.01 --steps 5000
python scripts/bigram.py tinyshakespeare.txt --start "ROMEO:" --greedy

The first 90 % of the text train, the rest validates; losses are nats per character. A bigram model sees one character
and predicts the next, so all it can learn of a text is how often each character follows each: a table of counts. With
that table the MLPs here are trained exactly, on the whole text in every step. Each is shown as it was at the step of
its lowest validation loss, and where it then became worse, overfitting is named.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.distributed.world import pick_device
from gpt2.errors import ArgumentParser, UserError, run_cli, visible
from gpt2.figures import check_picture, save_figure
from gpt2.files import open_plain, user_path
from gpt2.generation.generate import generate
from gpt2.model.gpt import GPT, load_pretrained
from gpt2.model.loss import IGNORE
from gpt2.model.sampling import row_generators, seed_number
from gpt2.tokens.tokenizer import CharTokenizer

HIDDEN = 8
SAMPLE_LENGTH = 48
FIRST_PAIRS = 8
MAX_VOCABULARY = 4096
LEARNING_RATES = {"adam": 0.05, "sgd": 0.5}
OVERFITTING = 0.01
"""Nats by which a validation loss must have risen from its lowest to be called that."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("text", type=user_path, help="a text file, UTF-8")
    add("--model", help="a GPT over the same characters to put beside them: a run of train_gpt2.py shakespeare-char")
    add("--characters", type=int, metavar="N", help="use only the first N of the text [all]")
    add("--steps", type=int, default=1500, help="of training the MLPs [1500]")
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="of the MLPs [adam]")
    add("--lr", type=float, help="learning rate: adam's falls linearly to 0, sgd's is constant [0.05, sgd 0.5]")
    add("--start", default="", metavar="TEXT", help="what the samples continue [the first character there is]")
    add("--greedy", action="store_true", help="let the samples take the likeliest character instead of drawing")
    add("--seed", type=seed_number, default=0, help="of their weights and the samples [0]")
    add("--out", type=user_path, default=Path("bigram.png"), metavar="FILE", help="the plot [bigram.png]")
    add("--device", default="auto", help="for the GPT: auto, cuda, mps or cpu [auto]")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr is {args.lr}; it must be above 0")
    check_picture(args.out, "--out")
    return args


@dataclass(frozen=True)
class Baseline:
    """A row of the table."""

    name: str
    parameters: int
    train_loss: float
    """On the training split, nats per character; a GPT's on as many characters of it as validate."""
    loss: float
    """On the validation split."""
    sample: str


@dataclass(frozen=True)
class Training:
    """How an MLP was trained.

    Attributes:
        log_probabilities: log p(b | a) at the best step, (V, V).
        best: that step; 0 is before the first.
        train_losses: before every step and after the last, nats per character.
        val_losses: likewise.
    """

    log_probabilities: Tensor
    best: int
    train_losses: list[float]
    val_losses: list[float]

    @property
    def overfitting(self) -> str | None:
        """What became of the losses after the best step; None where validation did not get worse."""
        first, last = self.val_losses[self.best], self.val_losses[-1]
        if last - first < OVERFITTING:
            return None
        return (
            f"it overfits: from step {self.best} to {len(self.val_losses) - 1} its training loss fell from "
            f"{self.train_losses[self.best]:.4f} to {self.train_losses[-1]:.4f}, but its validation loss rose from "
            f"{first:.4f} to {last:.4f}. The table shows step {self.best}."
        )


def count_pairs(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often b follows a in (N,) ids: (V, V), fp64."""
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double()


def mean_loss(counts: Tensor, log_probabilities: Tensor) -> Tensor:
    """Cross-entropy over counted pairs, nats per pair, of log p(b | a), both (V, V) or the latter (V,)."""
    return -(counts * log_probabilities).sum() / counts.sum()


def unigram_entropy(tokens: Tensor, vocab_size: int) -> float:
    """Entropy of the frequencies of (N,) ids, nats: no model that looks at nothing has a lower loss on them."""
    counts = torch.bincount(tokens, minlength=vocab_size).double()
    return float(-(torch.xlogy(counts, counts / counts.sum())).sum() / counts.sum())


def bigram_entropy(tokens: Tensor, vocab_size: int) -> float:
    """Conditional entropy H(next | current) in (N,) ids, nats: no bigram model has a lower loss on them."""
    counts = count_pairs(tokens, vocab_size)
    probabilities = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return float(-torch.xlogy(counts, probabilities).sum() / counts.sum())


class OneHotMLP(nn.Module):
    """Two linear layers over one-hot characters: 1 of V, to 8, LeakyReLU, to V logits.

    The product of a weight matrix with a one-hot vector is one column of the matrix, so the first layer *is* an
    embedding of 8 numbers per character (and a bias), computed the long way: V multiplications for each number, all
    but one of them by 0.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.inner, self.outer = nn.Linear(vocab_size, HIDDEN), nn.Linear(HIDDEN, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) ids to (N, V) logits."""
        one_hot = F.one_hot(tokens, self.vocab_size).float()  # (N, V)
        logits: Tensor = self.outer(F.leaky_relu(self.inner(one_hot)))
        return logits


class EmbeddingMLP(nn.Module):
    """The same over a learned embedding: 8 numbers per character, to 8, LeakyReLU, to V logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, HIDDEN)
        self.inner, self.outer = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) ids to (N, V) logits."""
        logits: Tensor = self.outer(F.leaky_relu(self.inner(self.embedding(tokens))))
        return logits


def train_mlp(
    model: nn.Module, counts: Tensor, val_counts: Tensor, steps: int, optimizer: str, lr: float, name: str = "MLP"
) -> Training:
    """Minimise the loss over all counted pairs of the training split, measuring both splits' at every step.

    Args:
        model: (N,) ids to (N, V) logits.
        counts: (V, V) of the training split.
        val_counts: (V, V) of the validation split.
        steps: training steps.
        optimizer: "adam", whose learning rate falls linearly to 0, or "sgd", whose rate is constant.
        lr: the first learning rate.
        name: said while it takes long.
    """
    tokens, weights = torch.arange(len(counts)), counts.float()
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    update = kind(model.parameters(), lr=lr)
    train_losses: list[float] = []
    val_losses: list[float] = []
    best, table = 0, torch.empty(0)
    shown = time.monotonic()
    for step in range(steps + 1):
        log_probabilities = model(tokens).log_softmax(dim=-1)  # (V, V)
        loss = mean_loss(weights, log_probabilities)
        exact = log_probabilities.detach().double()
        train_losses.append(float(mean_loss(counts, exact)))
        val_losses.append(float(mean_loss(val_counts, exact)))
        if step == 0 or val_losses[-1] < val_losses[best]:
            best, table = step, exact
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            losses = f"training {train_losses[-1]:.4f}, validation {val_losses[-1]:.4f}"
            print(f"{name}: step {step} of {steps}, {losses}", file=sys.stderr, flush=True)
        if step == steps:
            break
        if optimizer == "adam":
            for group in update.param_groups:
                group["lr"] = lr * (1 - step / steps)
        update.zero_grad()
        loss.backward()
        update.step()
    return Training(table, best, train_losses, val_losses)


def draw_text(
    log_probabilities: Tensor, tokenizer: CharTokenizer, seed: int, start: str = "", greedy: bool = False
) -> str:
    """What log p(b | a) writes behind `start`, or where that is empty behind the vocabulary's first character."""
    (generator,) = row_generators(seed, 1, torch.device("cpu"))
    tokens = [(tokenizer.encode(start) or [0])[-1]]
    for _ in range(SAMPLE_LENGTH):
        row = log_probabilities[tokens[-1]].exp()
        tokens.append(int(row.argmax() if greedy else torch.multinomial(row, 1, generator=generator)))
    return start + tokenizer.decode(tokens[1:])


def greedy_cycle(log_probabilities: Tensor, tokenizer: CharTokenizer, start: str) -> str:
    """The characters that greedy choice repeats for ever behind `start`, such as "e t" → "e the the"."""
    seen = [(tokenizer.encode(start) or [0])[-1]]
    while (following := int(log_probabilities[seen[-1]].argmax())) not in seen:
        seen.append(following)
    return tokenizer.decode(seen[seen.index(following) :])


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


def baselines(
    train: Tensor, val: Tensor, tokenizer: CharTokenizer, args: argparse.Namespace
) -> tuple[list[Baseline], dict[str, Training], Tensor]:
    """Train and measure every model that sees at most one character.

    Args:
        train: (N,) ids.
        val: (M,) ids.
        tokenizer: tokenizer of both texts.
        args: the parsed command line.

    Returns:
        The table's rows, how each MLP was trained, and the counted bigrams' log p(b | a).
    """
    V = tokenizer.n_vocab
    counts, val_counts = count_pairs(train, V), count_pairs(val, V)
    smooth = counts + 1  # so that no pair is impossible (Laplace)
    unigram = torch.bincount(train, minlength=V).double() + 1
    counted = (smooth / smooth.sum(dim=1, keepdim=True)).log()
    rows = {
        "uniform": (0, torch.full((V, V), -math.log(V), dtype=torch.float64)),
        "unigram": (V, (unigram / unigram.sum()).log().expand(V, V)),
        "bigram, counted": (V * V, counted),
    }
    trainings = {}
    for name, kind in (("bigram, MLP over one-hot", OneHotMLP), ("bigram, MLP over embedding", EmbeddingMLP)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model = kind(V)
        trainings[name] = train_mlp(model, counts, val_counts, args.steps, args.optimizer, args.lr, name)
        rows[name] = sum(p.numel() for p in model.parameters()), trainings[name].log_probabilities
    measured = [
        Baseline(
            name,
            parameters,
            float(mean_loss(counts, table)),
            float(mean_loss(val_counts, table)),
            draw_text(table, tokenizer, args.seed, args.start, args.greedy),
        )
        for name, (parameters, table) in rows.items()
    ]
    return measured, trainings, counted


def gpt_baseline(train: Tensor, val: Tensor, tokenizer: CharTokenizer, args: argparse.Namespace) -> Baseline:
    """The row of a trained GPT. UserError where it was trained on other characters."""
    model, its = load_pretrained(args.model, pick_device(args.device))
    if not isinstance(its, CharTokenizer) or its.chars != tokenizer.chars:
        raise UserError(f"{args.model} was not trained on the characters of this text; train it with shakespeare-char")
    prompt = tokenizer.encode(args.start) or [0]
    temperature = 0.0 if args.greedy else 1.0
    tokens = generate(model, [prompt], max_new_tokens=SAMPLE_LENGTH, temperature=temperature, seed=args.seed)[0]
    name, text = f"GPT, {model.config.n_layer} layers × {model.config.n_embd}", args.start + tokenizer.decode(tokens)
    return Baseline(name, model.num_parameters(), gpt_loss(model, train[: len(val)]), gpt_loss(model, val), text)


def plot(rows: Sequence[Baseline], trainings: dict[str, Training], floors: dict[str, float], out: Path) -> None:
    """Both splits' losses as bars and over the MLPs' steps, with the floors of all bigram models as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, max(4.2, 0.6 * len(rows) + 1)), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for offset, split, color in ((-0.2, "training", "#9db8dd"), (0.2, "validation", "#1f6feb")):
        values = [row.train_loss if split == "training" else row.loss for row in rows]
        bars = left.barh([place + offset for place in range(len(rows))], values, 0.38, color=color, label=split)
        left.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.invert_yaxis()
    left.set_xlim(0, max(max(row.loss, row.train_loss) for row in rows) * 1.12)
    left.set_xlabel("nats per character")
    for (name, training), color in zip(trainings.items(), ("#d1433f", "#1d8a4f"), strict=True):
        right.plot(training.train_losses, color=color, alpha=0.5, linewidth=1, label=f"{name}, training")
        right.plot(training.val_losses, color=color, linewidth=1.8, label=f"{name}, validation")
        right.plot(training.best, training.val_losses[training.best], "o", color=color)
    right.set_xlabel("step; the dot is the lowest validation loss")
    for ax in (left, right):
        draw = ax.axvline if ax is left else ax.axhline
        for (split, floor), dashes in zip(floors.items(), (":", "--"), strict=True):
            draw(floor, color="#5d6675", lw=1, ls=dashes, label=f"floor of bigrams, {split} {floor:.3f}")
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=8)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=8)
    save_figure(figure, out)


def read_text(path: Path, characters: int | None) -> str:
    """The text to study; UserError where it cannot be read or is too short."""
    try:
        text = io.TextIOWrapper(open_plain(path), "utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if characters is not None and not 100 <= characters <= len(text):
        raise UserError(f"--characters is {characters}; {path} allows 100 to {len(text)}")
    text = text[:characters]
    if len(text) < 100:
        raise UserError(f"{path} has {len(text)} characters; at least 100 are needed for two splits")
    return text


def shown(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return "`" + visible(text.replace("\n", "↵").replace("|", "¦").replace("`", "'")) + "`"


def main() -> int:
    """Train, print the table, draw the plot."""
    args = parse(sys.argv[1:])
    text = read_text(args.text, args.characters)
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    V = tokenizer.n_vocab
    if V > MAX_VOCABULARY:
        raise UserError(f"{args.text} has {V} distinct characters; at most {MAX_VOCABULARY} fit a table")
    tokenizer.encode(args.start)  # refuses characters the text lacks
    tokens = torch.tensor(tokenizer.encode(text))
    border = len(text) * 9 // 10
    train, val = tokens[:border], tokens[border:]
    floors = {"training": bigram_entropy(train, V), "validation": bigram_entropy(val, V)}

    print(f"{len(train):,} characters to train on, {len(val):,} to validate, {V} distinct")
    print("\nThe first pairs that a bigram model learns from:")
    for current, following in itertools.pairwise(text[: FIRST_PAIRS + 1]):
        print(f"  when the input is {current!r} the target is {following!r}")

    rows, trainings, counted = baselines(train, val, tokenizer, args)
    if args.model:
        rows.append(gpt_baseline(train, val, tokenizer, args))
    bits = len(val) / len(text[border:].encode()) / math.log(2)
    head = "model | parameters | training loss | validation loss | bits per byte | perplexity | sample"
    print(f"\n| {head} |\n|{' --- |' * 7}")
    for row in rows:
        losses = f"{row.train_loss:.4f} | {row.loss:.4f} | {row.loss * bits:.4f} | {math.exp(row.loss):.2f}"
        print(f"| {row.name} | {row.parameters:,} | {losses} | {shown(row.sample)} |")
    print("\nFloors, entropies of the text itself (knowing nothing costs " + f"ln {V} = {math.log(V):.4f}):")
    print(f"\n| nats per character | training split | validation split | whole text |\n|{' --- |' * 4}")
    for name, floor in (("letter frequencies", unigram_entropy), ("bigrams", bigram_entropy)):
        print(f"| {name} | " + " | ".join(f"{floor(part, V):.4f}" for part in (train, val, tokens)) + " |")
    print("\nNo model that knows one character, or none, comes below its floor on the text that the floor is of.")
    for name, training in trainings.items():
        if (told := training.overfitting) is not None:
            print(f"{name}: {told}")
        elif training.best < args.steps:
            print(f"{name}: lowest validation loss at step {training.best} of {args.steps}; it did not overfit.")
    if args.greedy:
        cycle = greedy_cycle(counted, tokenizer, args.start)
        print(
            f"Greedy bigrams repeat themselves: the likeliest next character depends on the last one alone, so as soon "
            f"as a character comes again, so does all that followed it. Here {shown(cycle)} goes round for ever."
        )
    plot(rows, trainings, floors, args.out)
    print(f"The plot is {args.out}.")
    return 0


if __name__ == "__main__":
    run_cli(main)
