"""Everything in `examples/` runs, here on the tiny random model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from step1x_edit.apps import cli
from step1x_edit.datagen.captions import KINDS, wordings
from step1x_edit.request import read_provenance

EXAMPLES = Path(__file__).parents[1] / "examples"
TABLE = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_every_file_stands_in_the_table():
    for file in EXAMPLES.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in TABLE, file.name


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_short(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompts_name_pictures_and_edits_that_the_mini_knows(language):
    prompts = json.loads((EXAMPLES / f"prompts.{language}.json").read_text(encoding="utf-8"))
    assert set(prompts) == {file.name for file in EXAMPLES.glob("*.jpg")}
    known = {said for kind in KINDS for said in wordings(kind, language, "plain")}
    assert set(prompts.values()) <= known


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompts_run(language, tiny_model, tmp_path, capsys):
    command = ["batch", str(EXAMPLES / f"prompts.{language}.json"), "--model", str(tiny_model)]
    folders = ["--input-dir", str(EXAMPLES), "--output-dir", str(tmp_path)]
    assert cli.run([*command, *folders, "--keep", "off"]) == 0
    assert capsys.readouterr().out == "3 edited, 0 skipped (done), 0 failed\n"
    for file in EXAMPLES.glob("*.jpg"):
        assert Image.open(tmp_path / file.name).size == Image.open(file).size


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_edit_picture(monkeypatch, tiny_model, tmp_path, capsys):
    out = tmp_path / "out.png"
    picture = EXAMPLES / "cat.jpg"
    run(monkeypatch, "edit_picture.py", picture, "make it red", out, tiny_model)
    assert capsys.readouterr().out == f"{out}: 'make it red', seed 1\n"
    assert Image.open(out).size == Image.open(picture).size
    assert read_provenance(out).source_name == "cat.jpg"


def test_call_pipeline(monkeypatch, tiny_model, tmp_path):
    out = tmp_path / "out.png"
    run(monkeypatch, "call_pipeline.py", tiny_model, EXAMPLES / "cat.jpg", "make it red", out)
    assert Image.open(out).size == (64, 48)
