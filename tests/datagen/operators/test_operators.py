from dataclasses import replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS, Context
from step1x_edit.datagen.operators.motion import FACING, LYING
from step1x_edit.datagen.operators.style import STYLES
from step1x_edit.datagen.operators.text import CHINESE, LATIN
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.scene import Scene, canonical, owners, render
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.datagen.vocabulary import OBJECTS

SEEDS = range(40)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def first_edit(category, atlas, seed, width=96, height=64, variety=PLAIN):
    edit = OPERATORS[category].first(
        Context(np.random.default_rng(seed), atlas, variety), width, height
    )
    assert edit is not None
    return edit


def edits(category, atlas):
    return [first_edit(category, atlas, seed) for seed in SEEDS]


def test_replacement_puts_the_new_object_in_the_old_ones_place(atlas):
    for edit in edits("replacement", atlas):
        changed = [
            (old, new)
            for old, new in zip(edit.before.objects, edit.after.objects, strict=True)
            if old != new
        ]
        assert len(changed) == 1
        old, new = changed[0]
        assert (old.x, old.y, old.size, old.position) == (new.x, new.y, new.size, new.position)
        assert new.name not in {placed.name for placed in edit.before.objects}
        assert new.name in edit.words["en"]["new_object"]
        assert OBJECTS[new.name].zh in edit.words["zh"]["new_object"]


def test_all_kinds_of_motion_happen_and_keep_the_object(atlas):
    seen = set()
    for edit in edits("motion", atlas):
        seen.add(edit.phrasing)
        moved = edit.after.objects[-1]
        before = next(placed for placed in edit.before.objects if placed.name == moved.name)
        assert edit.words["en"]["object"] == moved.name
        assert (moved.colour, moved.material) == (before.colour, before.material)
        if edit.phrasing == "move":
            assert moved.position not in {placed.position for placed in edit.before.objects}
        if edit.phrasing == "bigger":
            assert moved.size > 1.3 * before.size
            assert moved.y + moved.size / 2 == pytest.approx(before.y + before.size / 2)
    assert seen == {"move", "bigger", "smaller", "turn_round", "upside_down", "tip_over"}


def test_names_of_what_can_turn_are_objects():
    assert set(FACING) <= set(OBJECTS)
    assert set(LYING) <= set(OBJECTS)


def test_text_edits_change_nothing_but_the_letters(atlas):
    kinds = set()
    for seed in SEEDS:
        triplet = make_triplet(seed, "text", atlas, 128, 96, PLAIN)
        before, after = triplet.edit.before.signs[0], triplet.edit.after.signs[0]
        kinds.add(triplet.edit.phrasing)
        rows, columns = np.nonzero(triplet.mask)
        height, width = triplet.mask.shape
        assert abs(rows.mean() / height - before.y) < before.size / 2
        assert np.abs(columns / width - before.x).max() < before.width / 2
        said = triplet.instructions["en"] + triplet.instructions["zh"]
        assert after.text in said
        for word in (before.text, after.text):
            assert word == "" or (word in CHINESE) != (word in LATIN)
    assert kinds == {"text_change", "text_removal", "text_addition"}


def test_boards_stay_inside_the_picture(atlas):
    for seed in SEEDS:
        for width, height in ((128, 128), (160, 96), (96, 144)):
            sign = first_edit("text", atlas, seed, width, height).before.signs[0]
            assert sign.x - sign.width / 2 > 0
            assert sign.x + sign.width / 2 < 1


def test_portrait_edits_change_one_thing(atlas):
    seen = set()
    for edit in edits("portrait", atlas):
        (old,), (new,) = edit.before.portraits, edit.after.portraits
        differing = [name for name in vars(old) if getattr(old, name) != getattr(new, name)]
        assert len(differing) == 1
        seen.add(differing[0])
        assert not (differing == ["hair_colour"] and old.hair == "bald")
        assert not (differing == ["clothes_colour"] and old.clothes == "blazer")
    assert len(seen) >= 6


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("size", [(64, 64), (96, 80), (256, 192)])
def test_styles_work_at_every_size_and_differ(name, size):
    rng = np.random.default_rng(0)
    picture = rng.random((size[1] // 16, size[0] // 16, 3), np.float32).repeat(16, 0).repeat(16, 1)
    before = picture.copy()
    drawn = STYLES[name](picture)
    assert np.array_equal(picture, before)
    assert drawn.shape == picture.shape
    assert np.isfinite(drawn).all()
    assert np.abs(drawn - picture).mean() > 0.02


def test_a_style_is_applied_to_the_whole_picture(atlas):
    formulas = [edit for edit in edits("style", atlas) if edit.phrasing != "flat"]
    for edit in formulas[:8]:
        assert edit.finish is not None
        flat = np.full((64, 96, 3), 0.4, np.float32)
        assert edit.finish(flat).dtype == np.float32
        assert edit.before is edit.after


def test_flat_scenes_hold_the_same_things_in_the_same_places_drawn_flat(atlas):
    flat = [edit for edit in edits("style", atlas) if edit.phrasing == "flat"]
    assert flat
    for edit in flat:
        assert edit.finish is None
        assert edit.before.objects
        undone = tuple(replace(placed, drawing="objects") for placed in edit.after.objects)
        assert undone == edit.before.objects
        colours = edit.after.background.reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) <= 7
        np.testing.assert_allclose(colours.mean(0), edit.before.background.mean((0, 1)), atol=0.06)


@pytest.mark.parametrize("name", OBJECTS)
def test_flat_drawings_fill_the_same_box_and_are_another_drawing(name, atlas):
    shaded, flat = atlas.sprite(name, 96), atlas.sprite(name, 96, "flat")
    assert shaded.shape == flat.shape
    solid, other = shaded[..., 3] > 0.5, flat[..., 3] > 0.5
    assert (solid & other).sum() / (solid | other).sum() > 0.7
    both = solid & other
    assert np.abs(shaded[both, :3] - flat[both, :3]).mean() > 0.03


def test_a_flat_object_keeps_its_colour(atlas):
    ground = np.full((64, 64, 3), 0.5, np.float32)
    for colour in ("red", "green", "blue"):
        placed = replace(canonical("car", "middle", colour), drawing="flat")
        drawn = render(Scene(ground, None, (placed,)), atlas)
        mean = drawn[(drawn != 0.5).any(-1)].mean(0)
        assert mean.argmax() == ("red", "green", "blue").index(colour)


def test_what_lies_in_front_hides_what_lies_behind(atlas):
    edit = first_edit("text", atlas, 3, 128, 128)
    owner = owners(edit.before, atlas, (128, 128))
    sign = edit.before.signs[0]
    assert owner[int(sign.y * 128), int(sign.x * 128)] == -1


@pytest.mark.parametrize(("grey", "least", "most"), [(0.0, 0, 10), (0.8, 28, 39), (1.0, 40, 40)])
def test_a_share_of_the_tones_can_be_grey(atlas, grey, least, most):
    variety = PLAIN.model_copy(update={"grey": grey})
    names = [first_edit("tone", atlas, seed, variety=variety).phrasing for seed in SEEDS]
    assert least <= names.count("grey") <= most
