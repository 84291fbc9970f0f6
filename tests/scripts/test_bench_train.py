"""The training benchmark where a side does not fit: it is left out and named, the others are measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from repository import ROOT

from gpt2.errors import UserError

FULL = torch.OutOfMemoryError("CUDA out of memory.\nparagraphs")


class Here:
    """A worker that works in this process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self.made = make(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.made, method)(*arguments)

    def close(self) -> None:
        pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/bench/train.py, uncompiled; its plain side has no memory."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench import train

    plain = train.Side._baseline

    def full(*arguments: Any) -> Callable[[], Any]:
        def step() -> Any:
            raise FULL

        return step

    monkeypatch.setattr(train, "Worker", Here)
    monkeypatch.setattr(train.Side, "_ours", lambda self, model, config: plain(self, model, config, "plain"))
    monkeypatch.setattr(train.Side, "_baseline", full)
    return train


def arguments(bench: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--preset", "debug", "--device", "cpu", "--dtype", "fp32", "--rounds", "1", *words])


def test_a_side_without_memory_is_left_out(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.run(arguments(bench, "--sides", "ours", "plain"))
    assert result["out_of_memory"] == {"plain": "CUDA out of memory."}
    assert list(result["sides"]) == ["ours"]
    assert result["sides"]["ours"]["tokens_per_second"] > 0
    assert "plain: out of memory with --micro-batch-size" in capsys.readouterr().out


def test_no_side_fits(bench: Any) -> None:
    with pytest.raises(UserError, match=r"no side fits on .* give a smaller --micro-batch-size"):
        bench.run(arguments(bench, "--sides", "plain"))


def test_memory_that_runs_out_later_is_an_error(bench: Any) -> None:
    side = bench.Side("plain", bench.configuration(arguments(bench)), "cpu", "fp32")
    side.stepped = True
    with pytest.raises(torch.OutOfMemoryError):
        side.steps(1)


def test_a_missing_package_is_named_before_anything_is_measured(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="side transformers needs the package transformers"):
        bench.run(arguments(bench, "--sides", "ours", "transformers"))
    assert "first step" not in capsys.readouterr().out
