"""From the many ways of storing colours to 8-bit sRGB and alpha. ``read`` calls `split_colours`."""

import io
import logging

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)


def split_colours(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The sRGB pixels of a decoded picture of any mode, and its alpha ("L"), None without one.

    16-bit, 32-bit and floating values are scaled by the range they are stored in, not clipped. An
    embedded colour profile is applied, and a broken one left out.

    Raises:
        ValueError: Some values are not numbers.
    """
    profile = picture.info.get("icc_profile")
    alpha = None
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = _scaled(picture).convert("RGB")
    else:
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            alpha = picture.getchannel("A")
            picture = picture.convert("RGB")
        rgb = _in_srgb(picture, profile)
    # Else Pillow would write the old profile and rotation beside the new pixels.
    rgb.info = {}
    return rgb, alpha


def _scaled(picture: Image.Image) -> Image.Image:
    """Wide grey values in eight bits, by the narrowest usual range that holds them."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not numbers")
    low, high = float(values.min()), float(values.max())
    ranges = (1.0, 255.0, 65535.0) if picture.mode == "F" else (65535.0,)
    full = next((r for r in ranges if low >= 0 and high <= r), None)
    if full is None:  # no usual range: all of it
        values, full = values - low, high - low
    return Image.fromarray(np.rint(values / full * 255).astype(np.uint8))


def _in_srgb(picture: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if picture.mode == "P" or picture.mode == "1":
        picture = picture.convert("RGB")
    profile = None
    try:
        if picture.mode == "LAB":
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif icc_profile:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if profile is None or "srgb" in ImageCms.getProfileDescription(profile).lower():
            return picture.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("the embedded colour profile is broken and left out: %s", error)
        return picture.convert("RGB")
    assert converted is not None  # None is for changes in place
    return converted
