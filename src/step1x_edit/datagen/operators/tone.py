"""Tone transformation: a formula over the whole picture."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.scene import Scene, sample_scene
from step1x_edit.datagen.weather import DEFECTS, WEATHER

LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
"""Rec. 601 weights of the channels' light."""
SEPIA = np.asarray(
    [[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32
)

"""Rows: how much of red, green and blue goes into each channel of the result."""
WARM = np.asarray([1.12, 1.0, 0.74], np.float32)
COLD = np.asarray([0.74, 0.96, 1.14], np.float32)
MOONLIGHT = np.asarray([0.5, 0.65, 1.15], np.float32)


def grey(picture: Pixels) -> Pixels:
    """Rec. 601 luma in all three channels."""
    return np.repeat((picture @ LUMA)[..., None], 3, -1)


TONES: dict[str, Callable[[Pixels], Pixels]] = {
    "grey": grey,
    "sepia": lambda picture: picture @ SEPIA.T,
    "warm": lambda picture: picture * WARM,
    "cold": lambda picture: picture * COLD,
    "bright": lambda picture: picture**0.6,
    "dark": lambda picture: 0.8 * picture**1.5,
    "contrast": lambda picture: 0.5 + 1.6 * (picture - 0.5),
    "faded": lambda picture: 0.3 + 0.55 * picture,
    "vivid": lambda picture: grey(picture) + 1.8 * (picture - grey(picture)),
    "negative": lambda picture: 1 - picture,
    "night": lambda picture: 0.55 * (0.4 * grey(picture) + 0.6 * picture) ** 1.3 * MOONLIGHT,
    "blur": lambda picture: ndimage.gaussian_filter(
        picture, (min(picture.shape[:2]) / 50,) * 2 + (0,)
    ),
}

ALL_TONES = (*TONES, *WEATHER, *DEFECTS)


def scene_of_any_number(context: Context, width: int, height: int) -> Scene:
    """A scene of no to three objects: a tone needs none."""
    count = int(context.rng.choice([0, 1, 2, 3], p=[0.4, 0.25, 0.25, 0.1]))
    return sample_scene(context.rng, context.atlas, width, height, num_objects=count)


def tone(context: Context, scene: Scene) -> Edit:
    """Apply one of `TONES` or `WEATHER` to the whole picture, or take one of `DEFECTS` away."""
    variety = context.variety
    name = context.pick(TONES if variety.tones == "formulas" else ALL_TONES)
    if variety.grey and context.happens(variety.grey):
        name = "grey"
    words = {"en": {}, "zh": {}}
    if name in TONES:
        return Edit(scene, scene, name, words, finish=TONES[name])
    rng = np.random.default_rng(context.rng.integers(2**32))
    if name in WEATHER:
        return Edit(scene, scene, name, words, finish=lambda picture: WEATHER[name](picture, rng))
    return Edit(scene, scene, name, words, spoil=lambda picture: DEFECTS[name](picture, rng))
