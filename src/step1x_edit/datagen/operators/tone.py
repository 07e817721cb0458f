"""Tone transformation: a formula over the whole picture."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import sample_scene

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


def tone(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Apply one of `TONES` to the whole picture."""
    scene = sample_scene(
        rng,
        atlas,
        width,
        height,
        num_objects=int(rng.choice([0, 1, 2, 3], p=[0.4, 0.25, 0.25, 0.1])),
    )
    name = str(rng.choice(list(TONES)))
    return Edit(scene, scene, name, {"en": {}, "zh": {}}, finish=TONES[name])
