"""Published figures find their own run and no other."""

from __future__ import annotations

import pytest

from gpt2.metrics import reference
from gpt2.presets import presets


@pytest.mark.parametrize(
    ("name", "corpus"),
    [
        ("HuggingFaceFW/fineweb-edu", "fineweb-edu"),
        ("edu_fineweb10B", "fineweb-edu"),
        ("edufineweb", "fineweb-edu"),
        ("fineweb_edu_10B", "fineweb-edu"),
        ("HuggingFaceFW/fineweb", "fineweb"),
        ("fineweb10B", "fineweb"),
        ("education", None),
        ("pydocs", None),
        ("", None),
    ],
)
def test_a_data_set_is_known_by_its_names(name: str, corpus: str | None) -> None:
    assert reference.corpus_of(name) == corpus


def test_the_presets_have_the_published_sizes() -> None:
    sizes = {}
    for name, (_, config) in presets().items():
        model = config.model
        sizes[name] = reference.size_of(model.n_layer, model.n_head, model.n_embd)
    assert sizes["gpt2"] == "124M"
    assert sizes["gpt2-medium"] == "350M"
    assert sizes["gpt2-large"] == "774M"
    assert sizes["gpt2-xl"] == "1558M"
    assert sizes["quickstart"] is None


def test_figures_are_of_the_right_corpus() -> None:
    assert reference.gpt2_val_loss("fineweb", "124M") == 3.4250
    assert reference.gpt2_val_loss("fineweb-edu", "124M") == 3.2924
    assert reference.gpt2_val_loss("fineweb-edu", "1558M") is None  # nobody published it
    assert reference.gpt2_val_loss(None, "124M") is None
    assert reference.gpt2_val_loss("fineweb", None) is None
    assert reference.milestones("fineweb-edu", "124M")[0] == (250 * 524_288, 6.163)
    assert reference.milestones("fineweb", "350M") == ()


def test_milestones_fall() -> None:
    for sizes in reference.MILESTONES.values():
        for points in sizes.values():
            assert list(points) == sorted(points)
            assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)


def test_the_distance_to_gpt2_in_words() -> None:
    tokens = reference.BASELINE_VAL_TOKENS
    assert reference.loss_beside_gpt2("fineweb", "124M", 3.5, tokens) == "GPT-2 124M on FineWeb 3.4250: 0.0750 to go"
    better = reference.loss_beside_gpt2("fineweb-edu", "124M", 3.29, 2048)
    assert better == "GPT-2 124M on FineWeb-Edu 3.2924: 0.0024 better (ours over 2,048 tokens, not 10,485,760)"
    assert reference.loss_beside_gpt2(None, "124M", 3.5, tokens) is None
    assert reference.loss_beside_gpt2("fineweb-edu", "774M", 3.5, tokens) is None
    assert reference.hellaswag_beside_gpt2("124M", 0.29) == "GPT-2 124M 29.55%: 0.55 points to go"
    assert reference.hellaswag_beside_gpt2("124M", 0.30) == "GPT-2 124M 29.55%: 0.45 points better"
    assert reference.hellaswag_beside_gpt2(None, 0.30) is None
