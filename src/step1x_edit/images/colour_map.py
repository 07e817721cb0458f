"""Colour maps: a picture's colours as a smooth function of another picture's colours.

A tone or colour edit ("make it black and white", "warmer", "paint the bowl blue") gives every pixel a new
colour that depends on its old colour alone. Such a function is fitted here between two pictures of model
size, robustly, and carried to a photograph of any size through a look-up table, so no detail is lost.
``change`` and ``detail`` call it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageFilter

Colours = Float32[np.ndarray, "... 3"]

LUT_SIZE = 33
# Colours beyond these quantiles of the fitted ones are continued linearly: a parabola runs away.
RANGE_QUANTILES = (0.005, 0.995)
NUM_ROBUST_ROUNDS = 8
NUM_FITTED_COLOURS = 60_000
# A curve must leave less than this part of the straight fit's squared residual to be worth its bends.
CURVE_GAIN = 0.9


@dataclass(frozen=True)
class ColourMap:
    """A quadratic function of a colour, continued linearly outside the colours it was fitted on.

    Attributes:
        coefficients: Weights of the features 1, r, g, b, rr, gg, bb, rg, rb, gb for each output channel.
        low: Per channel, where the fitted colours begin.
        high: Per channel, where they end.
    """

    coefficients: Float[np.ndarray, "10 3"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]

    @classmethod
    def identity(cls) -> "ColourMap":
        """The map that changes nothing."""
        coefficients = np.zeros((10, 3))
        coefficients[1:4] = np.eye(3)
        return cls(coefficients, np.zeros(3), np.ones(3))

    def __call__(self, colours: Colours) -> Colours:
        """Map colours in [0, 1]; the values that come out may lie outside it."""
        inside = np.clip(colours, self.low, self.high).astype(np.float32)
        mapped = _features(inside) @ self.coefficients.astype(np.float32)
        outside = colours - inside
        if not outside.any():
            return mapped
        return mapped + np.einsum("...i,...io->...o", outside, self.slopes(inside))

    def as_grey(self) -> "ColourMap":
        """The same map with the mean of its channels in each."""
        mean = self.coefficients.mean(axis=1, keepdims=True)
        return ColourMap(np.repeat(mean, 3, axis=1), self.low, self.high)

    def slopes(self, colours: Colours) -> Float32[np.ndarray, "... 3 3"]:
        """Derivative of each output channel (last axis) by each input channel (the axis before)."""
        c = self.coefficients.astype(np.float32)
        r, g, b = (colours[..., i, None] for i in range(3))
        by_r = c[1] + 2 * c[4] * r + c[7] * g + c[8] * b
        by_g = c[2] + 2 * c[5] * g + c[7] * r + c[9] * b
        by_b = c[3] + 2 * c[6] * b + c[8] * r + c[9] * g
        return np.stack([by_r, by_g, by_b], axis=-2)

    def apply(self, picture: Image.Image) -> Image.Image:
        """Map an RGB picture of any size through a look-up table of `LUT_SIZE` nodes a side."""
        axis = np.linspace(0, 1, LUT_SIZE, dtype=np.float32)
        blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red runs fastest
        table = self(np.stack([red, green, blue], axis=-1)).clip(0, 1)
        return picture.filter(ImageFilter.Color3DLUT(LUT_SIZE, table.reshape(-1)))


def fit(
    colours: Float32[np.ndarray, "n 3"],
    targets: Float32[np.ndarray, "n 3"],
    noise: float,
    start: ColourMap | None = None,
) -> ColourMap:
    """Fit a colour map that most of the pixels follow.

    Iteratively reweighted least squares with Tukey's weights, so that pixels which changed in another way
    (an object that came or went) do not bend the map. The curved map is taken where it explains clearly
    more than the straight one.

    Args:
        colours: Colours before, in [0, 1].
        targets: Colours after, in [0, 1].
        noise: Standard deviation of ``targets`` that is not worth explaining.
        start: First guess, for the first weights; the least-squares fit where None.

    Returns:
        The map.
    """
    step = max(1, len(colours) // NUM_FITTED_COLOURS)
    colours, targets = colours[::step], targets[::step]
    straight = _fit_features(colours, targets, 4, noise, start)
    curved = _fit_features(colours, targets, 10, noise, start)
    scales = [np.median(_distance(targets - m(colours))) ** 2 for m in (straight, curved)]
    floor = (0.3 * noise) ** 2
    return curved if scales[1] + floor < CURVE_GAIN * (scales[0] + floor) else straight


def grey(picture: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """The mean of the three channels, three times."""
    return np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1)


def _fit_features(
    colours: Float32[np.ndarray, "n 3"],
    targets: Float32[np.ndarray, "n 3"],
    num_features: int,
    noise: float,
    start: ColourMap | None,
) -> ColourMap:
    low, high = np.quantile(colours, RANGE_QUANTILES, axis=0)
    features = _features(colours.astype(np.float64))[:, :num_features]
    prior = ColourMap.identity().coefficients[:num_features]
    # The ridge pulls what the colours do not decide towards "unchanged", bends harder than slopes.
    ridge = np.diag([1e-6] + [1.0] * 3 + [4.0] * 6)[:num_features, :num_features]
    ridge = ridge * (noise**2 * 20 + 1e-5) * len(colours) * 0.02
    weights = np.ones(len(colours))
    if start is not None:
        weights = _tukey(_distance(targets - start(colours)), noise)
    coefficients = prior
    for _ in range(NUM_ROBUST_ROUNDS):
        weighted = features * weights[:, None]
        normal = weighted.T @ features + ridge
        coefficients = prior + np.linalg.solve(normal, weighted.T @ (targets - features @ prior))
        weights = _tukey(_distance(targets - features @ coefficients), noise)
    full = np.zeros((10, 3))
    full[:num_features] = coefficients
    return ColourMap(full, low, high)


def _tukey(distance: Float[np.ndarray, "n"], noise: float) -> Float[np.ndarray, "n"]:
    """Tukey's biweight: 1 for a perfect pixel, 0 beyond 4.7 spreads."""
    spread = max(noise, 1.48 * float(np.median(distance)))
    return np.clip(1 - (distance / (4.7 * spread)) ** 2, 0, 1) ** 2


def _distance(difference: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
    return np.sqrt(np.mean(np.square(difference), axis=-1))


def _features(colours: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 10"]:
    r, g, b = (colours[..., i] for i in range(3))
    one = np.ones_like(r)
    return np.stack([one, r, g, b, r * r, g * g, b * b, r * g, r * b, g * b], axis=-1)
