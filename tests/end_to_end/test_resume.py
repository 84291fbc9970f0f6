"""Resuming: bit for bit what not stopping would have given, and refused where it could not be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import ALONE, assert_same_bits, losses, records, saved, small, train

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.dataset import open_dataset
from gpt2.train.ending import close
from gpt2.train.run import Run
from gpt2.train.setup import lock_run, set_up

EPOCH_STEP = 26  # 203 blocks, 8 a step: the 26th step spans the first epoch's end


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_once_and_twice_across_an_epochs_end_with_dropout(char_data: Path, tmp_path: Path, optimizer: str) -> None:
    settings = {"dropout": 0.1, "optimizer": optimizer, "spike_zscore": 50.0, "eval_every": 7}
    whole = small(char_data, tmp_path / "whole", **settings)
    train(whole)
    stops = {"once": [11], "twice": [11, EPOCH_STEP - 1]} if optimizer == "adamw" else {"twice": [11, EPOCH_STEP]}
    for name, steps in stops.items():
        config = small(char_data, tmp_path / name, **settings)
        for step in steps:
            assert step <= train(config, stop_after=step).step <= step + 1  # who reads late stops late
        train(config)
        assert_same_bits(saved(tmp_path / "whole", 30), saved(tmp_path / name, 30))
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        final = [
            json.loads((tmp_path / n / "checkpoints/step_00000030/training.json").read_text()) for n in (name, "whole")
        ]
        assert final[0]["guard"] == final[1]["guard"]
        assert final[0]["guard"][0] == 30
        assert final[0]["sample"] == final[1]["sample"] == 240


def test_dropout_is_drawn_anew_in_every_step(char_data: Path, tmp_path: Path) -> None:
    # Else the test above would pass with a dropout that is always the same. All blocks are alike here.
    tokenizer = open_dataset(char_data).tokenizer()
    write_dataset(tmp_path / "same", np.zeros(2000, int), np.zeros(200, int), tokenizer)
    for name, seed in (("a", 1), ("b", 2)):
        train(small(tmp_path / "same", tmp_path / name, dropout=0.5, max_steps=3, learning_rate=1e-12, seed=seed))
    assert len({*losses(tmp_path / "a").values(), *losses(tmp_path / "b").values()}) == 6
    train(small(tmp_path / "same", tmp_path / "c", max_steps=3, learning_rate=1e-12))
    assert len({round(loss, 6) for loss in losses(tmp_path / "c").values()}) == 1


def test_the_epochs_end_is_reported(char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(char_data, tmp_path, max_steps=52))
    out = capsys.readouterr().out
    assert "epoch 1 ended in step 26: each of 203 sequences was read once" in out
    assert "epoch 2 ended in step 51" in out
    assert "epoch 3" not in out


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(char_data, tmp_path / "run", checkpoint_every=10)
    train(config)
    reference = saved(tmp_path / "run", 30)
    newest = tmp_path / "run/checkpoints/step_00000030"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    train(config)
    out = capsys.readouterr().out
    assert "passing over a checkpoint" in out
    assert "optimizer.safetensors is not what was written" in out
    assert "resumed at step 20" in out
    assert_same_bits(reference, saved(tmp_path / "run", 30))
    assert (tmp_path / "run/checkpoints/superseded_step_00000030").is_dir()


def test_every_checkpoint_damaged(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, checkpoint_every=15)
    train(config)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        (path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint in .* can be resumed \(.*step_00000030/model\.safetensors cannot be read"
    ):
        train(config)


def files(run: Path) -> dict[str, bytes]:
    """What a run's directory holds, but for the marks of a start itself."""
    found = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock" and path.parent.name != "hang"]
    return {str(path): path.read_bytes() for path in found}


def rewrite(checkpoint: Path, moments: dict[str, torch.Tensor]) -> None:
    """Give a checkpoint another optimizer state, and checksums that are right, as somebody would who edits it."""
    save_file(moments, checkpoint / "optimizer.safetensors")
    training = json.loads((checkpoint / "training.json").read_text())
    content = (checkpoint / "optimizer.safetensors").read_bytes()
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    training["files"]["optimizer.safetensors"] = described
    del training["digest"]  # as in files of earlier versions
    (checkpoint / "training.json").write_text(json.dumps(training))


