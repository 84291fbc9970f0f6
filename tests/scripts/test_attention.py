"""scripts/attention.py: the weights it draws, the labels, and the picture's own pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from repository import load_script

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.pretrained import save_pretrained
from gpt2.tokens.tokenizer import CharTokenizer

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/attention.py")


def build() -> GPT:
    config = GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=20, vocab_size=10, window=3, full_attention_every=2)
    return GPT(config).init_weights(0).eval()


def test_weights_are_the_asked_layers(script: ModuleType) -> None:
    windowed, full = (script.layer_weights(build(), list(range(8)), layer) for layer in (0, -1))
    assert windowed.shape == full.shape == (3, 8, 8)
    assert (windowed[:, 7, :5] == 0).all()
    assert (full[:, 7] > 0).all()
    torch.testing.assert_close(full.sum(dim=-1), torch.ones(3, 8))


@pytest.mark.parametrize(
    ("tokens", "layer", "words"),
    [([1], 2, "layers 0 to 1"), ([1], -3, "layers 0 to 1"), ([], 0, "prompt is empty"), ([1] * 21, 0, "can show 20")],
)
def test_bad_input(script: ModuleType, tokens: list[int], layer: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        script.layer_weights(build(), tokens, layer)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" cat", "·cat"),
        ("\n", "↵"),
        ("\ufffd", "\ufffd"),
        ("$", r"\$"),
        ("你", "你"),
        ("\x00", r"\x00"),
        ("\u00ad", r"\xad"),
    ],
)
def test_labels_show_what_is_invisible(script: ModuleType, text: str, shown: str) -> None:
    assert script.label(text) == shown


def test_the_picture_shows_a_causal_triangle(script: ModuleType, tmp_path: Path) -> None:
    """Every weight 1 would be dark: below the diagonal it is, above it the paper stays white."""
    import matplotlib.image

    T = 10
    script.draw(torch.ones(1, T, T), [str(t) for t in range(T)], "one head", tmp_path / "new/a.png")
    pixels = matplotlib.image.imread(tmp_path / "new/a.png")[..., :3]
    dark = (pixels < 0.5).all(axis=-1) | ((pixels[..., 2] > pixels[..., 0] + 0.25) & (pixels[..., 0] < 0.2))
    ys, xs = dark.nonzero()
    left_half = dark[:, : dark.shape[1] // 2].sum()
    assert left_half > dark[:, dark.shape[1] // 2 :].sum()  # the triangle's mass is on the left
    assert len(ys) == len(xs) > 1000


def test_the_command_line_draws_a_saved_model(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    save_pretrained(tmp_path, model.state_dict(), model.config, CharTokenizer("\n abcdefgh"))
    out = tmp_path / "out.png"
    words = [
        "attention.py",
        "-m",
        str(tmp_path),
        "--prompt",
        "a bad\ncab",
        "--layer",
        "1",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 0
    assert "3 heads over 9 tokens" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
