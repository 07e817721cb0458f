from itertools import chain
from string import Formatter

import numpy as np
import pytest

from step1x_edit.datagen.captions import KINDS, LANGUAGES, phrase, wordings
from step1x_edit.datagen.filters import plain_instruction
from step1x_edit.datagen.operators.style import FLAT, STYLES
from step1x_edit.datagen.operators.tone import ALL_TONES
from step1x_edit.datagen.portraits import EXPRESSIONS

SLOTS = {
    ("addition", "en"): {"a_object", "where"},
    ("addition", "zh"): {"object", "where"},
    ("addition_count", "en"): {"count", "objects", "where"},
    ("addition_count", "zh"): {"count", "object", "where"},
    ("removal", "*"): {"object"},
    ("removal_all", "en"): {"objects"},
    ("removal_all", "zh"): {"object"},
    ("colour", "*"): {"object", "colour"},
    ("colour_all", "en"): {"objects", "colour"},
    ("colour_all", "zh"): {"object", "colour"},
    ("background", "*"): {"background"},
    ("replacement", "*"): {"object", "new_object"},
    ("material", "*"): {"object", "material"},
    ("move", "zh"): {"object", "where"},
    ("hair_colour", "*"): {"colour"},
    ("hair_style", "*"): {"hair"},
    ("beard_on", "*"): {"beard"},
    ("glasses_on", "*"): {"glasses"},
    ("clothes", "*"): {"clothes"},
    ("clothes_colour", "*"): {"colour"},
    ("text_addition", "*"): {"new_text"},
    ("learned_style", "*"): {"style"},
    ("then", "*"): {"first", "second"},
} | {
    (kind, "*"): {"object"}
    for kind in ("bigger", "smaller", "turn_round", "upside_down", "tip_over")
}  # fmt: skip
SEVERAL = {
    "move": ({"object", "where"}, {"object", "to_where"}),
    "text_change": ({"old_text", "new_text"}, {"new_text"}),
    "text_removal": ({"old_text"}, set()),
}
"""Kinds whose wordings may differ in what they name."""
OTHERS_WITHOUT = {"beard_off", "glasses_off", "unchanged"}
WITHOUT_SLOTS = {*ALL_TONES, *STYLES, FLAT, *EXPRESSIONS, *OTHERS_WITHOUT}
LEAST = {"then": (12, 4)}
"""Kind → how many wordings training and evaluation have at least, where fewer will do."""


def slots_of(wording):
    return {name for _, name, _, _ in Formatter().parse(wording) if name is not None}


def test_every_kind_of_edit_has_wordings():
    assert set(KINDS) == {kind for kind, _ in SLOTS} | set(SEVERAL) | WITHOUT_SLOTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_wording_names_all_that_the_edit_needs(kind, language):
    assert len(wordings(kind, language, "plain")) >= 4
    allowed = SEVERAL.get(kind, (SLOTS.get((kind, language), SLOTS.get((kind, "*"), set())),))
    for tier in ("all", "held_out"):
        for wording in wordings(kind, language, tier):
            assert slots_of(wording) in allowed, wording


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_is_said_in_many_ways(kind, language):
    in_training, held_out = LEAST.get(kind, (40, 10))
    assert len(wordings(kind, language, "all")) >= in_training
    assert len(wordings(kind, language, "held_out")) >= held_out


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_has_no_held_out_wording_in_another_guise(language):
    seen, held_out = (
        {
            plain_instruction(wording)
            for wording in chain.from_iterable(wordings(kind, language, tier) for kind in KINDS)
        }
        for tier in ("all", "held_out")
    )
    assert not seen & held_out


def test_no_wording_stands_twice():
    said = [
        wording
        for kind in KINDS
        for language in LANGUAGES
        for tier in ("all", "held_out")
        for wording in wordings(kind, language, tier)
    ]
    assert len(said) == len(set(said))


def test_phrase_fills_every_slot():
    words = {"en": {"object": "cat"}, "zh": {"object": "猫"}}
    made = {tuple(phrase(np.random.default_rng(i), "removal", words).values()) for i in range(40)}
    assert len(made) > 10
    assert all("cat" in en and "猫" in zh for en, zh in made)
