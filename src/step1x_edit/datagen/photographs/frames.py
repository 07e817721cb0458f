"""Motion triplets from two frames of a video: something moved, and the camera did not.

Called by `run`.
"""

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from step1x_edit.datagen.photographs.cutout import AREA_SHARE
from step1x_edit.datagen.photographs.edits import Draft, Shot, nearest_position
from step1x_edit.datagen.photographs.masks import bounds, grown, largest_part, opened
from step1x_edit.datagen.photographs.roles import FlowEstimator, Mask, Picture, Unsuitable
from step1x_edit.datagen.vocabulary import POSITIONS, where

MOVING = 0.012
"""Flow from which a place counts as moving, of the shorter side."""
MOST_AROUND = 0.05
"""Share of the border that may move: beyond, it is the camera."""
BORDER = 0.06
"""Width of the border, of the shorter side."""
GROWTH_AROUND = 0.03
"""By which what moved is grown, of the shorter side: its soft rim and shadow come along."""


def motion_of_pair(shot: Shot, later: Picture) -> Draft:
    """The one thing that moves between two frames, moved; all else stays as in the first.

    Raises:
        Unsuitable: The camera moves, or nothing does, or several things do; or what moved has no
            name; or it stays in the same third of the picture, so that no words say where it went.
    """
    flow = shot.parts.flow
    assert flow is not None  # the caller looks
    gone, come = moved(shot.picture, later, flow)
    if shot.label is None:
        raise Unsuitable("subject has no name")
    width = shot.picture.shape[1]
    before, after = (nearest_position(bounds(part), width) for part in (gone, come))
    if before == after:
        raise Unsuitable("moved too little to say where")
    words = {
        "en": {"object": shot.label[0], "where": where(after), "to_where": f"to the {after}"},
        "zh": {"object": shot.label[1], "where": POSITIONS[after][0]},
    }
    reach = max(1, round(GROWTH_AROUND * min(gone.shape)))
    changed = grown(gone | come, reach).astype(np.float32)
    soft = ndimage.gaussian_filter(changed, reach / 3)[..., None]
    target = shot.pixels + soft * (later.astype(np.float32) / 255 - shot.pixels)
    return Draft(target, "move", words, (flow.name,))


def moved(before: Picture, after: Picture, flow: FlowEstimator) -> tuple[Mask, Mask]:
    """Where the one moving thing was, and where it is.

    Raises:
        Unsuitable: See `motion_of_pair`.
    """
    was, is_ = (_moving(flow.flow(*frames)) for frames in ((before, after), (after, before)))
    for mask in (was, is_):
        rim = np.ones_like(mask)
        edge = max(1, round(BORDER * min(mask.shape)))
        rim[edge:-edge, edge:-edge] = False
        if mask[rim].mean() > MOST_AROUND:
            raise Unsuitable("camera moves")
        if not AREA_SHARE[0] <= mask.mean() <= AREA_SHARE[1]:
            raise Unsuitable("nothing moves" if mask.mean() < AREA_SHARE[0] else "camera moves")
        if largest_part(mask).sum() < 0.7 * mask.sum():
            raise Unsuitable("several things move")
    return largest_part(was), largest_part(is_)


def _moving(flow: Float[np.ndarray, "height width 2"]) -> Mask:
    speed = np.hypot(flow[..., 0], flow[..., 1])
    moving = speed > MOVING * min(speed.shape)
    return opened(moving, max(1, min(speed.shape) // 100))
