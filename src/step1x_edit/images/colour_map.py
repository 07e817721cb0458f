"""Colour maps: a picture's colours as a smooth function of another picture's colours.

A tone or colour edit ("make it black and white", "warmer", "paint the bowl blue") gives every pixel
a new colour that depends on its old colour alone. Such a function is fitted here between two
pictures of model size, robustly, and carried to a photograph of any size through a look-up table,
so no detail is lost.
``change`` finds the map of a whole picture, ``detail`` that of a region.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageFilter

Colours = Float32[np.ndarray, "*pixels 3"]

LUT_SIZE = 33
# Colours beyond these quantiles of the fitted ones are continued linearly: a parabola runs away.
RANGE_QUANTILES = (0.005, 0.995)
NUM_ROBUST_ROUNDS = 8
MAX_FITTED_COLOURS = 60_000
# A curve must leave less than this part of the straight fit's squared residual.
CURVE_GAIN = 0.9
# Pull towards "unchanged" of each feature, where the colours leave it open.
RIDGE = np.diag([1e-6] + [1.0] * 3 + [4.0] * 6)


@dataclass(frozen=True)
class ColourMap:
    """A quadratic function of a colour, continued linearly outside the colours it was fitted on.

    Attributes:
        coefficients: Weight of 1, r, g, b, rr, gg, bb, rg, rb, gb in each output channel.
        low: Per channel, where the fitted colours begin.
        high: Per channel, where they end.
    """

    coefficients: Float[np.ndarray, "10 3"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]

    def __call__(self, colours: Colours) -> Colours:
        """Map colours in [0, 1]; what comes out may lie outside it."""
        inside = np.clip(colours, self.low, self.high).astype(np.float32)
        mapped = _features(inside) @ self.coefficients.astype(np.float32)
        return mapped + np.einsum("...i,...io->...o", colours - inside, self._slopes(inside))

    def as_grey(self) -> "ColourMap":
        """The same map with the mean of its channels in each."""
        mean = self.coefficients.mean(axis=1, keepdims=True)
        return ColourMap(np.repeat(mean, 3, axis=1), self.low, self.high)

    def apply(self, picture: Image.Image) -> Image.Image:
        """Map an RGB picture of any size, through a table of `LUT_SIZE` nodes a side."""
        axis = np.linspace(0, 1, LUT_SIZE, dtype=np.float32)
        blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red runs fastest
        table = self(np.stack([red, green, blue], axis=-1)).clip(0, 1)
        return picture.filter(ImageFilter.Color3DLUT(LUT_SIZE, table.reshape(-1)))

    def _slopes(self, colours: Colours) -> Float32[np.ndarray, "*pixels 3 3"]:
        """Derivative of each output channel (last axis) by each input channel (the axis before)."""
        c = self.coefficients.astype(np.float32)
        r, g, b = (colours[..., i, None] for i in range(3))
        by_r = c[1] + 2 * c[4] * r + c[7] * g + c[8] * b
        by_g = c[2] + 2 * c[5] * g + c[7] * r + c[9] * b
        by_b = c[3] + 2 * c[6] * b + c[8] * r + c[9] * g
        return np.stack([by_r, by_g, by_b], axis=-2)


def fit_colour_map(
    colours: Float32[np.ndarray, "n 3"], targets: Float32[np.ndarray, "n 3"], noise: float
) -> ColourMap:
    """Fit the colour map that most pixels follow.

    Iteratively reweighted least squares with Tukey's biweight, so that pixels which changed in
    another way (an object that came or went) do not bend the map. The curved map is taken only
    where it explains clearly more than the straight one.

    Args:
        colours: Colours before, in [0, 1].
        targets: Colours after, in [0, 1].
        noise: Difference in ``targets`` that is not worth explaining.
    """
    step = max(1, len(colours) // MAX_FITTED_COLOURS)
    colours, targets = colours[::step], targets[::step]
    straight, curved = (_fit_features(colours, targets, n, noise) for n in (4, 10))
    left = [np.median(distance(targets - m(colours))) ** 2 for m in (straight, curved)]
    floor = (0.3 * noise) ** 2
    return curved if left[1] + floor < CURVE_GAIN * (left[0] + floor) else straight


def distance(difference: Float32[np.ndarray, "*pixels 3"]) -> Float32[np.ndarray, "*pixels"]:
    """Root mean square over the channels."""
    return np.sqrt(np.mean(np.square(difference), axis=-1))


def grey(colours: Colours) -> Colours:
    """The mean of the three channels, three times."""
    return np.repeat(colours.mean(axis=-1, keepdims=True), 3, axis=-1)


def _fit_features(
    colours: Float32[np.ndarray, "n 3"],
    targets: Float32[np.ndarray, "n 3"],
    num_features: int,
    noise: float,
) -> ColourMap:
    features = _features(colours.astype(np.float64))[:, :num_features]
    unchanged = np.zeros((num_features, 3))
    unchanged[1:4] = np.eye(3)
    strength = len(colours) * (0.4 * noise**2 + 2e-7)
    ridge = strength * RIDGE[:num_features, :num_features]
    weights = np.ones(len(colours))
    coefficients = unchanged
    for _ in range(NUM_ROBUST_ROUNDS):
        weighted = features * weights[:, None]
        to_explain = weighted.T @ (targets - features @ unchanged)
        coefficients = unchanged + np.linalg.solve(weighted.T @ features + ridge, to_explain)
        weights = _biweight(distance(targets - features @ coefficients), noise)
    low, high = np.quantile(colours, RANGE_QUANTILES, axis=0)
    return ColourMap(np.pad(coefficients, ((0, 10 - num_features), (0, 0))), low, high)


def _biweight(distances: Float[np.ndarray, " n"], noise: float) -> Float[np.ndarray, " n"]:
    """Tukey's biweight with its usual constant: 1 for a perfect pixel, 0 beyond 4.685 spreads."""
    spread = max(noise, 1.4826 * float(np.median(distances)))
    return np.clip(1 - (distances / (4.685 * spread)) ** 2, 0, 1) ** 2


def _features(colours: Float[np.ndarray, "*pixels 3"]) -> Float[np.ndarray, "*pixels 10"]:
    r, g, b = (colours[..., i] for i in range(3))
    return np.stack([np.ones_like(r), r, g, b, r * r, g * g, b * b, r * g, r * b, g * b], axis=-1)
