"""Where a photograph's subject is, without a model: what neither touches nor resembles the rim.

Two cues of Zhang et al. 2015 (minimum barrier salient object detection at 80 FPS) are multiplied.
A place is far from the rim when every path from there to it crosses strong changes of colour, and
it is unlike the rim when its colour lies outside of what the four sides show. Called by
`classical`.
"""

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Picture

SIDE_PX = 80
"""Of the small picture that is looked at."""
NUM_ROUNDS = 3
RIM_SHARE = 0.08
"""Width of the sides that stand for the background."""
CENTRE_SPREAD = 0.45
"""Standard deviation of the prior that a subject stands in the middle, of the side."""

Plane = Float[np.ndarray, "rows columns"]
Colours = Float[np.ndarray, "rows columns channels"]


def saliency(picture: Picture) -> Plane:
    """How likely each place belongs to the subject, 0 to 1, on `SIDE_PX` × `SIDE_PX` places."""
    side = (SIDE_PX, SIDE_PX)
    small = Image.fromarray(picture).resize(side, Image.Resampling.BOX).convert("LAB")
    # Pillow stores a and b as signed bytes; the wrap-around goes with an offset.
    lab = np.asarray(small).astype(np.int16)
    lab[..., 1:] = (lab[..., 1:] + 128) % 256
    colours = ndimage.gaussian_filter(lab.astype(np.float32), (1, 1, 0))
    cues = _stretched(barrier_distance(colours)) * (0.25 + _stretched(unlike_the_rim(colours)))
    away = (np.arange(SIDE_PX) + 0.5) / SIDE_PX - 0.5
    prior = np.exp(-(away[:, None] ** 2 + away**2) / (2 * CENTRE_SPREAD**2))
    return _stretched(cues * prior)


def barrier_distance(colours: Colours) -> Plane:
    """Least range of colour that a path from each place to the rim covers, summed over channels.

    The paths are grown by sweeps over whole rows and columns in the four directions.
    """
    total = np.zeros(colours.shape[:2], np.float32)
    for channel in np.moveaxis(colours, -1, 0):
        highest, lowest = channel.copy(), channel.copy()
        distance = np.full_like(channel, np.inf)
        distance[[0, -1]] = distance[:, [0, -1]] = 0
        for turn in range(4 * NUM_ROUNDS):
            # Views of the same memory: what a turned sweep writes stands in the plane itself.
            turned = [np.rot90(plane, turn % 4) for plane in (channel, highest, lowest, distance)]
            _sweep(*turned)
        total += distance
    return total


def _sweep(value: Plane, highest: Plane, lowest: Plane, distance: Plane) -> None:
    """Carry paths from each row to the next one."""
    for row in range(1, len(value)):
        top = np.maximum(highest[row - 1], value[row])
        bottom = np.minimum(lowest[row - 1], value[row])
        nearer = top - bottom < distance[row]
        highest[row, nearer], lowest[row, nearer] = top[nearer], bottom[nearer]
        distance[row, nearer] = (top - bottom)[nearer]


def unlike_the_rim(colours: Colours) -> Plane:
    """Mahalanobis distance of each place's colour to those of the four sides.

    The side that is most unlike is left out: a subject may stand on it.
    """
    width = max(1, round(RIM_SHARE * len(colours)))
    distances = []
    for turn in range(4):
        rim = np.rot90(colours, turn)[:width].reshape(-1, colours.shape[-1])
        spread = np.linalg.inv(np.cov(rim.T) + 25 * np.eye(rim.shape[1]))
        away = colours - rim.mean(0)
        distances.append(_stretched(np.sqrt(np.einsum("hwc,cd,hwd->hw", away, spread, away))))
    return np.sum(distances, 0) - np.max(distances, 0)


def _stretched(plane: np.ndarray) -> np.ndarray:
    low, high = plane.min(), plane.max()
    return ((plane - low) / max(float(high - low), 1e-6)).astype(np.float32)
