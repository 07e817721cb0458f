"""Read a picture of any common kind, upright and in sRGB, or say in one line why not.

``editor``, the doors and the benchmark call it before anything else is started.
"""

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from step1x_edit.errors import InvalidRequest
from step1x_edit.images.colours import split_colours

MAX_PIXELS = 200_000_000
# What people have, and nothing whose decoder runs another program or opens other files.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM"),
    *("TGA", "PCX", "ICO", "ICNS", "QOI", "PSD", "SGI", "DDS"),
)
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A picture as the user sees it.

    Attributes:
        rgb: Upright, eight-bit sRGB.
        alpha: Opacity, "L", of the same size; None for a kind of picture without.
        sha256: Of the file's bytes, or of the pixels where there was no file.
        name: The file's, or None.
    """

    rgb: Image.Image
    alpha: Image.Image | None
    sha256: str
    name: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.rgb.size

    @property
    def on_white(self) -> Image.Image:
        """RGB with what is transparent laid on white: what a model is shown."""
        if self.alpha is None:
            return self.rgb
        return Image.composite(self.rgb, Image.new("RGB", self.size, "white"), self.alpha)


def open_picture(
    source: Path | str | Image.Image, *, max_pixels: int | None = MAX_PIXELS
) -> Picture:
    """Read and check a picture.

    EXIF rotation is applied, colours are converted to eight-bit sRGB, alpha is set aside; of an
    animation the first frame is taken.

    Args:
        source: A file, or an opened picture.
        max_pixels: Largest picture that is decoded, checked before decoding, because a small file
            can hold a huge picture; None lifts the limit.

    Raises:
        InvalidRequest: The file is missing, a folder, empty, broken, no picture, or too large.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, "the picture", None, None, max_pixels)
    path = Path(source)
    data = _read_bytes(path)
    with _open_header(data, path) as opened:
        return _decoded(opened, str(path), path.name, data, max_pixels)


def _decoded(
    opened: Image.Image, label: str, name: str | None, data: bytes | None, max_pixels: int | None
) -> Picture:
    width, height = opened.size
    if not width or not height:
        raise InvalidRequest(f"{label} has {width} × {height} px: give a picture with pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise InvalidRequest(
            f"{label} has {width * height} pixels ({width} × {height}), over the limit of "
            f"{max_pixels}: shrink it, or raise max_pixels if you trust the file"
        )
    try:
        with _without_pillow_limit(width * height):
            opened.load()
            rgb, alpha = split_colours(ImageOps.exif_transpose(opened))
    except Exception as error:  # decoders of foreign bytes raise anything, OSError to KeyError
        raise InvalidRequest(
            f"{label} is broken or cut off ({_one_line(error)}): copy or export it again"
        ) from error
    if data is None:
        data = f"{opened.mode} {width}x{height} ".encode() + opened.tobytes()
    return Picture(rgb, alpha, hashlib.sha256(data).hexdigest(), name)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path}: no such file: check the path") from error
    except IsADirectoryError as error:
        raise InvalidRequest(f"{path} is a folder: give a picture file") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidRequest(f"{path} cannot be read ({reason}): check the path") from error
    if not data:
        raise InvalidRequest(f"{path} is empty (0 bytes): give a picture file")
    return data


def _open_header(data: bytes, path: Path) -> Image.Image:
    try:
        with _without_pillow_limit(None):
            return Image.open(io.BytesIO(data), formats=_readable())
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise InvalidRequest(
            f"{path} is no picture, or of none of the kinds {known}: export it as PNG or JPEG"
        ) from error
    except Exception as error:  # as in `_decoded`
        raise InvalidRequest(
            f"{path} is broken or cut off ({_one_line(error)}): copy or export it again"
        ) from error


def _readable() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _without_pillow_limit(num_pixels: int | None) -> Iterator[None]:
    """Lift Pillow's limit, a global, for a header (None) or for a picture that was let through."""
    if num_pixels is not None and num_pixels <= (Image.MAX_IMAGE_PIXELS or num_pixels):
        yield
        return
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
