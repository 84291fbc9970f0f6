"""The type in which matrix products are computed; weights, gradients and optimizer state are fp32 throughout."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from gpt2.errors import UserError, warn
from gpt2.hardware import device_name, multiplies_bf16


def resolve_dtype(choice: str, device: torch.device) -> str:
    """The precision a device computes in: "bf16", "tf32" or "fp32".

    Args:
        choice: one of these, or "auto": bf16 where the hardware multiplies it, else TF32 on CUDA, else fp32.
        device: it is for. Where bf16 is asked for and the device emulates it, that is said.

    Raises:
        UserError: the device cannot compute in it.
    """
    has_bf16 = multiplies_bf16(device)
    if choice == "auto":
        return "bf16" if has_bf16 else "tf32" if device.type == "cuda" else "fp32"
    if choice == "tf32" and device.type != "cuda":
        raise UserError(f"--dtype tf32 is NVIDIA's; on {device.type} use bf16 or fp32")
    if choice == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; use --dtype tf32 or fp32")
    if choice == "bf16" and not has_bf16:
        name = device_name(device)
        warn(f"--dtype bf16: {name} does not multiply bf16 but emulates it; --dtype fp32 is many times as fast")
    return choice


def set_matmul_precision(dtype: str) -> None:
    """Let fp32 matrix products use TF32 unless plain fp32 was asked for; for the whole process."""
    torch.set_float32_matmul_precision("highest" if dtype == "fp32" else "high")


def make_deterministic() -> None:
    """Use only kernels that give the same bits every time, for the whole process; some are slower."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """The context forward passes run in: bf16 autocast, or none."""
    if dtype == "bf16":
        context: AbstractContextManager[None] = torch.autocast(device.type, dtype=torch.bfloat16)
        return context
    return nullcontext()
