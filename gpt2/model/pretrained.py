"""Models as directories that `transformers` opens: find, load, save; `gpt2.model.hf_format` knows what is in them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import UserError, first_line
from gpt2.files import Number, check, open_plain, read_json, read_plain, user_path
from gpt2.model.hf_format import OUR_KEY, config_from_hf, config_to_hf, state_dict_to_hf
from gpt2.tokens.tokenizer import (
    CharTokenizer,
    Tokenizer,
    gpt2_tokenizer,
    gpt2_vocab_files,
    tokenizer_from_dict,
)

_OPENAI_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def save_pretrained(
    directory: Path, state: Mapping[str, Tensor], config: GPTConfig, tokenizer: Tokenizer | None
) -> None:
    """Write a model so that `transformers` opens the directory: weights, configuration, tokenizer.

    Args:
        directory: exists; files of the same names are replaced.
        state: `GPT.state_dict()`'s, unsharded, on any device.
        config: the model's.
        tokenizer: the one its tokens are of; None writes no tokenizer, nor does one of more tokens than the model has:
            ids below them, of shards without a manifest, are some other tokenizer's.
    """
    from safetensors.torch import save_file

    if tokenizer is not None and tokenizer.n_vocab > config.vocab_size:
        tokenizer = None
    save_file(state_dict_to_hf(state, config), directory / "model.safetensors", metadata={"format": "pt"})
    raw = config_to_hf(config, tokenizer)
    _write_json(directory / "config.json", raw)
    _write_json(
        directory / "generation_config.json",
        {name: raw[name] for name in ("bos_token_id", "eos_token_id") if raw[name] is not None},
    )
    if tokenizer is not None:
        save_tokenizer(directory, tokenizer, config)


def save_tokenizer(directory: Path, tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Write a model's tokenizer so that `transformers` opens it."""
    limit = {"model_max_length": config.block_size, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, CharTokenizer):
        _write_json(directory / "tokenizer.json", _char_tokenizer_to_hf(tokenizer))
        _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **limit})
        return
    encoder, merges = gpt2_vocab_files()
    (directory / "vocab.json").write_bytes(encoder)
    (directory / "merges.txt").write_bytes(merges)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special, **limit},
    )


def _char_tokenizer_to_hf(tokenizer: CharTokenizer) -> dict[str, Any]:
    """`tokenizer.json` of the library `tokenizers`: cut between all characters, look each up."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(tokenizer.chars)}, "unk_token": ""},
    }


def resolve_model(spec: str | Path) -> Path:
    """The directory that holds the model a user named.

    Args:
        spec: a run (its newest checkpoint), RUN@best (its checkpoint of the lowest validation loss), a checkpoint, a
            directory of `transformers`', or a name on the Hugging Face Hub, which is downloaded unless it is cached.

    Raises:
        UserError: there is no such model.
    """
    path = user_path(spec)
    if str(spec).endswith("@best") and not path.exists():
        return _best_checkpoint(user_path(str(spec)[: -len("@best")]))
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (checkpoints / "latest").is_file():
        newest = checkpoints / read_plain(checkpoints / "latest", 4096).decode("utf-8", "replace").strip()
        if newest.parent != checkpoints or "\0" in newest.name or not (newest / "config.json").is_file():
            raise UserError(f"{checkpoints / 'latest'} names {newest.name}, which is not there; give a checkpoint")
        return newest
    if checkpoints != path or path.name == "checkpoints":
        raise UserError(f"the run {path} holds no complete checkpoint yet")
    if (path / "config.json").is_file():
        if (path / "environment.json").is_file():  # both are a run's
            raise UserError(f"the run {path} holds no complete checkpoint yet")
        return path
    if path.exists() and str(spec) not in _OPENAI_NAMES:
        raise UserError(f"{path} is not a model: a directory with config.json and model.safetensors is needed")
    if not _HUB_NAME.match(str(spec)):
        raise UserError(f"no model at {spec}")
    return _download(str(spec))


@dataclass(frozen=True)
class _Saved:
    """What is read of a checkpoint's training.json."""

    val_loss: Number | None = None


