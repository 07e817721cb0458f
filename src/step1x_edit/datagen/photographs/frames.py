"""Motion triplets from two frames of a video: something moved, and the camera did not.

Called by `run`.
"""

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.cutout import AREA_SHARE
from step1x_edit.datagen.photographs.edits import Draft, Shot, nearest_position
from step1x_edit.datagen.photographs.masks import bounds, grown, largest_part, opened
from step1x_edit.datagen.photographs.roles import FlowEstimator, Mask, Unsuitable
from step1x_edit.datagen.vocabulary import POSITIONS, where

MOVING = 0.012
"""Flow from which a place counts as moving, of the shorter side."""
CHANGED = 14
"""Of 255: noise and compression change a pixel by less."""
MOST_AROUND = 0.1
"""Share of the border that may move: beyond, it is the camera."""
ASTRAY = 0.15
"""Of the flow: how far off the flow back may end."""
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
    if shot.label is None:
        raise Unsuitable("subject has no name")
    gone, come, shift_px = moved(shot.picture, later, flow)
    width = shot.picture.shape[1]
    _, left, _, right = bounds(gone)
    middle = (left + right) / 2 / width
    before, after = nearest_position(middle), nearest_position(middle + shift_px / width)
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


def moved(before: Picture, after: Picture, flow: FlowEstimator) -> tuple[Mask, Mask, float]:
    """Where the one moving thing was, where it is, and how many pixels to the right it went.

    Raises:
        Unsuitable: See `motion_of_pair`.
    """
    forth, back = flow.flow(before, after), flow.flow(after, before)
    moving = _moving(forth, back), _moving(back, forth)
    rim = np.ones_like(moving[0])
    edge = max(1, round(BORDER * min(rim.shape)))
    rim[edge:-edge, edge:-edge] = False
    if moving[0][rim].mean() > MOST_AROUND:
        raise Unsuitable("camera moves")
    # Flow runs over into the plain places around a thing; these stay as they were.
    difference = np.abs(before.astype(np.int16) - after).max(-1)
    changed = grown(difference > CHANGED, 2)
    was, is_ = (changed & part for part in moving)
    for mask in (was, is_):
        if not AREA_SHARE[0] <= mask.mean() <= AREA_SHARE[1]:
            raise Unsuitable("nothing moves" if mask.mean() < AREA_SHARE[0] else "camera moves")
        if largest_part(mask).sum() < 0.7 * mask.sum():
            raise Unsuitable("several things move")
    gone = largest_part(was)
    return gone, largest_part(is_), float(np.median(forth[gone][:, 0]))


def _moving(
    flow: Float[np.ndarray, "height width 2"], back: Float[np.ndarray, "height width 2"]
) -> Mask:
    """Where flow is fast, and the flow back leads home: what is covered or bared has none.

    The rule is that of Sundaram et al. 2010 (dense point trajectories).
    """
    speed = np.hypot(flow[..., 0], flow[..., 1])
    rows, columns = np.indices(speed.shape)
    there = (
        np.rint(rows + flow[..., 1]).astype(int).clip(0, speed.shape[0] - 1),
        np.rint(columns + flow[..., 0]).astype(int).clip(0, speed.shape[1] - 1),
    )
    home = np.hypot(*np.moveaxis(flow + back[there], -1, 0)) < 0.5 + ASTRAY * speed
    moving = home & (speed > MOVING * min(speed.shape))
    return opened(moving, max(1, min(speed.shape) // 100))
