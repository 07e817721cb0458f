"""Portrait editing: hair, beard, glasses, expression and clothes of a drawn person."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.portraits import (
    BEARDS,
    CLOTHES,
    EXPRESSIONS,
    GLASSES,
    HAIR,
    HAIR_COLOURS,
    SKINS,
    Portrait,
)
from step1x_edit.datagen.scene import sample_scene
from step1x_edit.datagen.vocabulary import COLOURS

KINDS = ("hair_colour", "hair_style", "beard", "glasses", "clothes", "clothes_colour", "expression")
SIZE = 0.92
BEARDED_SHARE = 0.35
GLASSES_SHARE = 0.4


def portrait(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Edit:
    """Change one thing about a person."""
    person = sample_person(rng, min(width, height) / height)
    scene = replace(sample_scene(rng, atlas, width, height, num_objects=0), portraits=(person,))
    kind = str(rng.choice([kind for kind in KINDS if kind != "hair_colour" or _has_hair(person)]))
    changed, phrasing, words = _CHANGES[kind](rng, person)
    return Edit(scene, replace(scene, portraits=(changed,)), phrasing, words)


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


def _has_hair(person: Portrait) -> bool:
    return person.hair != "bald"


def _other(rng: np.random.Generator, table: Mapping[str, object], own: str) -> str:
    return str(rng.choice([name for name in table if name != own]))


Change = tuple[Portrait, str, dict[str, dict[str, str]]]


def _hair_colour(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, HAIR_COLOURS, person.hair_colour)
    words = {"en": {"colour": wanted}, "zh": {"colour": HAIR_COLOURS[wanted][0]}}
    return replace(person, hair_colour=wanted), "hair_colour", words


def _hair_style(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, HAIR, person.hair)
    words = {"en": {"hair": HAIR[wanted].en}, "zh": {"hair": HAIR[wanted].zh}}
    return replace(person, hair=wanted), "hair_style", words


def _beard(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, BEARDS, person.beard)
    words = {"en": {"beard": BEARDS[wanted].en}, "zh": {"beard": BEARDS[wanted].zh}}
    return replace(person, beard=wanted), "beard_off" if wanted == "none" else "beard_on", words


def _glasses(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, GLASSES, person.glasses)
    words = {"en": {"glasses": GLASSES[wanted].en}, "zh": {"glasses": GLASSES[wanted].zh}}
    return replace(person, glasses=wanted), f"glasses_{'off' if wanted == 'none' else 'on'}", words


def _clothes(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, CLOTHES, person.clothes)
    words = {"en": {"clothes": CLOTHES[wanted].en}, "zh": {"clothes": CLOTHES[wanted].zh}}
    return replace(person, clothes=wanted), "clothes", words


def _clothes_colour(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, COLOURS, person.clothes_colour)
    words = {"en": {"colour": wanted}, "zh": {"colour": COLOURS[wanted].zh}}
    return replace(person, clothes_colour=wanted), "clothes_colour", words


def _expression(rng: np.random.Generator, person: Portrait) -> Change:
    wanted = _other(rng, EXPRESSIONS, person.expression)
    return replace(person, expression=wanted), wanted, {"en": {}, "zh": {}}


_CHANGES = {
    "hair_colour": _hair_colour, "hair_style": _hair_style, "beard": _beard, "glasses": _glasses,
    "clothes": _clothes, "clothes_colour": _clothes_colour, "expression": _expression,
}  # fmt: skip
