"""Stand-ins for photographs: a thing of known place in front of a detailed background."""

import numpy as np

from ...pictures import detailed, disc


def with_disc(size=128, centre=(0.45, 0.5), radius=0.18, seed=0):
    """A red disc on a faint green pattern, and the disc's mask."""
    picture = 0.25 * detailed(size, size, seed) + np.asarray([0.15, 0.5, 0.2])
    mask = disc(size, size, centre, radius)
    shade = 0.7 + 0.3 * np.linspace(0, 1, size)[:, None]
    picture = np.where(mask[..., None], shade[..., None] * np.asarray([0.9, 0.1, 0.1]), picture)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8), mask


def background(size=128, seed=0):
    """The same without the disc."""
    picture = 0.25 * detailed(size, size, seed) + np.asarray([0.15, 0.5, 0.2])
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
