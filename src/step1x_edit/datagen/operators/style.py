"""Style transfer: the whole picture as a drawing, a painting, a mosaic … by a formula.

One style, "flat", is redrawn instead: every object has a flat drawing of its own.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Pixels, noise
from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.learned_styles import in_learned_style
from step1x_edit.datagen.operators.tone import LUMA
from step1x_edit.datagen.scene import Scene, sample_scene

GRAIN_SEED = 5
FLAT = "flat"
FLAT_COLOURS = 7
AREAS_SIDE_PX = 64


def _side(picture: Pixels) -> int:
    return min(picture.shape[:2])


def _mean(picture: Pixels, reach_px: int) -> Pixels:
    return ndimage.uniform_filter(picture, (reach_px, reach_px, 1))  # pyright: ignore[reportArgumentType] - scipy takes a size per axis


def median(picture: Pixels, side_px: int) -> Pixels:
    """The median of the square around each place, mirrored at the rim.

    As `scipy.ndimage.median_filter` gives it, which takes several times as long.

    Args:
        picture: Any size.
        side_px: Odd.
    """
    reach, middle = side_px // 2, side_px**2 // 2
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), "symmetric")
    windows = sliding_window_view(padded, (side_px, side_px), (0, 1))
    rows = [np.partition(row.reshape(*row.shape[:2], -1), middle)[..., middle] for row in windows]
    return np.stack(rows)


def _edges(picture: Pixels, sigma: float) -> Float[np.ndarray, "height width"]:
    """Strength of the outlines, about 0 to 1."""
    planes = [ndimage.gaussian_gradient_magnitude(picture[..., c], sigma) * sigma for c in range(3)]
    return np.max(planes, 0)


def _levels(picture: Pixels, count: int) -> Pixels:
    return np.round(picture * (count - 1)) / (count - 1)


def pixel_art(picture: Pixels) -> Pixels:
    """Blocks of one colour each, of few levels."""
    block = max(2, _side(picture) // 32)
    rows, columns = (np.arange(side) // block for side in picture.shape[:2])
    small = _mean(picture, block)[block // 2 :: block, block // 2 :: block]
    last = np.array(small.shape[:2]) - 1
    return _levels(small, 7)[np.minimum(rows, last[0])][:, np.minimum(columns, last[1])]


def line_art(picture: Pixels) -> Pixels:
    """Black outlines on white."""
    ink = (_edges(picture, _side(picture) / 150) * 5 - 0.25).clip(0, 1)
    return np.repeat(1 - ink[..., None], 3, -1)


def pencil(picture: Pixels) -> Pixels:
    """Colour dodge of the grey picture with its blurred negative, a hand's way to copy a photo."""
    grey = picture @ LUMA
    blurred = ndimage.gaussian_filter(1 - grey, _side(picture) / 25)
    dodged = (grey / (1 - blurred + 0.02)).clip(0, 1)
    rows, columns = np.indices(grey.shape)
    strokes = 0.5 + 0.5 * np.sin((rows + columns) * 1.7)
    drawn = (0.75 * dodged + 0.25 * grey - 0.10 * strokes * (1 - grey)).clip(0, 1)
    return np.repeat(drawn[..., None], 3, -1)


def cartoon(picture: Pixels) -> Pixels:
    """Flat, strong colours with dark outlines."""
    flat = median(picture, _odd(picture, 28))
    grey = (flat @ LUMA)[..., None]
    flat = _levels((grey + 1.35 * (flat - grey)).clip(0, 1), 6)
    ink = (_edges(picture, _side(picture) / 128) * 5 - 0.6).clip(0, 1)
    return flat * (1 - 0.85 * ink[..., None])


