"""Where an edit changed the picture, and whether one colour map says it all.

Compares the model's result with the source as the same autoencoder renders it, so that what the
autoencoder loses is not taken for a change. ``restore`` calls it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from step1x_edit.images.colour_map import ColourMap, distance, fit_colour_map, grey
from step1x_edit.images.filters import (
    EIGHT_NEIGHBOURS,
    Field,
    Pixels,
    Region,
    gradient,
    ndimage,
    smooth,
)

COARSE_PX = 3.0
# How far a change must stand out of the noise: anywhere; next to that; within NEAR_PX of both.
SEED_FACTOR = 4.5
GROW_FACTOR = 2.2
NEAR_FACTOR = 1.4
NEAR_PX = 4
# Part of a local gradient that a rendering may be off by: edges shift between two renderings.
EDGE_SLACK = 0.25
NOISE_FLOOR = 1.5 / 255
# Median root mean square of so many normal values of deviation 1.
MEDIAN_SIZE = {1: 0.674, 3: 0.888}
# Noise is at most this many times what the autoencoder itself adds, or the second, if more.
CAP_FACTOR = 3.0
CAP_LEAST = 10 / 255
GRADIENT_CAP_LEAST = 6 / 255
SPECKLE_SHARE = 0.0006
SPECKLE_LEAST_PX = 6
CLOSING_PX = 2
HOLE_SHARE = 0.004
# A colour map is the whole picture's when it leaves less than this part of the median difference,
# foresees a visible change in this share of the pixels, is nearer to the result than the source in
# this share of those, and where no change was seen leaves less than this part of the difference
# there, unless that is less than this share.
GLOBAL_LEFT = 0.36
LEAST_VISIBLE = 2 / 255
GLOBAL_LEAST_SHARE = 0.2
GLOBAL_VOTE = 0.8
GLOBAL_GAIN = 0.65
GLOBAL_LEAST_REST = 0.03
# A picture was made grey when the map's colours are this pale, and were this much stronger before.
GREY_CHROMA = 8 / 255
COLOURED_CHROMA = 5 / 255
GREY_GAIN = 6.0
GREY_SPOT_CHROMA = 12 / 255


@dataclass(frozen=True)
class Noise:
    """How far two renderings of the same picture are apart, in [0, 1].

    Attributes:
        pixel: Standard deviation of one channel of one pixel.
        smoothed: The same after `smooth`.
        gradient: Typical length of the difference's gradient.
    """

    pixel: float
    smoothed: float
    gradient: float

    def clipped(self, rendering: "Noise") -> "Noise":
        """Within what is believable where the autoencoder alone adds ``rendering``."""
        return Noise(
            _clipped(self.pixel, rendering.pixel, CAP_LEAST),
            _clipped(self.smoothed, rendering.smoothed, CAP_LEAST),
            _clipped(self.gradient, rendering.gradient, GRADIENT_CAP_LEAST),
        )


@dataclass(frozen=True)
class Change:
    """What a result changed.

    Attributes:
        colour_map: The map that all the picture follows, or None.
        before: The source's rendering, sent through that map.
        after: The result, without its colour noise if the edit made the picture grey.
        made_grey: Whether it did.
        region: Where ``after`` differs from ``before``.
        noise: How far the two are apart elsewhere.
        noise_field: ``noise.smoothed`` of each pixel; larger on edges.
    """

    colour_map: ColourMap | None
    before: Pixels
    after: Pixels
    made_grey: bool
    region: Region
    noise: Noise
    noise_field: Field


def find_change(
    before: Pixels, after: Pixels, rendering: Pixels, where: Region, *, allow_global: bool
) -> Change:
    """Tell change from noise.

    Args:
        before: The source as the autoencoder renders it, in [0, 1].
        after: The result, same size.
        rendering: What the autoencoder added to the source.
        where: The pixels that may change.
        allow_global: Look for a colour map that holds for the whole picture.
    """
    colour_map = fit_colour_map(before[where], after[where], NOISE_FLOOR)
    made_grey = _made_grey(colour_map, before[where], smooth(after, COARSE_PX)[where])
    if made_grey:
        after, colour_map = grey(after), colour_map.as_grey()
    mapped = colour_map(before).clip(0, 1)
    # Most pixels follow the map or did not change at all: what is left there is noise.
    noises = [_measure_noise(after - b, 1 if made_grey else 3) for b in (before, mapped)]
    noise = min(noises, key=lambda n: n.smoothed).clipped(_measure_noise(rendering))
    region = _find_region(before, after, noise)
    is_global = allow_global and (made_grey or _holds_everywhere(before, mapped, after, region))
    if is_global:
        before, region = mapped, _find_region(mapped, after, noise)
    field = _noise_field(before, noise)
    return Change(colour_map if is_global else None, before, after, made_grey, region, noise, field)


def _made_grey(
    colour_map: ColourMap, before: Float32[np.ndarray, "n 3"], after: Float32[np.ndarray, "n 3"]
) -> bool:
    """Whether the colours went out of a coloured picture.

    The map is asked, not the pixels, because its fit has averaged the colour noise of the result
    away; the smoothed result only shows that no coloured thing is left.
    """
    left = np.quantile(_chroma(colour_map(before)), 0.95)
    had = np.quantile(_chroma(before), 0.9)
    spots = np.quantile(_chroma(after), 0.98)
    went = left < GREY_CHROMA and had > max(COLOURED_CHROMA, GREY_GAIN * left)
    return bool(went and spots < GREY_SPOT_CHROMA)


def _chroma(colours: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, " n"]:
    return distance(colours - grey(colours))


def _measure_noise(difference: Pixels, num_values: int = 3) -> Noise:
    """From medians, which changes in less than half of the picture hardly move.

    Args:
        difference: Between two renderings.
        num_values: Independent values of a pixel: 1 in grey pictures.
    """
    down, right = gradient(difference)
    return Noise(
        pixel=float(np.median(np.abs(difference))) / MEDIAN_SIZE[1],
        smoothed=float(np.median(distance(smooth(difference)))) / MEDIAN_SIZE[num_values],
        gradient=float(np.quantile(np.hypot(distance(down), distance(right)), 0.25)) / 0.8,
    )


def _clipped(value: float, rendering: float, cap_least: float) -> float:
    return float(np.clip(value, NOISE_FLOOR, max(CAP_FACTOR * rendering, cap_least)))


def _noise_field(picture: Pixels, noise: Noise) -> Field:
    down, right = np.gradient(picture, axis=(0, 1))
    slope = np.hypot(distance(down), distance(right))
    return np.hypot(noise.smoothed, EDGE_SLACK * smooth(slope))


def _holds_everywhere(before: Pixels, mapped: Pixels, after: Pixels, region: Region) -> bool:
    """Whether the map holds nearly everywhere, also where the noise of single pixels hides it.

    Wide averages tell. An object that was recoloured fails: outside it, no change fits better.
    """
    expected, off_map, off_identity = (
        distance(smooth(d, COARSE_PX)) for d in (mapped - before, after - mapped, after - before)
    )
    if np.median(off_map) > GLOBAL_LEFT * np.median(off_identity):
        return False
    foreseen = expected > LEAST_VISIBLE
    if foreseen.mean() < GLOBAL_LEAST_SHARE:
        return False
    if (off_map < off_identity)[foreseen].mean() < GLOBAL_VOTE:
        return False
    # The averages reach as far as two spreads into the changed region.
    rest = ~ndimage().binary_dilation(region, iterations=round(2 * COARSE_PX))
    if rest.mean() < GLOBAL_LEAST_REST:
        return True
    return bool(np.square(off_map[rest]).sum() < GLOBAL_GAIN * np.square(off_identity[rest]).sum())


def _find_region(before: Pixels, after: Pixels, noise: Noise) -> Region:
    """Threshold with hysteresis; specks and threads out, faint rims in, small holes closed."""
    ratio = distance(smooth(after - before)) / _noise_field(before, noise)
    over = ratio > GROW_FACTOR
    labels, _ = ndimage().label(over, structure=EIGHT_NEIGHBOURS)
    solid = ndimage().binary_opening(over, structure=np.ones((2, 2)))
    sizes = np.bincount(labels.ravel(), weights=solid.ravel())
    peaks = np.asarray(ndimage().maximum(ratio, labels, index=np.arange(len(sizes))))
    keep = (sizes >= max(SPECKLE_LEAST_PX, SPECKLE_SHARE * ratio.size)) & (peaks > SEED_FACTOR)
    keep[0] = False
    region = keep[labels]
    if not region.any():
        return region
    near = ndimage().binary_dilation(region, iterations=NEAR_PX) & (ratio > NEAR_FACTOR)
    return _without_small_holes(ndimage().binary_propagation(region, mask=region | near))


def _without_small_holes(region: Region) -> Region:
    offsets = np.mgrid[-CLOSING_PX : CLOSING_PX + 1, -CLOSING_PX : CLOSING_PX + 1]
    disc = np.hypot(*offsets) <= CLOSING_PX
    padded = ndimage().binary_closing(np.pad(region, CLOSING_PX, mode="edge"), disc)
    closed = region | padded[CLOSING_PX:-CLOSING_PX, CLOSING_PX:-CLOSING_PX]
    holes, _ = ndimage().label(~closed)
    small = np.bincount(holes.ravel()) < HOLE_SHARE * region.size
    small[0] = False
    return closed | small[holes]
