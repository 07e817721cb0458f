"""Write a finished picture with its provenance in the file's own metadata, and read that back."""

import errno
import logging
import os
from pathlib import Path

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from step1x_edit.errors import InvalidRequest, Step1XEditError

logger = logging.getLogger(__name__)

KEY = "step1x_edit"
"""PNG text key, and the marker in front of the JSON elsewhere."""
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
SAVE_SUFFIXES = tuple(FORMATS)
"""File name suffixes that `save` knows."""
OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90},
    "TIFF": {"compression": "tiff_deflate"},
}
WITHOUT_ALPHA = ("JPEG", "BMP")
WITHOUT_METADATA = ("BMP",)


def check_output(path: Path, *, source: Path | None = None, overwrite: bool = False) -> None:
    """Refuse an output path before anything is computed.

    Args:
        path: Where the picture is to go. Another file there is replaced, as by `cp`.
        source: The input picture, which is not replaced without `overwrite`.
        overwrite: Allow that.

    Raises:
        InvalidRequest: Unknown suffix, missing folder, or the input itself.
    """
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidRequest(f"{path}: unknown suffix {path.suffix!r}: give one of {known}")
    if FORMATS[path.suffix.lower()] not in _writable():
        raise InvalidRequest(f"{path}: this Pillow cannot write {path.suffix}: choose .png")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder: give a file name")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent}: no such folder: make it first")
    if source is not None and not overwrite and _same_file(path, source):
        raise InvalidRequest(f"{path} is the input picture: pass --overwrite to replace it")


def save(image: Image.Image, path: Path, provenance_json: str) -> None:
    """Write a picture beside its place, then rename it: a kill leaves the old file or the new one.

    Args:
        image: RGB or RGBA. Formats without alpha get it over white.
        path: Its suffix says the format.
        provenance_json: Kept in the file's metadata.

    Raises:
        InvalidRequest: See `check_output`.
        Step1XEditError: The disk is full or the place cannot be written.
    """
    check_output(path)
    kind = FORMATS[path.suffix.lower()]
    if image.mode == "RGBA" and kind in WITHOUT_ALPHA:
        logger.warning("%s has no transparency: the picture is put on white", path.suffix)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    options = OPTIONS.get(kind, {}) | _metadata(kind, provenance_json, path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            image.save(file, format=kind, **options)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise Step1XEditError(f"{path} cannot be written: {reason}; nothing was changed") from error
    finally:
        beside.unlink(missing_ok=True)


def read_provenance_json(path: Path) -> str | None:
    """The JSON that `save` put into a file, or None."""
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
            if isinstance(text, str):
                return text
            comment = image.getexif().get(ExifTags.Base.ImageDescription)
    except (OSError, ValueError, ValidationError):
        return None
    if not isinstance(comment, str) or not comment.startswith(f"{KEY} "):
        return None
    return comment.removeprefix(f"{KEY} ").encode("ascii").decode("unicode_escape")


def _metadata(kind: str, text: str, path: Path) -> dict[str, object]:
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt(KEY, text)
        return {"pnginfo": info}
    if kind in WITHOUT_METADATA:
        logger.warning("%s keeps no metadata: the provenance is not in the file", path.suffix)
        return {}
    exif = Image.Exif()
    # EXIF text is ASCII: other letters travel as escapes.
    exif[ExifTags.Base.ImageDescription] = f"{KEY} {text.encode('unicode_escape').decode('ascii')}"
    return {"exif": exif}


def _writable() -> set[str]:
    Image.init()
    return set(Image.SAVE)


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
