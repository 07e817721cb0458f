"""Colour maps: a picture's colours as a smooth function of another picture's colours.

A tone or colour edit ("make it black and white", "warmer", "paint the bowl blue") gives every pixel
a new colour that depends on its old colour alone. Such a function is fitted here between two
pictures of model size, robustly, and carried to a photograph of any size through a look-up table,
so no detail is lost. ``change`` finds the map of a whole picture, ``detail`` that of a region.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageFilter

Colours = Float32[np.ndarray, "*pixels 3"]

LUT_SIZE = 33
# Where the curve of each channel may bend: nodes of the table, so that it holds the curve exactly.
KNOTS = (6 / 32, 13 / 32, 19 / 32, 26 / 32)
NUM_STRAIGHT = 4
NUM_FEATURES = NUM_STRAIGHT + 3 * len(KNOTS)
NUM_ROUNDS = 12
NUM_ABSOLUTE_ROUNDS = 7
MAX_FITTED_COLOURS = 20_000
# A curve must leave less than this part of the straight fit's squared residual.
CURVE_GAIN = 0.9
# Pull towards "unchanged" of each feature, where the colours leave it open.
RIDGE = np.diag([1e-6] + [1.0] * 3 + [4.0] * 3 * len(KNOTS))


@dataclass(frozen=True)
class ColourMap:
    """A matrix and a curve for each channel: each output channel is a sum of bent lines.

    Attributes:
        coefficients: Weights in each output channel: of 1, of r, g, b, and of how far r, then g,
            then b lie above each of `KNOTS`.
    """

    coefficients: Float[np.ndarray, "features 3"]

    def __call__(self, colours: Colours) -> Colours:
        """Map colours in [0, 1]; what comes out may lie outside it."""
        return _features(colours) @ self.coefficients.astype(np.float32)

    def as_grey(self) -> "ColourMap":
        """The same map with the mean of its channels in each."""
        mean = self.coefficients.mean(axis=1, keepdims=True)
        return ColourMap(np.repeat(mean, 3, axis=1))

    def apply(self, picture: Image.Image) -> Image.Image:
        """Map an RGB picture of any size, through a table of `LUT_SIZE` nodes a side."""
        axis = np.linspace(0, 1, LUT_SIZE, dtype=np.float32)
        blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red runs fastest
        table = self(np.stack([red, green, blue], axis=-1)).clip(0, 1)
        return picture.filter(ImageFilter.Color3DLUT(LUT_SIZE, table.reshape(-1)))


def fit_colour_map(
    colours: Float32[np.ndarray, "n 3"],
    targets: Float32[np.ndarray, "n 3"],
    noise: float,
    weights: Float32[np.ndarray, " n"] | None = None,
) -> ColourMap:
    """Fit the colour map that most pixels follow.

    Iteratively reweighted least squares with Tukey's biweight, so that pixels which changed in
    another way (an object that came or went) do not bend the map. The curved map is taken only
    where it explains clearly more than the straight one.

    Args:
        colours: Colours before, in [0, 1].
        targets: Colours after, in [0, 1].
        noise: Difference in ``targets`` that is not worth explaining.
        weights: How much each pixel counts; all the same where None.
    """
    step = -(-len(colours) // MAX_FITTED_COLOURS)
    features = _features(colours[::step].astype(np.float64))
    changes = targets[::step].astype(np.float64) - colours[::step]
    counts = np.ones(len(features)) if weights is None else weights[::step].astype(np.float64)
    straight, curved = (
        _fit(features, changes, counts, n, noise) for n in (NUM_STRAIGHT, NUM_FEATURES)
    )
    left = [np.median(distance(changes - features @ fit)) ** 2 for fit in (straight, curved)]
    floor = (0.3 * noise) ** 2
    best = curved if left[1] + floor < CURVE_GAIN * (left[0] + floor) else straight
    best[1:4] += np.eye(3)
    return ColourMap(best)


def distance(difference: Float[np.ndarray, "*pixels 3"]) -> Float[np.ndarray, "*pixels"]:
    """Root mean square over the channels."""
    return np.sqrt(np.mean(np.square(difference), axis=-1))


def grey(colours: Colours) -> Colours:
    """The mean of the three channels, three times."""
    return np.repeat(colours.mean(axis=-1, keepdims=True), 3, axis=-1)


def _fit(
    features: Float[np.ndarray, "n features"],
    changes: Float[np.ndarray, "n 3"],
    counts: Float[np.ndarray, " n"],
    num_features: int,
    noise: float,
) -> Float[np.ndarray, "features 3"]:
    """Coefficients of the changes; 0 for the features after the first ``num_features``."""
    used = features[:, :num_features]
    ridge = len(used) * (0.4 * noise**2 + 2e-7) * RIDGE[:num_features, :num_features]
    coefficients = np.zeros((features.shape[1], 3))
    weights = np.ones(len(used))
    for round_number in range(NUM_ROUNDS):
        weighted = used * (counts * weights)[:, None]
        solved = np.linalg.solve(weighted.T @ used + ridge, weighted.T @ changes)
        coefficients[:num_features] = solved
        off = distance(changes - used @ solved)
        if round_number < NUM_ABSOLUTE_ROUNDS:
            # Least absolute differences: has one minimum, from which the biweight finds the best.
            weights = np.median(off) / np.maximum(off, noise)
        else:
            weights = _biweight(off, noise)
    return coefficients


def _biweight(distances: Float[np.ndarray, " n"], noise: float) -> Float[np.ndarray, " n"]:
    """Tukey's biweight with its usual constant: 1 for a perfect pixel, 0 beyond 4.685 spreads."""
    spread = max(noise, 1.4826 * float(np.median(distances)))
    return np.clip(1 - (distances / (4.685 * spread)) ** 2, 0, 1) ** 2


def _features(colours: Float[np.ndarray, "*pixels 3"]) -> Float[np.ndarray, "*pixels features"]:
    knots = np.asarray(KNOTS, colours.dtype)
    above = np.maximum(colours[..., :, None] - knots, 0).reshape(*colours.shape[:-1], -1)
    return np.concatenate([np.ones_like(colours[..., :1]), colours, above], axis=-1)
