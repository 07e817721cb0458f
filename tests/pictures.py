"""Makers of pictures for tests: detailed ones, odd files, and a stand-in for an autoencoder."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms
from scipy.fft import dctn, idctn

LUMA = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)
# Coefficients that an 8×8 block keeps, by frequency: 28 of brightness, 10 of each colour.
KEPT = (7, 4, 4)


def detailed(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A colourful picture in [0, 1] with structure of every size, down to the pixel."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cell, strength in ((256, 0.5), (64, 0.3), (16, 0.2), (4, 0.12), (1, 0.08)):
        size = (-(-width // cell) + 3, -(-height // cell) + 3)
        for channel in range(3):
            noise = rng.normal(size=size[::-1]).astype(np.float32)
            wide = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += strength * np.asarray(wide)
    return (0.5 + 0.28 * picture).clip(0.02, 0.98)


def disc(width: int, height: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """True inside a disc; centre and radius as shares of width, height and height."""
    y, x = np.mgrid[:height, :width]
    return np.hypot(x - centre[0] * width, y - centre[1] * height) < radius * height


def as_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(picture * 255).clip(0, 255).astype(np.uint8))


def small(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The picture as a model sees it, in [0, 1]."""
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / 255


def rendered(picture: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """What a lossy autoencoder makes of a picture: fine detail goes, errors of a block come.

    Args:
        picture: In [0, 1], sides multiples of 8.
        noise: Standard deviation of each kept coefficient's error; 0.05 is about 33 dB.
        seed: Of the errors.
    """
    rng = np.random.default_rng(seed)
    height, width, _ = picture.shape
    blocks = (picture @ LUMA.T).reshape(height // 8, 8, width // 8, 8, 3).transpose(0, 2, 4, 1, 3)
    kept = np.add.outer(np.arange(8), np.arange(8)) < np.array(KEPT)[:, None, None]
    values = dctn(blocks, axes=(-2, -1), norm="ortho")
    values = (values + noise * rng.normal(size=values.shape)) * kept
    blocks = idctn(values, axes=(-2, -1), norm="ortho").transpose(0, 3, 1, 4, 2)
    return (blocks.reshape(height, width, 3) @ np.linalg.inv(LUMA).T).clip(0, 1).astype(np.float32)


def png_of(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG put together by hand, for what Pillow does not write: 16-bit colour, lying headers."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def sixteen_bit_colour(values: np.ndarray) -> bytes:
    """A 16-bit RGB PNG of (h, w, 3) values up to 65,535."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(width, height, 16, 2, rows)


def bomb(side: int = 60_000) -> bytes:
    """A small PNG that says it is huge."""
    return png_of(side, side, 8, 2, b"\0" * 100)


def profile_that_swaps_red_and_blue() -> bytes:
    """A valid RGB profile that is not sRGB: its red and blue primaries have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("sRGB", "s\0R\0G\0B"):  # the description, in either of the two kinds of text
        profile = profile.replace(name.encode(), name.replace("s", "w").encode())
    swapped = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    (count,) = struct.unpack(">I", profile[128:132])
    tags = [profile[132 + 12 * i : 144 + 12 * i] for i in range(count)]
    table = b"".join(swapped.get(tag[:4], tag[:4]) + tag[4:] for tag in tags)
    return profile[:132] + table + profile[132 + 12 * count :]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
