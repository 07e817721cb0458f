"""Write a finished picture with its provenance in the file's own metadata, and read that back.

``request`` saves results with it; the doors call `check_output` before they start a model.
"""

import contextlib
import errno
import io
import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, features

from step1x_edit.errors import InvalidRequest, Step1XEditError

logger = logging.getLogger(__name__)

# Suffix: Pillow's format, and how it is written: as near to the pixels as a lossy format gets.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"quality": 95}),
    ".avif": ("AVIF", {"quality": 90, "subsampling": "4:4:4"}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".bmp": ("BMP", {}),
}
if not features.check("avif"):  # Pillow built without it
    del FORMATS[".avif"]
SAVE_SUFFIXES = tuple(FORMATS)
MAX_SIDE_PX = {"JPEG": 65_535, "WEBP": 16_383, "AVIF": 65_535}
WITHOUT_ALPHA = ("JPEG", "BMP")
WITHOUT_METADATA = ("BMP",)

PNG_KEY = "step1x_edit"
# EXIF 2.32, UserComment: eight bytes name the character code. UTF-16 in Pillow's byte order.
UNICODE = b"UNICODE\0"


def check_output(path: Path, *, source: Path | None = None, overwrite: bool = False) -> None:
    """Refuse an output path before anything is computed.

    Args:
        path: Where the picture is to go. Another file there is replaced, as by ``cp``.
        source: The input picture, which is not replaced without ``overwrite``.
        overwrite: Allow that.

    Raises:
        InvalidRequest: Unknown suffix, missing folder, a folder of that name, or the input itself.
    """
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidRequest(f"{path}: unknown suffix {path.suffix!r}: give one of {known}")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder: give a file name")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent}: no such folder: make it first")
    if source is not None and not overwrite and _same_file(path, source):
        raise InvalidRequest(f"{path} is the input picture: pass --overwrite to replace it")


def save(image: Image.Image, path: Path, provenance_json: str) -> None:
    """Write a picture beside its place, then rename it: a kill leaves the old file or the new one.

    Args:
        image: RGB or RGBA. Formats without alpha get it over white, which is logged.
        path: Its suffix says the format.
        provenance_json: Kept in the file's metadata; logged where the format has none.

    Raises:
        InvalidRequest: See `check_output`; or the picture is too large for the format.
        Step1XEditError: The disk is full or the place cannot be written.
    """
    check_output(path)
    kind, options = FORMATS[path.suffix.lower()]
    if max(image.size) > MAX_SIDE_PX.get(kind, max(image.size)):
        raise InvalidRequest(
            f"{path}: {kind} holds at most {MAX_SIDE_PX[kind]} px a side, the picture is "
            f"{image.width} × {image.height} px: save it as .png"
        )
    if image.mode == "RGBA" and kind in WITHOUT_ALPHA:
        logger.warning("%s has no transparency: the picture is put on white", path.suffix)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    options = options | _metadata(kind, provenance_json, path.suffix)
    with _replacing(path) as beside:
        encoded = io.BytesIO()  # libtiff tells nobody that the disk is full
        image.save(encoded, format=kind, **options)
        beside.write_bytes(encoded.getvalue())


def read_provenance_json(path: Path) -> str | None:
    """The JSON that `save` put into a file; None where there is none, or no picture."""
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
            if isinstance(text, str):
                return text
            exif = image.getexif()
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            described = exif.get(ExifTags.Base.ImageDescription)
    except (OSError, ValueError, SyntaxError):
        return None
    if isinstance(described, str) and described.startswith(f'{{"{PNG_KEY}"'):
        return json.dumps(json.loads(described)[PNG_KEY])
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE):
        return None
    return comment.removeprefix(UNICODE).decode("utf-16-le", errors="replace")


def _metadata(kind: str, text: str, suffix: str) -> dict[str, Any]:
    if kind in WITHOUT_METADATA:
        logger.warning("%s keeps no metadata: the provenance is not in the file", suffix)
        return {}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(PNG_KEY, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    if kind == "TIFF":  # whose writer takes plain ASCII tags alone
        exif[ExifTags.Base.ImageDescription] = json.dumps({PNG_KEY: json.loads(text)})
        return {"exif": exif}
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = UNICODE + text.encode("utf-16-le")
    # As bytes: some writers take an Exif object of nothing but sub-folders for an empty one.
    return {"exif": exif.tobytes()}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to: moved there at the end, removed if that fails."""
    beside = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield beside
        beside.replace(path)
    except (OSError, ValueError) as error:  # the second: what the format cannot hold
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full: make room" if full else f"{error}: save it elsewhere"
        raise Step1XEditError(f"{path} cannot be written, {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _same_file(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)
