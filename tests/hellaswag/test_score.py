from __future__ import annotations

import copy
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hellaswag_examples import SHAPES, make_examples, make_model, naive_log_probs, needs_real, real_examples
from repository import ROOT
from torch import Tensor

import gpt2.hellaswag.download
from gpt2.config import GPTConfig, RunConfig
from gpt2.distributed.parallel import parallelize
from gpt2.distributed.world import World, joined_world
from gpt2.errors import UserError
from gpt2.hellaswag.download import load_examples
from gpt2.hellaswag.examples import Example
from gpt2.hellaswag.rows import CONVENTIONS, Convention, Rows, make_rows
from gpt2.hellaswag.score import Head, Result, _result, evaluate_hellaswag
from gpt2.model.gpt import GPT
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer

ALONE = World(0, 0, 1, torch.device("cpu"))
TOLERANCE = 1e-4  # nats, of a sum over an ending


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_rows.cache_clear()


def score(model: GPT, examples: tuple[Example, ...], **options: Any) -> Result:
    return evaluate_hellaswag(model, examples, gpt2_tokenizer(), world=ALONE, **options)


def assert_same(result: Result, other: Result) -> None:
    np.testing.assert_allclose(result.log_probs, other.log_probs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(result.predictions, other.predictions)
    np.testing.assert_array_equal(result.predictions_norm, other.predictions_norm)
    assert (result.acc, result.acc_norm) == (other.acc, other.acc_norm)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_each_ending_alone(shape: str, convention: Convention) -> None:
    examples = make_examples(14)
    model = make_model(SHAPES[shape])
    result = score(model, examples, convention=convention)
    reference = naive_log_probs(model, examples, gpt2_tokenizer(), convention)
    np.testing.assert_allclose(result.log_probs, reference, rtol=0, atol=TOLERANCE)

    lengths = result.lengths
    labels = np.array([example.label for example in examples])
    assert result.acc == (reference.argmax(1) == labels).mean()
    assert result.acc_norm == ((reference / lengths).argmax(1) == labels).mean()
    assert result.acc_norm_stderr == pytest.approx(((reference / lengths).argmax(1) == labels).std(ddof=1) / 14**0.5)
    assert (result.examples, result.labelled) == (14, 14)
    assert (result.truncated > 0) == (shape == "short")


@needs_real
def test_scores_of_real_examples_equal_each_ending_alone() -> None:
    examples = real_examples(12)
    model = make_model(SHAPES["gpt2"])
    for convention in CONVENTIONS:
        reference = naive_log_probs(model, examples, gpt2_tokenizer(), convention)
        result = score(model, examples, convention=convention)
        np.testing.assert_allclose(result.log_probs, reference, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(result.predictions, reference.argmax(1))


def test_lengths_are_tokens_or_characters() -> None:
    example = Example(0, "x", "y", "", "y", ("[step] naïve", " Roofing roof", "c", "d"), 0)
    model = make_model(SHAPES["gpt2"])
    encode = gpt2_tokenizer().encode
    completion = score(model, (example,), convention="completion").lengths.tolist()
    assert completion == [[len(encode(" " + ending)) for ending in example.endings]]
    harness = score(model, (example,), convention="harness").lengths.tolist()
    assert harness == [[len(" naïve"), len("Roofing roof"), 1, 1]]


def test_batches_and_order_do_not_matter() -> None:
    examples = make_examples(9)
    model = make_model(SHAPES["gpt2"])
    result = score(model, examples)
    for budget in (1, 200):
        assert_same(score(model, examples, token_budget=budget), result)
    backwards = score(model, examples[::-1])
    np.testing.assert_allclose(backwards.log_probs[::-1], result.log_probs, rtol=0, atol=TOLERANCE)
    assert (backwards.acc, backwards.acc_norm) == (result.acc, result.acc_norm)


def test_memory_is_bounded_by_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hidden = GPT.hidden

    def spy(self: GPT, tokens: Tensor, *args: Any) -> Tensor:
        seen.append(tokens.numel())
        return hidden(self, tokens, *args)

    monkeypatch.setattr(GPT, "hidden", spy)
    result = score(make_model(SHAPES["gpt2"]), make_examples(12), token_budget=256)
    assert max(seen) <= 256
    assert sum(seen) == result.tokens
    assert len(seen) > 3

    chunks: list[int] = []
    head = Head(make_model(SHAPES["gpt2"]), torch.float32, chunk=5, tile=2)
    head.linear.register_forward_pre_hook(lambda module, inputs: chunks.append(len(inputs[0])))
    head.log_probs(torch.randn(12, 32), torch.zeros(12, 4, dtype=torch.long))
    assert chunks == [5, 5, 2]


def test_a_cpu_sees_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: set[int] = set()
    chunks: list[int] = []
    hidden, log_probs = GPT.hidden, Head.log_probs

    def spy(self: GPT, tokens: Tensor, *args: Any) -> Tensor:
        lengths.add(tokens.size(1))
        return hidden(self, tokens, *args)

    def count(self: Head, states: Tensor, targets: Tensor) -> Tensor:
        chunks.append(len(states))
        return log_probs(self, states, targets)

    monkeypatch.setattr(GPT, "hidden", spy)
    monkeypatch.setattr(Head, "log_probs", count)
    result = score(make_model(SHAPES["gpt2"]), make_examples(60), token_budget=256)
    assert all(length % 4 == 0 for length in lengths)
    assert sum(chunks) == result.scored > 1024
    assert all(chunk % 1024 == 0 for chunk in chunks[:-1])


def _evaluate_in_process(rank: int, size: int, port: int, examples: tuple[Example, ...], out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)

    def fetch(split: str) -> tuple[Example, ...]:
        (out / f"{rank} fetched").touch()
        return examples

    def fail(split: str) -> tuple[Example, ...]:
        raise UserError("no answer")

    gpt2.hellaswag.download._SPLITS["val"] = gpt2.hellaswag.download._Split("validation", len(examples), None)
    gpt2.hellaswag.download._SOURCES = {"first": fail, "second": fetch}
    with joined_world("cpu") as this:
        loaded = load_examples(world=this)
        gpt2.hellaswag.download._SOURCES = {"first": fail}
        try:
            load_examples(split="train", world=this)
        except UserError as error:
            failure = str(error)
        shapes: list[tuple[int, ...]] = []
        model = make_model(SHAPES["gpt2"])
        model.h[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
        result = evaluate_hellaswag(model, loaded, gpt2_tokenizer(), world=this, token_budget=300)
        sharded = parallelize(make_model(SHAPES["gpt2"]), RunConfig(parallel="fsdp", compile=False), this, "fp32", 1)
        for _ in range(2):  # FSDP leaves the root gathered after the first
            again = evaluate_hellaswag(sharded, loaded, gpt2_tokenizer(), world=this, token_budget=300)
            np.testing.assert_allclose(again.log_probs, result.log_probs, rtol=0, atol=TOLERANCE)
    torch.save((result.log_probs, result.acc, result.acc_norm, result.scored, shapes, failure), out / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_processes_do_not_matter_and_agree(tmp_path: Path) -> None:
    examples = make_examples(11)  # not a multiple of 2
    mp.spawn(_evaluate_in_process, args=(2, free_port(), examples, tmp_path), nprocs=2)
    assert (tmp_path / "0 fetched").exists()
    assert not (tmp_path / "1 fetched").exists()  # no rank downloads but the first
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = score(make_model(SHAPES["gpt2"]), examples, token_budget=300)
    np.testing.assert_array_equal(zero[0], one[0])
    assert zero[1:] == one[1:]  # the same figures, after the same shapes: collectives inside the model would meet
    np.testing.assert_allclose(zero[0], alone.log_probs, rtol=0, atol=TOLERANCE)
    assert "first: no answer" in zero[5]  # all raise what rank 0 met
    assert zero[1:4] == (alone.acc, alone.acc_norm, alone.scored)


def test_equal_endings_tie_and_the_first_wins() -> None:
    endings = ("walks away slowly.", "a", "walks away slowly.", "a")
    model = make_model(SHAPES["gpt2"])
    for label in range(4):
        result = score(model, (Example(0, "x", "He", "", "He", endings, label),))
        assert result.log_probs[0, 0] == result.log_probs[0, 2]
        assert result.log_probs[0, 1] == result.log_probs[0, 3]
        assert result.predictions[0] < 2
        assert result.predictions_norm[0] < 2
        assert result.acc == float(label == result.predictions[0])


def test_an_ending_of_no_characters_never_wins_by_length() -> None:
    example = Example(0, "x", "He", "", "He", ("[a]", "runs", "sits", "walks"), 0)
    result = score(make_model(SHAPES["gpt2"]), (example,), convention="harness")
    assert result.lengths[0, 0] == 0
    assert result.predictions_norm[0] != 0

    likely = np.array([[-1.0, -40.0, -40.0, -40.0]])  # though by the sum it does
    rows = Rows((), np.array([[0, 4, 4, 4]]), 0)
    result = _result((example,), rows, "harness", likely, tokens=0, scored=0, started=0.0)
    assert (result.predictions[0], result.predictions_norm[0]) == (0, 1)


def test_without_labels_there_are_predictions_only() -> None:
    model = make_model(SHAPES["gpt2"])
    examples = make_examples(6)
    result = score(model, tuple(replace(example, label=None) for example in examples))
    assert (result.examples, result.labelled) == (6, 0)
    assert math.isnan(result.acc)
    assert math.isnan(result.acc_norm_stderr)
    labelled = score(model, examples)
    np.testing.assert_array_equal(result.predictions, labelled.predictions)

    some = score(model, (*examples[:4], *(replace(example, label=None) for example in examples[4:])))
    assert some.labelled == 4
    assert some.acc == score(model, examples[:4]).acc


def offset_model() -> GPT:
    """Logits near -100, as GPT-2's are, where bf16 has steps of 0.5: a direction all states and all rows share."""
    model = make_model(replace(SHAPES["gpt2"], n_layer=1, n_embd=64, tie_embeddings=False), scale=2.0)
    with torch.no_grad():
        model.ln_f.bias[0] = 10.0  # type: ignore[union-attr, index]
        model.lm_head.weight[: model.config.vocab_size, 0] -= 10.0
    return model


@pytest.mark.parametrize("cap", [None, 150.0])
def test_bf16_logits_far_from_zero_keep_their_differences(cap: float | None) -> None:
    model = offset_model()
    object.__setattr__(model.config, "logit_softcap", cap)
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    hidden[:, 0] = 10.0
    targets = torch.randint(50257, (200, 4), generator=torch.Generator().manual_seed(1))
    exact = model.logits(hidden).log_softmax(-1).gather(1, targets)
    assert model.logits(hidden).mean() < (-90 if cap is None else -80)

    ours = Head(model, torch.bfloat16, chunk=128, tile=16).log_probs(hidden, targets)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.logits(hidden).float().log_softmax(-1).gather(1, targets)
    assert (plain - exact).abs().max() > 0.15  # what is avoided
    assert (ours - exact).abs().max() < 0.02


def test_head_gives_padding_no_probability_and_is_fp32() -> None:
    model = make_model(SHAPES["gpt2"])
    hidden = torch.randn(3, 32) * 4
    targets = torch.arange(50257)[None].expand(3, -1)
    log_probs = Head(model, torch.float32, chunk=2, tile=2).log_probs(hidden, targets)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(log_probs, model.logits(hidden).log_softmax(-1))


def test_bf16_is_close_to_fp32() -> None:
    examples = make_examples(8)
    model = make_model(SHAPES["gpt2"], scale=4.0)
    exact, rounded = score(model, examples), score(model, examples, dtype=torch.bfloat16)
    error = np.abs(rounded.log_probs - exact.log_probs)
    assert 0 < error.max() < 0.5


def compile_counting(model: GPT) -> list[tuple[int, ...]]:
    """Compile the blocks as training does, but with a backend that only notes the shapes it is asked for."""
    compiled: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(next(tuple(x.shape) for x in inputs if isinstance(x, Tensor) and x.ndim == 3))
        return graph.forward

    torch._dynamo.reset()
    for block in model.h:
        block.compile(dynamic=False, backend=backend)
    return compiled


def test_a_compiled_model_is_evaluated_without_compiling_anew() -> None:
    examples = make_examples(6)
    plain = score(make_model(SHAPES["gpt2"]), examples)
    model = make_model(SHAPES["gpt2"])
    compiled = compile_counting(model)
    model.hidden(torch.zeros(2, 16, dtype=torch.long))
    before = list(compiled)
    assert before
    assert_same(score(model, examples), plain)
    assert compiled == before


def test_compiled_evaluation_uses_few_fixed_shapes() -> None:
    examples = make_examples(40)
    plain = score(make_model(SHAPES["gpt2"]), examples, token_budget=1024)
    model = make_model(SHAPES["gpt2"])
    compiled = compile_counting(model)
    assert_same(score(model, examples, compiled=True, token_budget=1024), plain)
    assert compiled
    assert all(length % 64 == 0 for _, length, _ in compiled)
    # A shape for each multiple of 64 that occurs, and at most one for the rows left over at the end.
    assert len(set(compiled)) <= max(length for _, length, _ in compiled) // 64 + 1


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    model = make_model(replace(SHAPES["gpt2"], dropout=0.5)).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    result = score(model, make_examples(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(score(model, make_examples(3)), result)  # no dropout

    with pytest.raises(ZeroDivisionError):
        score(model, make_examples(3), progress=lambda done, total: 1 // 0)
    assert model.training


def test_progress_reaches_the_total() -> None:
    seen: list[tuple[int, int]] = []
    score(
        make_model(SHAPES["gpt2"]),
        make_examples(7),
        token_budget=300,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)


def test_what_cannot_be_evaluated_is_refused() -> None:
    model = make_model(SHAPES["gpt2"])
    with pytest.raises(UserError, match="no HellaSwag examples"):
        score(model, ())
    with pytest.raises(UserError, match="50257"):
        evaluate_hellaswag(model, make_examples(1), CharTokenizer("ab"), world=ALONE)
    small = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=65)).init_weights(0)
    with pytest.raises(UserError, match="65"):
        score(small, make_examples(1))
    with torch.no_grad():
        model.wte.weight[5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        score(model, make_examples(2))


def save_model(directory: Path, config: GPTConfig) -> GPT:
    from gpt2.model.pretrained import save_pretrained

    model = make_model(config)
    save_pretrained(directory, model.state_dict(), config, gpt2_tokenizer())
    return model


def assert_equals_the_harness(directory: Path, config: GPTConfig, examples: tuple[Example, ...]) -> None:
    """Log-probabilities, acc and acc_norm of every example as lm-evaluation-harness itself computes them."""
    pytest.importorskip("lm_eval")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from harness import harness_samples
    finally:
        sys.path.pop(0)
    model = save_model(directory, config)
    scores, samples = harness_samples(directory, examples, device="cpu", dtype="float32", batch_size=4)
    result = score(model, examples, convention="harness")
    theirs = np.array([[log_prob for log_prob, _ in sample["resps"]] for sample in samples])
    np.testing.assert_allclose(result.log_probs, theirs, rtol=0, atol=TOLERANCE)
    labels = np.array([example.label for example in examples])
    assert (result.predictions == labels).tolist() == [bool(sample["acc"]) for sample in samples]
    assert (result.predictions_norm == labels).tolist() == [bool(sample["acc_norm"]) for sample in samples]
    assert (result.acc, result.acc_norm) == pytest.approx((scores["acc"], scores["acc_norm"]))
    assert result.acc_norm_stderr == pytest.approx(scores["acc_norm_stderr"])


def test_harness_convention_equals_the_harness(tmp_path: Path) -> None:
    # A context of 64 tokens truncates some of them, as the harness does.
    assert_equals_the_harness(tmp_path, replace(SHAPES["gpt2"], block_size=64), make_examples(8))


@needs_real
@pytest.mark.slow
def test_harness_convention_equals_the_harness_on_a_thousand_real_examples(tmp_path: Path) -> None:
    assert_equals_the_harness(tmp_path, SHAPES["gpt2"], real_examples(1000))


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_all_real_examples_equal_each_ending_alone(convention: Convention) -> None:
    examples = real_examples(10_042)
    assert len(examples) == 10_042
    model = make_model(SHAPES["gpt2"])
    reference = naive_log_probs(model, examples, gpt2_tokenizer(), convention)
    result = score(model, examples, convention=convention)
    np.testing.assert_allclose(result.log_probs, reference, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(result.predictions, reference.argmax(1))
    np.testing.assert_array_equal(result.predictions_norm, (reference / result.lengths).argmax(1))
