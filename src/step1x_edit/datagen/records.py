"""The record of the data engine: one edit triplet with everything that is known about it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from step1x_edit.datagen.operators.base import Edit


@dataclass(frozen=True)
class Triplet:
    """Source, instruction, target."""

    category: str
    """Key of `operators.OPERATORS`."""
    source: UInt8[np.ndarray, "height width 3"]
    target: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    """Where source and target differ, to the pixel."""
    instructions: dict[str, str]
    """Language (en, zh) → the instruction."""
    captions: dict[str, str]
    """Language → what the target shows, for text to image; empty where it cannot be said."""
    edit: Edit
    """The scenes before and after, and the words of the instruction."""
    seed: int
    """The seed that makes this triplet again."""
