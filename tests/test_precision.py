"""Precisions that a device has, and those it is refused."""

from __future__ import annotations

import pytest
import torch

from gpt2 import precision
from gpt2.errors import UserError
from gpt2.precision import autocast, resolve_dtype

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: has_bf16 and device.type == "cpu")
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("fp32", CPU) == "fp32"
    assert resolve_dtype("auto", torch.device("mps")) == "fp32"
    assert capsys.readouterr().err == ""
    assert resolve_dtype("bf16", CPU) == "bf16"  # slowly, but it can
    said = capsys.readouterr().err
    assert said == "" if has_bf16 else said.startswith("warning: --dtype bf16") and said.count("\n") == 1


def test_tf32_is_nvidias() -> None:
    with pytest.raises(UserError, match="tf32 is NVIDIA's; on cpu use bf16 or fp32"):
        resolve_dtype("tf32", CPU)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "tf32")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert resolve_dtype("auto", CUDA) == expected
    assert resolve_dtype("tf32", CUDA) == "tf32"
    if not has_bf16:
        with pytest.raises(UserError, match="Tesla T4 has no bf16"):
            resolve_dtype("bf16", CUDA)


def test_autocast() -> None:
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
