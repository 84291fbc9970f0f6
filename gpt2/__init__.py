"""GPT-2, from text to a trained model, as a library; light at import, see docs/library.md.

from gpt2 import GPT, GPTConfig, Tokenizer, gpt2_tokenizer, open_dataset
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.config import GPTConfig as GPTConfig
    from gpt2.errors import UserError as UserError
    from gpt2.generation.generate import generate as generate
    from gpt2.model.gpt import GPT as GPT
    from gpt2.model.gpt import load_pretrained as load_pretrained
    from gpt2.prepare.small_dataset import write_dataset as write_dataset
    from gpt2.tokens.dataset import Dataset as Dataset
    from gpt2.tokens.dataset import open_dataset as open_dataset
    from gpt2.tokens.tokenizer import CharTokenizer as CharTokenizer
    from gpt2.tokens.tokenizer import Tokenizer as Tokenizer
    from gpt2.tokens.tokenizer import gpt2_tokenizer as gpt2_tokenizer

_HOME = {
    "GPT": "gpt2.model.gpt",
    "GPTConfig": "gpt2.config",
    "CharTokenizer": "gpt2.tokens.tokenizer",
    "Dataset": "gpt2.tokens.dataset",
    "Tokenizer": "gpt2.tokens.tokenizer",
    "UserError": "gpt2.errors",
    "generate": "gpt2.generation.generate",
    "gpt2_tokenizer": "gpt2.tokens.tokenizer",
    "load_pretrained": "gpt2.model.gpt",
    "open_dataset": "gpt2.tokens.dataset",
    "write_dataset": "gpt2.prepare.small_dataset",
}
"""Public names and the modules that define them, which are imported when a name is first used."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
