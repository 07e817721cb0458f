"""Colour maps between two pictures."""

import numpy as np
import pytest
from PIL import Image

from step1x_edit.images.colour_map import fit_colour_map, grey

from ..pictures import as_image, detailed

COLOURS = detailed(120, 90).reshape(-1, 3)
SEPIA = np.array([[0.39, 0.77, 0.19], [0.35, 0.69, 0.17], [0.27, 0.53, 0.13]], np.float32)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda x: x, 1e-4),
        (lambda x: x @ SEPIA.T, 1e-3),
        (lambda x: x[:, ::-1] * np.float32(0.8) + np.float32(0.1), 1e-3),
        (lambda x: x**2, 0.006),
        (lambda x: x * x * (3 - 2 * x), 0.006),
        (lambda x: (1.5 * x).clip(0, 1), 0.025),
    ],
    ids=["nothing", "sepia", "swapped", "gamma", "contrast", "clipped"],
)
def test_tone_and_colour_are_found_under_noise_and_other_changes(change, tolerance):
    rng = np.random.default_rng(0)
    wanted = change(COLOURS).astype(np.float32)
    targets = wanted + 0.02 * rng.normal(size=COLOURS.shape).astype(np.float32)
    targets[: len(targets) // 4] = 0.9  # an object that covers a quarter
    found = fit_colour_map(COLOURS, targets, 0.01)
    assert rms(found(COLOURS) - wanted) < tolerance + 0.002


def test_the_table_gives_what_the_map_gives():
    found = fit_colour_map(COLOURS, COLOURS**2, 0.005)
    picture = as_image(COLOURS.reshape(90, 120, 3))
    exact = found(np.asarray(picture, np.float32) / 255).clip(0, 1) * 255
    assert np.abs(np.asarray(found.apply(picture)) - exact).max() <= 1.5


def test_a_grey_map_gives_equal_channels():
    targets = grey(COLOURS) + 0.02 * np.random.default_rng(0).normal(size=COLOURS.shape)
    found = fit_colour_map(COLOURS, targets.astype(np.float32), 0.01).as_grey()
    applied = np.asarray(found.apply(Image.fromarray(np.uint8(COLOURS.reshape(90, 120, 3) * 255))))
    assert (applied == applied[..., :1]).all()


def test_few_colours_are_enough():
    one = np.full((1, 3), 0.4, np.float32)
    found = fit_colour_map(one, one + np.float32(0.2), 0.01)
    assert np.isfinite(found(COLOURS)).all()
    assert rms(found(one) - 0.6) < 0.05
