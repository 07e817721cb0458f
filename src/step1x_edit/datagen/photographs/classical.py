"""Parts for photographs that need no model weights: they come with ``step1x-edit[photos]``."""

from typing import Any

import numpy as np
from jaxtyping import Float

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.onnx_parts import RapidOcr
from step1x_edit.datagen.photographs.masks import (
    bounds,
    filled,
    large_parts,
    largest_part,
    opened,
    outline,
)
from step1x_edit.datagen.photographs.roles import Box, Found, FoundText, Mask, Unsuitable
from step1x_edit.datagen.photographs.saliency import saliency
from step1x_edit.errors import MissingExtra

SUBJECT_AT = 0.9
"""Times Otsu's threshold: a little of what is undecided belongs to the subject."""
LEAST_CONCENTRATION = 0.7
"""Share of what stands out that the subject must have: below, there are several, or a pattern."""
BOX_MARGIN = 0.03
"""By which a box is grown, of the picture's side."""
SURELY = 0.75
"""Saliency from which grab-cut takes a place as the subject's."""
SURROUNDINGS = 0.12
"""Width of what grab-cut sees around a box, of the picture's shorter side."""
GRAB_CUT_ROUNDS = 3
SPLINTER = 0.02
"""Share of the largest part: smaller parts are dropped."""
MOST_ON_THE_BOX = 0.1
"""Share of a cut-out's outline that lies on its box: beyond, the thing goes on outside."""
SURELY_READ = 0.85
"""Confidence of a line of text: patterns are read as words of less."""


class SaliencyDetector:
    """Finds the one subject that stands out (see `saliency`); in a pattern it finds nothing."""

    name = "minimum-barrier saliency"

    def find(self, picture: Picture) -> list[Found]:
        """See `roles.Detector`; at most one."""
        map_ = saliency(picture)
        salient = map_ > SUBJECT_AT * _otsu(map_)
        subject = largest_part(salient, weights=map_)
        score = float(map_[subject].sum() / max(map_[salient].sum(), 1e-6))
        if score < LEAST_CONCENTRATION:
            return []
        edges = np.asarray(bounds(subject), np.float32) / len(map_)
        edges += np.asarray([-1, -1, 1, 1]) * BOX_MARGIN
        size = np.tile(picture.shape[:2], 2)
        top, left, bottom, right = np.rint(edges.clip(0, 1) * size).astype(int).tolist()
        return [Found((top, left, bottom, right), score)]


class GrabCut:
    """Cuts by colour models of inside and outside (Rother et al. 2004), begun at the saliency."""

    name = "grab-cut"

    def cut(self, picture: Picture, box: Box) -> Mask:
        """See `roles.Segmenter`."""
        cv2 = load_cv2()
        height, width = picture.shape[:2]
        map_ = cv2.resize(saliency(picture), (width, height))
        mask = np.full((height, width), cv2.GC_BGD, np.uint8)
        top, left, bottom, right = box
        inside = map_[top:bottom, left:right]
        mask[top:bottom, left:right] = np.select(
            [inside > SURELY * inside.max(), inside > 0.5 * _otsu(map_)],
            [cv2.GC_FGD, cv2.GC_PR_FGD],
            cv2.GC_PR_BGD,
        )
        # The surroundings are enough to know the background by, and cost less.
        near = round(SURROUNDINGS * min(height, width))
        window = np.s_[max(0, top - near) : bottom + near, max(0, left - near) : right + near]
        blue_first = np.ascontiguousarray(picture[window][..., ::-1])
        within = np.ascontiguousarray(mask[window])
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)  # its clusters begin at random
        try:
            cv2.grabCut(blue_first, within, None, *models, GRAB_CUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
        except cv2.error as error:  # nothing is outside, or nothing inside
            raise Unsuitable("no subject that stands out") from error
        mask[window] = within
        found = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
        thing = filled(large_parts(opened(found, 1), SPLINTER))
        if _share_on_box(thing, box) > MOST_ON_THE_BOX:
            raise Unsuitable("cut-out runs out of its box")
        return thing


class TextLines(RapidOcr):
    """Finds Latin and Chinese text, line by line."""

    name = "RapidOCR"

    def find(self, picture: Picture) -> list[FoundText]:
        """See `roles.TextFinder`."""
        read = [line for line in self.lines(picture) if line.score >= SURELY_READ]
        read.sort(key=lambda line: -line.score)
        return [FoundText(_box_of(line.corners, picture), line.text) for line in read]


class DenseFlow:
    """Dense optical flow by inverse search (Kroeger et al. 2016)."""

    name = "DIS optical flow"

    def flow(self, before: Picture, after: Picture) -> Float[np.ndarray, "height width 2"]:
        """See `roles.FlowEstimator`."""
        cv2 = load_cv2()
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
        engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        return engine.calc(*grey, None)


def load_cv2() -> Any:
    """OpenCV.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise _missing("triplets from photographs need OpenCV") from error
    return cv2


def _missing(what: str) -> MissingExtra:
    return MissingExtra(f"{what}: pip install 'step1x-edit[photos]'")


def _otsu(plane: Float[np.ndarray, "rows columns"]) -> float:
    """The threshold that parts the values into two groups of least spread (Otsu 1979)."""
    cv2 = load_cv2()
    level, _ = cv2.threshold((plane * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    return float(level) / 255


def _share_on_box(mask: Mask, box: Box) -> float:
    """Of a mask's outline, the share on those edges of the box that are not the picture's."""
    top, left, bottom, right = box
    within = np.zeros_like(mask)
    within[
        top + 2 * (top > 0) : bottom - 2 * (bottom < mask.shape[0]),
        left + 2 * (left > 0) : right - 2 * (right < mask.shape[1]),
    ] = True
    return float((outline(mask) & ~within).sum() / max(int(outline(mask).sum()), 1))


def _box_of(corners: Float[np.ndarray, "4 2"], picture: Picture) -> Box:
    """The upright box around four (x, y) corners, inside the picture."""
    (left, top), (right, bottom) = np.floor(corners.min(0)), np.ceil(corners.max(0))
    height, width = picture.shape[:2]
    return max(int(top), 0), max(int(left), 0), min(int(bottom), height), min(int(right), width)
