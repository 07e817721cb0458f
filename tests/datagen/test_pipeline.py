import numpy as np
import pytest

from step1x_edit.datagen import pipeline
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.pipeline import DEFAULT_SHARES, make_triplet, sample_category

SEEDS = range(6)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def test_every_category_has_a_share_and_no_other():
    assert set(DEFAULT_SHARES) == set(OPERATORS)
    assert sum(DEFAULT_SHARES.values()) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("category", OPERATORS)
def test_mask_is_exact_and_the_edit_is_seen(category, atlas):
    for seed in SEEDS:
        triplet = make_triplet(seed, category, atlas, 96, 64)
        assert triplet.source.shape == triplet.target.shape == (64, 96, 3)
        outside = ~triplet.mask
        assert np.array_equal(triplet.source[outside], triplet.target[outside])
        inside = triplet.mask
        assert (triplet.source[inside] != triplet.target[inside]).any(-1).all()
        assert inside.mean() >= pipeline.MIN_CHANGED_SHARE
        change = triplet.source[inside].astype(float) - triplet.target[inside]
        assert np.sqrt((change**2).mean()) >= pipeline.MIN_CHANGE


@pytest.mark.parametrize("category", ["removal", "addition", "colour"])
def test_local_edits_leave_most_of_the_picture(category, atlas):
    shares = [make_triplet(seed, category, atlas).mask.mean() for seed in SEEDS]
    assert max(shares) < 0.4


@pytest.mark.parametrize("category", OPERATORS)
def test_instructions_in_both_languages_without_open_slots(category, atlas):
    for seed in SEEDS:
        triplet = make_triplet(seed, category, atlas, 64, 64)
        assert set(triplet.instructions) == {"en", "zh"}
        for sentence in (*triplet.instructions.values(), *triplet.captions.values()):
            assert sentence
            assert "{" not in sentence
            assert "}" not in sentence
        assert triplet.instructions["en"].isascii() or category == "text"
        assert not triplet.instructions["zh"].isascii()


@pytest.mark.parametrize("category", OPERATORS)
def test_a_seed_makes_the_same_triplet_whatever_was_made_before(category, atlas):
    first = make_triplet(3, category, atlas, 64, 64)
    make_triplet(4, category, atlas, 64, 64)
    again = make_triplet(3, category, Atlas(), 64, 64)
    assert np.array_equal(first.source, again.source)
    assert np.array_equal(first.target, again.target)
    assert (first.instructions, first.captions) == (again.instructions, again.captions)
    other = make_triplet(5, category, atlas, 64, 64)
    assert not np.array_equal(first.source, other.source)


def test_what_a_caption_cannot_say_is_not_captioned(atlas):
    # The caption names objects and background; a negative of them would teach a wrong picture.
    for category in ("tone", "style", "text", "portrait", "material"):
        assert all(not make_triplet(seed, category, atlas, 64, 64).captions for seed in SEEDS)


def test_categories_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    drawn = [sample_category(rng, {"tone": 3.0, "colour": 1.0}) for _ in range(400)]
    assert drawn.count("tone") / 400 == pytest.approx(0.75, abs=0.06)
