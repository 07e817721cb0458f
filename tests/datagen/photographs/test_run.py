import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.filters import default_checks
from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.inspect import write_page
from step1x_edit.datagen.official_metadata import export
from step1x_edit.datagen.photographs.config import PartsConfig, build_parts
from step1x_edit.datagen.photographs.edits import EDITS
from step1x_edit.datagen.photographs.roles import Parts, Unsuitable
from step1x_edit.datagen.photographs.run import (
    MOST_RECORDS,
    Run,
    edit_photograph,
    make_dataset,
)
from step1x_edit.datagen.photographs.sources import Moment, Pair, Still, sources_in
from step1x_edit.datagen.refine import refine
from step1x_edit.datagen.scene import captions_of
from step1x_edit.datagen.shards import read, write
from step1x_edit.errors import InvalidRequest
from step1x_edit.training.alignment import UNKNOWN, token_labels

from .scenes import background, with_disc

BALL = ("ball", "球")
SIZE = (96, 96)


@pytest.fixture(scope="module")
def parts():
    return build_parts(PartsConfig())


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number, centre in enumerate([(0.45, 0.5), (0.55, 0.45), (0.5, 0.55)]):
        save(with_disc(128, centre, 0.14, number)[0], folder / f"ball-{number}.png")
    save(background(128, 7), folder / "grass.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture(scope="module")
def made(folder, parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    labels = {f"ball-{number}.png": BALL for number in range(3)}
    run = Run(folder, out, 24, size=SIZE, labels=labels, shard_size=10)
    told = []
    report = make_dataset(run, parts, default_checks(), lambda *now: told.append(now))
    return out, report, told


def test_records_say_what_made_them_and_come_in_turns(made):
    out, report, told = made
    records = [triplet for path in shard_paths(out) for triplet in read(path)]
    assert len(records) == report.drops.kept == 24
    assert told[-1] == (24, 24)
    assert [len(list(read(path))) for path in shard_paths(out)] == [10, 10, 4]
    assert len(report.categories) >= 6
    assert len({triplet.key for triplet in records}) == 24
    for triplet in records:
        assert triplet.edit.made_by
        assert triplet.source.shape == (96, 96, 3)
        assert np.array_equal(triplet.mask, (triplet.source != triplet.target).any(-1))
        assert triplet.captions == {} == triplet.source_captions
        assert triplet.metadata()["licences"][f"own/{triplet.photograph}"]
        if triplet.category not in ("tone", "style", "background"):
            assert "ball" in triplet.instructions["en"]
            assert "球" in triplet.instructions["zh"]


def test_what_was_not_made_is_counted_by_its_reason(made):
    out, report, _ = made
    counts = json.loads((out / "drops.json").read_text())
    assert counts["kept"] == 24
    assert counts["dropped"] == dict(report.drops.dropped)
    assert "no name" in " ".join(counts["dropped"])
    assert list(counts["unreadable"]) == ["broken.jpg"]
    assert any("broken.jpg" in line for line in report.lines())
    manifest = json.loads((out / "dataset.json").read_text())["photographs"]
    assert manifest["parts"]["segmenter"] == "grab-cut"


def test_the_same_run_makes_the_same_bytes(made, folder, parts, tmp_path):
    out = tmp_path / "again"
    labels = {f"ball-{number}.png": BALL for number in range(3)}
    run = Run(folder, out, 10, size=SIZE, labels=labels, shard_size=10)
    make_dataset(run, parts, default_checks())
    assert shard_paths(out)[0].read_bytes() == shard_paths(made[0])[0].read_bytes()


def test_one_photograph_is_not_said_over_and_over(folder, parts, tmp_path):
    save(with_disc(128)[0], tmp_path / "one" / "ball.png")
    run = Run(tmp_path / "one", tmp_path / "set", 20, size=SIZE, categories=("tone", "style"))
    report = make_dataset(run, parts, default_checks())
    assert report.categories == {"tone": MOST_RECORDS, "style": MOST_RECORDS}


def test_every_reader_of_datasets_takes_them(made, tmp_path, atlas):
    out = made[0]
    records = [triplet for path in shard_paths(out) for triplet in read(path)]
    write(tmp_path / "shard-000000.parquet", records)
    for one, other in zip(records, read(tmp_path / "shard-000000.parquet"), strict=True):
        assert one.metadata() == other.metadata()
        assert np.array_equal(one.target, other.target)
    assert refine(out, tmp_path / "kept", default_checks()).kept == 24
    assert len(json.loads(export(out, tmp_path / "official").read_text())) == 24
    assert records[0].instructions["zh"] in write_page(out, tmp_path / "page.html").read_text()
    labels = token_labels(records[0], atlas)
    assert (labels[:, :3] == UNKNOWN).all()
    assert set(labels[:, 4]) <= {0, 1}


@pytest.mark.parametrize("category", [name for name in EDITS if name not in ("text", "motion")])
def test_every_category_does_what_it_says(category, folder, parts, atlas):
    source = Still("ball-0.png", folder / "ball-0.png")
    triplet = edit_photograph(source, category, parts, atlas, 5, SIZE, BALL)
    changed = triplet.mask.mean()
    assert (changed > 0.5) if category in ("tone", "style", "background") else (changed < 0.35)
    red = [(p[..., 0] > 1.5 * p[..., 1]).mean() for p in (triplet.source, triplet.target)]
    if category == "removal":
        assert red[1] < 0.2 * red[0]
    if category == "addition":
        assert red[0] < 0.2 * red[1]
    if category == "background":
        assert triplet.edit.after.background_name in triplet.instructions["en"]
        assert captions_of(triplet.edit.before) == {}


def test_whole_pictures_need_no_subject_and_subjects_need_a_name(folder, parts, atlas):
    grass, ball = (Still(name, folder / name) for name in ("grass.png", "ball-0.png"))
    assert edit_photograph(grass, "tone", parts, atlas, 0, SIZE).edit.made_by == ("formula",)
    with pytest.raises(Unsuitable, match="no name"):
        edit_photograph(ball, "removal", parts, atlas, 0, SIZE)
    with pytest.raises(Unsuitable, match="too small"):
        edit_photograph(ball, "tone", parts, atlas, 0, (256, 256))


def test_the_ways_to_move(folder, parts, atlas):
    source = Still("ball-0.png", folder / "ball-0.png")
    kinds = set()
    for seed in range(16):
        try:
            triplet = edit_photograph(source, "motion", parts, atlas, seed, SIZE, BALL)
        except Unsuitable:
            continue
        kinds.add(triplet.edit.phrasing)
    assert {"bigger", "smaller", "move"} <= kinds | {"move"}
    assert len(kinds) >= 3


# ---- pairs of frames


def frames(folder, *centres, camera=0):
    for number, centre in enumerate(centres):
        pixels, _ = with_disc(160, centre, 0.12)
        save(np.roll(pixels, camera * number, 1), folder / f"frame-{number}.png")
    return Pair(folder.name, tuple(sorted(folder.iterdir())))


def test_what_moves_between_two_frames_is_moved(tmp_path, parts, atlas):
    pair = frames(tmp_path / "clip", (0.32, 0.5), (0.42, 0.5))
    triplet = edit_photograph(pair, "motion", parts, atlas, 1, (128, 128), BALL)
    assert triplet.edit.phrasing == "move"
    assert "middle" in triplet.instructions["en"]
    assert triplet.edit.made_by == ("DIS optical flow",)
    assert 0.05 < triplet.mask.mean() < 0.5
    with pytest.raises(Unsuitable, match="no name"):
        edit_photograph(pair, "motion", parts, atlas, 1, (128, 128))


def test_a_camera_that_moves_is_refused(tmp_path, parts, atlas):
    pair = frames(tmp_path / "pan", (0.5, 0.5), (0.5, 0.5), camera=6)
    with pytest.raises(Unsuitable, match="camera"):
        edit_photograph(pair, "motion", parts, atlas, 1, (128, 128), BALL)
    still = frames(tmp_path / "still", (0.5, 0.5), (0.5, 0.5))
    with pytest.raises(Unsuitable, match="nothing moves"):
        edit_photograph(still, "motion", parts, atlas, 1, (128, 128), BALL)


def test_sources_are_photographs_pairs_and_videos(tmp_path):
    import cv2

    save(background(64), tmp_path / "a.png")
    save(background(64), tmp_path / "more" / "b.jpg")
    for name in ("first.png", "second.png"):
        save(background(64), tmp_path / "clip" / name)
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 64))
    for number in range(15):
        film.write(np.full((64, 64, 3), 10 * number, np.uint8))
    film.release()
    (tmp_path / "notes.txt").write_text("no picture")
    found = {source.name: source for source in sources_in(tmp_path)}
    assert sorted(found) == ["a.png", "clip", "film.avi", "more/b.jpg"]
    assert isinstance(found["clip"], Pair)
    moment = found["film.avi"]
    assert isinstance(moment, Moment)
    one, two = (int(np.asarray(picture).mean()) for picture in moment.pictures())
    assert two - one == pytest.approx(50, abs=6)


# ---- bad input


def test_folders_without_photographs_are_refused(tmp_path, parts):
    (tmp_path / "empty").mkdir()
    for name, says in (("nowhere", "no such folder"), ("empty", "holds no photographs")):
        with pytest.raises(InvalidRequest, match=says):
            make_dataset(Run(tmp_path / name, tmp_path / "out", 1), parts, [])
    (tmp_path / "empty" / "a.jpg").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"no triplet.*a\.jpg"):
        make_dataset(Run(tmp_path / "empty", tmp_path / "out", 1), parts, [])
    assert not (tmp_path / "out").exists()


def test_a_run_ends_when_nothing_more_comes_of_the_photographs(folder, parts, tmp_path):
    run = Run(folder, tmp_path / "out", 9, size=SIZE, categories=("text", "colour"))
    with pytest.raises(InvalidRequest, match="no triplet"):
        make_dataset(run, replace_finder(parts), [])


def replace_finder(parts) -> Parts:
    return replace(parts, text_finder=None)
