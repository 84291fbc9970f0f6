"""The documentation inside Python's standard library as token shards: English that every machine has already.

    python data/pydocs.py        # into data/pydocs

The text is `pydoc_data.topics` (the language reference as `help()` shows it) and the docstrings of the library's
sources, which are parsed, never imported. A docstring seen before is left out. A module's docstrings, in the order of
the source, are one document. What comes out depends on the Python version alone.
"""

from __future__ import annotations

import ast
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from gpt2.errors import ArgumentParser, UserError, run_cli
from gpt2.files import read_plain, user_path

_VAL_EVERY = 20  # one document in so many is for validation: 5 %
_SMALLEST = 500_000  # bytes; less means that the library's sources are not there
# Not documentation of the library, or not there on every machine.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data set, or say that it is there."""
    from gpt2.prepare.build import totals
    from gpt2.prepare.small_dataset import reusable, write_dataset
    from gpt2.tokens.tokenizer import gpt2_tokenizer

    parser = ArgumentParser(description="Python's own documentation as GPT-2 token shards.")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", default=Path(__file__).parent / "pydocs", help="[data/pydocs]"
    )
    out = parser.parse_args(argv).out
    source = {"description": "documentation of Python's standard library", "revision": platform.python_version()}
    found = reusable(out, source, "gpt2", ".npy")
    if found is not None:
        print(f"{out} is complete and verified: {totals(found)}")
        return 0
    documents = read_documents(Path(sysconfig.get_paths()["stdlib"]))
    size = sum(len(document.encode()) for document in documents)
    if size < _SMALLEST:
        raise UserError(
            f"this Python's standard library documents itself in only {size:,} bytes; its sources are missing, so use "
            "a Python that has them, or other text with data/fineweb.py --source"
        )
    tokenizer = gpt2_tokenizer()
    splits: dict[str, list[int]] = {"train": [], "val": []}
    for number, document in enumerate(documents):
        tokens = splits["val" if number % _VAL_EVERY == _VAL_EVERY // 2 else "train"]
        tokens.append(tokenizer.eot_token)
        tokens += tokenizer.encode(document)
    dataset = write_dataset(out, splits["train"], splits["val"], tokenizer, name="pydocs", source=source)
    assert dataset.manifest is not None
    print(f"{out}: {totals(dataset.manifest)}")
    return 0


def read_documents(library: Path) -> list[str]:
    """All documents in a fixed order: topics by name, then modules by path. No docstring occurs twice."""
    seen: set[str] = set()
    documents = _topics()
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).parts):
        parts = path.relative_to(library).parts
        if not _LEFT_OUT.isdisjoint(parts):
            continue
        sections = []
        for title, text in docstrings(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__")):
            if text not in seen:
                seen.add(text)
                sections.append(f"{title}\n\n{text}")
        if sections:
            documents.append("\n\n".join(sections) + "\n")
    return documents


def docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, its classes and functions, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in other people's strings
            tree = ast.parse(read_plain(path), filename=str(path))
    except (OSError, SyntaxError, ValueError):
        return  # a template, or a file for another version
    yield from _docstrings_below(tree, module)


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield name, text.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _docstrings_below(child, name)


def _topics() -> list[str]:
    """The language reference that `help()` shows, by topic, without the topics that longer ones repeat.

    A chapter's topic holds those of its sections, so a section set aside for validation would be in training too.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out by some distributions
        return []
    kept: list[tuple[str, str]] = []
    known: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        new = sum(len(paragraph) for paragraph in paragraphs if paragraph not in known)
        if new > 0.7 * sum(map(len, paragraphs)):
            kept.append((name, text.strip() + "\n"))
            known.update(paragraphs)
    return [text for _, text in sorted(kept)]


if __name__ == "__main__":
    run_cli(main)
