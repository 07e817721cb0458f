"""Subject replacement: another object stands where one stood, as large and in the same place."""

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.referring import choose, refer
from step1x_edit.datagen.scene import Scene, article
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS

COLOURED_SHARE = 0.3
"""Of the new objects: their colour is said."""


def replacement(context: Context, scene: Scene) -> Edit | None:
    """Put an object that the scene does not show in the place of one that it does."""
    index = choose(context, scene)
    if index is None:
        return None
    new = context.pick(name for name in OBJECTS if all(name != p.name for p in scene.objects))
    colour = context.pick(COLOURS) if context.happens(COLOURED_SHARE) else None
    noun = f"{colour} {new}" if colour else new
    words = refer(context, scene, index).words()
    words["en"]["new_object"] = f"{article(noun)} {noun}"
    words["zh"]["new_object"] = (f"{COLOURS[colour].zh}的" if colour else "") + OBJECTS[new].zh
    after = scene.with_object(index, name=new, colour=colour, material=None)
    return Edit(scene, after, "replacement", words)
