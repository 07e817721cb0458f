import builtins

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from step1x_edit.datagen.atlas import ATLAS_DIR
from step1x_edit.datagen.photographs.classical import (
    DenseFlow,
    GrabCut,
    SaliencyDetector,
    TextLines,
    load_cv2,
)
from step1x_edit.datagen.photographs.clone_stamp import CloneStamp
from step1x_edit.datagen.photographs.cutout import check_cut_out, check_steady
from step1x_edit.datagen.photographs.masks import bounds, grown
from step1x_edit.datagen.photographs.roles import (
    Detector,
    FlowEstimator,
    Inpainter,
    Segmenter,
    TextFinder,
    Unsuitable,
)
from step1x_edit.datagen.photographs.saliency import barrier_distance
from step1x_edit.errors import MissingExtra

from .scenes import background, with_disc


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def test_the_parts_play_their_roles():
    for part, role in (
        (SaliencyDetector(), Detector), (GrabCut(), Segmenter), (CloneStamp(), Inpainter),
        (TextLines(), TextFinder), (DenseFlow(), FlowEstimator),
    ):  # fmt: skip
        assert isinstance(part, role)


def test_the_barrier_to_the_rim_is_the_least_range_of_a_path():
    plane = np.zeros((9, 9, 1), np.float32)
    plane[2:7, 2:7] = 5
    plane[4, 4] = 8
    distance = barrier_distance(plane)
    assert distance[4, 4] == 8
    assert distance[3, 3] == 5
    assert distance[1, 1] == 0
    plane[4, 6:] = 0  # a way out for what is inside, but not out of the ring's height
    assert barrier_distance(plane)[4, 6] == 0


@pytest.mark.parametrize("centre", [(0.45, 0.5), (0.3, 0.6)])
def test_the_thing_that_stands_out_is_found_and_cut(centre):
    picture, mask = with_disc(centre=centre)
    (found,) = SaliencyDetector().find(picture)
    assert found.en is None
    top, left, bottom, right = found.box
    true = bounds(mask)
    assert np.abs(np.subtract(found.box, true)).max() <= 10
    assert top <= true[0] and left <= true[1] and bottom >= true[2] and right >= true[3]  # noqa: PT018
    cut = GrabCut().cut(picture, found.box)
    assert overlap(cut, mask) > 0.9
    check_cut_out(picture, cut)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((64, 64), bool), "no subject"),
        (np.ones((64, 64), bool), "fills the picture"),
        (np.arange(64)[None] < np.full((64, 1), 20), "cut off by the rim"),
        ((np.indices((64, 64)) // 8 % 2).sum(0) == 2, "in pieces"),
    ],
)
def test_half_a_subject_is_refused(mask, reason):
    with pytest.raises(Unsuitable, match=reason):
        check_cut_out(background(64), mask)


def test_a_cut_through_one_surface_is_refused():
    _, mask = with_disc(64)
    with pytest.raises(Unsuitable, match="not set off"):
        check_cut_out(background(64), mask)


def test_a_hole_is_filled_with_what_is_like_its_surroundings():
    picture, mask = with_disc(radius=0.1)
    hole = grown(mask, 3)
    filled = CloneStamp().fill(picture, hole)
    assert np.array_equal(filled[~hole], picture[~hole])
    wanted = background()[hole].astype(float)
    assert np.abs(filled[hole].mean(0) - wanted.mean(0)).max() < 12
    # Structure, not a smear: about the contrast of what is behind.
    assert filled[hole].std(0) == pytest.approx(wanted.std(0), rel=0.6)


def test_a_hole_that_nothing_fits_is_refused():
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    hole = np.zeros((96, 96), bool)
    hole[30:60, 30:60] = True
    with pytest.raises(Unsuitable, match="nothing to fill"):
        CloneStamp().fill(picture, hole)


def test_text_is_found_where_it_stands():
    picture = Image.new("RGB", (256, 128), (230, 220, 200))
    font = ImageFont.truetype(str(ATLAS_DIR / "fonts" / "zcool-kuaile-latin.woff2"), 40)
    ImageDraw.Draw(picture).text((60, 40), "MUSEUM", (20, 20, 30), font)
    (found,) = TextLines().find(np.asarray(picture))
    assert found.text == "MUSEUM"
    top, left, bottom, right = found.box
    ink = bounds(np.asarray(picture).sum(-1) < 300)
    assert np.abs(np.subtract((top, left, bottom, right), ink)).max() <= 16
    assert TextLines().find(np.full((64, 64, 3), 128, np.uint8)) == []


def test_flow_follows_a_shift():
    picture = background()
    flow = DenseFlow().flow(picture, np.roll(picture, 3, 1))
    assert np.median(flow[20:-20, 20:-20], (0, 1)) == pytest.approx([3, 0], abs=0.5)


def test_a_missing_package_is_named_with_the_way_to_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name in ("cv2", "rapidocr"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for load in (load_cv2, TextLines):
        with pytest.raises(MissingExtra, match=r"pip install 'step1x-edit\[photos\]'"):
            load()


def test_a_cut_out_must_not_hang_on_the_crop():
    picture, mask = with_disc()
    size = mask.shape[0]

    def whole(crop):
        margin = (size - len(crop)) // 2
        return mask[margin : size - margin, margin : size - margin]

    check_steady(picture, mask, whole)

    def upper_half(crop):
        return whole(crop) & (np.arange(len(crop)) < len(crop) / 2)[:, None]

    with pytest.raises(Unsuitable, match="smaller crop"):
        check_steady(picture, mask, upper_half)
