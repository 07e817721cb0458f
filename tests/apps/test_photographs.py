"""``step1x data photographs`` on real picture files, through the installed command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from step1x_edit.apps import cli
from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.shards import read

from .command import files_of, refused, run

EXAMPLES = Path(__file__).parents[2] / "examples"
LABELS = {"coffee.jpg": {"en": "cup of coffee", "zh": "咖啡杯"}}
COMMAND = ["data", "photographs", "pictures", "--out", "out", "--size", "128x96"]


@pytest.fixture
def here(tmp_path):
    """A folder with real photographs, one that is cut short, and labels."""
    (tmp_path / "pictures").mkdir()
    for picture in EXAMPLES.glob("*.jpg"):
        shutil.copy(picture, tmp_path / "pictures")
    whole = (EXAMPLES / "cat.jpg").read_bytes()
    (tmp_path / "pictures" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_photographs_become_a_dataset(here):
    done = run(here, [*COMMAND, "--num", "12", "--labels", "labels.json"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split()[::2] == ["12", "kept"]
    assert lines[-2].startswith("unreadable: pictures/half.jpg")
    assert lines[-1] == "out"
    records = [triplet for path in shard_paths(here / "out") for triplet in read(path)]
    assert len(records) == 12
    assert {triplet.photograph for triplet in records} <= {p.name for p in EXAMPLES.glob("*.jpg")}
    local = [t for t in records if t.category not in ("tone", "style", "background", "text")]
    assert local
    for triplet in local:
        assert triplet.photograph == "coffee.jpg"
        assert "cup of coffee" in triplet.instructions["en"]
    counts = json.loads((here / "out" / "drops.json").read_text())
    assert counts["kept"] == 12
    assert any("no name" in reason for reason in counts["dropped"])


def test_bad_input_is_one_line_and_leaves_nothing(here):
    (here / "empty").mkdir()
    (here / "bad.json").write_text('{"coffee.jpg": {"en": "cup"}}')
    (here / "bad.yaml").write_text("segmentor: {model: a}\n")
    (here / "gone.yaml").write_text("segmenter: {model: no/folder/here}\n")
    refused(here, [*COMMAND[:2], "empty", *COMMAND[3:]], "empty holds no photographs")
    refused(here, [*COMMAND[:2], "nowhere", *COMMAND[3:]], "nowhere.*no such folder")
    refused(here, [*COMMAND, "--labels", "bad.json"], r"bad.json.*coffee.jpg\.zh")
    refused(here, [*COMMAND, "--config", "bad.yaml"], "bad.yaml.*segmentor")
    refused(here, [*COMMAND, "--size", "100x100"], "100x100.*multiples of 16")


def test_an_output_folder_that_holds_something_is_refused(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    before = files_of(here)
    assert cli.run(COMMAND) == 2
    assert "out holds something else" in capsys.readouterr().err
    assert files_of(here) == before
