"""The shipped art of the data engine: sprites of named objects, panoramas, photographs.

`Atlas` reads each file once and hands out float arrays; `atlas_build` makes the files. Called by
the scene renderer.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from step1x_edit.errors import Step1XEditError

ATLAS_DIR = Path(__file__).parent.parent / "assets" / "atlas"

PANORAMAS = (
    "apartment", "bridge", "city", "dawn", "esplanade", "forest", "hall", "lab", "lobby", "night",
    "park", "sky", "studio", "sunrise", "sunset", "venice", "warehouse", "workshop",
)  # fmt: skip


class Atlas:
    """Lazily read art. One instance per process; reading is cached per file and size.

    Args:
        folder: The atlas folder that `atlas_build.build` wrote.
    """

    def __init__(self, folder: Path = ATLAS_DIR) -> None:
        self.folder = folder
        self.sprite = lru_cache(maxsize=2048)(self._sprite)
        self.layer = lru_cache(maxsize=128)(self._layer)
        self.panorama = lru_cache(maxsize=64)(self._panorama)
        self.photograph = lru_cache(maxsize=64)(self._photograph)
        self.photograph_names = sorted(path.stem for path in (folder / "photographs").glob("*.jpg"))

    def _sprite(
        self, name: str, height_px: int, kind: str = "objects"
    ) -> Float[np.ndarray, "height width 4"]:
        """The object's straight-alpha RGBA in [0, 1], scaled to fit a square of `height_px`.

        `kind` is the folder: "objects", or "flat" for the same things drawn flat in the same box.
        """
        with self._open(kind, f"{name.replace(' ', '_')}.webp") as file:
            sprite = file.convert("RGBA")
        return fit(_premultiplied(sprite), height_px)

    def _layer(self, name: str, side_px: int) -> Float[np.ndarray, "height width 4"]:
        """A part of a portrait: premultiplied RGBA in [0, 1], its longer side `side_px`.

        All parts have one shape and lie over one another.
        """
        with self._open("portraits", f"{name.replace(' ', '_')}.webp") as file:
            return scaled(_premultiplied(file.convert("RGBA")), side_px)

    def _panorama(self, name: str) -> Float[np.ndarray, "height width 3"]:
        return self._rgb("panoramas", name)

    def _photograph(self, name: str) -> Float[np.ndarray, "height width 3"]:
        return self._rgb("photographs", name)

    def _rgb(self, kind: str, name: str) -> Float[np.ndarray, "height width 3"]:
        with self._open(kind, f"{name}.jpg") as file:
            return np.asarray(file.convert("RGB"), np.float32) / 255

    def _open(self, kind: str, name: str) -> Image.Image:
        path = self.folder / kind / name
        try:
            return Image.open(path)
        except FileNotFoundError as error:
            raise Step1XEditError(f"{path} is missing: install the package again") from error


def fit(
    premultiplied: Float[np.ndarray, "height width 4"], side_px: int
) -> Float[np.ndarray, "rows columns 4"]:
    """Scale a premultiplied drawing to fit a square; the result has straight alpha."""
    return straight(scaled(premultiplied, side_px))


def scaled(
    premultiplied: Float[np.ndarray, "height width 4"], side_px: int
) -> Float[np.ndarray, "rows columns 4"]:
    """Scale a premultiplied drawing to fit a square.

    Premultiplied, so that transparent pixels lend no colour to the rim.
    """
    height, width = premultiplied.shape[:2]
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    channels = [
        np.asarray(Image.fromarray(premultiplied[..., c]).resize(size, Image.Resampling.BOX))
        for c in range(4)
    ]
    return np.stack(channels, -1)


def straight(
    premultiplied: Float[np.ndarray, "height width 4"],
) -> Float[np.ndarray, "height width 4"]:
    """The drawing with its colours no longer multiplied by its opacity."""
    pixels = premultiplied.copy()
    pixels[..., :3] /= np.maximum(pixels[..., 3:], 1e-4)
    return pixels.clip(0, 1)


def _premultiplied(picture: Image.Image) -> Float[np.ndarray, "height width 4"]:
    pixels = np.asarray(picture, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels
