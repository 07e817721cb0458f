"""The size rule: at which size the model works on a picture. ``pipeline`` calls it."""

import math

from PIL import Image

from step1x_edit.errors import InvalidRequest
from step1x_edit.images.read import Picture

SIDE_MULTIPLE = 16
"""Sides are multiples of this many pixels: one picture token."""


def fit_size(
    width: int, height: int, size_level_px: int, multiple_px: int = SIDE_MULTIPLE
) -> tuple[int, int]:
    """Width and height of about `size_level_px`² pixels in the picture's shape, multiples of 16.

    The rule of the release (official-model.md, section 3.1), in the same order of double-precision
    operations, so that borderline sizes agree.

    Args:
        width: Of the picture, in pixels.
        height: Likewise.
        size_level_px: The size level.
        multiple_px: What the sides are multiples of; training has coarser ones, so that more
            pictures share a size.

    Raises:
        InvalidRequest: The picture is so elongated that a side would be 0.
    """
    ratio = width / height
    if width > height:
        new_width = math.ceil(math.sqrt(size_level_px * size_level_px * ratio))
        new_height = math.ceil(new_width / ratio)
    else:
        new_height = math.ceil(math.sqrt(size_level_px * size_level_px / ratio))
        new_width = math.ceil(new_height * ratio)
    size = new_width // multiple_px * multiple_px, new_height // multiple_px * multiple_px
    if 0 in size:
        limit = (size_level_px / multiple_px) ** 2
        raise InvalidRequest(
            f"picture of {width} × {height} px is too elongated for size level {size_level_px}, "
            f"whose limit is about {limit:.0f} : 1: crop it, or raise the size level"
        )
    return size


def prepare(picture: Picture, size_level_px: int) -> Image.Image:
    """The RGB picture at the model's size, by LANCZOS; what is transparent lies on white.

    Raises:
        InvalidRequest: As `fit_size`.
    """
    size = fit_size(*picture.size, size_level_px)
    return picture.on_white.resize(size, Image.Resampling.LANCZOS)
