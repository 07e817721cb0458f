"""Inpainting without a model: a hole becomes what another place of the same picture shows.

One shift serves the whole hole (as in Pritch et al. 2009, shift-map image editing), and the seam is
closed by a membrane over the difference at the rim (Pérez et al. 2003, Poisson image editing), so
grass stays grass and a sky keeps its gradient; where there is nothing but a gradient, the membrane
and some grain are all. Where no place fits, it refuses.
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
PLAIN = 9.0
"""Spread around one smooth gradient, of 255: a ring of less needs no patch."""
STRANGE_SHARE = 0.02
"""Of the ring: so much may be unlike the patch."""
WORST_PLACE = 50.0
"""Difference in one channel, of 255: what is more unlike has been cut through by the hole."""
WORST_PATCH = 24.0
"""Root mean square of the ring's difference in contrast, of 255: beyond, a patch would show."""


class CloneStamp:
    """See the module."""

    name = "clone stamp"

    def fill(self, picture: Picture, hole: Mask) -> Picture:
        """See `roles.Inpainter`."""
        ring = grown(hole, max(3, round(RING_SHARE * min(hole.shape)))) & ~hole
        if not ring.any():
            raise Unsuitable("nothing to fill the hole with")
        grain = _grain_of_plain(picture, ring)
        if grain is None:
            shift = _best_shift(picture, hole, ring)
            patch = np.roll(picture, shift, (0, 1)).astype(np.float32)
        else:
            patch = np.random.default_rng(0).normal(0, grain, picture.shape).astype(np.float32)
            patch[~hole] = 0
        filled = patch + _membrane(picture - patch, hole)
        filled = (filled.clip(0, 255) + 0.5).astype(np.uint8)
        return np.where(hole[..., None], filled, picture)


def _grain_of_plain(picture: Picture, ring: Mask) -> float | None:
    """Noise of a ring that is one smooth gradient, of 255; None where there is more to see."""
    rows, columns = np.nonzero(ring)
    terms = np.stack([np.ones_like(rows), rows, columns, rows * columns], -1) / len(ring)
    colours = picture[ring].astype(np.float64)
    rest = colours - terms @ np.linalg.lstsq(terms, colours, rcond=None)[0]
    return float(rest.std()) / 2 if rest.std() < PLAIN and not _strange(rest) else None


def _strange(difference: Float[np.ndarray, "places 3"]) -> bool:
    """Whether a ring holds something that its fill does not explain: a rest of the subject."""
    off = np.abs(difference - np.median(difference, 0)).max(-1)
    return bool(np.quantile(off, 1 - STRANGE_SHARE) > WORST_PLACE)


def _best_shift(picture: Picture, hole: Mask, around: Mask) -> tuple[int, int]:
    """By how many rows and columns the picture must move so that its hole is best covered."""
    cv2 = load_cv2()
    needed = hole | around
    top, left, bottom, right = bounds(needed)
    cut = np.s_[top:bottom, left:right]
    ring = around[cut].astype(np.float32)
    whole, template = picture.astype(np.float32), picture[cut].astype(np.float32)
    weights = np.repeat(ring[..., None], 3, -1)
    squares = cv2.matchTemplate(whole, template, cv2.TM_SQDIFF, mask=weights) / ring.sum()
    # A difference in colour that is the same all around is taken away by the membrane.
    for channel in range(3):
        plane = np.ascontiguousarray(whole[..., channel])
        mean = cv2.matchTemplate(plane, ring, cv2.TM_CCORR) / ring.sum()
        squares -= (mean - (template[..., channel] * ring).sum() / ring.sum()) ** 2
    # The patch itself must be known.
    clash = cv2.matchTemplate(hole.astype(np.float32), needed[cut].astype(np.float32), cv2.TM_CCORR)
    squares[clash > 0.5] = np.inf
    row, column = (int(i) for i in np.unravel_index(int(np.argmin(squares)), squares.shape))
    if not squares[row, column] < 3 * WORST_PATCH**2:
        raise Unsuitable("nothing to fill the hole with")
    patch = whole[row : row + bottom - top, column : column + right - left]
    if _strange((template - patch)[ring > 0]):
        raise Unsuitable("part of the subject outside the hole")
    return top - row, left - column


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
