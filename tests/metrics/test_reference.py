"""Published figures find their own run and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats

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
    assert sizes["gpt2-3.28"] == "124M"  # its heads are fewer and wider
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


def test_a_run_is_held_against_the_published_run_of_its_own_recipe() -> None:
    named = {name: config for name, (_, config) in presets().items()}
    llmc = reference.published("fineweb", named["gpt2"].to_dict())
    assert llmc is not None
    assert llmc.label == "llm.c, 124M on FineWeb"
    assert llmc.points[0] == (250, 6.171)
    recipe = reference.published("fineweb", named["gpt2-3.28"].to_dict())
    assert recipe is not None
    assert recipe.beside(500, 3.97) == "modded-nanogpt, 3.28 recipe 3.828 at this step: 0.142 higher"
    assert recipe.beside(3250, 3.27) == "modded-nanogpt, 3.28 recipe 3.277 at this step: 0.007 lower"
    assert recipe.beside(501, 3.97) is None
    assert reference.published("fineweb-edu", named["gpt2-3.28"].to_dict()) is None  # other data, other losses
    assert reference.published("fineweb", named["gpt2-medium"].to_dict()) is None
    assert reference.published(None, named["gpt2"].to_dict()) is None
    changed = replace(named["gpt2-3.28"], optim=replace(named["gpt2-3.28"].optim, beta1=0.9))
    assert reference.published("fineweb", changed.to_dict()) is None
    shorter = replace(named["gpt2-3.28"], run=replace(named["gpt2-3.28"].run, max_steps=1000))
    assert reference.published("fineweb", shorter.to_dict()) is None  # its learning rate falls earlier
    smaller = replace(named["gpt2"], data=replace(named["gpt2"].data, total_batch_tokens=262_144))
    assert reference.published("fineweb", smaller.to_dict()) is None
    assert reference.published("fineweb", {}) is None  # an old run's


def test_milestones_fall() -> None:
    for sizes in (*reference.MILESTONES.values(), {"recipe": reference.RECIPE_3_28}):
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


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (2, 8), (2912, 10_042), (1, 1)])
def test_wilsons_interval_is_scipys(hits: int, n: int) -> None:
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    low, high = reference.wilson(hits / n, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low < high <= 1


def test_of_no_examples_nothing_is_known() -> None:
    assert reference.wilson(float("nan"), 0) == (0.0, 1.0)
