"""The trainer as a whole: its loss curve against transformers, its exits, its files."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repository import ROOT
from small_runs import assert_same_bits, finish, flags, losses, records, saved, small, train
from torch.nn import functional as F

import train_gpt2
from gpt2.checkpoint.directory import list_checkpoints
from gpt2.config import Config
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.hf_format import state_dict_to_hf
from gpt2.tokens.dataset import open_dataset
from gpt2.tokens.loader import Blocks
from gpt2.train.evaluation import Evaluator

TRAIN = shlex.quote(str(ROOT / "train_gpt2.py"))


def main(config: Config, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """The entry point, in this process."""
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", *flags(config), *more])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train_gpt2.main() or 0
    finally:
        assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_50_steps_as_transformers_in_a_plain_loop(char_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = small(char_data, tmp_path / "ours", max_steps=50, micro_batch_size=4, warmup_steps=10)
    train(config)
    # The same initial weights, handed over as transformers' own format.
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=59, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )
    state = initial_state(config)
    theirs.load_state_dict(state, strict=False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    tokens = open_dataset(char_data).train.read(0, 13_007)
    blocks = Blocks(open_dataset(char_data).train, 64, 59, seed=config.run.seed)
    curve = []
    for step in range(50):
        warmup = (step + 1) / 10
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (warmup if step < 10 else cosine)
        starts = blocks.order(torch.arange(8 * step, 8 * step + 8).numpy()) * 64
        batch = torch.stack([torch.from_numpy(tokens[s : s + 65].astype("int64")) for s in starts])
        loss = F.cross_entropy(theirs(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    torch.testing.assert_close(list(losses(tmp_path / "ours").values()), curve, atol=1e-4, rtol=0)
    assert curve[-1] < curve[0] - 1.5  # and something was learnt


def initial_state(config: Config) -> dict[str, torch.Tensor]:
    """The weights a run starts with, named as transformers names them."""
    return state_dict_to_hf(GPT(config.model).init_weights(config.run.seed).state_dict(), config.model)


def test_the_files_of_a_run(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(
        char_data, tmp_path, max_steps=6, eval_every=3, checkpoint_every=3, num_samples=2, sample_prompt="Hello"
    )
    assert main(config, monkeypatch) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "checkpoints", "config.json", "environment.json", "metrics.jsonl"}
    assert Config.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in records(tmp_path, "val")] == [0, 3, 6]
    assert {line["val_tokens"] for line in records(tmp_path, "val")} == {23 * 64}  # what was read, not what was asked
    assert len(records(tmp_path, "sample")) == 6
    assert [line["path"] for line in records(tmp_path, "checkpoint")] == [
        "checkpoints/step_00000003",
        "checkpoints/step_00000006",
    ]
    # --config repeats the run, elsewhere.
    monkeypatch.setattr(
        "sys.argv", ["train_gpt2.py", "--config", str(tmp_path / "config.json"), "--run", str(tmp_path / "again")]
    )
    assert train_gpt2.main() == 0
    assert_same_bits(saved(tmp_path, 6), saved(tmp_path / "again", 6))


@pytest.mark.usefixtures("reading")
def test_evaluating_and_saving_change_nothing(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path / "a", max_steps=9, dropout=0.2))
    busy = {"eval_every": 1, "checkpoint_every": 2, "num_samples": 1, "sample_prompt": "A", "log_every": 4}
    train(small(char_data, tmp_path / "b", max_steps=9, dropout=0.2, **busy))
    assert_same_bits(saved(tmp_path / "a", 9), saved(tmp_path / "b", 9))
    assert list(losses(tmp_path / "b")) == [4, 8, 9]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of some steps, counted from 1, not finite."""
    real, calls = train_gpt2.train_step, 0

    def poisoned(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls not in steps:
            return real(model, *args, **kwargs)
        forward = model.forward
        model.forward = lambda *a: forward(*a) * torch.nan
        try:
            return real(model, *args, **kwargs)
        finally:
            model.forward = forward

    monkeypatch.setattr(train_gpt2, "train_step", poisoned)


@pytest.mark.usefixtures("reading")
def test_a_loss_that_is_not_finite_stops_with_exit_code_3(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(char_data, tmp_path / "run", checkpoint_every=4, max_steps=12)
    poison(monkeypatch, {7})
    assert main(config, monkeypatch) == 3
    out = capsys.readouterr().out
    assert "error: the loss is not finite on rank 0 in step 7; the weights were not updated" in out
    command = f"python {TRAIN} --config {tmp_path / 'run/config.json'}"
    assert (
        f"the last good checkpoint is {tmp_path / 'run/checkpoints/step_00000004'}; this goes back to it: {command}"
        in out
    )
    assert "takes the same steps again; add one of\n  --learning-rate " in out
    assert "  --on-nonfinite skip --allow-config-change" in out
    assert re.search(
        r"  learning rate [\d.e-]+ in that step; gradient norms of the last updates: [\d.]+, [\d., ]+\n", out
    )
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004"]
    assert records(tmp_path / "run", "run_end")[-1]["reason"] == "nonfinite"
    monkeypatch.undo()
    train(config)
    train(small(char_data, tmp_path / "whole", max_steps=12))
    assert_same_bits(saved(tmp_path / "run", 12), saved(tmp_path / "whole", 12))


@pytest.mark.usefixtures("reading")
def test_not_finite_in_the_first_step(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {1})
    assert main(small(char_data, tmp_path), monkeypatch) == 3
    assert "there is no checkpoint to go back to" in capsys.readouterr().out


@pytest.mark.usefixtures("reading")
def test_skipping_what_is_not_finite(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = {"on_nonfinite": "skip", "checkpoint_every": 1, "keep": 30}
    poison(monkeypatch, {3, 4, 5, 6, 8})  # four in a row are borne
    assert main(small(char_data, tmp_path / "a", max_steps=9, **skip), monkeypatch) == 0
    assert [(line["step"], line["reason"]) for line in records(tmp_path / "a", "skip")] == [
        (step, "nonfinite") for step in (3, 4, 5, 6, 8)
    ]
    assert_same_bits(saved(tmp_path / "a", 2), saved(tmp_path / "a", 6))
    assert not torch.equal(saved(tmp_path / "a", 6)["step.wte.weight"], saved(tmp_path / "a", 7)["step.wte.weight"])
    poison(monkeypatch, set(range(3, 9)))
    assert main(small(char_data, tmp_path / "b", max_steps=9, **skip), monkeypatch) == 3
    out = capsys.readouterr().out
    assert "5 updates in a row were skipped, the last at step 7" in out
    assert "--learning-rate" in out
    assert "--on-nonfinite" not in out  # it was given, and did not help
    assert records(tmp_path / "b", "run_end")[-1]["reason"] == "nonfinite"


@pytest.mark.usefixtures("reading")
def test_spikes_are_skipped_up_to_five_in_a_row(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train_gpt2.train_step
    calls, spikes = 0, {25}

    def spiked(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in spikes:
            kwargs["tokens_per_step"] /= 1000  # a loss a thousand times as large
        return real(*args, **kwargs)

    monkeypatch.setattr(train_gpt2, "train_step", spiked)
    settings = {"spike_zscore": 20.0, "learning_rate": 1e-4, "checkpoint_every": 12}
    train(small(char_data, tmp_path / "one", **{**settings, "checkpoint_every": 1, "keep": 9}))
    assert [(line["step"], line["reason"]) for line in records(tmp_path / "one", "skip")] == [(25, "spike")]
    assert_same_bits(saved(tmp_path / "one", 24), saved(tmp_path / "one", 25))

    calls, spikes = 0, {25, 26, 27, 28, 29}
    assert main(small(char_data, tmp_path / "five", **settings), monkeypatch) == 3
    assert "half the learning rate\n  --spike-zscore 40" in capsys.readouterr().out
    assert records(tmp_path / "five", "run_end")[-1]["reason"] == "spike"
    assert [path.name for path in list_checkpoints(tmp_path / "five/checkpoints")] == ["step_00000012", "step_00000024"]


def test_minutes_between_checkpoints(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 1.0
        return now

    for module in ("saving", "run"):  # the one that asks and the one that remembers, not whoever else has a clock
        monkeypatch.setattr(f"gpt2.train.{module}.time", SimpleNamespace(monotonic=monotonic))
    train(small(char_data, tmp_path, max_steps=12, checkpoint_minutes=4 / 60, keep=9))
    steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")]
    monkeypatch.undo()
    assert steps[-1] == 12
    assert len(steps) in (3, 4)  # every four seconds or so, of which each step takes one


@pytest.mark.usefixtures("reading")
def test_the_best_checkpoint_stays(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {0: 9.0, 4: 3.5, 8: 3.1, 12: 3.2, 16: 3.6, 20: 3.4}
    coming = iter(measured.values())
    monkeypatch.setattr("gpt2.train.evaluation.validation_loss", lambda *args: next(coming))
    train(small(char_data, tmp_path, max_steps=20, eval_every=4, checkpoint_every=2, keep=1))
    assert losses(tmp_path, "val") == measured
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")] == [8, 20]
    found = json.loads((tmp_path / "checkpoints/step_00000008/training.json").read_text())
    assert found["val_loss"] == 3.1


def test_a_checkpoint_knows_the_validation_loss_of_its_own_step_only(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path, max_steps=9, eval_every=3, checkpoint_every=2, keep=9))
    measured = {line["step"]: line["loss"] for line in records(tmp_path, "val")}
    for path in list_checkpoints(tmp_path / "checkpoints"):
        training = json.loads((path / "training.json").read_text())
        assert training["val_loss"] == measured.get(training["step"])


def test_out_of_memory_is_one_line(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore lines")

    monkeypatch.setattr(train_gpt2, "train_step", full)
    with pytest.raises(UserError) as caught:
        main(small(char_data, tmp_path), monkeypatch)
    text = str(caught.value)
    assert caught.value.alone
    assert "\n" not in text
    assert text.startswith(
        "rank 0 is out of memory on cpu, training with --micro-batch-size 8 (CUDA out of memory. Tried"
    )
    assert "use --micro-batch-size 4" in text
    assert records(tmp_path, "run_end")[-1]["reason"] == "error"


def test_an_error_of_our_own_keeps_its_traceback_and_the_last_checkpoint(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Evaluator, step: int, metrics: Any, must_stop: Any) -> float:
        if step == 4:
            raise ZeroDivisionError
        return 1.0

    config = small(char_data, tmp_path, eval_every=4, checkpoint_every=3, max_steps=5)
    monkeypatch.setattr(Evaluator, "evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        main(config, monkeypatch)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000003"]
    assert records(tmp_path, "run_end")[-1]["reason"] == "error"
    monkeypatch.undo()
    assert main(config, monkeypatch) == 0


def test_samples_that_cannot_be_drawn_do_not_stop_a_run(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise UserError("logits are not finite")

    monkeypatch.setattr("gpt2.train.evaluation.generate", broken)
    train(small(char_data, tmp_path, max_steps=2, eval_every=2, num_samples=1, sample_prompt="A"))
    assert capsys.readouterr().out.count("no samples at step") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "tf32"}, "tf32 is NVIDIA's"),
        ({"total_batch_tokens": 64 * 9}, r"use --total-batch-tokens 512"),
        ({"vocab_size": 60}, "use --vocab-size 59"),
        ({"num_samples": 1, "sample_prompt": "A" * 65}, "sample_prompt has 65 tokens"),
        ({"num_samples": 1, "sample_prompt": "é"}, "not among the 59 characters"),
        ({"data": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    char_data: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train(small(char_data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_trace(char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(char_data, tmp_path, max_steps=9, profile=2))
    path = tmp_path / "profile/steps_6_to_7.json"
    assert f"the profiler's trace is {path}" in capsys.readouterr().out
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events if event.get("ph") == "X") == 2
    assert any("scaled_dot_product" in event.get("name", "") for event in events)


def test_too_few_steps_for_a_trace(char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(char_data, tmp_path, max_steps=3, profile=2))
    assert "too few steps to profile" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_the_schedules_picture(tmp_path: Path, char_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lr.png"
    assert main(small(char_data, tmp_path / "run"), monkeypatch, "--plot-schedule", str(path)) == 0
    assert path.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_as_on_a_cpu_also_after_a_stop(char_data: Path, tmp_path: Path, compiled: bool) -> None:
    world = World(0, 0, 1, torch.device("cuda", 0))
    busy = {"eval_every": 7, "checkpoint_every": 10, "num_samples": 1, "sample_prompt": "A", "compile": compiled}
    train(small(char_data, tmp_path / "cpu", eval_every=7))
    train(small(char_data, tmp_path / "gpu", device="cuda", **busy), world=world)
    stopped = small(char_data, tmp_path / "stopped", device="cuda", **busy)
    assert train(stopped, stop_after=17, world=world).step == 17
    train(stopped, world=world)
    assert_same_bits(saved(tmp_path / "gpu", 30), saved(tmp_path / "stopped", 30))
    for kind in ("train", "val"):
        ours, theirs = losses(tmp_path / "gpu", kind), losses(tmp_path / "cpu", kind)
        torch.testing.assert_close(list(ours.values()), list(theirs.values()), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_over_two_processes(char_data: Path, tmp_path: Path, parallel: str) -> None:
    config = small(char_data, tmp_path / "plain", micro_batch_size=2, max_steps=8, eval_every=4)
    train(config)
    compiled = replace(config, run=replace(config.run, run_dir=tmp_path / "compiled", compile=True, parallel=parallel))
    code, output = finish(ROOT / "train_gpt2.py", flags(compiled), 2)
    assert code == 0, output
    for kind in ("train", "val"):
        a, b = losses(tmp_path / "plain", kind), losses(tmp_path / "compiled", kind)
        torch.testing.assert_close(list(a.values()), list(b.values()), atol=1e-4, rtol=0)
