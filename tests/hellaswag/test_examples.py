"""What a HellaSwag example is, and what is wrong with a line that is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hellaswag_examples import make_examples

from gpt2.errors import UserError
from gpt2.hellaswag.examples import content_lines, content_sha256, parse_example, parse_file, spread

RAW: dict[str, Any] = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "pulls up roofing."],
    "split": "val",
    "label": "3",
}


@pytest.mark.parametrize(
    ("label", "expected"), [("3", 3), (3, 3), ("0", 0), (0, 0), ("", None), (None, None), ("absent", None)]
)
def test_labels_in_every_spelling(label: Any, expected: int | None) -> None:
    raw = {**RAW, "label": label}
    if label == "absent":
        del raw["label"]
    assert parse_example(raw, "here").label == expected


@pytest.mark.parametrize("label", [4, -2, "4", "x", "-2", 1.5, True, [1]])
def test_wrong_labels(label: Any) -> None:
    with pytest.raises(UserError, match=r"here: label(\..*)? is"):
        parse_example({**RAW, "label": label}, "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON (Expecting"),
        ("[1]", "line 3: it is [1]; it must be"),
        (
            json.dumps({**RAW, "endings": ["a", "b", "c"]}),
            "line 3: endings is ['a', 'b', 'c']; tuple should have at",
        ),
        (json.dumps({**RAW, "endings": "abcd"}), "line 3: endings is 'abcd'; it must be a valid tuple"),
        (json.dumps({**RAW, "endings": ["a", "b", "c", 4]}), "line 3: endings.3 is 4; it must be a valid string"),
        (json.dumps({**RAW, "ctx": None}), "line 3: ctx is None; it must be a valid string"),
        (json.dumps({**RAW, "ind": "x"}), "line 3: ind is 'x'; it must be a valid integer"),
        (json.dumps({name: RAW[name] for name in RAW if name != "ctx_a"}), "line 3: ctx_a is missing"),
        (json.dumps({**RAW, "ind": 0.5}), "line 3: ind is 0.5; it must be a valid integer"),
        ("[" * 5000, "line 3 is not JSON of ours: it nests brackets too deep"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(RAW) + "\n\n" + line + "\n")  # an empty line is no example
    with pytest.raises(UserError) as error:
        parse_file(path)
    assert f"{path}, {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path in (tmp_path / "fifo.jsonl", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"^cannot read {path}: .*; give a HellaSwag \.jsonl or \.parquet file$"):
            parse_file(path)


def test_the_hash_is_of_content_not_of_spelling(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b"".join(content_lines(make_examples(5))))
    assert parse_file(path) == make_examples(5)
    hub = "".join(
        json.dumps({**json.loads(line), "label": str(json.loads(line)["label"]), "source_id": "x"}, ensure_ascii=False)
        + "\n"
        for line in content_lines(make_examples(5))
    )
    path.write_text(hub, encoding="utf-8")
    assert content_sha256(parse_file(path)) == content_sha256(make_examples(5))
    assert content_sha256(make_examples(5)[::-1]) != content_sha256(make_examples(5))


def test_spread_is_even() -> None:
    examples = make_examples(10)
    assert spread(examples, None) == examples
    assert spread(examples, 99) == examples
    assert [e.ind for e in spread(examples, 4)] == [0, 2, 5, 7]
    for limit in (0, -1):
        with pytest.raises(UserError, match="leaves nothing"):
            spread(examples, limit)


@pytest.mark.parametrize(("label", "expected"), [("-1", None), ("NaN", None), ("3.0", 3), ('"2"', 2), ('"-1"', None)])
def test_other_spellings_of_labels_and_ids(tmp_path, label, expected):
    """What pandas and other copies of the data set write, behind a byte-order mark."""
    rest = '"activity_label": "a", "ctx_a": "b", "ctx_b": "", "ctx": "b", "endings": ["1", "2", "3", "4"]'
    rest += f', "label": {label}'
    path = tmp_path / "x.jsonl"
    path.write_text(f'\ufeff{{"ind": "24", {rest}}}\n{{{rest}}}\n', encoding="utf-8")
    assert [(e.ind, e.label) for e in parse_file(path)] == [(24, expected), (-1, expected)]


def test_parquet_as_the_hub_has_it(tmp_path):
    """An integer id, a label that is a string, and columns of which nothing is known here."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [json.loads(line) for line in content_lines(make_examples(5))]
    table = pyarrow.Table.from_pylist([{**row, "label": str(row["label"]), "source_id": "x"} for row in rows])
    path = tmp_path / "val.parquet"
    parquet.write_table(table, path)
    assert parse_file(path) == make_examples(5)
    parquet.write_table(table.set_column(0, "ind", pyarrow.array([1.5] * 5)), path)
    with pytest.raises(UserError, match=r"val\.parquet, row 1: ind is 1\.5"):
        parse_file(path)
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(UserError, match="holds no HellaSwag example"):
        parse_file(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as parquet") as error:
        parse_file(path)
    assert "\n" not in str(error.value)