def oil(picture: Pixels) -> Pixels:
    """Kuwahara's filter: each place takes the mean of its calmest quarter, like a brush stroke."""
    reach = max(2, _side(picture) // 36)
    means = _mean(picture, reach)
    spread = _mean(picture**2, reach) - means**2
    spread = spread.sum(-1)
    half = reach // 2 + 1
    shifts = [(half, half), (half, -half), (-half, half), (-half, -half)]
    calm = np.argmin([np.roll(spread, shift, (0, 1)) for shift in shifts], 0)
    quarters = np.stack([np.roll(means, shift, (0, 1)) for shift in shifts])
    strokes = np.take_along_axis(quarters, calm[None, ..., None], 0)[0]
    return strokes.clip(0) ** 0.92  # the mean of black may come out a rounding below it


def watercolour(picture: Pixels) -> Pixels:
    """Pale washes on rough paper, with darker rims."""
    washed = median(picture, _odd(picture, 20))
    pale = 0.25 + 0.75 * washed
    rim = (_edges(washed, _side(picture) / 90) * 2).clip(0, 1)[..., None]
    height, width = picture.shape[:2]
    paper = noise(np.random.default_rng(GRAIN_SEED), width, height, 6)[..., None]
    return pale * (1 - 0.35 * rim) * (0.88 + 0.2 * paper)


def mosaic(picture: Pixels) -> Pixels:
    """Square tiles with dark joints."""
    tile = max(4, _side(picture) // 16)
    rows, columns = np.indices(picture.shape[:2])
    middle = _mean(picture, tile)
    at = [
        np.minimum(side // tile * tile + tile // 2, limit - 1)
        for side, limit in zip((rows, columns), picture.shape, strict=False)
    ]
    joint = (rows % tile == 0) | (columns % tile == 0)
    return np.where(joint[..., None], 0.22, middle[at[0], at[1]])


def pop_art(picture: Pixels) -> Pixels:
    """Four loud colours by lightness, with a dot screen."""
    grey = ndimage.gaussian_filter(picture @ LUMA, _side(picture) / 128)
    colours = np.asarray(
        [(0.10, 0.05, 0.35), (0.90, 0.10, 0.45), (1.0, 0.80, 0.10), (0.98, 0.97, 0.85)]
    )
    low, high = np.quantile(grey, [0.05, 0.95])
    at = ((grey - low) / max(float(high - low), 0.05)).clip(0, 0.999)
    cell = max(4, _side(picture) // 32)
    rows, columns = np.indices(grey.shape)
    dots = 0.12 * np.cos(2 * np.pi * rows / cell) * np.cos(2 * np.pi * columns / cell)
    return colours[((at + dots).clip(0, 0.999) * 4).astype(int)]


def _odd(picture: Pixels, parts: int) -> int:
    return max(3, _side(picture) // parts // 2 * 2 + 1)


STYLES: dict[str, Callable[[Pixels], Pixels]] = {
    "pixel_art": pixel_art,
    "line_art": line_art,
    "pencil": pencil,
    "cartoon": cartoon,
    "oil": oil,
    "watercolour": watercolour,
    "mosaic": mosaic,
    "pop_art": pop_art,
}


def areas(picture: Pixels) -> Pixels:
    """Large areas of `FLAT_COLOURS` colours with smooth edges: the ground of a flat illustration.

    The colours are those of a small copy without details; each place takes the nearest area's.
    """
    height, width = picture.shape[:2]
    scale = AREAS_SIDE_PX / min(height, width)
    pixels = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    small = pixels.resize((round(width * scale), round(height * scale)), Image.Resampling.BOX)
    calm = small.filter(ImageFilter.MedianFilter(7))
    indexed = calm.quantize(FLAT_COLOURS, dither=Image.Dither.NONE)
    at = np.asarray(indexed)
    shares = [
        Image.fromarray(ndimage.gaussian_filter((at == index).astype(np.float32), 1.2))
        for index in range(at.max() + 1)
    ]
    nearest = np.argmax([np.asarray(share.resize((width, height))) for share in shares], 0)
    return np.asarray(indexed.getpalette(), np.float32).reshape(-1, 3)[nearest] / 255


def drawn_flat(scene: Scene) -> Scene:
    """The same scene as a flat illustration; its background is none that has a name."""
    objects = tuple(replace(placed, drawing="flat") for placed in scene.objects)
    ground = areas(scene.background)
    return replace(scene, background=ground, background_name=None, objects=objects)


def style(context: Context, width: int, height: int) -> Edit:
    """Draw the whole picture in one of `STYLES`, or flat, or in a learned style."""
    name = context.pick([*STYLES, FLAT])
    # Of a bare pattern most styles make another pattern: it takes an object to tell.
    scene = sample_scene(context.rng, context.atlas, width, height)
    if context.happens(context.variety.learned_styles):
        return in_learned_style(context, scene)
    if name == FLAT:
        return Edit(scene, drawn_flat(scene), name, {"en": {}, "zh": {}})

    def finish(picture: Pixels) -> Pixels:
        return STYLES[name](picture).clip(0, 1).astype(np.float32)

    return Edit(scene, scene, name, {"en": {}, "zh": {}}, finish=finish)