def _best_checkpoint(run: Path) -> Path:
    """The complete checkpoint of a run whose validation loss is lowest, of equal ones the newest."""
    found = sorted((run / "checkpoints").glob("step_*/training.json"), reverse=True)
    read = {path.parent: check(_read_json(path), _Saved, str(path)).val_loss for path in found}
    losses = {path: loss for path, loss in read.items() if loss is not None}
    if not losses:
        raise UserError(f"{run}@best: {run} is not a run that holds a checkpoint with a validation loss")
    return min(losses, key=lambda path: losses[path])


def _download(name: str) -> Path:
    """Fetch a model's files from the Hub, or find them in its cache."""
    remedy = "give the directory of a run, of a checkpoint or of a transformers model instead"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} is no model here, and without huggingface_hub the Hub cannot be asked; "
            "`pip install huggingface_hub`, or " + remedy
        ) from None
    repository = f"openai-community/{name}" if name in _OPENAI_NAMES else name
    texts = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer*.json"]
    try:
        path = Path(snapshot_download(repository, allow_patterns=[*texts, "model*.safetensors*"]))
        if not any(path.glob("model*.safetensors")):
            path = Path(snapshot_download(repository, allow_patterns=[*texts, "pytorch_model*.bin*"]))
    except Exception as error:  # whatever keeps the Hub from answering: the network, a wrong name, no permission
        raise UserError(
            f"{name} is no model here, and the Hugging Face Hub did not give {repository} "
            f"({type(error).__name__}); {remedy}"
        ) from error
    return path


def read_model(directory: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration of the model in a directory, and its tensors by the names of its files.

    Raises:
        UserError: files are missing, damaged or outside the directory, or are not of a model this project computes.
    """
    path = directory / "config.json"
    try:
        config = config_from_hf(_read_json(path))
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    tensors = _read_tensors(directory)
    if config.n_layer > len(tensors):  # or as many blocks would be made before their shapes are compared
        raise UserError(f"{path}: n_layer is {config.n_layer}; the weights beside it are {len(tensors)} tensors")
    return config, tensors


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the model in a directory: the one config.json names, else GPT-2's if the files are its."""
    ours = _read_json(directory / "config.json").get(OUR_KEY, {})
    if isinstance(ours, dict) and "tokenizer" in ours:
        return tokenizer_from_dict(ours["tokenizer"], f"{directory / 'config.json'}: tokenizer")
    encoder = json.loads(gpt2_vocab_files()[0])
    for name in ("vocab.json", "tokenizer.json"):
        if (directory / name).is_file():
            vocabulary = _read_json(directory / name)
            if name == "tokenizer.json":
                model = check(vocabulary.get("model"), dict[str, Any], f"{directory / name}: model")
                vocabulary = {
                    **check(model.get("vocab"), dict[str, int], str(directory / name)),
                    "<|endoftext|>": 50256,
                }
            if vocabulary != encoder:
                raise UserError(
                    f"{directory / name} is not GPT-2's vocabulary; GPT.from_pretrained opens the model alone"
                )
            break
    return gpt2_tokenizer()


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model: one file or several with an index; safetensors before pickles without code."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return _read_file(directory / name)
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            names = check(_read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
            for file in sorted(set(names.values())):
                if Path(file).name != file or "\0" in file:
                    raise UserError(f"{index} names {file}, which lies outside its directory")
                tensors.update(_read_file(directory / file))
            return tensors
    raise UserError(f"{directory} holds no model.safetensors and no pytorch_model.bin")


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        open_plain(path).close()
        tensors = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UserError(f"{path} holds something else than tensors by name; give a model's weights")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the model's index names it") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        earlier = [p for p in sorted(path.parent.parent.glob("step_*")) if p < path.parent]
        remedy = f"; give an earlier checkpoint, such as {earlier[-1]}" if earlier else ""
        said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} cannot be read, it may be cut short or not hold tensors: {said}{remedy}") from error


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own advice is to run what the file says
        raise UserError(
            f"{path} cannot be read: it is cut short, or holds code beside tensors, which is not run"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict)
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: there is no such file") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
