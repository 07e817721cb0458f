"""Subject removal: an object and its shadow go, and what was behind them shows."""

from dataclasses import replace

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.referring import choose, refer, several_words, twins_of
from step1x_edit.datagen.scene import Scene


def removal(context: Context, scene: Scene) -> Edit | None:
    """Remove one of the scene's objects, or all of a kind."""
    index = choose(context, scene)
    if index is None:
        return None
    twins = twins_of(scene, index)
    if len(twins) > 1 and context.happens(context.variety.counts):
        rest = tuple(placed for i, placed in enumerate(scene.objects) if i not in twins)
        words = several_words(scene.objects[index].name)
        return Edit(scene, replace(scene, objects=rest), "removal_all", words)
    return Edit(scene, scene.without(index), "removal", refer(context, scene, index).words())
