from dataclasses import fields, replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.portrait import sample_person
from step1x_edit.datagen.portraits import (
    BEARDS,
    CLOTHES,
    EXPRESSIONS,
    GLASSES,
    HAIR,
    HAIR_COLOURS,
    SKINS,
    Portrait,
    draw_portrait,
)
from step1x_edit.datagen.vocabulary import COLOURS

TABLES = {
    "skin": SKINS,
    "hair": HAIR,
    "hair_colour": HAIR_COLOURS,
    "beard": BEARDS,
    "glasses": GLASSES,
    "clothes": CLOTHES,
    "clothes_colour": COLOURS,
    "expression": EXPRESSIONS,
}
PLAIN = Portrait(
    "light", "short", "brown", "beard", "none", "hoodie", "blue", "neutral", 0.5, 0.5, 1.0
)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


@pytest.mark.parametrize("part", TABLES)
def test_every_choice_of_a_part_looks_different(part, atlas):
    drawn = [
        draw_portrait(replace(PLAIN, **{part: choice}), atlas, (96, 96)) for choice in TABLES[part]
    ]
    for i, one in enumerate(drawn):
        assert 0 <= one.min() <= one.max() <= 1
        for other in drawn[:i]:
            assert (np.abs(one - other).max(-1) > 0.1).sum() > 8


def test_colours_are_those_of_the_tables(atlas):
    # The drawing is linear in a part's fill, so the commonest colour is the fill itself.
    drawn = draw_portrait(replace(PLAIN, clothes_colour="green"), atlas, (128, 128))
    lower = drawn[-20:][drawn[-20:, :, 3] > 0.99][:, :3]
    wanted = np.asarray(COLOURS["green"].rgb)
    assert (np.abs(lower - wanted).max(-1) < 0.02).mean() > 0.4


def test_random_people_are_of_the_tables():
    people = [sample_person(np.random.default_rng(seed), 1.0) for seed in range(60)]
    for part, table in TABLES.items():
        seen = {getattr(person, part) for person in people}
        assert seen <= set(table)
        assert len(seen) > len(table) // 2
    assert set(TABLES) < {field.name for field in fields(Portrait)}
