"""The offline benchmark on editors whose answers are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from step1x_edit.benchmark import minibench
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.editor import Editor
from step1x_edit.errors import InvalidRequest


def editor_that_answers(pick):
    """An editor that answers each item with `pick(triplet)`, the source as its reference."""
    atlas = Atlas()

    def pipeline(image, prompt, generator, **_):
        triplets = [
            make_triplet(
                minibench.FIRST_SEED + g.initial_seed(), pipeline.category, atlas, variety=PLAIN
            )
            for g in generator
        ]
        assert [np.asarray(picture).tolist() for picture in image] == [
            t.source.tolist() for t in triplets
        ]
        assert prompt == [t.instructions[("en", "zh")[t.seed % 2]] for t in triplets]
        return SimpleNamespace(
            images=[pick(t) / 255 for t in triplets],
            references=[t.source / 255 for t in triplets],
        )

    editor = Editor.__new__(Editor)  # no model behind it
    editor.pipeline = pipeline
    return editor


@pytest.fixture(autouse=True)
def small_seeds(monkeypatch):
    # The generator's seed is the item's modulo 2**32: with this base it tells the item.
    monkeypatch.setattr(minibench, "FIRST_SEED", 2**40)


@pytest.mark.parametrize("category", ["removal", "colour"])
def test_the_exact_target_gains_one_and_doing_nothing_gains_nothing(category, tmp_path):
    for pick, gain in ((lambda t: t.target, 1.0), (lambda t: t.source, 0.0)):
        editor = editor_that_answers(pick)
        editor.pipeline.category = category
        (score,) = minibench.run(editor, 3, [category], out=tmp_path)
        assert score.gain == pytest.approx(gain, abs=1e-6)
        assert score.success == gain
        assert score.kept_with_mask == 1.0
    assert (tmp_path / "scores.json").exists()
    assert (tmp_path / f"{category}.png").exists()


def test_the_table_has_a_row_for_each_category():
    editor = editor_that_answers(lambda t: t.source)
    editor.pipeline.category = "removal"
    table = minibench.markdown(minibench.run(editor, 1, ["removal"]))
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["removal"]


def test_several_categories_have_their_means_below():
    rows = [
        minibench.CategoryScore(name, 2, gain, gain, share, outside, 30.0, 0.5, 1.0)
        for name, gain, share, outside in (("tone", 0.2, 0.0, float("nan")), ("colour", 0.6, 1, 20))
    ]
    last = minibench.markdown(rows).splitlines()[-1]
    cells = [cell.strip() for cell in last.split("|")[1:-1]]
    assert cells[:6] == ["mean", "4", "0.40", "0.40", "50%", "20.0 dB"]


def test_items_from_another_number_on_are_other_items():
    seeds = []

    def pick(triplet):
        seeds.append(triplet.seed - minibench.FIRST_SEED)
        return triplet.source

    editor = editor_that_answers(pick)
    editor.pipeline.category = "removal"
    minibench.run(editor, 3, ["removal"], first=5)
    assert seeds == [5, 6, 7]


def test_categories_by_name():
    assert minibench.chosen_categories(()) == minibench.CATEGORIES == tuple(OPERATORS)
    assert minibench.chosen_categories(["style", "tone", "style"]) == ("style", "tone")
    assert minibench.chosen_categories(["tone", "all"]) == tuple(OPERATORS)
    with pytest.raises(InvalidRequest, match="category 'colr' is not there: give one of tone, "):
        minibench.chosen_categories(["colr"])


def test_an_edit_of_the_whole_picture_has_no_outside():
    editor = editor_that_answers(lambda t: t.target)
    editor.pipeline.category = "tone"
    (score,) = minibench.run(editor, 3, ["tone"])
    assert score.gain == pytest.approx(1)
    assert np.isnan([score.psnr_outside, score.psnr_outside_vae, score.kept]).all()
    (plain,) = json.loads(minibench.as_json([score]), parse_constant=pytest.fail)
    assert plain["gain"] == score.gain
    assert plain["psnr_outside"] is None
    row = minibench.markdown([score]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[6:-1]] == ["–"] * 4
