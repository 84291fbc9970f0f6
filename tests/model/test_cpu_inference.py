"""gpt2/model/cpu_inference.py: the copies compute what the model computes, and share what they can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gpt2.config import GPTConfig
from gpt2.model import cpu_inference as packed
from gpt2.model.compile import compile_model
from gpt2.model.cpu_inference import OneRowLinear, PackedLinear, can_pack, can_sum_columns, decoding_copy, scoring_copy
from gpt2.model.gpt import GPT, MLP

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch has no oneDNN")


def build(**changes: object) -> GPT:
    config = GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 70, **changes})  # type: ignore[arg-type]
    return GPT(config).init_weights(0).eval()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed_for", [1, 8])
def test_any_number_of_rows_gives_the_plain_layers_result(dtype: torch.dtype, bias: bool, packed_for: int) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU does not multiply packed {dtype}")
    torch.manual_seed(0)
    linear = nn.Linear(96, 200, bias=bias).to(dtype)
    layer = PackedLinear(linear, packed_for)
    for shape in ((1, 96), (8, 96), (3, 96), (2, 5, 96), (64, 96)):
        x = torch.randn(shape).to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 128, 200])
@pytest.mark.parametrize("shape", [(1, 96), (96,), (1, 1, 96), (2, 5, 96), (255, 96), (1, 256, 96)])
def test_a_sum_of_columns_is_the_product(dtype: torch.dtype, bias: bool, outputs: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, outputs, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        y = OneRowLinear(linear, dtype)(x)
        assert y.dtype == dtype
        expected = linear.to(dtype)(x.to(dtype))
        torch.testing.assert_close(y, expected, **({} if dtype == torch.float32 else {"atol": 0.01, "rtol": 0.02}))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_an_activation_behind_the_product(dtype: torch.dtype, activation: str) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU does not multiply packed {dtype}")
    torch.manual_seed(0)
    linear = nn.Linear(96, 200)
    x = 3 * torch.randn(64, 96)
    plain = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU(), "relu": nn.ReLU()}[activation](linear(x))
    with torch.inference_mode():
        y = PackedLinear(linear, 64, dtype, activation)(x)
    assert y.dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    torch.testing.assert_close(y.float(), plain.detach(), **tolerance)


@needs_packing
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"activation": "swiglu", "position": "rope"}, {"activation": "relu2", "tie_embeddings": False}]
)
def test_the_scoring_copy_has_the_models_states(changes: dict[str, object], compiled: bool) -> None:
    model = build(**changes)
    if compiled:  # the copy's blocks are not
        compile_model(model)
        torch._dynamo.utils.counters.clear()
    names = [name for name, _ in model.named_parameters()]
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast = scoring_copy(model, torch.float32, 32)
        assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == 2 * 4
        states = fast.hidden(tokens)
        assert not torch._dynamo.utils.counters["stats"]
        torch.compiler.set_stance("force_eager")
        torch.testing.assert_close(states, model.hidden(tokens))
        if can_pack(torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16):
                half, expected = scoring_copy(model, torch.bfloat16, 32).hidden(tokens), model.hidden(tokens)
            assert half.dtype == expected.dtype
            torch.testing.assert_close(half.float(), expected.float(), atol=0.05, rtol=0.05)
    torch.compiler.set_stance("default")
    assert [name for name, _ in model.named_parameters()] == names  # the model itself is left alone
    assert fast.wte.weight is model.wte.weight
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("rows", "layer", "possible"), [(1, OneRowLinear, can_sum_columns), (2, PackedLinear, can_pack)]
)
@pytest.mark.parametrize("changes", [{}, {"position": "rope", "bias": False}, {"tie_embeddings": False}])
def test_the_copy_has_the_models_logits(
    changes: dict[str, object], rows: int, layer: type[nn.Module], possible: Callable[[torch.dtype], bool]
) -> None:
    if not possible(torch.float32) or not possible(torch.bfloat16):
        pytest.skip("this CPU or this PyTorch has no kernel for it")
    model = build(**changes)
    fast = decoding_copy(model, rows=rows)
    assert sum(isinstance(module, layer) for module in fast.modules()) == 2 * 4 + 1
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for part in (tokens, tokens[:1, :1]):
            torch.testing.assert_close(fast(part), model(part))
            half = decoding_copy(model, torch.bfloat16, rows)(part)
            torch.testing.assert_close(half.float(), model(part), atol=0.05, rtol=0.05)
    assert type(model.lm_head) is nn.Linear  # the model itself is left alone
    assert fast.wte.weight is model.wte.weight
    assert decoding_copy(fast) is fast
    with pytest.raises(ValueError, match="this copy decodes in"):
        decoding_copy(fast, torch.bfloat16)


@needs_packing
@pytest.mark.parametrize(
    ("rows", "sums", "packs", "expected"),
    [
        (1, True, True, OneRowLinear),
        (1, True, False, OneRowLinear),
        (1, False, True, PackedLinear),
        (2, True, True, PackedLinear),
        (2, True, False, nn.Linear),
    ],
)
def test_the_layer_for_each_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, sums: bool, packs: bool, expected: type[nn.Module]
) -> None:
    monkeypatch.setattr(packed, "can_sum_columns", lambda dtype: sums)
    monkeypatch.setattr(packed, "can_pack", lambda dtype: packs)
    model = build()
    fast = decoding_copy(model, rows=rows)
    assert type(fast.lm_head) is expected
    assert type(fast.get_submodule("h.1.attn.c_attn")) is expected
    tokens = torch.tensor([[5]])
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens), model(tokens))


@pytest.mark.parametrize(("threads", "blocks"), [(1, 2), (2, 2), (3, 4), (6, 7), (99, 7)])
def test_blocks_are_as_large_as_the_threads_allow(monkeypatch: pytest.MonkeyPatch, threads: int, blocks: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear = nn.Linear(96, 256 if threads <= 2 else 200)
    layer = OneRowLinear(linear, torch.float32)
    assert len(layer.columns) == blocks
    x = torch.randn(1, 96)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x))


def test_angles_stay_precise_in_a_bf16_copy() -> None:
    fast = decoding_copy(build(position="rope"), torch.bfloat16)
    assert fast.rotary_cos.dtype == torch.float32
    assert fast.wte.weight.dtype == torch.bfloat16


def test_without_the_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("can_pack", "can_sum_columns"):
        monkeypatch.setattr(packed, name, lambda dtype: False)
    model = build()
    assert decoding_copy(model) is model
    copy = decoding_copy(model, torch.bfloat16)
    assert type(copy.lm_head) is nn.Linear
    assert copy.lm_head.weight is copy.wte.weight
    assert copy.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_mlp_of_ones_own_keeps_its_activation(rows: int, dtype: torch.dtype | None) -> None:
    """Its class overrides one of `MLP`'s methods, and still bears the name of an activation that can be fused."""

    class Sine(MLP):
        def activate(self, x: torch.Tensor) -> torch.Tensor:
            return 100 * x.sin()

    model = build()
    plain = model(torch.tensor([[5, 6]]))
    for block in model.h:
        block.mlp.__class__ = Sine
    tokens = torch.tensor([[5, 6]])
    with torch.inference_mode():
        assert (model(tokens) - plain).abs().max() > 0.3
        fast = decoding_copy(model, dtype, rows)
        torch.testing.assert_close(fast(tokens).float(), model(tokens), atol=0.1, rtol=0.1)
        if dtype is not None and can_pack(dtype):
            torch.testing.assert_close(scoring_copy(model, dtype, 2)(tokens), model(tokens), atol=0.1, rtol=0.1)
