"""Background change: the objects stay, what is behind them becomes a named background."""

from dataclasses import replace

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import NAMED, named
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import sample_scene


def background(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Put another named background behind the scene's objects."""
    scene = sample_scene(rng, atlas, width, height)
    wanted = str(rng.choice([name for name in NAMED if name != scene.background_name]))
    drawn = named(wanted, atlas, width, height)
    after = replace(
        scene,
        background=drawn.pixels,
        background_name=wanted,
        background_source=drawn.source,
    )
    words = {"en": {"background": wanted}, "zh": {"background": NAMED[wanted].zh}}
    return Edit(scene, after, "background", words)
