"""One run however it is split over processes, and processes that never go separate ways. Real processes, gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from repository import ROOT
from small_runs import assert_same_bits, finish, flags, losses, records, saved, small, train
from two_ranks import BF16, POISONED_STEP, STOPPED_AT, TABLE

from gpt2.errors import UserError


@pytest.fixture(scope="module")
def two_ranks(char_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The runs of tests/two_ranks.py, and what each of its processes found."""
    out = tmp_path_factory.mktemp("two_ranks")
    code, output = finish(ROOT / "tests/two_ranks.py", [str(char_data), str(out)], processes=2)
    assert code == 0, output
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def reference(char_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, one micro-batch a step."""
    out = tmp_path_factory.mktemp("reference") / "1x8x1"
    train(small(char_data, out, eval_every=15))
    return out


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a).keys() == losses(b).keys() == set(range(1, 31))
    torch.testing.assert_close(list(losses(a).values()), list(losses(b).values()), atol=1e-5, rtol=0)
    for kind in ("val", "train"):
        key = "loss" if kind == "val" else "grad_norm"
        values = [[line[key] for line in records(run, kind)] for run in (a, b)]
        torch.testing.assert_close(*values, atol=2e-5, rtol=1e-4)
    x, y = saved(a, 30), saved(b, 30)
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(
            x[name], y[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", TABLE)
def test_two_processes_train_as_one(two_ranks: tuple[Path, list[dict[str, Any]]], reference: Path, name: str) -> None:
    out, found = two_ranks
    assert [f[name] for f in found] == [0, 0]
    assert_same_run(reference, out / name)


def test_in_bf16_too_one_process_ddp_and_fsdp_train_alike(
    char_data: Path, tmp_path: Path, two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    train(small(char_data, tmp_path, **BF16))
    for parallel in ("ddp", "fsdp"):
        for kind in ("train", "val"):
            one, two = losses(tmp_path, kind), losses(two_ranks[0] / f"bf16_{parallel}", kind)
            assert one.keys() == two.keys()
            torch.testing.assert_close(list(one.values()), list(two.values()), atol=2e-4, rtol=0)
        for f in two_ranks[1]:
            # The stream and the gains keep fp32; only a matrix product's result is bf16.
            types = ["stream, gain, normed float32 float32 float32", "update bfloat16"]
            assert f[f"bf16_{parallel}"][:2] == [0, types]


def test_a_sharded_gradient_is_never_whole(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for f in two_ranks[1]:
        assert f["bf16_ddp"][2] == [0, 1]  # the first of a step's two micro-steps finds none
        assert f["bf16_fsdp"][2] == [0, 0.5]


def test_accumulation_trains_the_same(char_data: Path, tmp_path: Path, reference: Path) -> None:
    train(small(char_data, tmp_path, micro_batch_size=2, eval_every=15))
    assert_same_run(reference, tmp_path)


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_fsdp_alone_trains_the_same(char_data: Path, tmp_path: Path, reference: Path, micro_batch_size: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(small(char_data, tmp_path, micro_batch_size=micro_batch_size, parallel="fsdp", eval_every=15))
    finally:
        dist.destroy_process_group()
    assert_same_run(reference, tmp_path)


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_four_processes_resume_bit_for_bit(char_data: Path, tmp_path: Path, micro_batch_size: int) -> None:
    # Sums over two processes are the same in any order; over four DDP's buckets show.
    shape = {"n_layer": 4, "n_embd": 64, "micro_batch_size": micro_batch_size, "max_steps": 6}
    whole = small(char_data, tmp_path / "whole", checkpoint_every=3, **shape)
    resumed = small(char_data, tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoints/step_00000003"), **shape)
    for config in (whole, resumed):
        code, output = finish(ROOT / "train_gpt2.py", flags(config), 4)
        assert code == 0, output
    assert_same_bits(saved(tmp_path / "whole", 6), saved(tmp_path / "resumed", 6))


def test_fsdp_without_torchrun_is_refused(char_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start it with torchrun, or use --parallel ddp"):
        train(small(char_data, tmp_path / "run", parallel="fsdp"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_stop_together_and_one_goes_on(
    char_data: Path, two_ranks: tuple[Path, list[dict[str, Any]]], reference: Path, parallel: str
) -> None:
    out, found = two_ranks
    assert [f[f"stopped_{parallel}"] for f in found] == [[0, STOPPED_AT]] * 2
    train(small(char_data, out / f"stopped_{parallel}", micro_batch_size=8, allow_config_change=True))
    torch.testing.assert_close(
        list(losses(out / f"stopped_{parallel}").values()), list(losses(reference).values()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", [*TABLE, "first_step"])
def test_a_gradient_spoilt_on_one_rank_stops_both_before_the_update(
    two_ranks: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    found = [f[f"poisoned_{name}"] for f in two_ranks[1]]
    step = 1 if name == "first_step" else POISONED_STEP
    where = "after it was summed over all ranks" if "fsdp" in name else "on rank 1"
    message = f"Diverged: the gradient is not finite {where} in step {step}; the weights were not updated"
    assert found == [[message, True], [message, True]]


def test_what_one_rank_cannot_read_ends_both(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    # The second read of the training split is step 2's; of the validation split the evaluation's after step 3.
    for f in two_ranks[1]:
        assert f["unreadable_train_blocks"] == ["UserError: this shard is gone", 2]
        assert f["unreadable_val_blocks"] == ["UserError: this shard is gone", 3]


def test_rank_0_does_the_work_of_starting_for_all(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (f["work at start"] for f in two_ranks[1])
    assert (
        first["files of the data set opened"] == 6
    )  # manifest and four headers, and once more what tells copies apart
    assert set(second.values()) == {0}


def test_the_world_agrees(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = two_ranks[1]
    assert [first["agreed"], second["agreed"]] == [0, 10]
    assert first["main_has_a_bug"] == "KeyError: 'key'"
    assert second["main_has_a_bug"] == "UserError: rank 0 failed: KeyError('key')"
    for f in (first, second):
        assert f["one_disagrees"] == "UserError: rank 1 has a problem"
        assert f["main_fails"] == "UserError: rank 0 has a problem"
        assert f["main_says"] == 7
        assert f["shared"] == {"a": [[0, 3], [1, 4], [2, 5]], "b": 4}
        assert f["any"] == [False, True]
