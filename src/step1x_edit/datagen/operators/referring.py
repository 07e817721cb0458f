"""How an instruction says which object it means: by name, place, colour or size."""

from typing import NamedTuple

from step1x_edit.datagen.operators.base import Context, Words
from step1x_edit.datagen.scene import PlacedObject, Scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, plural, where

CLEARLY_LARGER = 1.2
"""Times as large: anybody sees which one is meant."""
NAMELESS = ("object", "物体")
GENERIC_SHARE = 0.2
"""Of the references to an object that has no twin: "the object on the left"."""


class Noun(NamedTuple):
    """What an object is called, without an article."""

    en: str
    zh: str

    def words(self) -> Words:
        """As the slot ``object``."""
        return {"en": {"object": self.en}, "zh": {"object": self.zh}}


def choose(context: Context, scene: Scene) -> int | None:
    """The index of an object that may be edited; None where there is none."""
    free = [i for i, placed in enumerate(scene.objects) if placed.name not in context.spared]
    return int(context.rng.choice(free)) if free else None


def twins_of(scene: Scene, index: int) -> list[int]:
    """The indices of all objects with this one's name, itself among them."""
    name = scene.objects[index].name
    return [i for i, placed in enumerate(scene.objects) if placed.name == name]


def several_words(name: str) -> Words:
    """The slots of an edit of all objects of one name."""
    return {"en": {"objects": plural(name)}, "zh": {"object": OBJECTS[name].zh}}


def refer(context: Context, scene: Scene, index: int) -> Noun:
    """A noun that fits this object and no other one of the scene.

    Its bare name where that is enough, unless the variety asks for more.
    """
    placed = scene.objects[index]
    others = [other for i, other in enumerate(scene.objects) if i != index]
    twins = [other for other in others if other.name == placed.name]
    if not twins and not context.happens(context.variety.referring):
        return Noun(placed.name, OBJECTS[placed.name].zh)
    if not twins and context.happens(GENERIC_SHARE):
        nouns = _by_place(placed, *NAMELESS) + _by_size(placed, others, *NAMELESS)
    else:
        nouns = descriptions(placed, twins)
    return nouns[int(context.rng.integers(len(nouns)))]


def descriptions(placed: PlacedObject, twins: list[PlacedObject]) -> list[Noun]:
    """Every noun of this vocabulary that tells an object from others of its name."""
    en, zh = placed.name, OBJECTS[placed.name].zh
    places = _by_place(placed, en, zh)
    if twins and placed.position != "middle":
        places.append(Noun(f"{placed.position} {en}", f"{POSITIONS[placed.position][0]}那个{zh}"))
    return places + _by_colour(placed, twins) + _by_size(placed, twins, en, zh)


def _by_place(placed: PlacedObject, en: str, zh: str) -> list[Noun]:
    """No two objects of a scene have one position."""
    return [Noun(f"{en} {where(placed.position)}", f"{POSITIONS[placed.position][0]}的{zh}")]


def _by_colour(placed: PlacedObject, twins: list[PlacedObject]) -> list[Noun]:
    """An untinted twin may have any colour by itself."""
    seen = placed.colour is not None and placed.material is None
    if not seen or any(t.colour in (None, placed.colour) or t.material for t in twins):
        return []
    colour = COLOURS[str(placed.colour)].zh
    return [Noun(f"{placed.colour} {placed.name}", f"{colour}的{OBJECTS[placed.name].zh}")]


def _by_size(placed: PlacedObject, others: list[PlacedObject], en: str, zh: str) -> list[Noun]:
    sizes = [other.size for other in others]
    of_two = len(others) == 1
    if others and placed.size > CLEARLY_LARGER * max(sizes):
        return [
            Noun(f"bigger {en}", f"较大的{zh}") if of_two else Noun(f"biggest {en}", f"最大的{zh}")
        ]
    if others and placed.size * CLEARLY_LARGER < min(sizes):
        return [
            Noun(f"smaller {en}", f"较小的{zh}")
            if of_two
            else Noun(f"smallest {en}", f"最小的{zh}")
        ]
    return []
