"""Masks: where the user lets a picture change. ``editor`` opens them, ``restore`` softens them."""

from pathlib import Path

import numpy as np
from PIL import Image

from step1x_edit.errors import InvalidRequest
from step1x_edit.images.filters import EIGHT_NEIGHBOURS, ndimage
from step1x_edit.images.read import MAX_PIXELS, Picture, open_picture

INSIDE = 128
FEATHER_SHARE = 0.006
MAX_FEATHER_PX = 64


def open_mask(
    source: Path | str | Image.Image,
    picture: Picture,
    *,
    max_pixels: int | None = MAX_PIXELS,
) -> Image.Image:
    """Read a mask: white where the picture may change; black and transparent elsewhere.

    Returns:
        "L" of the picture's size, 255 where the picture may change, else 0.

    Raises:
        InvalidRequest: It cannot be read, has another size than the picture, or is all black.
    """
    read = open_picture(source, max_pixels=max_pixels)
    if read.size != picture.size:
        raise InvalidRequest(
            f"mask of {read.size[0]} × {read.size[1]} px for a picture of "
            f"{picture.size[0]} × {picture.size[1]} px: give one of the same size"
        )
    grey = read.rgb.convert("L")
    if read.alpha is not None:
        grey = Image.composite(grey, Image.new("L", grey.size, 0), read.alpha)
    binary = grey.point([255 if value >= INSIDE else 0 for value in range(256)])
    if binary.getbbox() is None:
        raise InvalidRequest(
            f"the mask is under {INSIDE} of 255 everywhere, so nothing may change: "
            "paint white where the picture may change"
        )
    return binary


def feather_inward(mask: Image.Image) -> Image.Image:
    """Soften a mask's edge without leaving it: 0 stays 0.

    Eroded by a square and then averaged over a square of the same size, so no average reaches
    outside. Parts too thin for that are softened less.
    """
    inside = np.asarray(mask) >= INSIDE
    labels, count = ndimage().label(inside, structure=EIGHT_NEIGHBOURS)
    soft = np.zeros(inside.shape, np.uint8)
    feather_px = min(MAX_FEATHER_PX, round(FEATHER_SHARE * min(mask.size)))
    while count:
        size = 2 * feather_px + 1
        eroded = ndimage().minimum_filter(inside, size, mode="nearest").astype(np.float32)
        mean = ndimage().uniform_filter(eroded, size, mode="nearest")
        np.maximum(soft, np.rint(255 * mean).clip(0, 255).astype(np.uint8) * inside, out=soft)
        if feather_px == 0:
            break
        # Parts that hardly show are done again with a narrower edge.
        peaks = np.asarray(ndimage().maximum(soft, labels, index=np.arange(count + 1)))
        thin = peaks < 250
        thin[0] = False
        if not thin.any():
            break
        inside = thin[labels]
        feather_px //= 2
    return Image.fromarray(soft)
