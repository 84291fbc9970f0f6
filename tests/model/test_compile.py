"""The compiled model is the eager one, faster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from small_runs import environment, finish, flags, small

from gpt2.config import GPTConfig
from gpt2.generation.generate import generate
from gpt2.model.compile import compile_model
from gpt2.model.gpt import GPT
from gpt2.model.loss import IGNORE

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_values_gradients_and_names_are_those_of_the_eager_model(device: str) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=70, logit_softcap=10.0)
    eager, compiled = GPT(config).init_weights(0).to(device), GPT(config).init_weights(0).to(device)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_model(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    tokens = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    losses: list[float] = []
    for model in (eager, compiled):
        loss = model(tokens, targets)
        loss.backward()
        losses.append(loss.item())
    # One for all blocks, one for the softmax: compiling takes as long for 48 blocks as for 2.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_sampling_from_a_compiled_model_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("can_pack", "can_sum_columns"):  # as on a GPU: no copy with blocks of its own
        monkeypatch.setattr(f"gpt2.model.cpu_inference.{name}", lambda dtype: False)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=70)
    eager, compiled = GPT(config).init_weights(0), GPT(config).init_weights(0)
    compile_model(compiled)
    torch._dynamo.utils.counters.clear()
    texts = [generate(model, [[1, 2, 3]], max_new_tokens=4, seed=0) for model in (eager, compiled)]
    assert texts[0] == texts[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_the_compiler_is_loaded_only_to_compile() -> None:
    code = "import sys, gpt2.model.gpt, gpt2.model.compile; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PROBE = "import torch; from gpt2.model.compile import cannot_compile; print(cannot_compile(torch.device('cpu')))"


def obstacle(cache: Path, **variables: str) -> str:
    env = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(cache), **variables}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_machine_without_a_compiler_is_found_out(tmp_path: Path) -> None:
    assert "install g++" in obstacle(tmp_path, CXX="/nowhere/g++")


def test_a_cache_that_cannot_be_written_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = obstacle(tmp_path / "file" / "cache")
    assert said not in ("", "None")
    assert "\n" not in said


def test_a_run_goes_on_uncompiled(char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code, output = finish(ROOT / "train_gpt2.py", flags(small(char_data, tmp_path / "run", max_steps=2, compile=True)))
    assert code == 0, output
    assert output.count("there is no C++ compiler; install g++") == 1
    assert "Traceback" not in output
    assert '"compile": true' in (tmp_path / "run/config.json").read_text()
