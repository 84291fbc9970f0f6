"""gpt2/model/gpt.py against a literal network, hand arithmetic and its promises about variants and padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.model.attention_kernels import attention_mask
from gpt2.model.gpt import GPT
from gpt2.model.loss import IGNORE

TINY: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 70}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rope": {"position": "rope", "rope_theta": 500.0},
    "no position": {"position": "none"},
    "grouped queries": {"n_kv_head": 2},
    "multi-query": {"n_kv_head": 1},
    "window": {"window": 3},
    "window, some full": {"window": 3, "full_attention_every": 2},
    "erf gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "rmsnorm": {"norm": "rmsnorm"},
    "qk_norm": {"qk_norm": True},
    "post-norm": {"norm_position": "post"},
    "post-norm, final norm": {"norm_position": "post", "final_norm": True},
    "no bias": {"bias": False},
    "untied": {"tie_embeddings": False},
    "softcap": {"logit_softcap": 0.5},
    "algebraic softcap": {"logit_softcap": 0.5, "logit_softcap_form": "algebraic"},
    "embedding norm": {"embedding_norm": True},
    "head bias": {"tie_embeddings": False, "head_bias": True},
    "scale": {"attention_scale": 0.3},
    "half a rope": {"position": "rope", "rope_fraction": 0.5, "rope_clockwise": True, "rope_theta": 50.0},
    "epsilon": {"norm_eps": 0.3},
    "padding in the softmax": {"tie_embeddings": False, "softmax_over_padding": True},
    "bf16 table": {"tie_embeddings": False, "bf16_embedding": True},
    "recipe": {
        "position": "rope",
        "rope_theta": 30.0,
        "rope_fraction": 0.5,
        "rope_clockwise": True,
        "attention_scale": 0.12,
        "activation": "relu2",
        "norm": "rmsnorm",
        "norm_eps": None,
        "qk_norm": True,
        "embedding_norm": True,
        "tie_embeddings": False,
        "head_bias": True,
        "logit_softcap": 15.0,
        "logit_softcap_form": "algebraic",
        "softmax_over_padding": True,
        "bf16_embedding": True,
    },
    "modern": {
        "position": "rope",
        "n_kv_head": 2,
        "window": 4,
        "full_attention_every": 3,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
        "logit_softcap": 15.0,
    },
    "odd": {
        "position": "none",
        "n_kv_head": 1,
        "window": 2,
        "activation": "relu2",
        "norm": "rmsnorm",
        "norm_position": "post",
        "qk_norm": True,
        "logit_softcap": 1.0,
    },
}


def build(seed: int = 0, **changes: Any) -> GPT:
    """A tiny model in evaluation mode whose biases and gains are not at their trivial initial values."""
    model = GPT(GPTConfig(**{**TINY, **changes})).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.2 * noise
            elif name.startswith("h."):
                parameter += 0.1 * noise
        model.zero_padding_rows()
    return model


def tokens_of(rows: int, length: int, vocab_size: int = 70, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def literal_logits(model: GPT, tokens: list[int]) -> Tensor:
    """The network in double precision, token by token and head by head, from the papers' equations. (T, vocab_size)."""
    c = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    hs, share = c.n_embd // c.n_head, c.n_head // (c.n_kv_head or c.n_head)

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + (w[f"{name}.bias"] if c.bias else 0)

    machine_eps = torch.finfo(torch.float32).eps

    def norm(name: str, x: Tensor) -> Tensor:
        eps = machine_eps if c.norm_eps is None else c.norm_eps
        if c.norm == "rmsnorm":
            return x / torch.sqrt((x * x).mean() + eps) * w[f"{name}.weight"]
        x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + eps)
        return x * w[f"{name}.weight"] + (w[f"{name}.bias"] if c.bias else 0)

    def turn(x: Tensor, t: int) -> Tensor:
        y = x.clone()
        turning = int(c.rope_fraction * hs / 2)
        for i in range(turning):
            a = t * c.rope_theta ** (-i / turning)
            if c.rope_clockwise:  # y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin
                y[i] = x[i] * math.cos(a) + x[i + hs // 2] * math.sin(a)
                y[i + hs // 2] = x[i + hs // 2] * math.cos(a) - x[i] * math.sin(a)
                continue
            y[i] = x[i] * math.cos(a) - x[i + hs // 2] * math.sin(a)
            y[i + hs // 2] = x[i] * math.sin(a) + x[i + hs // 2] * math.cos(a)
        return y

    def activation(x: Tensor) -> Tensor:
        if c.activation == "gelu_tanh":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        if c.activation == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        if c.activation == "swiglu":
            gate, up = x[: len(x) // 2], x[len(x) // 2 :]
            return gate * torch.sigmoid(gate) * up
        x = torch.clamp(x, min=0)
        return x * x if c.activation == "relu2" else x

    stream = [w["wte.weight"][token] for token in tokens]
    if c.position == "learned":
        stream = [x + w["wpe.weight"][t] for t, x in enumerate(stream)]
    if c.embedding_norm:
        stream = [norm("ln_e", x) for x in stream]
    scale = 1 / math.sqrt(hs) if c.attention_scale is None else c.attention_scale
    for layer in range(c.n_layer):
        block = f"h.{layer}"
        full = c.window is None or (c.full_attention_every and (layer + 1) % c.full_attention_every == 0)
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        for t, x in enumerate(stream):
            qkv = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x) if c.norm_position == "pre" else x)
            parts = list(qkv.split(hs))
            n_kv = c.n_head // share
            qs, ks, vs = parts[: c.n_head], parts[c.n_head : c.n_head + n_kv], parts[c.n_head + n_kv :]
            if c.qk_norm:
                qs, ks = ([z / torch.sqrt((z * z).mean() + machine_eps) for z in zs] for zs in (qs, ks))
            if c.position == "rope":
                qs, ks = ([turn(z, t) for z in zs] for zs in (qs, ks))
            keys.append(ks)
            values.append(vs)
            first = 0 if full else max(0, t - (c.window or 0) + 1)
            mixed = []
            for head in range(c.n_head):
                scores = torch.stack([qs[head] @ keys[s][head // share] * scale for s in range(first, t + 1)])
                mixed.append(
                    sum(
                        p * values[s][head // share]
                        for p, s in zip(scores.softmax(0), range(first, t + 1), strict=True)
                    )
                )
            update = linear(f"{block}.attn.c_proj", torch.cat(mixed))  # type: ignore[arg-type]
            x = norm(f"{block}.ln_1", x + update) if c.norm_position == "post" else x + update
            inner = norm(f"{block}.ln_2", x) if c.norm_position == "pre" else x
            update = linear(f"{block}.mlp.c_proj", activation(linear(f"{block}.mlp.c_fc", inner)))
            stream[t] = norm(f"{block}.ln_2", x + update) if c.norm_position == "post" else x + update
    if c.norm_position == "pre" or c.final_norm:
        stream = [norm("ln_f", x) for x in stream]
    logits = torch.stack([w["lm_head.weight"] @ x for x in stream])[:, : c.vocab_size]
    if c.head_bias:
        logits = logits + w["lm_head.bias"][: c.vocab_size]
    if c.logit_softcap is None:
        return logits
    if c.logit_softcap_form == "algebraic":
        return c.logit_softcap * logits / (logits**2 + c.logit_softcap**2).sqrt()
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_literal_network(name: str) -> None:
    model = build(**VARIANTS[name])
    tokens = tokens_of(2, 12)
    with torch.no_grad():
        logits = model(tokens)
        expected = torch.stack([literal_logits(model, row) for row in tokens.tolist()])
    assert logits.shape == (2, 12, 70)
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name: str) -> None:
    """Loss on one batch falls well below where it starts, and every parameter takes part."""
    model = GPT(GPTConfig(**{**TINY, **VARIANTS[name], "dropout": 0.05})).init_weights(0).train()
    torch.manual_seed(0)
    tokens = tokens_of(4, 13)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # At most the log of the vocabulary plus noise at first; a softcap of ±0.5 cannot get further than 1 nat below it.
    first = math.log(model.config.softmax_size)
    assert losses[0] == pytest.approx(first, abs=0.3 if "post" not in name and name != "odd" else 2)
    assert losses[-1] < losses[0] - (0.3 if "softcap" in name or name == "odd" else 1.0)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.count_nonzero() > 0, parameter_name


def test_a_grouped_query_model_with_all_heads_is_the_plain_one_bitwise() -> None:
    plain, grouped = build(), build(n_kv_head=4)
    tokens = tokens_of(2, 12)
    for a, b in zip(plain.parameters(), grouped.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain(tokens), grouped(tokens))


@pytest.mark.parametrize("window", [12, 13, 1000])
def test_a_window_of_the_context_is_full_attention_bitwise(window: int) -> None:
    tokens = tokens_of(2, 12)
    assert torch.equal(build()(tokens), build(window=window)(tokens))
    assert not torch.allclose(build()(tokens), build(window=11)(tokens))  # and one less is not


def test_a_grouped_query_model_is_the_plain_one_with_repeated_keys() -> None:
    grouped, plain = build(n_kv_head=2), build()
    plain.load_state_dict({n: t for n, t in grouped.state_dict().items() if "c_attn" not in n}, strict=False)
    with torch.no_grad():
        for a, b in zip(grouped.h, plain.h, strict=True):
            for name in ("weight", "bias"):
                q, k, v = getattr(a.attn.c_attn, name).split([32, 16, 16])  # type: ignore[union-attr]
                wide = [z.view(2, 8, -1).repeat_interleave(2, dim=0).reshape(32, -1) for z in (k, v)]
                target = getattr(b.attn.c_attn, name)  # type: ignore[union-attr]
                target.copy_(torch.cat([q.view(32, -1), *wide]).view_as(target))
        tokens = tokens_of(2, 12)
        torch.testing.assert_close(plain(tokens), grouped(tokens))


def test_rope_logits_do_not_depend_on_where_the_text_stands() -> None:
    model = build(position="rope", block_size=64)
    tokens = tokens_of(2, 12)
    with torch.no_grad():
        here = model.hidden(tokens)
        there = model.hidden(tokens, positions=torch.arange(40, 52)[None])
        stretched = model.hidden(tokens, positions=2 * torch.arange(12)[None])
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(stretched, here, atol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "rope", "window", "modern", "odd"])
def test_no_token_sees_the_future(name: str) -> None:
    model = build(**VARIANTS[name])
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 70
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


@pytest.mark.parametrize("name", ["gpt2", "rope", "window", "modern"])
def test_packed_rows_equal_separate_ones(name: str) -> None:
    """A mask and positions make two texts in one row independent."""
    model = build(**VARIANTS[name])
    tokens = tokens_of(1, 11)
    text = torch.tensor([0] * 5 + [1] * 6)
    positions = torch.tensor([[*range(5), *range(6)]])
    with torch.no_grad():
        packed = model.hidden(tokens, positions, mask=(text[:, None] == text[None, :])[None])
        separate = torch.cat((model.hidden(tokens[:, :5]), model.hidden(tokens[:, 5:])), dim=1)
    torch.testing.assert_close(packed, separate)
    assert attention_mask(positions, positions, None, (text[:, None] == text[None, :])[None]).shape == (1, 1, 11, 11)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_padding_rows_stay_zero_and_take_no_probability(tie_embeddings: bool) -> None:
    model = GPT(GPTConfig(**{**TINY, "tie_embeddings": tie_embeddings})).init_weights(0)
    assert model.wte.weight.shape == (128, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = tokens_of(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()
    for table in (model.wte.weight, model.lm_head.weight):
        assert (table[70:] == 0).all()
        assert (table[:70] != 0).any(dim=1).all()
    logits = model(tokens)
    assert logits.shape[-1] == 70
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, tokens), expected)


def test_the_loss_is_a_sum_over_the_targets_that_count() -> None:
    model = build()
    tokens = tokens_of(2, 12)
    targets = tokens.clone()
    targets[0, 3:] = IGNORE
    whole = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(model(tokens, targets), whole)
    assert model(tokens, torch.full_like(tokens, IGNORE)).item() == 0


def test_initial_weights_have_gpt2s_scale_and_come_from_the_seed_alone() -> None:
    config = GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=128, vocab_size=1000)
    torch.manual_seed(1)
    model = GPT(config).init_weights(7)
    torch.manual_seed(2)
    again = GPT(config).init_weights(7)
    other = GPT(config).init_weights(8)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.ndim == 1:
            assert (a == (1 if name.endswith("weight") else 0)).all(), name
            continue
        assert not torch.equal(a, c)
        real = a[:1000] if name == "wte.weight" else a
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        assert real.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(real.mean().item()) < 5 * std / math.sqrt(real.numel()), name
    assert model.lm_head.weight is model.wte.weight


def test_zero_initialised_projections_make_every_block_an_identity() -> None:
    model = GPT(GPTConfig(**TINY, zero_init_projections=True)).init_weights(0).eval()
    tokens = tokens_of(1, 12)
    with torch.no_grad():
        embedded = model.wte(tokens) + model.wpe(torch.arange(12))  # type: ignore[misc]
        assert torch.equal(model.hidden(tokens), model.ln_f(embedded))


# Hand arithmetic, L layers of width C over V = 50,257 and T = 1024:
#   V C + T C + L (12 C² + 13 C) + 2 C.  124M: 38,597,376 + 786,432 + 12 × 7,087,872 + 1,536 = 124,439,808.
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_flops_match_hand_arithmetic(name: str) -> None:
    n_layer, n_head, n_embd, expected = SIZES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_parameters() == expected
    assert expected == 50257 * n_embd + 1024 * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd
    n = expected - 1024 * n_embd
    assert model.flops_per_token() == 6 * n + 6 * n_layer * n_embd * 1024
    assert model.flops_per_token(256) == 6 * n + 6 * n_layer * n_embd * 256


def test_parameters_and_flops_of_variants() -> None:
    base = GPT(GPTConfig(**TINY))
    untied = GPT(GPTConfig(**TINY, tie_embeddings=False))
    assert untied.num_parameters() == base.num_parameters() + 70 * 32
    assert untied.flops_per_token() == base.flops_per_token()  # the second table is only looked up
    grouped = GPT(GPTConfig(**TINY, n_kv_head=1))
    assert base.num_parameters() - grouped.num_parameters() == 3 * 2 * 3 * 8 * (32 + 1)
    bare = GPT(GPTConfig(**TINY, position="none", bias=False, norm="rmsnorm"))
    assert bare.num_parameters() == 70 * 32 + 3 * (12 * 32 * 32 + 2 * 32) + 32
    # A window of w: query t sees min(t + 1, w) keys. In the limit of long rows that is w - w²/2T on average.
    config = GPTConfig(**{**TINY, "block_size": 1024, "window": 256, "full_attention_every": 3})
    seen = sum(min(t + 0.5, 256 - 0.5 * (t >= 256) + 0.5 * (t >= 256)) for t in range(1024)) / 1024
    windowed = GPT(config)
    n = windowed.num_parameters() - 1024 * 32
    assert windowed.flops_per_token() == pytest.approx(6 * n + 12 * 32 * (2 * seen + 512), rel=1e-9)


def test_swiglu_keeps_the_parameter_count() -> None:
    plain = GPT(GPTConfig(n_layer=2, n_head=12, n_embd=768, bias=False)).num_parameters()
    gated = GPT(GPTConfig(n_layer=2, n_head=12, n_embd=768, bias=False, activation="swiglu")).num_parameters()
    assert gated == plain  # 8/3 × 768 = 2048 is a multiple of 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 30}, "n_embd 30 is not divisible by n_head 4"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_kv_head": 0}, "n_kv_head 0"),
        ({"n_embd": 12, "position": "rope"}, "head dimension n_embd / n_head is 3, an odd number"),
        ({"window": 0}, "window is 0"),
        ({"full_attention_every": 2}, "there is no window"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_impossible_shapes_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GPTConfig(**{**TINY, **changes})
