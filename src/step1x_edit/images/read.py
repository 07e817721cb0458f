"""Read a picture of any common kind, upright and in sRGB, or say in one line why not."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from step1x_edit.errors import InvalidRequest

MAX_PIXELS = 178_956_970
"""Limit against decompression bombs, Pillow's own; a caller may set another, or none."""


@dataclass(frozen=True)
class Picture:
    """A picture as the user sees it."""

    rgb: Image.Image
    alpha: Image.Image | None
    """Mode L; None where the picture is opaque."""
    sha256: str
    """Of the file's bytes, or of the pixels where there was no file."""
    name: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.rgb.size


def open_picture(
    source: Path | str | Image.Image, *, max_pixels: int | None = MAX_PIXELS
) -> Picture:
    """Read and check a picture.

    EXIF rotation is applied, an embedded colour profile turned into sRGB, alpha set aside; of an
    animation the first frame is taken; 16-bit and float values are scaled, not clipped.

    Args:
        source: A file, or an opened picture.
        max_pixels: Largest picture that is decoded; None lifts the limit.

    Raises:
        InvalidRequest: The file is missing, empty, broken, no picture, or too large.
    """
    if isinstance(source, Image.Image):
        rgb, alpha = _to_rgb(ImageOps.exif_transpose(source))
        digest = hashlib.sha256(rgb.tobytes() + (alpha.tobytes() if alpha else b"")).hexdigest()
        return Picture(rgb, alpha, digest)
    path = Path(source)
    data = _read_bytes(path)
    with _open(data, path, max_pixels) as image:
        try:
            image.load()
            rgb, alpha = _to_rgb(ImageOps.exif_transpose(_in_srgb(image)))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            reason = f"{path}: the picture is broken or cut off ({error}): get it again"
            raise InvalidRequest(reason) from error
    return Picture(rgb, alpha, hashlib.sha256(data).hexdigest(), path.name)


def open_mask(
    source: Path | str | Image.Image, picture: Picture, *, max_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """Read a mask: white where the edit may change something. Mode L, of the picture's size.

    Raises:
        InvalidRequest: It cannot be read, or has another size than the picture.
    """
    mask = open_picture(source, max_pixels=max_pixels)
    if mask.size != picture.size:
        raise InvalidRequest(
            f"mask of {mask.size[0]} × {mask.size[1]} px for a picture of "
            f"{picture.size[0]} × {picture.size[1]} px: give one of the same size"
        )
    return mask.rgb.convert("L")


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InvalidRequest(f"{path} is a folder: give a picture file") from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise InvalidRequest(f"{path} is empty (0 bytes): give a picture file")
    return data


def _open(data: bytes, path: Path, max_pixels: int | None) -> Image.Image:
    """The picture behind its header, its size checked before anything is decoded."""
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns up to twice its value, and ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"{path} is no picture of a kind that Pillow reads") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(f"{path}: the picture is broken ({error}): get it again") from error
    width, height = image.size
    if not width or not height:
        raise InvalidRequest(f"{path} has {width} × {height} px: give a picture with pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise InvalidRequest(
            f"{path} has {width * height} pixels ({width} × {height}), over the limit of "
            f"{max_pixels}: raise the limit if you trust the file"
        )
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded RGB or grey profile in sRGB; a broken profile is left out."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        opaque = image.convert("RGB") if alpha is not None else image
        turned = ImageCms.profileToProfile(
            opaque, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    assert turned is not None
    turned.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    if alpha is not None:
        turned.putalpha(alpha)
    return turned


def _to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Eight-bit RGB and, where the picture has transparency, its alpha."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image).convert("RGB"), None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        whole = image.convert("RGBA")
        alpha = whole.getchannel("A")
        opaque = alpha.getextrema() == (255, 255)
        return whole.convert("RGB"), None if opaque else alpha
    return image.convert("RGB"), None


def _scaled(image: Image.Image) -> Image.Image:
    """Sixteen-bit, 32-bit and float values in eight bits.

    Integers run to 65,535 unless they are all below 256; floats to 1 unless some are above.
    """
    values = np.asarray(image, np.float64)
    top = float(np.nanmax(values)) if values.size else 0.0
    if image.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0
    else:
        full = 255.0 if top <= 255 and image.mode == "I" else 65535.0
    return Image.fromarray(
        (np.nan_to_num(values) / full * 255).clip(0, 255).round().astype(np.uint8)
    )
