"""gpt2/generation/generate.py against one forward pass a token, and against `transformers.generate`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.config import GPTConfig, RunConfig
from gpt2.distributed.parallel import parallelize
from gpt2.distributed.world import joined_world
from gpt2.errors import UserError
from gpt2.generation.generate import generate, stream
from gpt2.model.attention import KVCache
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.model.sampling import Sampling

os.environ["HF_HUB_OFFLINE"] = "1"

TINY: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 70}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rope": {"position": "rope", "n_kv_head": 2, "qk_norm": True},
    "window": {"position": "rope", "window": 5, "full_attention_every": 2},
    "no position": {"position": "none", "window": 3, "norm": "rmsnorm", "bias": False, "tie_embeddings": False},
    "post-norm": {"norm_position": "post", "activation": "swiglu", "logit_softcap": 3.0},
}
PROMPTS = [[1, 2, 3], [4], [7, 8, 9, 10, 11], [5, 6] * 10]  # the last is longer than the context


def build(**changes: Any) -> GPT:
    """A tiny model with weights large enough that its choices vary from token to token."""
    model = GPT(GPTConfig(**{**TINY, **changes})).init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 10
    return model.eval()


def one_pass_a_token(model: GPT, prompt: list[int], n: int) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text[-model.config.block_size :]]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.7, "top_k": 9, "seed": 3}, {"top_p": 0.8, "seed": 2**63 - 1}]
)
def test_the_models_own_method_draws_the_same_tokens(name: str, options: dict[str, Any]) -> None:
    """Into and past the end of the context, from a model in training mode, whose dropout must not act."""
    model = build(**VARIANTS[name], dropout=0.5).train()
    state = torch.random.get_rng_state()
    for start in ([[1, 2, 3], [9, 8, 7]], [[5, 6] * 10]):
        text = model.generate(torch.tensor(start), 20, **options)
        assert [row[len(start[0]) :] for row in text.tolist()] == generate(model, start, max_new_tokens=20, **options)
        assert text[:, : len(start[0])].tolist() == start
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_models_own_method_says_what_is_wrong() -> None:
    model = build()
    for start, options, message in (
        ([[]], {}, r"start is torch.float32 of shape \(1, 0\)"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "a prompt is empty"),
        ([1, 2], {}, r"start is torch.int64 of shape \(2,\); give whole numbers, \(B, T\)"),
        ([[70]], {}, "token id 70 in a prompt is outside the model's vocabulary of 70"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(start, **{"max_new_tokens": 2, **options})
    with torch.no_grad():
        model.ln_f.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        model.generate([[1]], 1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_rows_of_any_length_equal_one_pass_a_token(name: str, use_cache: bool) -> None:
    """Batches of equal and unequal lengths, into and past the end of the context."""
    model = build(**VARIANTS[name])
    expected = [one_pass_a_token(model, prompt, 20) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 5
    for rows in ([0], [3], [0, 0], [0, 1, 2], [0, 1, 2, 3], [2, 3]):
        prompts = [PROMPTS[row] for row in rows]
        result = generate(model, prompts, max_new_tokens=20, temperature=0, use_cache=use_cache)
        assert result == [expected[row] for row in rows], rows


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(penalty: float, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(block_size=32)
    save_pretrained(tmp_path, model.state_dict(), model.config, None)
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for prompt in PROMPTS[:3]:
        options = {"do_sample": False, "max_new_tokens": 25, "repetition_penalty": penalty, "pad_token_id": 0}
        theirs = hf.generate(torch.tensor([prompt]), **options)
        ours = generate(model, [prompt], max_new_tokens=25, temperature=0, repetition_penalty=penalty)
        assert ours[0] == theirs[0, len(prompt) :].tolist()
    if penalty == 1:  # transformers penalises its padding too
        padded = torch.tensor([[0] * (5 - len(p)) + p for p in PROMPTS[:3]])
        mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in PROMPTS[:3]])
        theirs = hf.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=25, pad_token_id=0)
        assert generate(model, PROMPTS[:3], max_new_tokens=25, temperature=0) == theirs[:, 5:].tolist()


def test_bf16_equals_a_model_in_bf16(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(n_embd=64)
    save_pretrained(tmp_path, model.state_dict(), model.config, None)
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    theirs = hf.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    ours = generate(model, [PROMPTS[0]], max_new_tokens=12, temperature=0, dtype=torch.bfloat16)
    assert ours[0] == theirs[0, 3:].tolist()
    assert model.wte.weight.dtype == torch.float32


def test_bf16_without_kernels_for_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain layers take what comes from a cache of another type."""
    model = build(n_embd=64)
    expected = generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0, dtype=torch.bfloat16)
    for name in ("can_pack", "can_sum_columns"):
        monkeypatch.setattr(f"gpt2.model.cpu_inference.{name}", lambda dtype: False)
    assert generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0, dtype=torch.bfloat16) == expected


