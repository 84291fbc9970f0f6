from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hellaswag_examples import REAL, make_examples, needs_real, real_examples
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2.hellaswag.rows
from gpt2.hellaswag.examples import Example, parse_file
from gpt2.hellaswag.rows import make_batches, make_rows, pack, preprocess, render, tokenize
from gpt2.tokens.tokenizer import gpt2_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_rows.cache_clear()


WIKIHOW = Example(
    ind=1,
    activity_label="Home and Garden",
    ctx_a="[header] How to paint [title] Buy paint. [step] Choose a  color.",
    ctx_b="",
    ctx="[header] How to paint [title] Buy paint. [step] Choose a  color.",
    endings=("[substeps] Ask a friend.", "Go  home.", "  no  spaces   here ", "[title] [x]"),
    label=0,
)
ACTIVITY = Example(2, "Roof repair", "A man sits on a roof.", "HE then", "A man sits on a roof. HE then", ("a",) * 4, 1)


def test_conventions_render_as_their_sources_do() -> None:
    assert render(ACTIVITY, "completion") == ("A man sits on a roof. HE then", [" a"] * 4)
    # str.capitalize lowers the rest, as in the harness.
    assert render(ACTIVITY, "harness") == ("Roof repair: A man sits on a roof. He then", [" a"] * 4)

    context, endings = render(WIKIHOW, "completion")
    assert context == WIKIHOW.ctx
    assert endings == [" " + ending for ending in WIKIHOW.endings]

    # "  " becomes " " once, from the left, so four spaces leave two.
    context, endings = render(WIKIHOW, "harness")
    assert context == "Home and Garden: How to paint. Buy paint. Choose a color."
    assert endings == ["  Ask a friend.", " Go home.", " no spaces  here", "  "]


def test_white_space_at_the_contexts_end_moves_to_the_endings() -> None:
    context, endings = render(replace(WIKIHOW, ctx_a="Choose a color. [step]"), "harness")
    assert context == "Home and Garden: Choose a color."
    assert endings[1:] == ["  Go home.", "  no spaces  here", "   "]


@needs_real
def test_preprocess_equals_the_harness_on_real_texts() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.hellaswag.utils").preprocess
    for example in real_examples(500):
        for text in (example.ctx, *example.endings):
            assert preprocess(text) == theirs(text)


@settings(max_examples=200)
@given(st.text(max_size=20), st.text(max_size=20))
def test_tokenizing_the_ending_alone_equals_cutting_the_whole_as_the_harness_does(before: str, after: str) -> None:
    encode = gpt2_tokenizer().encode
    context = ("x" + before).rstrip()  # render never ends the harness's context in white space
    whole = encode(context + " " + after)
    assert encode(context) + encode(" " + after) == whole


def test_special_tokens_in_a_text_are_text() -> None:
    example = Example(0, "<|endoftext|>", "<|endoftext|>", "", "<|endoftext|>", ("<|endoftext|>", "b", "c", "d"), 0)
    for convention in ("completion", "harness"):
        assert 50256 not in tokenize((example,), gpt2_tokenizer(), convention).tokens


def test_an_empty_context_becomes_end_of_text() -> None:
    example = Example(0, "", "", "", "", ("a", "b", "c", "d"), 0)
    tokenized = tokenize((example,), gpt2_tokenizer(), "completion")
    assert tokenized.counts.tolist() == [[1, 1, 1, 1, 1]]
    assert tokenized.tokens[0] == 50256


