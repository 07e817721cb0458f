"""Background change: the objects stay, what is behind them becomes a named background."""

from dataclasses import replace

from step1x_edit.datagen.backgrounds import NAMED, named
from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.scene import Scene


def background(context: Context, scene: Scene) -> Edit:
    """Put another named background behind the scene's objects."""
    wanted = context.pick(name for name in NAMED if name != scene.background_name)
    height, width = scene.background.shape[:2]
    drawn = named(wanted, context.atlas, width, height)
    after = replace(
        scene,
        background=drawn.pixels,
        background_name=wanted,
        background_source=drawn.source,
    )
    words = {"en": {"background": wanted}, "zh": {"background": NAMED[wanted].zh}}
    return Edit(scene, after, "background", words)
