"""Claiming a run's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CHARS
from small_runs import ALONE, environment, small, train

from gpt2.config import RunConfig
from gpt2.distributed.world import World
from gpt2.errors import UserError
from gpt2.metrics.reference import corpus_of
from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer
from gpt2.train.setup import lock_run, name_of_data, set_up, with_possible_prompt

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
