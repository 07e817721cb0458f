"""Write a region's change into the photograph, tile by tile, so that memory stays small.

``restore`` calls `place`. What is known at model size is enlarged for one tile at a time.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from step1x_edit.images.detail import Explanation
from step1x_edit.images.filters import Field, Pixels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the photograph."""

TILE_PX = 384
# No filter used reaches further: LANCZOS spans three pixels of its input.
REACH_PX = 4
BILINEAR = Image.Resampling.BILINEAR
LANCZOS = Image.Resampling.LANCZOS


def place(
    pixels: UInt8[np.ndarray, "H W 3"],
    picture: Image.Image,
    change: Explanation,
    weight: Field,
    result: Float32[np.ndarray, "model_h model_w 3"],
) -> None:
    """Write one region's change into ``pixels``; where ``weight`` is 0, they stay bit for bit.

    Args:
        pixels: What is written to.
        picture: The photograph.
        change: What happens in the region.
        weight: Share of the change, in [0, 1].
        result: The model's result in [0, 1], for where it stands for itself.
    """
    for box in _tiles(picture.size):
        share = _enlarged(weight[..., None], picture.size, box, BILINEAR)
        if not share.any():
            continue
        patch = picture.crop(box)
        old = np.asarray(patch, np.float32) / 255
        new = np.asarray(change.colour_map.apply(patch), np.float32) / 255
        offset = _enlarged(change.offset, picture.size, box, BILINEAR)
        if offset.any():  # else there are no slopes either
            new += offset
            for channel in range(3):
                slopes = _enlarged(change.slopes[:, :, channel], picture.size, box, BILINEAR)
                new += old[..., channel, None] * slopes
        replaced = _enlarged(change.replaced[..., None], picture.size, box, BILINEAR)
        if replaced.any():
            new += replaced * (_enlarged(result, picture.size, box, LANCZOS) - new)
        mixed = old + share * (new - old)
        tile = pixels[box[1] : box[3], box[0] : box[2]]
        np.copyto(tile, as_bytes(mixed), where=share > 0)


def as_bytes(picture: Pixels) -> UInt8[np.ndarray, "h w 3"]:
    """[0, 1] to 0…255, rounded."""
    return np.rint(picture * 255).clip(0, 255).astype(np.uint8)


def _tiles(size: tuple[int, int]) -> Iterator[Box]:
    width, height = size
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            yield left, top, min(left + TILE_PX, width), min(top + TILE_PX, height)


def _enlarged(
    fields: Float32[np.ndarray, "h w c"],
    size: tuple[int, int],
    box: Box,
    method: Image.Resampling,
) -> Float32[np.ndarray, "H W c"]:
    """The part ``box`` of ``fields`` enlarged to ``size``."""
    height, width, channels = fields.shape
    across, down = width / size[0], height / size[1]
    left, top, right, bottom = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    column, row = max(0, int(left) - REACH_PX), max(0, int(top) - REACH_PX)
    near = fields[row : int(bottom) + 1 + REACH_PX, column : int(right) + 1 + REACH_PX]
    enlarged = np.zeros((box[3] - box[1], box[2] - box[0], channels), np.float32)
    if not near.any():
        return enlarged
    # Rounding may put the last edge a hair outside.
    last_column, last_row = min(right - column, near.shape[1]), min(bottom - row, near.shape[0])
    part = (left - column, top - row, last_column, last_row)
    for channel in range(channels):
        plane = Image.fromarray(np.ascontiguousarray(near[..., channel], np.float32))
        tile = plane.resize((box[2] - box[0], box[3] - box[1]), method, part)
        enlarged[..., channel] = np.asarray(tile)
    return enlarged
