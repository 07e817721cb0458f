"""The scene graph: a background and placed objects, rendered to exact pixels.

Source and target of a triplet are two renderings of almost the same graph, so they agree bit for
bit wherever nothing was changed, shadows and occlusion included. Operators change the graph;
`render` draws it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import NAMED, PROCEDURAL, Pixels, sample
from step1x_edit.datagen.materials import made_of
from step1x_edit.datagen.portraits import Portrait, draw_portrait
from step1x_edit.datagen.signs import Sign, draw_sign
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, where

CANONICAL_SIZE = 0.42
CANONICAL_HEIGHT = 0.62
TINTED_SHARE = 0.35
SHADOW_OPACITY = 0.38


@dataclass(frozen=True)
class PlacedObject:
    """One object of a scene."""

    name: str
    """Key of `vocabulary.OBJECTS`."""
    x: float
    """Centre, as a fraction of the picture's width."""
    y: float
    """Centre, as a fraction of the picture's height."""
    size: float
    """Longer side, as a fraction of the picture's shorter side."""
    colour: str | None = None
    """Key of `vocabulary.COLOURS`; None leaves the drawing's own colours."""
    position: str = "middle"
    """Key of `vocabulary.POSITIONS`: where a person would say that it stands."""
    material: str | None = None
    """Key of `materials.MATERIALS`; it hides the colour."""
    flipped: bool = False
    """Left and right are exchanged."""
    quarter_turns: int = 0
    """Counter-clockwise."""
    drawing: Literal["objects", "flat"] = "objects"
    """The folder of the atlas: round and shaded, or flat and without a shadow."""


Item = PlacedObject | Sign | Portrait


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `background` has the picture's size."""

    background: Pixels
    background_name: str | None
    objects: tuple[PlacedObject, ...]
    background_source: str = PROCEDURAL
    """The art that it was made from, as ``folder/name`` of the atlas."""
    signs: tuple[Sign, ...] = ()
    """In front of the objects."""
    portraits: tuple[Portrait, ...] = ()
    """Behind the objects."""

    def without(self, index: int) -> "Scene":
        """The same scene with one object gone."""
        return replace(self, objects=self.objects[:index] + self.objects[index + 1 :])

    def to_json(self) -> dict[str, Any]:
        """All but the background's pixels, as plain values."""
        return {
            "background": self.background_name,
            "background_source": self.background_source,
            "objects": [asdict(placed) for placed in self.objects],
            "signs": [asdict(sign) for sign in self.signs],
            "portraits": [asdict(person) for person in self.portraits],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Scene":
        """A scene without pixels from what `to_json` gave."""
        return cls(
            np.zeros((0, 0, 3), np.float32),
            values["background"],
            tuple(PlacedObject(**placed) for placed in values["objects"]),
            values["background_source"],
            tuple(Sign(**sign) for sign in values["signs"]),
            tuple(Portrait(**person) for person in values["portraits"]),
        )

    def art(self) -> set[str]:
        """The art that the scene shows, as ``folder/name`` of the atlas."""
        drawn = {f"{placed.drawing}/{placed.name}" for placed in self.objects}
        drawn |= {item.art for item in (*self.signs, *self.portraits)}
        return drawn | ({self.background_source} - {PROCEDURAL})

    def with_object(self, index: int, **changes: object) -> "Scene":
        """The same scene with one object's fields changed."""
        changed = replace(self.objects[index], **changes)  # pyright: ignore[reportArgumentType] - forwarded field names
        return replace(self, objects=(*self.objects[:index], changed, *self.objects[index + 1 :]))


def canonical(name: str, position: str, colour: str | None = None) -> PlacedObject:
    """Where an added object stands, so that its place and size follow from the instruction."""
    return PlacedObject(
        name, POSITIONS[position][1], CANONICAL_HEIGHT, CANONICAL_SIZE, colour, position
    )


def sample_scene(
    rng: np.random.Generator,
    atlas: Atlas,
    width: int,
    height: int,
    num_objects: int | None = None,
    twins: float = 0,
) -> Scene:
    """A random scene, no two objects in one place.

    Args:
        rng: Source of chance.
        atlas: The art.
        width: In pixels.
        height: In pixels.
        num_objects: 0 to 3; None draws 1 to 3.
        twins: Probability that two objects (where there are two) are of one kind.
    """
    background = sample(rng, atlas, width, height)
    count = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15])) if num_objects is None else num_objects
    names = rng.choice(list(OBJECTS), size=count, replace=False)
    if count > 1 and rng.random() < twins:
        names[1] = names[0]
    positions = rng.permutation(list(POSITIONS))[:count]
    placed = []
    for name, position in zip(names, positions, strict=True):
        spot = canonical(str(name), str(position), _maybe_colour(rng))
        if rng.random() < 0.7:
            spot = replace(
                spot,
                x=spot.x + rng.uniform(-0.05, 0.05),
                y=spot.y + rng.uniform(-0.16, 0.10),
                size=float(rng.uniform(0.32, 0.50)),
            )
        placed.append(spot)
    return Scene(background.pixels, background.name, tuple(placed), background.source)


