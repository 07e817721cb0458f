"""Subject addition: an object, or several alike, appear at named, free positions."""

from dataclasses import replace

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.scene import Scene, article, canonical, sample_scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, plural, where

COLOURED_SHARE = 0.3
"""Of the new objects: their colour is said."""
NUMBERS = {2: ("two", "两"), 3: ("three", "三")}


def scene_with_room(context: Context, width: int, height: int) -> Scene:
    """A scene of at most two objects."""
    count = int(context.rng.choice([0, 1, 2], p=[0.4, 0.45, 0.15]))
    return sample_scene(context.rng, context.atlas, width, height, num_objects=count)


def addition(context: Context, scene: Scene) -> Edit | None:
    """Add an object that the scene does not show yet where none stands, or one at each place."""
    free = [p for p in POSITIONS if all(p != placed.position for placed in scene.objects)]
    if not free:
        return None
    absent = [name for name in OBJECTS if all(name != placed.name for placed in scene.objects)]
    colour = context.pick(COLOURS) if context.happens(COLOURED_SHARE) else None
    name = context.pick(absent)
    several = len(free) > 1 and context.happens(context.variety.counts)
    count = int(context.rng.integers(2, len(free) + 1)) if several else 1
    chosen = context.rng.choice(free, count, replace=False)
    positions = [p for p in POSITIONS if p in chosen]  # as one reads, left to right
    added = tuple(canonical(name, position, colour) for position in positions)
    after = replace(scene, objects=(*scene.objects, *added))
    noun = f"{colour} {name}" if colour else name
    zh = (f"{COLOURS[colour].zh}的" if colour else "") + OBJECTS[name].zh
    en_where, zh_where = _places(positions)
    words = {
        "en": {"a_object": f"{article(noun)} {noun}", "where": en_where},
        "zh": {"object": zh, "where": zh_where},
    }
    if count == 1:
        return Edit(scene, after, "addition", words)
    words["en"] |= {"count": NUMBERS[count][0], "objects": plural(noun)}
    words["zh"] |= {"count": NUMBERS[count][1]}
    return Edit(scene, after, "addition_count", words)


def _places(positions: list[str]) -> tuple[str, str]:
    """Positions as English and Chinese say them one after the other."""
    en = [where(position) for position in positions]
    zh = [POSITIONS[position][0] for position in positions]
    if len(positions) == 1:
        return en[0], zh[0]
    return f"{', '.join(en[:-1])} and {en[-1]}", f"{'、'.join(zh[:-1])}和{zh[-1]}"
