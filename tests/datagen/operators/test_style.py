"""Filters of the drawn styles."""

import numpy as np
import pytest
from scipy import ndimage

from step1x_edit.datagen.operators.style import smoothed


@pytest.mark.parametrize("side", [3, 5, 7])
def test_the_median_is_scipys(side):
    picture = np.random.default_rng(0).random((31, 44, 3), np.float32)
    assert np.array_equal(smoothed(picture, side), ndimage.median_filter(picture, (side, side, 1)))
