"""Instructions beyond one edit: two at once, and those that change nothing."""

from dataclasses import replace

from step1x_edit.datagen.operators.base import Clause, Context, Edit, SceneEdit, Words
from step1x_edit.datagen.scene import Scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS

ABSENT = ("removal", "bigger", "smaller", "upside_down")
"""Kinds of edit that can be asked for of an object that is not there."""
REPAINTED_SHARE = 0.5
"""Of the empty requests where an object has a colour: it is asked for again."""


def followed(context: Context, first: Edit, second: SceneEdit) -> Edit:
    """`first`, then `second` of other objects in one instruction; `first` where that cannot be."""
    touched = set(first.before.objects) ^ set(first.after.objects)
    spared = frozenset(placed.name for placed in touched)
    then = second(replace(context, spared=spared), first.after)
    if then is None:
        return first
    clause = Clause(then.phrasing, then.words)
    return replace(first, after=then.after, finish=then.finish, spoil=then.spoil, second=clause)


def nothing(context: Context, scene: Scene) -> Edit:
    """An instruction that leaves the scene as it is.

    An object's own colour is asked for again, an object that is not there is to be edited, or
    nothing is asked for at all.
    """
    kind, words = _empty_request(context, scene)
    return Edit(scene, scene, kind, words, unchanged=True)


def _empty_request(context: Context, scene: Scene) -> tuple[str, Words]:
    names = [placed.name for placed in scene.objects]
    painted = [
        placed
        for placed in scene.objects
        if placed.colour is not None and placed.material is None and names.count(placed.name) == 1
    ]
    if painted and context.happens(REPAINTED_SHARE):
        placed = painted[int(context.rng.integers(len(painted)))]
        colour = str(placed.colour)
        return "colour", {
            "en": {"object": placed.name, "colour": colour},
            "zh": {"object": OBJECTS[placed.name].zh, "colour": COLOURS[colour].zh},
        }
    kind = context.pick((*ABSENT, "unchanged"))
    absent = context.pick(name for name in OBJECTS if name not in names)
    return kind, {"en": {"object": absent}, "zh": {"object": OBJECTS[absent].zh}}
