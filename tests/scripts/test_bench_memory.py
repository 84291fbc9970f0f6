"""scripts/benchmark.py memory, with a tiny model."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from repository import ROOT

from gpt2.config import DataConfig, GPTConfig, RunConfig
from gpt2.presets import presets


@pytest.mark.parametrize("part", ["train", "sample"])
def test_a_part_gives_its_peaks(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench.memory import Part

    config = replace(
        presets()["debug"][1],
        model=GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=32),
        data=DataConfig(micro_batch_size=4, total_batch_tokens=128),
        run=RunConfig(device="cpu", dtype="fp32", compile=False, checkpoint_every=0),
    )
    settings = argparse.Namespace(data=None, examples=None, steps=4, prompts=3, new_tokens=2)
    measured = Part(config, settings).measure(part)
    assert 0 < measured["first_minute"] <= measured["end"]
    assert 0 < measured["tenth"] <= measured["end"]
    assert measured["ratio"] == measured["end"] / measured["first_minute"]
