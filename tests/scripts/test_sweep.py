"""scripts/sweep.py: which runs it makes, which it skips, and a small one from end to end."""

from __future__ import annotations

import glob
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from fake_runs import encode, lines
from repository import ROOT, load_script
from small_runs import Started, finish

from gpt2.errors import UserError
from gpt2.presets import parse_args
from gpt2.report.runs import open_run

FLAGS = ["--vocab-size", "59", "--num-samples", "0", "--eval-every", "4", "--device", "cpu", "--no-compile"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/sweep.py")


def test_points_are_the_product_seed_by_seed(script: ModuleType, tmp_path: Path) -> None:
    grid = ["position=learned,rope", "bias=true,false"]
    found = list(script.points("debug", grid, 2, tmp_path, ["--max-steps", "7"]))
    assert len(found) == 8
    assert [point.name for point in found[:4]] == [
        "position=learned,bias=true/seed=0",
        "position=learned,bias=false/seed=0",
        "position=rope,bias=true/seed=0",
        "position=rope,bias=false/seed=0",
    ]
    config = parse_args(found[-1].words)
    assert (config.model.position, config.model.bias, config.run.seed, config.run.max_steps) == ("rope", False, 1, 7)
    assert config.run.run_dir == found[-1].directory == tmp_path / "position=rope,bias=false" / "seed=1"
    assert [point.name for point in script.points("debug", [], 1, tmp_path, [])] == ["debug/seed=0"]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_tasks_of_an_array_share_the_runs(script: ModuleType, first: int) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_STEP": "2"}
    parts = [script.share(range(8), {**array, "SLURM_ARRAY_TASK_ID": str(first + 2 * task)}) for task in range(3)]
    assert [list(part) for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(script.share(range(8), {})) == list(range(8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["debug", "--grid", "position"], "is not NAME=V1,V2"),
        (["debug", "--grid", "position=rope,"], "is not NAME=V1,V2"),
        (["debug", "--grid", "position=rope,rope"], "is not NAME=V1,V2"),
        (["debug", "--grid", "bias=true", "--grid", "bias=false"], "bias is given twice"),
        (["debug", "--grid", "seed=1,2"], "seed is chosen by the sweep"),
        (["debug", "--seeds", "0"], "--seeds is 0"),
        (["debug", "--jobs", "0"], "--jobs is 0"),
        (["debug", "--seed", "3"], "--seed cannot be given"),
        (["debug", "--run-dir=x"], "--run-dir=x cannot be given"),
        (["gpt3"], "unknown preset 'gpt3'"),
        (["debug", "--grid", "n_head=2,3"], "n_embd 32 is not divisible by n_head 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    script: ModuleType, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=message):
        script.main()
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_not_taken_for_the_points(script: ModuleType, tmp_path: Path) -> None:
    (point,) = script.points("debug", [], 1, tmp_path, [])
    assert script.recorded(point) is None
    point.directory.mkdir(parents=True)
    (point.directory / "metrics.jsonl").write_bytes(encode(lines(until=20)))
    with pytest.raises(UserError, match=r"was made with .*choose another --out"):
        script.recorded(point)


def test_each_job_sees_one_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert script.visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert script.visible_gpus(2) == ["3", "GPU-5f"]


def test_a_sweep_is_trained_stopped_continued_and_skipped(char_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def words(seeds: int, *more: str) -> list[str]:
        grid = ["--grid", "position=learned,rope", "--seeds", str(seeds), "--jobs", "2"]
        return ["debug", "--data", str(char_data), *grid, "--out", str(out), *FLAGS, *more]

    sweep = ROOT / "scripts" / "sweep.py"
    with Started(sweep, words(1, "--max-steps", "3000", "--log-every", "1")) as started:
        runs: list[Callable[[], bool]] = [
            lambda name=name: (out / f"position={name}" / "seed=0" / "metrics.jsonl").exists()  # type: ignore[misc]
            for name in ("learned", "rope")
        ]
        assert started.until(lambda: all(begun() for begun in runs))
        os.kill(started.process.pid, signal.SIGTERM)
        code, said = started.finish()
    assert code == 0, said
    assert "stopped; the same command continues" in said
    assert open_run(out / "position=rope" / "seed=0").status() == "stopped"
    code, said = finish(sweep, words(1, "--learning-rate", "1e-2"))
    assert (code, "was made with optim.learning_rate 0.001, this sweep has 0.01" in said) == (2, True), said
    code, said = finish(sweep, [*words(1), "--out", str(tmp_path / "short"), "--max-steps", "4"])
    assert code == 0, said
    assert said.count(": finished, validation loss ") == 2
    code, said = finish(sweep, [*words(1), "--out", str(tmp_path / "short"), "--max-steps", "4"])
    assert (code, "2 of them done" in said, "finished" in said) == (0, True, False), said
    assert all(map(os.path.isdir, glob.glob(str(tmp_path / "short" / "*" / "*"))))  # report.py short/*/* takes them
