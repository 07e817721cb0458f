"""How far a changed region is still a function of the source, and which one.

Where the result is, nearby, a linear function of the source's colours, that function can be applied to the
photograph itself and keeps its detail; where it is not (an object came, went or took another shape), the
result has to stand for itself. ``restore`` calls `explain`.

Sources: He & Sun 2015 (fast guided filter), Chen et al. 2016 (bilateral guided upsampling).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from step1x_edit.images.change import Field, Pixels, distance, smooth
from step1x_edit.images.colour_map import ColourMap

# Windows as parts of the shorter side, and their least radius in pixels.
FIT_WINDOW = (1 / 24, 3)
STRUCTURE_WINDOW = (1 / 12, 6)
# Slopes that the window's colours do not decide by more than this variance stay the region's own.
LEAST_VARIANCE = 0.03**2
# From the first to the second share of the change left over, the result takes over from the source.
LEFTOVER = (0.15, 0.45)
# Likewise for how much of the structure is shared.
SHARED = (0.25, 0.5)
NO_EDGE = 0.5
MOSTLY = (0.5, 0.75)


@dataclass(frozen=True)
class Explanation:
    """A region's change: ``base(x) + slopes x + offset`` where ``replaced`` is 0, the result where it is 1.

    Attributes:
        base: The colour map that most of the region follows.
        slopes: Correction near each pixel; input channel, then output channel.
        offset: Its constant part.
        replaced: Share of the result itself, in [0, 1].
    """

    base: ColourMap
    slopes: Float32[np.ndarray, "h w 3 3"]
    offset: Float32[np.ndarray, "h w 3"]
    replaced: Field


def explain(
    before: Pixels, after: Pixels, base: ColourMap, region: Field, noise_field: Field, edge_noise: float, is_global=False
) -> Explanation:
    """Fit the local functions and judge them.

    Args:
        before: The source as the autoencoder renders it, in [0, 1].
        after: The result, same size.
        base: The map to start from.
        region: Weight of each pixel in the fits, in [0, 1]; the changed region and a rim around it.
        noise_field: How far two renderings of the same differ, per pixel.
    """
    short_side = min(region.shape)
    radius = max(FIT_WINDOW[1], round(short_side * FIT_WINDOW[0]))
    mean = _WindowMean(region, radius)
    mapped = base(before)
    slopes, offset = _guided_fit(before, after - mapped, mean, float(np.median(noise_field)))
    predicted = mapped + np.einsum("hwi,hwio->hwo", before, slopes) + offset
    left = np.square(distance(smooth(after - predicted)))
    changed = np.square(distance(smooth(after - before)))
    noise = np.square(noise_field)
    nearby = _WindowMean(region, 2)
    share_left = np.maximum(nearby(left) - 2.5*noise, 0) / (nearby(changed) + noise)
    replaced = smoothstep(share_left, *LEFTOVER)
    drawn = mapped if is_global else before
    shared = _shared_structure(drawn, after, region, edge_noise)
    replaced = np.maximum(replaced, 1 - smoothstep(shared, *SHARED))
    share = float((replaced * region).sum() / region.sum())
    if not is_global:
        replaced = np.maximum(replaced, smoothstep(np.float32(share), *MOSTLY))
    return Explanation(base, slopes, offset, smooth(replaced))


def smoothstep(x: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, a cubic between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _WindowMean:
    """Weighted mean over a square window around each pixel."""

    def __init__(self, weights: Field, radius: int) -> None:
        self.weights = weights
        self.size = 2 * radius + 1
        self.total = self._box(weights) + 1e-6

    def __call__(self, values: np.ndarray) -> np.ndarray:
        extra = (1,) * (values.ndim - 2)
        weights = self.weights.reshape(*self.weights.shape, *extra)
        return self._box(values * weights) / self.total.reshape(*self.total.shape, *extra)

    def _box(self, values: np.ndarray) -> np.ndarray:
        from scipy import ndimage

        size = (self.size, self.size) + (1,) * (values.ndim - 2)
        return ndimage.uniform_filter(values, size, mode="constant")


def _guided_fit(
    guide: Pixels, target: Pixels, mean: _WindowMean, noise: float
) -> tuple[Float32[np.ndarray, "h w 3 3"], Pixels]:
    """Guided filter with a colour guide: slopes and offset, averaged over the windows of each pixel."""
    mean_guide, mean_target = mean(guide), mean(target)
    outer = guide[..., :, None] * guide[..., None, :]
    variance = mean(outer) - mean_guide[..., :, None] * mean_guide[..., None, :]
    cross = mean(guide[..., :, None] * target[..., None, :])
    cross -= mean_guide[..., :, None] * mean_target[..., None, :]
    variance += (LEAST_VARIANCE + 4 * noise**2) * np.eye(3, dtype=np.float32)
    slopes = np.linalg.solve(variance, cross)
    offset = mean_target - np.einsum("hwi,hwio->hwo", mean_guide, slopes)
    return mean(slopes), mean(offset)


def _shared_structure(before: Pixels, after: Pixels, region: Field, edge_noise: float) -> Field:
    """Correlation of edges nearby, whatever their sign, contrast and colour: 1 same drawing, 0 unrelated.

    Compared are the deviators of the structure tensors, which are a vector of twice the edge's angle.
    """
    radius = max(STRUCTURE_WINDOW[1], round(min(region.shape) * STRUCTURE_WINDOW[0]))
    first, second = (_edge_vectors(p, edge_noise) * region[..., None] for p in (before, after))
    sums = [np.sum(a * b, axis=-1) for a, b in ((first, second), (first, first), (second, second))]
    whole = [float(s.sum()) for s in sums]
    mean = _WindowMean(np.ones_like(region), radius)
    # Windows without edges of their own take the region's answer; where that has none either, the same.
    prior = 0.1 / max(float(region.sum()), 1.0)
    common, own_first, own_second = (mean(s) + prior * w + NO_EDGE * edge_noise**2 for s, w in zip(sums, whole, strict=True))
    return common / np.sqrt(own_first * own_second)


def _edge_vectors(picture: Pixels, edge_noise: float) -> Float32[np.ndarray, "h w 2"]:
    down, right = np.gradient(smooth(picture, 0.7), axis=(0, 1))
    xx, yy, xy = (np.sum(a * b, axis=-1) for a, b in ((right, right), (down, down), (right, down)))
    vectors = np.stack([xx - yy, 2 * xy], axis=-1)
    # By the length of the gradient, so that faint edges count; below the noise, hardly.
    length = np.sqrt(xx + yy + (2 * edge_noise) ** 2)
    return vectors / length[..., None]
