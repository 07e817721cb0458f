"""Subject removal: an object and its shadow go, and what was behind them shows."""

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.vocabulary import OBJECTS


def removal(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Remove one of the scene's objects, named by what it is."""
    scene = sample_scene(rng, atlas, width, height)
    index = int(rng.integers(len(scene.objects)))
    name = scene.objects[index].name
    words = {"en": {"object": name}, "zh": {"object": OBJECTS[name].zh}}
    return Edit(scene, scene.without(index), "removal", words)
