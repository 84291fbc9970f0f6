"""Kills, signals, hangs: a run survives them, or ends in order."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from small_runs import (
    ALONE,
    Started,
    assert_same_bits,
    environment,
    finish,
    flags,
    losses,
    records,
    saved,
    small,
    train,
)

import train_gpt2
from gpt2.checkpoint import directory
from gpt2.checkpoint.directory import Checkpoint, list_checkpoints, verify_checkpoint
from gpt2.distributed.signals import StopSignals
from gpt2.train import evaluation as evaluator
from gpt2.train import saving
from gpt2.train.ending import close
from gpt2.train.ending import finish as end
from gpt2.train.run import Run
from gpt2.train.setup import set_up

TRAIN = shlex.quote(str(ROOT / "train_gpt2.py"))


def kill_until_done(data: Path, run: Path, kills: int, seed: int) -> tuple[int, str, list[str]]:
    """Start a run of two processes under torchrun and kill one or both again and again, every other time in a save."""
    dice = random.Random(seed)
    config = small(data, run, max_steps=40 * kills, dropout=0.1, micro_batch_size=4, checkpoint_every=13, eval_every=20)
    done: list[str] = []
    torchrun = (f"--max-restarts={kills}", "--monitor-interval=0.1")
    with Started(ROOT / "tests/slow_train.py", flags(config), 2, torchrun) as agent:
        for number in range(kills):
            before = list_checkpoints(run / "checkpoints")[-1:]
            hit = agent.until(lambda n=number: len(records(run, "train", n)) > 1)
            if number % 2 == 0:
                where = "in a save"
                hit = hit and agent.until(lambda: any((run / "checkpoints").glob(".writing-step*")))
            else:
                where = "in training"
                hit = hit and agent.until(lambda old=before: list_checkpoints(run / "checkpoints")[-1:] > old)
                time.sleep(dice.uniform(0, 0.5))
            if not hit:
                break
            victims = agent.workers()
            if dice.random() < 0.6:
                victims = [dice.choice(victims)]
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            done.append(f"{len(victims)} {where}")
        return *agent.finish(), done


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_under_torchrun_change_nothing(char_data: Path, tmp_path: Path, kills: int) -> None:
    code, output, done = kill_until_done(char_data, tmp_path / "killed", kills, seed=kills)
    assert code == 0, output
    assert len(done) == kills, (done, output)
    steps = 40 * kills
    config = small(char_data, tmp_path / "whole", max_steps=steps, dropout=0.1, micro_batch_size=4, eval_every=20)
    code, output = finish(ROOT / "train_gpt2.py", flags(config), 2)
    assert code == 0, output
    assert_same_bits(saved(tmp_path / "whole", steps), saved(tmp_path / "killed", steps))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert len(records(tmp_path / "killed", "run_start")) == kills + 1
    assert not list((tmp_path / "killed/checkpoints").glob(".writing*"))
    for path in list_checkpoints(tmp_path / "killed/checkpoints"):
        verify_checkpoint(path)


@contextlib.contextmanager
def raise_at(owner: Any, name: str, call: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal in the midst of the given call of a function."""
    real, calls = getattr(owner, name), 0

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, signalled)
    try:
        yield
    finally:
        setattr(owner, name, real)


