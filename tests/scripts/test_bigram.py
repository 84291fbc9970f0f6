"""scripts/bigram.py: counts, exact training, the floor, and the GPT's loss against literal sums."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from repository import SHARED_DATA, load_script

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import CharTokenizer

pytest.importorskip("matplotlib")
SHAKESPEARE = SHARED_DATA / "tinyshakespeare.txt"
TEXT = "the cat sat on the mat. the rat sat on the cat.\n" * 20


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/bigram.py")


def encoded(text: str) -> tuple[CharTokenizer, torch.Tensor]:
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    return tokenizer, torch.tensor(tokenizer.encode(text))


def test_counts_and_losses_are_sums_over_pairs(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    counts = script.count_pairs(tokens, tokenizer.n_vocab)
    pairs = Counter(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))
    assert {(a, b): int(counts[a, b]) for a, b in counts.nonzero().tolist()} == dict(pairs)
    logits = torch.randn(tokenizer.n_vocab, tokenizer.n_vocab, dtype=torch.float64)
    expected = F.cross_entropy(logits[tokens[:-1]], tokens[1:])
    torch.testing.assert_close(script.mean_loss(counts, logits.log_softmax(dim=-1)), expected)
    n, first = len(tokens) - 1, Counter(tokens.tolist()[:-1])
    floor = -sum(c / n * math.log(c / first[a]) for (a, _), c in pairs.items())
    assert script.bigram_entropy(tokens, tokenizer.n_vocab) == pytest.approx(floor)
    shares = [count / len(tokens) for count in Counter(tokens.tolist()).values()]
    assert script.unigram_entropy(tokens, tokenizer.n_vocab) == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_nothing_is_below_the_floor_and_a_trained_mlp_comes_close(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    counts = script.count_pairs(tokens, tokenizer.n_vocab)
    floor = script.bigram_entropy(tokens, tokenizer.n_vocab)
    torch.manual_seed(0)
    for kind in (script.OneHotMLP, script.EmbeddingMLP):
        training = script.train_mlp(kind(tokenizer.n_vocab), counts, counts, 400, "adam", 0.05)
        loss = float(script.mean_loss(counts, training.log_probabilities))
        assert floor < loss < floor + 0.05
        assert training.overfitting is None


def test_the_best_step_is_kept_and_overfitting_named(script: ModuleType) -> None:
    """Trained on a text that says "ab", validated on one that says "ba": what is learned soon does harm."""
    tokenizer, tokens = encoded("the cat sat " * 5)
    _, others = encoded("tac eht tas " * 5)
    counts, val_counts = (script.count_pairs(part, tokenizer.n_vocab) for part in (tokens, others))
    torch.manual_seed(0)
    training = script.train_mlp(script.EmbeddingMLP(tokenizer.n_vocab), counts, val_counts, 200, "adam", 0.05)
    assert len(training.train_losses) == len(training.val_losses) == 201
    assert training.val_losses[training.best] == min(training.val_losses) < training.val_losses[-1] - 0.5
    kept = float(script.mean_loss(val_counts, training.log_probabilities))
    assert kept == pytest.approx(training.val_losses[training.best])
    assert f"it overfits: from step {training.best} to 200" in training.overfitting


def test_sgd_takes_gradient_descents_steps(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    counts = script.count_pairs(tokens, tokenizer.n_vocab)
    torch.manual_seed(0)
    model = script.OneHotMLP(tokenizer.n_vocab)
    before = model.outer.bias.detach().clone()
    loss = F.cross_entropy(model(tokens[:-1]), tokens[1:])
    (gradient,) = torch.autograd.grad(loss, [model.outer.bias])
    script.train_mlp(model, counts, counts, 1, "sgd", 0.3)
    torch.testing.assert_close(model.outer.bias.detach(), before - 0.3 * gradient)


def test_one_hot_times_linear_is_an_embedding(script: ModuleType) -> None:
    layer = script.OneHotMLP(13).inner
    tokens = torch.tensor([3, 0, 12])
    one_hot = F.one_hot(tokens, 13).float()
    torch.testing.assert_close(layer(one_hot), F.embedding(tokens, layer.weight.T) + layer.bias)


def test_greedy_text_goes_round(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    counts = script.count_pairs(tokens, tokenizer.n_vocab) + 1
    table = (counts / counts.sum(dim=1, keepdim=True)).log()
    text = script.draw_text(table, tokenizer, seed=0, start="the c", greedy=True)
    cycle = script.greedy_cycle(table, tokenizer, "the c")
    assert text.startswith("the c")
    assert cycle * 2 in text
    assert text == script.draw_text(table, tokenizer, seed=1, start="the c", greedy=True)
    assert text != script.draw_text(table, tokenizer, seed=1, start="the c")


def test_the_rows_get_better_in_order_and_repeat(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    state = torch.random.get_rng_state()
    args = script.parse(["text.txt", "--steps", "300"])
    rows, trainings, _ = script.baselines(tokens, tokens, tokenizer, args)
    assert torch.equal(torch.random.get_rng_state(), state)
    losses = [row.loss for row in rows]
    assert losses[0] == pytest.approx(math.log(tokenizer.n_vocab))
    assert losses[0] > losses[1] > max(losses[2:])
    assert [row.parameters for row in rows] == [0, 13, 169, 13 * 8 + 8 + 8 * 13 + 13, 13 * 8 + 8 * 8 + 8 + 8 * 13 + 13]
    assert rows == script.baselines(tokens, tokens, tokenizer, args)[0]
    assert [row.train_loss for row in rows] == losses
    for row, training in zip(rows[3:], trainings.values(), strict=True):
        assert row.loss == min(training.val_losses)
    assert set(rows[2].sample) <= set(tokenizer.chars)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
def test_a_gpts_loss_counts_every_token_but_the_first(script: ModuleType, length: int) -> None:
    tokenizer, tokens = encoded(TEXT[:length])
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tokenizer.n_vocab)).init_weights(0)
    total = 0.0
    with torch.no_grad():
        for start in range(0, length - 1, 16):
            part = tokens[start : start + 17]
            total += F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum").item()
    assert script.gpt_loss(model, tokens, batch_size=2) == pytest.approx(total / (length - 1), rel=1e-5)


def test_the_command_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, _ = encoded(TEXT)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tokenizer.n_vocab)).init_weights(0)
    (tmp_path / "model").mkdir()
    save_pretrained(tmp_path / "model", model.state_dict(), model.config, tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*words: str) -> str:
        out = ["--out", str(tmp_path / "plot.png"), "--steps", "20", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["bigram.py", *words, *out])
        assert script.main() == 0
        return capsys.readouterr().out

    table = run(str(tmp_path / "text.txt"), "--model", str(tmp_path / "model"))
    assert "| GPT, 1 layers × 16 |" in table
    assert table.count("\n| ") == (1 + 1 + 6) + (1 + 1 + 2)  # the models, the floors
    assert "when the input is 't' the target is 'h'" in table
    greedy = run(str(tmp_path / "text.txt"), "--greedy", "--start", "the ", "--characters", "500")
    assert "450 characters to train on, 50 to validate" in greedy
    assert greedy.count("| `the ") == 5
    assert "goes round for ever" in greedy
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "other.txt").write_text(TEXT.upper())
    for words, message in (
        ([str(tmp_path / "nowhere.txt")], "cannot read"),
        ([os.devnull], "it is not a plain file"),
        ([str(tmp_path / "other.txt"), "--model", str(tmp_path / "model")], "not trained on the characters"),
        ([str(tmp_path / "text.txt"), "--steps", "0"], "--steps is 0"),
        ([str(tmp_path / "text.txt"), "--lr", "-1"], "--lr is -1"),
        ([str(tmp_path / "text.txt"), "--characters", "5"], "--characters is 5; .* allows 100 to 960"),
        ([str(tmp_path / "text.txt"), "--start", "Q"], "'Q' not among the 13 characters"),
    ):
        monkeypatch.setattr(sys, "argv", ["bigram.py", "--out", str(tmp_path / "x.png"), "--device", "cpu", *words])
        with pytest.raises(UserError, match=message):
            script.main()
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="has 5 characters"):
        run(str(tmp_path / "short.txt"))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="TinyShakespeare is not on this machine")
def test_shakespeares_counted_losses(script: ModuleType) -> None:
    """Known values: 65 characters, log 65 = 4.174, and about 2.45 nats for a bigram."""
    text = SHAKESPEARE.read_text()
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    tokens = torch.tensor(tokenizer.encode(text))
    border = len(text) * 9 // 10
    rows, _, _ = script.baselines(tokens[:border], tokens[border:], tokenizer, script.parse(["x", "--steps", "1"]))
    assert [round(row.loss, 3) for row in rows[:3]] == [4.174, 3.347, 2.482]
    # The assignment's first 5,000 characters: letter frequencies, and the floor of bigrams.
    assert script.unigram_entropy(tokens[:5000], 65) == pytest.approx(3.193, abs=1e-3)
    assert script.bigram_entropy(tokens[:5000], 65) == pytest.approx(2.292, abs=1e-3)
