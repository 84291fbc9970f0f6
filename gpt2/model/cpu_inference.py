"""A model's copy for inference on a CPU: weights in the type to compute in, laid out once for the kernel that reads.

For a plain `nn.Linear`, oneDNN brings the weight into its own blocked layout on every call. That costs a step of
decoding, which multiplies a few rows by every weight, as much again as the product, and several times as much for the
head; many rows gain less in bf16, but in fp32 `nn.Linear` goes to another library, which is slower on AMD's processors.
`torch.compile` takes the same two operators, after minutes of compiling. A single row is no matter of products at all
but of reading memory, for which another kernel is better.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gpt2.model.gpt import GPT, MLP

_FUSED = {"gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "relu": ("relu", "")}
"""Activations that oneDNN applies to a product before it stores it."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, with the weight in oneDNN's layout, and an activation behind it.

    Args:
        linear: to compute the same as.
        rows: inputs at a time it is laid out for; any number gives the same result.
        dtype: to compute in, whatever the inputs are; None: the weight's.
        activation: computed with the product, a name in `_FUSED`; None: none.
    """

    def __init__(
        self, linear: nn.Linear, rows: int, dtype: torch.dtype | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = dtype or weight.dtype
        # Not buffers: no one may save them.
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), rows)
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)
        self.activation = ("none", "") if activation is None else _FUSED[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in `dtype`."""
        name, variant = self.activation
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, name, [], variant)
        return y


class OneRowLinear(nn.Module):
    """`nn.Linear` for one row at a time, as a weighted sum of the weight's columns: what `embedding_bag` computes.

    Such a product takes as long as the weights take to come from memory. The operator's kernel, FBGEMM's, was written
    to sum tables that lie there and fetches ahead; oneDNN's, written to reuse what it has read, does not. More rows
    than one, a prompt's, are multiplied the usual way, at six to nine tenths of the rate of packed weights.

    Args:
        linear: to compute the same as.
        dtype: to compute in, whatever the input is; sums are in fp32.
    """

    BLOCKS = (128, 64, 32)
    """Outputs that are summed together, one bag. A block lies in memory in the order in which it is read, so larger
    ones are read faster; but threads share out whole bags."""
    UNPACKED_ROWS = 256
    """From so many rows on, laying the weight out as `nn.Linear` has it costs less than products block by block."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = linear.out_features
        threads = torch.get_num_threads()
        block = next((size for size in self.BLOCKS if linear.out_features >= size * threads), self.BLOCKS[-1])
        weight = F.pad(linear.weight.detach().to(dtype), (0, 0, 0, -linear.out_features % block))
        # (blocks, in_features, block). Not a buffer, nor is the bias: no one may save them.
        self.columns = weight.view(-1, block, linear.in_features).transpose(1, 2).contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type it was made for."""
        blocks, width, _ = self.columns.shape
        rows = x.to(self.columns.dtype).reshape(-1, width)  # (n, in_features)
        if len(rows) == 1:
            indices, offsets = _bags(blocks, width)
            scales = rows.expand(blocks, -1).reshape(-1)  # (blocks * in_features,)
            table = self.columns.flatten(0, 1)  # (blocks * in_features, block)
            y = F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=scales)  # (blocks, block)
        elif len(rows) < self.UNPACKED_ROWS:
            y = (rows @ self.columns).transpose(0, 1)  # (n, blocks, block)
        else:
            y = F.linear(rows, self.columns.transpose(1, 2).flatten(0, 1))  # (n, blocks * block)
        y = y.reshape(len(rows), -1)[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


@cache
def _bags(blocks: int, width: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags of `width` rows each, that follow one another."""
    return torch.arange(blocks * width, dtype=torch.int32), torch.arange(0, blocks * width, width, dtype=torch.int32)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this CPU, multiplies packed weights of a type. The operators are not public."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_sum_columns(dtype: torch.dtype) -> bool:
    """Whether `OneRowLinear` has FBGEMM's kernel for a type: this PyTorch was built with the library."""
    return "fbgemm" in torch.backends.quantized.supported_engines and dtype in (torch.float32, torch.bfloat16)


def decoding_copy(model: GPT, dtype: torch.dtype | None = None, rows: int = 1) -> GPT:
    """A copy that decodes fast: parameters in `dtype`, linear layers laid out anew where it helps. For inference only.

    Parameters that keep their type are shared with the model, buffers (RoPE's angles) keep theirs. A copy that this
    function made is returned as it is.

    Args:
        model: is left alone.
        dtype: to compute in; None: the parameters' own.
        rows: that will be decoded at a time; any number gives the same result.

    Raises:
        ValueError: the model is such a copy, of another type.
    """
    own = model.dtype
    dtype = dtype or own
    if isinstance(model.lm_head, PackedLinear | OneRowLinear):
        if dtype != own:
            raise ValueError(f"this copy decodes in {own}; make one in {dtype} from the model it is a copy of")
        return model
    on_cpu = model.wte.weight.device.type == "cpu"
    one_row, pack = on_cpu and rows == 1 and can_sum_columns(dtype), on_cpu and can_pack(dtype)
    if dtype == own and not one_row and not pack:
        return model
    memo: dict[int, object] = {
        id(p): p if dtype == own else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
    }
    fast = copy.deepcopy(model, memo)  # takes the parameters from the memo, tied ones tied
    if one_row:
        for name, layer in list(fast.named_modules()):
            if isinstance(layer, nn.Linear):
                fast.set_submodule(name, OneRowLinear(layer, dtype))
    elif pack:
        _pack_blocks(fast, dtype, rows)
        fast.lm_head = PackedLinear(fast.lm_head, rows)  # type: ignore[assignment]
    return fast


def scoring_copy(model: GPT, dtype: torch.dtype, rows: int) -> GPT:
    """A copy whose blocks multiply in `dtype`, all else in fp32 as under autocast; shares every other parameter.

    The model itself where its weights are sharded, or not on a CPU that packs them.

    Args:
        model: is left alone; its head, too, serves the copy as it is.
        dtype: precision of the blocks' matrix products.
        rows: tokens that will be scored at a time.
    """
    if isinstance(model, FSDPModule) or model.wte.weight.device.type != "cpu" or not can_pack(dtype):
        return model
    fast = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    _pack_blocks(fast, dtype, rows)
    return fast


def _pack_blocks(model: GPT, dtype: torch.dtype, rows: int) -> None:
    """Put packed layers in place of the blocks' linear ones."""
    for block in model.h:
        mlp = block.mlp
        if type(mlp) is MLP and mlp.activation in _FUSED:  # a subclass has a forward or an activation of its own
            inner = PackedLinear(mlp.c_fc, rows, dtype, mlp.activation)
            block.mlp = nn.Sequential(inner, PackedLinear(mlp.c_proj, rows, dtype))
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, PackedLinear(layer, rows, dtype))
