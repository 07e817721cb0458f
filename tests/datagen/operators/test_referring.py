from dataclasses import replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS, Context
from step1x_edit.datagen.operators.referring import descriptions, refer, twins_of
from step1x_edit.datagen.scene import Scene, canonical
from step1x_edit.datagen.variety import PLAIN, Variety
from step1x_edit.datagen.vocabulary import OBJECTS, plural

REFERRING = Variety(wordings="plain", referring=1, counts=0, compound=0, unchanged=0)
COUNTING = Variety(wordings="plain", referring=1, counts=1, compound=0, unchanged=0)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def scene_of(*objects):
    return Scene(np.zeros((64, 64, 3), np.float32), None, objects)


def context(seed, atlas, variety):
    return Context(np.random.default_rng(seed), atlas, variety)


def nouns(scene, index):
    placed = scene.objects[index]
    twins = [scene.objects[i] for i in twins_of(scene, index) if i != index]
    return {noun.en for noun in descriptions(placed, twins)}


def test_a_description_fits_one_of_two_alike():
    red, blue = canonical("cat", "left", "red"), canonical("cat", "right", "blue")
    assert nouns(scene_of(red, blue), 0) == {"cat on the left", "left cat", "red cat"}
    plain = replace(blue, colour=None)
    assert "red cat" not in nouns(scene_of(red, plain), 0), "an untinted cat may be red itself"
    large = replace(blue, size=blue.size * 1.3)
    assert "bigger cat" in nouns(scene_of(red, large), 1)
    assert "smaller cat" in nouns(scene_of(red, large), 0)
    third = replace(canonical("cat", "middle", "green"), size=red.size * 0.9)
    assert "biggest cat" in nouns(scene_of(red, large, third), 1)


def test_the_bare_name_is_used_only_where_it_is_enough(atlas):
    alone = scene_of(canonical("cat", "left"), canonical("dog", "right"))
    assert refer(context(0, atlas, PLAIN), alone, 0) == ("cat", "猫")
    pair = scene_of(canonical("cat", "left"), canonical("cat", "right"))
    for seed in range(20):
        noun = refer(context(seed, atlas, PLAIN), pair, 0)
        assert "left" in noun.en
        assert "左边" in noun.zh


def test_scenes_with_twins_say_which_one_goes(atlas):
    ambiguous = 0
    for seed in range(60):
        edit = OPERATORS["removal"].first(context(seed, atlas, REFERRING), 96, 64)
        gone = next(i for i, o in enumerate(edit.before.objects) if o not in edit.after.objects)
        noun = edit.words["en"]["object"]
        assert noun != edit.before.objects[gone].name, "every object is referred to"
        ambiguous += len(twins_of(edit.before, gone)) > 1
    assert ambiguous > 10


def test_all_of_a_kind_are_edited_together(atlas):
    seen = set()
    for category in ("removal", "colour"):
        for seed in range(60):
            edit = OPERATORS[category].first(context(seed, atlas, COUNTING), 96, 64)
            if not edit.phrasing.endswith("_all"):
                continue
            seen.add(edit.phrasing)
            name = next(n for n in OBJECTS if plural(n) == edit.words["en"]["objects"])
            touched = [o for o in edit.before.objects if o not in edit.after.objects]
            assert len(touched) > 1
            assert {o.name for o in touched} == {name}
            if category == "colour":
                colours = {o.colour for o in edit.after.objects if o.name == name}
                assert colours == {edit.words["en"]["colour"]}
    assert seen == {"removal_all", "colour_all"}


def test_as_many_are_added_as_the_instruction_counts(atlas):
    counted = 0
    for seed in range(40):
        edit = OPERATORS["addition"].first(context(seed, atlas, COUNTING), 96, 64)
        added = edit.after.objects[len(edit.before.objects) :]
        if edit.phrasing == "addition":
            assert len(added) == 1
            continue
        counted += 1
        words = edit.words["en"]
        assert len(added) == {"two": 2, "three": 3}[words["count"]]
        assert len({o.name for o in added}) == 1
        assert words["objects"].endswith(plural(added[0].name))
        assert [o.position for o in added] == [
            p for p in ("left", "middle", "right") if p in words["where"]
        ]
    assert counted > 10


@pytest.mark.parametrize(
    ("noun", "several"),
    [("cat", "cats"), ("bus", "buses"), ("butterfly", "butterflies"), ("key", "keys"),
     ("fish", "fish"), ("snowman", "snowmen"), ("red teddy bear", "red teddy bears")],
)  # fmt: skip
def test_plurals(noun, several):
    assert plural(noun) == several