def test_a_cpu_keeps_keys_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.dtype] = []

    def spy(*arguments: Any) -> KVCache:
        kept.append(arguments[-1])
        return KVCache(*arguments)

    monkeypatch.setattr("gpt2.generation.generate.KVCache", spy)
    generate(build(), PROMPTS[:1], max_new_tokens=2, dtype=torch.bfloat16)
    assert kept == [torch.float32]


def test_autocast_around_it_chooses_the_type() -> None:
    model = build(**VARIANTS["rope"])
    expected = generate(model, PROMPTS, max_new_tokens=12, temperature=0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, PROMPTS, max_new_tokens=12, temperature=0) == expected
        step = stream(model, PROMPTS, Sampling(), max_new_tokens=9)
        next(step)
        assert torch.is_autocast_enabled("cpu")  # the caller's, between two tokens too
        assert not torch.is_inference_mode_enabled()


def test_a_seed_repeats_whatever_the_cache_the_company_and_the_generators_elsewhere() -> None:
    model = build(position="rope")
    options: dict[str, Any] = {"max_new_tokens": 20, "top_p": 0.9, "seed": 11}
    first = generate(model, PROMPTS, **options)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert generate(model, PROMPTS, **options) == first
    assert torch.equal(torch.random.get_rng_state(), before)  # training's draws are untouched
    assert generate(model, PROMPTS, use_cache=False, **options) == first
    assert generate(model, PROMPTS[:1], **options) == first[:1]
    assert generate(model, PROMPTS, **{**options, "seed": 12}) != first
    same_prompt = generate(model, [[1]] * 3, **options)
    assert len({tuple(row) for row in same_prompt}) == 3


def test_end_of_text_ends_its_row_alone() -> None:
    model = build()
    free = generate(model, PROMPTS[:3], max_new_tokens=20, temperature=0)
    eot = free[0][4]
    ended = generate(model, PROMPTS[:3], max_new_tokens=20, temperature=0, eot_token=eot)
    for row, whole in zip(ended, free, strict=True):
        assert row == (whole[: whole.index(eot) + 1] if eot in whole else whole)
    assert len(ended[0]) == free[0].index(eot) + 1 < 20
    assert any(len(row) > len(ended[0]) for row in ended)


def test_the_stream_stops_computing_when_all_rows_have_ended() -> None:
    model = build()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.ln_f.register_forward_hook(count)
    steps = list(
        stream(model, [[1], [2]], Sampling(), max_new_tokens=50, stop=lambda row, token: row == 0 or calls == 3)
    )
    assert calls == 3
    assert [[token is None for token in step] for step in steps] == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = build(dropout=0.5).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = generate(model, [[1, 2]], max_new_tokens=9, temperature=0)
    assert dropped == generate(build(), [[1, 2]], max_new_tokens=9, temperature=0)  # no dropout while sampling
    next(stream(model, [[1]], Sampling(), max_new_tokens=9))  # left half-way
    assert model.training is training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.train()
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # and it can still be trained


def test_padded_ids_never_come_out() -> None:
    """Even from a model that finds every real token unlikely."""
    model = build()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(128, 32))
    with torch.no_grad():
        model.lm_head.weight[70:] = 1e4
    rows = generate(model, [[1]] * 8, max_new_tokens=40, temperature=5.0)
    assert max(max(row) for row in rows) < 70
    assert len({token for row in rows for token in row}) > 60


def test_diverged_weights_are_reported() -> None:
    model = build()
    with torch.no_grad():
        model.wte.weight[5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate(model, [[5]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "a prompt is empty"),
        ([[70]], {}, "token id 70 in a prompt is outside the model's vocabulary of 70"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"eot_token": 70}, "eot_token 70"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_bad_input_is_refused(prompts: list[list[int]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(build(), prompts, **{"max_new_tokens": 2, **options})


def sample_sharded(rank: int, port: int, out: Path) -> None:
    """One of two processes that hold a model's halves; what it draws, twice, in fp32 and under autocast."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with joined_world("cpu") as this:
        model = parallelize(build(), RunConfig(parallel="fsdp", compile=False), this, "fp32", 1)
        options: dict[str, Any] = {"max_new_tokens": 20, "seed": 3, "top_k": 20}
        texts = [generate(model, PROMPTS, **options) for _ in range(2)]  # FSDP leaves the root gathered after the first
        with torch.autocast("cpu", dtype=torch.bfloat16):
            texts.append(generate(model, PROMPTS, **options))
    torch.save(texts, out / f"{rank}.pt")


def test_a_model_spread_over_processes_writes_the_same(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.spawn(sample_sharded, args=(port, tmp_path), nprocs=2)
    alone = generate(build(), PROMPTS, max_new_tokens=20, seed=3, top_k=20)
    for rank in range(2):
        first, second, half = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first == second == alone
        assert [len(row) for row in half] == [20] * 4