def _maybe_colour(rng: np.random.Generator) -> str | None:
    return str(rng.choice(list(COLOURS))) if rng.random() < TINTED_SHARE else None


def render(scene: Scene, atlas: Atlas) -> Pixels:
    """Draw the scene back to front: each object's soft contact shadow, then the object.

    Returns:
        sRGB in [0, 1] of the background's size.
    """
    picture = scene.background.copy()
    size = picture.shape[:2]
    for item in _back_to_front(scene):
        sprite = _drawing(item, atlas, size)
        top, left = _corner(item, sprite, size)
        if isinstance(item, PlacedObject):
            sprite = _painted(item, sprite)
            rows, columns = sprite.shape[:2]
            if item.drawing != "flat":
                _cast_shadow(picture, left + columns / 2, top + rows, columns / 2)
        _composite(picture, sprite, top, left)
    return picture


def owners(
    scene: Scene, atlas: Atlas, size: tuple[int, int], opaque_from: float = 0.5
) -> Int[np.ndarray, "height width"]:
    """Which object each pixel shows: its index in the scene, -1 for what is no object.

    Args:
        scene: What is placed; the background is not looked at.
        atlas: The art.
        size: (height, width) in pixels.
        opaque_from: An object owns the pixels where its opacity, 0 to 1, is above this.
    """
    owner = np.full(size, -1)
    for item in _back_to_front(scene):
        sprite = _drawing(item, atlas, size)
        part, (row, column) = _clip(sprite, *_corner(item, sprite, size), size)
        view = owner[row : row + part.shape[0], column : column + part.shape[1]]
        index = scene.objects.index(item) if isinstance(item, PlacedObject) else -1
        view[part[..., 3] > opaque_from] = index
    return owner


def _back_to_front(scene: Scene) -> tuple[Item, ...]:
    return (*scene.portraits, *scene.objects, *scene.signs)


def _drawing(item: Item, atlas: Atlas, size: tuple[int, ...]) -> Float[np.ndarray, "h w 4"]:
    """An item as it lies in a picture of `size` (height, width), objects in their own colours."""
    if isinstance(item, Sign):
        return draw_sign(item, atlas, size)
    if isinstance(item, Portrait):
        return draw_portrait(item, atlas, size)
    sprite = atlas.sprite(item.name, round(item.size * min(size)), item.drawing)
    turned = np.rot90(sprite, item.quarter_turns)
    return turned[:, ::-1] if item.flipped else turned


def _corner(item: Item, sprite: np.ndarray, size: tuple[int, ...]) -> tuple[int, int]:
    """Top and left edge of an item's drawing."""
    rows, columns = sprite.shape[:2]
    return round(item.y * size[0] - rows / 2), round(item.x * size[1] - columns / 2)


