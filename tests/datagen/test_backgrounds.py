import numpy as np
import pytest
from scipy import ndimage

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import NAMED, bilinear, noise, perspective, sample, shrunk_crop


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def longitude_ramp(columns=360, rows=180):
    """A panorama whose red is its longitude and whose green is its row, each as a fraction."""
    u, v = np.meshgrid(np.arange(columns) / columns, np.arange(rows) / (rows - 1))
    return np.stack([u, v, np.zeros_like(u)], -1).astype(np.float32)


def test_bilinear_at_grid_points_and_half_way():
    pixels = np.random.default_rng(0).random((5, 7, 3), np.float32)
    u, v = np.meshgrid(np.arange(7.0), np.arange(5.0))
    assert np.array_equal(bilinear(pixels, u, v), pixels)
    middle = bilinear(pixels, np.float64([[2.5]]), np.float64([[1.0]]))[0, 0]
    np.testing.assert_allclose(middle, (pixels[1, 2] + pixels[1, 3]) / 2, rtol=1e-6)


def test_bilinear_wraps_sideways_and_stops_at_the_poles():
    pixels = np.random.default_rng(0).random((5, 7, 3), np.float32)
    seam = bilinear(pixels, np.float64([[6.5]]), np.float64([[2.0]]))[0, 0]
    np.testing.assert_allclose(seam, (pixels[2, 6] + pixels[2, 0]) / 2, rtol=1e-6)
    below = bilinear(pixels, np.float64([[3.0]]), np.float64([[9.0]]))[0, 0]
    assert np.array_equal(below, pixels[4, 3])


@pytest.mark.parametrize("yaw", [60, 90, 200])
def test_perspective_looks_where_it_is_told(yaw):
    view = perspective(longitude_ramp(), 65, 65, yaw, 0, 90)
    assert view[32, 32, 0] == pytest.approx(yaw / 360, abs=1e-3)
    assert view[32, 32, 1] == pytest.approx(0.5, abs=1e-3)
    # The pinhole's rim at 90° of view is 45° to either side, less half a pixel.
    half = np.degrees(np.arctan(32 / 32.5)) / 360
    assert view[32, 0, 0] == pytest.approx(yaw / 360 - half, abs=1e-3)
    assert view[32, 64, 0] == pytest.approx(yaw / 360 + half, abs=1e-3)


def test_perspective_pitch_up_looks_up():
    # Rows of the panorama count from the zenith.
    view = perspective(longitude_ramp(), 65, 65, 90, 30, 60)
    assert view[32, 32, 1] == pytest.approx(0.5 - 30 / 180, abs=2e-3)
    assert view[0, 32, 1] < view[64, 32, 1]


def test_noise_fills_its_range_and_repeats_by_seed():
    first = noise(np.random.default_rng(1), 64, 48)
    assert first.shape == (48, 64)
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.std() > 0.05
    assert np.array_equal(first, noise(np.random.default_rng(1), 64, 48))


@pytest.mark.parametrize("name", NAMED)
def test_named_backgrounds_always_look_the_same(name, atlas):
    first, again = (NAMED[name].draw(atlas, 48, 32) for _ in range(2))
    assert first.shape == (32, 48, 3)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.array_equal(first, again)
    first[:] = 0  # a caller may paint on it
    assert np.array_equal(NAMED[name].draw(atlas, 48, 32), again)


def test_named_backgrounds_differ_from_one_another(atlas):
    pictures = {name: NAMED[name].draw(atlas, 48, 32) for name in NAMED}
    names = list(pictures)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert np.abs(pictures[name] - pictures[other]).mean() > 0.02, (name, other)


def test_sampled_backgrounds_fit_and_name_themselves(atlas):
    seen = set()
    for seed in range(40):
        picture, name, source = sample(np.random.default_rng(seed), atlas, 48, 32)
        assert picture.shape == (32, 48, 3)
        assert picture.min() >= 0
        assert picture.max() <= 1
        if name is not None:
            assert np.array_equal(picture, NAMED[name].draw(atlas, 48, 32))
            assert source == NAMED[name].source
        seen.add(name is None)
    assert seen == {True, False}


@pytest.mark.parametrize("zoom", [1.2, 1.5, 2.4, 2.9])
@pytest.mark.parametrize("at", [(0, 0), (0.5, 0.3), (1, 1)])
def test_a_crop_is_the_whole_photograph_smoothed_and_sampled(zoom, at):
    """The filter is run over what is near the crop alone."""
    height, width = 24, 32
    levels = np.random.default_rng(0).integers(256, size=(90, 110, 3))
    photograph = levels.astype(np.float32) / 255
    top, left = at[0] * (90 - zoom * height), at[1] * (110 - zoom * width)
    side = round(zoom) if zoom >= 1.5 else 1
    smooth = ndimage.uniform_filter(photograph, (side, side, 1))
    u, v = np.meshgrid(left + zoom * np.arange(width), top + zoom * np.arange(height))
    whole = bilinear(smooth, u, v)
    assert np.array_equal(shrunk_crop(photograph, top, left, zoom, width, height), whole)
