"""The shipped art of the data engine: sprites of named objects, panoramas, photographs.

`Atlas` reads each file once and hands out float arrays; `atlas_build` makes the files. Called by
the scene renderer.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

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
        with Image.open(self.folder / kind / f"{name.replace(' ', '_')}.webp") as file:
            sprite = file.convert("RGBA")
        return fit(_premultiplied(sprite), height_px)

    def _layer(self, name: str) -> Float[np.ndarray, "height width 4"]:
        """A part of a portrait: premultiplied RGBA in [0, 1]; all parts have one size."""
        with Image.open(self.folder / "portraits" / f"{name.replace(' ', '_')}.webp") as file:
            return _premultiplied(file.convert("RGBA"))

    def _panorama(self, name: str) -> Float[np.ndarray, "height width 3"]:
        return self._rgb(self.folder / "panoramas" / f"{name}.jpg")

    def _photograph(self, name: str) -> Float[np.ndarray, "height width 3"]:
        return self._rgb(self.folder / "photographs" / f"{name}.jpg")

    @staticmethod
    def _rgb(path: Path) -> Float[np.ndarray, "height width 3"]:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"), np.float32) / 255


def fit(
    premultiplied: Float[np.ndarray, "height width 4"], side_px: int
) -> Float[np.ndarray, "rows columns 4"]:
    """Scale a premultiplied drawing to fit a square; the result has straight alpha.

    Premultiplied while scaling, so that transparent pixels lend no colour to the rim.
    """
    height, width = premultiplied.shape[:2]
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    channels = [
        np.asarray(Image.fromarray(premultiplied[..., c]).resize(size, Image.Resampling.BOX))
        for c in range(4)
    ]
    scaled = np.stack(channels, -1)
    scaled[..., :3] /= np.maximum(scaled[..., 3:], 1e-4)
    return scaled.clip(0, 1)


def _premultiplied(picture: Image.Image) -> Float[np.ndarray, "height width 4"]:
    pixels = np.asarray(picture, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels
