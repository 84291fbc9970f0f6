"""The benchmarks' compiled sides compute what the others do; the compiler itself is not run here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hellaswag_examples import make_examples
from repository import ROOT

from gpt2.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import gpt2_tokenizer


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to the compiler."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: given.append(model) or model)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return given


@pytest.mark.parametrize("side", ["build-nanogpt", "lm-eval"])
def test_hellaswag(side: str, compiled: list[Any], tmp_path: Path) -> None:
    if side == "lm-eval":
        pytest.importorskip("lm_eval")
    from bench.hellaswag import Side

    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=1024)
    save_pretrained(tmp_path, GPT(config).init_weights(0).state_dict(), config, gpt2_tokenizer())
    settings = argparse.Namespace(compile=False, lm_eval_batch=2)
    scores = [
        Side(name, str(tmp_path), config, "cpu", "fp32", settings).score(make_examples(2))["log_probs"]
        for name in (side, f"{side}-compiled")
    ]
    assert len(compiled) == 1
    assert np.abs(scores[0] - scores[1]).max() < 1e-4


def test_sampling(compiled: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from bench import generate

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    words = "--preset debug --rows 1 --dtypes fp32 --prompt-tokens 4 --new-tokens 4 --rounds 1 --device cpu"
    (result,) = generate.run(parser.parse_args(words.split()))["results"]
    assert len(compiled) == 1
    assert set(result["speedup"]) == {"transformers", "transformers-compiled"}
    assert all(result[side]["median"] > 0 for side in generate.SIDES)
    assert "transformers-compiled" in capsys.readouterr().out
