"""What an operator makes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.scene import Scene


@dataclass(frozen=True)
class Edit:
    """A scene before and after, and the words that go into the phrasing."""

    before: Scene
    after: Scene
    phrasing: str
    """One of `captions.KINDS`."""
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    """Language → slot → word."""
    finish: Callable[[Pixels], Pixels] | None = None
    """Applied to the target's pixels after rendering (tone edits)."""
    made_by: str | None = None
    """The model that made the target's pixels and its licence; None where a formula did."""


Operator = Callable[[np.random.Generator, Atlas, int, int], Edit]
"""(generator, atlas, width, height) → the edit."""
