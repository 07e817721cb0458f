"""Material modification: an object becomes one of gold, wood, glass …; its form stays."""

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.materials import MATERIALS
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.vocabulary import OBJECTS


def material(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Make one of the scene's objects of a named material."""
    scene = sample_scene(rng, atlas, width, height)
    index = int(rng.integers(len(scene.objects)))
    name, wanted = scene.objects[index].name, str(rng.choice(list(MATERIALS)))
    words = {
        "en": {"object": name, "material": MATERIALS[wanted].en},
        "zh": {"object": OBJECTS[name].zh, "material": MATERIALS[wanted].zh},
    }
    return Edit(scene, scene.with_object(index, material=wanted), "material", words)
