"""Memory, counted: against what this process really holds, and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from repository import ROOT

from gpt2.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig
from gpt2.model.gpt import GPT
from gpt2.train.memory import activation_bytes, device_memory, memory_need

GPT2 = GPTConfig()
N = 124_439_808


def test_gpt2_by_hand() -> None:
    # Residual stream fp32 twice (8), two norms' outputs, q, k, v, attention's output, 4 hidden before and after GELU.
    assert activation_bytes(GPT2, 2, compiled=False) == 768 * (8 + 2 * (2 + 3 + 1 + 8))
    assert activation_bytes(GPT2, 4, compiled=False) == 768 * 64
    assert activation_bytes(GPT2, 2, compiled=True) == 768 * 24
    grouped = replace(GPT2, n_kv_head=4)
    assert activation_bytes(GPT2, 2, False) - activation_bytes(grouped, 2, False) == 2 * 2 * (12 - 4) * 64


@pytest.mark.parametrize(
    "model",
    [
        GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=64),
        GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=64, n_kv_head=2, position="rope"),
        GPTConfig(n_layer=3, n_head=4, n_embd=96, block_size=64, vocab_size=64, activation="swiglu", bias=False),
        GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=64, activation="relu2"),
    ],
)
def test_what_autograd_keeps_is_what_is_counted(model: GPTConfig) -> None:
    """The bytes of the distinct tensors that the blocks save for the backward pass, weights aside."""
    network = GPT(model).init_weights(0)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    tokens = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = network.hidden(tokens)
    assert hidden.requires_grad
    counted = tokens.numel() * model.n_layer * activation_bytes(model, 4, compiled=False)
    assert sum(kept.values()) == pytest.approx(counted, rel=0.12)


def need(config: Config, processes: int = 1, dtype: str = "bf16", device: str = "cuda") -> float:
    return memory_need(config, processes, dtype, device).bytes(config.data.micro_batch_size)


def test_it_moves_as_it_should() -> None:
    base = need(Config())
    assert base > 18 * N
    assert need(Config(data=DataConfig(micro_batch_size=32))) < base
    assert need(Config(run=RunConfig(activation_checkpointing=True))) < base
    assert need(Config(run=RunConfig(compile=False))) > base
    assert need(Config(run=RunConfig(parallel="fsdp")), processes=8) < base
    matrices = 12 * 12 * 768**2
    assert base - need(Config(optim=OptimConfig(optimizer="muon"))) == 4 * matrices  # one moment less


def test_the_largest_micro_batch_divides_the_share() -> None:
    memory = memory_need(Config(), 1, "bf16", "cuda")
    assert memory.largest_micro_batch(48, memory.bytes(47)) == 24
    assert memory.largest_micro_batch(48, memory.bytes(47), below=24) == 16
    assert memory.largest_micro_batch(48, memory.bytes(1) - 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 16])
def test_a_real_process_takes_what_is_expected(tmp_path, size: int) -> None:
    make = "from pathlib import Path; import numpy as np; from gpt2.prepare.small_dataset import write_dataset; "
    make += "from gpt2.tokens.tokenizer import gpt2_tokenizer; t = np.arange(40000) % 50256; "
    make += f"write_dataset(Path({str(tmp_path / 'data')!r}), t, t, gpt2_tokenizer())"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True)
    words = f"quickstart --no-compile --micro-batch-size {size} --total-batch-tokens {256 * size} --eval-every 0"
    words += f" --max-steps 2 --log-every 1 --data {tmp_path / 'data'} --run-dir {tmp_path / 'run'} --wandb disabled"
    out = subprocess.run([sys.executable, "train_gpt2.py", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    expected = float(out.stdout.split("memory ")[1].split(" GiB")[0])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    used = max(line["memory_bytes"] for line in lines if line["kind"] == "train") / 2**30
    assert expected == pytest.approx(used, rel=0.2)


def test_processes_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = device_memory(torch.device("cpu"))
    assert alone is not None
    assert alone > 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory(torch.device("cpu")) == alone / 4