def test_tokens_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(5)
    first = tokenize(examples, gpt2_tokenizer(), "harness")
    (file,) = (tmp_path / "repro-gpt2" / "hellaswag_tokens").iterdir()

    monkeypatch.setattr(gpt2.hellaswag.rows, "render", None)  # would fail if anything were tokenized again
    again = tokenize(examples, gpt2_tokenizer(), "harness")
    for name in ("tokens", "counts", "characters"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    other = tokenize(make_examples(5, seed=1), gpt2_tokenizer(), "harness")
    assert other.tokens.tolist() != first.tokens.tolist()
    assert tokenize(examples, gpt2_tokenizer(), "completion").tokens.tolist() != first.tokens.tolist()

    kept = file.read_bytes()

    def rewrite(content: bytes) -> Callable[[], None]:
        return lambda: file.write_bytes(content) and None

    def alter() -> None:
        arrays = dict(np.load(file))
        arrays["tokens"][3] += 1
        np.savez(file, **arrays)

    def plant_fifo() -> None:
        file.unlink()
        os.mkfifo(file)

    others = [path.read_bytes() for path in file.parent.iterdir() if path != file]
    for spoil in (
        rewrite(kept[:100]),
        rewrite(others[0]),  # another file's content, which is whole
        alter,
        *([plant_fifo] if hasattr(os, "mkfifo") else []),
    ):
        spoil()
        np.testing.assert_array_equal(tokenize(examples, gpt2_tokenizer(), "harness").tokens, first.tokens)
        assert file.read_bytes() == kept  # made again


def test_tokens_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory can be made in it
    assert len(tokenize(make_examples(2), gpt2_tokenizer(), "harness").counts) == 2


def test_rows_share_the_context_and_merge_equal_endings() -> None:
    example = Example(0, "", "", "", "one two", ("three four", "five", "three four", "six seven eight"), 0)
    made = make_rows((example,), gpt2_tokenizer(), "completion", 1024)
    (row,) = made.rows
    assert row.slots == ((0, 2), (1,), (3,))
    assert row.length == 2 + 1 + 0 + 2  # last tokens are not read
    assert made.lengths.tolist() == [[2, 1, 2, 3]]
    assert made.truncated == 0


def test_pack_lays_out_what_the_docstring_draws() -> None:
    example = Example(0, "", "", "", "one two", ("three four", "five", "three four", "six seven eight"), 0)
    (row,) = make_rows((example,), gpt2_tokenizer(), "completion", 1024).rows
    three, four, five = (gpt2_tokenizer().encode(word)[0] for word in (" three", " four", " five"))
    six, seven, eight = gpt2_tokenizer().encode(" six seven eight")
    packed = pack([row], batch=2, length=7)
    assert packed["tokens"][0, 2:].tolist() == [three, six, seven, 0, 0]
    assert packed["positions"][0].tolist() == [0, 1, 2, 2, 3, 0, 0]
    assert packed["segments"].tolist() == [[0, 0, 1, 3, 3, -1, -1], [-1] * 7]
    assert packed["heads"].tolist() == [1, 2, 3, 4]
    assert packed["targets"].tolist() == [[three, five, six, 0], [four, 0, 0, 0], [seven, 0, 0, 0], [eight, 0, 0, 0]]
    assert packed["targets"].ravel()[packed["scored"]].tolist() == [three, four, five, six, seven, eight]
    assert packed["ending"].tolist() == [0, 0, 1, 2, 2, 2]


def test_what_does_not_fit_loses_its_beginning_as_in_the_harness() -> None:
    example = Example(0, "", "", "", "a b c d e f", ("g h", "i", "i", "j k l m n o p q r"), 0)
    encode = gpt2_tokenizer().encode
    made = make_rows((example,), gpt2_tokenizer(), "completion", 6)
    assert made.truncated == 1
    assert [row.slots for row in made.rows] == [((0,),), ((1, 2),), ((3,),)]
    for row, ending in zip(made.rows, ("g h", "i", "j k l m n o p q r"), strict=True):
        whole = encode("a b c d e f " + ending)
        kept = whole[-7:]  # the model reads 6 and is asked for the last of 7
        assert [*row.context, *row.endings[0]] == kept
        assert len(row.endings[0]) == min(len(encode(" " + ending)), 6)
    assert made.lengths.tolist() == [[2, 1, 1, 6]]
    assert make_rows((example,), gpt2_tokenizer(), "completion", 14).truncated == 0
    assert make_rows((example,), gpt2_tokenizer(), "completion", 13).truncated == 1


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 2000),
    st.sampled_from([1, 8, 64]),
)
def test_plan_gives_each_row_once_within_the_budget(lengths: list[int], processes: int, budget: int, k: int) -> None:
    batches = make_batches(np.array(lengths), processes, budget, k)
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length % k == 0
        assert batch.length >= max(lengths[i] for i in batch.members)
        assert batch.rows == 1 or batch.rows * batch.length <= budget
        shares = [len(batch.members[rank::processes]) for rank in range(processes)]
        assert max(shares) == batch.rows  # every process runs this shape, and one of them needs it
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)


@needs_real
def test_real_rows_are_the_arithmetic_the_module_promises() -> None:
    made = make_rows(parse_file(REAL), gpt2_tokenizer(), "completion", 1024)
    lengths = np.array([row.length for row in made.rows])
    assert len(made.rows) == 10_042
    assert lengths.sum() == 1_740_093
    assert sum(1 + sum(len(e) - 1 for e in row.endings) for row in made.rows) == 1_235_066
    assert made.lengths.sum() == 1_265_192  # tokens scored: REFERENCE's figure
    for processes, budget, multiple, padding in ((1, 2048, 1, 1.01), (1, 16_384, 8, 1.03), (8, 16_384, 8, 1.1)):
        batches = make_batches(lengths, processes, budget, multiple)
        assert sum(batch.rows * batch.length for batch in batches) * processes < padding * lengths.sum()
