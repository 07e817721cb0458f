"""Subject replacement: another object stands where one stood, as large and in the same place."""

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import article, sample_scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS

COLOURED_SHARE = 0.3
"""Of the new objects: their colour is said."""


def replacement(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Put an object that the scene does not show in the place of one that it does."""
    scene = sample_scene(rng, atlas, width, height)
    index = int(rng.integers(len(scene.objects)))
    old = scene.objects[index]
    absent = [name for name in OBJECTS if all(name != placed.name for placed in scene.objects)]
    new = str(rng.choice(absent))
    colour = str(rng.choice(list(COLOURS))) if rng.random() < COLOURED_SHARE else None
    noun = f"{colour} {new}" if colour else new
    words = {
        "en": {"object": old.name, "new_object": f"{article(noun)} {noun}"},
        "zh": {
            "object": OBJECTS[old.name].zh,
            "new_object": (f"{COLOURS[colour].zh}的" if colour else "") + OBJECTS[new].zh,
        },
    }
    after = scene.with_object(index, name=new, colour=colour)
    return Edit(scene, after, "replacement", words)
