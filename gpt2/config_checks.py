"""Checks that settings make of their own values when they are built."""

from __future__ import annotations

import math
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpt2.errors import UserError


def require(holds: bool, message: str) -> None:
    """Raise UserError with the message unless something holds."""
    if not holds:
        raise UserError(message)


def require_types(config: object) -> None:
    """Demand of every field a value of its type; of one with a fixed set of values, one of them."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, str | Path) and "\0" in str(value):
            raise UserError(f"{name} is {str(value)!r:.80}; it must not hold a NUL character")
        if isinstance(value, str | Path) and any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise UserError(f"{name} is {str(value)!a:.80}; it must be text that UTF-8 can hold")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{name} has {value.bit_length()} bits; it must fit into 64")
        if get_origin(kind) is Literal and value not in list(get_args(kind)):
            raise UserError(f"{name} is {value!r:.80}; choose one of {', '.join(map(str, get_args(kind)))}")
        if get_origin(kind) is not Literal and not _is_of(value, kind):
            raise UserError(f"{name} is {value!r:.80}; it must be of type {getattr(kind, '__name__', kind)}")


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a type, as JSON and arithmetic have it: 1 is also a float, True is no number."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def require_range(config: object, names: str, low: float, high: float = float("inf"), open_: bool = False) -> None:
    """Demand a finite value with low ≤ value ≤ high of the named fields, or low < value < high; None passes."""
    for name in names.split():
        value = getattr(config, name)
        if value is None or (math.isfinite(value) and (low < value < high if open_ else low <= value <= high)):
            continue
        edge = "above" if open_ else "at least"
        limit = " and finite" if high == float("inf") else f" and {'below' if open_ else 'at most'} {high:,}"
        raise UserError(f"{name} is {value}; it must be {edge} {low:g}{limit}")
