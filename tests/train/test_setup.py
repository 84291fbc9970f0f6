"""What opens before a run: its data, the same for all processes; its directory, for one run at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHARS
from small_runs import ALONE, environment, small, train

from gpt2.config import Config, DataConfig, RunConfig
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.metrics.reference import corpus_of
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.dataset import Dataset, open_dataset, outline
from gpt2.tokens.manifest import MANIFEST_NAME
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer
from gpt2.train.setup import lock_run, name_of_data, open_data, set_up, with_possible_prompt


@dataclass(frozen=True)
class Second(World):
    """Rank 1 without a rank 0, whose answers are given."""

    answers: tuple[Any, ...] = ()

    def on_main(self, work: Callable[[], Any]) -> Any:
        return self.answers

    def agree(self, work: Callable[[], Any]) -> Any:
        return work()


def test_one_process_of_each_machine_compares_its_copy_and_none_opens_it(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(directory: Path, local_rank: int) -> Dataset:
        this = Second(1, local_rank, 2, torch.device("cpu"), answers=(theirs, outline(char_data)))
        return open_data(Config(data=DataConfig(data=directory)), this)[0]

    theirs = open_data(Config(data=DataConfig(data=char_data)), ALONE)[0]
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(char_data, copy)
    write_dataset(other, np.arange(2000) % 59, np.arange(100) % 59, CharTokenizer(CHARS))
    with pytest.raises(UserError, match="other holds other data for rank 1 than for rank 0"):
        second(other, local_rank=0)
    with pytest.raises(UserError, match=r"cannot read the data set .*absent"):
        second(tmp_path / "absent", local_rank=0)
    manifest = copy / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"seconds": 0.0', '"seconds": 1.5'))
    second(copy, local_rank=0)  # of the same tokens, which took another time

    monkeypatch.setattr("gpt2.train.setup.open_dataset", lambda directory: pytest.fail("it was opened"))
    found = second(char_data, local_rank=0)
    second(tmp_path / "absent", local_rank=1)  # is the first's of this machine to look at
    monkeypatch.undo()
    assert found.train.paths == open_dataset(char_data).train.paths
    tokens = found.train.read(0, len(found.train))
    np.testing.assert_array_equal(second(copy, 0).train.read(0, len(tokens)), tokens)


HOLD = "import sys, time; from pathlib import Path; from gpt2.train.setup import lock_run\n"
HOLD += "file = lock_run(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_the_lock_is_another_processs_until_it_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training in"):
            lock_run(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    file = lock_run(tmp_path)
    assert not os.get_inheritable(file.fileno())
    file.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run directory .*file/run: Not a directory"):
        lock_run(tmp_path / "file" / "run")


def test_a_presets_prompt_that_the_vocabulary_lacks_gives_way_and_one_asked_for_does_not() -> None:
    said: list[str] = []
    lower = CharTokenizer("\nabc")
    for prompt in (RunConfig().sample_prompt, "ROMEO:"):
        assert with_possible_prompt(RunConfig(sample_prompt=prompt), lower, said.append).sample_prompt == ""
    assert said[1].startswith("samples begin behind '\\n', not with 'ROMEO:': ':' 'E' 'M' 'O' 'R' not among the 4 char")
    for run, tokenizer in (
        (RunConfig(), gpt2_tokenizer()),
        (RunConfig(sample_prompt="mine"), lower),
        (RunConfig(num_samples=0), lower),
    ):
        assert with_possible_prompt(run, tokenizer, said.append) is run
    assert len(said) == 2


@pytest.mark.parametrize(
    ("name", "description", "corpus"),
    [
        ("corpus", "hf://datasets/HuggingFaceFW/fineweb-edu@v1.0.0/sample/10BT/*", "fineweb-edu"),
        ("corpus", "hf://datasets/someone/fineweb-mirror/*", "fineweb"),
        ("fineweb-edu", "local files", "fineweb-edu"),
        ("corpus", "local files", None),
        ("edufineweb", "hf://datasets/o/n/*", "fineweb-edu"),
    ],
)
def test_baselines_follow_the_recorded_source(tmp_path: Path, name: str, description: str, corpus: str | None) -> None:
    tokens = list(range(50))
    source = {"description": description, "revision": None}
    dataset = write_dataset(tmp_path, tokens, tokens, gpt2_tokenizer(), name=name, source=source)
    assert corpus_of(name_of_data(dataset)) == corpus


@pytest.mark.parametrize(("own", "words"), [(0, "nothing"), (2, "up to step 2")])
def test_a_machine_that_is_ahead_of_rank_0s_is_told_of(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, words: str
) -> None:
    config = small(char_data, tmp_path / "run", max_steps=2)
    if own:
        train(config)
    monkeypatch.setattr(World, "max_", lambda self, tensor: tensor.clamp(min=7))  # another machine's directory
    with pytest.raises(
        UserError, match=f"up to step 7 on another machine, and on rank 0's, .*, {words}; give --run-dir"
    ):
        set_up(config, ALONE)


def test_a_validation_split_is_needed_only_by_what_evaluates(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", np.arange(2000) % 59, np.arange(10) % 59, CharTokenizer(CHARS))
    with pytest.raises(UserError, match="holds a split of 10 tokens, but one block needs"):
        set_up(small(tmp_path / "data", tmp_path / "run", eval_every=5), ALONE)
    assert train(small(tmp_path / "data", tmp_path / "run", max_steps=2)).step == 2
