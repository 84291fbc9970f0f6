"""What this machine is: its name, its datasheet peak, its memory in use, the versions a run depends on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Dense bf16 matrix products with fp32 accumulation, without sparsity, FLOP/s, from NVIDIA's data sheets. The first
# name that is part of the device's name counts, so "H100 PCIe" stands before "H100".
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
)


def device_name(device: torch.device) -> str:
    """The device as its maker names it, such as "NVIDIA H100 80GB HBM3"; a CPU's model name where it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def peak_flops(name: str) -> float | None:
    """Datasheet peak of a device for dense bf16, FLOP/s; None where it is not known (every CPU).

    Args:
        name: the device's, as `device_name` returns it.
    """
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in name), None)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware; one that emulates it takes many times as long as for fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # oneDNN is what multiplies it
        return False
    # oneDNN can be told to leave newer instructions alone, to try on this processor what happens on an older one.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if not any(part in limit.upper() for part in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    # PyTorch has no public question for it, and an unknown answer counts as no. The last one is Arm's.
    x86 = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    arm: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return x86 or bool(arm.get("bf16"))


def memory_bytes(device: torch.device) -> int | None:
    """Largest memory this process has held: of the GPU on one, resident memory on a CPU; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def available_memory(root: Path = Path("/")) -> float | None:
    """Bytes of the host's memory that this process may use: all there is, or the least that a control group allows.

    A container's or a Slurm job's limit is below the machine's memory, and going past it ends the process without a
    word. None where neither can be told.

    Args:
        root: directory that holds `proc` and `sys`.
    """
    limits: list[float] = []
    with suppress(ValueError, OSError, AttributeError):
        limits.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:  # "0::/job/step" of version 2, "4:memory:/job/step" of version 1
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.strip("/")
        # In a container the path may be the host's and lead nowhere; the mount itself is then the container's group.
        for directory in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(float((directory / name).read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


def git_commit() -> str | None:
    """Commit of the code that runs, with "+changes" where files differ from it; None outside a clone or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a run's figures depend on besides its configuration, as JSON values.

    Args:
        device: this process's; the others are taken to be alike.
        world_size: processes of the run.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "tiktoken", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "device": device_name(device),
        "device_type": device.type,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "host": platform.node(),
        "platform": platform.platform(),
        "commit": git_commit(),
        "directory": os.getcwd(),
        "versions": versions,
    }
