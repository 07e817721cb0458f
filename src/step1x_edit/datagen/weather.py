"""Weather, light and season over a picture, and the defects that restoration takes away.

A formula has a picture in [0, 1] and a generator, and gives a picture in about [0, 1] of its size.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Pixels, noise

Formula = Callable[[Pixels, np.random.Generator], Pixels]

AIR = np.asarray([0.82, 0.84, 0.86], np.float32)
"""Colour of fog."""
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)


def fog(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Airlight that hides the more, the higher up and so the farther away (Koschmieder's law)."""
    height, width = picture.shape[:2]
    distance = np.linspace(1.0, 0.35, height, dtype=np.float32)[:, None, None]
    wisps = 0.75 + 0.5 * noise(rng, width, height)[..., None]
    hidden = 1 - np.exp(-1.5 * distance * wisps)
    return picture + hidden * (AIR - picture)


def rain(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Slanting bright streaks before a duller, greyer picture."""
    side = min(picture.shape[:2])
    drops = _sprinkled(picture, 0.011, rng)
    length = max(5, side // 9)
    streak = np.zeros((length, length), np.float32)
    rows = np.arange(length)
    streak[rows, (length - 1 - rows) // 3 + length // 3] = 1
    streaks = ndimage.convolve(drops, streak, mode="wrap").clip(0, 1)[..., None]
    dull = _greyed(picture, 0.5) * 0.72 + 0.04
    return dull + 0.55 * streaks * (0.92 - dull)


def snow(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Falling flakes of several sizes before a paler picture."""
    side = min(picture.shape[:2])
    pale = _greyed(picture, 0.25) * 0.85 + 0.12
    for share, radius in ((0.012, 0.004), (0.005, 0.008), (0.0018, 0.014)):
        sigma = max(0.5, radius * side)
        flakes = ndimage.gaussian_filter(_sprinkled(picture, share, rng), sigma)
        shown = (flakes * 2 * np.pi * sigma**2 * 1.6).clip(0, 1)[..., None]
        pale = pale + shown * (0.98 - pale)
    return pale


def winter(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Paler and colder, with snow lying on all that is light or green."""
    cold = _greyed(picture, 0.6) * np.asarray([0.90, 0.98, 1.10], np.float32)
    light = picture @ LUMA
    green = (picture[..., 1] - picture[..., [0, 2]].max(-1)).clip(0, 1)
    height, width = light.shape
    drift = 0.15 * (noise(rng, width, height) - 0.5)
    lies = ((light + 3 * green + drift - 0.35) / 0.35).clip(0, 1)[..., None] * 0.75
    return cold + lies * (np.asarray([0.93, 0.96, 1.0], np.float32) - cold)


def autumn(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Greens turn orange; the light is warmer."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    leafy = ((green - np.maximum(red * 0.9, blue)) / 0.12).clip(0, 1)[..., None]
    turned = np.stack([green * 1.05, green * 0.55, blue * 0.45], -1)
    return (picture + leafy * (turned - picture)) * np.asarray([1.10, 0.97, 0.78], np.float32)


def sunset_light(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Low golden light: warm above, darker below."""
    height = picture.shape[0]
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    glow = np.asarray([1.18, 0.80, 0.48], np.float32) * (1.05 - 0.35 * down)
    return picture * glow + np.asarray([0.10, 0.04, 0.0], np.float32) * (1 - down)


def vignette(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Dark corners."""
    rows, columns = _grid(picture)
    return picture * (1.08 - 0.85 * ((rows**2 + columns**2) / 2)[..., None])


def relight_left(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Light from the left, shade on the right."""
    return _lit(picture, -1.0)


def relight_right(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Light from the right, shade on the left."""
    return _lit(picture, 1.0)


def blurred(picture: Pixels, _: np.random.Generator) -> Pixels:
    """Out of focus."""
    sigma = min(picture.shape[:2]) / 60
    return ndimage.gaussian_filter(picture, (sigma, sigma, 0))


def noisy(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Sensor noise."""
    return picture + 0.11 * rng.standard_normal(picture.shape, np.float32)


WEATHER: dict[str, Formula] = {
    "fog": fog,
    "rain": rain,
    "snow": snow,
    "winter": winter,
    "autumn": autumn,
    "sunset_light": sunset_light,
    "spotlight_vignette": vignette,
    "relight_left": relight_left,
    "relight_right": relight_right,
}
"""Kind → what it makes of the target."""
DEFECTS: dict[str, Formula] = {"dehaze": fog, "sharpen": blurred, "denoise": noisy}
"""Kind → what the source suffers from and the target does not."""


def _greyed(picture: Pixels, share: float) -> Pixels:
    return picture + share * ((picture @ LUMA)[..., None] - picture)


def _sprinkled(
    picture: Pixels, share: float, rng: np.random.Generator
) -> Float[np.ndarray, "height width"]:
    """Ones on a share of the pixels. Thinner on large pictures, whose marks are larger."""
    height, width = picture.shape[:2]
    share *= (128 / min(height, width)) ** 2
    return (rng.random((height, width)) < share).astype(np.float32)


def _grid(picture: Pixels) -> tuple[Float[np.ndarray, "height 1"], Float[np.ndarray, "1 width"]]:
    """Rows and columns, each from -1 to 1."""
    height, width = picture.shape[:2]
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return rows, np.linspace(-1, 1, width, dtype=np.float32)[None]


def _lit(picture: Pixels, side: float) -> Pixels:
    across = (side * _grid(picture)[1])[..., None]  # 1 on the lit side
    lamp = np.asarray([1.06, 1.0, 0.90], np.float32) ** (across > 0)
    return picture * (0.85 + 0.65 * across) * lamp
