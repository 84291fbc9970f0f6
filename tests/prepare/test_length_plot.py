"""The picture of document lengths has every document, and draws where they are none or all alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpt2.prepare.small_dataset import write_dataset
from gpt2.tokens.manifest import Manifest
from gpt2.tokens.tokenizer import gpt2_tokenizer

pytest.importorskip("matplotlib")
from gpt2.prepare.length_plot import plot_lengths


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lengths", [{}, {0: 3}, {5: 1}, {1: 10, 40: 20, 1056: 4}], ids=["no", "0", "one", "many"])
def test_the_picture_has_every_document(tmp_path: Path, monkeypatch, lengths: dict[int, int]) -> None:
    drawn = []
    monkeypatch.setattr("gpt2.prepare.length_plot.save_figure", lambda figure, path: drawn.append(figure) or path)
    made = write_dataset(tmp_path, [50256, 1], [50256, 1], gpt2_tokenizer()).manifest
    assert isinstance(made, Manifest)
    shards = (dataclasses.replace(made.shards[0], lengths=lengths), dataclasses.replace(made.shards[1], lengths={}))
    assert plot_lengths(dataclasses.replace(made, shards=shards), tmp_path / "x.png") == tmp_path / "x.png"
    axes = drawn[0].axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == sum(lengths.values())
    assert f": {sum(lengths.values()):,} documents" in axes.get_title()


def test_it_is_a_picture(tmp_path: Path) -> None:
    made = write_dataset(tmp_path, [50256, 1], [50256, 1], gpt2_tokenizer()).manifest
    assert isinstance(made, Manifest)
    assert plot_lengths(made, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
