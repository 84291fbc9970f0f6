"""Which files of a data set are trained on and which are its validation, by the rules of the `datasets` library.

A data set is a repository on the Hub, or a directory of the same layout: a card, `README.md`, that may name
configurations and the files of their splits, else folders or files that are named after a split, such as `test/` or
`train-00000-of-00002.parquet`. What is in no such split is one data set of all files.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpt2.errors import UserError, first_line

_WORDS = "train|val|dev|test|eval|-of-"
"""A name without any of these, parts of `datasets`' own words for splits, is of none."""


class Splits(NamedTuple):
    """Names of files.

    Attributes:
        train: to train on.
        validation: files of the split `validation`; none where there is no such split.
        unread: the others, each with the reason.
        config: the configuration that says so; None where the card names none.
    """

    train: list[str]
    validation: list[str]
    unread: list[tuple[str, str]]
    config: str | None


def resolve_splits(
    names: Sequence[str], card: str | None, config: str | None, where: str, *, named: bool = False
) -> Splits:
    """The files that `datasets.load_dataset` would read as the splits "train" and "validation".

    A file that is in "train" and in another split as well is not trained on. Where names tell splits apart and none
    is "train", all files of no other split are trained on.

    Args:
        names: paths of all files that can be read, relative to the data set.
        card: content of its README.md; None: it has none.
        config: the configuration that the user chose; None: the card's default.
        where: what errors call the data set.
        named: the user named these files, or several directories: splits are told apart only if one of them is
            "train", and what is of no split is trained on.

    Raises:
        UserError: there is a choice of configurations, no such configuration, or nothing to train on.
    """
    no_card = config is None and (card is None or not card.startswith("---"))
    if no_card and not any(re.search("train" if named else _WORDS, name) for name in names):
        return Splits(sorted(names), [], [], None)  # the common case, without the library's 100 MB of memory
    from datasets.data_files import SPLIT_KEYWORDS, _get_data_files_patterns, sanitize_patterns
    from fsspec.utils import glob_translate

    configs, chosen = _configs(card, where)
    listed = ", ".join(list(configs)[:20]) + (f" and {len(configs) - 20} more" if len(configs) > 20 else "")
    if config is not None and config not in configs:
        raise UserError(f"{where} has no configuration {config}" + (f"; it has {listed}" if configs else ""))
    chosen = chosen if config is None else config
    if chosen is None and configs:
        raise UserError(
            f"{where} is {len(configs)} data sets: {listed}; choose one, as in --source {where}:{next(iter(configs))}"
        )
    settings = configs[chosen] if chosen is not None else {}
    base = settings.get("data_dir") or ""

    def matching(pattern: str) -> list[str]:
        matches = re.compile(glob_translate(posixpath.normpath(posixpath.join(base, pattern)))).match
        return [name for name in names if matches(name)]

    said = settings.get("data_files")
    try:
        patterns = sanitize_patterns(said) if said is not None else _get_data_files_patterns(matching)
    except FileNotFoundError:
        patterns = {}  # no file at all
    except ValueError as error:
        raise UserError(f"{where}: its files name no splits ({first_line(error)}); name the files to read") from error
    split_of: dict[str, str] = {}
    for split in sorted(map(str, patterns), key="train".__ne__):  # another split's claim replaces train's
        split_of |= {name: split for pattern in patterns[split] for name in matching(pattern)}
    if named and "train" not in split_of.values():
        split_of = {}
    if said is None and (named or "train" not in patterns):
        split_of |= {name: "train" for name in names if name not in split_of}
    train = sorted(name for name, split in split_of.items() if split == "train")
    held_out = {str(keyword) for keyword in SPLIT_KEYWORDS["validation"]}
    validation = sorted(name for name, split in split_of.items() if split in held_out)
    if not train:
        found = ", ".join(sorted(set(split_of.values()))) or "none"
        raise UserError(
            f"{where}{f':{chosen}' if chosen else ''} has no file to train on; its splits with files are: {found}; "
            "name the files to train on, with a pattern such as FOLDER/*.parquet"
        )
    unread = [
        (name, f"of the split {split_of[name]}, which is not trained on" if name in split_of else "of no split")
        for name in sorted(set(names) - set(train) - set(validation))
    ]
    return Splits(train, validation, unread, chosen)


def _configs(card: str | None, where: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The configurations that a card names, and the default one where there is one."""
    if card is None or not card.startswith("---"):
        return {}, None
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
        return configs, configs.get_default_config_name()
    except Exception as error:  # as many kinds as YAML has ways to be wrong
        raise UserError(f"the card of {where}, README.md, cannot be understood ({first_line(error)})") from error
