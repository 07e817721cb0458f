import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.filters import Limits, changed_enough
from step1x_edit.datagen.pipeline import MAY_BE_EMPTY, make_triplet
from step1x_edit.datagen.variety import PLAIN, Variety

COMPOUND = Variety(wordings="plain", referring=0, counts=0, compound=1, unchanged=0)
EMPTY = Variety(wordings="plain", referring=0, counts=0, compound=0, unchanged=1)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def test_a_second_edit_leaves_what_the_first_one_changed(atlas):
    kinds = set()
    for seed in range(40):
        edit = make_triplet(seed, "colour", atlas, 64, 64, COMPOUND).edit
        if edit.second is None:  # a scene of one object cannot be edited twice
            continue
        kinds.add(edit.second.phrasing)
        recoloured = edit.words["en"]["object"]
        before = next(o for o in edit.before.objects if o.name == recoloured)
        after = next(o for o in edit.after.objects if o.name == recoloured)
        assert after.colour == edit.words["en"]["colour"] != before.colour
        assert edit.second.words["en"].get("object") != recoloured
    assert len(kinds) > 6


def test_both_halves_are_said(atlas):
    triplets = [make_triplet(seed, "removal", atlas, 64, 64, COMPOUND) for seed in range(30)]
    backgrounds = [t for t in triplets if t.edit.second and t.edit.second.phrasing == "background"]
    assert backgrounds
    for triplet in backgrounds:
        for language, sentence in triplet.instructions.items():
            assert triplet.edit.words[language]["object"] in sentence
            assert triplet.edit.second.words[language]["background"] in sentence


@pytest.mark.parametrize("category", MAY_BE_EMPTY)
def test_an_empty_request_changes_nothing(category, atlas):
    kinds = set()
    for seed in range(40):
        triplet = make_triplet(seed, category, atlas, 64, 64, EMPTY)
        assert np.array_equal(triplet.source, triplet.target)
        assert not triplet.mask.any()
        assert changed_enough(Limits())(triplet) is None
        edit = triplet.edit
        kinds.add(edit.phrasing)
        named = edit.words["en"]["object"]
        present = {o.name: o for o in edit.before.objects}
        if edit.phrasing == "colour":
            assert present[named].colour == edit.words["en"]["colour"]
        else:
            assert named not in present
    assert {"colour", "removal", "unchanged"} <= kinds


def test_nothing_of_it_happens_in_the_plain_variety(atlas):
    for seed in range(40):
        triplet = make_triplet(seed, "removal", atlas, 64, 64, PLAIN)
        assert triplet.edit.second is None
        assert triplet.edit.phrasing == "removal"
        assert triplet.mask.any()
        names = [o.name for o in triplet.edit.before.objects]
        assert len(set(names)) == len(names)