WHERE = {
    "forward": (torch.nn.functional, "linear", 1000),  # calls there are, more or less, in half the run
    "backward": (torch.nn.utils, "get_total_norm", 14),
    "evaluation": (evaluator, "validation_loss", 5),
    "save": (saving, "host_copy", 400),
    "writing": (directory, "sha256_file", 20),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_signal_stops_in_order_wherever_it_hits(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, times: int
) -> None:
    owner, name, most = WHERE[where]
    dice = random.Random(where)
    settings = {"max_steps": 14, "checkpoint_every": 3, "eval_every": 3, "dropout": 0.1}
    train(small(char_data, tmp_path / "whole", **settings))
    for number in range(times):
        run_dir = tmp_path / str(number)
        config = small(char_data, run_dir, **settings)
        kind = dice.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would stay ignored
        capsys.readouterr()
        with StopSignals() as signals, raise_at(owner, name, dice.randint(1, most), kind):
            run = set_up(config, ALONE)
            assert end(run, train_gpt2.train(run, signals), signals) == 0
        out = capsys.readouterr().out
        if run.step < 14:
            command = f"resume with: python {TRAIN} --config {run_dir / 'config.json'}"
            assert re.search(rf"stopped by {kind.name} after step {run.step}; {re.escape(command)}", out)
            assert records(run_dir, "run_end")[-1]["reason"] == "stopped"
        train(config)
        assert_same_bits(saved(tmp_path / "whole", 14), saved(run_dir, 14))
        assert losses(run_dir, "val") == losses(tmp_path / "whole", "val")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", -signal.SIGINT), ("SIGHUP", 0)])
def test_the_exit_code_tells_who_was_interrupted_from_who_finished(
    char_data: Path, tmp_path: Path, name: str, code: int
) -> None:
    config = small(char_data, tmp_path, max_steps=100_000, warmup_steps=5)
    reset = f"import signal, runpy; signal.signal(signal.{name}, signal.SIG_DFL); "  # whatever started the tests
    if name == "SIGINT":
        reset = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script = tmp_path.parent / f"{tmp_path.name}_start.py"
    script.write_text(f"{reset}runpy.run_path({str(ROOT / 'train_gpt2.py')!r}, run_name='__main__')")
    with Started(script, flags(config)) as started:
        assert started.until(lambda: len(records(tmp_path)) > 3)
        started.process.send_signal(signal.Signals[name])
        found, output = started.finish(60)
    assert found == code, output
    assert "stopping after this step" in output
    assert f"stopped by {name} after step" in output
    assert "Traceback" not in output
    (last,) = list_checkpoints(tmp_path / "checkpoints")
    assert int(last.name[5:]) == max(losses(tmp_path))
    assert records(tmp_path, "run_end")[-1]["reason"] == "stopped"


def test_sigterm_to_one_of_torchruns_workers(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, max_steps=100_000, micro_batch_size=4, warmup_steps=5)
    with Started(ROOT / "train_gpt2.py", flags(config), 2) as agent:
        assert agent.until(lambda: len(records(tmp_path)) > 3)
        os.kill(agent.workers()[1], signal.SIGTERM)
        code, output = agent.finish()
    assert code == 0, output
    assert f"torchrun --standalone --nproc_per_node=2 {TRAIN} --config {tmp_path}/config.json" in output
    (last,) = list_checkpoints(tmp_path / "checkpoints")
    assert int(last.name[5:]) == max(losses(tmp_path))
    assert "Traceback" not in output


def test_a_hang_ends_with_its_place_named(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path, micro_batch_size=4)
    code, output = finish(ROOT / "tests/hanging_train.py", flags(config), 2)
    assert code != 0
    assert f"error: rank 0 waited in vain for another process; {tmp_path / 'hang'} tells" in output
    assert "hang_in_the_data_centre" in (tmp_path / "hang/stack_rank1.txt").read_text()
    assert "hang_in_the_data_centre" not in (tmp_path / "hang/stack_rank0.txt").read_text()
    assert "gloo:" in (tmp_path / "hang/collectives_rank0.json").read_text()
    assert len(records(tmp_path)) == 3


def test_a_full_disk_costs_a_checkpoint_and_no_more(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 20, "checkpoint_every": 5}
    train(small(char_data, tmp_path / "whole", **settings))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(run: Run) -> None:
        advance = run.advance

        def advance_on_a_full_disk() -> None:
            advance()
            if run.step in (5, 10, 15):
                run.writer.wait()  # the one before
            limit = 50_000 if run.step in (10, 15) else soft  # bytes a file; the weights are 120,000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            if run.step in (11, 16):
                run.writer.wait()

        run.advance = advance_on_a_full_disk  # type: ignore[method-assign]

    def wait_in_the_limit(run: Run) -> None:
        fill_disk(run)
        write = run.writer.save

        def save_and_wait(checkpoint: Checkpoint) -> None:
            write(checkpoint)
            run.writer.wait()

        run.writer.save = save_and_wait  # type: ignore[method-assign]

    try:
        train(small(char_data, tmp_path / "full", **settings), prepare=wait_in_the_limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = capsys.readouterr().out
    for step in (10, 15):
        line = next(line for line in out.splitlines() if f"checkpoint of step {step} could not be written" in line)
        assert "File too large" in line
        assert line.endswith("the last good one is " + str(tmp_path / "full/checkpoints/step_00000005"))
    assert [path.name for path in list_checkpoints(tmp_path / "full/checkpoints")] == ["step_00000005", "step_00000020"]
    assert not list((tmp_path / "full/checkpoints").glob(".writing*"))
    assert_same_bits(saved(tmp_path / "whole", 20), saved(tmp_path / "full", 20))


def test_a_last_checkpoint_that_fails_is_an_error(
    char_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run, signals = set_up(small(char_data, tmp_path, max_steps=2), ALONE), StopSignals()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert end(run, train_gpt2.train(run, signals), signals) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        close(run, "error")
    assert "error: step 2 is not saved; make room, then resume with" in capsys.readouterr().out
    train(small(char_data, tmp_path, max_steps=2))
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_as_a_command_in_a_poor_locale(char_data: Path, tmp_path: Path) -> None:
    config = small(char_data, tmp_path / "run", max_steps=3, eval_every=3, num_samples=1, sample_prompt="Hello")
    words = [*flags(config)]
    poor = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    train_py = [os.sys.executable, str(ROOT / "train_gpt2.py")]  # type: ignore[attr-defined]
    done = subprocess.run([*train_py, *words], cwd=tmp_path, env=environment() | poor, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 ? " in done.stdout  # the × of the plan
    done = subprocess.run(
        [*train_py, "--config", "run/config.json", "--block-size", "32"],
        cwd=tmp_path,
        env=environment() | poor,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "block_size 64 ? 32; choose another --run" in done.stderr


def test_two_processes_say_once_what_is_wrong(char_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = finish(ROOT / "train_gpt2.py", flags(small(char_data, tmp_path / "file", micro_batch_size=4)), 2)
    assert code == 1  # torchrun's own
    said = [line for line in output.splitlines() if "error: cannot write to the run directory" in line]
    # Ours, which may already stand behind torchrun's table of failures, too; the others are that table's.
    assert 1 <= sum(line.startswith("error:") for line in said) <= 2
    assert all(line.lstrip().startswith(("error:", "traceback : error:", "msg", "message")) for line in said), said
    assert 'train_gpt2.py", line' not in output  # no stack of ours
    assert "exitcode  : 2" in output
    assert "exitcode  : 1" not in output
