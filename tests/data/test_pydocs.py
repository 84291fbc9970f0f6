"""The corpus inside Python: deterministic, without repetition, validation apart from training."""

from __future__ import annotations

import sysconfig

import pytest
from repository import ROOT, load_script

from gpt2.errors import UserError
from gpt2.tokens.dataset import open_dataset

SCRIPT = ROOT / "data" / "pydocs.py"


@pytest.fixture(scope="module")
def pydocs():
    return load_script("data/pydocs.py")


@pytest.fixture(scope="module")
def made(pydocs, tmp_path_factory):
    out = tmp_path_factory.mktemp("pydocs") / "out"
    assert pydocs.main(["--out", str(out)]) == 0
    return out


def test_about_two_megabytes_with_validation_spread_and_apart(made, capsys, pydocs):
    dataset = open_dataset(made)
    assert dataset.tokenizer().name == "gpt2"
    texts = {}
    for split, streams in (("train", dataset.train), ("val", dataset.val)):
        text = dataset.tokenizer().decode(streams.read(0, len(streams)))
        texts[split] = text.split("<|endoftext|>")[1:]
    everything = texts["train"] + texts["val"]
    assert 1_500_000 < sum(map(len, everything)) < 4_000_000
    assert 0.02 < len(texts["val"]) / len(everything) < 0.08
    assert len(set(everything)) == len(everything) == dataset.manifest.statistics()["documents"]
    paragraphs = {split: {p for t in texts[split] for p in t.split("\n\n") if len(p) > 80} for split in texts}
    shared = paragraphs["val"] & paragraphs["train"]
    assert len(shared) < 0.03 * len(paragraphs["val"])
    first_words = [text.split(None, 1)[0] for text in texts["val"]]
    assert any(word.startswith("asyncio") or word < "c" for word in first_words)
    assert any(word > "t" for word in first_words)
    assert pydocs.main(["--out", str(made)]) == 0  # again: nothing to do
    assert capsys.readouterr().out.count("complete and verified") == 1


def test_library_is_parsed_in_a_fixed_order_and_not_imported(tmp_path, pydocs):
    (tmp_path / "b").mkdir()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text('"""Not of the library."""')
    (tmp_path / "a.py").write_text('"""Module a."""\nraise SystemExit\nclass C:\n  "Class."\n  def f(self): "Twice."\n')
    (tmp_path / "b" / "__init__.py").write_text(
        '"""Package b."""\ndef g():\n  """Twice."""\nif 1:\n  def h(): "In an if."\n'
    )
    (tmp_path / "b" / "broken.py").write_text("def (:")
    (tmp_path / "b" / "empty.py").write_text("x = 1")
    (tmp_path / "c.py").write_bytes(b'# coding: latin-1\n"""Caf\xe9."""')
    documents = pydocs.read_documents(tmp_path)[len(pydocs._topics()) :]
    assert documents == [
        "a\n\nModule a.\n\na.C\n\nClass.\n\na.C.f\n\nTwice.\n",
        "b\n\nPackage b.\n\nb.h\n\nIn an if.\n",
        "c\n\nCafé.\n",
    ]


def test_topics_that_longer_ones_repeat_are_left_out(pydocs):
    topics = pydocs._topics()
    assert topics == pydocs._topics()
    paragraphs = [{p for p in text.split("\n\n") if len(p) > 80} for text in topics]
    for number, mine in enumerate(paragraphs):
        others = set().union(*(p for i, p in enumerate(paragraphs) if i != number))
        assert len(mine & others) <= 0.5 * len(mine) + 1


def test_no_library_and_another_data_set(tmp_path, pydocs, made, monkeypatch):
    shakespeare = tmp_path / "other"
    shakespeare.mkdir()
    manifest = (made / "manifest.json").read_text().replace("documentation of", "something but")
    (shakespeare / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="holds another data set"):
        pydocs.main(["--out", str(shakespeare)])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(pydocs, "_topics", list)
    with pytest.raises(UserError, match="its sources are missing"):
        pydocs.main(["--out", str(tmp_path / "out")])
