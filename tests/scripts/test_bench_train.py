"""The training benchmark where a side does not fit: it is left out and named, the others are measured."""

from __future__ import annotations

import argparse
import dataclasses
import math
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

    monkeypatch.setattr(train, "plain_baseline", plain, raising=False)
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


def test_every_side_with_every_optimizer_it_can_use(bench: Any) -> None:
    assert list(bench.choose_cells(None, ["adamw"])) == list(bench.SIDES)
    assert list(bench.choose_cells(None, ["muon"])) == ["ours", "plain", "plain-compiled"]
    assert bench.choose_cells(["transformers", "ours"], ["adamw", "muon"]) == {
        "transformers, adamw": ("transformers", "adamw"),
        "ours, adamw": ("ours", "adamw"),
        "ours, muon": ("ours", "muon"),
    }
    with pytest.raises(UserError, match="side transformers-compiled cannot use Muon"):
        bench.choose_cells(["transformers-compiled"], ["muon"])
    assert arguments(bench, "--sides", "compiled", "ours").sides == ["plain-compiled", "ours"]  # its earlier name
    with pytest.raises(SystemExit):
        arguments(bench, "--optimizer", "sgd")


def test_two_optimizers_take_turns(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.run(arguments(bench, "--sides", "ours", "--optimizer", "adamw", "muon"))
    adamw, muon = (result["losses"][f"ours, {name}"] for name in ("adamw", "muon"))
    assert adamw[0] == muon[0]  # the same weights and batch
    assert adamw[1:] != muon[1:]
    assert "ours, adamw is " in capsys.readouterr().out
    assert result["breakdown"]["optimizer"] > 0


def test_a_preset_that_does_not_clip(bench: Any) -> None:
    config = bench.configuration(arguments(bench))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, grad_clip=0.0))
    side = bench.Side("ours", config, "cpu", "fp32")  # the plain one, by the fixture
    first, second = side.steps(2)["losses"]
    assert second < first


@pytest.mark.parametrize("side", ["plain-compiled", "transformers-compiled"])
def test_the_compiled_sides_are(bench: Any, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    pytest.importorskip("transformers")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda work: compiled.append(work) or work)
    eager = bench.plain_baseline
    for name, expected in ((side, 1), (side.removesuffix("-compiled"), 0)):
        compiled.clear()
        config = bench.configuration(arguments(bench))
        monkeypatch.setattr(
            bench.Side, "_ours", lambda self, model, config, name=name: eager(self, model, config, name)
        )
        losses = bench.Side("ours", config, "cpu", "fp32").steps(1)["losses"]
        assert len(compiled) == expected
        assert losses[0] == pytest.approx(math.log(50257), abs=0.3)
