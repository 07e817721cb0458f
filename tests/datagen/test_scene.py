from dataclasses import replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.scene import (
    Scene,
    article,
    canonical,
    describe,
    owners,
    render,
    sample_scene,
    tint,
)
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def grey_scene(*objects):
    return Scene(np.full((64, 96, 3), 0.5, np.float32), None, objects)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_has_art(name, atlas):
    sprite = atlas.sprite(name, 40)
    assert max(sprite.shape[:2]) == 40
    assert sprite.min() >= 0
    assert sprite.max() <= 1
    assert (sprite[..., 3] > 0.5).mean() > 0.1


@pytest.mark.parametrize("colour", COLOURS)
def test_tint_keeps_the_form_and_takes_the_colour(colour, atlas):
    sprite = atlas.sprite("car", 48)
    tinted = tint(sprite, COLOURS[colour].rgb)
    assert np.array_equal(tinted[..., 3], sprite[..., 3])
    assert tinted.min() >= 0
    assert tinted.max() <= 1
    mean = tinted[sprite[..., 3] > 0.9, :3].mean(0)
    wanted = np.asarray(COLOURS[colour].rgb)
    np.testing.assert_allclose(mean / mean.sum(), wanted / wanted.sum(), atol=0.08)
    assert 0.5 * wanted.mean() < mean.mean() < 1.3 * wanted.mean() + 0.1


def test_tint_leaves_its_argument_alone(atlas):
    sprite = atlas.sprite("cat", 32)
    before = sprite.copy()
    tint(sprite, (1.0, 0.0, 0.0))
    assert np.array_equal(sprite, before)


def test_render_draws_on_a_copy_and_in_order(atlas):
    cat, car = canonical("cat", "middle"), canonical("car", "middle")
    scene = grey_scene(cat, car)
    picture = render(scene, atlas)
    assert (scene.background == 0.5).all()
    reverse = render(grey_scene(car, cat), atlas)
    assert not np.array_equal(picture, reverse)
    assert np.array_equal(render(grey_scene(), atlas), scene.background)


def test_an_object_changes_only_its_surroundings(atlas):
    scene = grey_scene(canonical("cat", "left"))
    changed = (render(scene, atlas) != scene.background).any(-1)
    assert changed.any()
    assert not changed[:, 64:].any()
    hidden = owners(scene, atlas, (64, 96), opaque_from=0.0) >= 0
    assert changed[hidden].mean() > 0.95
    shadow = changed & ~hidden
    assert (render(scene, atlas)[shadow] <= 0.5).all()


def test_objects_at_the_rim_are_cut_off(atlas):
    placed = replace(canonical("dog", "left"), x=-0.1, y=1.05)
    assert render(grey_scene(placed), atlas).shape == (64, 96, 3)


def test_sampled_scenes_have_no_object_or_place_twice(atlas):
    counts = set()
    for seed in range(30):
        scene = sample_scene(np.random.default_rng(seed), atlas, 64, 64)
        names = [placed.name for placed in scene.objects]
        places = [placed.position for placed in scene.objects]
        assert len(names) == len(set(names)) == len(set(places))
        counts.add(len(names))
    assert counts == {1, 2, 3}


def test_descriptions_name_everything():
    scene = Scene(
        np.zeros((8, 8, 3), np.float32),
        "a forest",
        (canonical("apple", "left", "green"), canonical("umbrella", "middle")),
    )
    assert describe(scene, "en") == (
        "a green apple on the left, an umbrella in the middle, background a forest"
    )
    assert describe(scene, "zh") == "左边有一个绿色的苹果，中间有一个雨伞，背景是森林"


def test_article():
    assert (article("apple"), article("car")) == ("an", "a")
