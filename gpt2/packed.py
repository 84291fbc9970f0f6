"""A model's copy for decoding on a CPU: weights in the type to compute in, laid out for oneDNN once.

A step of decoding multiplies a few rows by every weight, so its time is that of reading the weights. For a plain
`nn.Linear`, oneDNN brings the weight into its own blocked layout on every call, which costs as much again, and several
times as much for the head. `torch.compile` avoids it by the same two operators, after minutes of compiling.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gpt2.model import GPT


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, with the weight in oneDNN's layout.

    Args:
        linear: to compute the same as.
        rows: inputs at a time it is laid out for; any number gives the same result.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        weight = linear.weight.detach()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # not a buffer: no one may save it
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this CPU, multiplies packed weights of a type. The operators are not public."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def decoding_copy(model: GPT, dtype: torch.dtype | None = None, rows: int = 1) -> GPT:
    """A copy that decodes fast: parameters in `dtype`, linear layers packed where that helps. For inference only.

    Parameters that keep their type are shared with the model, buffers (RoPE's angles) keep theirs. A copy that this
    function made is returned as it is.

    Args:
        model: is left alone.
        dtype: to compute in; None: the parameters' own.
        rows: that will be decoded at a time.
    """
    own = model.wte.weight.dtype
    dtype = dtype or own
    if isinstance(model.lm_head, PackedLinear) and dtype == own:
        return model
    pack = model.wte.weight.device.type == "cpu" and can_pack(dtype)
    if dtype == own and not pack:
        return model
    memo: dict[int, object] = {
        id(p): p if dtype == own else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
    }
    fast = copy.deepcopy(model, memo)  # takes the parameters from the memo, tied ones tied
    if pack:
        for name, module in list(fast.named_modules()):
            if type(module) is nn.Linear:
                parent, _, child = name.rpartition(".")
                setattr(fast.get_submodule(parent), child, PackedLinear(module, rows))
    return fast
