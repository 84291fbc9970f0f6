"""Claiming a run's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import environment

from gpt2.config import RunConfig
from gpt2.errors import UserError
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer
from gpt2.train.setup import lock_run, with_possible_prompt

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
