"""Inpainting without a model: a hole becomes what another place of the same picture shows.

One shift serves the whole hole (as in Pritch et al. 2009, shift-map image editing), and the seam is
closed by a membrane over the difference at the rim (Pérez et al. 2003, Poisson image editing), so
grass stays grass and a sky keeps its gradient. Where no place fits, it refuses.
"""

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse.linalg import spsolve

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.classical import load_cv2
from step1x_edit.datagen.photographs.masks import bounds, grown
from step1x_edit.datagen.photographs.roles import Mask, Unsuitable

RING_SHARE = 0.045
"""Width of the ring around a hole that a patch must resemble, of the shorter side."""
WORST_PATCH = 24.0
"""Root mean square of the ring's difference in contrast, of 255: beyond, a patch would show."""


class CloneStamp:
    """See the module."""

    name = "clone stamp"

    def fill(self, picture: Picture, hole: Mask) -> Picture:
        """See `roles.Inpainter`."""
        row_shift, column_shift = _best_shift(picture, hole)
        patch = np.roll(picture, (row_shift, column_shift), (0, 1)).astype(np.float32)
        filled = patch + _membrane(picture - patch, hole)
        filled = (filled.clip(0, 255) + 0.5).astype(np.uint8)
        return np.where(hole[..., None], filled, picture)


def _best_shift(picture: Picture, hole: Mask) -> tuple[int, int]:
    """By how many rows and columns the picture must move so that its hole is best covered."""
    cv2 = load_cv2()
    reach = max(3, round(RING_SHARE * min(hole.shape)))
    around = grown(hole, reach)
    top, left, bottom, right = bounds(around)
    cut = np.s_[top:bottom, left:right]
    ring = (around & ~hole)[cut].astype(np.float32)
    if not ring.any():
        raise Unsuitable("nothing to fill the hole with")
    whole, template = picture.astype(np.float32), picture[cut].astype(np.float32)
    weights = np.repeat(ring[..., None], 3, -1)
    squares = cv2.matchTemplate(whole, template, cv2.TM_SQDIFF, mask=weights) / ring.sum()
    # A difference in colour that is the same all around is taken away by the membrane.
    for channel in range(3):
        plane = np.ascontiguousarray(whole[..., channel])
        mean = cv2.matchTemplate(plane, ring, cv2.TM_CCORR) / ring.sum()
        squares -= (mean - (template[..., channel] * ring).sum() / ring.sum()) ** 2
    # The patch itself must be known.
    clash = cv2.matchTemplate(hole.astype(np.float32), around[cut].astype(np.float32), cv2.TM_CCORR)
    squares[clash > 0.5] = np.inf
    row, column = np.unravel_index(int(np.argmin(squares)), squares.shape)
    if not squares[row, column] < 3 * WORST_PATCH**2:
        raise Unsuitable("nothing to fill the hole with")
    return top - int(row), left - int(column)


def _membrane(
    values: Float[np.ndarray, "height width 3"], hole: Mask
) -> Float[np.ndarray, "height width 3"]:
    """The harmonic surface over the hole that has `values` at its rim; 0 outside."""
    height, width = hole.shape
    inside = np.flatnonzero(hole)
    number = np.full(hole.size, -1)
    number[inside] = np.arange(len(inside))
    rows, columns = np.divmod(inside, width)
    known = np.zeros((len(inside), 3))
    degree = np.zeros(len(inside))
    links = []
    for down, across in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        there = (rows + down >= 0) & (rows + down < height)
        there &= (columns + across >= 0) & (columns + across < width)
        neighbour = inside[there] + down * width + across
        degree += there
        at, hidden = np.flatnonzero(there), hole.ravel()[neighbour]
        links.append((at[hidden], number[neighbour[hidden]]))
        np.add.at(known, at[~hidden], values.reshape(-1, 3)[neighbour[~hidden]])
    at, to = (np.concatenate(part) for part in zip(*links, strict=True))
    laplacian = sparse.csc_matrix((-np.ones(len(at)), (at, to)), (len(inside),) * 2)
    surface = np.zeros((hole.size, 3), np.float32)
    solved = spsolve(laplacian + sparse.diags(degree, format="csc"), known)
    surface[inside] = np.asarray(solved)
    return surface.reshape(height, width, 3)
