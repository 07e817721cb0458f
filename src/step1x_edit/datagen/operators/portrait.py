"""Portrait editing: hair, beard, glasses, expression and clothes of a drawn person."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.portraits import (
    BEARDS,
    CLOTHES,
    EXPRESSIONS,
    GLASSES,
    HAIR,
    HAIR_COLOURS,
    SKINS,
    Part,
    Portrait,
)
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.vocabulary import COLOURS

KINDS: dict[str, Mapping[str, Any]] = {
    "hair_colour": HAIR_COLOURS, "hair": HAIR, "beard": BEARDS, "glasses": GLASSES,
    "clothes": CLOTHES, "clothes_colour": COLOURS, "expression": EXPRESSIONS,
}  # fmt: skip
"""Field of `Portrait` → what it can be."""
SIZE = 0.92
BEARDED_SHARE = 0.35
GLASSES_SHARE = 0.4


def portrait(context: Context, width: int, height: int) -> Edit:
    """Change one thing about a person."""
    person = sample_person(context.rng, min(width, height) / height)
    empty = sample_scene(context.rng, context.atlas, width, height, num_objects=0)
    scene = replace(empty, portraits=(person,))
    kind = context.pick(kind for kind in KINDS if _is_seen(kind, person))
    wanted = context.pick(name for name in KINDS[kind] if name != getattr(person, kind))
    phrasing, said = _wording(kind, wanted)
    after = replace(scene, portraits=(replace(person, **{kind: wanted}),))  # pyright: ignore[reportArgumentType] - a field's name
    return Edit(scene, after, phrasing, said)


def sample_person(rng: np.random.Generator, share_of_height: float) -> Portrait:
    """A random person, standing on the lower edge; the square's side is `share_of_height`."""

    def pick(table: Mapping[str, object]) -> str:
        return str(rng.choice(list(table)))

    return Portrait(
        skin=pick(SKINS),
        hair=pick(HAIR),
        hair_colour=pick(HAIR_COLOURS),
        beard=pick(BEARDS) if rng.random() < BEARDED_SHARE else "none",
        glasses=pick(GLASSES) if rng.random() < GLASSES_SHARE else "none",
        clothes=pick(CLOTHES),
        clothes_colour=pick(COLOURS),
        expression=pick(EXPRESSIONS),
        x=float(rng.uniform(0.42, 0.58)),
        y=1 - SIZE * share_of_height / 2,
        size=SIZE,
    )


def _is_seen(kind: str, person: Portrait) -> bool:
    """Whether the change would show: of a blazer only the shirt below takes the colour."""
    if kind == "hair_colour":
        return person.hair != "bald"
    return kind != "clothes_colour" or person.clothes != "blazer"


def _wording(kind: str, wanted: str) -> tuple[str, dict[str, dict[str, str]]]:
    """One of `captions.KINDS`, and what goes into its slots."""
    if kind == "expression":
        return wanted, {"en": {}, "zh": {}}
    if kind == "hair_colour":
        return kind, {"en": {"colour": wanted}, "zh": {"colour": HAIR_COLOURS[wanted][0]}}
    if kind == "clothes_colour":
        return kind, {"en": {"colour": wanted}, "zh": {"colour": COLOURS[wanted].zh}}
    part: Part = KINDS[kind][wanted]
    words = {"en": {kind: part.en}, "zh": {kind: part.zh}}
    if kind in ("beard", "glasses"):
        return f"{kind}_{'off' if wanted == 'none' else 'on'}", words
    return "hair_style" if kind == "hair" else kind, words
