"""gpt2/model/sampling.py against `transformers`' filters and against counted draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.errors import UserError
from gpt2.model.sampling import Sampling, choose, filter_logits, row_generators


def random_logits(seed: int, rows: int = 3, size: int = 40) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.999),  # closer to 1 it is a matter of rounding who is left out
    min_p=st.none() | st.floats(0, 1),
    penalty=st.just(1.0) | st.floats(0.5, 2),
)
def test_filters_equal_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    process = pytest.importorskip("transformers").generation.logits_process
    logits = random_logits(seed)
    text = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(seed))
    steps = [process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        steps.append(process.TopKLogitsWarper(top_k))
    if top_p is not None:
        steps.append(process.TopPLogitsWarper(top_p))
    if min_p is not None:
        steps.append(process.MinPLogitsWarper(min_p))
    expected = logits
    for step in steps:
        expected = step(text, expected)
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, text, True)
    filtered = filter_logits(logits, Sampling(penalty, temperature, top_k, top_p, min_p), seen)
    torch.testing.assert_close(filtered, expected)
    assert filtered.isfinite().any(dim=1).all()


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def kept(**options: float) -> list[int]:
        filtered = filter_logits(logits, Sampling(**options))  # type: ignore[arg-type]
        return filtered[0].isfinite().nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=100) == [0, 1, 2, 3]
    assert kept(top_p=0.395) == [0]
    assert kept(top_p=0.405) == [0, 1]
    assert kept(top_p=1e-9) == [0]  # the likeliest always stays
    assert kept(min_p=0.49) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.45) == [0, 1]  # top_p of what top_k left: 4/9 + 3/9
    seen = torch.tensor([[True, False, False, True]])
    penalised = filter_logits(torch.tensor([[2.0, 2.0, -2.0, -2.0]]), Sampling(repetition_penalty=2.0), seen)
    assert penalised.tolist() == [[1.0, 2.0, -2.0, -4.0]]


def test_draws_have_the_distribution_they_should() -> None:
    logits = random_logits(1, rows=1, size=6)
    probabilities = logits.softmax(dim=-1)[0]
    n = 20_000
    (generator,) = row_generators(0, 1, torch.device("cpu"))
    counts = torch.zeros(6)
    for _ in range(n):
        counts[choose(logits, Sampling(), [generator])] += 1
    sigma = (n * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - n * probabilities).abs() < 4 * sigma + 1).all()


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, [3, 7]] = torch.tensor([0.0, -30.0])
    (generator,) = row_generators(0, 1, torch.device("cpu"))
    assert {int(choose(logits, Sampling(), [generator])) for _ in range(500)} <= {3, 7}


def test_rows_draw_independently_of_their_number() -> None:
    logits = torch.zeros(1, 1000)
    many = choose(logits.expand(4, -1), Sampling(), row_generators(5, 4, torch.device("cpu"))).tolist()
    assert len(set(many)) == 4
    for n in (1, 2, 3):
        assert choose(logits.expand(n, -1), Sampling(), row_generators(5, n, torch.device("cpu"))).tolist() == many[:n]
    other = choose(logits.expand(4, -1), Sampling(), row_generators(6, 4, torch.device("cpu"))).tolist()
    assert not set(other) & set(many)


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    (generator,) = row_generators(0, 1, torch.device("cpu"))
    state = generator.get_state()
    assert choose(torch.tensor([[1.0, 3.0, 2.0]]), Sampling(temperature=0), [generator]).tolist() == [1]
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e7, float("nan"), -1.0])
def test_a_temperature_that_overflows_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature is"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("penalty", [1e-300, 0.0, 1e300, float("inf"), float("nan")])
def test_a_penalty_that_overflows_is_refused(penalty: float) -> None:
    with pytest.raises(UserError, match="repetition_penalty is"):
        Sampling(repetition_penalty=penalty)


@pytest.mark.parametrize(("penalty", "temperature"), [(1e-3, 1e-6), (1e3, 1e-6), (1e-3, 1e6), (1e3, 1e6)])
def test_the_most_extreme_values_still_choose(penalty: float, temperature: float) -> None:
    logits = torch.tensor([[-50.0, 1.0, 80.0, 2.0]])
    sampling = Sampling(penalty, temperature)
    found = filter_logits(logits, sampling, torch.ones(1, 4, dtype=torch.bool))
    assert found.softmax(dim=-1).isfinite().all()
    if temperature < 1:
        (generator,) = row_generators(0, 1, torch.device("cpu"))
        assert choose(found, sampling, [generator]).tolist() == [2]
