"""scripts/sample.py and gpt2/generation/text_stream.py: what a reader sees."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from repository import ROOT, load_script

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.generation.generate import generate
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import CharTokenizer

CHARS = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=CHARS.n_vocab)
    model = GPT(config).init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    save_pretrained(directory, model.state_dict(), config, CHARS)
    return directory


@pytest.fixture
def sample(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script in this process; returns what it prints."""
    script: ModuleType = load_script("scripts/sample.py")

    def run(*words: str, stdin: str = "") -> str:
        monkeypatch.setattr(
            sys, "argv", ["sample.py", "-m", str(model_dir), "--device", "cpu", "--dtype", "fp32", *words]
        )
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert script.main() == 0
        return capsys.readouterr().out

    return run


def expected(model_dir: Path, prompt: str, **options: float) -> str:
    model = GPT.from_pretrained(model_dir)
    return CHARS.decode(generate(model, [CHARS.encode(prompt)], **{"max_new_tokens": 20, **options})[0])  # type: ignore[arg-type]


def test_greedy_text_is_generates(model_dir: Path, sample: Callable[..., str], tmp_path: Path) -> None:
    words = ("--max-new-tokens", "20", "--temperature", "0")
    text = "to be" + expected(model_dir, "to be", temperature=0) + "\n"
    assert sample("--prompt", "to be", *words) == text
    assert sample("--prompt", "to be", "--stream", *words) == text
    (tmp_path / "prompt.txt").write_text("to be\n")
    assert sample("-f", str(tmp_path / "prompt.txt"), *words) == text
    assert sample("-f", "-", *words, stdin="to be") == text
    assert sample(*words, stdin="to be\n\nto be\n") == text * 2  # a conversation


def test_an_empty_prompt_begins_a_document(model_dir: Path, sample: Callable[..., str], tmp_path: Path) -> None:
    words = ("--max-new-tokens", "20", "--temperature", "0")
    assert sample("--prompt", "", *words) == expected(model_dir, "\n", temperature=0) + "\n"
    (tmp_path / "empty.txt").write_text("\n")
    assert sample("-f", str(tmp_path / "empty.txt"), *words) == expected(model_dir, "\n", temperature=0) + "\n"


def test_many_prompts_and_samples(model_dir: Path, sample: Callable[..., str]) -> None:
    out = sample("--prompt", "ab", "--prompt", "c d e", "-n", "2", "--seed", "4", "--top-k", "9")
    assert out == sample("--prompt", "ab", "--prompt", "c d e", "-n", "2", "--seed", "4", "--top-k", "9")
    assert out != sample("--prompt", "ab", "--prompt", "c d e", "-n", "2", "--seed", "5", "--top-k", "9")
    assert out.count("--- ") == 4
    assert "--- 1 of 4 ---\nab" in out
    assert "--- 4 of 4 ---\nc d e" in out


def test_stop_text(model_dir: Path, sample: Callable[..., str]) -> None:
    whole = expected(model_dir, "a", temperature=0)
    stop = whole[5:7]
    out = sample("--prompt", "a", "--temperature", "0", "--max-new-tokens", "20", "--stop", stop)
    assert out == "a" + whole[: whole.find(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a<|endoftext|>", "--special"], "<|endoftext|> in the prompt: this vocabulary of 28 has no such"),
        (["--prompt", "A"], "'A' not among the 28 characters"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "a", "-n", "0"], "--num-samples is 0"),
        (["-n", "2"], "needs a --prompt"),
        (["--prompt", "a", "-n", "2", "--stream"], "--stream shows one text"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "a", "--file", "b"], "not both"),
        (["--file", "nowhere.txt"], "cannot read the prompt"),
        (["--file", os.devnull], "it is not a plain file"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a" * 17], "a prompt has 17 tokens, the model's context 16"),
        (["--prompt", "a", "-m", "./nowhere"], "no model at ./nowhere"),
    ],
)
def test_bad_input(words: list[str], message: str, sample: Callable[..., str]) -> None:
    with pytest.raises(UserError) as raised:
        sample(*words)
    assert message in str(raised.value)


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "x"])
def test_a_seed_no_generator_takes(seed: str, sample: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="argument --seed"):
        sample("--prompt", "a", "--seed", seed)


def test_a_real_process_says_it_in_one_line(model_dir: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/sample.py", "-m", str(model_dir), "--prompt", "a", "--top-k", "0"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: top_k is 0; it must be at least 1"
