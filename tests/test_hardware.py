"""Names, peaks and memory of devices."""

from __future__ import annotations

import json
import re

import pytest
import torch

from gpt2.hardware import available_memory, device_name, environment, memory_bytes, multiplies_bf16, peak_flops


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


@pytest.mark.parametrize(
    ("x86", "arm", "limit", "onednn", "expected"),
    [
        ("avx512_bf16", False, "", True, True),
        ("amx_tile", False, "DEFAULT", True, True),
        ("avx512", False, "", True, False),
        ("avx512_bf16", False, "AVX2", True, False),
        ("avx512_bf16", False, "avx512_core_vnni", True, False),
        ("avx512_bf16", False, "AVX512_CORE_BF16", True, True),
        ("amx_tile", False, "AVX512_CORE_AMX", True, True),
        ("", True, "", True, True),
        ("", True, "", False, False),  # PyTorch for macOS: instructions that nobody uses
        ("", False, "", True, False),
    ],
)
def test_cpus_that_multiply_bf16(
    monkeypatch: pytest.MonkeyPatch, x86: str, arm: bool, limit: str, onednn: bool, expected: bool
) -> None:
    for name in ("avx512_bf16", "amx_tile", "avx512"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == x86, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True} if arm else {}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bf16(torch.device("cpu")) == expected


def test_other_devices_that_multiply_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_bf16(torch.device("mps"))
    # A T4 emulates it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bf16(torch.device("cuda"))


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


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/job/step\n", {"job/memory.max": "1048576", "job/step/memory.max": "max"}, 2**20),  # the outer one counts
        ("0::/job\n", {"memory.max": "4096", "job/memory.max": "1048576"}, 4096),
        ("4:cpu:/a\n3:memory:/job\n", {"memory/job/memory.limit_in_bytes": "8192", "a/memory.max": "1"}, 8192),
        ("1:memory:/host/path\n", {"memory/memory.limit_in_bytes": "8192"}, 8192),  # a container's own mount
        ("3:memory:/job\n", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, None),  # none set
    ],
)
def test_available_memory_heeds_control_groups(tmp_path, groups, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    physical = available_memory(tmp_path / "nowhere")
    assert physical is not None
    assert physical > 2**28
    assert available_memory(tmp_path) == (physical if expected is None else expected)
