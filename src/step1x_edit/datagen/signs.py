"""Signs: boards with words on them, for edits of text. Called by `scene`."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.vocabulary import COLOURS

OVERSAMPLING = 3
EM = 0.75
"""Size of the font, of the board's height; narrow boards take less."""
TEXT_WIDTH = 0.84
"""Of the words at most, of the board's width."""
TRACKING = 0.08
"""Between two letters, of the em: the typeface sets U and T so close that they touch."""
WEIGHT = 0.008
"""How much thicker than the typeface's the strokes are on each side, of the em: it is a thin one,
and small signs grow unreadable."""
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
        _write(pen, board.size, sign.text, (250, 250, 250) if dark else (20, 20, 24), atlas)
    small = board.resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _write(
    pen: ImageDraw.ImageDraw,
    board: tuple[int, int],
    text: str,
    ink: tuple[int, int, int],
    atlas: Atlas,
) -> None:
    """Write in the middle of a board of (width, height), as large as it goes."""
    path = font_path(atlas, text)
    em = round(board[1] * EM)
    needed = _places(text, _font(path, em))[-1]
    em = max(6, min(em, int(em * board[0] * TEXT_WIDTH / needed)))
    font = _font(path, em)
    *starts, length = _places(text, font)
    _, top, _, bottom = font.getbbox(text, anchor="ls")
    baseline = (board[1] - top - bottom) / 2
    for letter, start in zip(text, starts, strict=True):
        at = ((board[0] - length) / 2 + start, baseline)
        pen.text(at, letter, ink, font, anchor="ls", stroke_width=em * WEIGHT)


def _places(text: str, font: ImageFont.FreeTypeFont) -> list[float]:
    """Where each letter starts, and where the last one ends, in pixels."""
    steps = [font.getlength(letter) + TRACKING * font.size for letter in text]
    ends = list(accumulate(steps, initial=0.0))
    return [*ends[:-1], ends[-1] - TRACKING * font.size]


def font_path(atlas: Atlas, text: str) -> str:
    """The font that has the letters of `text`, Latin or Chinese ones."""
    return str(atlas.folder / "fonts" / f"{_font_name(text)}.woff2")


def _font_name(text: str) -> str:
    return "zcool-kuaile-latin" if text.isascii() else "zcool-kuaile-chinese-simplified"


_font = lru_cache(256)(ImageFont.truetype)
"""Reading the Chinese font costs tens of milliseconds."""
