"""Whether a cut-out is a whole thing, well cut: half a subject is worse than none. For `edits`."""

from collections.abc import Callable

import numpy as np

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.classical import load_cv2
from step1x_edit.datagen.photographs.masks import grown, largest_part, outline, shrunk
from step1x_edit.datagen.photographs.roles import Box, Detector, Mask, Unsuitable

AREA_SHARE = (0.015, 0.5)
"""Of the picture."""
LEAST_IN_ONE_PART = 0.85
"""Share of the cut-out that hangs together."""
MOST_AT_THE_RIM = 0.12
"""Share of its outline that lies on the picture's rim."""
LEAST_SOLIDITY = 0.55
"""Its area over that of its convex hull."""
MOST_ALIKE = 0.45
"""Overlap of the colours just inside and just outside, in [0, 1]."""
MOST_SHARED = 0.4
"""Of what stands out once the subject is gone: how much may lie where it was."""
STEADY_MARGINS = (0.04, 0.08)
"""By which a photograph is cropped on all sides, of its shorter one."""
LEAST_STEADY = 0.7
"""Intersection over union of the cut-outs of the photograph and of its crop."""
BAND_PX = 8
"""Width of the two bands whose colours are compared, at 256 px."""
BINS = 8
"""Of a colour histogram, for each channel."""


def check_cut_out(picture: Picture, mask: Mask) -> None:
    """Refuse a cut-out that is likely not one whole thing.

    Raises:
        Unsuitable: It is too small or large, in pieces, ragged, cut off by the picture's rim, or of
            the colours of what is around it.
    """
    share = float(mask.mean())
    if share < AREA_SHARE[0]:
        raise Unsuitable("no subject that stands out")
    if share > AREA_SHARE[1]:
        raise Unsuitable("subject fills the picture")
    if largest_part(mask).sum() < LEAST_IN_ONE_PART * mask.sum():
        raise Unsuitable("cut-out in pieces")
    edge = outline(mask)
    rim = np.ones_like(mask)
    rim[1:-1, 1:-1] = False
    if (edge & rim).sum() > MOST_AT_THE_RIM * edge.sum():
        raise Unsuitable("subject cut off by the rim")
    if _solidity(mask) < LEAST_SOLIDITY:
        raise Unsuitable("cut-out ragged")
    if _overlap(picture, mask) > MOST_ALIKE:
        raise Unsuitable("subject not set off from what is behind")


def check_steady(picture: Picture, mask: Mask, cut: Callable[[Picture], Mask]) -> None:
    """Refuse a cut-out that hangs on how the photograph is cropped: then it is a part of something.

    Args:
        picture: The photograph.
        mask: Its cut-out.
        cut: Makes the cut-out of a picture.

    Raises:
        Unsuitable: In a slightly smaller crop it is another one, or none.
    """
    for share in STEADY_MARGINS:
        margin = round(share * min(mask.shape))
        inner = np.s_[margin:-margin, margin:-margin]
        again, before = cut(np.ascontiguousarray(picture[inner])), mask[inner]
        if (again & before).sum() < LEAST_STEADY * (again | before).sum():
            raise Unsuitable("cut-out not the same in a smaller crop")


def check_gone(detector: Detector, filled: Picture, box: Box) -> None:
    """Refuse a filled hole where something still stands out.

    Args:
        detector: The part that found the subject.
        filled: The photograph without it.
        box: Where it was.

    Raises:
        Unsuitable: The surest thing lies there again.
    """
    for found in detector.find(filled)[:1]:
        top, left = np.maximum(found.box[:2], box[:2])
        bottom, right = np.minimum(found.box[2:], box[2:])
        shared = max(bottom - top, 0) * max(right - left, 0)
        area = (found.box[2] - found.box[0]) * (found.box[3] - found.box[1])
        if shared > MOST_SHARED * area:
            raise Unsuitable("remains of the subject, or a patch that shows")


def _solidity(mask: Mask) -> float:
    cv2 = load_cv2()
    points = cv2.findNonZero(mask.astype(np.uint8))
    hull = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
    return float(mask.sum() / hull.sum())


def _overlap(picture: Picture, mask: Mask) -> float:
    """Histogram intersection of the two bands along the outline."""
    band = max(2, round(BAND_PX * min(mask.shape) / 256))
    inside = mask & ~shrunk(mask, band)
    outside = grown(mask, band) & ~mask
    codes = (picture // (256 // BINS)).astype(int) @ np.asarray([BINS * BINS, BINS, 1])
    one, other = (
        np.bincount(codes[where], minlength=BINS**3) / max(int(where.sum()), 1)
        for where in (inside, outside)
    )
    return float(np.minimum(one, other).sum())
