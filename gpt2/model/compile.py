"""How the model is compiled: each block by itself, and the softmax of the loss.

All blocks have the same code and shapes, so the first one's compiled form serves every other, and compiling takes as
long whatever the depth. Blocks are also the units that DDP overlaps, FSDP gathers and activation checkpointing
recomputes. The head's matrix products stay outside: `gpt2.model.loss` walks over them chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from gpt2.errors import first_line
from gpt2.model.attention_kernels import causal_bias
from gpt2.model.gpt import GPT
from gpt2.model.loss import softmax_


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile does not work here and what to install, found by compiling a line; None: it works."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever a compiler, a linker or a cache directory throws
        text = str(error)
        if "Python.h" in text:
            return "Python.h is missing; install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
        if "C++ compiler" in text or "C compiler" in text or "Compiler: cl is not found" in text:
            return "there is no C++ compiler; install g++ (Linux), Xcode's tools (macOS) or MSVC (Windows)"
        return first_line(error)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + 1


def compile_model(model: GPT) -> None:
    """Compile the model's blocks and its loss, in place; parameter names stay as they are.

    Compilation happens at the first call, once for each shape and for training and evaluation apart. Code that calls
    the model with many shapes, such as sampling, does so under `torch.compiler.set_stance("force_eager")`.

    Args:
        model: on its device; to be wrapped by DDP or FSDP afterwards.
    """
    # DDP must not cut a block's graph at its buckets' edges: blocks are smaller than buckets, and overlap as they are.
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {}
    if model.wte.weight.device.type == "cpu":
        from torch._inductor import config as inductor

        torch.compiler.assume_constant_result(causal_bias)  # marks the function
        if hasattr(inductor.cpp, "use_decompose_tanh"):
            # GELU's tanh from an exponential takes half the time. Its error of 1e-7 is lost in GELU's 1 + tanh.
            options["cpp.use_decompose_tanh"] = True
    for block in model.h:
        block.compile(dynamic=False, options=options or None)
    model.softmax = torch.compile(softmax_, dynamic=False)
