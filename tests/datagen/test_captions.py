from string import Formatter

import numpy as np
import pytest

from step1x_edit.datagen.captions import PHRASINGS, phrase
from step1x_edit.datagen.operators.tone import TONES

SLOTS = {
    ("addition", "en"): {"a_object", "where"},
    ("addition", "zh"): {"object", "where"},
    ("removal", "en"): {"object"},
    ("removal", "zh"): {"object"},
    ("colour", "en"): {"object", "colour"},
    ("colour", "zh"): {"object", "colour"},
    ("background", "en"): {"background"},
    ("background", "zh"): {"background"},
}
EDITS = {kind for kind, _ in SLOTS}


def slots_of(wording):
    return {name for _, name, _, _ in Formatter().parse(wording) if name is not None}


def test_every_tone_and_every_kind_of_edit_has_wordings():
    assert set(PHRASINGS) == set(TONES) | EDITS


@pytest.mark.parametrize("kind", PHRASINGS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_wording_names_all_that_the_edit_needs(kind, language):
    wordings = PHRASINGS[kind][language]
    assert len(wordings) == len(set(wordings)) >= 4
    for wording in wordings:
        assert slots_of(wording) == SLOTS.get((kind, language), set()), wording


def test_no_two_kinds_share_a_wording():
    said = [
        wording
        for kinds in PHRASINGS.values()
        for wordings in kinds.values()
        for wording in wordings
    ]
    assert len(said) == len(set(said))


def test_phrase_fills_every_slot():
    words = {"en": {"object": "cat"}, "zh": {"object": "猫"}}
    made = {tuple(phrase(np.random.default_rng(i), "removal", words).values()) for i in range(40)}
    assert len(made) > 10
    assert all("cat" in en and "猫" in zh for en, zh in made)