def test_a_start_that_is_refused_says_why_and_changes_nothing(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_steps": 10, "optimizer": "muon", "normuon": True, "checkpoint_every": 5}
    train(small(char_data, tmp_path / "run", **settings))
    moments = load_file(tmp_path / "run/checkpoints/step_00000010/optimizer.safetensors")
    adam, muon = "exp_avg_sq.wte.weight", "second_momentum_buffer.h.0.mlp.c_fc.weight"

    def lose(checkpoints: Path) -> None:
        shutil.rmtree(checkpoints)

    def lose_all_within(checkpoints: Path) -> None:
        for path in checkpoints.glob("step_*"):
            shutil.rmtree(path)

    def link_to_nowhere(checkpoints: Path) -> None:
        shutil.rmtree(checkpoints)
        checkpoints.symlink_to("nowhere")

    def replace_moments(**changed: torch.Tensor) -> Callable[[Path], None]:
        return lambda checkpoints: rewrite(checkpoints / "step_00000010", {**moments, **changed})

    for number, (spoil, words) in enumerate(
        (
            (lose, r"metrics\.jsonl records step_00000010, but .*checkpoints holds no checkpoint; put it back"),
            (lose_all_within, r"metrics\.jsonl records step_00000010, but .*checkpoints holds no checkpoint"),
            (link_to_nowhere, r"cannot keep checkpoints in .*checkpoints: No such file.*choose another --run"),
            (replace_moments(**{adam: torch.zeros(59, 3)}), r"optimizer\.safetensors: .*shape \(64, 3\), not"),
            (replace_moments(**{muon: torch.zeros(128)}), r"shape \(128,\), not .* \(128, 1\)"),
            (replace_moments(**{adam: moments[adam].double()}), r"is torch\.float64 of shape"),
            (replace_moments(**{adam: moments[adam] - 1}), rf"optimizer\.safetensors: {adam} holds negative values"),
            (replace_moments(**{muon: moments[muon] / 0}), rf"{muon} holds values that are not finite"),
            (replace_moments(novel=torch.zeros(3)), "holds 'novel', which this run's does not"),
        )
    ):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", run)
        spoil(run / "checkpoints")
        before = files(run)
        with pytest.raises(UserError, match=words):
            train(small(char_data, run, **{**settings, "max_steps": 12, "allow_config_change": True}))
        assert files(run) == before

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000010")  # an older one is there
    train(small(char_data, tmp_path / "run", **settings))
    assert "metrics.jsonl records step_00000010, which is not in" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"seed": 7}, {"n_embd": 64}, {"data": "reversed"}])
def test_a_checkpoint_of_another_run_in_the_place_of_one_of_this(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
) -> None:
    if "data" in other:
        dataset = open_dataset(char_data)
        tokens = dataset.train.read(0, 5000)[::-1].copy()
        write_dataset(tmp_path / "reversed", tokens, np.arange(590) % 59, dataset.tokenizer())
        other = {"data": tmp_path / "reversed"}
    settings: dict[str, Any] = {"max_steps": 10, "checkpoint_every": 5}
    train(small(char_data, tmp_path / "run", **settings))
    reference = saved(tmp_path / "run", 10)
    train(small(char_data, tmp_path / "other", **{**settings, **other}))
    place = tmp_path / "run/checkpoints/step_00000010"
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "other/checkpoints/step_00000010", place)
    train(small(char_data, tmp_path / "run", **settings))
    out = capsys.readouterr().out
    assert re.search(r"passing over a checkpoint: .*step_00000010 (holds a run with other|was trained on other)", out)
    assert "resumed at step 5" in out
    assert_same_bits(reference, saved(tmp_path / "run", 10))


def test_a_finished_run_does_nothing_more(char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(char_data, tmp_path, max_steps=3)
    train(config)
    before = saved(tmp_path, 3)
    assert train(config).step == 3
    assert "the run is finished: 3 steps are done" in capsys.readouterr().out
    assert_same_bits(before, saved(tmp_path, 3))


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path, max_steps=6))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"step_00000006 is at step 6, past --max-steps 2; give 6 or more"):
        train(small(char_data, tmp_path, max_steps=2, allow_config_change=True))
    assert (tmp_path / "config.json").read_bytes() == before


