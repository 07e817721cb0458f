"""Masks grown, shrunk, outlined, and in parts: what `classical`, `cutout` and `edits` share."""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from step1x_edit.datagen.photographs.roles import Box

Region = Bool[np.ndarray, "rows columns"]


def grown(mask: Region, pixels: int) -> Region:
    """All places within so many steps of the mask."""
    return np.asarray(ndimage.binary_dilation(mask, iterations=pixels))


def shrunk(mask: Region, pixels: int) -> Region:
    """Without the outermost pixels; the picture's rim is no outline."""
    return np.asarray(ndimage.binary_erosion(mask, iterations=pixels, border_value=1))


def opened(mask: Region, pixels: int) -> Region:
    """Without what is thinner than twice so many pixels."""
    return np.asarray(ndimage.binary_opening(mask, iterations=pixels))


def filled(mask: Region) -> Region:
    """With the holes that it surrounds."""
    return np.asarray(ndimage.binary_fill_holes(mask))


def outline(mask: Region) -> Region:
    """Its outermost pixels, those at the picture's rim too."""
    return mask & np.logical_not(ndimage.binary_erosion(mask, border_value=0))


def large_parts(mask: Region, least_share: float) -> Region:
    """The connected parts of a mask that have at least so much of the largest one's pixels."""
    labels, count = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues] - a pair
    numbers = np.asarray(labels, np.intp)
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= max(1, least_share * sizes.max()))[numbers]


def largest_part(mask: Region, weights: Float[np.ndarray, "rows columns"] | None = None) -> Region:
    """The connected part of a mask that is largest, or weighs most."""
    labels, count = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues] - a pair
    if count == 0:
        return mask
    sums = ndimage.sum_labels(mask if weights is None else weights, labels, np.arange(1, count + 1))
    return labels == 1 + int(np.argmax(sums))


def bounds(mask: Region) -> Box:
    """The box around what is true; there must be something."""
    rows, columns = np.nonzero(mask)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1
