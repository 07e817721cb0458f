"""Motion change: an object goes elsewhere, grows, shrinks, turns round, or falls over."""

from collections.abc import Mapping
from dataclasses import replace

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.referring import choose, refer
from step1x_edit.datagen.scene import PlacedObject, Scene
from step1x_edit.datagen.vocabulary import POSITIONS, where

GROWTH = 1.5
SHRINKAGE = 0.6
FACING = (
    "cat", "dog", "rabbit", "elephant", "duck", "fish", "turtle", "car", "bus", "bicycle", "boat",
    "guitar", "chair", "key", "shoe", "rocket", "umbrella",
)  # fmt: skip
"""What has a front that points to a side."""
LYING = (
    "cat", "dog", "rabbit", "elephant", "penguin", "duck", "tree", "cactus", "sunflower", "car",
    "bus", "bicycle", "boat", "house", "chair", "snowman", "robot", "teddy bear", "guitar", "bell",
    "clock", "rocket",
)  # fmt: skip
"""What has a top and a bottom."""
FEET = 0.5
"""Of an object's height: it grows, shrinks and falls over where it stands."""


def motion(context: Context, scene: Scene) -> Edit | None:
    """Move one of the scene's objects in one of six ways."""
    index = choose(context, scene)
    if index is None:
        return None
    placed = scene.objects[index]
    words = refer(context, scene, index).words()
    free = [p for p in POSITIONS if all(p != other.position for other in scene.objects)]
    kinds = ["bigger", "smaller"] + ["move"] * 3 * bool(free)
    kinds += ["turn_round"] * 2 * (placed.name in FACING)
    kinds += ["upside_down", "tip_over"] * (placed.name in LYING)
    kind = context.pick(kinds)
    if kind == "move":
        wanted = context.pick(free)
        words["en"]["where"] = where(wanted)
        words["en"]["to_where"] = f"to the {wanted}"
        words["zh"]["where"] = POSITIONS[wanted][0]
        changes = {"x": POSITIONS[wanted][1], "position": wanted}
    elif kind in ("bigger", "smaller"):
        changes = _resized(placed, GROWTH if kind == "bigger" else SHRINKAGE)
    elif kind == "turn_round":
        changes = {"flipped": not placed.flipped}
    else:
        changes = {"quarter_turns": 2 if kind == "upside_down" else 1}
    return Edit(scene, _moved(scene, index, changes), kind, words)


def _resized(placed: PlacedObject, factor: float) -> dict[str, float]:
    """The object's foot stays where it is."""
    return {"size": placed.size * factor, "y": placed.y + FEET * placed.size * (1 - factor)}


def _moved(scene: Scene, index: int, changes: Mapping[str, object]) -> Scene:
    """The object comes to the front, so that none hides what was asked for."""
    moved = scene.with_object(index, **changes).objects[index]
    return replace(scene, objects=(*scene.without(index).objects, moved))
