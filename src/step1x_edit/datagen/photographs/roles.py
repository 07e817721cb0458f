"""The parts that make triplets from photographs, as roles: anything with the methods will do.

`classical` has parts that need no model, `neural`, `painting` and `mllm` those that run one. A
part's `name` goes into every record that it helped to make. The roles of the filters stand in
`datagen.filters`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from step1x_edit.datagen.backgrounds import Picture

Mask = Bool[np.ndarray, "height width"]
Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels; bottom and right are outside."""


class Unsuitable(Exception):
    """A photograph does not lend itself to an edit; the message is the reason that is counted."""


@dataclass(frozen=True)
class Found:
    """One thing in a photograph."""

    box: Box
    score: float
    """Confidence in [0, 1]."""
    en: str | None = None
    """What it is, without an article; None where the part cannot say."""
    zh: str | None = None


@dataclass(frozen=True)
class FoundText:
    """Words in a photograph."""

    box: Box
    text: str


@runtime_checkable
class Detector(Protocol):
    """Finds things and says what they are."""

    name: str

    def find(self, picture: Picture) -> list[Found]:
        """What is in the picture, the surest first."""
        ...


@runtime_checkable
class Segmenter(Protocol):
    """Cuts a thing out."""

    name: str

    def cut(self, picture: Picture, box: Box) -> Mask:
        """The pixels of the thing in `box`."""
        ...


@runtime_checkable
class Inpainter(Protocol):
    """Fills a hole with what might be behind it."""

    name: str

    def fill(self, picture: Picture, hole: Mask) -> Picture:
        """The picture without the pixels of `hole`; the others stay as they are.

        Raises:
            Unsuitable: The part sees that it cannot do it well.
        """
        ...


@runtime_checkable
class Painter(Protocol):
    """Paints what a prompt says into a part of a picture."""

    name: str

    def paint(self, picture: Picture, where: Mask, prompt: str, seed: int) -> Picture:
        """The picture with the pixels of `where` painted; the others stay as they are."""
        ...


@runtime_checkable
class DepthEstimator(Protocol):
    """Says how far away things are."""

    name: str

    def depth(self, picture: Picture) -> Float[np.ndarray, "height width"]:
        """0 is the farthest place, 1 the nearest."""
        ...


@runtime_checkable
class DepthPainter(Protocol):
    """Paints a whole picture of a given form."""

    name: str

    def paint(self, depth: Float[np.ndarray, "height width"], prompt: str, seed: int) -> Picture:
        """A picture of the depth's size that `prompt` describes."""
        ...


@runtime_checkable
class TextFinder(Protocol):
    """Finds words."""

    name: str

    def find(self, picture: Picture) -> list[FoundText]:
        """The lines of text, the surest first."""
        ...


@runtime_checkable
class FlowEstimator(Protocol):
    """Says where everything of a video frame went."""

    name: str

    def flow(self, before: Picture, after: Picture) -> Float[np.ndarray, "height width 2"]:
        """Pixels to the right and down, for each pixel of `before`."""
        ...


@runtime_checkable
class Captioner(Protocol):
    """Writes the instruction of an edit from its two pictures."""

    name: str

    def write(self, source: Picture, target: Picture, draft: dict[str, str]) -> dict[str, str]:
        """Language (en, zh) → instruction.

        Args:
            source: Before the edit.
            target: After it.
            draft: Language → an instruction that says it in other words.

        Raises:
            Unsuitable: No instruction came of it.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """The parts that a run has; edits that miss one are not made, or made by a formula."""

    detector: Detector
    segmenter: Segmenter
    inpainter: Inpainter
    text_finder: TextFinder | None = None
    """None: no text edits."""
    painter: Painter | None = None
    """None: new objects are drawn ones, new backgrounds those of the atlas."""
    depth: DepthEstimator | None = None
    depth_painter: DepthPainter | None = None
    """None, or no depth: colours and materials are formulas."""
    flow: FlowEstimator | None = None
    """None: no motion from pairs of frames."""
    captioner: Captioner | None = None
    """None: the wordings of `captions`."""
