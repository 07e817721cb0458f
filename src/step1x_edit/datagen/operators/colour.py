"""Colour alteration: an object takes another colour, its form and shading stay."""

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS


def colour(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Repaint one of the scene's objects in a colour that it does not have."""
    scene = sample_scene(rng, atlas, width, height)
    index = int(rng.integers(len(scene.objects)))
    placed = scene.objects[index]
    wanted = str(rng.choice([name for name in COLOURS if name != placed.colour]))
    words = {
        "en": {"object": placed.name, "colour": wanted},
        "zh": {"object": OBJECTS[placed.name].zh, "colour": COLOURS[wanted].zh},
    }
    return Edit(scene, scene.with_object(index, colour=wanted), "colour", words)
