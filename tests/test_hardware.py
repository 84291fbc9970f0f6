"""Names, peaks and memory of devices."""

from __future__ import annotations

import json
import re

import pytest
import torch

from gpt2.hardware import device_name, environment, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("AMD EPYC 9R14", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_datasheet_peaks_by_name(name: str, tera: float | None) -> None:
    peak = peak_flops(name)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_memory_is_the_peak_of_this_process() -> None:
    before = memory_bytes(torch.device("cpu"))
    assert before is not None
    block = bytearray(before + 2**26)  # larger than anything so far
    block[::4096] = b"x" * len(block[::4096])
    after = memory_bytes(torch.device("cpu"))
    assert after is not None
    assert after >= len(block)


def test_the_environment_is_json_and_names_what_matters() -> None:
    facts = environment(torch.device("cpu"), 3)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["world_size"] == 3
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] == device_name(torch.device("cpu")) != ""
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["commit"])


@pytest.mark.gpu
def test_a_gpu_has_a_name_and_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    held = memory_bytes(device)
    assert held is not None
    assert held >= block.numel()
    assert "NVIDIA" in device_name(device)
