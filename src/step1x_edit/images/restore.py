"""Put an edit back into the photograph it was made from.

The model works on a small copy of the picture. What it changed is found by comparing its result
with that copy, and only the change is carried over: as a colour map of the whole picture where that
says it all, else region by region, as a local function of the photograph's own pixels where the
edit is one, as the enlarged result where it is not. ``editor`` and ``benchmark`` call `restore`.
"""

import logging
from typing import Literal

import numpy as np
from jaxtyping import Float32, Num
from PIL import Image

from step1x_edit.images.change import find_change
from step1x_edit.images.colour_map import grey
from step1x_edit.images.detail import explain
from step1x_edit.images.filters import Field, Pixels, Region, ndimage
from step1x_edit.images.mask import feather_inward
from step1x_edit.images.placing import LANCZOS, as_bytes, place
from step1x_edit.images.read import Picture

Keep = Literal["auto", "always", "off"]

logger = logging.getLogger(__name__)

# Finding the change in more pixels than this makes it slower, not better.
MAX_ANALYSED_PX = 384 * 384
# A region's weight is 1 as far as the first, and falls to 0 over the second, in model pixels.
RIM_PX = 0.5
FEATHER_PX = 2.0
DENOISE_WINDOW_PX = 5


def restore(
    source: Picture,
    model_source: Num[np.ndarray, "h w 3"],
    result: Num[np.ndarray, "h w 3"],
    *,
    keep: Keep = "auto",
    mask: Image.Image | None = None,
) -> Image.Image:
    """Put an edit back into its photograph.

    ``auto``: a change of tone or colour that all the picture follows is applied to all of it; any
    other stays where it is seen, and every pixel outside is the source's own, bit for bit.
    ``always``: the first kind, too, only where it is seen. ``off``: the enlarged result. A mask
    bounds all three.

    Args:
        source: The photograph.
        model_source: What the autoencoder makes of it at model size; uint8, or float in [0, 1].
        result: The edited picture at model size, likewise.
        keep: How much of the source to keep.
        mask: Where the picture may change (128 and more), "L", of the source's size.

    Returns:
        RGB, or RGBA with the source's own alpha, of the source's size.

    Sources: He & Sun 2015 (fast guided filter), Chen et al. 2016 (bilateral guided upsampling).
    """
    before, after = _as_float(model_source), _as_float(result)
    assert before.shape == after.shape, f"{before.shape} is not {after.shape}"
    if keep == "off":
        edited = Image.fromarray(as_bytes(after)).resize(source.size, LANCZOS)
    else:
        edited = _carry_over(source, before, after, keep, mask)
    if mask is not None:
        edited = Image.composite(edited, source.rgb, feather_inward(mask))
    if source.alpha is not None:
        edited.putalpha(source.alpha)
    return edited


def _carry_over(
    source: Picture, before: Pixels, after: Pixels, keep: Keep, mask: Image.Image | None
) -> Image.Image:
    height, width = before.shape[:2]
    # 1. Find the change, on a copy of bounded size.
    shrink = min(1.0, (MAX_ANALYSED_PX / (height * width)) ** 0.5)
    size = (round(width * shrink), round(height * shrink))
    prepared = _as_float(np.asarray(source.on_white.resize((width, height), LANCZOS)))
    small_before, small_after, small_prepared = (
        _resized(p, size) for p in (before, after, prepared)
    )
    where = np.ones(size[::-1], bool)
    if mask is not None:
        where = np.asarray(mask.resize(size, Image.Resampling.BOX)) > 0
    change = find_change(
        small_before,
        small_after,
        small_before - small_prepared,
        where,
        allow_global=keep == "auto" and mask is None,
    )
    # 2. What all the picture follows.
    picture = source.rgb if change.colour_map is None else change.colour_map.apply(source.rgb)
    # 3. What is left, region by region.
    regions = [(where, np.ones(where.shape, np.float32))] if mask else _regions(change.region)
    if change.colour_map is None and not regions:
        logger.warning(
            "no change stands out of the model's noise: the picture is returned as it was"
        )
    pixels = np.array(picture)
    enlarged = _denoised(grey(after) if change.made_grey else after, change.noise.pixel)
    for region, weight in regions:
        place(pixels, picture, explain(change, region), weight, enlarged)
    return Image.fromarray(pixels)


def _regions(changed: Region) -> list[tuple[Region, Field]]:
    """Each connected region with its rim, and the feathered weight of its change."""
    reach = (
        ndimage().distance_transform_edt(~changed)
        if changed.any()
        else np.full(changed.shape, np.inf)
    )
    labels, count = ndimage().label(reach < RIM_PX + FEATHER_PX)
    weight = np.clip((RIM_PX + FEATHER_PX - reach) / FEATHER_PX, 0, 1).astype(np.float32)
    return [(labels == i, np.where(labels == i, weight, 0)) for i in range(1, count + 1)]


def _resized(picture: Pixels, size: tuple[int, int]) -> Float32[np.ndarray, "new_h new_w 3"]:
    """Area mean at another size (width, height)."""
    if size == (picture.shape[1], picture.shape[0]):
        return picture
    planes = np.ascontiguousarray(np.moveaxis(picture, -1, 0))
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(p).resize(size, box)) for p in planes], axis=-1)


def _denoised(picture: Pixels, noise: float) -> Pixels:
    """Local Wiener filter (Lee 1980): what varies no more than the model's noise becomes smooth."""
    size = (DENOISE_WINDOW_PX, DENOISE_WINDOW_PX, 1)
    mean = ndimage().uniform_filter(picture, size)
    variance = (
        ndimage().uniform_filter(np.square(picture - mean), size).mean(axis=-1, keepdims=True)
    )
    kept = np.maximum(variance - noise**2, 0) / (variance + 1e-9)
    return mean + kept * (picture - mean)


def _as_float(picture: Num[np.ndarray, "h w 3"]) -> Pixels:
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255
    return picture.astype(np.float32)
