"""Softening a mask inwards."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from step1x_edit.images.mask import feather_inward


def feathered(inside: np.ndarray) -> np.ndarray:
    return np.asarray(feather_inward(Image.fromarray(np.uint8(255) * inside)))


def test_edges_are_soft_and_lie_inside():
    inside = np.zeros((1000, 1000), bool)
    inside[200:800, 200:800] = True
    soft = feathered(inside)
    assert (soft[~inside] == 0).all()
    assert (soft[220:780, 220:780] == 255).all()
    profile = soft[500, 195:215].astype(int)
    assert (np.diff(profile) >= 0).all()
    assert np.diff(profile).max() < 80  # no step
    assert ((profile > 0) & (profile < 255)).sum() >= 5


def test_parts_too_thin_to_be_softened_still_show():
    inside = np.zeros((1000, 1000), bool)
    inside[100:600, 100:600] = True
    inside[700, 100:600] = True
    inside[800:803, 100:600] = True
    inside[900:907, 100:600] = True
    soft = feathered(inside)
    for row in (300, 700, 801, 903):
        assert soft[row, 350] == 255


def test_a_mask_of_everything_has_no_edge():
    assert (feathered(np.ones((700, 900), bool)) == 255).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(1, 40))
def test_nothing_reaches_outside(seed, share, cell):
    rng = np.random.default_rng(seed)
    coarse = rng.random((-(-300 // cell), -(-400 // cell))) < share
    inside = np.kron(coarse, np.ones((cell, cell), bool))[:300, :400].astype(bool)
    soft = feathered(inside)
    assert (soft[~inside] == 0).all()
    assert soft.any() == inside.any()
