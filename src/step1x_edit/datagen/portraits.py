"""Portraits: people put together from drawn parts, for edits of faces, hair and clothes.

The parts are avataaars (Pablo Stanley) as `atlas_portraits` renders them: a layer each, and where a
part has a colour of its own, one layer in black and one in white, between which any colour lies.
Called by `scene`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from step1x_edit.datagen.atlas import Atlas, straight
from step1x_edit.datagen.vocabulary import COLOURS

RGB = tuple[float, float, float]


class Part(NamedTuple):
    """One choice of a part."""

    en: str
    zh: str
    drawing: str | None
    """Its name in ``python_avatars``, None for nothing at all."""


SKINS: dict[str, RGB] = {
    "pale": (1.0, 0.86, 0.71), "light": (0.93, 0.73, 0.54), "chestnut": (0.63, 0.38, 0.22),
    "brown": (0.82, 0.55, 0.36), "dark": (0.38, 0.26, 0.21),
}  # fmt: skip
HAIR = {
    "bald": Part("no hair", "光头", None),
    "short": Part("short hair", "短发", "SHORT_FLAT"),
    "wavy": Part("short wavy hair", "短卷发", "SHORT_WAVED"),
    "long": Part("long straight hair", "长直发", "STRAIGHT_1"),
    "bob": Part("a bob", "波波头", "BOB"),
    "bun": Part("a bun", "丸子头", "BUN"),
    "curly": Part("curly hair", "卷发", "CURLY"),
    "afro": Part("an afro", "爆炸头", "FRO"),
    "dreads": Part("dreadlocks", "脏辫", "DREADS"),
}
HAIR_COLOURS: dict[str, tuple[str, RGB]] = {
    "black": ("黑色", (0.15, 0.11, 0.10)), "brown": ("棕色", (0.45, 0.25, 0.17)),
    "blonde": ("金色", (0.87, 0.72, 0.42)), "red": ("红色", (0.79, 0.20, 0.05)),
    "grey": ("灰色", (0.72, 0.70, 0.70)), "pink": ("粉色", (0.97, 0.52, 0.66)),
    "blue": ("蓝色", (0.20, 0.42, 0.85)), "green": ("绿色", (0.25, 0.62, 0.30)),
}  # fmt: skip
BEARDS = {
    "none": Part("no beard", "没有胡子", None),
    "beard": Part("a beard", "络腮胡", "BEARD_MEDIUM"),
    "long beard": Part("a long beard", "长胡子", "BEARD_MAGESTIC"),
    "moustache": Part("a moustache", "小胡子", "MOUSTACHE_MAGNUM"),
}
GLASSES = {
    "none": Part("no glasses", "没有眼镜", None),
    "glasses": Part("glasses", "眼镜", "PRESCRIPTION_2"),
    "round glasses": Part("round glasses", "圆框眼镜", "ROUND"),
    "sunglasses": Part("sunglasses", "墨镜", "SUNGLASSES"),
}
CLOTHES = {
    "t-shirt": Part("a t-shirt", "T恤", "SHIRT_CREW_NECK"),
    "hoodie": Part("a hoodie", "连帽衫", "HOODIE"),
    "sweater": Part("a sweater with a collar", "翻领毛衣", "COLLAR_SWEATER"),
    "overall": Part("an overall", "背带裤", "OVERALL"),
    "blazer": Part("a blazer", "西装外套", "BLAZER_SHIRT"),
}
EXPRESSIONS: dict[str, tuple[str, str, str]] = {
    "neutral": ("DEFAULT", "SERIOUS", "DEFAULT"),
    "smiling": ("HAPPY", "SMILE", "RAISED_EXCITED"),
    "sad": ("DEFAULT", "SAD", "SAD_CONCERNED"),
    "surprised": ("SURPRISED", "DISBELIEF", "RAISED_EXCITED"),
    "angry": ("SQUINT", "GRIMACE", "ANGRY"),
    "winking": ("WINK", "TWINKLE", "UP_DOWN"),
    "crying": ("CRY", "SCREAM_OPEN", "SAD_CONCERNED"),
}
"""Expression → eyes, mouth and eyebrows in ``python_avatars``."""


@dataclass(frozen=True)
class Portrait:
    """One person of a scene; the fields are keys of the tables above."""

    skin: str
    hair: str
    hair_colour: str
    beard: str
    glasses: str
    clothes: str
    clothes_colour: str
    expression: str
    x: float
    """Centre, as a fraction of the picture's width."""
    y: float
    """Centre, as a fraction of the picture's height."""
    size: float
    """Longer side, as a fraction of the picture's shorter side."""
    position: str = "middle"
    art: str = "portraits/avataaars"


def draw_portrait(
    person: Portrait, atlas: Atlas, size: tuple[int, ...]
) -> Float[np.ndarray, "h w 4"]:
    """The person's straight-alpha RGBA in a picture of `size` (height, width)."""
    hair = HAIR_COLOURS[person.hair_colour][1]
    layers: list[tuple[str, RGB | None]] = [
        ("body", SKINS[person.skin]),
        (f"clothes_{person.clothes}", COLOURS[person.clothes_colour].rgb),
        (f"face_{person.expression}", None),
        (f"hair_{person.hair}", hair),
        (f"beard_{person.beard}", hair),
        (f"glasses_{person.glasses}", None),
    ]
    side_px = round(person.size * min(size))
    drawn: np.ndarray | None = None
    for name, rgb in layers:
        if name.partition("_")[2] in ("bald", "none"):
            continue
        layer = atlas.layer(name, side_px) if rgb is None else _coloured(name, rgb, atlas, side_px)
        drawn = layer if drawn is None else layer + drawn * (1 - layer[..., 3:])
    assert drawn is not None  # the body is always there
    return straight(drawn)


def _coloured(name: str, rgb: RGB, atlas: Atlas, side_px: int) -> Float[np.ndarray, "h w 4"]:
    """Between the black and the white drawing of a part: the drawing is linear in its fill."""
    black, white = (atlas.layer(f"{name}_{fill}", side_px) for fill in ("black", "white"))
    return black + (white - black) * np.asarray((*rgb, 0), np.float32)
