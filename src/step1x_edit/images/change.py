"""Where an edit changed the picture, and in which manner.

Compares the model's result with the source as the same autoencoder renders it, so that what the autoencoder
loses is not taken for a change. ``restore`` calls `find_change`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int

from step1x_edit.images.colour_map import ColourMap, fit

Pixels = Float32[np.ndarray, "h w 3"]
Field = Float32[np.ndarray, "h w"]

FINE_PX = 1.0
COARSE_PX = 3.0
# A change must stand out of the noise by these factors: the first anywhere, the second next to the first.
SEED_FACTOR = 4.5
GROW_FACTOR = 2.2
# Part of a local gradient that a rendering may be off by: edges shift between two renderings.
EDGE_SLACK = 0.25
NOISE_FLOOR = 1.5 / 255
# Noise cannot be more than this many times what the autoencoder itself adds, or this much.
NOISE_CAP_FACTOR = 2.0
NOISE_CAP_LEAST = 5 / 255
LEAST_VISIBLE = 2 / 255
SPECKLE_SHARE = 0.0006
SPECKLE_LEAST_PX = 6
CLOSING_PX = 2
HOLE_SHARE = 0.004
# A colour map is the whole picture's when it foresees a change in this share of it, is nearer to the result
# than the source is in this share of that, and in the rest leaves this part of the squared difference.
GLOBAL_LEAST_SHARE = 0.2
GLOBAL_VOTE = 0.8
GLOBAL_GAIN = 0.65
GLOBAL_LEAST_REST = 0.03


@dataclass(frozen=True)
class Change:
    """What changed between two renderings of model size.

    Attributes:
        noise: How far the two are apart where nothing changed, in [0, 1].
        noise_field: The same for each pixel; larger on edges.
        colour_map: The colour map that most of the picture follows.
        is_global: Whether all the picture follows it, faint changes included.
        region: Where the change shows.
    """

    noise: float
    edge_noise: float
    noise_field: Field
    colour_map: ColourMap
    is_global: bool
    region: Bool[np.ndarray, "h w"]


def find_change(before: Pixels, after: Pixels, prepared: Pixels) -> Change:
    """Tell change from noise.

    Args:
        before: The source as the autoencoder renders it, in [0, 1].
        after: The result, same size.
        rendering_noise: Root mean square of what the autoencoder adds to the source, in [0, 1].
    """
    colour_map = fit(before.reshape(-1, 3), after.reshape(-1, 3), NOISE_FLOOR)
    off_identity = distance(smooth(after - before))
    off_map = distance(smooth(after - colour_map(before)))
    # Most pixels follow the map or did not change at all: what is left there is noise.
    noise = 1.1 * min(float(np.median(off_map)), float(np.median(off_identity)))
    rendering_noise = float(np.sqrt(np.mean(np.square(before - prepared))))
    cap = max(NOISE_CAP_FACTOR * rendering_noise, NOISE_CAP_LEAST)
    noise = float(np.clip(noise, NOISE_FLOOR, cap))
    noise_field = np.hypot(noise, EDGE_SLACK * smooth(gradient_size(before)))
    region = _clean(off_identity / noise_field)
    is_global = _is_global(colour_map, before, after, region)
    rest = np.ones_like(region) if is_global else ~region
    off = after - (colour_map(before) if is_global else before)
    e1=edge_noise(off, rest); e2=edge_noise(before - prepared, ~np.zeros_like(rest))

    cap = max(NOISE_CAP_FACTOR * e2, NOISE_CAP_LEAST)
    en= float(np.clip(e1, NOISE_FLOOR, cap)) if rest.mean()>.1 else cap
    return Change(noise, en, noise_field, colour_map, is_global, region)


def edge_noise(difference, where):
    down, right = np.gradient(smooth(difference, 0.7), axis=(0, 1))
    squares = np.sum(np.square(down) + np.square(right), axis=-1)
    return float(np.sqrt(np.median(squares[where])))

def smooth(field: np.ndarray, sigma_px: float = FINE_PX) -> np.ndarray:
    """Gaussian blur along the first two axes."""
    from scipy import ndimage  # costs half a second, so not at the top

    sigmas = (sigma_px, sigma_px) + (0,) * (field.ndim - 2)
    return ndimage.gaussian_filter(field, sigmas, mode="nearest")


def distance(difference: Float32[np.ndarray, "... 3"]) -> Float32[np.ndarray, "..."]:
    """Root mean square over the channels."""
    return np.sqrt(np.mean(np.square(difference), axis=-1))


def gradient_size(picture: Pixels) -> Field:
    """Length of the steepest gradient per pixel, root mean square over the channels."""
    down, right = np.gradient(picture, axis=(0, 1))
    return np.hypot(distance(down), distance(right))


def _is_global(
    colour_map: ColourMap, before: Pixels, after: Pixels, region: Bool[np.ndarray, "h w"]
) -> bool:
    """Whether the map holds nearly everywhere, also where single pixels hide the change under noise.

    Wide averages tell. An object that was recoloured fails: outside it, no change fits better than the map.
    """
    from scipy import ndimage

    follows = colour_map(before)
    expected = distance(smooth(follows - before, COARSE_PX))
    off_map = distance(smooth(after - follows, COARSE_PX))
    off_identity = distance(smooth(after - before, COARSE_PX))
    foreseen = expected > LEAST_VISIBLE
    # The averages reach as far as two spreads into the changed region.
    rest = ~ndimage.binary_dilation(region, iterations=round(2 * COARSE_PX))
    if foreseen.mean() < GLOBAL_LEAST_SHARE:
        return False
    if (off_map < off_identity)[foreseen].mean() < GLOBAL_VOTE:
        return False
    if rest.mean() < GLOBAL_LEAST_REST:
        return True
    return bool(np.square(off_map[rest]).sum() < GLOBAL_GAIN * np.square(off_identity[rest]).sum())


def _clean(ratio: Field) -> Bool[np.ndarray, "h w"]:
    """Hysteresis threshold; regions that are specks or only threads are dropped."""
    from scipy import ndimage

    over = ratio > GROW_FACTOR
    labels, _ = ndimage.label(over, structure=np.ones((3, 3)))
    solid = ndimage.binary_opening(over, structure=np.ones((2, 2)))
    sizes = np.bincount(labels.ravel(), weights=solid.ravel())
    peaks = ndimage.maximum(ratio, labels, index=np.arange(len(sizes)))
    keep = sizes >= max(SPECKLE_LEAST_PX, SPECKLE_SHARE * ratio.size)
    keep &= np.asarray(peaks) > SEED_FACTOR
    keep[0] = False
    return _without_small_holes(keep[labels])


def _without_small_holes(region: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    from scipy import ndimage

    disc = np.hypot(*np.mgrid[-CLOSING_PX : CLOSING_PX + 1, -CLOSING_PX : CLOSING_PX + 1])
    padded = np.pad(region, CLOSING_PX, mode="edge")
    closed = ndimage.binary_closing(padded, disc <= CLOSING_PX)[
        CLOSING_PX:-CLOSING_PX, CLOSING_PX:-CLOSING_PX
    ]
    holes, _ = ndimage.label(~closed)
    sizes = np.bincount(holes.ravel())
    small = sizes < HOLE_SHARE * region.size
    small[0] = False
    return closed | region | small[holes]
