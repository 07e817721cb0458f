"""The size rule."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from step1x_edit.errors import InvalidRequest
from step1x_edit.images import fit_size, open_picture, prepare

ROWS = json.loads((Path(__file__).parent.parent / "reference" / "resize.json").read_text())


def test_every_reference_size():
    for width, height, level, *expected in ROWS:
        if 0 in expected:
            with pytest.raises(InvalidRequest, match="too elongated"):
                fit_size(width, height, level)
        else:
            assert fit_size(width, height, level) == tuple(expected), (width, height, level)


@given(
    st.integers(16, 8000),
    st.floats(0.2, 5.0),
    st.sampled_from([128, 256, 512, 768, 1024]),
)
def test_sizes_are_token_multiples_of_about_the_level(width, ratio, level):
    height = max(16, round(width * ratio))
    new_width, new_height = fit_size(width, height, level)
    assert new_width % 16 == new_height % 16 == 0
    assert 0.5 * level**2 <= new_width * new_height <= 1.1 * level**2


def test_too_elongated_a_picture_is_refused():
    with pytest.raises(InvalidRequest, match="5000 × 2"):
        fit_size(5000, 2, 512)


def test_prepare_resizes_to_rgb():
    small = prepare(open_picture(Image.new("L", (400, 300))), 128)
    assert (small.mode, small.size) == ("RGB", (144, 96))
