import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.materials import MATERIALS, made_of


@pytest.fixture(scope="module")
def sprite():
    return Atlas().sprite("cat", 64)


@pytest.mark.parametrize("material", MATERIALS)
def test_a_material_keeps_the_outline(material, sprite):
    before = sprite.copy()
    made = made_of(sprite, material)
    assert np.array_equal(sprite, before)
    assert made.dtype == np.float32
    assert made.shape == sprite.shape
    assert 0 <= made.min() <= made.max() <= 1
    assert (made[..., 3] <= sprite[..., 3] + 1e-6).all()
    if material != "glass":
        assert np.array_equal(made[..., 3], sprite[..., 3])


def test_materials_differ_from_each_other_and_from_the_drawing(sprite):
    inside = sprite[..., 3] > 0.9
    seen = [sprite, *(made_of(sprite, name) for name in MATERIALS)]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one[inside] - other[inside]).mean() > 0.03


def test_glass_lets_the_background_through(sprite):
    inside = sprite[..., 3] > 0.99
    assert made_of(sprite, "glass")[inside, 3].mean() < 0.8


def test_gold_is_yellow_and_stone_is_grey(sprite):
    inside = sprite[..., 3] > 0.9
    red, green, blue = made_of(sprite, "gold")[inside, :3].mean(0)
    assert red > green > 1.5 * blue
    stone = made_of(sprite, "stone")[inside, :3].mean(0)
    assert np.ptp(stone) < 0.05
