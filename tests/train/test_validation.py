"""Validation loss: the same tokens however they are batched and shared."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ALONE
from torch.nn import functional as F

from gpt2.config import GPTConfig
from gpt2.distributed.world import World
from gpt2.model.gpt import GPT
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer
from gpt2.train.validation import count_val_blocks, count_val_bytes, validation_loss


@pytest.fixture
def val(char_data: Path) -> Blocks:
    return Blocks(open_dataset(char_data).val, block_size=16, vocab_size=59)  # 93 blocks of 1,500 tokens


@pytest.fixture
def model() -> GPT:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=59, dropout=0.5)
    return GPT(config).init_weights(0).train()


def written_out(model: GPT, val: Blocks, blocks: int) -> float:
    """Mean over the first `blocks` blocks, one at a time."""
    model.eval()
    sums = []
    for start in range(0, 16 * blocks, 16):
        tokens = torch.from_numpy(val.stream.read(start, start + 17).astype(np.int64))[None]
        with torch.no_grad():
            sums.append(F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum").double())
    model.train()
    return torch.stack(sums).sum().item() / (16 * blocks)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 7, 93, 200])
@pytest.mark.parametrize(("val_tokens", "blocks"), [(160, 10), (175, 10), (10**9, 93), (1, 1)])
def test_any_batch_gives_the_same(model: GPT, val: Blocks, micro_batch_size: int, val_tokens: int, blocks: int) -> None:
    assert count_val_blocks(val, val_tokens) == blocks
    found = validation_loss(model, val, val_tokens, micro_batch_size, ALONE, nullcontext)
    assert found == pytest.approx(written_out(model, val, blocks), abs=2e-6)
    assert model.training


def test_any_number_of_processes_gives_the_same(model: GPT, val: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each rank's part, added up by hand; that real processes add up too is test_train_ranks.py's matter.
    whole = validation_loss(model, val, 10**9, 4, ALONE, nullcontext)
    monkeypatch.setattr(World, "sum_", lambda self, tensor: tensor)
    monkeypatch.setattr(World, "agree", lambda self, work: work())
    parts = [
        validation_loss(model, val, 10**9, 4, World(rank, rank, 5, torch.device("cpu")), nullcontext)
        for rank in range(5)
    ]
    assert sum(parts) == pytest.approx(whole, abs=1e-6)
    assert len(set(parts)) == 5


DOCUMENTS = ["naïve café 👩‍👩‍👧 你好", "", "It's <|endoftext|> as text.\n", "plain words " * 40]


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("read_tokens", [3, 2**20])
def test_bytes_are_those_of_the_decoded_targets(
    tmp_path: Path, suffix: str, read_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a peer's directory, which has no manifest; characters cut by a token's edge count by their bytes."""
    monkeypatch.setattr("gpt2.train.validation._READ_TOKENS", read_tokens)
    tokenizer = gpt2_tokenizer()
    tokens = [token for text in DOCUMENTS for token in (tokenizer.eot_token, *tokenizer.encode(text))]
    write_dataset(tmp_path, tokens, tokens, tokenizer, suffix=suffix)
    (tmp_path / "manifest.json").unlink()
    blocks = Blocks(open_dataset(tmp_path).val, block_size=8, vocab_size=tokenizer.n_vocab)
    for val_tokens in (8, 40, 10**9):
        targets = tokens[1 : count_val_blocks(blocks, val_tokens) * 8 + 1]
        expected = len(tokenizer.decode_bytes([token for token in targets if token != tokenizer.eot_token]))
        assert count_val_bytes(blocks, val_tokens, tokenizer) == expected


def test_bits_per_byte_equal_their_definition_for_any_tokenizer(tmp_path: Path) -> None:
    """A model that finds every byte of an ASCII text equally likely has 8 bits per byte, in any tokens."""
    text = "".join(map(chr, range(32, 127))) * 9
    for tokenizer in (CharTokenizer("".join(sorted(set(text)))), gpt2_tokenizer()):
        tokens = tokenizer.encode(text)
        write_dataset(tmp_path / tokenizer.name, tokens, tokens, tokenizer)
        blocks = Blocks(open_dataset(tmp_path / tokenizer.name).val, block_size=8, vocab_size=tokenizer.n_vocab)

        class EightBitsPerByte(torch.nn.Module):
            def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                counted = [token for token in targets.flatten().tolist() if token >= 0]
                return torch.tensor(8 * np.log(2) * len(tokenizer.decode_bytes(counted)), dtype=torch.float64)  # noqa: B023

        nats = validation_loss(EightBitsPerByte(), blocks, 10**9, 4, ALONE, nullcontext)
        total_nats = nats * count_val_blocks(blocks, 10**9) * 8
        bits = total_nats / np.log(2) / count_val_bytes(blocks, 10**9, tokenizer)
        assert bits == pytest.approx(8, abs=1e-6)