def _painted(
    placed: PlacedObject, sprite: Float[np.ndarray, "h w 4"]
) -> Float[np.ndarray, "h w 4"]:
    """An object's drawing in its colour or material."""
    if placed.material is not None:
        return made_of(sprite, placed.material)
    return sprite if placed.colour is None else tint(sprite, COLOURS[placed.colour].rgb)


def tint(
    sprite: Float[np.ndarray, "h w 4"], rgb: tuple[float, float, float]
) -> Float[np.ndarray, "h w 4"]:
    """Repaint a drawing in one colour: its lightness runs from black over `rgb` to white."""
    light = sprite[..., :3] @ np.asarray([0.299, 0.587, 0.114], np.float32)
    opaque = light[sprite[..., 3] > 0.5]
    low, high = (
        (np.quantile(opaque, 0.02), np.quantile(opaque, 0.98)) if opaque.size else (0.0, 1.0)
    )
    lightness = ((light - low) / max(float(high - low), 0.05)).clip(0, 1)[..., None]
    colour = np.asarray(rgb, np.float32)
    shade = colour * (0.35 + 0.65 * (lightness / 0.7).clip(0, 1))
    shine = shade + (1 - shade) * 0.55 * ((lightness - 0.7) / 0.3).clip(0, 1)
    return np.concatenate([shine, sprite[..., 3:]], -1).astype(np.float32)


def _composite(picture: Pixels, sprite: Float[np.ndarray, "h w 4"], top: int, left: int) -> None:
    part, (row, column) = _clip(sprite, top, left, picture.shape[:2])
    view = picture[row : row + part.shape[0], column : column + part.shape[1]]
    view += part[..., 3:] * (part[..., :3] - view)


def _clip(
    sprite: np.ndarray, top: int, left: int, size: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, int]]:
    """The part of a sprite that lies inside a picture of `size`, and where it begins there."""
    row, column = max(top, 0), max(left, 0)
    return sprite[row - top : max(size[0] - top, 0), column - left : max(size[1] - left, 0)], (
        row,
        column,
    )


def _cast_shadow(picture: Pixels, x: float, y: float, radius: float) -> None:
    """Darken a flat ellipse with a smooth rim around the foot of an object."""
    height, width = picture.shape[:2]
    flat = radius * 0.22
    top, bottom = max(int(y - flat), 0), min(int(y + flat) + 1, height)
    left, right = max(int(x - radius), 0), min(int(x + radius) + 1, width)
    if top >= bottom or left >= right:
        return
    rows, columns = np.ogrid[top:bottom, left:right]
    distance = ((columns - x) / radius) ** 2 + ((rows - y) / flat) ** 2
    picture[top:bottom, left:right] *= (1 - SHADOW_OPACITY * (1 - distance).clip(0, 1))[
        ..., None
    ].astype(np.float32)


def captions_of(scene: Scene) -> dict[str, str]:
    """Language → caption; empty where `describe` would not say all that can be seen."""
    plain = all(not (placed.material or placed.quarter_turns) for placed in scene.objects)
    if not plain or scene.background_name is None or scene.signs or scene.portraits:
        return {}
    return {language: describe(scene, language) for language in ("en", "zh")}


def describe(scene: Scene, language: str) -> str:
    """A caption: objects with colour and place, then the background when it has a name."""
    parts = []
    for placed in scene.objects:
        if language == "zh":
            colour = f"{COLOURS[placed.colour].zh}的" if placed.colour else ""
            parts.append(f"{POSITIONS[placed.position][0]}有一个{colour}{OBJECTS[placed.name].zh}")
        else:
            noun = f"{placed.colour} {placed.name}" if placed.colour else placed.name
            parts.append(f"{article(noun)} {noun} {where(placed.position)}")
    if scene.background_name is not None:
        zh = language == "zh"
        parts.append(
            f"背景是{NAMED[scene.background_name].zh}"
            if zh
            else f"background {scene.background_name}"
        )
    return ("，" if language == "zh" else ", ").join(parts)


def article(noun: str) -> str:
    """The English indefinite article that goes before `noun`."""
    return "an" if noun[0] in "aeiou" else "a"
