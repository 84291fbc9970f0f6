"""scripts/bigram.py: counts, exact training, the floor, and the GPT's loss against literal sums."""

from __future__ import annotations

import math
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
    assert script.entropy_floor(counts) == pytest.approx(floor)


def test_nothing_is_below_the_floor_and_a_trained_mlp_comes_close(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    counts = script.count_pairs(tokens, tokenizer.n_vocab)
    floor = script.entropy_floor(counts)
    torch.manual_seed(0)
    for kind in (script.OneHotMLP, script.EmbeddingMLP):
        loss = float(script.mean_loss(counts, script.train_mlp(kind(tokenizer.n_vocab), counts, 400)))
        assert floor < loss < floor + 0.05


def test_the_rows_get_better_in_order_and_repeat(script: ModuleType) -> None:
    tokenizer, tokens = encoded(TEXT)
    state = torch.random.get_rng_state()
    rows = script.baselines(tokens, tokens, tokenizer, steps=300, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    losses = [row.loss for row in rows]
    assert losses[0] == pytest.approx(math.log(tokenizer.n_vocab))
    assert losses[0] > losses[1] > max(losses[2:])
    assert [row.parameters for row in rows] == [0, 13, 169, 13 * 8 + 8 + 8 * 13 + 13, 13 * 8 + 8 * 8 + 8 + 8 * 13 + 13]
    assert rows == script.baselines(tokens, tokens, tokenizer, steps=300, seed=0)
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
    assert table.count("\n| ") == 1 + 1 + 6
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "other.txt").write_text(TEXT.upper())
    for words, message in (
        ([str(tmp_path / "nowhere.txt")], "cannot read"),
        ([str(tmp_path / "other.txt"), "--model", str(tmp_path / "model")], "not trained on the characters"),
        ([str(tmp_path / "text.txt"), "--steps", "0"], "--steps is 0"),
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
    rows = script.baselines(tokens[:border], tokens[border:], tokenizer, steps=1, seed=0)
    assert [round(row.loss, 3) for row in rows[:3]] == [4.174, 3.347, 2.482]
