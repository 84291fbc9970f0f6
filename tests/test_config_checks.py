"""What settings demand of their own values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from gpt2.config_checks import require, require_range, require_types
from gpt2.errors import UserError


@dataclass
class Settings:
    count: int = 3
    rate: float = 0.5
    name: str = "a"
    flag: bool = True
    limit: int | None = None
    kind: Literal["x", "y"] = "x"
    pair: tuple[float, float] = (1.0, 2.0)
    path: Path = Path("p")


def test_values_of_their_types_pass() -> None:
    require_types(Settings())
    whole = Settings(rate=1, limit=7, pair=(1, 2.5), kind="y")  # a whole number is also a float
    require_types(whole)
    assert (whole.rate, whole.limit, whole.pair) == (1, 7, (1, 2.5))  # checked, not changed


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("count", 1.5, "count is 1.5; it must be of type int"),
        ("count", True, "count is True; it must be of type int"),
        ("rate", "0.5", "rate is '0.5'; it must be of type float"),
        ("rate", False, "rate is False; it must be of type float"),
        ("name", 1, "name is 1; it must be of type str"),
        ("flag", 1, "flag is 1; it must be of type bool"),
        ("limit", "many", "limit is 'many'; it must be of type"),
        ("kind", "z", "kind is 'z'; choose one of x, y"),
        ("pair", (1.0,), "pair is"),
        ("pair", [1.0, 2.0], "pair is"),
        ("pair", (1.0, "b"), "pair is"),
        ("path", "p", "path is 'p'; it must be of type Path"),
        ("path", Path("a\udcff"), r"path is 'a\\udcff'; it must be text that UTF-8 can hold"),
    ],
)
def test_a_value_of_another_type_is_named(field: str, value: object, words: str) -> None:
    settings = Settings()
    setattr(settings, field, value)
    with pytest.raises(UserError, match=words):
        require_types(settings)


@pytest.mark.parametrize("value", [0.0, 0.5, 1, None])
def test_ends_of_a_closed_range_pass(value: float | None) -> None:
    require_range(Settings(rate=value), "rate", 0.0, 1.0)  # type: ignore[arg-type]
    if value is not None:  # and nothing further out does
        with pytest.raises(UserError, match="rate is"):
            require_range(Settings(rate=value + 1.001), "rate", 0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "high", "open_", "words"),
    [
        (-1e-9, 1.0, False, "rate is -1e-09; it must be at least 0 and at most 1"),
        (2.0, 1.0, False, "at most 1"),
        (0.0, 1.0, True, "rate is 0.0; it must be above 0 and below 1"),
        (1.0, 1.0, True, "below 1"),
        (float("inf"), float("inf"), False, "rate is inf; it must be at least 0 and finite"),
        (float("nan"), float("inf"), False, "rate is nan; it must be at least 0 and finite"),
        (float("nan"), 1.0, True, "rate is nan"),
    ],
)
def test_what_lies_outside_is_refused(value: float, high: float, open_: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        require_range(Settings(count=0, rate=value), "rate", 0.0, high, open_)


def test_require_raises_what_it_is_given() -> None:
    require(True, "never")
    with pytest.raises(UserError, match="the message"):
        require(False, "the message")
