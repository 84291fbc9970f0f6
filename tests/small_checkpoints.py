"""Checkpoints of a tiny model, and what may happen to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gpt2.checkpoint.directory import Checkpoint, read_training
from gpt2.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.tokens.tokenizer import CharTokenizer

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=5)
TOKENIZER = CharTokenizer("abcde")


def make(step: int, **training: Any) -> Checkpoint:
    model = GPT(TINY).init_weights(step)
    moments = {f"exp_avg.{n}": torch.full_like(p, step / 7) for n, p in model.named_parameters()}
    moments["exp_avg.wte.weight"][5:] = 0  # the padding's, as training leaves it
    steps = {f"step.{n}": torch.tensor(float(step)) for n, _ in model.named_parameters()}
    return Checkpoint(model.state_dict(), moments | steps, {"step": step, **training})


def damage(path: Path, how: str) -> None:
    file = path / "model.safetensors"
    if how == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "gone":
        file.unlink()
    elif how == "no JSON":
        (path / "training.json").write_text('{"step": 3')
    elif how == "other JSON":
        (path / "training.json").write_text('{"format": 1}')
    else:
        change = {"format": 99} if how == "future" else {"step": 9}
        training = {**read_training(path), **change}
        if how.startswith("no digest"):
            del training["digest"]
        (path / "training.json").write_text(json.dumps(training))
