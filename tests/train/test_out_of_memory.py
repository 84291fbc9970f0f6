"""What fits, after something did not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ALONE, small, train_loop

from gpt2.config import Config, DataConfig, RunConfig
from gpt2.errors import UserError, first_line, is_out_of_memory, run_cli
from gpt2.train.ending import run_to_its_end
from gpt2.train.memory import memory_need
from gpt2.train.out_of_memory import smaller_micro_batch, what_ran, write_snapshot
from gpt2.train.plan import make_plan

GIB = 2**30
CONFIG = Config(data=DataConfig(micro_batch_size=64))


def needed(size: int) -> float:
    return memory_need(CONFIG, 1, "bf16", "cuda").bytes(size)


def test_signs_of_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GiB)"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)  # what this machine's allocator really says
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_it_says_in_one_line() -> None:
    assert first_line(torch.OutOfMemoryError("CUDA out of memory.\nSee documentation")) == "CUDA out of memory."
    assert first_line(MemoryError()) == "MemoryError"


def fitting(config: Config, memory: float | None, processes: int = 1) -> int | None:
    return smaller_micro_batch(config, make_plan(config, None, processes, "bf16", "cuda", memory), processes)


def test_the_largest_that_fits_by_the_estimate() -> None:
    memory = needed(64) * 0.6
    size = fitting(CONFIG, memory)
    assert size is not None
    assert 512 % size == 0
    assert needed(size) <= 0.95 * memory < needed(2 * size)


def test_an_estimate_that_was_too_low_is_raised() -> None:
    # It said that 64 fit into 1.5 times the memory; they did not, so what is needed is at least that.
    assert fitting(CONFIG, 1.5 * needed(64)) == 32


def test_it_divides_each_processs_part() -> None:
    config = Config(data=DataConfig(micro_batch_size=24, total_batch_tokens=48 * 1024))
    assert fitting(config, None, 2) == 12
    assert fitting(config, 1e15, 2) == 12
    odd = Config(data=DataConfig(micro_batch_size=9, total_batch_tokens=9 * 1024))
    assert fitting(odd, None) == 3


def test_none_fits() -> None:
    assert fitting(CONFIG, 1 * GIB) is None
    assert fitting(Config(data=DataConfig(micro_batch_size=1)), 80 * GIB) is None


def test_advice() -> None:
    plan = make_plan(CONFIG, None, 1, "bf16", "cuda", 8 * GIB)
    assert plan.advice(4, CONFIG).startswith("use --micro-batch-size 4")
    assert plan.advice(None, CONFIG).startswith("use --activation-checkpointing")
    assert "fsdp" in plan.advice(None, Config(run=RunConfig(activation_checkpointing=True)))
    assert "smaller model" in make_plan(CONFIG, None, 1, "bf16", "cuda", 1 * GIB).advice(None, CONFIG)


def test_no_picture_of_a_cpu(tmp_path: Path) -> None:
    assert not write_snapshot(tmp_path / "x.pickle", torch.device("cpu"))
    assert not (tmp_path / "x.pickle").exists()


@pytest.mark.parametrize(
    ("module", "name", "changes", "said"),
    [
        ("gpt2.model.gpt", "GPT.forward", {}, ("training with", "use --micro-batch-size 4")),
        ("gpt2.model.gpt", "GPT.forward", {"eval_every": 10}, ("evaluating the validation loss", "-size 4")),
        (
            "gpt2.generation.generate",
            "check_prompts",
            {"eval_every": 10, "num_samples": 1},
            ("sampling", "--num-samples"),
        ),
        ("gpt2.train.saving", "state_tensors", {"max_steps": 1}, ("saving a checkpoint", "the host's memory")),
    ],
)
def test_it_names_what_ran(
    char_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, changes: Any, said: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(f"{module}.{name}", full)
    with pytest.raises(UserError) as caught:
        run_to_its_end(train_loop, small(char_data, tmp_path / "run", **changes), ALONE)
    for part in said:
        assert part in str(caught.value)


def test_it_names_hellaswag_and_compilation() -> None:
    def raised_in(module: str) -> BaseException:
        code = "def f():\n raise MemoryError\n"
        space: dict[str, Any] = {"__name__": module}
        exec(code, space)
        with pytest.raises(MemoryError) as caught:
            space["f"]()
        return caught.value

    assert what_ran(raised_in("gpt2.hellaswag.score"))[0] == "scoring HellaSwag"
    assert what_ran(raised_in("torch._dynamo.convert_frame"))[0] == "compiling the model"
    assert what_ran(raised_in("train_gpt2"))[0] == "training"


def test_a_command_tells_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        torch.empty(2**60, dtype=torch.int8)

    with pytest.raises(SystemExit) as stop:
        run_cli(full, when_full="use less")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (")
    assert error.endswith("); use less\n")
    assert error.count("\n") == 1
