"""Filters of the drawn styles."""

import numpy as np
import pytest
from scipy import ndimage

from step1x_edit.datagen.operators.style import median, oil


@pytest.mark.parametrize("side", [3, 5, 7])
def test_the_median_is_scipys(side):
    picture = np.random.default_rng(0).random((31, 44, 3), np.float32)
    assert np.array_equal(median(picture, side), ndimage.median_filter(picture, (side, side, 1)))


def test_black_in_oil_is_black():
    """A running mean that has passed a bright place may come back a rounding below zero."""
    picture = np.zeros((96, 160, 3), np.float32)
    picture[:48, :80] = np.random.default_rng(0).random((48, 80, 3), np.float32) ** 4
    drawn = oil(picture)
    assert np.isfinite(drawn).all()
    assert drawn.min() == 0
