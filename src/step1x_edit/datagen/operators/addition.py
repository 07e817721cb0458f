"""Subject addition: an object appears at a named, free position."""

from dataclasses import replace

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.scene import article, canonical, sample_scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, where


def addition(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Add an object that the scene does not show yet, at a position where none stands."""
    scene = sample_scene(
        rng, atlas, width, height, num_objects=int(rng.choice([0, 1, 2], p=[0.4, 0.45, 0.15]))
    )
    free = [p for p in POSITIONS if all(p != placed.position for placed in scene.objects)]
    absent = [name for name in OBJECTS if all(name != placed.name for placed in scene.objects)]
    colour = str(rng.choice(list(COLOURS))) if rng.random() < 0.3 else None
    added = canonical(str(rng.choice(absent)), str(rng.choice(free)), colour)
    noun = f"{colour} {added.name}" if colour else added.name
    words = {
        "en": {
            "a_object": f"{article(noun)} {noun}",
            "where": where(added.position),
        },
        "zh": {
            "object": (f"{COLOURS[colour].zh}的" if colour else "") + OBJECTS[added.name].zh,
            "where": POSITIONS[added.position][0],
        },
    }
    return Edit(scene, replace(scene, objects=(*scene.objects, added)), "addition", words)
