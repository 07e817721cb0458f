import numpy as np
import pytest

from step1x_edit.datagen.weather import DEFECTS, LUMA, WEATHER

ALL = WEATHER | DEFECTS


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return rng.random((6, 5, 3), np.float32).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("name", ALL)
def test_a_formula_is_a_function_of_picture_and_seed(name, picture):
    before = picture.copy()
    first, again = (ALL[name](picture, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(picture, before)
    assert np.array_equal(first, again)
    assert first.shape == picture.shape
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert np.abs(first - picture).mean() > 0.02


@pytest.mark.parametrize("name", ["fog", "rain", "snow", "winter", "denoise"])
def test_what_falls_or_drifts_differs_from_seed_to_seed(name, picture):
    first, other = (ALL[name](picture, np.random.default_rng(seed)) for seed in (1, 2))
    assert not np.array_equal(first, other)


def test_light_comes_from_the_side_that_is_named():
    grey = np.full((64, 64, 3), 0.5, np.float32)
    for name, lit, dark in (("relight_left", 0, -1), ("relight_right", -1, 0)):
        light = (WEATHER[name](grey, np.random.default_rng(0)) @ LUMA).mean(0)
        assert light[lit] > 0.6 > 0.3 > light[dark]


def test_fog_is_thicker_above_and_flattens_contrast(picture):
    foggy = WEATHER["fog"](picture, np.random.default_rng(0))
    assert foggy[:16].std() < foggy[-16:].std() < picture.std()


def test_greens_turn_orange_in_autumn():
    leaves = np.full((8, 8, 3), (0.2, 0.6, 0.15), np.float32)
    red, green, blue = WEATHER["autumn"](leaves, np.random.default_rng(0))[0, 0]
    assert red > green > blue
