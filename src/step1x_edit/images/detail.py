"""How far a changed region is still a function of the source, and which one.

Where the result is, nearby, a linear function of the source's colours, that function can be applied
to the photograph itself and keeps its detail; where it is not (an object came, went or took another
shape), the result has to stand for itself. ``restore`` calls `explain`.

Sources: He & Sun 2015 (fast guided filter), Chen et al. 2016 (bilateral guided upsampling).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from step1x_edit.images.change import Change
from step1x_edit.images.colour_map import ColourMap, distance, fit_colour_map
from step1x_edit.images.filters import Field, Pixels, Region, gradient, ndimage, smooth

# Windows: share of the shorter side, and least radius in pixels.
FIT_WINDOW = (1 / 24, 3)
LEFTOVER_WINDOW = (1 / 64, 2)
STRUCTURE_WINDOW = (1 / 12, 6)
# Colours that vary less than this nearby do not decide how the source's detail is scaled.
LEAST_VARIANCE = 0.03**2
# Each pair: nothing below the first, all from the second on.
CORRECTION = (0.8, 1.6)  # distance from the region's colour map, in noise
LEFTOVER = (0.15, 0.45)  # share of the squared change that the source does not explain
SHARED = (0.25, 0.5)  # correlation of the edges
MOSTLY_REPLACED = (0.3, 0.5)  # share of the region that is replaced
# The residual must stand this far above the squared noise to count.
LEFTOVER_NOISE = 2.5
# Likeness granted to a window without edges, in squared gradient noise.
NO_EDGE = 0.5
REGION_PRIOR = 0.3
RIM_WEIGHT = 0.05


@dataclass(frozen=True)
class Explanation:
    """A region's change: ``colour_map(x) + x slopes + offset``, and the result where ``replaced``.

    Slopes and offset are 0 where the colour map says it all.

    Attributes:
        colour_map: What most of the region follows.
        slopes: Correction near each pixel: input channel, output channel.
        offset: Its constant part.
        replaced: Share of the result itself, in [0, 1].
    """

    colour_map: ColourMap
    slopes: Float32[np.ndarray, "h w 3 3"]
    offset: Pixels
    replaced: Field


def explain(change: Change, region: Region) -> Explanation:
    """Fit the colour map and the local corrections of one region, and judge them.

    Args:
        change: What the result changed.
        region: The changed region and a rim around it, at least one pixel.
    """
    before, after = change.before, change.after
    # The rim did not change; it may only decide between maps that suit the region as well.
    counts = np.where(change.region[region], 1, RIM_WEIGHT).astype(np.float32)
    colour_map = fit_colour_map(before[region], after[region], change.noise.smoothed, counts)
    if change.made_grey:
        colour_map = colour_map.as_grey()
    weights = region.astype(np.float32)
    mapped = colour_map(before)
    slopes, offset = _guided_fit(before, after - mapped, weights, change.noise.smoothed)
    off = distance(smooth(after - mapped, 2.0))
    needed = smooth(smoothstep(off / change.noise_field, *CORRECTION))[..., None]
    slopes, offset = slopes * needed[..., None], offset * needed
    predicted = mapped + np.einsum("hwi,hwio->hwo", before, slopes) + offset
    replaced = np.maximum(
        smoothstep(_leftover(change, predicted, weights), *LEFTOVER),
        1 - smoothstep(_shared_structure(change, weights), *SHARED),
    )
    share = float((replaced * weights).sum() / weights.sum())
    replaced = np.maximum(replaced, smoothstep(np.full_like(replaced, share), *MOSTLY_REPLACED))
    return Explanation(colour_map, slopes, offset, smooth(replaced))


def smoothstep(x: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, a cubic between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _WindowMean:
    """Weighted mean over a square window around each pixel."""

    def __init__(self, weights: Field, window: tuple[float, int]) -> None:
        share, least_px = window
        self.size = 2 * max(least_px, round(share * min(weights.shape))) + 1
        self.weights = weights
        self.total = self._box(weights) + 1e-6

    def __call__(self, values: np.ndarray) -> np.ndarray:
        extra = (1,) * (values.ndim - 2)
        weights, total = (a.reshape(*a.shape, *extra) for a in (self.weights, self.total))
        return self._box(values * weights) / total

    def _box(self, values: np.ndarray) -> np.ndarray:
        size = (self.size, self.size) + (1,) * (values.ndim - 2)
        return ndimage().uniform_filter(values, size, mode="constant")


def _guided_fit(
    guide: Pixels, target: Pixels, weights: Field, noise: float
) -> tuple[Float32[np.ndarray, "h w 3 3"], Pixels]:
    """Guided filter with a colour guide: slopes and offset, means over each pixel's windows."""
    mean = _WindowMean(weights, FIT_WINDOW)
    mean_guide, mean_target = mean(guide), mean(target)
    variance = mean(guide[..., :, None] * guide[..., None, :])
    variance -= mean_guide[..., :, None] * mean_guide[..., None, :]
    variance += (LEAST_VARIANCE + 4 * noise**2) * np.eye(3, dtype=np.float32)
    cross = mean(guide[..., :, None] * target[..., None, :])
    cross -= mean_guide[..., :, None] * mean_target[..., None, :]
    slopes = np.linalg.solve(variance, cross)
    offset = mean_target - np.einsum("hwi,hwio->hwo", mean_guide, slopes)
    return mean(slopes), mean(offset)


def _leftover(change: Change, predicted: Pixels, weights: Field) -> Field:
    """Share of the squared change nearby that ``predicted`` leaves over, noise taken off."""
    mean = _WindowMean(weights, LEFTOVER_WINDOW)
    noise = np.square(change.noise_field)
    left = mean(np.square(distance(smooth(change.after - predicted))))
    changed = mean(np.square(distance(smooth(change.after - change.before))))
    return np.maximum(left - LEFTOVER_NOISE * noise, 0) / (changed + noise)


def _shared_structure(change: Change, weights: Field) -> Field:
    """Correlation of the edges nearby, whatever their sign, contrast and colour; 0 if unrelated.

    An object that left flat ground behind can be "explained" by slopes of zero; its edges tell.
    Compared are the deviators of the structure tensors: vectors at twice the edge's angle, scaled
    to the gradient's length.
    """
    noise = change.noise.gradient
    first, second = (
        _edge_vectors(p, noise) * weights[..., None] for p in (change.before, change.after)
    )
    products = [
        np.sum(a * b, axis=-1) for a, b in ((first, second), (first, first), (second, second))
    ]
    mean = _WindowMean(np.ones_like(weights), STRUCTURE_WINDOW)
    # A window without edges takes the region's answer; if that has none either, it is the same.
    common, own_first, own_second = (
        mean(p) + REGION_PRIOR * p.sum() / weights.sum() + NO_EDGE * noise**2 for p in products
    )
    return common / np.sqrt(own_first * own_second)


def _edge_vectors(picture: Pixels, noise: float) -> Float32[np.ndarray, "h w 2"]:
    down, right = gradient(picture)
    xx, yy, xy = (np.sum(a * b, axis=-1) for a, b in ((right, right), (down, down), (right, down)))
    length = np.sqrt(xx + yy + (2 * noise) ** 2)
    return np.stack([xx - yy, 2 * xy], axis=-1) / length[..., None]
