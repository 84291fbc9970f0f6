"""The preset `finetune` and its page, with a tiny GPT-2 in a folder instead of the released one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import losses, records, train

from gpt2.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import resolve_model
from gpt2.prepare.small_dataset import write_dataset
from gpt2.presets import parse_args, presets
from gpt2.tokens.tokenizer import gpt2_tokenizer


def test_it_is_nano_gpts_example() -> None:
    config = presets()["finetune"][1]
    assert config.model == GPTConfig()
    optim = config.optim
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (3e-5, "constant", 0)
    assert (config.data.total_batch_tokens, config.run.max_steps, config.run.eval_every) == (32 * 1024, 20, 5)


def test_a_folder_of_transformers_is_tuned_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32)  # GPT-2's vocabulary
    GPT(shape).init_weights(0).save_pretrained(tmp_path / "gpt2", gpt2_tokenizer())
    text = "To be, or not to be, that is the question: " * 60
    tokens = np.array(gpt2_tokenizer().encode(text), np.uint16)
    write_dataset(tmp_path / "data", tokens[:600], tokens[600:], gpt2_tokenizer(), name="hamlet")
    words = f"finetune --init-from {tmp_path}/gpt2 --data {tmp_path}/data --run-dir {tmp_path}/run --block-size 32"
    small = "--total-batch-tokens 256 --learning-rate 1e-3 --no-compile --dtype fp32 --wandb disabled --device cpu"
    config = parse_args([*words.split(), *small.split(), "--sample-tokens", "4"])
    assert train(config).step == 20
    out = capsys.readouterr().out
    assert f"weights    of {tmp_path}/gpt2\n" in out
    val = losses(tmp_path / "run", "val")
    assert list(val) == [0, 5, 10, 15, 20]
    assert val[20] < val[0] - 0.01
    kept = [line["step"] for line in records(tmp_path / "run", "checkpoint")]
    assert kept == [5, 10, 15, 20]
    best = min((step for step in val if step), key=lambda step: val[step])
    assert resolve_model(f"{tmp_path}/run@best").name == f"step_{best:08d}"
    assert config.run.init_from == f"{tmp_path}/gpt2"
    # What a run ends with.
    assert "done       20 steps in " in out
    assert f"loss       {val[20]:.4f} on the validation split at step 20; " in out
    assert f"python scripts/export.py {tmp_path}/run@best DIR" in out
    assert f"step  5 | checkpoint {tmp_path}/run/checkpoints/step_00000005" in out
    # The preset's own weights are the released ones; nothing else of it was changed above.
    assert presets()["finetune"][1].run.init_from == "openai-community/gpt2"
    assert replace(config.run, init_from="openai-community/gpt2").keep == 1