def test_going_back_to_an_older_checkpoint_and_on_from_there(char_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small(char_data, run, checkpoint_every=10)
    train(config)
    reference = saved(run, 30)
    back = small(char_data, run, checkpoint_every=10, resume=str(run / "checkpoints/step_00000010"))
    train(back, stop_after=13)
    # What the next start is told is auto: it must go on from 13, not from the 20 or 30 that were left behind.
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000013"
    assert json.loads((run / "config.json").read_text())["run"]["resume"] == "auto"
    assert train(config, stop_after=17).step == 17
    assert [line["step"] for line in records(run)][-4:] == [14, 15, 16, 17]
    train(config)
    assert_same_bits(reference, saved(run, 30))
    assert {path.name for path in (run / "checkpoints").glob("superseded*")} == {
        "superseded_step_00000020",
        "superseded_step_00000030",
    }


def test_torchruns_restart_goes_on_whatever_the_words_say(char_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    again = World(0, 0, 1, ALONE.device, memory=torch.distributed.HashStore())
    close(set_up(small(char_data, run, resume="never"), again), "error")  # the first start of this torchrun
    train(small(char_data, run, checkpoint_every=10, max_steps=30), stop_after=25)
    for resume in ("never", str(run / "checkpoints/step_00000010")):
        started = set_up(small(char_data, run, checkpoint_every=10, resume=resume), again)
        close(started, "stopped")
        assert started.step == 25
    (run / "hang").mkdir(exist_ok=True)
    shutil.move(run, tmp_path / "on another machine's disk")
    (run / "hang").mkdir(parents=True)  # which its rank left there before
    with pytest.raises(UserError, match=r"holds nothing of this run, which was started on .* that all machines share"):
        set_up(small(char_data, run), again)
    train(small(char_data, run, max_steps=1))  # another torchrun may: what a rank leaves is no run


def test_a_refused_start_does_not_count_as_one(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path, max_steps=1))
    restarted = World(0, 0, 1, ALONE.device, memory=torch.distributed.HashStore())
    for _ in range(2):  # torchrun --max-restarts=1 starts what was refused a second time
        with pytest.raises(UserError, match="--resume never would write over it"):
            set_up(small(char_data, tmp_path, max_steps=1, resume="never"), restarted)


def test_from_a_checkpoint_of_another_run(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path / "a", checkpoint_every=10))
    start = tmp_path / "a/checkpoints/step_00000010"
    config = small(char_data, tmp_path / "b", resume=str(start))
    assert train(config, stop_after=12).step == 12
    train(config)  # its own checkpoint now counts
    assert [line["step"] for line in records(tmp_path / "b")] == list(range(11, 31))
    assert_same_bits(saved(tmp_path / "a", 30), saved(tmp_path / "b", 30))
    assert not list((tmp_path / "a/checkpoints").glob("superseded*"))
    for path in (tmp_path / "a/checkpoints/step_00000030", tmp_path / "b/checkpoints/step_00000013"):
        with pytest.raises(UserError, match=r"is none of them|is not a checkpoint of a run"):  # a wrong word, say
            train(small(char_data, tmp_path / "b", resume=str(path)))


def test_never(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, max_steps=2, resume="never")
    train(config)
    with pytest.raises(UserError, match="--resume never would write over it"):
        train(config)


def test_changed_settings(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path, max_steps=20), stop_after=10)
    stored = (tmp_path / "config.json").read_bytes()
    for changes, words in [
        ({"n_embd": 64}, "n_embd 32 → 64; choose another --run for these"),
        ({"seed": 1}, "seed 1337 → 1; choose another --run for these"),
        ({"learning_rate": 0.5}, "learning_rate 0.01 → 0.5; .*--allow-config-change"),
        ({"total_batch_tokens": 1024}, "total_batch_tokens 512 → 1024; .*--allow-config-change"),
    ]:
        with pytest.raises(UserError, match=words):
            train(small(char_data, tmp_path, max_steps=20, **changes))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="n_embd"):  # not even when it is allowed
        train(small(char_data, tmp_path, max_steps=20, n_embd=64, allow_config_change=True))
    assert (tmp_path / "config.json").read_bytes() == stored  # what was refused left no trace

    allowed = small(char_data, tmp_path, max_steps=14, total_batch_tokens=1024, allow_config_change=True)
    run = train(allowed)
    assert run.sequences_read == 10 * 8 + 4 * 16  # no sequence twice, none left out
    training = json.loads((tmp_path / "checkpoints/step_00000014/training.json").read_text())
    assert training["tokens"] == run.sequences_read * 64
    # The machine's part of the settings is free.
    train(small(char_data, tmp_path, max_steps=14, total_batch_tokens=1024, micro_batch_size=2, log_every=3))


def test_changed_data(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path / "run", max_steps=2)
    train(config)
    dataset = open_dataset(char_data)
    tokens = dataset.train.read(0, 5000)
    write_dataset(tmp_path / "other", tokens[::-1].copy(), np.arange(590) % 59, dataset.tokenizer())
    with pytest.raises(UserError, match="was trained on other data"):
        train(small(tmp_path / "other", tmp_path / "run", max_steps=2))
    shutil.copytree(char_data, tmp_path / "moved")
    train(small(tmp_path / "moved", tmp_path / "run", max_steps=2))  # the same data elsewhere


