"""Signs: boards with words on them, for edits of text. Called by `scene`."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.vocabulary import COLOURS

OVERSAMPLING = 3
TEXT_HEIGHT = 0.66
"""Of the letters, of the board's height."""
LEAST_CONTRAST = 0.5
"""Boards lighter than this carry black letters, darker ones white."""


@dataclass(frozen=True)
class Sign:
    """One board of a scene."""

    text: str
    """Latin or Chinese letters, not both."""
    x: float
    """Centre, as a fraction of the picture's width."""
    y: float
    """Centre, as a fraction of the picture's height."""
    size: float
    """Height of the board, as a fraction of the picture's shorter side."""
    width: float
    """Width of the board, as a fraction of the picture's width."""
    colour: str
    """Of the board; key of `vocabulary.COLOURS`."""
    position: str = "middle"

    @property
    def art(self) -> str:
        """The font, as ``folder/name`` of the atlas."""
        return f"fonts/{_font_name(self.text)}"


def draw_sign(sign: Sign, atlas: Atlas, size: tuple[int, ...]) -> Float[np.ndarray, "h w 4"]:
    """The board's straight-alpha RGBA in a picture of `size` (height, width)."""
    rows, columns = round(sign.size * min(size)), round(sign.width * size[1])
    rgb = COLOURS[sign.colour].rgb
    board = Image.new("RGBA", (columns * OVERSAMPLING, rows * OVERSAMPLING))
    pen = ImageDraw.Draw(board)
    fill = tuple(round(255 * value) for value in rgb)
    edge = tuple(round(150 * value) for value in rgb)
    corner = (board.width - 1, board.height - 1)
    pen.rounded_rectangle(
        ((0, 0), corner), board.height * 0.14, fill, edge, width=max(1, board.height // 18)
    )
    if sign.text:
        dark = np.dot(rgb, (0.299, 0.587, 0.114)) < LEAST_CONTRAST
        font = _fitting_font(sign.text, board.width * 0.9, board.height * TEXT_HEIGHT, atlas)
        ink = (250, 250, 250) if dark else (20, 20, 24)
        pen.text((board.width / 2, board.height / 2), sign.text, ink, font, anchor="mm")
    small = board.resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _fitting_font(
    text: str, width_px: float, height_px: float, atlas: Atlas
) -> ImageFont.FreeTypeFont:
    path = str(atlas.folder / "fonts" / f"{_font_name(text)}.woff2")
    largest = _font(path, max(6, round(height_px)))
    needed = largest.getlength(text)
    return (
        largest if needed <= width_px else _font(path, max(6, int(height_px * width_px / needed)))
    )


def _font_name(text: str) -> str:
    return "zcool-kuaile-latin" if text.isascii() else "zcool-kuaile-chinese-simplified"


_font = lru_cache(256)(ImageFont.truetype)
"""Reading the Chinese font costs tens of milliseconds."""
