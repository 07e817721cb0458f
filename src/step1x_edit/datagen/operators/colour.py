"""Colour alteration: an object takes another colour, its form and shading stay."""

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.referring import choose, refer, several_words, twins_of
from step1x_edit.datagen.scene import Scene
from step1x_edit.datagen.vocabulary import COLOURS


def colour(context: Context, scene: Scene) -> Edit | None:
    """Repaint one of the scene's objects, or all of a kind, in a colour that it does not have."""
    index = choose(context, scene)
    if index is None:
        return None
    twins = twins_of(scene, index)
    several = len(twins) > 1 and context.happens(context.variety.counts)
    repainted = twins if several else [index]
    present = {scene.objects[i].colour for i in repainted}
    wanted = context.pick(name for name in COLOURS if name not in present)
    after = scene
    for i in repainted:
        after = after.with_object(i, colour=wanted, material=None)
    name = scene.objects[index].name
    words = several_words(name) if several else refer(context, scene, index).words()
    words["en"]["colour"], words["zh"]["colour"] = wanted, COLOURS[wanted].zh
    return Edit(scene, after, "colour_all" if several else "colour", words)