def test_a_directory_that_is_not_a_run(char_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(small(char_data, tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        train(small(char_data, tmp_path / "file"))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / ".config.json.new").write_text("{")  # left by a kill
    train(small(char_data, fresh, max_steps=1))


def test_no_checkpoint_at_all(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not a checkpoint of a run"):
        train(config)


def test_two_runs_in_one_directory(char_data: Path, tmp_path: Path) -> None:
    lock = lock_run(tmp_path)
    with pytest.raises(UserError, match="another process is training in"):
        train(small(char_data, tmp_path))
    lock.close()
    train(small(char_data, tmp_path, max_steps=1))


def test_a_stop_does_not_wait_for_an_evaluation_which_is_made_up_for(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path / "run", max_steps=20, eval_every=10)
    train(config, stop_after=10)
    assert [line["step"] for line in records(tmp_path / "run", "val")] == [0]
    train(config, stop_after=20)  # in the last step
    assert [line["step"] for line in records(tmp_path / "run", "val")] == [0, 10]
    train(config)
    assert [line["step"] for line in records(tmp_path / "run", "val")] == [0, 10, 20]
    train(small(char_data, tmp_path / "whole", max_steps=20, eval_every=10))
    assert [v["loss"] for v in records(tmp_path / "run", "val")] == [
        v["loss"] for v in records(tmp_path / "whole", "val")
    ]


def test_fine_tuning_with_a_shorter_context(char_data: Path, tmp_path: Path) -> None:
    train(small(char_data, tmp_path / "a", max_steps=5))
    trained = saved(tmp_path / "a", 5)
    config = small(
        char_data, tmp_path / "b", init_from=str(tmp_path / "a"), block_size=32, n_layer=7, max_steps=4, dropout=0.1
    )
    first: dict[str, torch.Tensor] = {}

    def remember(run: Run) -> None:
        first.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        assert run.config.model == dataclasses.replace(
            small(char_data, tmp_path).model, block_size=32, n_layer=2, dropout=0.1
        )

    train(config, stop_after=2, prepare=remember)
    assert torch.equal(first["wpe.weight"], trained["transformer.wpe.weight"][:32])
    assert torch.equal(first["h.1.mlp.c_fc.weight"], trained["transformer.h.1.mlp.c_fc.weight"].T)
    shutil.rmtree(tmp_path / "a")  # going on does not need what it came from
    assert train(config).step == 4
    with pytest.raises(UserError, match="has a context of 32 tokens, shorter than block_size 64"):
        train(small(char_data, tmp_path / "c", init_from=str(tmp_path / "b")))
    with pytest.raises(UserError, match="no model at"):
        train(small(char_data, tmp_path / "d", init_from=str(tmp_path / "gone")))
    assert not (tmp_path / "d").exists()


def test_the_best_checkpoint_is_saved_and_kept(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, max_steps=12, eval_every=2, checkpoint_every=100, keep=1)
    train(config, stop_after=6)
    train(config)
    losses_of = {line["step"]: line["loss"] for line in records(tmp_path, "val") if line["step"]}
    best = min(losses_of, key=lambda step: losses_of[step])
    assert tmp_path / f"checkpoints/step_{best:08d}" in list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("by", ["link", "target"])
def test_a_checkpoint_moved_elsewhere_and_linked_back_is_the_runs_own(char_data: Path, tmp_path: Path, by: str) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    settings = {"max_steps": 6, "checkpoint_every": 2}
    train(small(char_data, tmp_path / "whole", **settings))
    train(small(char_data, run, **settings))
    archive.mkdir()
    link = run / "checkpoints/step_00000004"
    link.rename(archive / link.name)
    link.symlink_to(archive / link.name)
    (archive / "step_00000009").mkdir()  # of another run
    train(small(char_data, run, resume=str(link if by == "link" else archive / link.name), **settings))
    assert_same_bits(saved(tmp_path / "whole", 6), saved(run, 6))
    assert (archive / "step_00000009").is_dir()
    assert [path.name for path in (run / "checkpoints").glob("superseded_*")] == ["superseded_step_00000006"]
    train(small(char_data, run, **{**settings, "max_steps": 12, "keep": 1}, allow_config_change=True))
    assert not link.is_symlink()  # retention removes the link, and leaves what it led to
    assert (archive / link.name / "model.safetensors").is_file()


def test_machines_take_turns_over_a_mirror(char_data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 30, "checkpoint_every": 4, "eval_every": 10, "dropout": 0.1}
    train(small(char_data, tmp_path / "whole", **settings))
    for turn, stop in enumerate((7, 13, 22, None)):
        machine = tmp_path / "ab"[turn % 2]
        train(small(char_data, machine, mirror=str(tmp_path / "mirror"), **settings), stop_after=stop)
    assert_same_bits(saved(tmp_path / "whole", 30), saved(machine, 30))
    assert losses(machine) == losses(tmp_path / "whole")
    assert losses(machine, "val") == losses(tmp_path / "whole", "val")
    assert [line["resumes_at"] > 0 for line in records(machine, "run_start")] == [False, True, True, True]
